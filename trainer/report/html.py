"""Parts of a page that is complete in one HTML file: no network, light and dark.

Its only script is `script.js`, which a page does without: it shows values where a chart is pointed
at, hides lines by their legend, and draws charts over time. The page's policy lets nothing else run
and nothing be fetched, whatever is in the texts.

The light colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart,
darkened where a thin line on white needs it; each has a contrast of at least 3:1 to its background.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape as _escape
from importlib.resources import files

SCRIPT = files("trainer.report").joinpath("script.js").read_text(encoding="utf-8")
HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{HASH}'; style-src 'unsafe-inline'; "
    "img-src data:; media-src data:"
)

# Characters that reorder the text around them, or that HTML cannot hold.
UNSEEN = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)


def escape(text: str, quote: bool = True) -> str:
    """Return a text as HTML that shows it and changes nothing around it."""
    return _escape(text.translate(UNSEEN), quote)


def document(title: str, header: str, main: str, style: str = "") -> str:
    """Return a page.

    Args:
        title: text of the title and the first heading.
        header: HTML below that heading.
        main: HTML of the content.
        style: style sheet in addition to `STYLE`.
    """
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}{style}</style></head><body>\n"
        f"<header><h1>{title}</h1>{header}{_contents(main)}</header>\n<main>{main}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section with a heading; nothing where the content, which is HTML, is empty."""
    if not content:
        return ""
    name = re.sub(r"\W+", "-", title.lower())
    return f'<section id="section-{name}"><h2>{escape(title)}</h2>{content}</section>\n'


def _contents(main: str) -> str:
    """Return links to the sections of a page."""
    links = re.findall(r'<section id="([^"]*)"><h2>(.*?)</h2>', main)
    items = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>' if items else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Return tiles, each with a name, a value in large letters, and a note, which may be empty."""
    items = "".join(
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        + (f"<small>{escape(note)}</small></li>" if note else "</li>")
        for name, value, note in facts
    )
    return f'<ul class="tiles">{items}</ul>' if items else ""


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table as HTML, which scrolls sideways where it is too wide.

    Args:
        label: name of the table for screen readers.
        heads: heading of each column, as text.
        rows: cells of each row, as HTML; the first one is the heading of the row.
        kind: classes of the style sheet: "tall" limits the height and lets row headings wrap,
            "words" is for text, which wraps in every cell.
    """
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="{f"wide {kind}".strip()}" tabindex="0" role="region" '
        f'aria-label="{escape(label, quote=True)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


STYLE = """
:root { --back: #ffffff; --card: #ffffff; --text: #1c1e21; --soft: #5c636b; --line: #d9dde2;
  --grid: #e8ebee; --tint: #f5f6f8; --c0: #0072b2; --c1: #c94f00; --c2: #00805f; --c3: #b0489a;
  --c4: #8f6400; --c5: #3f8fd2; --c6: #6a6a6a; --limit: #5c636b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1b1f23; --text: #e7e9ec; --soft: #a2aab3; --line: #343a41;
    --grid: #2a3036; --tint: #22272c; --c0: #56b4e9; --c1: #ff9248; --c2: #3ccfa0; --c3: #e69fd6;
    --c4: #f0c94a; --c5: #9db8ff; --c6: #b9bec4; --limit: #a2aab3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 3rem; max-width: 90rem;
  background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
p, li, small { overflow-wrap: anywhere; }
header > p { margin: .3rem 0 0; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0;
  padding: 0; list-style: none; }
.tiles li { min-width: 8.5rem; padding: .6rem .9rem; border-radius: .5rem;
  background: var(--tint); }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: .82rem; }
.tiles strong { display: block; font-size: 1.55rem; line-height: 1.3; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1rem 0 0; padding: 0;
  list-style: none; font-size: .9rem; }
.charts, .samples { display: grid; gap: 1rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); }
.samples.full { grid-template-columns: minmax(0, 1fr); } .sample:has(table) { grid-column: 1 / -1; }
figure { margin: 0; padding: .9rem 1rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); }
figcaption p { margin: 0; color: var(--soft); font-size: .85rem; }
figure > svg { display: block; width: 100%; height: auto; margin-top: .5rem; overflow: visible; }
svg text { fill: var(--soft); font: 13px system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans",
  sans-serif; font-variant-numeric: tabular-nums; }
.mid { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1.25; opacity: .4; }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 5; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.c6 { stroke: var(--c6); }
.mark { fill: var(--card); stroke-width: 2; }
/* A shadow at an edge shows that the table goes on there; it scrolls away with the content. */
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background:
  linear-gradient(to right, var(--back) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--back) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--limit), transparent) left / .5rem 100% no-repeat scroll,
  linear-gradient(to left, var(--limit), transparent) right / .5rem 100% no-repeat scroll; }
.tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; white-space: normal; }
.tall tbody th { min-width: 12rem; white-space: normal; overflow-wrap: anywhere; }
.spark { width: 96px; height: 22px; vertical-align: middle; }
.spark .line { stroke-width: 1.5; }
.warnings { margin: 0; padding: .6rem 1rem .6rem 2rem; border-left: 4px solid var(--c1);
  border-radius: .25rem; background: var(--tint); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; white-space: nowrap; }
