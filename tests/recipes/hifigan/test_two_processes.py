"""Two processes end where one does on the joined batch."""

from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.recipes.hifigan import two_processes
from tests.recipes.hifigan.tiny import PLAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "-m", two_processes.__name__)
    return folder


@pytest.mark.parametrize("name", two_processes.SETTINGS)
def test_two_processes_are_one(folder: Path, tmp_path: Path, name: str) -> None:
    """With accumulation too, and where the discriminator comes later."""
    one = two_processes.trained(tmp_path, 4, name)
    tables = [(each / "scores_test.csv").read_text() for each in (tmp_path, folder / name)]
    first, second = ([row.split(",")[0] for row in table.splitlines()] for table in tables)
    assert first == second == ["id", "w0", "w1", "w2", "mean"]  # each clip once
    ranks = [torch.load(folder / f"{name}-rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert one["steps"] == {"window-1": 6, "window-3": 2, "late": 6}[name]
    for two in ranks:
        assert two["steps"] == one["steps"]
        assert two["mel_l1"] == pytest.approx(one["mel_l1"], abs=1e-4)
        assert two["test"] == pytest.approx(one["test"], abs=1e-3)
        assert set(two["test"]) == {"mel_l1", "mel_l1_griffinlim"}
        for player in PLAYERS:
            # A player's step sends its own gradients and nothing of the other's.
            judged = one["steps"] if player == "generator" or name != "late" else 4
            assert two["extra"][player] == [0] * judged
            assert torch.equal(two[player], ranks[0][player])
            torch.testing.assert_close(two[player], one[player], rtol=0, atol=1e-5)
