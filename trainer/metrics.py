"""Reports of steps and stages, and the averages that are logged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from trainer import checks, distributed
from trainer.tree import map_leaves, plain_number

Outcome = Literal["stepped", "accumulated", "overflowed", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("stepped", "accumulated", "overflowed", "skipped")

# Keys of a stage record that belong to the framework; a metric of that name would hide one of them.
RESERVED = (
    "kind", "stage", "epoch", "step", "steps", "examples", "seconds", "skipped", "overflowed",
    "out_of_memory", "bad_files",
)  # fmt: skip

LOST = ("skipped", "overflowed", "out_of_memory")  # Counts of steps that were not taken.
SHOWN = (*LOST, "bad_files")  # Counts that the log line shows if they are not 0.

# Largest number of tensors that wait to be read, which bounds the memory of a long epoch.
MAX_PENDING = 4096


@dataclass(slots=True)
class StepReport:
    """Outcome of one loss that was given to `Brain.optimize`.

    A number that is not known is None, never 0.

    Args:
        name: name of the optimizer.
        outcome: "stepped": the weights moved. "accumulated": the gradients wait for the rest of
            their window. "overflowed": the fp16 scale was too high and has been lowered; normal,
            nothing moved. "skipped": loss or gradients were not finite; counted, nothing moved.
        loss: mean loss of the window; None where it was not finite or not read.
        weight: number of examples that the loss is a mean over.
        norm: L2 norm of the gradients before clipping.
        norm_after: L2 norm after clipping.
        limit: clip threshold of this step; infinity where nothing is clipped.
        clipped: True if the clipper changed the gradients.
        scale: fp16 loss scale.
        lr: learning rate of the leading parameter group in this step; None for an optimizer that
            has none.
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
    lr: float | None = None

    @property
    def stepped(self) -> bool:
        """True if the weights moved."""
        return self.outcome == "stepped"


@dataclass(slots=True)
class StageReport:
    """Result of one pass over data.

    Args:
        stage: "train", "valid" or "test".
        epoch: epoch of the pass; None in a test.
        loss: average loss over examples; a mapping where the recipe has several losses, None where
            no batch gave one.
        metrics: what `Brain.on_stage_end` returned and `Brain.log` was given, by name.
        step: optimizer steps since the run began.
        steps: batches of this pass.
        examples: weight of the batches that entered the average.
        seconds: duration of the pass in this process, in seconds.
        skipped: training steps that were skipped.
        overflowed: training steps whose fp16 scale was too high.
        out_of_memory: training batches for which memory ran out.
        bad_files: files of this pass that could not be used, on all ranks.
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
    out_of_memory: int = 0
    bad_files: int = 0

    def record(self) -> dict[str, Any]:
        """Return the stage record of `metrics.jsonl`, with the metrics flattened into it.

        A metric named "loss" takes the place of the average loss.

        Raises:
            ValueError: if a metric has a name of `RESERVED`.
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
            "out_of_memory": self.out_of_memory,
            "bad_files": self.bad_files,
        }


