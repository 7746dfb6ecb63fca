"""Checkpoints of earlier format versions load, and their runs go on to the same losses."""

import json
import shutil
from pathlib import Path

import pytest

from .old_checkpoint import EPOCHS, STOP, fit, make

DATA = Path(__file__).parent / "data" / "checkpoint-v1"


def test_a_checkpoint_of_version_1_goes_on_to_the_losses_of_its_run(tmp_path: Path) -> None:
    shutil.copytree(DATA / "window", tmp_path / "checkpoints" / "window")
    expected = json.loads((DATA / "losses.json").read_text())
    brain = make(tmp_path / "checkpoints")
    found = fit(brain)
    assert len(expected) == (EPOCHS * 7 - STOP) + 2 * 3
    assert len(found) == STOP + 6 + len(expected)  # The trace before the save is state of the run.
    for now, before in zip(found[-len(expected) :], expected, strict=True):
        assert now == pytest.approx(before, abs=1e-5)


def test_the_kept_checkpoint_is_small() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert sum(path.stat().st_size for path in files) < 200_000
