"""Two processes end where one does on the joined batches, and go on where they were stopped.

What must be equal is everything that is trained, and the power iterations of the spectral norms:
these follow from the weights and from how often the discriminator was asked, which is as often on
every process, also on one that has nothing to ask. The norm of the discriminator's input sees one
utterance at a time, so that nothing has to travel for it.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from recipes.metricgan.history import History
from recipes.metricgan.phases import Phase
from recipes.metricgan.train import Enhancer
from tests.processes import TwoRanks
from tests.trainer.resuming import differences
from trainer import Stage, distributed

from .small import Tones, final_state, fit, make

# Drawing the log of a run takes longer than the run.
NO_REPORT = mock.patch("trainer.report.write_html", lambda folder: folder)
# Not Adam: its first steps divide each gradient by itself, and rounding errors with it.
SGD = {name: partial(torch.optim.SGD, lr=0.01, momentum=0.9) for name in ("opt_g", "opt_d")}
PAIRS, VALID = Tones(8, 700), Tones(3, 700, fixed=True)


def phases(items: int, size: int) -> list[Phase]:
    """Return the phases; of several processes each has its part of a batch."""
    size //= distributed.world_size()
    return [
        Phase("warm_up", 1, items=items, batch_size=size, passes=["spectral"]),
        Phase("metric", 2, items=items, batch_size=size),
    ]


# By name: utterances of an epoch, batch size, share of the history, whom nobody can measure,
# window. Of five in batches of four, one process has none in the last, and some batches have none
# that can be measured. A batch of the history holds all: each process draws from its own.
RUNS: dict[str, tuple[int, int, float, list[str], int]] = {
    "few": (5, 4, 0.0, ["tone0", "tone2", "tone5"], 2),
    "history": (6, 6, 1.0, [], 1),
    "varied": (5, 4, 0.0, ["tone0"], 2),
}
# As in the demo: versions of each utterance to compare, and an optimizer for some layers.
VARIED = {
    "variations": 1, "within_weight": 20.0, "metric_layers": ["linear", "sigmoid"],
    "opt_metric": SGD["opt_g"],
}  # fmt: skip


class Scored(Enhancer):
    """Keeps the score of the last validation."""

    score = 0.0

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.score = metrics["pesq"] if metrics else self.score
        return metrics


def trained(folder: str, name: str) -> dict[str, Any]:
    """Return what one of RUNS ends with."""
    items, size, share, bad, window = RUNS[name]
    brain = make(
        Path(folder), phases(items, size), brain=Scored, bad=bad, grad_accumulation_factor=window,
        hparams={**SGD, "history": History(100, share), **(VARIED if name == "varied" else {})},
        seed=distributed.rank(),
        drift_check_every=1,
    )  # fmt: skip
    with NO_REPORT:
        fit(brain, PAIRS, VALID)
    return {
        "weights": {name: tensor.detach() for name, tensor in brain.modules.state_dict().items()},
        "optimizer_step": brain.optimizer_step,
        "history": sorted(brain.history[i].id for i in range(len(brain.history))),
        "score": brain.score,
    }


class Stopped(Enhancer):
    """Saves a checkpoint after one of the batches."""

    batch, stop = 0, 0

    def fit_batch(self, batch: Any) -> Any:
        losses = super().fit_batch(batch)
        self.batch += 1
        if self.batch == self.stop:
            self.checkpointer.save_checkpoint(name="stop")
        return losses


def straight_and_resumed(folder: str) -> dict[str, Any]:
    """Run, resume from the middle of the last epoch, and compare."""
    straight, again = Path(folder, "straight"), Path(folder, "again")
    ends = []
    for into, seed, stop in ((straight, 0, 11), (again, 9, 0)):
        if into == again and distributed.is_main():
            shutil.copytree(straight / "saved/stop", again / "saved/stop")
            shutil.copy(straight / "metrics.jsonl", again)
        distributed.barrier()
        brain = make(into, phases(6, 4)[1:], brain=Stopped, seed=seed)
        brain.stop = stop
        with NO_REPORT:
            fit(brain, PAIRS)
        ends.append(final_state(brain))
    return {"found": list(differences(*ends))[:20], "kept": len(brain.history)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(two_ranks: TwoRanks, tmp_path: Path, name: str) -> None:
    one, two = trained(str(tmp_path / "one"), name), two_ranks(trained, tmp_path / "two", name)
    assert one["optimizer_step"] == two[0]["optimizer_step"] > 5
    assert sorted(two[0]["history"] + two[1]["history"]) == one["history"]
    assert len(one["history"]) >= 3
    for found in two:
        assert found["score"] == pytest.approx(one["score"], abs=1e-4)
        assert found["optimizer_step"] == one["optimizer_step"]
        for key, tensor in found["weights"].items():
            assert torch.equal(tensor, two[0]["weights"][key]), key
            torch.testing.assert_close(tensor, one["weights"][key], rtol=0, atol=1e-5)


def test_two_go_on_exactly(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Each with the history that is its own."""
    for found in two_ranks(straight_and_resumed, tmp_path):
        assert found["found"] == []
        assert found["kept"] == 6
