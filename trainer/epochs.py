"""Epoch counter with a state, so that a resumed run goes on with the next epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer import checks


class EpochCounter:
    """Iterator over the epochs of a run, from the one after ``current`` to ``limit``.

    Args:
        limit: number of the last epoch, counted from 1; 0 or more.

    Attributes:
        current: number of the current epoch; 0 before the first.

    Raises:
        ValueError: ``limit`` is not a whole number of 0 or more.

    >>> list(EpochCounter(3))
    [1, 2, 3]
    """

    def __init__(self, limit: int) -> None:
        self.limit = checks.whole("EpochCounter", "limit", limit, 0)
        self.current = 0

    def __iter__(self) -> Iterator[int]:
        while self.current < self.limit:
            self.current += 1
            yield self.current

    def state_dict(self) -> dict[str, Any]:
        """Return the current epoch; the limit is a hyperparameter and not saved."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the current epoch: iterating continues with the one after it."""
        self.current = state["current"]
