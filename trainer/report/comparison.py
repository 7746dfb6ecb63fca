"""Several runs on one page: results with their spread over seeds, settings, curves and samples."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.changes import is_place
from trainer.config.reading import PLAIN, paths, plain, read, tag
from trainer.report.axis import count, number
from trainer.report.chart import Chart, Series
from trainer.report.history import Curve, History, measures_of, read_history
from trainer.report.html import document, escape, section, table
from trainer.report.page import (
    chart_sections,
    clocks,
    duration,
    environment,
    last_lines,
    warning_list,
)
from trainer.report.plots import STEP, display_name, is_loss
from trainer.report.samples import read_tables, render_tables
from trainer.texts import spread

MAX_RUNS = 24
MAX_VALUE = 200  # characters of a setting


@dataclass
class Compared:
    """One of the compared runs."""

    name: str  # Path of its folder, relative to the common folder of all runs.
    folder: Path
    history: History
    # Values of its hyperparams.yaml by dotted key, as written.
    settings: dict[str, str] = field(default_factory=dict)
    problem: str = ""  # Reason why the settings are unknown.

    def results(self) -> dict[str, float]:
        """Return the results of the test, else of the last validation."""
        for stage in ("test", "valid", "train"):
            records = [each for each in self.history.stages if each["stage"] == stage]
            if records:
                found = measures_of(records[-1])
                return {f"{stage} {display_name(n)}": v for n, v in found if v is not None}
        return {}


def render_comparison(folders: Sequence[Path]) -> str:
    """Return the page that compares runs; see `trainer.report.compare`."""
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    every = [run.history for run in runs]
    problems = "".join(
        f"<li><strong>{escape(run.name)}</strong>: {escape(run.problem)}</li>"
        for run in runs
        if run.problem
    )
    ended = "".join(
        f"<h3>{escape(run.name)}</h3>{lines}" for run in runs if (lines := last_lines(run.folder))
    )
    samples = render_tables({run.name: read_tables(run.folder) for run in runs})
    return document(
        f"{len(runs)} runs" if len(runs) > 1 else runs[0].name,
        f"<p>{escape(', '.join(run.name for run in runs))}. "
        f"Written {time.strftime('%Y-%m-%d %H:%M')}.</p>",
        f"{section('Results', _results(runs))}{section('Over seeds', _spread(runs))}"
        f"{section('Ended with an error', ended)}"
        f"{_differences(runs, 'Hyperparameters', [run.settings for run in runs])}"
        f"{section('Not read', warning_list(problems))}"
        f"{samples}{chart_sections(_charts(runs))}{clocks(every)}"
        f"{_differences(runs, 'Environment', [environment(run.folder) for run in runs])}",
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Check the folders, and return their paths relative to their common folder."""
    if not folders:
        raise ValueError("there is nothing to compare: give folders of runs, such as results/kws/*")
    if len(folders) > MAX_RUNS:
        raise ValueError(f"{len(folders)} runs are too many for a page; allowed: up to {MAX_RUNS}")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; allowed: folders of runs")
    whole = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(whole))
    if common in whole:
        common = common.parent
    return [str(each.relative_to(common)) for each in whole]


def _read(folder: Path, name: str) -> Compared:
    """Read the records and settings of a run."""
    run = Compared(name, folder, read_history(folder / "metrics.jsonl"))
    try:
        root, _ = read(folder / "hyperparams.yaml", alone=True)
    except (OSError, ValueError) as error:
        run.problem = f"its settings cannot be read: {error}"
        return run
    for key, node in paths(root):
        value = node.value
        if key and tag(node) not in PLAIN:
            run.settings[key] = f"{tag(node)} {value}" if isinstance(value, str) else tag(node)
        elif key and not isinstance(value, list):
            run.settings[key] = str(plain(node))
    return run


def _is_neutral(key: str) -> bool:
    """Return True for a setting that may differ between repetitions of a run."""
    return key == "seed" or is_place(key.rpartition(".")[2])


