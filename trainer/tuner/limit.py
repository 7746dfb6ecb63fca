"""Which clip limit: trials that begin at 1 and at percentiles of the norms, then bisect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.tuner.course import Course, mean

FIRST = 1.0
STRIDE = 4.0  # up and down from the ends of what was tried
NARROW = 1.5  # neighbours this close are not bisected: a limit need not be more exact
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
TRIED = (50, 90)  # percentiles that are tried whatever the others gave
# A trial is as good as the best where it lags behind it by less than a tenth of the steps, or by
# so much of the best one's progress: less is chance in so few steps.
LAG, CHANCE = 0.1, 0.01
# What a limit of each kind is compared with.
MEASURES = {
    "NormClip": "norm of the gradient",
    "LayerClip": "largest norm of a layer",
    "ValueClip": "largest element",
}


@dataclass
class Advice:
    """What the trials of an optimizer recommend, and everything they gave.

    ``limit`` is None where nothing can be recommended. ``good`` are the limits that are as good as
    the best one, ``needed`` says that no clipping at all is not among them. ``percentiles`` are of
    what a clipper of this ``kind`` compares with its limit, where nothing is clipped.
    """

    kind: str
    limit: float | None
    reason: str
    rate: float
    needed: bool = False
    good: list[float] = field(default_factory=list)
    share: float = 0.0
    percentiles: dict[int, float] = field(default_factory=dict)
    courses: list[Course] = field(default_factory=list)

    def setting(self) -> float | None:
        """The value for ``max_grad_norm``."""
        return self.limit

    def sentence(self) -> str:
        """The recommendation in words."""
        what = "no limit can be recommended" if self.limit is None else f"limit {self.limit:g}"
        seen = ", ".join(f"{p} %: {self.percentiles[p]:.3g}" for p in (10, 50, 90, 99))
        measure = MEASURES[self.kind].capitalize()
        return f"{what}: {self.reason}. {measure} without clipping at {seen}; lr {self.rate:.3g}."

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it; an infinite limit or score is null."""
        return {
            "kind": self.kind, "limit": self.limit, "reason": self.reason, "lr": self.rate,
            "needed": self.needed, "as_good": self.good, "clipped": self.share,
            "percentiles": {str(p): _finite(value) for p, value in self.percentiles.items()},
            "trials": [
                {
                    "limit": _finite(each.setting), "start": _finite(each.start),
                    "end": _finite(each.end), "clipped": each.share, "skipped": each.skipped,
                    "ended_early": each.over, "losses": each.losses, "norms": each.norms,
                }
                for each in self.courses
            ],
        }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def find_limit(trial: Callable[[float], Course], trials: int) -> list[Course]:
    """At most so many trials: without clipping, at 1, at percentiles, then around the best.

    From the best limit of those tried the next is a fourth or four times it where that is an end,
    else the (geometric) middle of the wider gap to a neighbour. A limit above every norm that was
    seen would never act.
    """
    tried: dict[float, Course] = {}

    def run(limit: float) -> None:
        if limit not in tried and len(tried) < trials:
            tried[limit] = trial(limit)
            tried[limit].setting = limit

    run(math.inf)
    seen = tried[math.inf].norms
    top = max(seen, default=math.inf)
    run(FIRST)
    for percent in TRIED:
        if seen and not any(_near(_rounded(percentile(seen, percent)), each) for each in tried):
            run(_rounded(percentile(seen, percent)))
    while len(tried) < trials:
        limit = _next(list(tried.values()), top)
        if limit is None or limit in tried:
            break
        run(limit)
    return list(tried.values())


def _near(a: float, b: float) -> bool:
    return a <= 0 or max(a, b) / min(a, b) < NARROW


def _next(courses: Sequence[Course], top: float) -> float | None:
    """The limit that should tell most; None where the best is known closely enough."""
    finite = sorted((each for each in courses if each.setting < math.inf), key=_limit)
    place = min(range(len(finite)), key=lambda i: _order(finite[i]))
    best = finite[place].setting
    if place == 0:
        return _rounded(best / STRIDE)
    if place == len(finite) - 1:
        return _rounded(best * STRIDE) if best < top else None
    below, above = best / finite[place - 1].setting, finite[place + 1].setting / best
    if max(below, above) < NARROW:
        return None
    return _rounded(best * math.sqrt(above) if above >= below else best / math.sqrt(below))


def _limit(course: Course) -> float:
    return course.setting


def _order(course: Course) -> tuple[int, float]:
    """What makes a trial better: fewer steps that are not finite, then a lower loss at its end."""
    return course.skipped, course.end


def advise(kind: str, courses: Sequence[Course], rate: float) -> Advice:
    """What the trials say.

    Where no clipping is as good as any, the largest limit as good: it changes the fewest steps and
    stands guard against spikes. Where clipping is needed, the middle of those that are as good: at
    their upper end training fails.
    """
    free = next(each for each in courses if each.setting == math.inf)
    best = min(courses, key=_order)
    seen = {p: percentile(free.norms, p) for p in PERCENTILES}
    progress = best.start - best.end
    advice = Advice(kind, None, "", rate, percentiles=seen, courses=sorted(courses, key=_limit))
    if not progress > 0:
        advice.reason = (
            f"no trial of {best.steps} steps lowered the loss, so that none is better; allow more "
            "steps (--find_steps), or look for the learning rate first (--find_lr)"
        )
        if free.norms:
            advice.reason += f"; as a guard against spikes {_rounded(seen[99], up=True):g} would do"
        return advice
    late = len(best.losses) - max(1, round(LAG * len(best.losses)))
    before = mean(best.losses[late - max(1, len(best.losses) // 4) : late])
    bound = max(before, best.end + CHANCE * progress)
    good = [each for each in advice.courses if each.skipped <= best.skipped and each.end <= bound]
    advice.good = [each.setting for each in good if each.setting < math.inf]
    advice.needed = free not in good
    _choose(advice, good, free)
    return advice


def _choose(advice: Advice, good: list[Course], free: Course) -> None:
    """Limit and reason, from the trials that are as good as the best one."""
    finite = [each for each in good if each.setting < math.inf]
    if not finite:
        advice.limit = _rounded(advice.percentiles[100], up=True)
        advice.reason = "every limit that acts made it worse; this one is above all norms seen"
        return
    if advice.needed:
        middle = math.sqrt(finite[0].setting * finite[-1].setting)
        chosen = min(finite, key=lambda each: abs(math.log(each.setting / middle)))
        failed = "failed" if free.end == math.inf else "did worse"
        advice.reason = f"training without clipping {failed}, and {_range(finite)} did best"
    else:
        acting = [each for each in finite if each.setting <= max(free.norms)]
        chosen = (acting or finite)[-1]
        advice.reason = (
            f"{_range(finite)} did as well as no clipping; the largest of them that acts at all "
            "stands guard against spikes"
        )
    advice.limit, advice.share = chosen.setting, chosen.share
    advice.reason += f"; it clipped {100 * chosen.share:.0f} % of the steps"
    if chosen.share > 0.9:
        advice.reason += ", so that it is a part of the learning rate"


def _range(courses: list[Course]) -> str:
    low, high = courses[0].setting, courses[-1].setting
    return f"a limit of {low:g}" if low == high else f"limits from {low:g} to {high:g}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the nearest two values, linearly; NaN of nothing.

    >>> percentile([1.0, 2.0, 4.0], 75)
    3.0
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _rounded(value: float, up: bool = False) -> float:
    """Two digits are enough for a limit."""
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    steps = math.ceil(value / unit - 1e-9) if up else round(value / unit)
    return float(f"{steps * unit:.2g}")
