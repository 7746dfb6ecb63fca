"""Pairs of clean and noisy speech, recorded or mixed, as a dataset for enhancement.

    sources = voicebank(data_folder)["train"]
    train = Pairs(sources, sample_rate=16000, segment=16384)
    test = Pairs(sources, sample_rate=16000, fixed=True)

A source is one clip: `Recorded` (two files) or `Mixed` (speech with noise at a signal-to-noise
ratio drawn anew each time). What a source draws comes from (seed, epoch, item) in training, and
from the clip's name alone where ``fixed``: valid and test are the same in every epoch and run.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.cuts import AudioMixer, MonoCut, path_of
from recipes.common.loading import load
from trainer.data import BadItem, item_seed
from trainer.seed import derive

logger = logging.getLogger(__name__)

SILENT = 1e-4  # of full scale (-80 dB): a clip without a sample above it is silent
LOUDEST = 0.99  # of full scale: what would be above is turned down, clean and noisy alike

Pair = tuple[Tensor, Tensor]  # clean and noisy, (T,) each


class Source(Protocol):
    """Clip of clean speech that can be loaded with noise."""

    id: str

    @property
    def files(self) -> Sequence[str]:
        """Its files, without those of noise that many clips share."""

    @property
    def duration(self) -> float:
        """Seconds."""

    def load(self, sample_rate: int, rng: random.Random) -> Pair:
        """Load a clip, clean and noisy.

        Args:
            sample_rate: wanted rate, in Hz.
            rng: random generator of what is drawn.

        Returns:
            Samples (T,) of each, equally long.

        Raises:
            BadItem: a file cannot be used.
        """


class Noise(Protocol):
    """Source of noise to mix with speech."""

    def __call__(self, cut: MonoCut, samples: int, sample_rate: int, rng: random.Random) -> Tensor:
        """Return noise to mix with a clip.

        Args:
            cut: the clip.
            samples: number of samples of noise.
            sample_rate: in Hz.
            rng: random generator of what is drawn.

        Returns:
            Samples (T,), of any level.

        Raises:
            BadItem: a file cannot be used.
        """


@dataclass(frozen=True)
class Recorded:
    """A clip that was recorded (or mixed by others) twice: clean, and the same with noise."""

    clean: MonoCut
    noisy: MonoCut

    @property
    def id(self) -> str:
        return str(self.clean.id)

    @property
    def files(self) -> Sequence[str]:
        return path_of(self.clean), path_of(self.noisy)

    @property
    def duration(self) -> float:
        return float(self.clean.duration)

    def load(self, sample_rate: int, rng: random.Random) -> Pair:
        """Load both files. Raises BadItem where their lengths differ or the clean one is silent."""
        clean, noisy = (load(cut, sample_rate, resample=True) for cut in (self.clean, self.noisy))
        if len(clean) != len(noisy):
            raise BadItem(
                path_of(self.noisy),
                f"it gives {len(noisy)} samples, its clean partner {path_of(self.clean)} "
                f"{len(clean)}: a pair must be equally long",
            )
        check_heard(path_of(self.clean), clean)
        return clean, noisy


@dataclass(frozen=True)
class Mixed:
    """Clean speech with noise behind it, at a ratio drawn from ``snr`` = [lowest, highest] in dB.

    The ratio is that of the mean powers of the whole clip.
    """

    cut: MonoCut
    noise: Noise
    snr: tuple[float, float]

    @property
    def id(self) -> str:
        return str(self.cut.id)

    @property
    def files(self) -> Sequence[str]:
        return (path_of(self.cut),)

    @property
    def duration(self) -> float:
        return float(self.cut.duration)

    def load(self, sample_rate: int, rng: random.Random) -> Pair:
        """Load the speech, and mix it with noise. Raises BadItem where the speech is silent."""
        clean = load(self.cut, sample_rate, resample=True)
        check_heard(path_of(self.cut), clean)
        snr = rng.uniform(*self.snr)
        return mix(clean, self.noise(self.cut, len(clean), sample_rate, rng), snr, sample_rate)


def mix(clean: Tensor, noise: Tensor, snr: float, sample_rate: int) -> Pair:
    """Mix speech and noise.

    Args:
        clean: samples (T,) of the speech.
        noise: samples (T,) of the noise, of any level.
        snr: signal-to-noise ratio of the mixture, in dB.
        sample_rate: in Hz.

    Returns:
        The speech and the mixture, (T,) each, both turned down alike where the mixture would exceed
        full scale.
    """
    mixer = AudioMixer(clean[None].numpy(), sample_rate)
    mixer.add_to_mix(noise[None].numpy().astype(np.float32), snr=snr)
    noisy = torch.from_numpy(mixer.mixed_audio[0])
    gain = min(1.0, LOUDEST / float(noisy.abs().max()))
    return clean * gain, noisy * gain


def check_heard(path: str, samples: Tensor) -> None:
    """Raise BadItem for samples (T,) in which there is nothing to hear."""
    if not len(samples) or float(samples.abs().max()) < SILENT:
        raise BadItem(path, "it is silent: there is nothing that could be enhanced")


class Pairs(Dataset[dict[str, Any]]):
    """Clips as ``{"id", "noisy", "clean"}``, the latter (T,) float32 each.

    Args:
        sources: the clips, see `recipes.common.noisy_speech`.
        sample_rate: in Hz, of what is given; sources of another one are resampled.
        segment: give so many samples from a place drawn at random; None gives the whole clip.
            Clips that are shorter are left out, and counted in the log.
        fixed: draw everything from the clip's name, not from (seed, epoch, item).
        times: how often an epoch has each clip, every time with other draws (and ``#1``, ``#2`` …
            behind its id from the second time on).

    Raises ValueError when no clip is left.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sample_rate: int,
        segment: int | None = None,
        fixed: bool = False,
        times: int = 1,
    ) -> None:
        self.sample_rate, self.segment, self.fixed = sample_rate, segment, fixed
        self.sources, self.times = _at_least(sources, (segment or 1) / sample_rate), times

    @property
    def durations(self) -> list[float]:
        """Seconds of each item, for `recipes.common.loading.DurationBatches`."""
        if self.segment is not None:
            return [self.segment / self.sample_rate] * len(self)
        return [source.duration for source in self.sources] * self.times

    def __len__(self) -> int:
        return len(self.sources) * self.times

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):  # The IndexError ends an iteration.
            raise IndexError(f"there is no pair {index}; allowed: 0 to {len(self) - 1}")
        source, id = self.sources[index % len(self.sources)], self._id(index)
        rng = random.Random(derive(0, "pair", id) if self.fixed else item_seed(id))
        clean, noisy = source.load(self.sample_rate, rng)
        if self.segment is not None:
            if len(clean) < self.segment:  # Its header promised more.
                raise BadItem(
                    source.files[0], f"it has {len(clean)} samples, a segment has {self.segment}"
                )
            start = rng.randint(0, len(clean) - self.segment)
            clean, noisy = (side[start : start + self.segment] for side in (clean, noisy))
        return {"id": id, "noisy": noisy, "clean": clean}

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these clips, without those of shared noise."""
        used = {index % len(self.sources) for index in indices}
        return len({file for number in used for file in self.sources[number].files})

    def _id(self, index: int) -> str:
        time, number = divmod(index, len(self.sources))
        return self.sources[number].id + (f"#{time}" if time else "")

    def name_of(self, index: int) -> str:
        """Return what error messages call a clip."""
        return f"{index} ({self._id(index)})"


def _at_least(sources: Sequence[Source], shortest: float) -> list[Source]:
    """The clips that last so many seconds."""
    good = [source for source in sources if source.duration >= shortest]
    if not good:
        found = "there are no clips at all"
        if sources:
            longest = max(source.duration for source in sources)
            found = f"the longest of {len(sources)} clips lasts {longest:.3f} s"
        raise ValueError(f"no clip is as long as a segment of {shortest:.3f} s: {found}")
    if len(good) < len(sources):
        logger.info(
            "%d of %d clips are shorter than a segment of %.3f s: left out",
            len(sources) - len(good),
            len(sources),
            shortest,
        )
    return good


Corpus = Mapping[str, Sequence[Source]]  # clips by split: train, valid, test
