"""Embeddings of sounds: of classifiers and speaker models, and of pretrained encoders.

    model = trainer.load("results/finetune/speaker/1234")
    one, other = model.embed(["a.wav", "b.wav"])
    print(one.similarity(other))

Neither the training nor its data are imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize

from recipes.common.audio import check_length, check_made
from recipes.common.hearing import Given, One, Piece, Several, Source, batched, given_sounds
from recipes.common.resampling import resampled
from trainer.inference.model import Model
from trainer.inference.results import Embedding

BATCH = 60.0  # seconds of sound to embed at once


class Embedder(Model):
    """Base of models that give a vector for a sound."""

    def vectors(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Return the embeddings of a batch.

        Args:
            wavs: signals (B, S), padded with zeros, at the rate of `input_limits`.
            lengths: number of samples of each (B,).

        Returns:
            Embeddings (B, D).
        """
        raise NotImplementedError

    def input_limits(self) -> tuple[int, int, float]:
        """Return the rate in Hz, the fewest samples, and the most seconds of a signal."""
        raise NotImplementedError

    @overload
    def embed(self, sounds: One, rate: int | None = None) -> Embedding: ...

    @overload
    def embed(self, sounds: Several, rate: int | None = None) -> list[Embedding]: ...

    def embed(self, sounds: Given, rate: int | None = None) -> Embedding | list[Embedding]:
        """Return the embedding of a sound, or of each sound of a list: a vector (D,).

        That of a long sound is the mean of the directions of its pieces. Of several channels the
        mean is heard.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Returns:
            The embedding; a list of them for a list.

        Raises:
            BadItem: a file cannot be used, or a sound is too short for the model.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        found = [Embedding(normalize(each).mean(0)) for each in self.piece_vectors(sources)]
        return found if several else found[0]

    def piece_vectors(self, sources: Sequence[Source]) -> list[Tensor]:
        """Return the vectors (P, D) of the pieces of each sound, on the CPU."""
        rate, shortest, seconds = self.input_limits()
        found: list[list[Tensor]] = [[] for _ in sources]
        parts = equal_pieces(sources, rate, seconds, shortest)
        # A batch has pieces of one length, since some encoders read the padding. Pieces of a single
        # sound go one by one, so that the digits printed for a file do not depend on its length.
        most = round(BATCH * rate) if len(sources) > 1 else 1
        for batch in batched(parts, most, padded=False):
            wavs = torch.stack([piece.signal for piece in batch]).to(self.device)
            lengths = torch.full((len(wavs),), wavs.shape[1], device=self.device)
            with torch.inference_mode(), self.autocast():
                vectors = self.vectors(wavs, lengths).float().cpu()
            for piece, vector in zip(batch, vectors, strict=True):
                check_made(sources[piece.source].name, vector)
                found[piece.source].append(vector.clone())
        return [torch.stack(each) for each in found]


class EncoderFeatures(Embedder):
    """Encoder that was pretrained by masked prediction: embeddings are the mean of its frames."""

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"max_key": "accuracy"}
    uses: ClassVar[Sequence[str]] = ("model",)

    def vectors(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        features, _ = self.modules.model.encoder(wavs, lengths)  # (B, T, D), of one length
        mean: Tensor = features.float().mean(1)
        return mean

    def input_limits(self) -> tuple[int, int, float]:
        encoder = self.modules.model.encoder
        return encoder.rate, encoder.shortest, 20.0


def equal_pieces(
    sources: Sequence[Source], rate: int, seconds: float, shortest: int = 1
) -> Iterator[Piece]:
    """Yield the mean of the channels of sounds in order, each in equal pieces of so many seconds.

    Args:
        sources: the sounds; one after the other is read, piece by piece.
        rate: wanted rate, in Hz.
        seconds: length of a piece, at most.
        shortest: samples that a sound needs.

    Raises:
        BadItem: a file cannot be used, or is too short.
    """
    for number, source in enumerate(sources):
        own = source.header.sample_rate
        length = math.ceil(source.header.samples * rate / own)
        check_length(source.name, length, rate, shortest)
        count = math.ceil(length / (seconds * rate))
        size, given, waiting = length // count, 0, torch.zeros(0)
        for block in resampled((each.mean(0)[None] for each in source.blocks()), own, rate):
            waiting = torch.cat([waiting, block[0]])
            for piece in waiting.split(size)[: min(len(waiting) // size, count - given)]:
                yield Piece(number, given * size / rate, piece)
                given += 1
            waiting = waiting[len(waiting) // size * size :] if given < count else waiting[:0]
        if given < count and len(waiting) >= shortest:  # An MP3 may lack a frame of its length.
            yield Piece(number, given * size / rate, waiting)
