"""Logger that writes tables of comma-separated values."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.loggers.files import LineFile, as_json, numbers
from trainer.loggers.protocol import Logger, series


class CsvLogger(Logger):
    """Write numbers to the folder `csv` of the run: a table for each stage and kind of record.

    `valid.csv` has a row for each validation, `train_step.csv` for each logged step. The first
    column is the step; a cell without a value is empty. A new column is added behind the others,
    and the table is rewritten.

    Args:
        folder: run folder.

    Raises:
        OSError: if a table cannot be read or written (all methods).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "csv"
        self._tables: dict[str, _Table] = {}

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write a row."""
        row = {"step": step, **dict(numbers(as_json(values)))}
        self._table(series(kind, values)).add(row | {"step": step})

    def resume(self, step: int) -> None:
        """Remove the rows of later steps."""
        for path in self.folder.glob("*.csv"):
            self._table(path.stem).cut(step)

    def close(self) -> None:
        """Close the tables."""
        for table in self._tables.values():
            table.close()
        self._tables.clear()

    def _table(self, name: str) -> _Table:
        name = name.replace(os.sep, "_")
        if name not in self._tables:
            self._tables[name] = _Table(self.folder / f"{name}.csv")
        return self._tables[name]


class _Table(LineFile):
    """A table with a line of column names, and cells without line breaks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        first = next(self._rows(), [])
        self.columns = list(first)

    def add(self, row: Mapping[str, float | None]) -> None:
        """Write a row; new names are added as columns first."""
        row = {" ".join(name.split()): value for name, value in row.items()}
        known = set(self.columns)
        if new := [name for name in row if name not in known]:
            old = list(self._rows())[1:]
            self.columns += new
            wider = [each + [""] * (len(self.columns) - len(each)) for each in old]
            self.replace(f"{_line(each)}\n".encode() for each in [self.columns, *wider])
        cells = (row.get(name) for name in self.columns)
        self.append(_line(["" if cell is None else cell for cell in cells]))

    def cut(self, step: int) -> None:
        """Remove the rows of later steps, and invalid lines."""
        head, *rows = list(self._rows()) or [[]]
        kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
        if head and len(kept) < len(rows):
            self.replace(f"{_line(each)}\n".encode() for each in [head, *kept])

    def _rows(self) -> Iterator[list[str]]:
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            yield from csv.reader(file)


def _line(cells: list[Any]) -> str:
    """Return a row as text, without the line break."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
