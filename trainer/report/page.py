"""The report of a run as one HTML page."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from trainer import json_files
from trainer.report.axis import Axis, count, number
from trainer.report.chart import Chart, draw
from trainer.report.history import Curve, History, commands_of, measures_of, read_history
from trainer.report.html import document, escape, section, table, tiles
from trainer.report.plots import PARTS, display_name, is_loss, lost_steps, sections
from trainer.report.samples import read_tables, render_tables

MAX_STAGES = 30  # Rows of the table of stages.
MAX_LAYERS = 300  # Rows of the table of layers.
MAX_POINTS = 40  # Points of a sparkline.
MAX_SKIPPED = 20  # Listed skipped steps.
MAX_CHARACTERS = 200_000  # Shown characters of a file.
MAX_COMMANDS = 50  # Lines of command.txt.
MAX_TIMES = 200  # Points of the training time by step, for charts over time.
LAST_LINES = 60  # of train.log, searched for an error
# Lines of train.log: an error that ends a run, and signs of a later start.
ERROR = re.compile(r"Traceback \(most recent call last\)|^\S+ \S+ stopped: rank")
GOES_ON = re.compile(r"^[\d: -]{19} (epoch \d+ |test: |resuming |testing )")
ENVIRONMENT = ("python", "torch", "cuda", "gpus", "platform", "machines", "ranks", "cores", "git")
SPARK_WIDTH, SPARK_HEIGHT = 96.0, 22.0  # Pixels of a sparkline.
COUNTS = ("step", "examples", "skipped", "overflowed", "bad_files", "seconds")
LAYER_HEADS = (
    "layer", "gradient", "over time", "weight", "update / weight", "over time", "lowest", "highest",
)  # fmt: skip
FILES = (
    ("Command", "command.txt"),
    ("Settings", "hyperparams.yaml"),
    ("Environment", "environment.json"),
)


def render(folder: Path) -> str:
    """Return the page of a run folder as text."""
    history = read_history(folder / "metrics.jsonl")
    warnings = "".join(
        f"<li><strong>Step {count(step)}</strong>: {escape(text)}.</li>"
        for step, text in history.warnings
    )
    reports = _nonfinite_reports(folder)
    lost = lost_steps(history, reports)
    return document(
        " / ".join(folder.resolve().parts[-3:]).lstrip("/ "),
        f"<p>{escape(_status(folder, history))}</p>{_tiles(history)}",
        f"{section('The run has ended with an error', last_lines(folder))}"
        f"{section('Not finite', warning_list(''.join(reports.values())))}"
        f"{section('Warnings', warning_list(warnings))}"
        f"{render_tables({'': read_tables(folder)})}"
        f"{chart_sections(sections(history, lost))}{clocks([history])}{_time(history)}"
        f"{_layers(history)}"
        f"{_stages(history)}{_settings(folder)}{_environment(folder)}"
        f"{section('To run it again', _files(folder))}",
    )


def chart_sections(found: Iterable[tuple[str, Sequence[Chart]]]) -> str:
    """Return the charts that have a line, under their headings."""
    text = ""
    for title, charts in found:
        drawn = "".join(draw(each) for each in charts if any(len(s.xs) for s in each.series))
        text += section(title, f'<div class="charts">{drawn}</div>' if drawn else "")
    return text


def clocks(histories: Iterable[History]) -> str:
    """Return the training times of each run by step, for the script: [[steps], [seconds]] …."""
    found = []
    for history in histories:
        known = history.of_step("seconds").known()
        known = known[:: max(1, len(known) // MAX_TIMES)] + known[-1:]
        times: dict[float, float] = {}
        for step, seconds in known:
            times[step] = max(seconds, *list(times.values())[-1:], 0.0)  # Ascending.
        found.append([list(times), [round(each, 1) for each in times.values()]])
    return f'<script type="application/json" id="clocks">{json.dumps(found)}</script>'


def _time(history: History) -> str:
    """Return bars and tables of the times of the parts of a step, and of the stages."""
    step = {}
    for part in PARTS:
        curve = history.of_step(f"times.{part}")
        if known := len(curve.known()):  # A save belongs to all steps since the last record.
            step[part] = 1000 * curve.sum() / max(1, history.last_step if part == "save" else known)
    stages: dict[str, float] = {}
    for record in history.stages:
        seconds = record.get("seconds")
        if isinstance(seconds, (int, float)) and seconds >= 0:
            stages[str(record["stage"])] = stages.get(str(record["stage"]), 0.0) + seconds
    text = ""
    for name, parts, unit in (("Mean of a step", step, "ms"), ("Stages", stages, "s")):
        total = math.fsum(parts.values())
        if len(parts) < 2 or not 0 < total < 1e300:
            continue
        bar, rows = "", []
        for place, (part, each) in enumerate(parts.items()):
            colour, share = f"b{place % 6}", 100 * each / total
            bar += f'<span class="{colour}" style="width: {share:.2f}%"></span>'
            key = f'<span class="key {colour}"></span>{escape(part)}'
            rows.append([key, f"{number(each)} {unit}", f"{share:.1f} %"])
        text += f'<div class="bar" aria-hidden="true">{bar}</div>'
        text += table(name, (name, "time", "share"), rows)
    return section("Where the time goes", text)


def last_lines(folder: Path) -> str:
    """Return the last lines of the log as HTML, if an error has ended the run."""
    lines = tail(folder / "train.log", LAST_LINES)
    starts = [n for n, line in enumerate(lines) if ERROR.search(line)]
    if not starts or any(GOES_ON.search(line) for line in lines[starts[-1] :]):
        return ""
    shown = "\n".join(lines[max(0, starts[-1] - 3) :])
    return f'<pre tabindex="0">{escape(shown)}</pre>'


def tail(path: Path, most: int) -> list[str]:
    """Return the last lines of a text file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - MAX_CHARACTERS))
            return file.read().decode(errors="replace").splitlines()[-most:]
    except OSError:
        return []


