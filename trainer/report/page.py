"""The report of a run as one HTML page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.axis import count, number
from trainer.report.chart import Chart, draw
from trainer.report.history import History, measures_of, read_history
from trainer.report.layers import layer_table, warning_list
from trainer.report.nonfinite import nonfinite_list
from trainer.report.plots import display_name, sections
from trainer.report.style import STYLE

MAX_ROWS = 30  # Rows of the table of stages.
MAX_CHARACTERS = 200_000  # Characters of a file that are shown.
COUNTS = ("step", "examples", "skipped", "overflowed", "seconds")
FILES = (
    ("Command", "command.txt"),
    ("Settings", "hyperparams.yaml"),
    ("Environment", "environment.json"),
)


def render(folder: Path) -> str:
    """Return the page of a run folder as text."""
    history = read_history(folder / "metrics.jsonl")
    name = escape(" / ".join(folder.resolve().parts[-3:]).lstrip("/ "))
    charts = "".join(_section(title, charts) for title, charts in sections(history))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
        f"<header><h1>{name}</h1><p>{escape(_status(history))}</p>{_tiles(history)}</header>\n"
        f"<main>{nonfinite_list(folder)}{warning_list(history)}{charts}{layer_table(history)}"
        f"{_table(history)}{_files(folder)}</main></body></html>\n"
    )


def _status(history: History) -> str:
    """Return how far the run has come, and when the page was written."""
    epochs = [r["epoch"] for r in history.stages if isinstance(r.get("epoch"), int)]
    facts = [f"{count(history.last_step)} optimizer steps"]
    if epochs:
        facts.insert(0, f"{count(max(epochs))} epoch{'s' * (max(epochs) != 1)}")
    if history.seconds:
        facts.append(_duration(history.seconds))
    if not history.stages and not history.steps:
        text = "Nothing has been logged yet."
    else:
        tested = "test" in history.stage_names()
        text = f"{'Trained and tested' if tested else 'Not tested yet'}: {', '.join(facts)}."
    if history.unreadable:
        lines = "line" if history.unreadable == 1 else "lines"
        text += f" {history.unreadable} {lines} of metrics.jsonl could not be read."
    return f"{text} Written {time.strftime('%Y-%m-%d %H:%M')}."


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {int(seconds % 60):02} s" if minutes else f"{seconds:.1f} s"


def _tiles(history: History) -> str:
    """Return tiles with the test results, the lowest validation losses and the lost steps."""
    tiles = []
    for record in history.stages:
        if record["stage"] == "test":
            results = [(name, value) for name, value in measures_of(record) if value is not None]
            results.sort(key=lambda result: result[0].split(".")[0] == "loss")  # Metrics first.
            tiles += [(f"test {display_name(name)}", number(value), "") for name, value in results]
    for name in history.measures():
        known = history.by_epoch("valid", name).known()
        if name.split(".")[0] == "loss" and known:
            epoch, value = min(known, key=lambda point: point[1])
            title = f"lowest valid {display_name(name)}"
            tiles.append((title, number(value), f"epoch {number(epoch)}"))
    for kind in ("skipped", "overflowed"):
        steps = {name: history.of_optimizer(name, kind).sum() for name in history.optimizers()}
        shares = ", ".join(f"{name} {count(lost)}" for name, lost in steps.items() if lost)
        if shares:
            tiles.append((f"steps {kind}", count(sum(steps.values())), shares))
    cells = (
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        f"<small>{escape(more)}</small></li>"
        for name, value, more in tiles
    )
    return f'<ul class="tiles">{"".join(cells)}</ul>' if tiles else ""


def _section(title: str, charts: Iterable[Chart]) -> str:
    """Return a section with the charts that have a point."""
    drawn = "".join(draw(chart) for chart in charts if any(len(each.xs) for each in chart.series))
    if not drawn:
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="charts">{drawn}</div></section>\n'


def _table(history: History) -> str:
    """Return a table of the last stages, the newest first."""
    if not history.stages:
        return ""
    measures = history.measures()
    heads = ("stage", "epoch", *(display_name(name) for name in measures), *COUNTS)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    rows = []
    for record in reversed(history.stages[-MAX_ROWS:]):
        values = {**record, **dict(measures_of(record))}
        cells = "".join(f"<td>{_cell(values, name)}</td>" for name in (*measures, *COUNTS))
        stage = escape(str(record["stage"]))
        epoch = "" if record.get("epoch") is None else escape(str(record["epoch"]))
        rows.append(f'<tr><th scope="row">{stage}</th><td>{epoch}</td>{cells}</tr>')
    title = "Stages" if len(history.stages) <= MAX_ROWS else f"The last {MAX_ROWS} stages"
    return (
        f"<section><h2>{title}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )


def _cell(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    if isinstance(value, (int, float)):
        return count(value)
    return "lost" if value is None else escape(str(value))


def _files(folder: Path) -> str:
    """Return the command, the settings and the environment, folded away."""
    parts = []
    for title, name in FILES:
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(MAX_CHARACTERS)
            parts.append(
                f"<details><summary>{title} <small>{name}</small></summary>"
                f'<pre tabindex="0">{escape(text)}</pre></details>'
            )
    return f"<section><h2>To run it again</h2>{''.join(parts)}</section>\n" if parts else ""
