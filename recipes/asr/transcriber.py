"""Transcribing with a trained recogniser.

    model = trainer.load("results/asr/demo/1234")
    transcript = model.transcribe("x.flac")
    print(transcript, transcript.words)

Neither the training nor its data are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor, nn

from recipes.asr.decoding import Token, align, known_words, make_decoder, token_words
from recipes.common.audio import check_made
from recipes.common.hearing import (
    Given,
    One,
    Piece,
    Several,
    Source,
    batched,
    given_sounds,
    pieces,
)
from trainer.inference.model import Model
from trainer.inference.results import Transcript, Word
from trainer.options import RunOptions

BATCH = 80.0  # seconds of sound to recognise at once, with padding
ONE_AT_A_TIME = Lock()  # of several threads: a network holds the padding of its batch


class Heard(NamedTuple):
    """Text of a piece, its words with times from the start of the sound, and tokens' scores."""

    text: str
    words: list[Word]
    scores: list[float]


class PieceTranscriber(Model):
    """Base of recognisers, which are given pieces of sounds in batches."""

    uses: ClassVar[Sequence[str]] = ("model",)
    units: ClassVar[Mapping[str, str]] = {"wer": "%", "cer": "%"}

    def recognise(self, batch: list[Piece], names: list[str]) -> list[Heard]:
        """Return what is said in each piece of a batch.

        Args:
            batch: pieces at ``sample_rate`` of the YAML.
            names: names of their sounds, for messages.

        Raises:
            BadItem: a piece is too short.
        """
        raise NotImplementedError

    def batches(self, sources: list[Source]) -> Iterator[list[Piece]]:
        """Yield the pieces of sounds in batches."""
        rate = self.hparams.sample_rate
        yield from batched(pieces(sources, rate), round(BATCH * rate))

    @overload
    def transcribe(self, sounds: One, rate: int | None = None) -> Transcript: ...

    @overload
    def transcribe(self, sounds: Several, rate: int | None = None) -> list[Transcript]: ...

    def transcribe(self, sounds: Given, rate: int | None = None) -> Transcript | list[Transcript]:
        """Return what is said in a sound, or in each sound of a list.

        Sounds may have any rate and length; of several channels the mean is heard. What is longer
        than 20 s is recognised in pieces, which are cut where it is quiet.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these, which are recognised in batches.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Returns:
            Text, words and scores; a list of these for a list. A word's times are those of the
            frames in which the model tells its first and its last token, which may be some
            hundredths of a second within the word, and beyond it next to a pause.

        Raises:
            BadItem: a file cannot be used, or a sound is too short for the model.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        found: list[list[Heard]] = [[] for _ in sources]
        for batch in self.batches(sources):
            names = [sources[piece.source].name for piece in batch]
            for piece, heard in zip(batch, self.recognise(batch, names), strict=True):
                found[piece.source].append(heard)
        transcripts = [_joined(each) for each in found]
        return transcripts if several else transcripts[0]


class Transcriber(PieceTranscriber):
    """Recogniser by CTC, of a run of this recipe.

    Reads from the YAML ``sample_rate``, ``codec``, ``decoder``, ``beam_size`` and ``lexicon``.

    Raises:
        ValueError: the run has no vocabulary.
    """

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"min_key": "wer"}

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        own = self.hparams
        if not own.codec.tokens:
            raise ValueError("the run has no vocabulary: the file of its codec is missing")
        self._decode = make_decoder(own.decoder, own.codec.tokens, own.beam_size)

    def recognise(self, batch: list[Piece], names: list[str]) -> list[Heard]:
        signals = [piece.signal for piece in batch]
        wavs = nn.utils.rnn.pad_sequence(signals, batch_first=True).to(self.device)
        lengths = torch.tensor([len(each) for each in signals], device=self.device)
        with torch.inference_mode(), self.autocast(), ONE_AT_A_TIME:
            log_probs, frames = self.modules.model(wavs, lengths)
        log_probs, frames = log_probs.float().cpu(), frames.cpu()
        counts = frames.tolist()
        for name, each, count in zip(names, log_probs, counts, strict=True):
            check_made(name, each[:count])
        found = zip(self._decode(log_probs, frames), log_probs, counts, batch, strict=True)
        return [self._heard(tokens, each[:count], piece) for tokens, each, count, piece in found]

    def _heard(self, numbers: list[int], log_probs: Tensor, piece: Piece) -> Heard:
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


def _joined(parts: list[Heard]) -> Transcript:
    """Return the transcript of a sound from those of its pieces."""
    text = " ".join(filter(None, (part.text for part in parts)))
    words = tuple(word for part in parts for word in part.words)
    scores = [score for part in parts for score in part.scores]
    return Transcript(text, words, _mean(scores) if scores else None)


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
