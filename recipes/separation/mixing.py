"""Mixtures of people who talk at once, drawn anew from recordings of single people.

Items are ``{"id", "mixture", "sources"}``: samples (T,) and (T, S), time first, so that a batch
pads them. In training all randomness of an item comes from (seed, epoch, index) by way of the
loader, whichever process or worker makes it; in evaluation a mixture is the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.cuts import Cut, CutSet, count_files, path_of
from recipes.common.loading import load
from trainer.data import BadItem, item_seed
from trainer.seed import derive

LEVEL = 0.05  # root mean square of a source before its gain: -26 dB of full scale
PEAK = 0.95  # a louder mixture is turned down, with its sources
SILENT = 1e-4  # root mean square of what nobody can hear: -80 dB
TRIES = 8  # places in a recording at which it is tried before it counts as silent

Rng = random.Random
Noise = Callable[[Rng, int], Tensor]  # so many samples of some noise, at any level


@dataclass(frozen=True)
class Mixing:
    """Parameters of drawn mixtures.

    Args:
        sample_rate: Hz.
        speakers: how many different people talk.
        seconds: how long.
        gains: loudness of each source, dB around an equal level, drawn from this range.
        speeds: factors of the speed (and pitch) of each source, in training.
        pairs: "any" two people, or "unlike": one female, one male.
        noise_snr: the louder speaker over the noise, dB, drawn from this range (as in WHAM,
            Wichern et al. 2019, arXiv 1907.01160).
        resample: take recordings of other rates, too.
    """

    sample_rate: int
    speakers: int = 2
    seconds: float = 3.0
    gains: Sequence[float] = (-2.5, 2.5)
    speeds: Sequence[float] = (0.95, 1.0, 1.05)
    pairs: str = "any"
    noise_snr: Sequence[float] = (-6.0, 3.0)
    resample: bool = False

    def __post_init__(self) -> None:
        check_parts(self.seconds, self.speeds)
        if self.speakers < 2:
            raise ValueError(f"speakers is {self.speakers}; allowed: 2 or more")
        if self.pairs not in ("any", "unlike"):
            raise ValueError(f"pairs is {self.pairs!r}; allowed: any, unlike")
        if self.pairs == "unlike" and self.speakers != 2:
            raise ValueError(f"pairs: unlike is for 2 speakers, not for {self.speakers}")
        for name in ("gains", "noise_snr"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is [{low:g}, {high:g}]; allowed: [lowest, highest] in dB")

    @property
    def samples(self) -> int:
        """Of a mixture."""
        return round(self.seconds * self.sample_rate)


def check_parts(seconds: float, speeds: Sequence[float]) -> None:
    """Raise ValueError for a length or a speed at which nothing can be heard."""
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds:g}; allowed: above 0")
    if not speeds or not min(speeds) > 0:
        raise ValueError(
            f"speeds is {list(speeds)}; allowed: factors above 0, such as [0.95, 1.0, 1.05]"
        )


class Drawn(Dataset[dict[str, Any]]):
    """Mixtures that no file holds: ``size`` of them, drawn from recordings of single speakers.

    With ``train`` every epoch has others. Recordings that are too short for the highest speed are
    left out.

    Raises ValueError for recordings without a speaker, and for too few speakers.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        mixing: Mixing,
        size: int,
        train: bool = False,
        noise: Noise | None = None,
    ) -> None:
        self.mixing, self.size, self.train, self.noise = mixing, size, train, noise
        self.speeds = tuple(mixing.speeds) if train else (1.0,)
        self.people = _by_speaker(cuts, mixing.seconds * max(self.speeds))
        self.names = sorted(self.people)
        self._check_people()

    def _check_people(self) -> None:
        wanted, found = self.mixing.speakers, len(self.names)
        if found < wanted:
            raise ValueError(
                f"mixtures of {wanted} speakers need as many; there are recordings of at least "
                f"{self.mixing.seconds:g} s by {found}: {', '.join(self.names) or 'nobody'}"
            )
        if self.mixing.pairs == "unlike":
            genders = {_gender(cuts[0]) for cuts in self.people.values()}
            if genders != {"female", "male"}:
                raise ValueError(
                    "pairs: unlike needs female and male speakers; the recordings are said to be "
                    f"by {', '.join(sorted(map(str, genders)))} ones"
                )

    def __len__(self) -> int:
        return self.size

    def count_files(self, indices: Sequence[int]) -> int:
        """Return the number of recordings that so many mixtures can have; noise is not counted."""
        every = count_files(cut for cuts in self.people.values() for cut in cuts)
        return min(every, len(indices) * self.mixing.speakers)

    def name_of(self, index: int) -> str:
        """A mixture in an error message."""
        return f"mixture {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Rng(item_seed(index) if self.train else derive(0, "mixture", index))
        cuts = [rng.choice(self.people[name]) for name in self._speakers(rng)]
        sources = torch.stack([self._spoken(cut, rng) for cut in cuts], 1)  # (T, S)
        mixture = sources.sum(1)
        if self.noise is not None:
            mixture = mixture + self._noise(sources, rng)
        scale = min(1.0, PEAK / max(float(mixture.abs().max()), float(sources.abs().max()), 1e-9))
        name = "_".join([f"{index:05d}", *(cut.id for cut in cuts)])
        return {"id": name, "mixture": scale * mixture, "sources": scale * sources}

    def _speakers(self, rng: Rng) -> list[str]:
        if self.mixing.pairs == "any":
            return rng.sample(self.names, self.mixing.speakers)
        first = rng.choice(self.names)
        others = [n for n in self.names if _gender(self.people[n][0]) != self._gender_of(first)]
        return [first, rng.choice(others)]

    def _gender_of(self, name: str) -> str | None:
        return _gender(self.people[name][0])

    def _spoken(self, cut: Cut, rng: Rng) -> Tensor:
        """A part of a recording, at some speed and gain: (T,).

        Raises BadItem for a recording in which nothing can be heard.
        """
        mixing, speed = self.mixing, rng.choice(self.speeds)
        gain = 10 ** (rng.uniform(*mixing.gains) / 20)
        seconds = min(mixing.seconds * speed, cut.duration)
        for _ in range(TRIES):
            start = rng.uniform(0.0, cut.duration - seconds)
            part = cut.truncate(offset=start, duration=seconds)
            part = part if speed == 1.0 else part.perturb_speed(speed)
            signal = fitted(load(part, mixing.sample_rate, mixing.resample), mixing.samples)
            level = float(signal.square().mean().sqrt())
            if level > SILENT:
                return signal * (LEVEL * gain / level)
        raise BadItem(path_of(cut), "it is silent: nothing in it is louder than -80 dB")

    def _noise(self, sources: Tensor, rng: Rng) -> Tensor:
        """Noise behind (T, S), so much below the loudest of the sources: (T,)."""
        assert self.noise is not None
        wave = self.noise(rng, len(sources))
        loudest = sources.square().mean(0).max().sqrt()
        snr = rng.uniform(*self.mixing.noise_snr)
        return wave * loudest / wave.square().mean().sqrt().clamp(min=1e-9) * 10 ** (-snr / 20)


