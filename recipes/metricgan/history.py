"""Signals that the generator has made: this epoch's, and those of past epochs to train against.

The discriminator forgets what it has learned of signals that the generator no longer makes; the
history shows it some of them again (MetricGAN+, section 2.2).

Signals are kept as 16-bit samples, 32 kB a second at 16 kHz, and are scored and judged as they are
kept. The history is a part of the checkpoint, which is hashed and replaced as a whole: a killed run
has that of its last checkpoint, to the bit. It is bounded for that reason, too: a thousand
utterances of 3 s are 96 MB in each checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer import distributed

FULL_SCALE = 32767


class Record(NamedTuple):
    """One enhanced utterance."""

    id: str
    index: int  # in the training set
    epoch: int  # of index and epoch follow the pair that it was made of
    wave: Tensor  # (S,) int16
    version: int = 0  # 0: the generator's own; others are variations of its mask
    score: float = math.nan  # normalised; NaN while it is not known, or could not be measured


def quantised(wave: Tensor) -> Tensor:
    """Samples between -1 and 1 as 16-bit numbers."""
    return (wave.detach().float().clamp(-1, 1) * FULL_SCALE).round().to(torch.int16).cpu()


def waveform(record: Record) -> Tensor:
    """The samples (S,) of a record, float32."""
    return record.wave.float() / FULL_SCALE


def padded(records: Sequence[Record | None], like: Tensor) -> Tensor:
    """The samples of records as a batch of the shape (B, S) of ``like``; silence for None."""
    waves = torch.zeros(like.shape)
    for wave, record in zip(waves, records, strict=True):
        if record is not None:
            wave[: len(record.wave)] = waveform(record)
    return waves.to(like, non_blocking=True)  # One copy, for which nobody waits.


class History:
    """The last enhanced utterances with their scores, of this process.

    Args:
        capacity: utterances that are kept; a new one takes the place of the oldest, at a cost that
            does not depend on how many there are.
        share: of them, for the historical pass of an epoch.

    Attributes:
        current: the records of the running epoch by their index and version.
        most: how many records the historical pass has, on the process that has the most.
    """

    def __init__(self, capacity: int = 1000, share: float = 0.2) -> None:
        if type(capacity) is not int or capacity < 1:
            raise ValueError(f"capacity of the history is {capacity!r}; allowed: 1, 2 …")
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share of the history is {share!r}; allowed: a number from 0 to 1")
        self.capacity, self.share = capacity, share
        self.current: dict[tuple[int, int], Record] = {}
        self.most = 0
        self._past: list[Record] = []
        self._oldest = 0  # what is replaced next, once the history is full

    def __len__(self) -> int:
        return len(self._past)

    def __getitem__(self, place: int) -> Record:
        return self._past[place]

    def append(self, record: Record) -> None:
        """Take in one record."""
        if len(self._past) < self.capacity:
            self._past.append(record)
        else:
            self._past[self._oldest] = record
            self._oldest = (self._oldest + 1) % self.capacity

    def draw(self, seed: int) -> list[tuple[int, Record]]:
        """The records of a historical pass, with their places, in a random order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._past), generator=generator).tolist()
        return [(place, self._past[place]) for place in order[: self._wanted()]]

    def _wanted(self) -> int:
        return math.ceil(len(self._past) * self.share)

    def close(self) -> None:
        """An epoch is over: what could be measured of it is past. Called by all processes."""
        for record in self.current.values():
            if math.isfinite(record.score):
                self.append(record)
        self.current = {}
        self.most = max(distributed.all_gather_json(self._wanted()))

    def state_dict(self) -> dict[str, Any]:
        """Every record, with the samples of all in one tensor."""
        return {
            "current": _packed(list(self.current.values())),
            "past": _packed(self._past),
            "oldest": self._oldest,
            "most": self.most,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; of a history that was larger, the newest."""
        self.current = {(each.index, each.version): each for each in _unpacked(state["current"])}
        past, oldest = _unpacked(state["past"]), state["oldest"]
        self._past, self._oldest = past, oldest
        if len(past) > self.capacity or (oldest and len(past) < self.capacity):
            self._past, self._oldest = (past[oldest:] + past[:oldest])[-self.capacity :], 0
        self.most = state["most"]


def _packed(records: Sequence[Record]) -> dict[str, Any]:
    waves = [record.wave for record in records]
    return {
        "ids": [record.id for record in records],
        "places": torch.tensor([[r.index, r.epoch, len(r.wave), r.version] for r in records]).view(
            -1, 4
        ),
        "scores": torch.tensor([record.score for record in records], dtype=torch.float64),
        "waves": torch.cat(waves) if waves else torch.empty(0, dtype=torch.int16),
    }


def _unpacked(state: Mapping[str, Any]) -> list[Record]:
    places = state["places"].tolist()
    waves = state["waves"].split([int(length) for _, _, length, _ in places])
    return [
        Record(id, int(index), int(epoch), wave.clone(), int(version), score)
        for id, (index, epoch, _, version), wave, score in zip(
            state["ids"], places, waves, state["scores"].tolist(), strict=True
        )
    ]
