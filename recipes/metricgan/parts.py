"""Contribution of each phase of a training on the test set, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from recipes.common.scoreboard import Row
from trainer import distributed


class Part(NamedTuple):
    """Contribution of a phase: the mean over clips, its standard error, the number of clips."""

    mean: float
    error: float  # NaN for a single clip
    clips: int


def part(before: Sequence[Row], after: Sequence[Row], measure: str) -> Part:
    """Compare scores clip by clip, since clips differ far more from each other than phases do.

    Raises ValueError where no clip was measured both times.
    """
    first = {row.id: row.enhanced for row in before}
    changes = [
        row.enhanced[measure] - first[row.id][measure]
        for row in after
        if measure in row.enhanced and measure in first.get(row.id, {})
    ]
    if not changes:
        raise ValueError(f"{measure}: no clip was measured both times")
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
    return Part(fmean(changes), error, len(changes))


def keep_outcomes(brain: Any) -> None:
    """Have the outcome of each phase of an `Enhancer` kept, beside what its YAML keeps."""
    if brain.checkpointer is not None:
        rules = dict.fromkeys(brain.bests.values(), "max")
        brain.checkpointer.keep_best(rules, every_epoch=False)


def evaluate_phases(brain: Any, test: Any) -> dict[str, float]:
    """The measures of the test set by the best checkpoint of the last phase of an `Enhancer`.

    Beside them, ``pesq_warm_up`` and so on: what the phases before had come to, by the weights that
    the next one began with. Prints the measures of each, and what it adds to the one before.
    """
    before: dict[str, float] = {}
    last: tuple[str, Sequence[Row]] | None = None
    for name, metric in brain.bests.items():
        brain.evaluate(test, max_key=metric)
        target = brain.hparams.target
        tell(name, brain.test_metrics)
        if last is not None and distributed.is_main():
            added = part(last[1], brain.board.rows, target)
            print(
                f"{name} adds to {last[0]}: {target} {added.mean:+.3f}, "
                f"standard error {added.error:.3f} over {added.clips} clips",
                flush=True,
            )
        if target in brain.test_metrics:
            before[metric] = brain.test_metrics[target]
        last = name, brain.board.rows
    before.pop(brain.best, None)
    return {**brain.test_metrics, **before}


def tell(name: str, metrics: Mapping[str, float]) -> None:
    """Print a phase's line: "warm_up: pesq=1.52 stoi=0.81"."""
    if distributed.is_main():
        print(f"{name}:", *(f"{key}={value:.3f}" for key, value in metrics.items()), flush=True)