class Mean:
    """Average of a loss, or of several named losses, weighted by examples.

    Values are floats, scalar tensors, or mappings from names to these. Values that are not finite
    or have weight 0 are left out. Tensors are not read when they are added, so that nothing waits
    for a device: `read` (which `value`, `weight`, `reduce` and `state_dict` call) fetches all of
    them at once and sums them in order, in float64.

        loss = Mean()
        loss.update(batch_loss, weight=len(batch))
        loss.reduce().value()          # over all examples of all ranks
    """

    def __init__(self) -> None:
        self._named: bool | None = None  # True if values are mappings; the first one decides.
        self._sums: dict[str, list[float]] = {}  # Weighted sum and weight of each name.
        self._pending: list[tuple[list[float], float | Tensor, float]] = []

    def update(
        self, value: float | Tensor | Mapping[str, float | Tensor], weight: float = 1.0
    ) -> None:
        """Add the average of some examples.

        Args:
            value: average of these examples: a number, a tensor of one element, or a mapping from
                names to these.
            weight: number of examples.

        Raises:
            ValueError: for a weight that is negative or not finite, a value that is no scalar, and
                a mapping after plain values or the reverse.
        """
        if type(weight) is not float or not 0.0 <= weight < math.inf:
            weight = as_weight(weight, "an average got the weight")
        if type(value) is float and self._named is False and not self._pending:
            _add(self._sums[""], value, weight)  # The usual case, in half the time.
            return
        named = isinstance(value, Mapping)
        if self._named not in (None, named):
            raise ValueError(
                "an average is either of plain values or of mappings; got "
                f"{'a mapping' if named else 'a plain value'} after the other"
            )
        self._named = named
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, part in parts:
            self._add(name, part, weight)

    def _add(self, name: str, value: float | Tensor, weight: float) -> None:
        of = f" of {name!r}" if name else ""
        if not isinstance(value, Tensor):
            value = plain_number(value)
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex():
                raise ValueError(
                    f"an average is of scalars; got a tensor{of} of shape {list(value.shape)} and "
                    f"type {value.dtype}"
                )
            # A copy, since the caller may go on computing in place.
            value = value.detach().clone()
            value = value.reshape(()) if value.dim() else value
        elif isinstance(value, Real):  # NumPy's numbers, too.
            value = float(value)
        else:
            raise ValueError(f"an average is of numbers; got a {type(value).__name__}{of}")
        total = self._sums.setdefault(name, [0.0, 0.0])
        if self._pending or isinstance(value, Tensor):
            self._pending.append((total, value, weight))
            if len(self._pending) >= MAX_PENDING:
                self.read()
        else:
            _add(total, value, weight)

    def read(self) -> None:
        """Fetch the pending tensors: one host-device sync for each device that has some."""
        pending, self._pending = self._pending, []
        devices: dict[torch.device, list[Tensor]] = {}
        for _, value, _ in pending:
            if isinstance(value, Tensor):
                devices.setdefault(value.device, []).append(value)
        read = {device: iter(torch.stack(t).tolist()) for device, t in devices.items()}
        for total, value, weight in pending:
            _add(total, next(read[value.device]) if isinstance(value, Tensor) else value, weight)

    def value(self) -> float | dict[str, float | None] | None:
        """Return the average: None without any value, a mapping if the values were mappings."""
        self.read()
        means = {
            name: total / weight if weight else None for name, (total, weight) in self._sums.items()
        }
        return means if self._named else means.get("")

    def weight(self) -> float:
        """Return the number of examples in the average; with several names, the largest."""
        self.read()
        return max((weight for _, weight in self._sums.values()), default=0.0)

    def reduce(self) -> Mean:
        """Make this the average over all ranks, and return it.

        Collective: every rank must call it, once. The sums are added in the order of ranks, so that
        all ranks get the same bits.
        """
        if distributed.world_size() == 1:
            return self
        states = distributed.all_gather_json(self.state_dict())
        merged: dict[str, list[float]] = {}
        for state in states:
            for name, (total, weight) in state["sums"].items():
                old = merged.get(name, [0.0, 0.0])
                merged[name] = [old[0] + total, old[1] + weight]
        named = next((s["named"] for s in states if s["named"] is not None), None)
        self.load_state_dict({"named": named, "sums": merged})
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain numbers."""
        self.read()
        return {"named": self._named, "sums": {name: list(s) for name, s in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state, to the bit."""
        checks.same_keys("Mean", state, ("named", "sums"))
        self._named, self._pending = state["named"], []
        self._sums = {name: list(pair) for name, pair in state["sums"].items()}


def as_weight(value: Any, what: str) -> float:
    """Return a number of examples as a float.

    Args:
        value: a number, or a tensor or array of one element; a tensor is read.
        what: beginning of error messages, such as "count_examples returned".

    Raises:
        ValueError: if it is negative, not finite, or no number.
    """
    try:
        weight = float(plain_number(value))
    except (TypeError, ValueError, RuntimeError):
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{what} {value!r}; allowed: a finite number, 0 or more")
    return weight


def _add(total: list[float], value: float, weight: float) -> None:
    """Add to a weighted sum and its weight, unless the value is not finite."""
    term = value * weight
    if term - term == 0.0:  # False for NaN and for both infinities.
        total[0] += term
        total[1] += weight


