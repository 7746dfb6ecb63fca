"""A small separator trained by two processes; each stores what came out on its side.

`trained` is the same on one process, on the joined batches.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torchaudio

from recipes.separation.train import Separator
from trainer import StepReport, distributed
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
    """What one process sees where two see each of two batches."""
    fields: dict[str, Any] = {"id": [name for part in parts for name in part.id]}
    for name in ("mixture", "sources"):
        columns = zip(*(part[name] for part in parts), strict=True)
        fields[name] = Padded(*map(torch.cat, columns))
    fields["share"] = torch.cat([part["share"] for part in parts])
    return Batch(fields, sum(map(len, parts)))


def trained(rank: int | None, folder: Path) -> dict[str, Any]:
    """Weights and reports after all rounds; None for the one process that sees both batches.

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
    batches = [join(pair) if rank is None else pair[rank] for pair in made]
    if rank is None:
        brain.fit([1], batches)
    else:
        brain.fit([1], [batch for pair in made for batch in pair])  # dealt in turn
    found = {
        "weights": brain.modules.state_dict(),
        "reports": brain.reports,
        "average": brain.stateful()["metrics"].part.average.value(),
        "skipped": brain.stateful()["metrics"].part.counts["skipped"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    brain.hparams.output_folder = str(folder)
    brain.evaluate([batch_of([HARD], 100 + n, samples=2000) for n in range(3)])
    return found | {"test": brain.test_metrics}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    own = distributed.rank()
    folder = Path(sys.argv[1])
    torch.save(trained(own, folder / "run"), folder / f"{own}.pt")
    distributed.stop()
