"""The study as a page: `study.html`, complete in one file, beside `study.json` and `study.md`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from recipes.clipping_study.findings import Finding, Row
from recipes.clipping_study.strip import Plot, Strip, draw_strips
from recipes.clipping_study.table import markdown
from recipes.clipping_study.verdicts import KINDS, verdict
from trainer.loggers.files import as_json
from trainer.report.axis import number
from trainer.report.chart import Chart, Series, draw
from trainer.report.html import document, section, table, tiles

ARMS = {
    "recurrent": "{} steps", "warmup": "warm-up of {} steps", "speed": "{}", "spikes": "{}",
    "half": "{}", "scales": "{}",
}  # fmt: skip
MORE = """
blockquote { margin: 0 0 .6rem; padding: .1rem 1rem; border-left: 3px solid var(--c1); }
section > p { max-width: 60rem; margin: .4rem 0; } .soft { color: var(--soft); }
.charts + .wide { margin-top: 1rem; } .verdict { font-weight: 600; }
"""


def write_page(
    folder: Path, found: Sequence[Finding], trainings: int, seconds: float
) -> list[Path]:
    """Write the page, its rows as JSON, and as Markdown, into the run folder."""
    rows = {each.experiment.name: [asdict(row) for row in each.rows] for each in found}
    texts = {
        "study.html": render(found, trainings, seconds),
        "study.json": json.dumps(as_json(rows), indent=1),
        "study.md": markdown(found),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def render(found: Sequence[Finding], trainings: int, seconds: float) -> str:
    """The page as text."""
    sections = "".join(_section(number, each) for number, each in enumerate(found, 1))
    seeds = max((len(row.values) for each in found for row in each.rows), default=0)
    facts = (
        f"<p>{trainings:,} trainings in {seconds / 60:.1f} minutes of CPU; {seeds} seeds for each "
        f"row, none of which tuning had seen. Written {time.strftime('%Y-%m-%d %H:%M')}.</p>"
    )
    titles = [f"{number}. {each.experiment.title}" for number, each in enumerate(found, 1)]
    words = tiles(
        (title, verdict(each).word, "") for title, each in zip(titles, found, strict=True)
    )
    return document("Which clipping for which model", facts + words, sections, MORE)


def _section(place: int, found: Finding) -> str:
    experiment, said = found.experiment, verdict(found)
    facts = "".join(f"<p>{escape(fact)}</p>" for fact in said.facts)
    return section(
        f"{place}. {experiment.title}",
        f"<blockquote><p>Claim: {escape(experiment.claim)}</p></blockquote>"
        f'<p class="soft">{escape(experiment.definition)}</p>'
        f'<p class="verdict">{escape(_first_up(said.word))}.</p>{facts}'
        f'<div class="charts">{"".join(_figures(found))}</div>{_table(found)}',
    )


def _figures(found: Finding) -> list[str]:
    figures = []
    if found.experiment.name == "recurrent":
        figures.append(draw(_over_lengths(found)))
    if found.experiment.name == "warmup":
        return [draw(_over_rates(found, arm)) for arm in found.arms()]
    if found.experiment.name == "speed":
        return [draw(chart) for chart in _curves(found)] + list(map(draw_strips, _to_target(found)))
    return [*figures, *(draw_strips(plot) for plot in _strips(found))]


def _over_lengths(found: Finding) -> Chart:
    """Accuracy over the length, for the kinds that every length has."""
    chart = Chart("What is remembered, over the length", "steps", "mean accuracy", from_zero=True)
    common = [k for k in found.kinds() if all(found.of(arm, k) for arm in found.arms())]
    for colour, kind in enumerate(common):
        rows = [found.of(arm, kind)[0] for arm in found.arms()]
        lengths = [float(arm) for arm in found.arms()]
        chart.series.append(Series(KINDS[kind], lengths, [row.mean for row in rows], colour))
    ends = [float(found.arms()[0]), float(found.arms()[-1])]
    chart.series.append(Series("guessing", ends, [0.25, 0.25], style="limit"))
    return chart


def _over_rates(found: Finding, arm: str) -> Chart:
    """The loss at the end over the learning rate, a line for each limit."""
    chart = Chart(
        _first_up(_arm(found, arm)), "learning rate", "loss at the end (median)", counts=False
    )
    lines: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.arm == arm:
            limit = row.setting.get("limit")
            name = "no clipping" if limit is None else f"limit {limit:g}"
            lines.setdefault(name, []).append(row)
    for colour, (name, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row.setting["lr"])
        values = [row.median if math.isfinite(row.median) else math.nan for row in rows]
        chart.series.append(Series(name, [row.setting["lr"] for row in rows], values, colour))
    chart.note = "The median of all seeds."
    return chart


def _curves(found: Finding) -> list[Chart]:
    """Training losses, the mean over the seeds, for each model."""
    charts = []
    models = dict.fromkeys(arm.rpartition(", ")[0] for arm in found.arms())
    for model in models:
        chart = Chart(f"Training loss: {model}", "fiftieth of the training", "mean loss")
        for row in found.rows:
            arm, _, schedule = row.arm.rpartition(", ")
            if arm == model and row.curves[0]:
                number = min(map(len, row.curves))
                ys = [math.fsum(c[i] for c in row.curves) / len(row.curves) for i in range(number)]
                name = f"{KINDS[row.kind]}, {schedule}"
                xs = range(1, number + 1)
                chart.series.append(Series(name, xs, ys, len(chart.series)))
        charts.append(chart)
    return charts


def _to_target(found: Finding) -> list[Plot]:
    """Plot the steps that each training of a model needs to reach the target."""
    plots = []
    for model in dict.fromkeys(arm.rpartition(", ")[0] for arm in found.arms()):
        rows = [row for row in found.rows if row.arm.rpartition(", ")[0] == model]
        plot = Plot(f"Steps to the target: {model}", "steps")
        plot.note = f"A loss of {_number(rows[0].others['target'])}; failed: never reached it."
        for row in rows:
            name = f"{KINDS[row.kind]}, {row.arm.rpartition(', ')[2]}"
            missed = len(row.steps) - round(row.others["reached"])
            plot.rows.append(Strip(name, row.steps, missed))
        plots.append(plot)
    return plots


def _strips(found: Finding) -> list[Plot]:
    """A plot for each arm that has more than the usual kinds, or one a model."""
    experiment, plots = found.experiment, []
    most = max(len({row.kind for row in found.rows if row.arm == arm}) for arm in found.arms())
    for arm in found.arms():
        rows = [row for row in found.rows if row.arm == arm]
        if experiment.name == "recurrent" and len(rows) < most:
            continue
        label = "accuracy" if experiment.score == "accuracy" else "loss at the end"
        plot = Plot(_first_up(_arm(found, arm)), label, failed=experiment.failed)
        for row in rows:
            strip = Strip(KINDS[row.kind], row.values, row.failures)
            plot.rows.append(strip)
        plots.append(plot)
    return plots


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _arm(found: Finding, arm: str) -> str:
    return ARMS[found.experiment.name].format(arm)


HEADS = {
    "steps": "steps to target", "reached": "reached it", "clipped": "clipped",
    "caught": "spikes clipped", "disturbed": "others clipped", "hurt": "rise after a spike",
    "worst": "worst setting", "norm": "median norm", "norm_max": "largest norm",
    "overflowed": "overflows",
}  # fmt: skip


def _table(found: Finding) -> str:
    """All rows: what was chosen, and what it gave."""
    known = found.rows[0].others
    extra = [name for name in HEADS if name in known]
    if "caught" in extra:
        extra.remove("clipped")
    if not any(row.others.get("overflowed") for row in found.rows):
        extra = [name for name in extra if name != "overflowed"]
    head = ["condition", "clipping", "setting", found.experiment.score, "±", "failed"]
    rows = (_cells(found, row, extra) for row in found.rows)
    return table(f"Results of {found.experiment.title}", [*head, *(HEADS[e] for e in extra)], rows)


def _cells(found: Finding, row: Row, extra: Sequence[str]) -> list[str]:
    setting = ", ".join(f"{name} {value:g}" for name, value in row.setting.items())
    values = [
        KINDS[row.kind], setting, _number(row.mean), _number(row.spread),
        f"{row.failures} of {len(row.values)}",
    ]  # fmt: skip
    for name in extra:
        value = row.others[name]
        share = name in ("clipped", "caught", "disturbed")
        values.append(f"{100 * value:.0f} %" if share else _number(value))
    return [escape(value) for value in (_arm(found, row.arm), *values)]


def _number(value: float) -> str:
    return number(float(f"{value:.3g}")) if math.isfinite(value) else "–"
