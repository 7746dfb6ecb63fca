"""Learning-rate range test: one trial over all rates, to find where the loss falls fastest.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3 (arXiv 1506.01186),
with two changes. The rates rise exponentially. The loss of the same batches with all learning rates
at 0 is subtracted from the loss of each step, so that the curve shows learning, not differences
between batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from trainer.optim.step import Update
from trainer.schedules import set_rates
from trainer.tuner.trial import TrialResult, TrialRunner, mean, replaced

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

MIN_RATE, MAX_RATE = 1e-6, 10.0
MIN_PROGRESS = 0.01  # Relative fall of the loss that counts.
# Rate of the lowest loss over the largest suggested rate: at the former, a longer training would
# soon diverge.
MARGIN = 3.0


@dataclass
class RateSuggestion:
    """Suggested learning rate of an optimizer, with its curve."""

    lr: float | None  # None if the loss fell at no rate.
    reason: str  # Rates at which the loss fell and diverged.
    own: float  # The recipe's rate.
    limit: float  # The recipe's clip limit.
    lowest: float | None = None  # Rate of the lowest loss.
    diverged: float | None = None  # Rate at which it diverged; None if it never did.
    rates: list[float] = field(default_factory=list)  # Rate of each step.
    losses: list[float] = field(default_factory=list)  # Loss of each step.
    at_rest: list[float] = field(default_factory=list)  # Losses of the same batches at rates of 0.
    change: list[float] = field(default_factory=list)  # Smoothed differences losses - at_rest.

    @property
    def ratio(self) -> float:
        """Suggested rate over the recipe's own; 1 without a suggestion."""
        return 1.0 if self.lr is None or not self.own else self.lr / self.own

    def sentence(self) -> str:
        """Return the suggestion in words."""
        what = "no rate can be recommended" if self.lr is None else f"lr {self.lr:.2g}"
        limit = "no clipping" if math.isinf(self.limit) else f"limit {self.limit:g}"
        return f"{what}: {self.reason}. The recipe has {self.own:.3g}, and {limit}."

    def record(self) -> dict[str, Any]:
        """Return everything by its name in the JSON file."""
        return vars(self)


def range_test(runner: TrialRunner, name: str) -> RateSuggestion:
    """Run the range test of an optimizer. Collective.

    All other optimizers have a learning rate of 0, so that the loss shows the effect of this one.
    """
    updates = runner.brain.updates
    update = updates[name]
    steps = 2 * runner.brain.options.find_steps
    base, rates = base_rates(update), exponential_rates(steps)
    own = base[update.leading]
    logger.info("find_lr: %s from %.3g to %.3g", name, MIN_RATE, MAX_RATE)

    def set_rate(rate: float) -> None:  # Other groups keep their ratio to the leading one.
        set_rates(update.optimizer, [rate * each / own if own else rate for each in base])

    def run(rates: Sequence[float], reference: Sequence[float] = ()) -> TrialResult:
        with runner.trial(), ExitStack() as stack:
            for each in updates.values():
                stack.enter_context(replaced(each, "schedule", None))
                set_rates(each.optimizer, [0.0] * len(each.optimizer.param_groups))
            return runner.train(name, steps, lambda step: set_rate(rates[step]), reference)

    reference = run([0.0] * steps).losses
    return suggest_rate(rates, reference, run(rates, reference), own, update.clip.limit)


def exponential_rates(steps: int) -> list[float]:
    """Return learning rates from `MIN_RATE` to `MAX_RATE`, one for each step."""
    return [MIN_RATE * (MAX_RATE / MIN_RATE) ** (step / (steps - 1)) for step in range(steps)]


def base_rates(update: Update) -> list[float]:
    """Return the learning rate of each parameter group, before its schedule changes it."""
    if update.lr is None:
        raise ValueError(
            f"the optimizer {update.name!r} has no learning rate (lr is None), which a search "
            "needs: leave out find_lr and find_clip, or give it an lr"
        )
    return [float(group.get("initial_lr", group["lr"])) for group in update.optimizer.param_groups]


def scale_rates(brain: Brain, ratios: Mapping[str, float]) -> None:
    """Multiply rates of optimizers, and base rates of their schedules, by ``ratios``, by name."""
    for name, ratio in ratios.items():
        update = brain.updates[name]
        groups = update.optimizer.param_groups
        set_rates(update.optimizer, [float(group["lr"]) * ratio for group in groups])
        for group in groups:
            if "initial_lr" in group:
                group["initial_lr"] *= ratio
        if hasattr(update.schedule, "base_lrs"):
            update.schedule.base_lrs = [rate * ratio for rate in update.schedule.base_lrs]


def suggest_rate(
    rates: Sequence[float],
    reference: Sequence[float],
    result: TrialResult,
    own: float,
    limit: float,
) -> RateSuggestion:
    """Suggest the rate at which the loss falls most steeply, before its minimum.

    ``reference`` has the loss of each step with all rates at 0. The loss has diverged once it is as
    far above the reference as its minimum was below it. ``own`` and ``limit`` are the recipe's
    learning rate and clip limit.
    """
    losses = result.losses
    change = [loss - rest for loss, rest in zip(losses, reference, strict=False)]
    number = len(change)
    reach = max(1, number // 40)  # Neighbours on each side to average over, without a lag.
    change = [mean(change[max(0, i - reach) : i + reach + 1]) for i in range(number)]
    size = mean([abs(loss) for loss in reference[:number]])
    end, best = number, 0.0
    for place, value in enumerate(change):
        best = min(best, value)
        if value > max(-best, 0.1 * size):
            end = place
            break
    found = RateSuggestion(
        None, "", own, limit, rates=list(rates[:number]), losses=losses[:number],
        at_rest=list(reference[:number]), change=change,
    )  # fmt: skip
    if end < number or result.failed or result.skipped:
        found.diverged = rates[max(0, min(end, number - 1))]
    lowest = min(range(end), key=lambda place: change[place], default=0)
    if lowest == 0 or change[lowest] > -MIN_PROGRESS * size:
        found.reason = f"at no rate from {MIN_RATE:g} to {MAX_RATE:g} did the loss fall"
        return found
    found.lowest = rates[lowest]
    slopes = _slopes(change[: lowest + 1])
    steepest = rates[slopes.index(min(slopes))]
    found.lr = float(f"{min(steepest, found.lowest / MARGIN):.2g}")
    over = f"it diverges at {found.diverged:.2g}" if found.diverged else "it never diverged"
    found.reason = (
        f"the loss falls most steeply at {steepest:.2g} and is lowest at {found.lowest:.2g} (no "
        f"more than a third of that is suggested); {over}"
    )
    return found


def _slopes(values: Sequence[float]) -> list[float]:
    """Return the slope of the regression line around each of at least two values."""
    reach = 2 * max(1, len(values) // 40) + 1
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [linear_regression(range(len(each)), each).slope for each in around]