def _status(folder: Path, history: History) -> str:
    """Return the progress of the run and the time of writing, as sentences."""
    epochs = [r["epoch"] for r in history.stages if isinstance(r.get("epoch"), int)]
    facts = [f"{count(max(epochs))} epoch{'s' * (max(epochs) != 1)}"] if epochs else []
    facts.append(f"{count(history.last_step)} optimizer steps")
    facts += [duration(history.seconds)] if history.seconds else []
    text = "Nothing has been logged yet."
    if history.stages or history.steps:
        tested = "test" in history.stage_names()
        text = f"{'Trained and tested' if tested else 'Not tested yet'}: {', '.join(facts)}."
    if history.unreadable:
        lines = "line" if history.unreadable == 1 else "lines"
        text += f" {history.unreadable} {lines} of metrics.jsonl could not be read."
    if (metrics := folder / "metrics.jsonl").is_file():
        recorded = time.localtime(metrics.stat().st_mtime)
        text += f" Last record {time.strftime('%Y-%m-%d %H:%M', recorded)}."
    return f"{text} Written {time.strftime('%Y-%m-%d %H:%M')}."


def duration(seconds: float) -> str:
    """Format a duration, such as "2 h 05 min"."""
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {int(seconds % 60):02} s" if minutes else f"{seconds:.1f} s"


def _tiles(history: History) -> str:
    """Return tiles with the test results, the lowest validation losses and the lost steps."""
    facts = []
    for record in history.stages:
        if record["stage"] == "test":
            results = sorted(measures_of(record), key=lambda each: is_loss(each[0]))
            facts += [
                (f"test {display_name(name)}", number(value), "")
                for name, value in results
                if value is not None
            ]
    for name in history.measures():
        known = history.by_epoch("valid", name).known()
        if is_loss(name) and known:
            epoch, value = min(known, key=itemgetter(1))
            title = f"lowest valid {display_name(name)}"
            facts.append((title, number(value), f"epoch {number(epoch)}"))
    for kind in ("skipped", "overflowed"):
        steps = {name: history.of_optimizer(name, kind).sum() for name in history.optimizers()}
        shares = ", ".join(f"{name} {count(lost)}" for name, lost in steps.items() if lost)
        if shares:
            facts.append((f"steps {kind}", count(sum(steps.values())), shares))
    found = [record.get("out_of_memory") for record in history.stages]
    if lost := sum(each for each in found if isinstance(each, int)):
        facts.append(("batches out of memory", count(lost), ""))
    return tiles(facts)


def warning_list(items: str) -> str:
    """Return list items as a box of warnings, or an empty text without any."""
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _nonfinite_reports(folder: Path) -> dict[int, str]:
    """Return the investigated skipped steps, with their causes as list items.

    A step has one report, or one for each process with a bad batch. Unreadable ones are left out.
    """
    found = []
    for path in sorted(folder.glob("nonfinite/**/report.json")):
        record = json_files.read_mapping(folder, path)
        if type(record.get("step")) is int:
            found.append((record["step"], path, record))
    items: dict[int, str] = {}
    for step, path, record in sorted(found, key=itemgetter(0))[:MAX_SKIPPED]:
        causes = record.get("causes")
        cause = f"; {causes[0]}" if isinstance(causes, list) and causes else ""
        anchor = "" if step in items else f' id="step-{step}"'
        items[step] = items.get(step, "") + (
            f"<li{anchor}><strong>Step {step:,}</strong>: first not finite was "
            f"{escape(str(record.get('first')))}{escape(cause)}. "
            f"<small>{escape(str(path.parent.relative_to(folder)))}</small></li>"
        )
    return items


