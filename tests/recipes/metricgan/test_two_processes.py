"""Two processes end where one does on the joined batches, and go on where they were stopped.

What must be equal is everything that is trained, and the power iterations of the spectral norms:
these follow from the weights and from how often the discriminator was asked, which is as often on
every process, also on one that has nothing to ask. The norm of the discriminator's input sees one
utterance at a time, so that nothing has to travel for it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import launch
from tests.recipes.metricgan import two_processes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "-m", two_processes.__name__)
    return folder


def ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", two_processes.RUNS)
def test_two_processes_are_one(folder: Path, tmp_path: Path, name: str) -> None:
    one, two = two_processes.trained(tmp_path, name), ranks(folder, name)
    assert one["optimizer_step"] == two[0]["optimizer_step"] > 5
    assert sorted(two[0]["history"] + two[1]["history"]) == one["history"]
    assert len(one["history"]) >= 3
    for found in two:
        assert found["score"] == pytest.approx(one["score"], abs=1e-4)
        assert found["optimizer_step"] == one["optimizer_step"]
        for key, tensor in found["weights"].items():
            assert torch.equal(tensor, two[0]["weights"][key]), key
            torch.testing.assert_close(tensor, one["weights"][key], rtol=0, atol=1e-5)


def test_two_go_on_exactly(folder: Path) -> None:
    """Each with the history that is its own."""
    for found in ranks(folder, "resumed"):
        assert found["found"] == []
        assert found["kept"] == 6
