"""Line charts as inline SVG with a legend in HTML.

They need no script. Colours come from the page's style sheet (`.c0` … `.c6`), so that a chart fits
light and dark; no colour carries meaning alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from trainer.report.axis import Axis, count, number

WIDTH, HEIGHT = 640.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 70.0, 14.0, 10.0, 44.0  # Margins for ticks and labels.
COLOURS = 7
BUCKETS = 340  # A chart is about 600 pixels wide: more points cannot be told apart.
MAX_MARKERS = 40  # Up to so many points each have a marker with its value.
MIN_SMOOTHED = 100  # From so many points on, a noisy line has a running mean over it.

Point = tuple[float, float]


@dataclass(slots=True)
class Series:
    """A line of a chart.

    Args:
        name: its name in the legend.
        xs: places on the x axis, ascending.
        ys: values; NaN is a gap.
        colour: number of the colour, counted round from 0.
        style: "solid", "faint" or "limit" (dashed).
        noisy: draw a running mean over the line where it has many points.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    style: str = "solid"
    noisy: bool = False


@dataclass(slots=True)
class Chart:
    """Lines over common axes.

    Args:
        title: heading.
        x_label: label of the x axis.
        y_label: label of the y axis.
        series: the lines.
        from_zero: let the y axis begin at 0; otherwise it may be logarithmic.
        note: a sentence under the heading.
        counts: x is a number of steps or epochs: a linear axis with whole ticks.
        marks: named places on the x axis, each with an upright line.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    from_zero: bool = False
    note: str = ""
    counts: bool = True
    marks: dict[str, float] = field(default_factory=dict)


def decimate(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most about a thousand of the points, with every peak, dip and gap.

    Each of `BUCKETS` parts keeps its lowest and its highest point and one gap, in their order.
    """
    if len(points) <= 3 * BUCKETS:
        return points
    kept: list[Point] = []
    for n in range(BUCKETS):
        part = points[n * len(points) // BUCKETS : (n + 1) * len(points) // BUCKETS]
        known = [point for point in part if not math.isnan(point[1])]
        chosen = {min(known, key=_y), max(known, key=_y)} if known else set()
        if len(known) < len(part):
            chosen.add(next(point for point in part if math.isnan(point[1])))
        kept += sorted(chosen, key=_x)
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Return the mean over a fiftieth of the points around each; gaps stay gaps."""
    reach = max(1, len(points) // 100)
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (0.0 if math.isnan(y) else y))
        counts.append(counts[-1] + (not math.isnan(y)))
    mean = []
    for n, (x, y) in enumerate(points):
        low, high = max(0, n - reach), min(len(points), n + reach + 1)
        value = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        mean.append((x, math.nan if math.isnan(y) else value))
    return mean


def _x(point: Point) -> float:
    return point[0]


def _y(point: Point) -> float:
    return point[1]


def draw(chart: Chart) -> str:
    """Return a chart as an HTML figure: heading, drawing and legend."""
    values = [y for each in chart.series for y in each.ys if math.isfinite(y)]
    places = [end for each in chart.series for end in (*each.xs[:1], *each.xs[-1:])]
    x = Axis([*places, *chart.marks.values()], (LEFT, WIDTH - RIGHT), whole=chart.counts)
    y = Axis(values, (HEIGHT - BOTTOM, TOP), from_zero=chart.from_zero)
    summary = "; ".join(_facts(each) for each in chart.series)
    label = escape(f"{chart.title}. {chart.y_label} by {chart.x_label}. {summary}", quote=True)
    lines = "".join(_line(each, x, y, chart.x_label) for each in chart.series)
    lines += "".join(_mark(name, x.at(place)) for name, place in chart.marks.items())
    x_label, y_label = (
        f"{text}, log scale" if axis.log else text
        for axis, text in ((x, chart.x_label), (y, chart.y_label))
    )
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3>{note}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">'
        f"{_frame(x, y, x_label, y_label)}{lines}</svg>{_legend(chart)}</figure>"
    )


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Return grid, ticks and labels."""
    parts = []
    for value, text in y.ticks(5):
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8:g}" y="{at + 4:.1f}">{text}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT:g} {floor:g}H{WIDTH - RIGHT:g}"/>')
    for value, text in x.ticks(7):
        at = x.at(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {floor:g}v5"/>')
        parts.append(f'<text class="tick mid" x="{at:.1f}" y="{floor + 18:g}">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle:g}" y="{HEIGHT - 6:g}">{escape(x_label)}</text>')
    middle = (TOP + floor) / 2
    place = f'transform="translate(14 {middle:g}) rotate(-90)"'
    parts.append(f'<text class="mid" {place}>{escape(y_label)}</text>')
    return "".join(parts)


def _line(series: Series, x: Axis, y: Axis, x_label: str) -> str:
    points = list(zip(series.xs, series.ys, strict=True))
    colour = f"c{series.colour % COLOURS}" if series.style != "limit" else "limit"
    faint = series.style == "faint"
    text = ""
    if series.noisy and len(points) >= MIN_SMOOTHED:
        text = f'<path class="line faint {colour}" d="{_path(decimate(points), x, y)}"/>'
        points = running_mean(points)
    style = "line faint" if faint else "line"
    text += f'<path class="{style} {colour}" d="{_path(decimate(points), x, y)}"/>'
    if len(points) <= MAX_MARKERS and series.style == "solid":
        text += "".join(_marker(series, point, x, y, x_label) for point in points)
    return text


def _mark(name: str, at: float) -> str:
    path = f"M{at:.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"
    return f'<path class="line limit" d="{path}"><title>{escape(name)}</title></path>'


def _path(points: Iterable[Point], x: Axis, y: Axis) -> str:
    """Return the path data of a line, broken at every gap; a point between gaps is a dot."""
    parts, drawing = [], False
    for place, value in points:
        across, up = x.at(place), y.at(value)
        if math.isnan(up):
            drawing = False
            continue
        parts.append(f"L{across:.1f} {up:.1f}" if drawing else f"M{across:.1f} {up:.1f}h0")
        drawing = True
    return "".join(parts)


def _marker(series: Series, point: Point, x: Axis, y: Axis, x_label: str) -> str:
    across, up = x.at(point[0]), y.at(point[1])
    if math.isnan(up):
        return ""
    title = escape(f"{series.name}, {x_label} {number(point[0])}: {number(point[1])}")
    corner = 0 if series.colour % 2 else 4  # A square or a disc: the shape tells lines apart, too.
    return (
        f'<rect class="mark c{series.colour % COLOURS}" x="{across - 3.5:.1f}" y="{up - 3.5:.1f}" '
        f'width="7" height="7" rx="{corner}"><title>{title}</title></rect>'
    )


def _extremes(series: Series) -> tuple[str, Point, Point] | None:
    """Return the last value and the lowest and highest point; None where no value is known."""
    known = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)]
    if not known:
        return None
    last = series.ys[-1]
    return number(last) if math.isfinite(last) else "lost", min(known, key=_y), max(known, key=_y)


