"""Strip plots as inline SVG: a dot for every training, so that spread and failures are seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from trainer.report.axis import Axis, number

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640.0, 170.0, 92.0, 8.0, 44.0
HIGH = 24.0  # of a row


@dataclass
class Strip:
    """A row of dots with its name; values that are not finite are trainings that were given up."""

    name: str
    values: Sequence[float]
    failures: int = 0
    colour: int = 0


@dataclass
class Plot:
    """Rows over a common axis; ``failed`` is the value from which on a training has failed."""

    title: str
    label: str
    rows: list[Strip] = field(default_factory=list)
    failed: float = math.nan
    note: str = ""


def draw_strips(plot: Plot) -> str:
    """A figure: heading, and a line of dots for each row, its mean as an upright stroke."""
    finite = [value for row in plot.rows for value in row.values if math.isfinite(value)]
    shown = [*finite, *([plot.failed] if math.isfinite(plot.failed) else [])]
    height = TOP + HIGH * len(plot.rows) + BOTTOM
    axis = Axis(shown, (LEFT, WIDTH - RIGHT))
    floor = height - BOTTOM
    parts = [_frame(axis, plot, floor)]
    for place, row in enumerate(plot.rows):
        parts.append(_row(row, axis, TOP + HIGH * (place + 0.5)))
    label = escape(f"{plot.title}. {'; '.join(_said(row) for row in plot.rows)}")
    note = f"<p>{escape(plot.note)}</p>" if plot.note else ""
    return (
        f"<figure><figcaption><h3>{escape(plot.title)}</h3>{note}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _frame(axis: Axis, plot: Plot, floor: float) -> str:
    parts = []
    for value, text in axis.ticks(5):
        at = axis.at(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP:g}V{floor:g}"/>')
        parts.append(f'<text class="tick mid" x="{at:.1f}" y="{floor + 18:g}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT:g} {floor:g}H{WIDTH - RIGHT:g}"/>')
    if math.isfinite(plot.failed):
        at = axis.at(plot.failed)
        parts.append(f'<path class="line limit" d="M{at:.1f} {TOP:g}V{floor:g}"/>')
    text = escape(f"{plot.label}{', log scale' if axis.log else ''}")
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle:g}" y="{floor + 38:g}">{text}</text>')
    failed = f'<text class="tick" x="{WIDTH - RIGHT + 14:g}" y="{floor + 18:g}">failed</text>'
    return "".join(parts) + failed


def _row(row: Strip, axis: Axis, at: float) -> str:
    finite = [value for value in row.values if math.isfinite(value)]
    parts = [
        f'<text class="end" x="{LEFT - 10:g}" y="{at + 4.5:.1f}">{escape(row.name)}</text>',
        f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>',
    ]
    for value in finite:
        said = escape(f"{row.name}: {number(value)}")
        parts.append(
            f'<circle class="mark c{row.colour}" cx="{axis.at(value):.1f}" cy="{at:.1f}" r="4">'
            f"<title>{said}</title></circle>"
        )
    if finite:
        mean = axis.at(math.fsum(finite) / len(finite))
        parts.append(f'<path class="line c{row.colour}" d="M{mean:.1f} {at - 9:.1f}v18"/>')
    if row.failures:
        text = f"{row.failures} of {len(row.values)}"
        parts.append(f'<text x="{WIDTH - RIGHT + 14:g}" y="{at + 4.5:.1f}">{text}</text>')
    return "".join(parts)


def _said(row: Strip) -> str:
    finite = [value for value in row.values if math.isfinite(value)]
    ends = f"{number(min(finite))} to {number(max(finite))}" if finite else "none finished"
    return f"{row.name}: {ends}, {row.failures} of {len(row.values)} failed"
