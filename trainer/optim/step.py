"""Optimizer steps: from a loss to moved weights.

    scale → backward → (window full?) → unscale → measure → guard → clip → step → scaler update
    → schedule → zero → StepReport

Only this module moves weights. Gradients are measured before they are clipped: clipping first would
turn one infinity into zeros everywhere and one NaN into NaN everywhere. Nothing moves before every
rank knows the outcome of the step.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import CheckpointError

from trainer.clipping import Clipper, Gradients
from trainer.distributed.announcements import Votes
from trainer.distributed.strategy import BatchGivenUp, Strategy, WindowSums
from trainer.metrics import Outcome, StepReport
from trainer.optim.settings import set_rates_anew, with_new_settings
from trainer.texts import first_names
from trainer.tree import plain_number

logger = logging.getLogger("trainer")

# At an fp16 scale this low, the scale is not the cause of an overflow.
LOWEST_SCALE = 1.0


class Stopwatch:
    """Times of the parts of a step: "forward", "backward" and "step".

    Attributes:
        marks: each part with the time of its end, a CUDA event if ``on_gpu``.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Record the end of a part, without waiting for a device."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((part, event if self._on_gpu else time.perf_counter()))

    def read(self) -> list[tuple[str, float]]:
        """Return the seconds of each part after the first mark; empty until a GPU is done."""
        if self._on_gpu and not (self.marks and self.marks[-1][1].query()):
            return []
        return [
            (part, before.elapsed_time(at) / 1000 if self._on_gpu else at - before)
            for (_, before), (part, at) in pairwise(self.marks)
        ]


stopwatch: Stopwatch | None = None  # Set while a diagnostic measures a batch.

StepHook = Callable[["Update", Gradients], None]
Take = Callable[[list[float]], None]


@dataclass(slots=True)
class Window:
    """Accumulation window: counts and sums of its backward passes.

    Gradients and loss are sums of w_i/w_1 · (·)_i over the batches i of weight w_i, so that the
    first batch is not scaled and half precision stays in its usual range.

    Args:
        count: batches so far.
        weight: sum of their weights; a scalar tensor if one of them is.
        reference: weight w_1 of the first batch.
        loss: weighted sum of the losses over ``reference``, a scalar on the device.
        lead: name of the optimizer whose loss scaler scaled them; empty without batches.
    """

    count: int = 0
    weight: float | Tensor = 0.0
    reference: float = 1.0
    loss: Tensor | None = None
    lead: str = ""


class NoGradientError(ValueError):
    """Error for a loss that reaches no parameter of its optimizers."""


