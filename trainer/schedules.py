"""Learning-rate schedules and early stopping.

Every schedule is a `torch.optim.lr_scheduler.LRScheduler` and is stepped like torch's own. Its
class attribute `every` is "step" (after each optimizer step) or "epoch", and `needs_metric` is True
if `step` takes the value of `metric`.

    schedule: !name:trainer.schedules.Noam {warmup_steps: 4000}
    schedule: !name:trainer.schedules.NewBob {factor: 0.5, metric: wer}

Checkpoints hold the progress of a schedule, not its hyperparameters: a resumed run uses those of
its YAML. Parameter groups keep the ratios of their learning rates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer import checks

Mode = Literal["min", "max"]


def _improvement(mode: str, reference: float, value: float) -> float:
    """Return the improvement of a value on a reference; above 0 is better in either mode."""
    return reference - value if mode == "min" else value - reference


def set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each parameter group.

    Args:
        optimizer: the optimizer.
        rates: a number or scalar tensor for each group. If the optimizer has a tensor, as for
            compiled steps, it is filled in place.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Schedule(checks.Stateful, LRScheduler):
    """Base class of the schedules, whose state consists of plain numbers.

    torch's constructor is not called: it would warn if the first optimizer step was not taken,
    which is normal in fp16 (the first scales overflow).

    Args:
        optimizer: the optimizer whose learning rates are set.

    Raises:
        ValueError: if the optimizer has no learning rates.
    """

    every: ClassVar[Literal["step", "epoch"]]
    needs_metric: ClassVar[bool] = False

    def __init__(self, optimizer: Optimizer) -> None:
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(
                f"{type(self).__name__} sets learning rates, and {type(optimizer).__name__} has "
                "none (lr is None): give it an lr, or leave out the schedule"
            )
        self.optimizer = optimizer
        self.last_epoch = 0  # torch's name for the number of calls of `step`

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _set_rates(self, rates: Sequence[float | Tensor]) -> None:
        """Set the learning rate of every group."""
        if len(rates) != len(self.optimizer.param_groups):
            raise ValueError(
                f"{type(self).__name__} was made for {len(rates)} parameter groups, the optimizer "
                f"has {len(self.optimizer.param_groups)} now"
            )
        set_rates(self.optimizer, rates)


class StepSchedule(Schedule):
    """Base class of schedules whose learning rate depends on the optimizer step alone.

    The optimizer's own learning rates are the peak; step n = 1, 2, … runs at ``peak * share(n)``.

    Args:
        optimizer: the optimizer whose learning rates are set.
    """

    every = "step"
    saved = ("last_epoch", "base_lrs")

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # as torch's schedules do
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._set_rates(self.get_lr())

    def share(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 1, relative to the peak."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the next optimizer step."""
        share = self.share(self.last_epoch + 1)
        return [base * share for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Set the rates for the next optimizer step; `epoch` overrides the number of past steps."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._set_rates(self.get_lr())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, and set the learning rates."""
        super().load_state_dict(state_dict)
        self._set_rates(self.get_lr())


class Noam(StepSchedule):
    """Warm up linearly, then decay with the inverse square root of the step.

        lr(n) = peak · min(n / w, √(w / n)),    w = warmup_steps

    Vaswani et al. 2017 (arXiv 1706.03762, equation 3). The peak is the optimizer's ``lr``, reached
    at step n = w; the paper's is ``(d_model * w) ** -0.5``, with w = 4000. The first step runs at
    peak / w.

    Args:
        optimizer: the optimizer whose learning rates are set.
        warmup_steps: number of optimizer steps w to the peak, 1 or more.

    Raises:
        ValueError: if `warmup_steps` is out of range.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        self.warmup_steps = checks.whole("Noam", "warmup_steps", warmup_steps, 1)
        super().__init__(optimizer)

    def share(self, step: int) -> float:
        return min(step / self.warmup_steps, math.sqrt(self.warmup_steps / step))


class WarmupDecay(StepSchedule):
    """Warm up linearly to the peak, then decay to `final` times the peak.

        lr(n) = peak · n / w                                for n ≤ w = warmup_steps
        lr(n) = peak · (final + (1 - final) · d(x))         x = min(1, (n - w) / (total_steps - w))
        d(x) = 1 - x  ("linear"),    (1 + cos(πx)) / 2  ("cosine")

    The peak is the optimizer's ``lr``. Steps n count from 1: step w runs at the peak, and
    ``total_steps`` and all later ones at ``final``. The cosine is that of Loshchilov and Hutter
    2017 (arXiv 1608.03983, equation 5), without restarts.

    Args:
        optimizer: the optimizer whose learning rates are set.
        warmup_steps: number of optimizer steps w to the peak, 0 or more.
        total_steps: the optimizer step at which the decay ends, above `warmup_steps`.
        final: the last learning rate relative to the peak, from 0 to 1.
        shape: the curve of the decay: "linear" or "cosine".

    Raises:
        ValueError: if an argument is out of range.
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
        self.total_steps = checks.whole("WarmupDecay", "total_steps", total_steps, 1)
        if self.total_steps <= self.warmup_steps:
            raise ValueError(
                "WarmupDecay: total_steps must be above warmup_steps, which is "
                f"{self.warmup_steps}; got {total_steps!r}: shorten the warm-up, too"
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
    """Base class of schedules that lower the learning rate when a metric stops improving.

        good epoch:    r - v > threshold · |r|  ("min"),    v - r > threshold · |r|  ("max")
        after more than ``patience`` bad epochs in a row: lr ← factor · lr

    v is the metric of the epoch, r a reference that the subclass takes from earlier epochs. The
    first epoch is good.

    Args:
        optimizer: the optimizer whose learning rates are set.
        factor: multiplier of the learning rate, between 0 and 1.
        threshold: the smallest relative improvement of a good epoch, 0 or more.
        patience: number of epochs that may be not good, 0 or more.
        mode: "min" if a lower metric is better, "max" if a higher one is.
        min_lr: the lowest learning rate, 0 or more; rates that are lower already are unchanged.
        metric: the name of the metric.

    Raises:
        ValueError: if an argument is out of range.
    """

    every = "epoch"
    needs_metric = True
    saved = ("last_epoch", "reference", "waited")

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
        """Return the reference of the next epoch.

        Args:
            value: the metric of this epoch.
            good: True if it was a good epoch.
        """
        raise NotImplementedError

    def step(self, metric: float) -> None:  # type: ignore[override]
        """Take the metric of an epoch, and lower the learning rate if patience has run out.

        Args:
            metric: value of the metric; one that is not finite is ignored with a warning.
        """
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
        good = old is None or _improvement(self.mode, old, value) > self.threshold * abs(old)
        self.reference = self.next_reference(value, good)
        self.waited = 0 if good else self.waited + 1
        if self.waited > self.patience:
            self.waited = 0
            self._lower()

    def _lower(self) -> None:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # A rate below the floor is not raised.
        self._set_rates([max(rate * self.factor, min(self.min_lr, rate)) for rate in rates])


class NewBob(MetricSchedule):
    """Lower the learning rate when an epoch is hardly better than the previous one.

    A `MetricSchedule` whose reference r is the metric of the previous epoch. With the defaults an
    improvement of 0.25 % or less halves the learning rate at once. The rule is that of ICSI's
    QuickNet; the defaults are those of SpeechBrain's ``NewBobScheduler``.

    Args:
        optimizer: the optimizer whose learning rates are set.
        factor: multiplier of the learning rate, between 0 and 1.
        threshold: the smallest relative improvement of a good epoch, 0 or more.
        patience: number of epochs that may be not good, 0 or more.
        mode: "min" if a lower metric is better, "max" if a higher one is.
        min_lr: the lowest learning rate, 0 or more; rates that are lower already are unchanged.
        metric: the name of the metric.

    Raises:
        ValueError: if an argument is out of range.
    """

    def next_reference(self, value: float, good: bool) -> float | None:
        return value


class Plateau(MetricSchedule):
    """Lower the learning rate when the metric has not reached a new best for some epochs.

    A `MetricSchedule` whose reference r is the best metric so far: the rule of torch's
    ``ReduceLROnPlateau``, whose defaults are a factor of 0.1 and a patience of 10.

    Args:
        optimizer: the optimizer whose learning rates are set.
        factor: multiplier of the learning rate, between 0 and 1.
        patience: number of epochs without a new best, 0 or more.
        threshold: the smallest relative improvement of a new best, 0 or more.
        mode: "min" if a lower metric is better, "max" if a higher one is.
        min_lr: the lowest learning rate, 0 or more; rates that are lower already are unchanged.
        metric: the name of the metric.

    Raises:
        ValueError: if an argument is out of range.
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


class EarlyStopping(checks.Stateful):
    """End training after `patience` evaluations in a row without a new best value.

        new best:    b - v > min_delta  ("min"),    v - b > min_delta  ("max")

    v is the metric of the evaluation, b the best so far. A value that is not finite is no new best.

    Args:
        metric: the name of the metric.
        mode: "min" if a lower metric is better, "max" if a higher one is.
        patience: number of evaluations without a new best, 1 or more.
        min_delta: the smallest improvement of a new best, absolute, 0 or more.

    Raises:
        ValueError: if an argument is out of range.
    """

    saved = ("best", "waited")

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
        """Take the metric of an evaluation.

        Args:
            value: value of the metric; one that is not finite is no new best.

        Returns:
            True if training should stop.
        """
        value = float(value)
        better = self.best is None or _improvement(self.mode, self.best, value) > self.min_delta
        if math.isfinite(value) and better:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """True if the last `patience` evaluations or more had no new best value."""
        return self.waited >= self.patience