@dataclass
class Tally:
    """Figures of one optimizer since the last log record, from its step reports.

    Attributes:
        now: latest learning rate, clip limit and fp16 scale.
        clipped: number of steps that were clipped.
        norms: L2 norm of the gradients before clipping, of each step that was taken.
        counts: number of losses by outcome.
    """

    now: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(("lr", "limit", "scale"))
    )
    clipped: int = 0
    norms: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))

    def add(self, report: StepReport) -> None:
        """Count one report."""
        self.now = {"lr": report.lr, "limit": report.limit, "scale": report.scale}
        self.counts[report.outcome] += 1
        if report.norm is not None and report.outcome == "stepped":
            self.norms.append(report.norm)
            self.clipped += report.clipped

    def record(self) -> dict[str, Any]:
        """Return the figures, and start the next count.

        Learning rate, limit and scale are the latest; norms and the clipped share are over the
        steps that were taken.
        """
        measured = len(self.norms)
        entry: dict[str, Any] = {
            "lr": self.now["lr"],
            "norm": math.fsum(self.norms) / measured if measured else None,
            "norm_max": max(self.norms, default=None),
            "limit": self.now["limit"],
            "clipped": self.clipped / measured if measured else None,
            "stepped": self.counts["stepped"],
            "skipped": self.counts["skipped"],
            "overflowed": self.counts["overflowed"],
            "scale": self.now["scale"],
        }
        self.clipped, self.norms, self.counts = 0, [], dict.fromkeys(OUTCOMES, 0)
        return entry


