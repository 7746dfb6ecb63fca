"""Training, and the test of the checkpoint that a Brain chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.common.training import fit_and_test
from tests.trainer.small import Regressor, batches, make
from trainer import Checkpointer, Stage

LOADING: dict[str, Any] = {"train": None, "valid": None, "test": None}


class Scored(Regressor):
    """Brain that is tested with its checkpoint of the lowest score."""

    best_checkpoint = {"min_key": "score"}

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        return {"score": 1.0}

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        self.asked = max_key, min_key


@pytest.mark.parametrize("kind", [Regressor, Scored])
def test_the_checkpoint_that_the_brain_chooses_is_tested(kind: Any, tmp_path: Path) -> None:
    brain = make(kind, checkpointer=Checkpointer(tmp_path))
    sets = {"train": batches(4), "valid": batches(1), "test": batches(2)}
    found = fit_and_test(brain, range(1, 3), sets, LOADING)
    assert found
    assert getattr(brain, "asked", None) == ((None, "score") if kind is Scored else None)


def test_without_a_test_set_nothing_is_tested(tmp_path: Path) -> None:
    brain = make(Scored, checkpointer=Checkpointer(tmp_path))
    sets = {"train": batches(4), "valid": batches(1)}
    assert fit_and_test(brain, range(1, 3), sets, LOADING) == {}
    assert not hasattr(brain, "asked")