def _results(runs: Sequence[Compared]) -> str:
    """Return a table with the results of each run."""
    results = {run.name: run.results() for run in runs}
    names = list(dict.fromkeys(name for each in results.values() for name in each))
    rows = []
    for run in runs:
        found, history = results[run.name], run.history
        cells = [number(found[name]) if name in found else "–" for name in names]
        known = count(history.last_step) if history.steps or history.stages else "none logged"
        rows.append([escape(run.name), *cells, known, duration(history.seconds)])
    return table("Results", ["run", *names, "steps", "training"], rows)


def _spread(runs: Sequence[Compared]) -> str:
    """Return a table with mean and standard deviation over runs that differ only in their seed."""
    groups: dict[Any, list[Compared]] = {}
    for run in runs:
        kept = frozenset((k, v) for k, v in run.settings.items() if not _is_neutral(k))
        groups.setdefault(kept if run.settings else run.name, []).append(run)
    if all(len(each) < 2 for each in groups.values()):
        return ""
    differing = _differing([run.settings for run in runs])
    keys = sorted(key for key, _ in differing if not _is_neutral(key))
    names = list(dict.fromkeys(name for run in runs for name in run.results()))
    rows = []
    for group in groups.values():
        title = ", ".join(f"{key}={group[0].settings.get(key, '–')}" for key in keys)
        found = [run.results() for run in group]
        cells = [spread((each.get(name) for each in found), number) or "–" for name in names]
        rows.append([escape(title[:MAX_VALUE] or group[0].name), str(len(group)), *cells])
    note = "<p>Mean and standard deviation over runs whose settings differ only in the seed.</p>"
    return note + table("Over seeds", ["settings", "runs", *names], rows)


Facts = Sequence[Mapping[str, str]]  # of each run


def _differing(facts: Facts) -> list[tuple[str, list[str | None]]]:
    """Return the facts that differ between runs."""
    keys = dict.fromkeys(key for each in facts for key in each)
    return [
        (key, [each.get(key) for each in facts])
        for key in keys
        if len({each.get(key) for each in facts if each}) > 1
    ]


def _differences(runs: Sequence[Compared], title: str, facts: Facts) -> str:
    """Return a section with the differing facts, with a column for each run."""
    rows = [
        [escape(key), *(escape("–" if each is None else each[:MAX_VALUE]) for each in row)]
        for key, row in _differing(facts)
        if key != "output_folder"  # Shown as the name.
    ]
    names = ["", *(run.name for run in runs)]
    return section(title, table(title, names, rows, "words tall") if rows else "")


def _charts(runs: Sequence[Compared]) -> list[tuple[str, list[Chart]]]:
    """Return charts with a line for each run."""
    every = [run.history for run in runs]

    def over_steps(title: str, label: str, key: str, from_zero: bool = False) -> Chart:
        chart = Chart(title, STEP, label, from_zero=from_zero, timed=True)
        return overlaid(chart, [each.of_step(key) for each in every])

    def overlaid(chart: Chart, curves: Sequence[Curve]) -> Chart:
        for place, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            if curve.known():
                line = Series(run.name, curve.xs, curve.ys, place, noisy=True, clock=place)
                chart.series.append(line)
        return chart

    losses = dict.fromkeys(key for each in every for key in each.steps if is_loss(key))
    measures = dict.fromkeys(name for each in every for name in each.measures())
    optimizers = dict.fromkeys(name for each in every for name in each.optimizers())
    steps = [over_steps(f"Training {display_name(key)}", "loss", key) for key in losses]
    epochs = []
    for name in measures:
        chart = Chart(f"{display_name(name)} of validation by epoch", "epoch", display_name(name))
        epochs.append(overlaid(chart, [each.by_epoch("valid", name) for each in every]))
    optimization = []
    for name in optimizers:
        of, at = f" of {name}" if len(optimizers) > 1 else "", f"optimizers.{name}"
        optimization += [
            over_steps(f"Learning rate{of}", "learning rate", f"{at}.lr"),
            over_steps(f"Gradient norm{of}", "L2 norm before clipping", f"{at}.norm"),
        ]
    speed = over_steps("Throughput", "examples per second", "examples_per_second", from_zero=True)
    return [
        ("Losses and metrics", steps + epochs),
        ("Optimization", optimization),
        ("Speed", [speed]),
    ]
