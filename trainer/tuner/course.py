"""What a short training gave: losses and gradient norms, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.metrics import StepReport


@dataclass(slots=True)
class Course:
    """What a trial gave for one optimizer: a loss and a gradient norm for each step it took.

    ``clipped`` of these steps were. ``skipped`` steps were not finite; ``over`` says that the trial
    was ended before its time, since they were too many or the loss had run away.
    """

    setting: float = math.inf
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped: int = 0
    skipped: int = 0
    over: bool = False

    def add(self, report: StepReport) -> None:
        """Take in what became of a window."""
        if report.outcome == "skipped":
            self.skipped += 1
        elif report.stepped:
            assert report.loss is not None
            assert report.norm is not None
            self.losses.append(report.loss)
            self.norms.append(report.norm)
            self.clipped += report.clipped

    @property
    def steps(self) -> int:
        """How many steps were taken or skipped."""
        return len(self.losses) + self.skipped

    @property
    def start(self) -> float:
        """The mean loss of the first tenth of the steps."""
        return mean(self.losses[: max(1, len(self.losses) // 10)])

    @property
    def end(self) -> float:
        """The mean loss of the last quarter of the steps; infinity for a trial that failed."""
        if self.over or not self.losses:
            return math.inf
        return mean(self.losses[-max(1, len(self.losses) // 4) :])

    @property
    def share(self) -> float:
        """The share of steps that were clipped."""
        return self.clipped / max(1, len(self.norms))


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
