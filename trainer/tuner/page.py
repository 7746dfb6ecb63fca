"""What a search found, as a page to look at and a JSON to compute with."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.axis import number
from trainer.report.chart import Chart, Series, draw
from trainer.report.style import STYLE
from trainer.tuner.course import Course
from trainer.tuner.limit import MEASURES, Advice
from trainer.tuner.rate import Suggestion

TITLES = {"find_clip": "Clip limit", "find_lr": "Learning rate"}


def write_findings(
    folder: Path, findings: Mapping[str, Mapping[str, Any]], notes: Sequence[str], steps: int
) -> list[Path]:
    """Write ``find_clip.html``/``.json`` and ``find_lr.html``/``.json`` into the run folder.

    An OSError with a sentence where the folder cannot be written.
    """
    written = []
    for kind, found in findings.items():
        records = {name: each.record() for name, each in found.items()}
        texts = {
            f"{kind}.json": json.dumps({"steps": steps, "optimizers": records}, allow_nan=False),
            f"{kind}.html": render(folder, kind, found, notes),
        }
        for name, text in texts.items():
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"what was found could not be written ({error.strerror}); "
                    "free some space or choose another --output_folder",
                    str(path),
                ) from error
            written.append(path)
    return written


def render(folder: Path, kind: str, found: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The page as text."""
    title = f"{TITLES[kind]} of {escape(' / '.join(folder.resolve().parts[-3:]).lstrip('/ '))}"
    parts = []
    for name, each in found.items():
        charts = _charts(each)
        drawn = "".join(draw(chart) for chart in charts)
        table = _table(each) if isinstance(each, Advice) else ""
        parts.append(
            f"<section><h2>{escape(name)}</h2><p>{escape(each.sentence())}</p>"
            f'<div class="charts">{drawn}</div>{table}</section>\n'
        )
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f"<header><h1>{title}</h1><p>Written {time.strftime('%Y-%m-%d %H:%M')}.</p>"
        f"{_tiles(found)}</header>\n<main>{''.join(parts)}"
        f"<section><h2>How to read it</h2>{said}</section></main></body></html>\n"
    )


def _tiles(found: Mapping[str, Any]) -> str:
    cells = []
    for name, each in found.items():
        value = "–" if each.setting() is None else f"{each.setting():g}"
        label = "limit" if isinstance(each, Advice) else "learning rate"
        cells.append(f"<li><span>{label} of {escape(name)}</span><strong>{value}</strong></li>")
    return f'<ul class="tiles">{"".join(cells)}</ul>'


def _charts(found: Advice | Suggestion) -> list[Chart]:
    return _of_rate(found) if isinstance(found, Suggestion) else _of_limit(found)


def _of_rate(found: Suggestion) -> list[Chart]:
    """What the loss did as the rate rose."""
    chart = Chart(
        "Loss against that of the model at rest", "learning rate", "change of the loss",
        [Series("change, smoothed", found.rates, _cut(found.change))], counts=False,
        note=found.reason,
    )  # fmt: skip
    places = {"suggested": found.rate, "lowest": found.lowest, "lost": found.diverged}
    chart.marks = {name: value for name, value in places.items() if value is not None}
    raw = Chart("Loss of each step", "learning rate", "loss", counts=False)
    raw.series = [
        Series("training", found.rates, _cut(found.losses)),
        Series("the same batches at rest", found.rates, found.still, 6, "faint"),
    ]
    return [chart, raw]


def _cut(values: Sequence[float]) -> list[float]:
    """Values up to where they leave the picture: the way down is what one wants to see."""
    start = values[: max(1, len(values) // 4)]
    low, high = min(values, default=0.0), max(start, default=0.0)
    top = high + max(high - low, abs(high) * 0.01)
    return [value if value <= top else math.nan for value in values]


def _of_limit(found: Advice) -> list[Chart]:
    """The trials' ends over their limits, some of their losses, and the norms without clipping."""
    finite = [each for each in found.courses if each.setting < math.inf]
    free = next(each for each in found.courses if each.setting == math.inf)
    limits = [each.setting for each in finite]
    ends = Chart("Loss at the end of a trial", "clip limit", "mean loss of the last quarter")
    ends.counts = False
    ends.series = [Series("clipped", limits, [_known(each.end) for each in finite])]
    if math.isfinite(free.end) and limits:
        ends.series.append(
            Series("no clipping", [limits[0], limits[-1]], [free.end] * 2, style="limit")
        )
    ends.note = "A trial that failed is a gap." if any(math.isinf(e.end) for e in finite) else ""
    ends.marks = {} if found.limit is None else {"recommended": found.limit}
    norms = Chart("Gradients without clipping", "step of the trial", MEASURES[found.kind])
    norms.series = [Series("as they are", range(1, len(free.norms) + 1), free.norms, noisy=True)]
    if found.limit is not None and free.norms:
        norms.series.append(
            Series("recommended", [1, len(free.norms)], [found.limit] * 2, style="limit")
        )
    return [ends, _losses(found, free), norms]


def _losses(found: Advice, free: Course) -> Chart:
    """The losses of a few trials: of the best, of those at the ends, and without clipping."""
    chart = Chart("Losses of some trials", "step of the trial", "loss")
    finite = [each for each in found.courses if each.setting < math.inf]
    best = min(finite, key=lambda each: (each.skipped, each.end))
    wanted = [finite[0], best, finite[-1], free]
    wanted += [each for each in finite if each.setting == found.limit]
    for course in sorted({each.setting: each for each in wanted}.values(), key=lambda c: c.setting):
        name = "no clipping" if math.isinf(course.setting) else f"limit {course.setting:g}"
        steps = range(1, len(course.losses) + 1)
        colour = 6 if course is free else len(chart.series)
        chart.series.append(Series(name, steps, _cut(course.losses), colour, noisy=True))
    return chart


def _known(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _table(found: Advice) -> str:
    """All trials, by limit."""
    rows = []
    for each in found.courses:
        limit = "none" if math.isinf(each.setting) else f"{each.setting:g}"
        good = "yes" if each.setting in found.good or (
            math.isinf(each.setting) and not found.needed and found.good
        ) else ""  # fmt: skip
        end = "failed" if math.isinf(each.end) else number(each.end)
        cells = (end, f"{100 * each.share:.0f} %", f"{each.skipped}", f"{each.steps}", good)
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{limit}</th>{row}</tr>')
    names = ("limit", "loss at the end", "clipped", "not finite", "steps", "as good as the best")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    percents = " · ".join(f"{p} %: {number(value)}" for p, value in found.percentiles.items())
    return (
        f"<h3>Trials</h3><p>Percentiles of the {MEASURES[found.kind]} without clipping: "
        f"{percents}</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Trials"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
