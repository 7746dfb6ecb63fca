"""Line charts as inline SVG with a legend in HTML.

They need no script; with that of `html` they show values under the pointer. Colours come from the
page's style sheet (`.c0` … `.c6`), for light and dark pages; no meaning depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from trainer.report.axis import Axis, count, number
from trainer.report.html import escape

WIDTH, HEIGHT = 640.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 70.0, 14.0, 10.0, 44.0  # Margins for ticks and labels.
COLOURS = 7
BUCKETS = 340  # A chart is about 600 pixels wide, which cannot show more points.
MAX_MARKERS = 40  # Points that get markers with their values.
MIN_SMOOTHED = 100  # Points of a noisy line that gets a running mean.

Point = tuple[float, float]
VALUE = itemgetter(1)


@dataclass(slots=True)
class Series:
    """A line of a chart."""

    name: str  # Name in the legend.
    xs: Sequence[float]  # Places on the x axis, ascending.
    ys: Sequence[float]  # Values; NaN is a gap.
    colour: int = 0  # Number of the colour, from 0, modulo their number.
    style: str = "solid"  # "solid", "faint", or "limit", which is dashed.
    noisy: bool = False  # Draw a running mean over a line of many points.
    clock: int = 0  # Number of the run, for the script to find its training times.


@dataclass(slots=True)
class Event:
    """An event at a place on the x axis."""

    x: float
    text: str
    kind: str  # "skipped" or "overflowed"
    link: str = ""  # Link within the page, such as "#step-120".


@dataclass(slots=True)
class Chart:
    """Lines over common axes."""

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    from_zero: bool = False  # Begin the y axis at 0; else it may be logarithmic.
    note: str = ""  # A sentence under the heading.
    counts: bool = True  # x is a number of steps or epochs: a linear axis with whole ticks.
    marks: dict[str, float] = field(default_factory=dict)  # Vertical lines by name.
    events: list[Event] = field(default_factory=list)
    valued: bool = True  # Show last, lowest and highest values in the legend.
    timed: bool = False  # Allow the script to draw it over training time, by `Series.clock`.


def decimate(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most `3 * BUCKETS` of the points, with every peak, dip and gap.

    Each of `BUCKETS` parts keeps its lowest and highest point and one gap, in order.
    """
    if len(points) <= 3 * BUCKETS:
        return points
    kept: list[Point] = []
    for n in range(BUCKETS):
        part = points[n * len(points) // BUCKETS : (n + 1) * len(points) // BUCKETS]
        known = [point for point in part if not math.isnan(point[1])]
        chosen = {min(known, key=VALUE), max(known, key=VALUE)} if known else set()
        if len(known) < len(part):
            chosen.add(next(point for point in part if math.isnan(point[1])))
        kept += sorted(chosen, key=itemgetter(0))
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Return the mean over a fiftieth of the points, around each point; gaps stay gaps."""
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


def draw(chart: Chart) -> str:
    """Return a chart as an HTML figure: heading, drawing and legend."""
    values = [y for each in chart.series for y in each.ys if math.isfinite(y)]
    places = [end for each in chart.series for end in (*each.xs[:1], *each.xs[-1:])]
    x = Axis([*places, *chart.marks.values()], (LEFT, WIDTH - RIGHT), whole=chart.counts)
    y = Axis(values, (HEIGHT - BOTTOM, TOP), from_zero=chart.from_zero)
    parts = [(each.clock, _line(each, x, y, chart.x_label)) for each in chart.series]
    for name, place in chart.marks.items():
        path = f"M{x.at(place):.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"
        title = f"<title>{escape(name)}</title>"
        parts.append((0, f'<path class="line limit" d="{path}">{title}</path>'))
    parts += [(0, _event(each, x)) for each in chart.events]
    lines = "".join(
        f'<g class="series" data-clock="{clock}">{part}</g>' for clock, part in parts if part
    )
    facts = []  # For screen readers.
    for each in chart.series:
        ends = " to ".join(number(y) for _, y in _ends(each))
        known = f"from {ends}, last {_last(each)}" if ends else "has no value"
        facts.append(f"{each.name} {known}")
    label = f"{chart.title}. {chart.y_label} by {chart.x_label}. {'; '.join(facts)}"
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3>{note}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" {_scales(x, y, chart)}'
        f'aria-label="{escape(label)}">'
        f"{_frame(x, y, chart)}{lines}</svg>{_legend(chart)}</figure>"
    )


def _event(event: Event, x: Axis) -> str:
    """Return a short mark on the axis, with a link to its report if any."""
    at = x.at(event.x)
    if not LEFT - 1 <= at <= WIDTH - RIGHT + 1:
        return ""
    mark = (
        f'<path class="line event {event.kind}" d="M{at:.1f} {HEIGHT - BOTTOM - 2:.1f}v-12">'
        f"<title>{escape(event.text)}</title></path>"
    )
    label = escape(f"report: {event.text}")
    return f'<a href="{event.link}" aria-label="{label}">{mark}</a>' if event.link else mark


def _scales(x: Axis, y: Axis, chart: Chart) -> str:
    """Return the attributes that map pixels to values for the script."""
    ends = " ".join(
        f"{end!r}" for axis in (x, y) for end in (axis.low, axis.high, axis.start, axis.end)
    )
    timed = 'data-timed="" ' * chart.timed
    return f'data-scales="{ends} {int(x.log)} {int(y.log)}" {timed}'


def _ends(series: Series) -> list[Point]:
    """Return the lowest and the highest point; empty for a series without values."""
    points = zip(series.xs, series.ys, strict=True)
    known = [point for point in points if math.isfinite(point[1])]
    return [find(known, key=VALUE) for find in (min, max)] if known else []


def _last(series: Series) -> str:
    return number(series.ys[-1]) if math.isfinite(series.ys[-1]) else "lost"


def _frame(x: Axis, y: Axis, chart: Chart) -> str:
    """Return grid, ticks and labels."""
    parts, floor = [], HEIGHT - BOTTOM
    for value, text in y.ticks(5):
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8:g}" y="{at + 4:.1f}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT:g} {floor:g}H{WIDTH - RIGHT:g}"/>')
    parts.append('<g class="x">')
    for value, text in x.ticks(7):
        at = x.at(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {floor:g}v5"/>')
        parts.append(f'<text class="tick mid" x="{at:.1f}" y="{floor + 18:g}">{text}</text>')
    parts.append("</g>")
    across = f'class="mid across" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 6:g}"'
    up = f'class="mid up" transform="translate(14 {(TOP + floor) / 2:g}) rotate(-90)"'
    for axis, text, place in ((x, chart.x_label, across), (y, chart.y_label, up)):
        scale = ", log scale" if axis.log else ""
        parts.append(f"<text {place}>{escape(text + scale)}</text>")
    return "".join(parts)


def _line(series: Series, x: Axis, y: Axis, x_label: str) -> str:
    """Return a line, its running mean if noisy, and markers if it has few points."""
    points = list(zip(series.xs, series.ys, strict=True))
    text, style = "", _style(series)
    if series.noisy and len(points) >= MIN_SMOOTHED:
        text = f'<path class="line faint {style}" d="{_path(decimate(points), x, y)}"/>'
        points = running_mean(points)
    text += f'<path class="line {style}" d="{_path(decimate(points), x, y)}"/>'
    if len(points) <= MAX_MARKERS and series.style == "solid":
        text += "".join(_marker(series, point, x, y, x_label) for point in points)
    return text


def _style(series: Series) -> str:
    if series.style == "limit":
        return "limit"
    return f"{'faint ' * (series.style == 'faint')}c{series.colour % COLOURS}"


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
    corner = 0 if series.colour % 2 else 4  # A square or a disc, to tell lines apart by shape, too.
    return (
        f'<rect class="mark c{series.colour % COLOURS}" x="{across - 3.5:.1f}" y="{up - 3.5:.1f}" '
        f'width="7" height="7" rx="{corner}"><title>{title}</title></rect>'
    )


def _legend(chart: Chart) -> str:
    """Return the names of the lines with their last, lowest and highest values."""
    heads, rows = ["last"] * chart.valued, []
    for each in chart.series:
        ends = _ends(each)
        cells = [_last(each) if ends else "–"] * chart.valued
        # The last value of a constant is enough.
        if chart.valued and ends and ends[0][1] < ends[1][1]:
            heads = ["last", "lowest", "highest"]
            for x, y in ends:
                place = count(x) if chart.counts else number(x)
                cells.append(f"{number(y)} <small>at {place}</small>")
        rows.append((each.name, _style(each), "M2 6H26", cells))
    rows += [(name, "limit", "M14 0V12", [number(x)]) for name, x in chart.marks.items()]
    body = ""
    for name, style, path, cells in rows:
        swatch = (
            '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">'
            f'<path class="line {style}" d="{path}"/></svg>'
        )
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{swatch}{escape(name)}</th>{values}</tr>'
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f'<table class="legend">{head}<tbody>{body}</tbody></table>'
