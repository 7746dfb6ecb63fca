"""The epochs of a run, counted such that a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class EpochCounter:
    """Iterates from the epoch after ``current`` to ``limit``, both counted from 1.

    >>> list(EpochCounter(3))
    [1, 2, 3]
    """

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(
                f"EpochCounter: limit must be a whole number of 0 or more, not {limit!r}"
            )
        self.limit = limit
        self.current = 0

    def __iter__(self) -> Iterator[int]:
        while self.current < self.limit:
            self.current += 1
            yield self.current

    def state_dict(self) -> dict[str, Any]:
        """The current epoch; the limit is the YAML's."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a saved epoch."""
        self.current = state["current"]
