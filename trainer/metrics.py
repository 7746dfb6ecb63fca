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

import torch
from torch import Tensor

from trainer import checks, distributed

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


# Tensors that wait to be read, at most: what they hold stays small in the longest epoch.
MOST_WAITING = 4096


class _Sum:
    """A weighted sum in which nothing that is not finite enters."""

    __slots__ = ("total", "weight")

    def __init__(self, total: float = 0.0, weight: float = 0.0) -> None:
        self.total, self.weight = total, weight

    def add(self, value: float, weight: float) -> None:
        term = value * weight
        if term - term == 0.0:  # false for NaN and for both infinities
            self.total += term
            self.weight += weight


class Mean:
    """The average of a loss, or of each of several named losses, weighted by examples.

    Values are floats, scalar tensors, or mappings from names to these. A value that is not finite
    never enters, nor does one of weight 0; `value` is None where nothing has entered, and never 0
    for want of a number. Tensors are not read when they come, wherever they live: `read` (as well
    as `value`, `weight`, `reduce` and `state_dict`, which call it) fetches all of them at once, and
    adds them in float64 in the order in which they came, so that when it is called changes no bit.
    """

    def __init__(self) -> None:
        self._named: bool | None = None  # whether the values are mappings; the first one decides
        self._sums: dict[str, _Sum] = {}
        self._waiting: list[tuple[_Sum, float | Tensor, float]] = []

    def update(
        self, value: float | Tensor | Mapping[str, float | Tensor], weight: float = 1.0
    ) -> None:
        """Take in the average `value` of `weight` examples."""
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"the weight of a value must be finite, 0 or more; got {weight!r}")
        if type(value) is float and self._named is False and not self._waiting:
            self._sums[""].add(value, weight)  # the usual case, in half the time
            return
        named = isinstance(value, Mapping)
        if named is not self._named:
            self._decide(named)
        if isinstance(value, Mapping):
            for name, part in value.items():
                self._add(name, part, weight)
        else:
            self._add("", value, weight)

    def _decide(self, named: bool) -> None:
        if self._named is not None:
            raise ValueError(
                "an average is either of plain values or of mappings; got "
                f"{'a mapping' if named else 'a plain value'} after the other"
            )
        self._named = named

    def _add(self, name: str, value: float | Tensor, weight: float) -> None:
        of = f" of {name!r}" if name else ""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"an average is of scalars; got a tensor{of} of shape {list(value.shape)}"
                )
            # A copy, since whoever made it may go on computing in place.
            value = value.detach().clone()
            value = value.reshape(()) if value.dim() else value
        elif not isinstance(value, (int, float)):
            raise ValueError(f"an average is of numbers; got a {type(value).__name__}{of}")
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = _Sum()
        if self._waiting or isinstance(value, Tensor):
            self._waiting.append((total, value, weight))
            if len(self._waiting) >= MOST_WAITING:
                self.read()
        else:
            total.add(value, weight)

    def read(self) -> None:
        """Fetch the tensors that wait: one host-device sync for each device that has some."""
        waiting, self._waiting = self._waiting, []
        devices: dict[torch.device, list[Tensor]] = {}
        for _, value, _ in waiting:
            if isinstance(value, Tensor):
                devices.setdefault(value.device, []).append(value)
        read = {device: iter(torch.stack(t).tolist()) for device, t in devices.items()}
        for total, value, weight in waiting:
            total.add(next(read[value.device]) if isinstance(value, Tensor) else value, weight)

    def value(self) -> float | dict[str, float | None] | None:
        """The average so far: None without any value, a mapping where the values were mappings."""
        self.read()
        means = {name: s.total / s.weight if s.weight else None for name, s in self._sums.items()}
        return means if self._named else means.get("")

    def weight(self) -> float:
        """How many examples have entered: the most of any name."""
        self.read()
        return max((each.weight for each in self._sums.values()), default=0.0)

    def reduce(self) -> Mean:
        """Make this the average over all ranks, and return it. Every rank must call it, once.

        The sums are added in the order of ranks, so that all ranks get the same bits. A rank
        that has seen nothing takes part with nothing.
        """
        if distributed.world_size() == 1:
            return self
        states = distributed.gather(self.state_dict())
        merged: dict[str, list[float]] = {}
        for state in states:
            for name, (total, weight) in state["sums"].items():
                old = merged.get(name, [0.0, 0.0])
                merged[name] = [old[0] + total, old[1] + weight]
        named = next((s["named"] for s in states if s["named"] is not None), None)
        self.load_state_dict({"named": named, "sums": merged})
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what has been summed so far."""
        self.read()
        sums = {name: [each.total, each.weight] for name, each in self._sums.items()}
        return {"named": self._named, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, to the bit."""
        checks.same_keys("Mean", state, ("named", "sums"))
        self._named, self._waiting = state["named"], []
        self._sums = {name: _Sum(*pair) for name, pair in state["sums"].items()}


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
