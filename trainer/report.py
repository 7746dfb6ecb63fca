"""What a step and a stage hand back: facts to log, to show and to decide on, never a side effect.

An `Update` returns a `StepReport` for every loss it was given, the loop returns a `StageReport`
for every pass over a data set. A `Tally` gathers the step reports of one optimizer between two
lines of `metrics.jsonl`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
    loss: float | dict[str, float] | None = None
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
    interval and starts the next count.
    """

    def __init__(self) -> None:
        self._last: StepReport | None = None
        self._clear()

    def _clear(self) -> None:
        self._measured = 0
        self._clipped = 0
        self._norm_sum = 0.0
        self._norm_max: float | None = None
        self._counts: dict[str, int] = dict.fromkeys(OUTCOMES, 0)

    def add(self, report: StepReport) -> None:
        """Count one report."""
        self._last = report
        self._counts[report.outcome] += 1
        norm = report.norm
        if norm is not None and report.outcome == "stepped":
            self._measured += 1
            self._clipped += report.clipped
            self._norm_sum += norm
            if self._norm_max is None or norm > self._norm_max:
                self._norm_max = norm

    def record(self) -> dict[str, Any]:
        """LR, scale and limit as they are now; mean and largest norm, share clipped, and counts."""
        last, measured = self._last, self._measured
        entry: dict[str, Any] = {
            "lr": None if last is None else last.lr,
            "norm": self._norm_sum / measured if measured else None,
            "norm_max": self._norm_max,
            "limit": None if last is None else last.limit,
            "clipped": self._clipped / measured if measured else None,
            "stepped": self._counts["stepped"],
            "skipped": self._counts["skipped"],
            "overflowed": self._counts["overflowed"],
            "scale": None if last is None else last.scale,
        }
        self._clear()
        return entry
