"""A GAN with every kind of state, whose checkpoint of an earlier version the tests resume.

Run as a program with a folder, it trains, saves in the middle of an accumulation window, and writes
beside the checkpoint the losses that the uninterrupted run goes on to:

    python -m tests.trainer.old_checkpoint FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import Brain, Checkpointer, Stage
from trainer.clipping import AutoClip
from trainer.schedules import NewBob, WarmupDecay

STOP = 24  # batches; with 7 an epoch and windows of 4 it lies in a window of the fourth epoch
EPOCHS = 6


def batches(number: int = 7) -> list[dict[str, Any]]:
    """Fixed inputs (5, 3) and targets (5, 2); nothing is drawn at random per item."""
    numbers = torch.Generator().manual_seed(3)
    return [
        {
            "id": [f"b{i}-{k}" for k in range(5)],
            "x": torch.randn(5, 3, generator=numbers),
            "y": torch.randn(5, 2, generator=numbers),
        }
        for i in range(number)
    ]


def network(inputs: int, outputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs))


class Adversaries(Brain):
    """Two players; each step's losses are appended to ``trace``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace: list[list[float]] = []
        self.count = 0

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "discriminator": torch.optim.AdamW(self.modules.discriminator.parameters(), lr=0.02),
            "generator": torch.optim.Adam(self.modules.generator.parameters(), lr=0.03),
        }

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        judge = self.modules.discriminator
        with self.autocast():
            fake = self.modules.generator(batch["x"])
            real_score, fake_score = judge(batch["y"]), judge(fake.detach())
            loss_d = (real_score.float() - 1).square().mean() + fake_score.float().square().mean()
        self.optimize(loss_d, "discriminator")
        with self.frozen("discriminator"), self.autocast():
            loss_g = (judge(fake).float() - 1).square().mean() + fake.float().square().mean()
        self.optimize(loss_g, "generator")
        self.count += 1
        self.trace.append([loss_d.item(), loss_g.item()])
        if self.count == STOP and self.options.output_folder is not None:
            self.checkpointer.save_checkpoint(name="window")
        return {"d": loss_d, "g": loss_g}

    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        with self.autocast():
            return (self.modules.generator(batch["x"]).float() - batch["y"]).square().mean()

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
        values = stage_loss.values() if isinstance(stage_loss, dict) else [stage_loss]
        self.trace.append(list(values))


def make(checkpoints: Path, saves: bool = False) -> Adversaries:
    """The Brain, with its checkpoints in a folder; ``saves``: it saves after `STOP` batches."""
    return Adversaries(
        {"discriminator": network(2, 1, 1), "generator": network(3, 2, 2)},
        hparams={
            "schedule": {
                "discriminator": lambda optimizer: WarmupDecay(optimizer, 2, 30),
                "generator": lambda optimizer: NewBob(optimizer, threshold=0.5),
            },
            "clip": AutoClip(percentile=40.0, history=10),
        },
        run_opts={
            "device": "cpu",
            "precision": "fp16",
            "ema_decay": 0.9,
            "grad_accumulation_factor": 4,
            "progressbar": False,
            "monitor_every": 0,
            "output_folder": str(checkpoints.parent) if saves else None,
        },
        checkpointer=Checkpointer(checkpoints, keep_last=1),
    )


def fit(brain: Adversaries) -> list[list[float]]:
    """Train to the end; the losses of each step and stage since this process began."""
    brain.fit(range(1, EPOCHS + 1), batches(), batches(3))
    return brain.trace


def main(folder: str) -> None:
    root = Path(folder)
    trace = fit(make(root / "run" / "checkpoints", saves=True))
    shutil.copytree(root / "run" / "checkpoints" / "window", root / "window")
    shutil.rmtree(root / "run")
    # Three epochs, each with a stage of training and one of validation, came before the save.
    after = trace[STOP + 6 :]
    (root / "losses.json").write_text(json.dumps(after, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
