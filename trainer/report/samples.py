"""The samples of runs as HTML: players, pictures, aligned texts, matrices and histograms.

The folder `samples` of a run may come from elsewhere: unreadable content is left out, texts are
escaped, and files are read only from within the folder.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainer import json_files
from trainer.loggers.files import MAX_ROWS, MAX_SETS, SAMPLES, TABLE
from trainer.report.axis import count, number
from trainer.report.chart import Chart, Series, draw
from trainer.report.html import escape, section
from trainer.untrusted import confined

MAX_EMBEDDED = 6_500_000  # bytes of the files in a page; 8.7 MB in base64
MAX_TEXT = 20_000  # characters of a cell
MAX_FACT = 40  # characters of a text shown beside numbers, not below its name
# Types and first bytes of the files.
TYPES = {
    ".flac": ("audio/flac", b"fLaC"), ".wav": ("audio/wav", b"RIFF"),
    ".png": ("image/png", b"\x89PNG"),
}  # fmt: skip
ERRORS = {"S": "substituted", "D": "deleted", "I": "inserted"}

Row = dict[str, Any]
Uri = Callable[[object], str | None]  # See `Embedder.uri`.


@dataclass
class Table:
    """Samples of one title from a run folder."""

    folder: Path
    title: str
    facts: str
    rows: list[Row]


@dataclass
class Embedder:
    """Embeds files in a page, up to `MAX_EMBEDDED` bytes in total."""

    left: int = MAX_EMBEDDED
    missing: list[str] = field(default_factory=list)

    def uri(self, folder: Path, name: object) -> str | None:
        """Return a file as a data: URI; None if it is not such a file, or the page is full."""
        kind, content = read_file(folder, name, self.left)
        if len(content) > self.left:
            self.missing.append(str(name))
            return None
        self.left -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else None


def read_file(folder: Path, name: object, most: int) -> tuple[str, bytes]:
    """Return type and content of a sound or picture in a folder; empty for any other file.

    A longer file than ``most`` bytes is cut after ``most`` + 1.
    """
    path, content = folder / str(name), b""  # The name, read from a file, may be anything.
    kind, mark = TYPES.get(path.suffix, ("", b""))
    # ValueError: the path leads elsewhere, or has a NUL.
    with suppress(OSError, ValueError), confined(folder, path).open("rb") as file:
        content = file.read(most + 1)
    return (kind, content) if kind and content.startswith(mark) else ("", b"")


def read_tables(folder: Path) -> list[Table]:
    """Return the samples of a run folder, first those of the test."""
    found = []
    for path in sorted((folder / SAMPLES).glob(f"*/{TABLE}"))[: 2 * MAX_SETS]:
        table = json_files.read_mapping(folder, path)
        rows = table.get("rows")
        if not isinstance(rows, list) or not rows:
            continue
        facts = [str(table["note"])] if table.get("note") else []
        if isinstance(table.get("epoch"), int):
            facts.append(f"Epoch {count(table['epoch'])}.")
        if isinstance(table.get("left_out"), int) and table["left_out"] > 0:
            facts.append(f"{count(table['left_out'])} more are left out.")
        cells = [
            {name: cell for name, cell in row.items() if isinstance(cell, dict)}
            for row in rows[:MAX_ROWS]
            if isinstance(row, dict)
        ]
        found.append(Table(path.parent, str(table.get("title")), " ".join(facts), cells))
    return sorted(found, key=lambda each: each.title != "test")


def render_tables(runs: Mapping[str, Sequence[Table]]) -> str:
    """Return a section for each title, with the rows of all runs (by name) grouped by id.

    The name of a single run is not shown.
    """
    embedder, text = Embedder(), ""
    titles = dict.fromkeys(table.title for tables in runs.values() for table in tables)
    for title in titles:
        tables = {run: table for run, own in runs.items() for table in own if table.title == title}
        # In the order of the first run, then ids that only others have.
        ids = dict.fromkeys(name for table in tables.values() for name in _by_id(table))
        facts = {run: table.facts for run, table in tables.items() if table.facts}
        if len({*facts.values()}) == 1:
            facts = {"": next(iter(facts.values()))}
        body = "".join(
            f"<p>{escape(f'{run}: {fact}' if run else fact)}</p>" for run, fact in facts.items()
        )
        articles = ""
        for id in list(ids)[:MAX_ROWS]:
            parts = ""
            for run, table in tables.items():
                if (row := _by_id(table).get(id)) is not None:
                    shown = _row(row, partial(embedder.uri, table.folder), id)
                    heading = f"<h4>{escape(run)}</h4>" if len(runs) > 1 else ""
                    parts += f'<div class="run">{heading}{shown}</div>'
            parts = f'<div class="runs">{parts}</div>' if len(runs) > 1 else parts
            articles += f'<article class="sample"><h3>{escape(id)}</h3>{parts}</article>'
        small = len(runs) == 1 and all(
            [cell.get("kind") for name, cell in row.items() if name != "id" and _fact(cell) is None]
            in (["audio"], ["image"])
            for row in next(iter(tables.values())).rows
        )
        kind = " full" if len(runs) > 1 else " small" if small else ""
        body += f'<div class="samples{kind}">{articles}</div>'
        text += section(f"Samples: {title}", body)
    if embedder.missing:
        text += (
            f"<p>{count(len(embedder.missing))} sounds and pictures are not in this page, which "
            "would be too large with them: they are in the folder samples.</p>"
        )
    return text


def _by_id(table: Table) -> dict[str, Row]:
    """Return the rows by id, or by number if they have none."""
    found = {}
    for place, row in enumerate(table.rows, 1):
        cell = row.get("id", {})
        known = cell.get("text", cell.get("value"))
        name = _text(str(place) if known is None else known)
        while name in found:
            name += " (again)"
        found[name] = row
    return found


def _row(row: Row, uri: Uri, id: str) -> str:
    """Return the cells of a row: first numbers and short texts, then all others."""
    facts = cells = ""
    for name, cell in row.items():
        shown = _fact(cell)
        if name != "id" and shown is not None:
            facts += f"<div><dt>{escape(_text(name))}</dt><dd>{shown}</dd></div>"
        elif name != "id":
            cells += _cell(_text(name), cell, uri, id)
    facts = f'<dl class="facts">{facts}</dl>' if facts else ""
    return f'{facts}<div class="cells">{cells}</div>' if cells else facts


def _fact(cell: Row) -> str | None:
    """Return a number or a short text as HTML; None for any other cell."""
    if cell.get("kind") == "number":
        value = cell.get("value")
        return number(value) if isinstance(value, (int, float)) else "lost"
    text = cell.get("text")
    if cell.get("kind") != "text" or not isinstance(text, str):
        return None
    return escape(text) if len(text) <= MAX_FACT and "\n" not in text else None


def _cell(name: str, cell: Row, uri: Uri, id: str) -> str:
    kind, label, note = cell.get("kind"), escape(name), ""
    wide = "" if kind in ("audio", "image") else " wide-cell"
    try:
        if kind == "audio":
            note, body = _audio(label, cell, uri, id)
        elif kind == "image":
            note, body = escape(_text(cell.get("note") or "")), _image(cell.get("file"), label, uri)
        elif kind == "aligned":
            body = _aligned(cell["pairs"])
        elif kind == "matrix":
            body = _matrix(cell)
        elif kind == "histogram":
            return f'<div class="cell wide-cell">{_histogram(name, cell)}</div>'
        else:
            body = f"<p>{escape(_text(cell.get('text', '')))}</p>"
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        body, wide = "<p>cannot be read</p>", ""  # Of another version, or from elsewhere.
    note = f" <small>{note}</small>" if note else ""
    return f'<div class="cell{wide}"><strong>{label}</strong>{note}{body}</div>'


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def _audio(label: str, cell: Row, uri: Uri, id: str) -> tuple[str, str]:
    """Return the length of a sound, and its spectrogram and player as HTML."""
    seconds, shown = float(cell["seconds"]), float(cell["shown"])
    note = f"{number(seconds)} s"
    if shown < seconds:
        note = f"the first {number(shown)} s of {note}"
    if cell.get("not_finite"):
        note += f", {count(float(cell['not_finite']))} samples not finite"
    body, sound = "<p>not in this page</p>", uri(cell["file"])
    if sound:
        body = (
            f'<audio controls preload="metadata" src="{sound}" '
            f'aria-label="{label}, {escape(id)}"></audio>'
        )
    if "picture" in cell:
        body = _image(cell["picture"], f"spectrogram of {label}", uri) + body
    return note, body


def _image(name: object, label: str, uri: Uri) -> str:
    picture = uri(name)
    return f'<img src="{picture}" alt="{label}">' if picture else "<p>not in this page</p>"


def _aligned(pairs: Sequence[Sequence[str | None]]) -> str:
    """Return each token above the recognised one, with the letter of an error."""
    items = ""
    for said, heard in pairs:
        error = "" if said == heard else "I" if said is None else "D" if heard is None else "S"
        top, low = (escape(_text(each)) if each is not None else "–" for each in (said, heard))
        mark = f'<span>{low}</span><abbr title="{ERRORS[error]}">{error}</abbr>' if error else ""
        kind = ' class="error"' if error else ""
        items += f"<li{kind}><span>{top}</span>{mark}</li>"
    return f'<ol class="aligned">{items}</ol>'


def _matrix(cell: Row) -> str:
    """Return a table whose cells are as dark as their share of the row."""
    labels = [escape(_text(each)) for each in cell["labels"]]
    head = "".join(f'<th scope="col">{each}</th>' for each in labels)
    body = ""
    for label, values in zip(labels, cell["values"], strict=True):
        total, cells = math.fsum(values) or 1.0, ""
        for value in values:
            level = min(8, max(0, round(8 * value / total)))
            cells += f'<td class="m{level}">{number(value)}</td>'
        body += f'<tr><th scope="row">{label}</th>{cells}</tr>'
    corner = escape(_text(f"{cell.get('rows')} ↓ {cell.get('columns')} →"))
    return (
        f'<div class="wide matrix" tabindex="0" role="region" aria-label="{corner}"><table><thead>'
        f'<tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _histogram(name: str, cell: Row) -> str:
    low, high, series = float(cell["low"]), float(cell["high"]), []
    for colour, (group, shares) in enumerate(cell["shares"].items()):
        width = (high - low) / len(shares)
        xs = [low + width * place for place in range(len(shares) + 1) for _ in (0, 1)][1:-1]
        ys = [100 * float(share) for share in shares for _ in (0, 1)]
        series.append(Series(_text(group), xs, ys, colour, "steps"))
    chart = Chart(name, _text(cell.get("label")), "% of the group", series, from_zero=True)
    chart.counts = chart.valued = False
    return draw(chart)