def _layers(history: History) -> str:
    """Return a table with a row for each layer: last values and their history."""
    rows = []
    for name, curves in islice(history.layers.items(), MAX_LAYERS):
        grad, weight, ratio = (curves.get(key, Curve()) for key in ("grad", "weight", "ratio"))
        ratios = [y for _, y in ratio.known()] or [math.nan]
        rows.append([
            escape(name), number(grad.last()), _spark(grad, f"gradient of {name}"),
            number(weight.last()), number(ratio.last()), _spark(ratio, f"update of {name}"),
            number(min(ratios)), number(max(ratios)),
        ])  # fmt: skip
    more = len(history.layers) - MAX_LAYERS
    note = f"<p>{count(more)} more layers are in metrics.jsonl.</p>" if more > 0 else ""
    return section("Layers", table("Layers", LAYER_HEADS, rows, "tall") + note if rows else "")


def _spark(curve: Curve, name: str) -> str:
    """Return a sparkline: a small line chart for a cell of a table."""
    known = curve.known()
    known = known[:: max(1, math.ceil(len(known) / MAX_POINTS))]
    if len(known) < 2:
        return ""
    x = Axis([known[0][0], known[-1][0]], (2.0, SPARK_WIDTH - 2.0), whole=True)
    y = Axis([value for _, value in known], (SPARK_HEIGHT - 2.0, 2.0))
    points = [(x.at(step), y.at(value)) for step, value in known]
    path = "L".join(f"{a:.0f} {b:.1f}" for a, b in points if not math.isnan(b))
    return (
        f'<svg class="spark" viewBox="0 0 {SPARK_WIDTH:g} {SPARK_HEIGHT:g}" role="img" '
        f'aria-label="{escape(name)}"><path class="line c0" d="M{path}"/></svg>'
    )


def _stages(history: History) -> str:
    """Return a table of the last stages, newest first."""
    measures, rows = history.measures(), []
    for record in reversed(history.stages[-MAX_STAGES:]):
        values = {**record, **dict(measures_of(record))}
        epoch = "" if record.get("epoch") is None else str(record["epoch"])
        cells = [_cell(values.get(name, "")) for name in (*measures, *COUNTS)]
        rows.append([escape(str(record["stage"])), escape(epoch), *cells])
    heads = ["stage", "epoch", *map(display_name, measures), *COUNTS]
    many = len(history.stages) > MAX_STAGES
    title = f"The last {MAX_STAGES} stages" if many else "Stages"
    return section(title, table(title, heads, rows) if rows else "")


def _cell(value: Any) -> str:
    """Return a value of a stage as HTML; "lost" for a non-finite one."""
    if isinstance(value, (int, float)):
        return count(value)
    if isinstance(value, Mapping):  # Several losses have columns of their own.
        return ""
    return "lost" if value is None else escape(str(value))


def _settings(folder: Path) -> str:
    """Return the command-line options of each start, and the changes between starts."""
    rows: list[list[str]] = []
    commands, changes = commands_of(tail(folder / "command.txt", MAX_COMMANDS))
    for when, words in commands:
        given = [*dropwhile(lambda each: not each.startswith("--"), words)]
        if given or not rows:
            rows.append([escape(when), escape(" ".join(given)) or "–"])
    if not rows and not changes:
        return ""
    found = table("Options of each start", ("start", "other than in the YAML"), rows, "words")
    listed = "".join(f"<li>{escape(each)}</li>" for each in changes)
    return section("Hyperparameters", found + warning_list(listed))


def _environment(folder: Path) -> str:
    """Return a table of versions and machine."""
    facts = environment(folder).items()
    rows = [[name, escape(value)] for name, value in facts if value not in ("", "None")]
    found = table("Environment", ("fact", "value"), rows, "words")
    return section("Environment", found if rows else "")


def environment(folder: Path) -> dict[str, str]:
    """Return versions and machine of a run as texts; empty if they cannot be read."""
    known = json_files.read_mapping(folder, folder / "environment.json")
    return {name: _words(known[name]) for name in ENVIRONMENT if name in known}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _files(folder: Path) -> str:
    """Return the command, the settings and the environment, collapsed."""
    parts = ""
    for title, name in FILES:
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(MAX_CHARACTERS)
            parts += (
                f"<details><summary>{title} <small>{name}</small></summary>"
                f'<pre tabindex="0">{escape(text)}</pre></details>'
            )
    return parts
