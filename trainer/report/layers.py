"""Gradients and updates of the layers of a model, in a run's report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from html import escape

from trainer.report.axis import Axis, count, number
from trainer.report.chart import Chart, Series
from trainer.report.history import Curve, History

STEP = "optimizer step"
MAX_ROWS = 300
MAX_POINTS = 40  # Points of a small drawing in a row.
WIDTH, HEIGHT = 96.0, 22.0


def layer_charts(history: History) -> list[Chart]:
    """Return charts of the largest, the median and the smallest value of all layers."""
    charts = []
    for title, key, label in (
        ("Gradient norm by layer", "grad", "L2 norm before clipping"),
        ("Update by layer", "ratio", "norm of update / norm of weights"),
    ):
        by_step: dict[float, list[float]] = {}
        for curves in history.layers.values():
            for step, value in curves.get(key, Curve()).known():
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        kinds: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
            ("largest", max),
            ("median", statistics.median),
            ("smallest", min),
        )
        chart = Chart(title, STEP, label)
        if len(history.layers) > 1:
            for colour, (name, reduce) in enumerate(kinds):
                values = [reduce(by_step[step]) for step in steps]
                chart.series.append(Series(name, steps, values, colour))
        charts.append(chart)
    return charts


def layer_table(history: History) -> str:
    """Return a section with a row for each layer: the last values and their history."""
    if not history.layers:
        return ""
    heads = ("layer", "gradient", "", "weight", "update / weight", "", "lowest", "highest")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(_row(name, history.layers[name]) for name in list(history.layers)[:MAX_ROWS])
    more = len(history.layers) - MAX_ROWS
    note = f"<p>{count(more)} more layers are in metrics.jsonl.</p>" if more > 0 else ""
    return (
        '<section><h2>Layers</h2><div class="wide tall" tabindex="0" role="region" '
        f'aria-label="Layers"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{note}</section>\n"
    )


def _row(name: str, curves: dict[str, Curve]) -> str:
    grad, weight, ratio = (curves.get(key, Curve()) for key in ("grad", "weight", "ratio"))
    ends = [value for _, value in ratio.known()]
    cells = (
        _last(grad), _spark(grad, f"gradient of {name}"), _last(weight), _last(ratio),
        _spark(ratio, f"update of {name}"),
        number(min(ends)) if ends else "–", number(max(ends)) if ends else "–",
    )  # fmt: skip
    return (
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _last(curve: Curve) -> str:
    known = curve.known()
    return number(known[-1][1]) if known else "–"


def _spark(curve: Curve, name: str) -> str:
    """Return a drawing of the size of a word."""
    known = curve.known()
    known = known[:: max(1, math.ceil(len(known) / MAX_POINTS))]
    if len(known) < 2:
        return ""
    x = Axis([known[0][0], known[-1][0]], (2.0, WIDTH - 2.0), whole=True)
    y = Axis([value for _, value in known], (HEIGHT - 2.0, 2.0))
    points = [(x.at(step), y.at(value)) for step, value in known]
    path = "L".join(f"{a:.0f} {b:.1f}" for a, b in points if not math.isnan(b))
    return (
        f'<svg class="spark" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(name, quote=True)}"><path class="line c0" d="M{path}"/></svg>'
    )


def warning_list(history: History) -> str:
    """Return a section with the warnings of the monitors, in their order."""
    if not history.warnings:
        return ""
    items = "".join(
        f"<li><strong>Step {count(step)}</strong>: {escape(text)}.</li>"
        for step, text in history.warnings
    )
    return f'<section><h2>Warnings</h2><ul class="warnings">{items}</ul></section>\n'
