"""Two processes end where one does on the joined batch."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.hifigan.scoring import Scores
from recipes.hifigan.train import HiFiGAN
from tests.processes import TwoRanks
from tests.recipes.hifigan.tiny import PLAYERS, Waves, fit, make, weights
from trainer import Stage

# Not AdamW: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}


class Scored(HiFiGAN):
    """Keeps the score of the last validation, and how many gradients each player's steps sent."""

    score = 0.0

    def init_optimizers(self) -> None:
        super().init_optimizers()
        self.sent = dict.fromkeys(PLAYERS, 0)

    def optimize(self, loss: Any, name: str | None = None, **options: Any) -> Any:
        plain = torch.distributed.all_reduce
        with mock.patch("torch.distributed.all_reduce", wraps=plain) as sent:
            report = super().optimize(loss, name, **options)
        tensors = [call.args[0] for call in sent.call_args_list]
        # Loss, weight and the like are float64.
        self.sent[str(name)] += sum(each.numel() for each in tensors if each.dtype == torch.float32)
        return report

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["mel_l1"] if stage is Stage.VALID and metrics else self.score
        return metrics


def trained(folder: str, batch_size: int, window: int, adversarial_from: int) -> dict[str, Any]:
    """Return the weights of both players after two epochs, and what evaluations gave."""
    hparams = {**SGD, "schedule": None, "adversarial_from": adversarial_from}
    brain = make(Scored, Path(folder), hparams, grad_accumulation_factor=window)
    fit(brain, 2, batch_size)
    mel = brain.modules.mel
    judges = Judges((), 16000, workers=0)  # The clips are too short for any measure but the mels.
    brain.scores = Scores(judges, mel, GriffinLim(mel, iterations=2), Path(folder), shown=2)
    brain.evaluate(Waves(3))
    own: dict[str, Any] = {player: weights(brain, player) for player in PLAYERS}
    return {
        **own, "sent": brain.sent, "steps": brain.optimizer_step, "mel_l1": brain.score,
        "test": brain.test_metrics,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("window", "adversarial_from", "steps"),
    [(1, 0, 6), (3, 0, 2), (1, 2, 6)],
    ids=["window-1", "window-3", "late"],
)
def test_two_processes_are_one(
    two_ranks: TwoRanks, tmp_path: Path, window: int, adversarial_from: int, steps: int
) -> None:
    """With accumulation too, and where the discriminator comes later."""
    folders = [tmp_path / "one", tmp_path / "two"]
    one = trained(str(folders[0]), 4, window, adversarial_from)
    ranks = two_ranks(trained, folders[1], 2, window, adversarial_from)
    tables = [(folder / "scores_test.csv").read_text() for folder in folders]
    first, second = ([row.split(",")[0] for row in table.splitlines()] for table in tables)
    assert first == second == ["id", "w0", "w1", "w2", "mean"]  # Each clip once.
    assert one["steps"] == steps
    for two in ranks:
        assert two["steps"] == one["steps"]
        assert two["mel_l1"] == pytest.approx(one["mel_l1"], abs=1e-4)
        assert two["test"] == pytest.approx(one["test"], abs=1e-3)
        assert set(two["test"]) == {"mel_l1", "mel_l1_griffinlim"}
        for player in PLAYERS:
            # A player's step sends its own gradients and nothing of the other's.
            judged = 4 if player == "discriminator" and adversarial_from else steps
            assert two["sent"][player] == judged * len(two[player])
            assert torch.equal(two[player], ranks[0][player])
            torch.testing.assert_close(two[player], one[player], rtol=0, atol=1e-5)
