"""The generators that a wait for data can be taken back to."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from trainer.seed import DrawsUndone

DRAWS = {
    "nothing": lambda: None,
    "uniform": random.random,
    "normal": lambda: random.gauss(0, 1),  # Python keeps the second of a pair.
    "seed": lambda: random.seed(3),
    "integer": lambda: random.randrange(10),
    "many": lambda: [random.random() for _ in range(700)],
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,  # NumPy too.
    "numpy seed": lambda: np.random.seed(3),
    "numpy many": lambda: np.random.rand(700),
    "torch": lambda: torch.randn(3),
}


def next_draws() -> list[Any]:
    """Return what every generator gives next."""
    return [
        random.gauss(0, 1), random.gauss(0, 1), random.random(), np.random.randn(),
        np.random.randn(), np.random.rand(), torch.rand(()).item(),
    ]  # fmt: skip


@pytest.mark.parametrize("after", DRAWS)
@pytest.mark.parametrize("before", DRAWS)
def test_every_draw_after_the_note_is_undone(before: str, after: str) -> None:
    undone = DrawsUndone()
    undone.remember()
    for each in (before, before, "nothing"):
        DRAWS[each]()
        undone.remember()
    DRAWS[after]()
    undone.undo()
    first = next_draws()
    undone.undo()
    DRAWS[after]()
    DRAWS["many"]()
    undone.undo()
    assert next_draws() == first


@pytest.mark.parametrize("before", DRAWS)
def test_the_note_is_of_the_moment_and_not_of_an_earlier_one(before: str) -> None:
    undone = DrawsUndone()
    for number in range(3):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        DRAWS[before]()
        undone.remember()
        expected = next_draws()
        undone.undo()
        assert next_draws() == expected
