"""Tables and lists of a corpus: text files of lines and of columns, checked as they are read.

A file that cannot be read, a line that does not fit and a name that leads elsewhere raise
`TableError`, which names the file and the line. Accepted are UTF-8 with or without byte order
marks, all ends of lines, and blank lines.
"""

from __future__ import annotations

import csv
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypeVar

from recipes.common.paths import check_name

Result = TypeVar("Result")

SHOWN = 80  # Characters of a line or name that an error shows.


class TableError(ValueError):
    """Error in a table or a list.

    Args:
        path: the file.
        reason: cause, as the rest of a sentence: "is empty".
        line: number of the line, from 1; None for the whole file.
    """

    def __init__(self, path: Path, reason: str, line: int | None = None) -> None:
        super().__init__(f"{'' if line is None else f'line {line} of '}{path} {reason}")
        self.path, self.reason, self.line = path, reason, line


class Line(NamedTuple):
    """A line that is not blank."""

    number: int  # from 1
    text: str


class Row(NamedTuple):
    """A row of a table."""

    line: int  # its number in the file, from 1
    cells: dict[str, str]  # by column, without blanks around


def read_lines(path: Path, expected: str) -> list[Line]:
    """Read the lines of a text file that are not blank.

    Args:
        path: the file.
        expected: what it should be, for errors: "a table with id and speaker".

    Raises:
        TableError: the file is missing, no regular file, unreadable, empty, or no text in UTF-8.
    """
    every = enumerate(read_text(path, expected).split("\n"), 1)
    lines = [Line(number, line) for number, line in every if line.strip()]
    if not lines:
        raise TableError(path, f"is empty; expected was {expected}")
    return lines


def read_rows(
    path: Path,
    expected: str,
    columns: Collection[str] = (),
    key: str | None = None,
    gap: str = ",;\t",
) -> list[Row]:
    """Read a table whose first line names its columns. A row is one line.

    Args:
        path: the file.
        expected: what it should be, for errors.
        columns: names that it must have.
        key: column whose cells are names: none is empty, and all are different.
        gap: characters that may separate cells; the first that the line of names has.

    Raises:
        TableError: as from `read_lines`; there is no row, a column is missing or there twice, a row
            has another number of cells, a quote is not closed, or a key is not as it must be.
    """
    head, *lines = read_lines(path, expected)
    separator = next((each for each in gap if each in head.text), gap[-1])
    names = _cells(path, head, separator)
    for name in names:
        if names.count(name) > 1:
            raise TableError(path, f"has the column {_shown(name)!r} twice", head.number)
    if lacking := sorted({*columns, *([key] if key else [])} - set(names)):
        raise TableError(
            path,
            f"has no column {', '.join(lacking)}, but {_shown(', '.join(names))}; expected was "
            f"{expected}",
            head.number,
        )
    if not lines:
        raise TableError(path, f"has no rows; expected was {expected}")
    rows = []
    for line in lines:
        cells = _cells(path, line, separator)
        if len(cells) != len(names):
            raise TableError(path, f"has {len(cells)} cells for {len(names)} columns", line.number)
        rows.append(Row(line.number, dict(zip(names, cells, strict=True))))
    if key is not None:
        check_unique(path, [(row.line, row.cells[key]) for row in rows])
    return rows


def check_unique(path: Path, named: Collection[tuple[int, str]]) -> None:
    """Check the names of the lines of a file, such as ids.

    Args:
        path: the file.
        named: numbers of lines, and their names.

    Raises:
        TableError: a name is empty, or there twice.
    """
    first: dict[str, int] = {}
    for line, name in named:
        if not name:
            raise TableError(path, "has an empty name", line)
        if first.setdefault(name, line) != line:
            raise TableError(
                path, f"has the name {_shown(name)!r} of line {first[name]} again", line
            )


def named(path: Path, line: int, use: Callable[[str], Result], name: str) -> Result:
    """Return ``use(name)`` for a name or path in a file.

    Raises:
        TableError: it is no name (`recipes.common.paths.check_name`), or ``use`` raises ValueError.
    """
    try:
        check_name(name)
        return use(name)
    except ValueError as error:
        raise TableError(path, f"cannot be used: {error}", line) from None


def read_text(path: Path, expected: str) -> str:
    """Read a text file, with line feeds for whatever ends its lines.

    Args:
        path: the file.
        expected: what it should be, for errors.

    Raises:
        TableError: the file is missing, no regular file, unreadable, or no text in UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise TableError(path, f"is {kind}; expected was {expected}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise TableError(path, f"is not there; expected was {expected}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(path, f"cannot be read ({error})") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise TableError(path, "is text in UTF-16 or UTF-32; expected was UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise TableError(
            path, "has a NUL byte: it is no text, or text in UTF-16; expected was UTF-8", line
        )
    try:
        # Also within the text: files were joined that had a byte order mark each.
        text = data.decode().replace("\ufeff", "")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise TableError(
            path,
            f"has the byte 0x{data[error.start]:02x}, which is not UTF-8, as was expected: is it "
            "text in Latin-1 or Windows-1252? (iconv -f CP1252 -t UTF-8 converts it)",
            data.count(b"\n", 0, error.start) + 1,
        ) from None


def _cells(path: Path, line: Line, separator: str) -> list[str]:
    try:
        (cells,) = csv.reader([line.text], delimiter=separator, strict=True, skipinitialspace=True)
    except csv.Error as error:
        hint = (
            "has a quote that is not closed in the line"
            if "unexpected end" in str(error)
            else f"has cells that cannot be told apart ({error})"
        )
        raise TableError(path, f"{hint}: {_shown(line.text)!r}", line.number) from None
    return [cell.strip() for cell in cells]


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
