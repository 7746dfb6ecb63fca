"""Mixtures as the files of a corpus have them, checked and read.

Items are those of `recipes.separation.mixing`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import read_audio
from recipes.separation.mixing import SILENT, TRIES, check_parts
from trainer.data import BadItem, item_seed

UNEQUAL = 0.01  # of a mixture's level: by more it is not the sum of its sources (-40 dB)
ROUNDING = 1e-4  # of full scale: what 16-bit files of a mixture and its sources may differ by


class Mixture(NamedTuple):
    """The files of one mixture."""

    id: str
    mixture: Path
    sources: tuple[Path, ...]
    noise: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, the mixture first."""
        return self.mixture, *self.sources, *([self.noise] if self.noise else [])


class Recorded(Dataset[dict[str, Any]]):
    """Mixtures as their files have them, whole; or to train, ``seconds`` of each from anywhere.

    To train, each source is spoken at one of ``speeds``, and the mixture is made anew of them.
    Raises ValueError for a length or a speed that is not above 0.

    An item raises BadItem where a file cannot be used, has another rate or length than the others,
    is silent, or where the mixture is not the sum of its sources (and its noise).
    """

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        sample_rate: int,
        seconds: float | None = None,
        speeds: Sequence[float] = (1.0,),
    ) -> None:
        check_parts(1.0 if seconds is None else seconds, speeds)
        self.mixtures, self.sample_rate = list(mixtures), sample_rate
        self.seconds, self.speeds = seconds, tuple(speeds)

    def __len__(self) -> int:
        return len(self.mixtures)

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these mixtures."""
        return len({file for index in indices for file in self.mixtures[index].files})

    def name_of(self, index: int) -> str:
        """A mixture in an error message."""
        return f"{index} ({self.mixtures[index].id})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        files = self.mixtures[index]
        mixture, sources, noise = read_mixture(files, self.sample_rate)
        if self.seconds is not None:
            rng = random.Random(item_seed(files.id))
            mixture, sources = self._for_training(sources, noise, rng)
        return {"id": files.id, "mixture": mixture, "sources": sources}

    def _for_training(
        self, sources: Tensor, noise: Tensor, rng: random.Random
    ) -> tuple[Tensor, Tensor]:
        """A part of (T, S) sources and (T,) noise, at other speeds: its mixture, its sources."""
        assert self.seconds is not None
        changed = [_at_speed(source, rng.choice(self.speeds)) for source in sources.T]
        samples = min(len(noise), *map(len, changed))
        sources = torch.stack([each[:samples] for each in changed], 1)
        length = round(self.seconds * self.sample_rate)
        for _ in range(TRIES):  # A source that is silent here has no SI-SNR that could teach.
            start = rng.randint(0, max(0, samples - length))
            part = sources[start : start + length]
            if float(part.square().mean(0).min().sqrt()) > SILENT:
                break
        return part.sum(1) + noise[start : start + length], part


def _at_speed(signal: Tensor, speed: float) -> Tensor:
    if speed == 1.0:
        return signal
    from torchaudio.functional import resample  # where it is used: a second to import

    return resample(signal, round(100 * speed), 100)  # whole per cent: small filters


def read_mixture(files: Mixture, sample_rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of a mixture (T,), its sources (T, S) and its noise (T,), zeros without any.

    Raises BadItem, which names the file.
    """
    mixture = read_audio(files.mixture, sample_rate)
    parts = [*files.sources, *([files.noise] if files.noise else [])]
    signals = [read_audio(path, sample_rate) for path in parts]
    for path, signal in zip(parts, signals, strict=True):
        if len(signal) != len(mixture):
            raise BadItem(
                path,
                f"it has {len(signal)} samples, its mixture {files.mixture} has {len(mixture)}",
            )
    for path, signal in zip(files.sources, signals, strict=False):
        if float(signal.square().mean().sqrt()) <= SILENT:
            raise BadItem(path, "it is silent, and a mixture's sources must all be heard")
    rest = mixture - torch.stack(signals).sum(0)
    level, left = (float(each.square().mean().sqrt()) for each in (mixture, rest))
    if left > max(UNEQUAL * level, ROUNDING):
        names = ", ".join(str(path) for path in parts)
        raise BadItem(
            files.mixture,
            f"it is not the sum of {names}: {left / max(level, 1e-9):.1%} of its level is left",
        )
    count = len(files.sources)
    noise = signals[count] if files.noise else torch.zeros_like(mixture)
    return mixture, torch.stack(signals[:count], 1), noise


def recorded(
    corpus: Callable[[], Mapping[str, Sequence[Mixture]]],
    sample_rate: int,
    seconds: float,
    speeds: Sequence[float] = (1.0,),
) -> dict[str, Recorded]:
    """Datasets of train (``seconds`` of each mixture), valid and test (whole) from its files."""
    return {
        split: Recorded(mixtures, sample_rate, seconds, speeds)
        if split == "train"
        else Recorded(mixtures, sample_rate)
        for split, mixtures in corpus().items()
    }
