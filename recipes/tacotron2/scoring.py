"""Scores of read texts: attention, length and spectrogram of each utterance, over all processes.

Attention and length are those of free-running synthesis, the spectrogram's error is that of teacher
forcing: what runs freely has a rhythm of its own, and its frames do not lie beside the true ones.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.tacotron2.model import padding_mask
from trainer import distributed

NEAR = 0.2  # of the true length: how far the gate may be from it


class Reading(NamedTuple):
    """An utterance as it was read."""

    id: str
    text: str
    focus: float  # its focus rate
    frames: int  # that were synthesised
    true_frames: int
    stopped: bool  # by the gate, not by the limit
    mel_l1: float  # of the teacher-forced spectrogram, natural logarithm

    @property
    def gate_ok(self) -> bool:
        """True if the gate stopped it within `NEAR` of the true length."""
        near = abs(self.frames - self.true_frames) <= NEAR * self.true_frames
        return self.stopped and near


class Scores:
    """The readings of a set of texts."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def gather(self) -> Scores:
        """The readings of all processes, in the order of their ids. A collective."""
        every = Scores()
        for part in distributed.all_gather_json(self.readings):
            every.readings += (Reading(*each) for each in part)
        every.readings.sort()
        return every

    def rates(self) -> dict[str, float]:
        """Means over utterances: ``{"focus_rate": 0.8, "gate_ok": 1.0, "mel_l1": 0.5}``."""
        count = len(self.readings)
        return {
            "focus_rate": sum(each.focus for each in self.readings) / count,
            "gate_ok": sum(each.gate_ok for each in self.readings) / count,
            "mel_l1": sum(each.mel_l1 for each in self.readings) / count,
        }

    def write(self, path: Path) -> None:
        """A table with a line an utterance."""
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*Reading._fields, "gate_ok"])
            table.writerows([*each, each.gate_ok] for each in self.readings)


def focus_rate(attention: Tensor, steps: Tensor) -> Tensor:
    """Return the sharpness of the attention (B, T, L) of so many steps (B,).

    For each utterance the mean over steps of the largest weight, ``F = 1/S sum_s max_t a_st`` of
    Ren et al. 2019 (FastSpeech, arXiv 1905.09263, section 3.3). 1 where each step reads one symbol,
    1 / L where it reads all alike.
    """
    sharp = attention.float().amax(-1)  # (B, T)
    sharp = sharp.masked_fill(padding_mask(steps, sharp.shape[1]), 0.0)
    return sharp.sum(1) / steps


def mel_error(found: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """The mean absolute difference of spectrograms (B, F, M) over each one's frames: (B,)."""
    error = (found.float() - target.float()).abs().mean(-1)
    return torch.where(padding_mask(frames, error.shape[1]), 0.0, error).sum(1) / frames
