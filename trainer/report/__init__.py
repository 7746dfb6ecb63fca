"""The report of a run as a page: `report.html` beside `metrics.jsonl`, complete in one file.

It needs no network and no script, follows the reader's light or dark setting, and is written anew
after the stages, so that it can be looked at while the run goes on. By hand:

    python -c "from trainer.report import write_html; write_html('results/asr/demo/1234')"

`history` reads the log, `plots` chooses what to show, `chart` draws it on `axis`, `style` colours
it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path

from trainer.report.axis import number
from trainer.report.cases import case_list
from trainer.report.chart import Chart, draw
from trainer.report.history import History, measured, read_history
from trainer.report.layers import layer_table, warning_list
from trainer.report.plots import sections, spoken
from trainer.report.style import STYLE

ROWS = 30  # of the table of stages
SHOWN = 200_000  # characters of a file
FILES = (
    ("Command", "command.txt"),
    ("Settings", "hyperparams.yaml"),
    ("Environment", "environment.json"),
)


def write_html(folder: Path | str) -> Path:
    """Write `report.html` into a run's folder from what has been logged so far, all or nothing.

    An OSError with a sentence where the folder cannot be written.
    """
    folder = Path(folder)
    path, temporary = folder / "report.html", folder / ".report.html.new"
    page = render(folder)
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"the run's report could not be written ({error.strerror}); "
            "free some space or choose another --output_folder",
            str(path),
        ) from error
    return path


class Page:
    """Keeps a run's report up to date for about a hundredth of the run's time.

    Reading a long log takes seconds, and a stage may be short: so a stage refreshes the page only
    when a hundred times of what the last writing took has passed, and `finish` writes what is left.
    Without a folder nothing happens.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._stale = False
        self._written, self._cost = -math.inf, 0.0

    def refresh(self) -> None:
        """Something was logged."""
        self._stale = True
        if time.perf_counter() - self._written >= 100 * self._cost:
            self.finish()

    def finish(self) -> None:
        """Write the page unless it is up to date."""
        if self.folder is not None and self._stale:
            started = time.perf_counter()
            write_html(self.folder)
            self._written = time.perf_counter()
            self._cost, self._stale = self._written - started, False


def render(folder: Path) -> str:
    """The page as text."""
    history = read_history(folder / "metrics.jsonl")
    name = escape(" / ".join(folder.resolve().parts[-3:]).lstrip("/ "))
    charts = "".join(_section(title, charts) for title, charts in sections(history))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
        f"<header><h1>{name}</h1><p>{escape(_status(history))}</p>{_tiles(history)}</header>\n"
        f"<main>{case_list(folder)}{warning_list(history)}{charts}{layer_table(history)}{_table(history)}{_files(folder)}</main></body></html>\n"
    )


def _status(history: History) -> str:
    """How far the run has come, and when this was written."""
    epochs = [r["epoch"] for r in history.stages if isinstance(r.get("epoch"), int)]
    facts = [f"{history.last_step:,} optimizer steps"]
    if epochs:
        facts.insert(0, f"{max(epochs):,} epoch{'s' * (max(epochs) != 1)}")
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
    """What one wants to know first: the test, the lowest validation losses, the steps not taken."""
    tiles = []
    for record in history.stages:
        if record["stage"] == "test":
            results = [(name, value) for name, value in measured(record) if value is not None]
            results.sort(key=lambda result: result[0].split(".")[0] == "loss")  # metrics first
            tiles += [(f"test {spoken(name)}", number(value), "") for name, value in results]
    for name in history.measures():
        known = history.by_epoch("valid", name).known()
        if name.split(".")[0] == "loss" and known:
            epoch, value = min(known, key=lambda point: point[1])
            tiles.append((f"lowest valid {spoken(name)}", number(value), f"epoch {number(epoch)}"))
    for kind in ("skipped", "overflowed"):
        counts = {n: history.of_optimizer(n, kind).sum() for n in history.optimizers()}
        lost = {name: count for name, count in counts.items() if count}
        if lost:
            shares = ", ".join(f"{name} {count:,.0f}" for name, count in lost.items())
            tiles.append((f"steps {kind}", f"{sum(lost.values()):,.0f}", shares))
    cells = (
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        f"<small>{escape(more)}</small></li>"
        for name, value, more in tiles
    )
    return f'<ul class="tiles">{"".join(cells)}</ul>' if tiles else ""


def _section(title: str, charts: Iterable[Chart]) -> str:
    """The charts that have something to show."""
    drawn = "".join(draw(chart) for chart in charts if any(len(each.xs) for each in chart.series))
    if not drawn:
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="charts">{drawn}</div></section>\n'


def _table(history: History) -> str:
    """The last stages, the newest first."""
    if not history.stages:
        return ""
    counts = ("step", "examples", "skipped", "overflowed", "seconds")
    measures = history.measures()
    names = ("stage", "epoch", *(spoken(name) for name in measures), *counts)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for record in reversed(history.stages[-ROWS:]):
        values = {**record, **dict(measured(record))}
        epoch = "" if record.get("epoch") is None else record["epoch"]
        cells = "".join(f"<td>{_cell(values, name)}</td>" for name in (*measures, *counts))
        stage = f'<th scope="row">{escape(str(record["stage"]))}</th>'
        rows.append(f"<tr>{stage}<td>{escape(str(epoch))}</td>{cells}</tr>")
    title = "Stages" if len(history.stages) <= ROWS else f"The last {ROWS} stages"
    return (
        f"<section><h2>{title}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )


def _cell(values: dict[str, object], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else number(value)
    return "lost" if value is None else escape(str(value))


def _files(folder: Path) -> str:
    """How to run it again: command, settings and environment, folded away."""
    parts = []
    for title, name in FILES:
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(SHOWN)
            parts.append(
                f"<details><summary>{title} <small>{name}</small></summary>"
                f'<pre tabindex="0">{escape(text)}</pre></details>'
            )
    return f"<section><h2>To run it again</h2>{''.join(parts)}</section>\n" if parts else ""
