"""Parts of a page that is complete in one HTML file: no network, light and dark."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape as _escape
from importlib.resources import files

SCRIPT, STYLE = (
    files("trainer.report").joinpath(name).read_text(encoding="utf-8")
    for name in ("script.js", "style.css")
)
HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{HASH}'; style-src 'unsafe-inline'; "
    "img-src data:; media-src data:"
)

# Characters that reorder text around them, or that HTML cannot hold.
UNSEEN = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)


def escape(text: str) -> str:
    """Return a text escaped for HTML."""
    return _escape(text.translate(UNSEEN))


def document(title: str, header: str, main: str, style: str = "") -> str:
    """Return a page.

    Args:
        title: text of the title and first heading.
        header: HTML below that heading.
        main: HTML of the content.
        style: style sheet in addition to `style.css`.
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
    """Return a section with a heading, or an empty text if its content (HTML) is empty."""
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
    """Return tiles, each with a name, a value in large letters, and a note, maybe empty."""
    items = "".join(
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        + (f"<small>{escape(note)}</small></li>" if note else "</li>")
        for name, value, note in facts
    )
    return f'<ul class="tiles">{items}</ul>' if items else ""


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table as HTML; it scrolls sideways if too wide.

    Args:
        label: name of the table for screen readers.
        heads: heading of each column, as text.
        rows: cells of each row, as HTML; the first one is the heading of the row.
        kind: classes of the style sheet: "tall" limits the height and wraps row headings, "words"
            wraps text in every cell.
    """
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="{f"wide {kind}".strip()}" tabindex="0" role="region" '
        f'aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
