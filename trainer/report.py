"""What a step and a stage hand back: facts to log, to show and to decide on, never a side effect.

An `Update` returns a `StepReport` for every loss it was given, the loop returns a `StageReport`
for every pass over a data set. A `Tally` gathers the step reports of one optimizer between two
lines of `metrics.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer import checks

Outcome = Literal["stepped", "accumulated", "overflowed", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("stepped", "accumulated", "overflowed", "skipped")

# Keys of a stage line that belong to the framework; a metric of that name would hide one of them.
RESERVED = (
    "kind",
    "stage",
    "epoch",
    "step",
    "steps",
    "examples",
    "seconds",
    "skipped",
    "overflowed",
)


@dataclass(slots=True)
class StepReport:
    """What became of one loss: did the weights move, and what was measured on the way.

    `outcome` is one of
    - "stepped": the weights moved;
    - "accumulated": the gradients wait for the rest of their window;
    - "overflowed": the fp16 scale was too high and has been lowered; normal, nothing moved;
    - "skipped": loss or gradients were not finite; counted, nothing moved.

    A number that is not known is None, never 0: `loss` where it was not finite or not read,
    `norm` (L2, before clipping) and `norm_after` where nothing was measured. `limit` is infinity
    where nothing is clipped. `lr` is the learning rate of the first parameter group that this
    step used.
    """

    name: str
    outcome: Outcome
    loss: float | None = None
    weight: float = 1.0
    norm: float | None = None
    norm_after: float | None = None
    limit: float = float("inf")
    clipped: bool = False
    scale: float = 1.0
    lr: float = 0.0

    @property
    def stepped(self) -> bool:
        """True when the weights moved."""
        return self.outcome == "stepped"


@dataclass(slots=True)
class StageReport:
    """What one pass over a data set gave: the average loss, the metrics and the counts.

    `step` is the number of optimizer steps taken since the run began, `steps` the number of
    batches of this stage, `examples` the weight of those that entered the average. `loss` is the
    average over examples, a mapping where the recipe has several, None where no batch gave one.
    """

    stage: str
    epoch: int | None = None
    loss: float | Mapping[str, float | None] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    steps: int = 0
    examples: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    overflowed: int = 0

    def record(self) -> dict[str, Any]:
        """The stage line of `metrics.jsonl`, metrics flattened into it.

        A metric named "loss" takes the place of the average loss (a recipe that returns one means
        it); any other name of the framework's own is refused with a ValueError.
        """
        for name in self.metrics:
            if name in RESERVED:
                raise ValueError(
                    f"on_stage_end of stage {self.stage!r} returned a metric named {name!r}, which "
                    f"every stage line uses already; name it otherwise than {', '.join(RESERVED)}"
                )
        return {
            "kind": "stage",
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            **self.metrics,
            "steps": self.steps,
            "examples": self.examples,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "overflowed": self.overflowed,
        }


class Tally:
    """The reports of one optimizer since the last line of `metrics.jsonl`, as that line's entry.

    `add` is called once a step and must cost next to nothing; `record` is called at the log
    interval and starts the next count. `norm` and `clipped` are over the steps that were taken.
    """

    def __init__(self) -> None:
        self._now: dict[str, float | None] = {"lr": None, "limit": None, "scale": None}
        self._clear()

    def _clear(self) -> None:
        self._clipped = 0
        self._norms: list[float] = []
        self._counts: dict[str, int] = dict.fromkeys(OUTCOMES, 0)

    def add(self, report: StepReport) -> None:
        """Count one report."""
        now = self._now
        now["lr"], now["limit"], now["scale"] = report.lr, report.limit, report.scale
        self._counts[report.outcome] += 1
        if report.norm is not None and report.outcome == "stepped":
            self._norms.append(report.norm)
            self._clipped += report.clipped

    def record(self) -> dict[str, Any]:
        """LR, limit and scale as they are; mean and largest norm, share clipped, and counts."""
        measured = len(self._norms)
        entry: dict[str, Any] = {
            "lr": self._now["lr"],
            "norm": math.fsum(self._norms) / measured if measured else None,
            "norm_max": max(self._norms, default=None),
            "limit": self._now["limit"],
            "clipped": self._clipped / measured if measured else None,
            "stepped": self._counts["stepped"],
            "skipped": self._counts["skipped"],
            "overflowed": self._counts["overflowed"],
            "scale": self._now["scale"],
        }
        self._clear()
        return entry

    def recent(self) -> list[float]:
        """The last norms since the last record, at most 20."""
        return self._norms[-20:]

    def state_dict(self) -> dict[str, Any]:
        """What has been counted since the last record."""
        return {
            "now": dict(self._now),
            "clipped": self._clipped,
            "norms": list(self._norms),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        checks.same_keys("Tally", state, ("now", "clipped", "norms", "counts"))
        self._now, self._clipped = dict(state["now"]), state["clipped"]
        self._norms, self._counts = list(state["norms"]), dict(state["counts"])
