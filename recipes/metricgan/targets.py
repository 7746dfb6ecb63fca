"""The scores that the discriminator learns to predict, measured while the training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from recipes.common.judges import Judges

# What a network can predict well: 0 to about 1, and 1 for the clean signal.
NORMALISED: dict[str, Callable[[float], float]] = {
    "pesq": lambda score: (score + 0.5) / 5.0,
    "stoi": lambda score: score,
}


def check_target(metric: str, measures: Collection[str]) -> None:
    """Raise ValueError unless a network can learn to predict this metric, and it is measured."""
    if metric not in NORMALISED:
        raise ValueError(f"target is {metric!r}; allowed: {', '.join(NORMALISED)}")
    if metric not in measures:
        raise ValueError(
            f"target is {metric!r}, but the judges measure {', '.join(measures)}; allowed: one of "
            "the measures"
        )


class Targets:
    """Normalised scores of an epoch's signals by name.

    A signal is asked for as soon as it is there, and its score is waited for when it is needed.
    One that cannot be measured is named in the log with the reason, and scores NaN for this epoch.

    Args:
        judges: who measures; they may serve others, at other times.
        metric: ``pesq`` or ``stoi``.
    """

    def __init__(self, judges: Judges, metric: str) -> None:
        check_target(metric, judges.measures)
        self.judges, self.metric = judges, metric
        self._asked: set[str] = set()
        self._known: dict[str, float] = {}

    def start(self) -> None:
        """A new epoch: other signals have the same names now."""
        self.judges.forget()
        self._asked, self._known = set(), {}

    def ask(self, name: str, clean: Tensor, heard: Tensor) -> None:
        """Have ``heard`` (S,) measured against ``clean`` (S,), unless it was asked for already."""
        if name not in self._asked:
            self._asked.add(name)
            self.judges.submit(name, clean, heard, [self.metric])

    def get(self, names: Iterable[str]) -> list[float]:
        """The scores of signals that were asked for; waits for these, and for no others."""
        names = list(names)
        wanted = [name for name in names if name not in self._known]
        if wanted:
            for name, scores in self.judges.collect(until=wanted).items():
                self._known[name] = NORMALISED[self.metric](scores[self.metric])
        return [self._known.get(name, math.nan) for name in names]
