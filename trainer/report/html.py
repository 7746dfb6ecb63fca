"""Parts of a page that is complete in one HTML file: no script, no network, light and dark.

The light colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart,
darkened where a thin line on white needs it; each has a contrast of at least 3:1 to its background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


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
        f"<title>{title}</title><style>{STYLE}{style}</style></head><body>\n"
        f"<header><h1>{title}</h1>{header}</header>\n<main>{main}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section with a heading; nothing where the content, which is HTML, is empty."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Return tiles, each with a name, a value in large letters, and a note, which may be empty."""
    items = "".join(
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        + (f"<small>{escape(note)}</small></li>" if note else "</li>")
        for name, value, note in facts
    )
    return f'<ul class="tiles">{items}</ul>' if items else ""


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table that scrolls where it is too wide, if "tall" also where it is too high.

    The label is for screen readers. Rows are cells as HTML; the first of each is its heading.
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
header > p { margin: .3rem 0 0; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0;
  padding: 0; list-style: none; }
.tiles li { min-width: 8.5rem; padding: .6rem .9rem; border-radius: .5rem;
  background: var(--tint); }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: .82rem; }
.tiles strong { display: block; font-size: 1.55rem; line-height: 1.3; }
.charts { display: grid; gap: 1rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); }
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
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
.tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; }
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
@media (max-width: 38rem) { svg text { font-size: 15px; } }
@media print { body { max-width: none; } figure, .wide { break-inside: avoid; } }
"""
