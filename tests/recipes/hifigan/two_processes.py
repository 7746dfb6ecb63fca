"""One of two processes that train a HiFi-GAN together.

python -m tests.recipes.hifigan.two_processes FOLDER
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.hifigan.scoring import Scores
from recipes.hifigan.train import HiFiGAN
from tests.recipes.hifigan.tiny import PLAYERS, Waves, fit, make, weights
from trainer import Stage, distributed

# Not AdamW: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}
SETTINGS = {"window-1": (1, 0), "window-3": (3, 0), "late": (1, 2)}  # window, adversarial_from


class Scored(HiFiGAN):
    """Remembers what validation found, and how many numbers each player's step sent."""

    score = 0.0

    def init_optimizers(self) -> None:
        super().init_optimizers()
        self.sent: dict[str, list[int]] = {player: [] for player in PLAYERS}

    def optimize(self, loss: Any, name: str | None = None, **options: Any) -> Any:
        sizes: list[int] = []
        plain = distributed.all_reduce_sum_

        def summed(tensor: Any) -> Any:
            sizes.append(tensor.numel())
            return plain(tensor)

        distributed.all_reduce_sum_ = summed
        try:
            report = super().optimize(loss, name, **options)
        finally:
            distributed.all_reduce_sum_ = plain
        self.sent[str(name)] += sizes
        return report

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["mel_l1"] if stage is Stage.VALID and metrics else self.score
        return metrics


def trained(folder: Path, batch_size: int, name: str) -> dict[str, Any]:
    """The weights of both players after two epochs, and the last validation."""
    window, start = SETTINGS[name]
    hparams = {**SGD, "schedule": None, "adversarial_from": start}
    brain = make(Scored, folder, hparams, grad_accumulation_factor=window)
    fit(brain, 2, batch_size)
    mel = brain.modules.mel
    judges = Judges((), 16000, workers=0)  # the clips are too short for any measure but the mels
    brain.scores = Scores(judges, mel, GriffinLim(mel, iterations=2), folder, shown=2)
    brain.evaluate(Waves(3))
    own: dict[str, Any] = {player: weights(brain, player) for player in PLAYERS}
    # Of each step a sum of the loss, one of the weight, and for each parameter its gradient and
    # how many ranks had one.
    least = {player: 2 + len(own[player]) + len([*brain.modules[player].parameters()])
             for player in PLAYERS}  # fmt: skip
    own["extra"] = {
        player: [size - least[player] for size in sizes] for player, sizes in brain.sent.items()
    }
    return {
        **own, "steps": brain.optimizer_step, "mel_l1": brain.score, "test": brain.test_metrics,
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start("cpu")
    for name in SETTINGS:
        found = trained(folder / name, 2, name)
        torch.save(found, folder / f"{name}-rank-{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
