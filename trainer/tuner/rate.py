"""Which learning rate: an exponential range test, read where the loss falls most steeply.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3 (arXiv 1506.01186),
with two changes: the rates rise exponentially, and from each batch's loss is taken what the same
batch costs a model that never moves, so that the curve shows learning and not which batches came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainer.tuner.course import Course, mean

LOWEST, HIGHEST = 1e-6, 10.0
LEAST = 0.01  # of the loss: falling by less is none
MARGIN = 3.0  # below the rate of the lowest loss, where a longer training would soon be lost


@dataclass
class Suggestion:
    """The recommended learning rate of an optimizer, and the curve that it was read from.

    ``change`` is the smoothed loss at each rate less that of the model at rest. ``lowest`` is the
    rate of its minimum, ``diverged`` the one at which it was lost, None where it never was.
    """

    rate: float | None
    reason: str
    own: float
    limit: float
    lowest: float | None = None
    diverged: float | None = None
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    still: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """By what to multiply the recipe's own rate; 1 where nothing can be recommended."""
        return 1.0 if self.rate is None or not self.own else self.rate / self.own

    def setting(self) -> float | None:
        """The value for the optimizer's ``lr``."""
        return self.rate

    def sentence(self) -> str:
        """The recommendation in words."""
        what = "no rate can be recommended" if self.rate is None else f"lr {self.rate:.2g}"
        limit = "no clipping" if math.isinf(self.limit) else f"limit {self.limit:g}"
        return f"{what}: {self.reason}. The recipe has {self.own:.3g}, and {limit}."

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {
            "lr": self.rate, "reason": self.reason, "own": self.own,
            "limit": None if math.isinf(self.limit) else self.limit,
            "lowest": self.lowest, "diverged": self.diverged, "rates": self.rates,
            "losses": self.losses, "at_rest": self.still, "change": self.change,
        }  # fmt: skip


def rates_of_test(steps: int) -> list[float]:
    """Rates from `LOWEST` to `HIGHEST`, each the same multiple of the one before."""
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1)) for step in range(steps)]


def base_rates(update: Any) -> list[float]:
    """The rate of each parameter group that schedules start from, or peak at."""
    return [float(group.get("initial_lr", group["lr"])) for group in update.optimizer.param_groups]


def set_rates(update: Any, rates: Sequence[float]) -> None:
    """Give each parameter group its rate; a rate that is a tensor stays one."""
    for group, rate in zip(update.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scaled(brain: Any, ratios: Mapping[str, float], step: int) -> None:
    """Before a trial's first step, multiply learning rates, those that schedules start from too."""
    for name, ratio in ratios.items() if step == 0 else ():
        update = brain.updates[name]
        groups = update.optimizer.param_groups
        set_rates(update, [float(group["lr"]) * ratio for group in groups])
        for group in groups:
            if "initial_lr" in group:
                group["initial_lr"] *= ratio
        if hasattr(update.schedule, "base_lrs"):
            update.schedule.base_lrs = [rate * ratio for rate in update.schedule.base_lrs]


def suggest(
    rates: Sequence[float], still: Course, course: Course, own: float, limit: float
) -> Suggestion:
    """Read the curve: the rate at which it falls most steeply, before its minimum.

    It is lost where it is as far above the model at rest as it was below at its best.
    """
    number = min(len(course.losses), len(still.losses), len(rates))
    raw = [course.losses[i] - still.losses[i] for i in range(number)]
    smooth = _smooth(raw)
    size = mean([abs(loss) for loss in still.losses[:number]])
    lost, best = number, 0.0
    for place, value in enumerate(smooth):
        best = min(best, value)
        if value > max(-best, 0.1 * size):
            lost = place
            break
    found = Suggestion(
        None, "", own, limit, rates=list(rates[:number]), losses=course.losses[:number],
        still=still.losses[:number], change=smooth,
    )  # fmt: skip
    if lost < number or course.over or course.skipped:
        found.diverged = rates[min(lost, number - 1)]
    lowest = min(range(lost), key=lambda place: smooth[place], default=0)
    if lowest == 0 or smooth[lowest] > -LEAST * size:
        found.reason = f"at no rate from {LOWEST:g} to {HIGHEST:g} did the loss fall"
        return found
    found.lowest = rates[lowest]
    slopes = _slopes(smooth[: lowest + 1])
    steepest = rates[min(range(len(slopes)), key=slopes.__getitem__)]
    found.rate = float(f"{min(steepest, found.lowest / MARGIN):.2g}")
    end = f"it is lost at {found.diverged:.2g}" if found.diverged else "it never diverged"
    found.reason = (
        f"the loss falls most steeply at {steepest:.2g} and is lowest at {found.lowest:.2g} (no "
        f"more than a third of that is suggested); {end}"
    )
    return found


def _reach(number: int) -> int:
    """How many points on each side are averaged."""
    return max(1, number // 40)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of a few points around each: unlike a running average, it does not lag."""
    reach = _reach(len(values))
    return [mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _slopes(values: Sequence[float]) -> list[float]:
    """The slope of a line through the points around each."""
    reach = 2 * _reach(len(values)) + 1
    slopes = []
    for i in range(len(values)):
        low, high = max(0, i - reach), min(len(values) - 1, i + reach)
        places = range(low, high + 1)
        middle, level = (low + high) / 2, mean(values[low : high + 1])
        spread = sum((place - middle) ** 2 for place in places)
        rise = sum((place - middle) * (values[place] - level) for place in places)
        slopes.append(rise / spread if spread else 0.0)
    return slopes
