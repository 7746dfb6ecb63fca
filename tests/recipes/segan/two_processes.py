"""One of two processes that train a SEGAN together.

python -m tests.recipes.segan.two_processes FOLDER
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.segan.train import Enhancer
from tests.recipes.segan.tiny import fit, make
from trainer import Stage, distributed

EPOCHS = 2
# Not RMSprop: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}


class Scored(Enhancer):
    """Remembers what validation found."""

    score = 0.0

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["si_snr"] if metrics else self.score
        return metrics


def trained(folder: Path, batch_size: int, window: int) -> dict[str, Any]:
    """The weights of both players after two epochs, and the scores of the last validation."""
    hparams = {**SGD, "schedule": None}
    brain = make(Scored, folder, hparams, grad_accumulation_factor=window)
    fit(brain, EPOCHS, batch_size)
    weights = {
        name: torch.cat([p.detach().flatten() for p in brain.modules[name].parameters()])
        for name in ("generator", "discriminator")
    }
    return {
        **weights,
        "steps": brain.optimizer_step,
        "si_snr": brain.score,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start("cpu")
    for window in (1, 3):
        found = trained(folder / f"two-{window}", 2, window)
        torch.save(found, folder / f"window-{window}-rank-{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
