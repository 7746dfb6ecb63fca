"""Two processes end where one does on the joined batch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.segan.train import Enhancer
from tests.processes import TwoRanks
from tests.recipes.segan.tiny import fit, make
from trainer import Stage

EPOCHS = 2
PLAYERS = ("generator", "discriminator")
# Not RMSprop: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}


class Scored(Enhancer):
    """Keeps the score of the last validation."""

    score = 0.0

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["si_snr"] if metrics else self.score
        return metrics


def trained(folder: str, batch_size: int, window: int) -> dict[str, Any]:
    """Return the weights of both players after two epochs, and the last validation's score."""
    hparams = {**SGD, "schedule": None}
    brain = make(Scored, Path(folder), hparams, grad_accumulation_factor=window)
    fit(brain, EPOCHS, batch_size)
    weights = {
        name: torch.cat([p.detach().flatten() for p in brain.modules[name].parameters()])
        for name in PLAYERS
    }
    return {**weights, "steps": brain.optimizer_step, "si_snr": brain.score}


@pytest.mark.parametrize(("window", "steps"), [(1, 6), (3, 2)])
def test_two_processes_are_one(
    two_ranks: TwoRanks, tmp_path: Path, window: int, steps: int
) -> None:
    """With accumulation, too: each of a window's batches is dealt to both."""
    one = trained(str(tmp_path / "one"), 4, window)
    ranks = two_ranks(trained, tmp_path / "two", 2, window)
    assert one["steps"] == steps
    for two in ranks:
        assert two["steps"] == one["steps"]
        assert two["si_snr"] == pytest.approx(one["si_snr"], abs=1e-3)
        for name in PLAYERS:
            assert torch.equal(two[name], ranks[0][name])
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