class TrainingMetrics:
    """Averages and counts of a training stage.

    Attributes:
        average: losses of the epoch so far.
        interval: losses since the last log record.
        examples: examples on this rank since the last log record.
        counts: skipped and overflowed steps of the epoch, and its batches without memory.
        tallies: figures of each optimizer since the last log record.
        logged: values given to `Brain.log`, by stage and name.

    The loss of a batch in an open accumulation window waits until the window closes, and is left
    out where that step is skipped.
    """

    def __init__(self) -> None:
        self.average, self.interval, self.examples = Mean(), Mean(), 0.0
        self.counts = dict.fromkeys(LOST, 0)
        self.tallies: dict[str, Tally] = {}
        self.logged: dict[str, dict[str, Mean]] = {}
        # For each waiting batch: the optimizers whose windows are open, loss and weight.
        self._waiting: list[tuple[list[str], Any, float]] = []
        self._recorded, self._spent = time.perf_counter(), 0.0

    def begin_epoch(self) -> None:
        """Start the averages and counts of an epoch."""
        self.forget_windows()
        self.average = Mean()
        self.counts = dict.fromkeys(LOST, 0)

    def start_clock(self) -> None:
        """Start the clock of the throughput, or continue it in a further epoch."""
        self._recorded = time.perf_counter() - self._spent

    def stop_clock(self) -> None:
        """Stop the clock of the throughput between two epochs."""
        self._spent = time.perf_counter() - self._recorded

    def add_report(self, report: StepReport) -> None:
        """Count the outcome of a loss."""
        if report.name not in self.tallies:
            self.tallies[report.name] = Tally()
        self.tallies[report.name].add(report)
        if report.outcome in self.counts:
            self.counts[report.outcome] += 1
        if report.outcome != "accumulated" and self._waiting:
            self._close_window(report.name, report.outcome == "skipped")

    def _close_window(self, name: str, skipped: bool) -> None:
        """Add, or leave out, the losses that waited for the window of an optimizer."""
        waiting, self._waiting = self._waiting, []
        for names, loss, weight in waiting:
            if name not in names:
                self._waiting.append((names, loss, weight))
            elif not skipped:
                self.add_loss(loss, weight, [each for each in names if each != name])

    def forget_windows(self) -> None:
        """Drop the losses that wait for windows, which were dropped."""
        self._waiting = []

    def add_loss(self, loss: Any, weight: float, windows: Sequence[str] = ()) -> None:
        """Add the loss of ``weight`` examples to the averages.

        Args:
            loss: a number, a scalar tensor, or a mapping to these.
            weight: number of examples.
            windows: optimizers whose open windows the batch is in; it waits for these.
        """
        if windows:
            self._waiting.append((list(windows), _detached(loss), weight))
            return
        self.average.update(loss, weight)
        self.interval.update(loss, weight)

    def log(self, stage: str, name: str, value: float | Tensor, weight: float) -> None:
        """Add a value of `Brain.log` to the average of its name.

        Outside a stage, and after its averages were taken, the value belongs to the next one.
        """
        means = self.logged.setdefault(stage if stage in self.logged else "", {})
        try:
            if isinstance(value, Mapping):
                raise ValueError(f"an average is of scalars; got a {type(value).__name__}")
            means.setdefault(name, Mean()).update(value, weight)
        except ValueError as error:
            raise ValueError(f"self.log({name!r}, …): {error}") from None

    def begin_logging(self, stage: str) -> None:
        """Begin the values of a stage with those that were logged since the last one.

        Values of an earlier stage of that name that an exception ended are dropped.
        """
        self.logged[stage] = self.logged.pop("", {})

    @contextmanager
    def evaluation_logged(self, stage: str) -> Iterator[None]:
        """Context manager around an evaluation, which may be nested in a hook of another one."""
        outer = self.logged.get(stage)
        self.begin_logging(stage)
        try:
            yield
        finally:
            if outer is not None:
                self.logged[stage] = outer

    def end_stage(self, stage: str) -> dict[str, Any]:
        """Return the averages over ranks of what was logged in a stage, and forget them.

        Collective. Ranks may have logged different names.
        """
        means = self.logged.pop(stage, {})
        if distributed.world_size() > 1:
            names = dict.fromkeys(
                n for each in distributed.all_gather_json(list(means)) for n in each
            )
            means = {name: means.get(name, Mean()).reduce() for name in names}
        return {name: mean.value() for name, mean in means.items()}

    def record(self, epoch: int, step: int, seconds: float) -> dict[str, Any]:
        """Return the log record of everything since the last one, and start the next.

        Collective.

        Args:
            epoch: current epoch.
            step: optimizer steps since the run began.
            seconds: training time of the run.
        """
        self.average.read()  # The record waits for the device anyway.
        now = time.perf_counter()
        rate = self.examples / max(now - self._recorded, 1e-9)
        found = {
            "step": step,
            "epoch": epoch,
            "stage": "train",
            "loss": self.interval.reduce().value(),
            "seconds": round(seconds, 3),
            "examples_per_second": round(rate * distributed.world_size(), 3),
            "optimizers": {name: tally.record() for name, tally in self.tallies.items()},
        }
        self.interval, self.examples = Mean(), 0.0
        self._recorded, self._spent = now, 0.0
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and counts."""
        return {
            "average": self.average.state_dict(),
            "interval": self.interval.state_dict(),
            "counts": dict(self.counts),
            "tallies": {name: asdict(tally) for name, tally in self.tallies.items()},
            "logged": {
                stage: {name: mean.state_dict() for name, mean in means.items()}
                for stage, means in self.logged.items()
            },
            "waiting": [
                [names, map_leaves(float, loss), weight] for names, loss, weight in self._waiting
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.average = _restored(Mean(), state["average"])
        self.interval = _restored(Mean(), state["interval"])
        self.counts = dict.fromkeys(LOST, 0)
        self.counts.update(state["counts"])
        # The time taken by earlier examples is unknown here.
        self.examples, self._spent, self._recorded = 0.0, 0.0, time.perf_counter()
        self.tallies = {name: Tally(**deepcopy(saved)) for name, saved in state["tallies"].items()}
        self.logged = {
            stage: {name: _restored(Mean(), saved) for name, saved in means.items()}
            for stage, means in state["logged"].items()
        }
        self._waiting = [(list(n), deepcopy(loss), w) for n, loss, w in state["waiting"]]


def _detached(loss: Any) -> Any:
    """Return a copy of a loss, since the caller may go on computing in place."""
    if isinstance(loss, Mapping):
        return {name: _detached(part) for name, part in loss.items()}
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


def _restored(part: Any, state: Mapping[str, Any]) -> Any:
    part.load_state_dict(state)
    return part
