"""Transcribing with a trained recogniser.

model = trainer.load("results/asr/demo/1234")
transcript = model.transcribe("x.flac")
print(transcript, transcript.words)
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor, nn

from recipes.asr.decoding import Token, align, known_words, make_decoder, token_words
from recipes.common.audio import check_made
from recipes.common.hearing import Given, One, Piece, Several, batched, given_sounds, pieces
from trainer.inference.model import Model
from trainer.inference.results import Transcript, Word
from trainer.options import RunOptions

BATCH = 80.0  # seconds of sound to recognise at once, with padding


class Heard(NamedTuple):
    """Text of a piece, its words with times from the start of the sound, and tokens' scores."""

    text: str
    words: list[Word]
    scores: list[float]


class Transcriber(Model):
    """Recogniser by CTC, of a run of this recipe.

    Reads from the YAML ``sample_rate``, ``codec``, ``decoder``, ``beam_size`` and ``lexicon``.
    """

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"min_key": "wer"}

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        own = self.hparams
        self._decode = make_decoder(own.decoder, own.codec.tokens, own.beam_size)
        self._one_at_a_time = Lock()  # The network holds the padding of the batch that it is given.

    @overload
    def transcribe(self, sounds: One, rate: int | None = None) -> Transcript: ...

    @overload
    def transcribe(self, sounds: Several, rate: int | None = None) -> list[Transcript]: ...

    def transcribe(self, sounds: Given, rate: int | None = None) -> Transcript | list[Transcript]:
        """Return what is said in a sound, or in each sound of a list.

        Sounds of any rate and length; of several channels the mean is heard. What is longer than
        20 s is recognised in pieces, which are cut where it is quiet.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these, which are recognised in batches.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Returns:
            Text, words and scores; a list of these for a list. Times are those of the frames in
            which the letters of a word are recognised: a word may begin a little earlier, and end
            later.

        Raises:
            BadItem: a file cannot be used, or a sound is too short for the model.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        found: list[list[Heard]] = [[] for _ in sources]
        own = self.hparams.sample_rate
        for batch in batched(pieces(sources, own), round(BATCH * own)):
            names = [sources[piece.source].name for piece in batch]
            for piece, heard in zip(batch, self._heard(batch, names), strict=True):
                found[piece.source].append(heard)
        transcripts = [joined(each) for each in found]
        return transcripts if several else transcripts[0]

    def _heard(self, batch: list[Piece], names: list[str]) -> list[Heard]:
        """Recognise the pieces of a batch, of sounds with these names."""
        signals = [piece.signal for piece in batch]
        wavs = nn.utils.rnn.pad_sequence(signals, batch_first=True).to(self.device)
        lengths = torch.tensor([len(each) for each in signals], device=self.device)
        with torch.inference_mode(), self.autocast(), self._one_at_a_time:
            log_probs, frames = self.modules.model(wavs, lengths)
        log_probs, frames = log_probs.float().cpu(), frames.cpu()
        for name, each, count in zip(names, log_probs, frames.tolist(), strict=True):
            check_made(name, each[:count])
        return [
            self._words(tokens, each[:count], piece)
            for tokens, each, count, piece in zip(
                self._decode(log_probs, frames), log_probs, frames.tolist(), batch, strict=True
            )
        ]

    def _words(self, numbers: list[int], log_probs: Tensor, piece: Piece) -> Heard:
        """Return the text of tokens, and where each of its words is in the frames (T, V)."""
        codec = self.hparams.codec
        text = known_words(codec.decode(numbers), self.hparams.lexicon)
        tokens, spelt = align(numbers, log_probs), text.split()
        groups = token_words(codec, numbers)
        if len(groups) != len(spelt):  # A codec of another kind does not put words together.
            groups, spelt = [], []
        words = [
            self._word(word, [tokens[n] for n in group], piece)
            for word, group in zip(spelt, groups, strict=True)
        ]
        return Heard(text, words, [token.score for token in tokens])

    def _word(self, text: str, tokens: list[Token], piece: Piece) -> Word:
        first, step = self.modules.model.frame_times()
        duration = len(piece.signal) / self.hparams.sample_rate
        start, end = (
            piece.start + min(max(0.0, first + (frame - 0.5) * step), duration)
            for frame in (tokens[0].start, tokens[-1].end)
        )
        return Word(text, start, end, _mean([token.score for token in tokens]))


def joined(parts: list[Heard]) -> Transcript:
    """Return the transcript of a sound from those of its pieces."""
    text = " ".join(filter(None, (part.text for part in parts)))
    words = tuple(word for part in parts for word in part.words)
    scores = [score for part in parts for score in part.scores]
    return Transcript(text, words, _mean(scores) if scores else None)


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
