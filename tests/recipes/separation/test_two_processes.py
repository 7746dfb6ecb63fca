"""Two processes end where one does on the joined batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio

from recipes.separation.train import Separator
from tests.processes import TwoRanks
from trainer import Stage, StepReport, distributed
from trainer.data import Batch, Padded

EASY, HARD = 1e-4, 1.0  # the share of what the network says in what is called its estimate
HUGE = 1e9  # added to the loss, which is then above the limit
ROUNDS = [
    [[HARD, HARD, HARD], [HARD]],  # unlike numbers of mixtures
    [[HARD, EASY], [EASY, HARD, HARD]],  # some of them too easy
    [[EASY, EASY], [HARD]],  # nothing is left on rank 0
    [[HARD], [math.nan, HARD]],  # not a number on rank 1
    [[EASY], [EASY, EASY]],  # nothing is left at all
    [[HUGE], [HARD, HARD]],  # above the limit on rank 0
    [[HARD, HARD], [HARD, EASY]],
]


class Skewed(Separator):
    """Its estimates are moved towards the sources of mixtures that are called easy."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.reports: list[list[Any]] = []
        self.train_losses: list[float] = []

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        if stage is Stage.TRAIN:
            self.train_losses.append(stage_loss)
        return super().on_stage_end(stage, stage_loss, epoch)

    def fit_batch(self, batch: Any) -> StepReport:
        report = super().fit_batch(batch)
        self.reports.append([report.outcome, report.loss, report.weight, report.norm])
        return report

    def losses(self, estimates: torch.Tensor, batch: Any) -> torch.Tensor:
        sources = batch.sources.data.transpose(1, 2)
        own = batch["share"].clamp(max=HARD)
        share = own[:, None, None]
        losses = super().losses(share * estimates + (1 - share) * sources, batch)
        return losses + (batch["share"] - own)


def batch_of(shares: list[float], seed: int, samples: int = 400) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(len(shares), samples, 2, generator=generator, dtype=torch.float64)
    lengths = torch.full((len(shares),), samples)
    fields = {
        "id": [f"{seed}-{n}" for n in range(len(shares))],
        "mixture": Padded(sources.sum(-1), lengths),
        "sources": Padded(sources, lengths),
        "share": torch.tensor(shares, dtype=torch.float64),
    }
    return Batch(fields, len(shares))


def join(parts: list[Batch]) -> Batch:
    """Concatenate two batches: one process sees in one what two ranks see."""
    fields: dict[str, Any] = {"id": [name for part in parts for name in part.id]}
    for name in ("mixture", "sources"):
        columns = zip(*(part[name] for part in parts), strict=True)
        fields[name] = Padded(*map(torch.cat, columns))
    fields["share"] = torch.cat([part["share"] for part in parts])
    return Batch(fields, sum(map(len, parts)))


def trained(folder: str) -> dict[str, Any]:
    """Return weights and reports after all rounds; one process sees both ranks' batches.

    A test follows, of which the table and the sounds are in the folder.
    """
    torch.manual_seed(0)
    model = torchaudio.models.ConvTasNet(2, 16, 8, 3, 8, 8, 1, 1, "relu").double()
    hparams = {
        "threshold_byloss": True, "threshold": -30.0, "loss_upper_lim": 999999.0,
        "sample_rate": 8000, "progressbar": False, "device": "cpu", "max_grad_norm": 1.0,
    }  # fmt: skip
    brain = Skewed({"separator": model}, lambda p: torch.optim.Adam(p, 0.01), hparams)
    made = [[batch_of(n, 2 * i + r) for r, n in enumerate(pair)] for i, pair in enumerate(ROUNDS)]
    if distributed.world_size() == 1:
        brain.fit([1], [join(pair) for pair in made])
    else:
        brain.fit([1], [batch for pair in made for batch in pair])  # Dealt in turn.
    found = {
        "weights": brain.modules.state_dict(),
        "reports": brain.reports,
        "train_losses": brain.train_losses,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    brain.hparams.output_folder = folder
    brain.evaluate([batch_of([HARD], 100 + n, samples=2000) for n in range(3)])
    return found | {"test": brain.test_metrics}


def test_two_processes_end_as_one_on_the_joined_batches(
    two_ranks: TwoRanks, tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    one = trained(str(runs[0]))
    first, second = two_ranks(trained, runs[1])
    outcomes = [outcome for outcome, *_ in one["reports"]]
    assert outcomes == ["stepped"] * 3 + ["skipped"] * 3 + ["stepped"]
    assert [weight for _, _, weight, _ in one["reports"]] == [4, 3, 1, 3, 0, 3, 3]
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-12, rtol=1e-9)
    for both, alone in zip(first["reports"], one["reports"], strict=True):
        assert both[0] == alone[0]
        assert both[1:] == [pytest.approx(each) for each in alone[1:]]
    assert first["reports"] == second["reports"]
    assert first["train_losses"] == second["train_losses"] == pytest.approx(one["train_losses"])
    assert len(one["train_losses"]) == 1
    assert first["test"] == second["test"] == pytest.approx(one["test"])
    tables = [(folder / "scores_test.csv").read_text() for folder in runs]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + 3  # each mixture once
    sounds = [{path.relative_to(folder) for path in folder.rglob("*.wav")} for folder in runs]
    assert sounds[0] == sounds[1]
    assert len(sounds[0]) == 2 * 3 * 5  # of all three, as worst and as best: five signals each
