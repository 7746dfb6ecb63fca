"""Learning-rate schedules and early stopping: when to go slower, and when to end.

Every schedule is a `torch.optim.lr_scheduler.LRScheduler`, so that torch's own and these are one
thing for whoever steps them. Two class attributes say how: `every` is "step" (after each optimizer
step) or "epoch", and `needs_metric` is true where `step` wants the value of `metric`.

    schedule: !name:trainer.schedules.Noam {warmup_steps: 4000}
    schedule: !name:trainer.schedules.NewBob {factor: 0.5, metric: wer}

Progress is saved and hyperparameters are not: a changed YAML counts from the step where it
takes over. Several parameter groups keep the ratios of their learning rates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer import checks

Mode = Literal["min", "max"]


def _gain(mode: str, reference: float, value: float) -> float:
    """By how much `value` is better than `reference`; above 0 is better in either mode."""
    return reference - value if mode == "min" else value - reference


class Schedule(LRScheduler):
    """What ours have in common: plain numbers for a state, and LRs that are set without a warning.

    torch's constructor is left out on purpose: it wraps `optimizer.step` in order to warn when the
    first optimizer step was not taken, which with fp16 is normal (the first scales overflow).
    """

    every: ClassVar[Literal["step", "epoch"]]
    needs_metric: ClassVar[bool] = False
    _saved: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last_epoch = 0  # torch's name for the number of times that `step` was called
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    def _set(self, rates: Sequence[float | Tensor]) -> None:
        """Give every parameter group its learning rate; a tensor LR (compiled steps) stays one."""
        if len(rates) != len(self.optimizer.param_groups):
            raise ValueError(
                f"{type(self).__name__} was made for {len(rates)} parameter groups, the optimizer "
                f"has {len(self.optimizer.param_groups)} now"
            )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only: how far the schedule has come, not what it was configured with."""
        return {name: copy(getattr(self, name)) for name in self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; a ValueError where it is another schedule's."""
        checks.same_keys(type(self).__name__, state_dict, self._saved)
        for name in self._saved:
            setattr(self, name, copy(state_dict[name]))


class StepSchedule(Schedule):
    """A learning rate that is a function of the number of the optimizer step alone.

    The optimizer's own learning rates are the peak; step n = 1, 2, … runs at `peak * share(n)`.
    """

    every = "step"
    _saved = ("last_epoch", "base_lrs")

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # as torch's schedules leave it
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._set(self.get_lr())

    def share(self, step: int) -> float:
        """The share of the peak at which optimizer step `step`, counted from 1, runs."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group for the optimizer step that comes next."""
        share = self.share(self.last_epoch + 1)
        return [base * share for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Move on after an optimizer step (or to a given count of them)."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._set(self.get_lr())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; sets the rates, whether or not the optimizer's were loaded."""
        super().load_state_dict(state_dict)
        self._set(self.get_lr())


class Noam(StepSchedule):
    """Linear warm-up, then the inverse square root of the step.

        share(n) = min(n / w, sqrt(w / n)),   w = warmup_steps

    Equation 3 of Vaswani et al. 2017 (arXiv 1706.03762), normalised to a peak of 1 at n = w: the
    optimizer's `lr` is the peak (the paper's own is `(d_model * w) ** -0.5`). The first step runs
    at 1/w of it, the lowest of the warm-up.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        self.warmup_steps = checks.whole("Noam", "warmup_steps", warmup_steps, 1)
        super().__init__(optimizer)

    def share(self, step: int) -> float:
        return min(step / self.warmup_steps, math.sqrt(self.warmup_steps / step))


class WarmupDecay(StepSchedule):
    """Linear warm-up to the peak, then a decay that ends at `final` times the peak.

        share(n) = n / w                               for n <= w = warmup_steps
        share(n) = final + (1 - final) * d(p)          p = (n - w) / (total_steps - w), at most 1
        d(p) = 1 - p  ("linear"),  (1 + cos(pi * p)) / 2  ("cosine"; arXiv 1608.03983, eq. 5)

    Step w runs at the peak, step `total_steps` and all after it at `final`. Without warm-up the
    peak is where step 0 would be.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        final: float = 0.0,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        self.warmup_steps = checks.whole("WarmupDecay", "warmup_steps", warmup_steps, 0)
        self.total_steps = checks.whole(
            "WarmupDecay", "total_steps", total_steps, self.warmup_steps + 1
        )
        self.final = checks.within("WarmupDecay", "final", final, 0.0, 1.0)
        checks.one_of("WarmupDecay", "shape", shape, ("linear", "cosine"))
        self.shape = shape
        super().__init__(optimizer)

    def share(self, step: int) -> float:
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        progress = min(1.0, progress)
        linear = self.shape == "linear"
        decay = 1.0 - progress if linear else (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.final + (1.0 - self.final) * decay


class MetricSchedule(Schedule):
    """A learning rate that is lowered when the epochs no longer get better.

    An epoch is good when its `metric` (a name) beats the reference r by more than
    `threshold * |r|`, downwards for mode "min" and upwards for "max": right for negative values
    too. After more than `patience` epochs in a row that were not good, every learning rate is
    multiplied by `factor`, down to `min_lr` at the least, and the count starts anew.
    """

    every = "epoch"
    needs_metric = True
    _saved = ("last_epoch", "reference", "waited")

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 0.5,
        threshold: float = 0.0025,
        patience: int = 0,
        mode: Mode = "min",
        min_lr: float = 0.0,
        metric: str = "loss",
    ) -> None:
        owner = type(self).__name__
        self.factor = checks.within(owner, "factor", factor, 0.0, 1.0, "()")
        self.threshold = checks.within(owner, "threshold", threshold, 0.0, math.inf, "[)")
        self.patience = checks.whole(owner, "patience", patience, 0)
        checks.one_of(owner, "mode", mode, ("min", "max"))
        self.min_lr = checks.within(owner, "min_lr", min_lr, 0.0, math.inf, "[)")
        self.mode, self.metric = mode, metric
        self.reference: float | None = None
        self.waited = 0
        super().__init__(optimizer)

    def next_reference(self, value: float, good: bool) -> float | None:
        """What the next epoch has to beat, after one of this value."""
        raise NotImplementedError

    def step(self, metric: float) -> None:  # type: ignore[override]
        """Judge an epoch by its metric. A value that is not finite is ignored, with a warning."""
        value = float(metric)
        self.last_epoch += 1
        if not math.isfinite(value):
            warnings.warn(
                f"{type(self).__name__} ignored epoch {self.last_epoch}, whose {self.metric} "
                f"is {value}: the learning rate stays",
                stacklevel=2,
            )
            return
        old = self.reference
        good = old is None or _gain(self.mode, old, value) > self.threshold * abs(old)
        self.reference = self.next_reference(value, good)
        self.waited = 0 if good else self.waited + 1
        if self.waited > self.patience:
            self.waited = 0
            self._lower()

    def _lower(self) -> None:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # a rate that is below the floor already stays where it is
        self._set([max(rate * self.factor, min(self.min_lr, rate)) for rate in rates])


class NewBob(MetricSchedule):
    """Lower the learning rate when an epoch is hardly better than the one before it.

    The reference of `MetricSchedule` is the previous epoch's value. The defaults, less than 0.25 %
    better halves the rate at once, are the rule of the hybrid speech recognisers.
    """

    def next_reference(self, value: float, good: bool) -> float | None:
        return value


class Plateau(MetricSchedule):
    """Lower the learning rate when the best epoch has not been beaten for a while.

    The reference of `MetricSchedule` is the best value so far.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 0.5,
        patience: int = 2,
        threshold: float = 1e-4,
        mode: Mode = "min",
        min_lr: float = 0.0,
        metric: str = "loss",
    ) -> None:
        super().__init__(optimizer, factor, threshold, patience, mode, min_lr, metric)

    def next_reference(self, value: float, good: bool) -> float | None:
        return value if good else self.reference


class EarlyStopping:
    """End the training after `patience` evaluations in a row that did not beat the best one.

    `update(value)` is true when it is time. Value v beats the best b when b - v > min_delta (mode
    "min") or v - b > min_delta ("max"): an absolute margin, so signs do not matter. A value that is
    not finite never beats anything.
    """

    def __init__(
        self, metric: str = "loss", mode: Mode = "min", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        checks.one_of("EarlyStopping", "mode", mode, ("min", "max"))
        self.metric, self.mode = metric, mode
        self.patience = checks.whole("EarlyStopping", "patience", patience, 1)
        self.min_delta = checks.within("EarlyStopping", "min_delta", min_delta, 0.0, math.inf, "[)")
        self.best: float | None = None
        self.waited = 0

    def update(self, value: float) -> bool:
        """Take in one evaluation; true when the training should stop."""
        value = float(value)
        beats = self.best is None or _gain(self.mode, self.best, value) > self.min_delta
        if math.isfinite(value) and beats:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """The best value and how many evaluations have failed to beat it."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; a ValueError where it is not one of an EarlyStopping."""
        checks.same_keys("EarlyStopping", state, ("best", "waited"))
        self.best, self.waited = state["best"], state["waited"]