class Update:
    """One optimizer with its loss scaler, clipper, schedule and accumulation window.

    Args:
        name: name of the optimizer for `Brain.optimize`.
        optimizer: any torch optimizer.
        scaler: loss scaler of this optimizer, disabled except for fp16.
        clip: called with the measured `Gradients` of every finite step.
        schedule: a torch LRScheduler, or None for a constant learning rate.
        window: number of batches per step (gradient accumulation); the attribute ``size``.
        skip_nonfinite_grads: freeze, for one step, the parameters whose gradient is not finite
            instead of skipping the step. Ignored with a warning under an enabled scaler.
        strategy: communication of gradients between processes.

    Attributes:
        window: the open `Window`; one of count 0 if none is open.
        others: all other optimizers of the Brain.
        sharing: the others that share a parameter with this one.
        untrained: parameters of the modules that no optimizer has, by name.
        names: names of all parameters of the modules.
        before_step: called with measured, unclipped gradients before a step that will be taken.
        after_step: called when the optimizer has stepped.
        history: list of reports of taken steps, if a callback has set one; the callback empties it.
        leading: index of the parameter group whose learning rate is reported.
        measured: parameters and the last measured norms of their gradients.
        last_norm: norm before clipping of the last taken step; None before the first.
        deferred: arguments of `read_later`, for the next step to read.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: Clipper,
        schedule: Any = None,
        window: int = 1,
        skip_nonfinite_grads: bool = False,
        strategy: Strategy | None = None,
    ) -> None:
        if skip_nonfinite_grads and scaler.is_enabled():
            warnings.warn(
                "skip_nonfinite_grads is ignored under precision fp16: there, a gradient that is "
                "not finite is how the scaler learns that its scale is too high",
                stacklevel=2,
            )
            skip_nonfinite_grads = False
        self.name, self.optimizer, self.scaler = name, optimizer, scaler
        self.clip, self.schedule, self.size = clip, schedule, window
        self.skip_nonfinite_grads = skip_nonfinite_grads
        self.strategy = Strategy() if strategy is None else strategy
        self.window = Window()
        self.others: list[Update] = []
        self.sharing: list[Update] = []
        self.untrained: dict[str, Tensor] = {}
        self.names: Mapping[Tensor, str] = {}
        self.last_norm: float | None = None
        self.measured: tuple[list[Tensor], list[float]] = [], []
        self.before_step: list[StepHook] = []
        self.after_step: list[StepHook] = []
        self.history: list[StepReport] | None = None
        self._stepping = False
        self._hook: Any = None  # Handle of the hook that `watch` registers.
        self.deferred: list[tuple[Tensor, Take]] = []
        self._warned: set[str] = set()
        self._built = _settings(optimizer, schedule)
        self.leading = _leading_group(optimizer.param_groups)

    @property
    def params(self) -> list[Tensor]:
        """The parameters that require gradients."""
        return [p for p in self.all_params if p.requires_grad]

    @property
    def all_params(self) -> list[Tensor]:
        """All parameters of the optimizer, frozen ones included."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def named(self) -> dict[Tensor, str]:
        """Return all parameters with their names; parameters of no module are numbered."""
        every = enumerate(self.all_params)
        return {p: self.names.get(p, f"{self.name}.{number}") for number, p in every}

    @property
    def lr(self) -> float | None:
        """The learning rate of the leading group; None where the optimizer has none."""
        group = self.optimizer.param_groups[self.leading]
        rate = group.get("lr")
        if "lr_factor" in group:
            rate *= group["lr_factor"]
        return None if rate is None else float(rate)

    def watch(self, on_hand_step: Callable[[Update], None]) -> None:
        """Call a function before each step of the optimizer that `optimize` does not take."""
        # An optimizer whose constructor does not call torch's, such as a wrapper, has no hooks:
        # steps that a recipe takes with it by hand are not noticed.
        with contextlib.suppress(AttributeError):
            self._hook = self.optimizer.register_step_pre_hook(
                lambda *_: None if self._stepping else on_hand_step(self)
            )

    def unwatch(self) -> None:
        """Undo `watch`, since the run no longer uses the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    def read_later(self, values: Tensor, take: Take) -> None:
        """Bring a vector (N,) to the host with the numbers of the next step, without an extra sync.

        ``take`` is then called with the N numbers.
        """
        self.deferred.append((values, take))

    def read_now(self) -> None:
        """Bring the numbers of `read_later` to the host now; one host-device sync."""
        deferred, self.deferred = self.deferred, []
        _fetch(deferred)

    def is_first(self, event: str) -> bool:
        """Return True at the first call for an event, for warnings that are given once."""
        first = event not in self._warned
        self._warned.add(event)
        return first

    def take_untrained(self, kept: Sequence[Tensor | None]) -> None:
        """Restore the gradients of parameters without an optimizer after a backward pass.

        A warning is given once if the pass has reached such parameters.

        Args:
            kept: their gradients before the pass, in the order of ``untrained``.
        """
        if not self.untrained:
            return
        reached = [name for name, p in self.untrained.items() if p.grad is not None]
        owned: set[Tensor] = set()
        if reached:  # A group of parameters may have been added to an optimizer since.
            owned = {p for update in (self, *self.others) for p in update.all_params}
        for (name, p), grad in zip(tuple(self.untrained.items()), kept, strict=True):
            if p.grad is not None and p in owned:
                del self.untrained[name]
            else:
                p.grad = grad
        found = [name for name in reached if name in self.untrained]
        if found and self.is_first("untrained"):
            warnings.warn(
                f"the loss given to optimize({self.name!r}) reaches {len(found)} parameters that "
                f"no optimizer has ({first_names(found)}): they do not train, and their gradients "
                "cost time. Give them to an optimizer, or call requires_grad_(False) on their "
                "module",
                stacklevel=5,
            )

    def open_window(self) -> None:
        """Open an accumulation window if none is open.

        Gradients that do not come from `optimize` are dropped, with a warning. An open window of
        another optimizer that shares a parameter is an error.
        """
        begun = self.window.count
        other = next(filter(attrgetter("window.count"), self.sharing), None)
        if other is not None and not begun:
            raise ValueError(
                f"the optimizers {other.name!r} and {self.name!r} share "
                f"{self.shared_with(other)}, and the first has an open accumulation window: their "
                "gradients would mix. Give the parameter to one of them, or call optimize once for "
                "each, without accumulation or with last=True, and compute the second loss after "
                "the first call"
            )
        left = [] if begun else [p for p in self.all_params if p.grad is not None]
        for p in left:
            p.grad = None
        if left and self.is_first("dropped"):
            warnings.warn(
                f"the parameters of the optimizer {self.name!r} had gradients that no optimize() "
                "made (a backward() by hand, perhaps of another player's loss): they are dropped",
                stacklevel=4,
            )
        if self.strategy.communicates:
            # Also in an open window: a group of parameters may have been added since.
            self.strategy.prepare_backward(self.name, self.all_params)

    def shared_with(self, other: Update) -> str:
        """Return names of parameters shared with another optimizer, for messages."""
        theirs = set(other.all_params)
        found = [self.names[p] for p in self.all_params if p in theirs and p in self.names]
        if not found:
            return "a parameter"
        return f"the parameter{'s' if found[1:] else ''} {first_names(found)}"

    def drop_window(self) -> None:
        """Discard the window and its gradients."""
        params = self.all_params
        for p in params:
            p.grad = None
        self.window = Window()
        if self.scaler.is_enabled():
            # An error may have left unscaled gradients; setting the scale makes the scaler forget.
            # A scaler has no scale before its first use.
            self.scaler.scale(torch.ones((), device=params[0].device))
            self.scaler.update(self.scaler.get_scale())

    def step(self, gradients: Gradients, loss: float, weight: float, scale: float) -> StepReport:
        """Clip finite gradients, step, and advance a schedule that counts steps.

        Loss and weight of the window, and the fp16 loss scale, are for the report.
        """
        for before in self.before_step:
            before(self, gradients)
        clipped = bool(gradients.tensors) and self.clip(gradients)
        lr = self.lr
        self.move()
        for after in self.after_step:
            after(self, gradients)
        if getattr(self.schedule, "every", None) == "step":
            self.advance_schedule()
        for p in gradients.params:
            p.grad = None
        self.window = Window()
        self.last_norm = norm = gradients.norm
        report = StepReport(
            self.name, "stepped", loss, weight, norm, gradients.norm_after, self.clip.limit,
            clipped, scale, lr,
        )  # fmt: skip
        if self.history is not None:
            self.history.append(report)
        return report

    def move(self) -> None:
        """Step the optimizer with the present gradients; do not call the function of `watch`."""
        self._stepping = True
        self.optimizer.step()
        self._stepping = False

    def advance_schedule(self, *metric: float) -> None:
        """Step the schedule; one that has finished leaves the rate as it is."""
        schedule = self.schedule
        # After its last step torch's raises the rate again, then an error.
        if isinstance(schedule, OneCycleLR) and schedule.last_epoch >= schedule.total_steps - 1:
            ended, schedule.last_epoch = schedule.last_epoch, schedule.total_steps
            if ended >= schedule.total_steps and self.is_first("end"):
                logger.warning(
                    "%s of the optimizer %r has done its total_steps, %d: the learning rate stays",
                    type(schedule).__name__, self.name, schedule.total_steps,
                )  # fmt: skip
            return
        schedule.step(*metric)

    def report(self, outcome: Outcome, **facts: Any) -> StepReport:
        """Build the `StepReport` of a loss that did not lead to a step."""
        return StepReport(self.name, outcome, limit=self.clip.limit, lr=self.lr, **facts)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer, schedule, scaler and clipper, equal on all ranks."""
        parts = self._parts()
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "kinds": {name: type(part).__name__ for name, part in parts.items()},
            "scaler": self.scaler.state_dict(),
            "last_norm": self.last_norm,
            "built": self._built,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the state of another optimizer, schedule or clipper; change nothing."""
        kinds = {name: type(part).__name__ for name, part in self._parts().items()}
        for name in ("optimizer", "schedule", "clip"):
            saved, own = state["kinds"].get(name, "none"), kinds.get(name, "none")
            if saved != own:
                raise ValueError(
                    f"the saved {name} of the optimizer {self.name!r} is {saved}, this Brain's is "
                    f"{own}: the checkpoint was made with other settings"
                )
        both = self.optimizer.param_groups, state["optimizer"]["param_groups"]
        names, saved_names = ([group.get("patterns", "") for group in each] for each in both)
        if names != saved_names and any(names + saved_names) and len(names + saved_names) > 2:
            raise ValueError(
                f"the saved optimizer {self.name!r} has the param_groups {_listed(saved_names)}, "
                f"this Brain's has {_listed(names)}: a run resumes with those it was started with"
            )
        sizes, saved_sizes = ([len(group["params"]) for group in each] for each in both)
        if sizes != saved_sizes:
            raise ValueError(
                f"the saved optimizer {self.name!r} has groups of {saved_sizes} parameters, this "
                f"Brain's of {sizes}: the checkpoint was made with other settings, or with groups "
                "that a hook has added; give the optimizer in init_optimizers what is frozen at "
                "first, too: it is not moved while requires_grad is False"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state, except settings that this run has changed."""
        saved = with_new_settings(state, self._built, self.name)
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        if saved is not state:
            set_rates_anew(self.schedule)
        if state["scaler"]:  # Empty if the run was not in fp16; the scaler then starts anew.
            self.scaler.load_state_dict(state["scaler"])
        self.last_norm = state["last_norm"]

    def _parts(self) -> dict[str, Any]:
        # The optimizer first: loading a schedule sets its learning rate.
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "clip": self.clip}
        return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}


