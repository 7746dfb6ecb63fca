"""Clip-limit search: trials at 1 and at percentiles of the gradient sizes, then around the best."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from trainer.clipping import LayerClip, NormClip, ValueClip, percentile
from trainer.tuner.learning_rate import base_rates, scale_rates
from trainer.tuner.trial import MEASURES, TrialResult, TrialRunner, mean, replaced

logger = logging.getLogger("trainer")

FIRST_LIMIT = 1.0
TRIED_PERCENTILES = (50, 90)  # Limits tried in every search.
STRIDE = 4.0  # Factor from the lowest or highest limit to the next one.
MIN_GAP = 1.5  # Ratio of neighbouring limits that is not bisected.
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)  # Reported percentiles of gradient sizes.
# A trial is as good as the best one if its final loss is that of the best one `MAX_LAG` of the
# steps earlier, or worse by at most `MAX_SHORTFALL` of the best one's progress: smaller differences
# are chance.
MAX_LAG, MAX_SHORTFALL = 0.1, 0.01


@dataclass
class ClipSuggestion:
    """Suggested clip limit of an optimizer, with its trials."""

    kind: str  # Class of the tried clippers, a key of `MEASURES`.
    limit: float | None  # None if no trial learned anything.
    reason: str  # Explanation from the trials.
    lr: float  # Learning rate of the trials.
    needed: bool = False  # True if training without clipping was worse than the best trial.
    as_good: list[float] = field(default_factory=list)  # Equally good limits, ascending.
    clipped: float = 0.0  # Share of steps that it clipped, from 0 to 1.
    # Percentiles of the gradient size without clipping, by percent.
    percentiles: dict[int, float] = field(default_factory=dict)
    trials: list[TrialResult] = field(default_factory=list)  # By ascending limit.

    def sentence(self) -> str:
        """Return the suggestion in words."""
        what = "no limit can be recommended" if self.limit is None else f"limit {self.limit:g}"
        sizes = ", ".join(f"{p} %: {self.percentiles[p]:.3g}" for p in (10, 50, 90, 99))
        measure = MEASURES[self.kind].capitalize()
        return f"{what}: {self.reason}. {measure} without clipping at {sizes}; lr {self.lr:.3g}."

    def record(self) -> dict[str, Any]:
        """Return the fields by their names in the JSON file."""
        return {**vars(self), "trials": [each.record() for each in self.trials]}


def find_limit(runner: TrialRunner, name: str, ratios: Mapping[str, float]) -> ClipSuggestion:
    """Search for the clip limit of an optimizer; the others are clipped as usual. Collective.

    The learning rates are multiplied by ``ratios``, by name of the optimizer.
    """
    brain = runner.brain
    update, options = brain.updates[name], brain.options
    # Kinds without a fixed limit, such as adaptive ones, are replaced by NormClip.
    own = type(update.clip) in (NormClip, LayerClip, ValueClip)
    clip = copy.copy(update.clip) if own else NormClip()

    def trial(limit: float) -> TrialResult:
        logger.info("find_clip: %s under limit %.3g", name, limit)
        clip.limit = limit
        with runner.trial(), replaced(update, "clip", clip):
            scale_rates(brain, ratios)
            return runner.train(name, options.find_steps)

    rate = base_rates(update)[0] * ratios.get(name, 1.0)
    trials = search_limits(trial, options.find_trials)
    return suggest_limit(type(clip).__name__, trials, rate)


def search_limits(trial: Callable[[float], TrialResult], max_trials: int) -> list[TrialResult]:
    """Try limits: none, 1, percentiles of the gradient sizes, then limits around the best.

    After the lowest limit so far comes a fourth of it, if it is the best; after the highest, four
    times it, unless it is above all gradients. Otherwise the next limit is the geometric middle of
    the wider gap between the best limit and its neighbours. There are at most ``max_trials``
    trials, 4 or more.
    """
    tried: dict[float, TrialResult] = {}

    def run(limit: float) -> None:
        tried[limit] = trial(limit)
        tried[limit].limit = limit

    run(math.inf)
    sizes = sorted(tried[math.inf].norms)
    run(FIRST_LIMIT)
    for percent in TRIED_PERCENTILES:
        limit = _round(percentile(sizes, percent))
        if limit > 0 and all(max(limit / each, each / limit) >= MIN_GAP for each in tried):
            run(limit)
    while len(tried) < max_trials:
        following = _next_limit(tried.values(), sizes[-1] if sizes else math.inf)
        if following is None or following in tried:
            break
        run(following)
    return list(tried.values())


def _next_limit(trials: Iterable[TrialResult], largest: float) -> float | None:
    """Return the limit to try next; None if the best is known closely enough."""
    limited = sorted((each for each in trials if each.limit < math.inf), key=attrgetter("limit"))
    place = min(range(len(limited)), key=lambda i: limited[i].rank)
    best = limited[place].limit
    if place == 0:
        return _round(best / STRIDE)
    if place == len(limited) - 1:
        return _round(best * STRIDE) if best < largest else None
    below, above = best / limited[place - 1].limit, limited[place + 1].limit / best
    if max(below, above) < MIN_GAP:
        return None
    return _round(best * math.sqrt(above) if above >= below else best / math.sqrt(below))


def suggest_limit(kind: str, trials: Sequence[TrialResult], rate: float) -> ClipSuggestion:
    """Suggest a limit from trials.

    If clipping does not help, this is the largest limit that does no harm: it changes the fewest
    steps, and guards against spikes. If clipping helps, it is the middle of the best limits, since
    training fails above them. One of the trials must be without clipping.
    """
    trials = sorted(trials, key=attrgetter("limit"))
    free, best = trials[-1], min(trials, key=attrgetter("rank"))
    sizes = sorted(free.norms)
    percentiles = {p: percentile(sizes, p) for p in PERCENTILES}
    found = ClipSuggestion(kind, None, "", rate, percentiles=percentiles, trials=trials)
    progress = best.start_loss - best.end_loss
    if not progress > 0:
        found.reason = (
            f"no trial of {best.steps} steps lowered the loss, so that none is better; allow more "
            "steps (--find_steps), or search the learning rate first (--find_lr)"
        )
        if sizes:
            found.reason += f"; {_round(percentiles[99], up=True):g} would clip spikes alone"
        return found
    late = len(best.losses) - max(1, round(MAX_LAG * len(best.losses)))
    earlier = mean(best.losses[late - max(1, len(best.losses) // 4) : late])
    bound = max(earlier, best.end_loss + MAX_SHORTFALL * progress)
    good = [each for each in trials if each.skipped <= best.skipped and each.end_loss <= bound]
    limited = [each for each in good if each is not free]
    found.needed, found.as_good = free not in good, [each.limit for each in limited]
    if not limited:
        found.limit = _round(sizes[-1], up=True)
        found.reason = (
            "every limit that clipped made it worse; this one is above all gradients of the trial"
        )
        return found
    low, high = found.as_good[0], found.as_good[-1]
    limits = f"a limit of {low:g}" if low == high else f"limits from {low:g} to {high:g}"
    if found.needed:
        middle = math.sqrt(low * high)
        chosen = min(limited, key=lambda each: abs(math.log(each.limit / middle)))
        failed = "failed" if free.end_loss == math.inf else "did worse"
        found.reason = f"training without clipping {failed}, and {limits} did best"
    else:
        chosen = ([each for each in limited if each.limit <= sizes[-1]] or limited)[-1]
        found.reason = (
            f"{limits} did as well as no clipping; this is the largest of them that clips any "
            "step, as a guard against spikes"
        )
    found.limit, found.clipped = chosen.limit, chosen.clipped_share
    found.reason += f"; it clipped {100 * found.clipped:.0f} % of the steps"
    if found.clipped > 0.9:
        found.reason += ", so that it sets the step size, as a learning rate does"
    return found


def _round(value: float, up: bool = False) -> float:
    """Round a limit to two digits, to the nearest or ``up``; keep 0 and infinity."""
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    steps = math.ceil(value / unit - 1e-9) if up else round(value / unit)
    return float(f"{steps * unit:.2g}")