def _by_speaker(cuts: Iterable[Cut], shortest: float) -> dict[str, list[Cut]]:
    people: dict[str, list[Cut]] = {}
    for cut in cuts:
        speaker = cut.supervisions[0].speaker if cut.supervisions else None
        if not speaker:
            raise ValueError(f"nobody is named as the speaker of {cut.id}; mixtures need to know")
        if cut.duration >= shortest:
            people.setdefault(speaker, []).append(cut)
    return people


def _gender(cut: Cut) -> str | None:
    gender: str | None = cut.supervisions[0].gender
    return gender


def fitted(signal: Tensor, samples: int) -> Tensor:
    """(T,) with so many samples: cut, or filled with zeros at its end."""
    return torch.nn.functional.pad(signal[:samples], (0, max(0, samples - len(signal))))


def drawn(
    corpus: Callable[[], Mapping[str, CutSet]],
    mixing: Mixing,
    mixtures: Mapping[str, int],
    noise: Callable[[], Mapping[str, Noise]] | None = None,
) -> dict[str, Drawn]:
    """Datasets of train, valid and test, of so many ``mixtures`` each, from a corpus of speech."""
    cuts, noises = corpus(), noise() if noise is not None else {}
    return {
        split: Drawn(cuts[split], mixing, size, split == "train", noises.get(split))
        for split, size in mixtures.items()
    }