class WindowState:
    """State of an open accumulation window with its gradients; each rank has its own.

    Args:
        update: the optimizer.
        updates: all optimizers by name; a joint step uses the scaler of one of them.
    """

    def __init__(self, update: Update, updates: Mapping[str, Update]) -> None:
        self._update, self._updates = update, updates

    def state_dict(self) -> dict[str, Any]:
        """Return the window with all gradients, also those of a recipe's own backward passes."""
        update = self._update
        window = update.window
        lead = self._updates[window.lead] if window.lead else update
        return {
            "count": window.count,
            "weight": float(window.weight),
            "reference": window.reference,
            "loss": None if window.loss is None else window.loss.detach().clone(),
            "grads": [p.grad for p in update.all_params],
            "lead": window.lead,
            "scale": float(lead.scaler.get_scale()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reopen a saved window under the present loss scale."""
        update = self._update
        update.drop_window()
        params = update.all_params
        lead = state["lead"]
        scaler = self._updates[lead].scaler if lead else update.scaler
        # A scaler has no scale before its first use.
        scaler.scale(torch.ones((), device=params[0].device))
        factor = float(scaler.get_scale()) / state["scale"] if state["count"] else 1.0
        for p, grad in zip(params, state["grads"], strict=True):
            if grad is not None:
                p.grad = grad.to(p.device) if factor == 1.0 else grad.to(p.device) * factor
        loss = None if state["loss"] is None else state["loss"].to(params[0].device)
        update.window = Window(state["count"], state["weight"], state["reference"], loss, lead)


def accumulate(
    updates: Sequence[Update],
    loss: Tensor,
    weight: float | Tensor,
    retain_graph: bool = False,
    last: bool = False,
) -> None:
    """Run the backward pass of a loss, and add its gradients to those of the window.

    Args:
        updates: the optimizers that this loss trains, usually one; all of them step, or none.
        loss: a scalar, the mean over ``weight`` examples.
        weight: number of examples. A batch of weight 0 contributes nothing. A scalar tensor is read
            with the numbers of the step, not earlier; where it is 0, the loss must be finite.
        retain_graph: keep the graph for a second backward pass.
        last: close the window with this loss, even if it is not full.

    Raises:
        ValueError: for a loss or weight that cannot be used, and for optimizers that cannot take
            this loss together.
    """
    if stopwatch is not None:
        stopwatch.mark("forward")
    lead = updates[0]
    _check(loss, weight, lead.name)
    _check_windows(updates)
    for update in updates:
        update.open_window()
    window = lead.window
    counts = isinstance(weight, Tensor) or weight > 0  # A tensor is not read here.
    reference = window.reference
    if not isinstance(window.weight, Tensor) and window.weight == 0:
        own = 1.0 if isinstance(weight, Tensor) else weight
        reference = lead.strategy.reference(lead.name) or own or 1.0
    share = weight / reference
    whole = not isinstance(share, Tensor) and share == 1.0
    last = closes(updates, last)
    try:
        with lead.strategy.backward([update.name for update in updates], reference, last):
            if counts:
                scaled = lead.scaler.scale(loss if whole else loss * share)
                _backward(updates, scaled, retain_graph)
    except BaseException:
        for update in updates:  # The gradients contain a part of this loss, on some or all ranks.
            update.drop_window()
        raise
    total = loss.detach() if counts else torch.zeros_like(loss)
    if total.dim():
        total = total.reshape(())
    if total.dtype.itemsize < 4:
        total = total.float()  # Sums of losses are not kept in half precision.
    if not whole:
        total = total * share
    if window.loss is not None:
        total = window.loss + total
    count, weight = window.count + 1, window.weight + weight
    for update in updates:
        update.window = Window(count, weight, reference, total, lead.name)


def closes(updates: Sequence[Update], last: bool = False) -> bool:
    """Return True if the next loss of these optimizers closes their window."""
    return last or updates[0].window.count + 1 >= updates[0].size


def finish(
    updates: Sequence[Update], weight: float | Tensor, last: bool = False
) -> list[StepReport]:
    """Step if the window is full or ``last``; return a report for each optimizer.

    Args:
        updates: the optimizers of the last loss that `accumulate` took.
        weight: its weight, for the report.
        last: step even if the window is not full.
    """
    lead = updates[0]
    if lead.window.count < lead.size and not last:
        weight = math.nan if isinstance(weight, Tensor) else weight
        return [update.report("accumulated", weight=weight) for update in updates]
    return close(updates, settle(updates))


class Settled(NamedTuple):
    """A full window whose gradients are means over its examples, the same on all ranks.

    Args:
        gradients: measured gradients of each optimizer.
        loss: mean loss of the window, over all ranks.
        weight: number of its examples on all ranks.
        scale: the fp16 loss scale that was used; 1 without a scaler.
    """

    gradients: list[Gradients]
    loss: float
    weight: float
    scale: float


def settle(updates: Sequence[Update]) -> Settled:
    """Sum the gradients of a full window over ranks, and measure them. One host-device sync.

    Raises:
        BatchGivenUp: another rank has given up this batch; the window is dropped.
        ValueError: ranks have closed different windows.
    """
    lead = updates[0]
    window = lead.window
    assert window.loss is not None
    names = [update.name for update in updates]
    sums = lead.strategy.end_window(names, window.loss, window.weight, window.reference)
    scales = _unscale(updates, window.loss.device)
    gradients = [Gradients(u.optimizer.param_groups, u.clip) for u in updates]
    loss, weight, scale = _read(updates, gradients, scales, sums)
    if sums is not None and lead.strategy.votes is not None and lead.strategy.votes.gave_up:
        _refuse(updates, "skipped", scale=scale)
        raise BatchGivenUp
    for update, grads in zip(updates, gradients, strict=True):
        update.measured = grads.params, grads.norms
    return Settled(gradients, loss, weight, scale)


def close(updates: Sequence[Update], settled: Settled) -> list[StepReport]:
    """End a window with a step: check that loss and gradients are finite, clip, and step.

    Returns:
        A report for each optimizer: all have stepped, or none has.

    Raises:
        NoGradientError: no parameter has a gradient.
    """
    lead, scaler = updates[0], updates[0].scaler
    gradients, loss, weight, scale = settled
    if not math.isfinite(loss) or weight <= 0:
        return _refuse(updates, "skipped", weight=weight, scale=scale)
    if not any(map(attrgetter("tensors"), gradients)):
        raise NoGradientError(
            f"the loss given to optimize({lead.name!r}) reaches none of this optimizer's "
            "parameters: is it another optimizer's loss, or was something detached?"
        )
    for update, grads in zip(updates, gradients, strict=True):
        if not grads.tensors and update.is_first("nothing"):
            logger.warning(
                "a loss for several optimizers gives %r no gradient, so that it does not train: is "
                "it unused, detached, or under reentrant checkpointing with inputs that require no "
                "gradient (use_reentrant=False does without)?", update.name,
            )  # fmt: skip
        if update.skip_nonfinite_grads and not grads.finite:
            grads.keep([math.isfinite(norm) for norm in grads.norms])
    some = any(map(attrgetter("tensors"), gradients))
    if not some or not all(map(attrgetter("finite"), gradients)):
        overflow = scaler.is_enabled() and scale > LOWEST_SCALE
        outcome: Outcome = "overflowed" if overflow else "skipped"
        return _refuse(updates, outcome, loss=loss, weight=weight, scale=scale)
    reports = [u.step(g, loss, weight, scale) for u, g in zip(updates, gradients, strict=True)]
    if scaler.is_enabled():
        scaler.update()
    if stopwatch is not None:
        stopwatch.mark("step")
    return reports


def step_by_gradients(updates: Sequence[Update]) -> bool:
    """Clip and step with the gradients of a recipe's own backward passes, and drop them.

    Returns:
        False if a gradient is not finite, so that nothing has moved.
    """
    scaler = updates[0].scaler
    for update in updates:
        if scaler.is_enabled():
            scaler.unscale_(update.optimizer)
    gradients = [Gradients(u.optimizer.param_groups, u.clip) for u in updates]
    _fetch([(grads.measure(), grads.take) for grads in gradients])
    finite = all(grads.finite for grads in gradients)
    for update, grads in zip(updates, gradients, strict=True):
        if finite and grads.tensors:
            update.clip(grads)
            update.move()
    if scaler.is_enabled():
        scaler.update()
    for p in (p for update in updates for p in update.all_params):
        p.grad = None
    return finite


def leave(updates: Sequence[Update], settled: Settled) -> list[StepReport]:
    """Drop a full window without a step, since the recipe does not step; report its loss."""
    for update in updates:
        update.drop_window()
    loss = settled.loss if math.isfinite(settled.loss) else None
    return [update.report("accumulated", loss=loss, weight=settled.weight) for update in updates]


def _backward(updates: Sequence[Update], scaled: Tensor, retain_graph: bool) -> None:
    """Run backward into the parameters of these optimizers only."""
    name = updates[0].name
    others, untrained = [], updates[0].untrained.values()
    if updates[0].others:
        own = [p for update in updates for p in update.params]
        if not own:
            raise ValueError(
                f"optimize({name!r}): no parameter of this optimizer requires a gradient; is it "
                "within frozen()?"
            )
        ids = {id(p) for p in own}
        if len(ids) < len(own):
            one, two = next((u, v) for u in updates for v in u.sharing if v in updates)
            raise ValueError(
                f"the optimizers {_names(updates)} step together, and {one.name!r} and "
                f"{two.name!r} share {one.shared_with(two)}, which each of them would move by one "
                "gradient; give it to one of them"
            )
        others = [p for other in updates[0].others for p in other.params if id(p) not in ids]
    kept = [p.grad for p in untrained]
    for p in others:
        p.requires_grad_(False)
    for p in untrained:
        p.grad = None
    try:
        scaled.backward(retain_graph=retain_graph)
    except CheckpointError as error:
        raise ValueError(
            f"optimize({name!r}): a checkpointed part was recomputed while the parameters of "
            "other optimizers require no gradient. Compute the loss within frozen(…) with the "
            "names of these optimizers"
        ) from error
    except RuntimeError as error:
        if "none of output has requires_grad=True" in str(error):
            raise ValueError(
                f"optimize({name!r}): a part under reentrant checkpointing was recomputed while "
                "the parameters of other optimizers require no gradient. Use use_reentrant=False, "
                "and compute the loss within frozen(…) with the names of these optimizers"
            ) from error
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            f"optimize({name!r}): the graph of this loss holds weights that another optimizer has "
            "moved since. Compute the loss after that step, or give both losses in one call, "
            f"optimize({{…: …, {name!r}: loss}}), which steps after both backward passes"
        ) from error
    finally:
        for p in others:
            p.requires_grad_(True)
        updates[0].take_untrained(kept)
        if stopwatch is not None:
            stopwatch.mark("backward")


def _unscale(updates: Sequence[Update], device: torch.device) -> list[Tensor]:
    """Divide gradients by the fp16 scale; return the scale, or nothing without a scaler."""
    scaler = updates[0].scaler
    if not scaler.is_enabled():
        return []
    # A scaler has no scale before its first use.
    scale = scaler.scale(torch.ones((), device=device))
    for update in updates:
        if any(p.grad is not None for p in update.all_params):
            scaler.unscale_(update.optimizer)
    return [scale]


def _read(
    updates: Sequence[Update],
    gradients: list[Gradients],
    scales: list[Tensor],
    sums: WindowSums | None,
) -> tuple[float, float, float]:
    """Fetch mean loss, weight of the window and fp16 scale in one sync."""
    window = updates[0].window
    assert window.loss is not None
    weight, unread = window.weight, []
    if isinstance(weight, Tensor):
        factor: float | Tensor = window.reference / weight
        unread = [weight] if sums is None else []  # Else the sum over ranks is read.
    else:
        factor = window.reference / (weight or 1.0)
    facts: list[float] = []
    requests: list[tuple[Tensor, Take]] = [
        (each.reshape(1), facts.extend) for each in (window.loss, *scales, *unread)
    ]
    for update, grads in zip(updates, gradients, strict=True):
        measured = grads.measure(factor if sums is None else sums.reference / sums.numbers[1])
        requests += [(measured, grads.take), *update.deferred]
        update.deferred = []
    if sums is not None:
        requests += [(sums.numbers, facts.extend), *([sums.check] if sums.check else [])]
    _fetch(requests)
    scale = facts[1] if scales else 1.0
    if sums is None:
        weight = facts[-1] if unread else float(weight)
        factor = window.reference / (weight or 1.0)
        loss = facts[0] * factor
    else:
        total, weight, *answers = facts[1 + len(scales) :]
        updates[0].strategy.votes = Votes(*(number > 0 for number in answers[:3]))
        had = answers[3:]
        factor = sums.reference / (weight or 1.0)
        loss = total / (weight or 1.0)
        if not all(had):
            missing = {id(p) for p, ranks in zip(sums.params, had, strict=True) if not ranks}
            for grads in gradients:
                grads.keep([id(p) not in missing for p in grads.params])
    if factor != 1.0:
        for grads in gradients:
            grads.rescale(factor)
    return loss, weight, scale


def _fetch(requests: Sequence[tuple[Tensor, Take]]) -> None:
    """Bring vectors to the host in one transfer, and pass the numbers of each to its function."""
    if not requests:
        return
    vectors = [vector for vector, _ in requests]
    if len({vector.device for vector in vectors}) > 1:
        vectors = [vector.to(vectors[0].device) for vector in vectors]
    numbers = torch.cat(vectors).tolist()
    start = 0
    for vector, take in requests:
        stop = start + vector.numel()
        take(numbers[start:stop])
        start = stop


def _refuse(updates: Sequence[Update], outcome: Outcome, **facts: Any) -> list[StepReport]:
    """Drop the window without a step; an overflow lowers the fp16 scale.

    ``facts`` are further fields of the `StepReport`, among them ``scale``.
    """
    scaler = updates[0].scaler
    if scaler.is_enabled():
        # Setting the scale also makes the scaler forget that these gradients were unscaled.
        scaler.update(None if outcome == "overflowed" else facts["scale"])
    for update in updates:
        update.drop_window()
    return [update.report(outcome, **facts) for update in updates]


def _check_windows(updates: Sequence[Update]) -> None:
    """Raise ValueError unless the windows of all optimizers hold the same losses."""
    lead = updates[0]
    for update in updates:
        if update.window.count != lead.window.count or update.window.lead not in ("", lead.name):
            held = ", ".join(
                f"{u.name!r} has {u.window.count}"
                + (f" with {u.window.lead!r}" if u.window.count else "")
                for u in updates
            )
            raise ValueError(
                f"optimize() got a loss for {_names(updates)}, whose open accumulation windows "
                f"have other losses ({held}): until a window closes, give its losses to the same "
                "optimizers"
            )


def _listed(names: Sequence[str]) -> str:
    """Return the patterns of groups as text; the layers of a layer_decay count as one."""
    found = dict.fromkeys(name.partition(" @ ")[0] for name in names if name)
    return ", ".join(map(repr, found)) or "none"


def _names(updates: Sequence[Update]) -> str:
    return ", ".join(repr(update.name) for update in updates)


def _check(loss: Tensor, weight: float | Tensor, name: str) -> None:
    """Check the arguments of `optimize`; do not read the value of a tensor."""
    on_device, problem = isinstance(weight, Tensor), ""
    if not isinstance(loss, Tensor):
        problem = f"a {type(loss).__name__} as its loss; allowed: a scalar tensor"
    elif loss.numel() != 1:
        problem = f"a loss of shape {tuple(loss.shape)}; allowed: a scalar (use loss.mean())"
    elif isinstance(weight, Tensor) and weight.numel() != 1:
        shape = tuple(weight.shape)
        problem = f"a weight of shape {shape}; allowed: a number or a scalar tensor"
    elif not loss.requires_grad and (on_device or weight):
        problem = (
            "a loss without a graph: no parameter that requires a gradient led to it. Was it "
            "detached, computed under torch.no_grad() or reentrant checkpointing of the whole "
            "network (use_reentrant=False does), or is every module frozen?"
        )
    elif not on_device and not 0.0 <= weight < math.inf:
        problem = f"the weight {weight!r}; allowed: a finite number, 0 or more"
    if problem:
        raise ValueError(f"optimize({name!r}) got {problem}")


def _leading_group(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the group whose learning rate stands for all of them.

    That is the first of the recipe's own groups, or, if patterns have divided them, the one with
    the largest rate.
    """
    if "patterns" not in groups[0]:
        return 0
    peaks = [group.get("initial_lr", group.get("lr")) for group in groups]
    rates = [float(p or 0.0) * g.get("lr_factor", 1.0) for p, g in zip(peaks, groups, strict=True)]
    return rates.index(max(rates))


def _settings(optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """Return the plain settings of an optimizer's groups and of its schedule."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = schedule.state_dict() if hasattr(schedule, "state_dict") else {}
    return {"groups": [_plain(group) for group in groups], "schedule": _plain(state)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the values that consist of numbers and texts."""
    numbers = {key: plain_number(value) for key, value in values.items()}
    return {key: copy.deepcopy(value) for key, value in numbers.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
