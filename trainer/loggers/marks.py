"""Notes of what a logger has taken, for backends that cannot delete."""

from __future__ import annotations

import json
from pathlib import Path

from trainer import json_files
from trainer.loggers.files import LineFile

MAX_LINES = 10_000  # before a file that is opened is shortened to the last line of each series


class StepMarks:
    """The last step of each series that a logger has taken, in a file that survives a killed run.

    A line is `[number of records so far, series, step]`.

    Args:
        path: the file; it and its folder are created where they are missing.

    Attributes:
        taken: number of records.
        last: last step by series.

    Raises:
        OSError: if the file cannot be read or written (all methods).
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.taken = 0
        self.last: dict[str, int] = {}
        lines: dict[str, bytes] = {}
        with path.open("rb") as file:
            for line in json_files.lines(file):
                try:
                    taken, name, step = json_files.parse(line)
                    self.taken, self.last[name] = int(taken), int(step)
                except (json_files.BadJson, TypeError, ValueError):  # Not by this class.
                    continue
                lines[name] = line
        if self._file.lines > MAX_LINES + len(lines):
            self._file.replace(lines.values())

    def note(self, name: str, step: int) -> None:
        """Note that a record was taken."""
        self.taken += 1
        self.last[name] = step
        self._file.append(json.dumps([self.taken, name, step]))

    def cut(self, step: int) -> None:
        """Note that the records of later steps were discarded."""
        for name in [name for name, last in self.last.items() if last > step]:
            self.last[name] = step
            self._file.append(json.dumps([self.taken, name, step]))

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()
