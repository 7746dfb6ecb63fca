"""Two processes end where one does on the joined batches."""

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from recipes.common.mel import LogMel
from recipes.tacotron2.losses import Objective
from recipes.tacotron2.train import Synthesiser
from tests.processes import TwoRanks
from tests.recipes.tacotron2.conftest import tacotron
from trainer import distributed
from trainer.data import Batch, Padded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason="needs the extra tts"
)
# Symbols and frames of the utterances of each process, a round a line.
ROUNDS = [
    [[(4, 9), (7, 12), (5, 5)], [(6, 20)]],
    [[(3, 7)], [(8, 11), (5, 14)]],
    [[(9, 16), (2, 4)], [(4, 8), (6, 6)]],
]


class Undropped(Synthesiser):
    """Trains without what is random or depends on the rest of the batch."""

    def on_stage_start(self, stage: Any, epoch: int | None = None) -> None:
        super().on_stage_start(stage, epoch)
        for module in self.modules.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def batch_of(sizes: list[tuple[int, int]], seed: int) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    symbols, frames = (torch.tensor(each) for each in zip(*sizes, strict=True))
    tokens = torch.randint(1, 12, (len(sizes), 10), generator=numbers)
    mels = torch.randn(len(sizes), 24, 6, generator=numbers, dtype=torch.float64)
    fields = {
        "id": [f"{seed}-{n}" for n in range(len(sizes))],
        "tokens": Padded(tokens[:, : int(symbols.max())], symbols),
        "mel": Padded(mels, frames),
    }
    return Batch(fields, len(sizes))


def join(parts: list[Batch]) -> Batch:
    """Concatenate two batches: one process sees in one what two ranks see."""
    fields: dict[str, Any] = {"id": [name for part in parts for name in part.id]}
    longest = max(part.tokens.data.shape[1] for part in parts)
    for name in ("tokens", "mel"):
        data = [part[name].data for part in parts]
        if name == "tokens":
            data = [nn.functional.pad(each, (0, longest - each.shape[1])) for each in data]
        lengths = torch.cat([part[name].lengths for part in parts])
        fields[name] = Padded(torch.cat(data), lengths)
    return Batch(fields, sum(map(len, parts)))


@mock.patch("torch.nn.functional.dropout", lambda x, *_, **__: x)
def trained() -> dict[str, Any]:
    """Return weights and reports after all rounds; one process sees both ranks' batches.

    Dropout is off, and batch norm uses its running statistics: those of a batch are of each
    process's own part.
    """
    torch.manual_seed(0)
    model = tacotron(2).double()
    hparams = {
        "objective": Objective(gate=1.0, last_step=5.0, attention=5.0),
        "mel": LogMel(16000, 6, 512, 128), "longest": 1.0, "pictures": 0,
        "progressbar": False, "device": "cpu", "max_grad_norm": 1.0,
    }  # fmt: skip
    brain = Undropped({"model": model}, lambda p: torch.optim.Adam(p, 0.01), hparams)
    made = [[batch_of(n, 2 * i + r) for r, n in enumerate(pair)] for i, pair in enumerate(ROUNDS)]
    if distributed.world_size() == 1:
        batches = [join(pair) for pair in made]
    else:
        batches = [batch for pair in made for batch in pair]  # Dealt in turn.
    reports: list[list[Any]] = []
    step = brain.fit_batch

    def fit_batch(batch: Batch) -> Any:
        report = step(batch)
        reports.append([report.outcome, report.loss, report.weight, report.norm])
        return report

    brain.fit_batch = fit_batch  # type: ignore[method-assign]
    brain.fit([1, 2], batches)
    return {"weights": brain.modules.state_dict(), "reports": reports}


def test_two_processes_end_as_one_on_the_joined_batches(two_ranks: TwoRanks) -> None:
    one = trained()
    first, second = two_ranks(trained)
    assert [report[0] for report in one["reports"]] == ["stepped"] * 6
    assert [report[2] for report in one["reports"]] == [4, 3, 4] * 2
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-12, rtol=1e-9)
    assert first["reports"] == second["reports"]
    for both, alone in zip(first["reports"], one["reports"], strict=True):
        assert both[1:] == [pytest.approx(each) for each in alone[1:]]
