"""Sounds and pictures that a recipe has written, for the loggers of its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
import torch

from trainer import distributed
from trainer.loggers import loggers_of

if TYPE_CHECKING:
    from trainer import Brain


def record_sounds(brain: Brain, folder: Path) -> None:
    """Give the WAV files of a folder to the loggers, those of all ranks. A collective.

    A sound is called as its file is: "audio/00-free" of `RUN/audio/00-free.wav`.
    """
    distributed.barrier()
    if not distributed.is_main():
        return
    for path in sorted(folder.rglob("*.wav")):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        name = path.relative_to(folder.parent).with_suffix("").as_posix()
        loggers_of(brain).audio(name, torch.from_numpy(samples[:, 0]), rate, brain.optimizer_step)


def record_picture(brain: Brain, name: str, path: Path) -> None:
    """Give a PNG file to the loggers, if there is one."""
    if path.exists():
        loggers_of(brain).figure(name, path.read_bytes(), brain.optimizer_step)
