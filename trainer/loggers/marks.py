"""Progress of a logger in each series, so that it gets no record twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import json_files
from trainer.loggers.files import LineFile

MAX_LINES = 10_000  # Longer files are cut to the last line of each series.
ALL = 1 << 53  # Number of records that means all records of a step.
Place = tuple[int, int]  # a step, and the number of records of a series at this step


class Places:
    """Last step of each series, and the number of its records at that step.

    A step may have several records of a series, such as layer norms of a GAN's optimizers, or
    results of two test sets.
    """

    def __init__(self, last: Mapping[str, Any] | None = None) -> None:
        self.last: dict[str, Place] = {name: (s, n) for name, (s, n) in (last or {}).items()}

    def add(self, name: str, step: int) -> Place:
        """Add a record; return its place."""
        before, number = self.last.get(name, (step, 0))
        self.last[name] = place = (step, number + 1 if before == step else 1)
        return place

    def has(self, name: str, place: Place) -> bool:
        """Return True if the record of this place was added."""
        return place <= self.last.get(name, (-1, 0))

    def newest(self) -> dict[str, Place]:
        """Return the series with a record at the overall last step."""
        step = max((step for step, _ in self.last.values()), default=0)
        return {name: place for name, place in self.last.items() if place[0] == step}


class StepMarks:
    """Last record of each series that a logger got, in a file that survives a killed run.

    A line is `[number of records so far, series, step, number of records at this step]`.

    Raises:
        OSError: if the file cannot be read or written (all methods).
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.taken = 0  # Number of records.
        self.places = Places()  # Last step of each series.
        lines: dict[str, bytes] = {}
        with path.open("rb") as file:
            for line in json_files.lines(file):
                try:
                    taken, name, step, number = json_files.parse(line)
                    self.taken, self.places.last[name] = int(taken), (int(step), int(number))
                except (json_files.BadJson, TypeError, ValueError):  # Not written by this class.
                    continue
                lines[name] = line
        if self._file.lines > MAX_LINES + len(lines):
            self._file.replace(lines.values())

    def note(self, name: str, step: int) -> None:
        """Count a record."""
        self.taken += 1
        self._write(name, self.places.add(name, step))

    def cut(self, step: int) -> None:
        """Forget the records of later steps."""
        for name in [name for name, (last, _) in self.places.last.items() if last > step]:
            self.places.last[name] = (step, ALL)
            self._write(name, (step, ALL))

    def _write(self, name: str, place: Place) -> None:
        self._file.append(json.dumps([self.taken, name, *place]))

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()
