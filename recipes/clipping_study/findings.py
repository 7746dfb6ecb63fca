"""From finished cells to rows: means, spreads and failures over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.clipping_study.cells import Cell
from recipes.clipping_study.experiments import Experiment, Setting
from recipes.clipping_study.study import Chosen, Result, Results, choose


@dataclass
class Row:
    """Scores of one kind with one setting under one condition.

    ``values`` are the scores of its seeds (losses or accuracies), ``failures`` how many of them
    failed, ``others`` the means of whatever else was measured, ``steps`` how many each needed to
    come to a target, where there is one.
    """

    arm: str
    kind: str
    setting: Setting
    values: list[float]
    failures: int
    others: dict[str, float] = field(default_factory=dict)
    curves: list[list[float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over the seeds; infinity where any of them was given up."""
        return math.fsum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        finite = all(map(math.isfinite, self.values)) and len(self.values) > 1
        return statistics.stdev(self.values) if finite else math.nan

    @property
    def median(self) -> float:
        """Over the seeds: it has a meaning where some of them were given up, too."""
        return statistics.median(self.values)


@dataclass
class Finding:
    """An experiment with its rows, in the order of its arms and kinds."""

    experiment: Experiment
    rows: list[Row]

    def arms(self) -> list[str]:
        """The conditions, in their order."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    def kinds(self) -> list[str]:
        """The kinds of clipping, in their order."""
        return list(dict.fromkeys(row.kind for row in self.rows))

    def of(self, arm: str, kind: str) -> list[Row]:
        """The rows of a condition and kind: one, or as many as its grid has settings."""
        return [row for row in self.rows if (row.arm, row.kind) == (arm, kind)]


OTHERS = ("clipped", "norm", "norm_max", "skipped", "overflowed", "caught", "disturbed", "hurt")


def findings(chosen: Sequence[Experiment], results: Results, seeds: int) -> list[Finding]:
    """The rows of every experiment, from its finished cells."""
    found = []
    for experiment in chosen:
        settings: Chosen = choose(experiment, results.of)
        places: dict[tuple[str, str, str], list[tuple[Cell, Result]]] = {}
        for cell in experiment.cells(settings, seeds):
            result = results.of(cell)
            if result is None:
                raise ValueError(f"a training is not finished: {cell.key}")
            key = (cell.arm, cell.kind, str(cell.setting))
            places.setdefault(key, []).append((cell, result))
        finding = Finding(experiment, [_row(experiment, each) for each in places.values()])
        _add_worst(finding, results)
        if experiment.name == "speed":
            _add_steps(finding, places)
        found.append(finding)
    return found


def _row(experiment: Experiment, done: list[tuple[Cell, Result]]) -> Row:
    cell, results = done[0][0], [result for _, result in done]
    others = {
        name: math.fsum(float(result[name]) for result in results) / len(results)
        for name in OTHERS
        if name in results[0]
    }
    return Row(
        cell.arm,
        cell.kind,
        dict(cell.setting),
        [float(result[experiment.score]) for result in results],
        sum(map(experiment.has_failed, results)),
        others,
        [result["curve"] for result in results],
    )


def _add_worst(finding: Finding, results: Results) -> None:
    """Add the tuning result of the worst setting that a row's own was chosen from."""
    experiment = finding.experiment
    tried: dict[tuple[str, str], list[float]] = {}
    for cell in experiment.cells(None, 0):
        result = results.of(cell)
        if result is None:
            raise ValueError(f"a training of tuning is not finished: {cell.key}")
        tried.setdefault((cell.arm, cell.kind), []).append(float(result[experiment.score]))
    worst = min if experiment.score == "accuracy" else max
    for row in finding.rows:
        if (row.arm, row.kind) in tried:
            row.others["worst"] = worst(tried[row.arm, row.kind])


def _add_steps(finding: Finding, places: dict[tuple[str, str, str], Any]) -> None:
    """Add the steps that each training needs to reach the final loss of decay without clipping."""
    losses = {
        (arm, kind): [result["losses"] for _, result in done]
        for (arm, kind, _), done in places.items()
    }
    for row in finding.rows:
        model = row.arm.rpartition(", ")[0]
        ends = [_mean(each[-10:]) for each in losses[f"{model}, decay", "none"]]
        target = 1.02 * _mean([end for end in ends if math.isfinite(end)])
        steps = [steps_to(each, target) for each in losses[row.arm, row.kind]]
        row.steps = [float(number) for number, _ in steps]
        row.others |= {
            "target": target,
            "steps": _mean([float(number) for number, _ in steps]),
            "reached": float(sum(reached for _, reached in steps)),
        }


def steps_to(losses: Sequence[float], target: float, window: int = 10) -> tuple[int, bool]:
    """Return the first step at which the mean of the last losses is at most ``target``.

    The flag says that there is one; without one the step is the number of all steps.
    """
    for step in range(window, len(losses) + 1):
        if _mean(losses[step - window : step]) <= target:
            return step, True
    return len(losses), False


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
