"""Two processes end where one does on the joined batch."""

from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.recipes.segan import two_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "-m", two_processes.__name__)
    return folder


@pytest.mark.parametrize("window", [1, 3])
def test_two_processes_are_one(folder: Path, tmp_path: Path, window: int) -> None:
    """With accumulation, too: each of a window's batches is dealt to both."""
    one = two_processes.trained(tmp_path, 4, window)
    ranks = [
        torch.load(folder / f"window-{window}-rank-{rank}.pt", weights_only=True)
        for rank in range(2)
    ]
    assert one["steps"] == {1: 6, 3: 2}[window]
    for two in ranks:
        assert two["steps"] == one["steps"]
        assert two["si_snr"] == pytest.approx(one["si_snr"], abs=1e-3)
        for name in ("generator", "discriminator"):
            assert torch.equal(two[name], ranks[0][name])
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