def _facts(series: Series) -> str:
    """Return the extremes in words, for readers who do not see the drawing."""
    extremes = _extremes(series)
    if extremes is None:
        return f"{series.name} has no value"
    last, low, high = extremes
    return f"{series.name} from {number(low[1])} to {number(high[1])}, last {last}"


def _legend(chart: Chart) -> str:
    """Return the names of the lines with their last, lowest and highest values."""
    rows, heads = [], ["last"]
    for each in chart.series:
        colour = "limit" if each.style == "limit" else f"c{each.colour % COLOURS}"
        faint = " faint" if each.style == "faint" else ""
        swatch = (
            '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">'
            f'<path class="line {colour}{faint}" d="M2 6H26"/></svg>'
        )
        last, *ends = _extremes(each) or ("–",)
        cells = ""
        if len({value for _, value in ends}) > 1:  # The last value of a constant is enough.
            heads = ["last", "lowest", "highest"]
            cells = "".join(
                f"<td>{number(y)} <small>at {count(x) if chart.counts else number(x)}</small></td>"
                for x, y in ends
            )
        name = f'<th scope="row">{swatch}{escape(each.name)}</th>'
        rows.append(f"<tr>{name}<td>{last}</td>{cells}</tr>")
    for text, value in chart.marks.items():
        swatch = (
            '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">'
            '<path class="line limit" d="M14 0V12"/></svg>'
        )
        rows.append(f'<tr><th scope="row">{swatch}{escape(text)}</th><td>{number(value)}</td></tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<table class="legend"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