th, td { padding: .35rem .8rem; text-align: right; }
th:first-child { text-align: left; }
thead th { border-bottom: 1px solid var(--line); background: var(--tint); color: var(--soft);
  font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody th { font-weight: 600; }
.legend { margin-top: .5rem; color: var(--soft); font-size: .85rem; }
.legend th, .legend td { padding: .1rem 0 .1rem .75rem; border: 0; background: none; }
.legend tbody th { padding-left: 0; color: var(--text); }
.legend thead th { font-weight: 400; }
.legend td { color: var(--text); white-space: normal; }
.legend small { color: var(--soft); }
.swatch { width: 28px; height: 12px; margin-right: .5rem; vertical-align: -1px; }
details { margin-top: .5rem; border: 1px solid var(--line); border-radius: .5rem; }
summary { padding: .5rem .9rem; cursor: pointer; font-weight: 600; }
summary small { margin-left: .4rem; color: var(--soft); font-weight: 400; }
pre { margin: 0; padding: .8rem .9rem; overflow: auto; max-height: 32rem; border-top: 1px solid
  var(--line); background: var(--tint); font-size: .85rem; line-height: 1.45; }
.sample { --back: var(--card); min-width: 0; padding: .8rem 1rem 1rem;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.samples.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.sample h3 { overflow-wrap: anywhere; }
.sample h4 { margin: .6rem 0 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.runs { display: grid; gap: .4rem 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.run { min-width: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; margin: .3rem 0 0; }
.facts div { display: flex; gap: .5rem; } .facts dt { color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; min-width: 0; }
.cells { display: grid; gap: .8rem 1rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.cell { min-width: 0; overflow-wrap: anywhere; } .cell p { margin: .2rem 0 0; }
.cell small { color: var(--soft); } .cell strong { font-size: .9rem; }
.wide-cell { grid-column: 1 / -1; max-width: 60rem; } .wide-cell > figure { max-width: 40rem; }
.cell img { display: block; width: 100%; height: 9rem; margin-top: .25rem; border-radius: .25rem;
  object-fit: fill; }
audio { display: block; width: 100%; height: 2.5rem; margin-top: .35rem; }
.aligned { display: flex; flex-wrap: wrap; gap: .3rem .55rem; margin: .25rem 0 0; padding: 0;
  list-style: none; }
.aligned span, .aligned abbr { display: block; text-align: center; line-height: 1.3;
  overflow-wrap: anywhere; }
.aligned .error { padding: 0 .35rem; border-bottom: 2px solid var(--c1); border-radius: .2rem;
  background: var(--tint); }
.aligned .error span + span { font-weight: 700; }
.aligned abbr { color: var(--soft); font-size: .75rem; text-decoration: none; }
.matrix { width: fit-content; max-width: 100%; }
.matrix table { width: auto; } .matrix td { text-align: center; }
.m1 { background: #0072b21a; } .m2 { background: #0072b233; } .m3 { background: #0072b24d; }
.m4 { background: #0072b266; } .m5, .m6, .m7, .m8 { background: #0065a0; color: #ffffff; }
.m6 { background: #005c91; } .m7 { background: #005383; } .m8 { background: #004a75; }
.bar { display: flex; height: 1.4rem; margin: .6rem 0; border-radius: .25rem; overflow: hidden; }
.bar span { height: 100%; } .bar + .wide { max-width: 32rem; }
.key { display: inline-block; width: .7rem; height: .7rem; margin-right: .5rem; }
.b0 { background: var(--c0); } .b1 { background: var(--c1); }
.b2 { background: var(--c2); } .b3 { background: var(--c3); } .b4 { background: var(--c4); }
.b5 { background: var(--c6); }
button { padding: .3rem .7rem; border: 1px solid var(--soft); border-radius: .4rem; cursor: pointer;
  background: var(--card); color: var(--text); font: inherit; font-size: .85rem; }
.legend button { padding: 0; border: 0; background: none; font-weight: 600; text-align: left; }
.legend button[aria-pressed="false"] { text-decoration: line-through; opacity: .65; }
.axes { margin: .75rem 0 0; }
.readout { min-height: 1.3em; margin: .2rem 0 0; color: var(--soft); font-size: .85rem; }
.event { stroke-width: 5; stroke-linecap: butt; } .skipped { stroke: var(--c1); }
.overflowed { stroke: var(--c4); stroke-width: 3; }
.words td, .words th { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
.words th { white-space: normal; }
.guide { stroke: var(--soft); stroke-dasharray: 2 3; }
a { color: var(--c0); } :focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
@media (max-width: 38rem) { svg text { font-size: 20px; }
  .across { translate: 0 8px; } .tick.mid { translate: 0 3px; }
  .up { display: none; }  /* The heading says it. */
  .legend th, .legend td { padding-left: .4rem; } .legend small { display: block; }
  .swatch { width: 20px; margin-right: .3rem; } }
@media print { body { max-width: none; } figure, .wide { break-inside: avoid; } }
"""
