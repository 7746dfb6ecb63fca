"""The records and messages of a run in one object, for the Brain that has no callbacks yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.loggers.jsonl import JsonlLogger
from trainer.loggers.jsonl import as_json as as_json
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.text import TextLog


class RunLog:
    """Write what a run reports into its folder; without a folder, or off the main rank, nothing."""

    def __init__(
        self, folder: Path | str | None = None, tensorboard: bool = False, main: bool = True
    ) -> None:
        self.folder = Path(folder) if folder is not None and main else None
        self._jsonl = JsonlLogger(self.folder) if self.folder else None
        self._text = TextLog(self.folder)
        self._curves = TensorBoardLogger(self.folder) if self.folder and tensorboard else None

    def step(self, record: Mapping[str, Any]) -> None:
        """Record a logged training step."""
        self._record("step", record)

    def stage(self, record: Mapping[str, Any]) -> None:
        """Record a finished stage."""
        self._record("stage", record)

    def monitor(self, record: Mapping[str, Any]) -> None:
        """Record layer norms."""
        self._record("monitor", record)

    def _record(self, kind: str, record: Mapping[str, Any]) -> None:
        if self._jsonl is not None:
            self._jsonl.write({"kind": kind, **record})
        if self._curves is not None:
            self._curves.scalars(kind, record, record.get("step", 0))

    @property
    def draws(self) -> bool:
        """True if histograms are recorded."""
        return self._curves is not None

    def histograms(self, samples: Iterable[tuple[str, Any]], step: int) -> None:
        """Record distributions by name, from tensors on the host."""
        if self._curves is not None:
            for name, values in samples:
                self._curves.histogram(name, values, step)

    def text(self, line: str) -> None:
        """Write a line of `train.log`."""
        self._text.write(line)

    def lines(self) -> int | None:
        """Return the number of records; None where none are kept."""
        return None if self._jsonl is None else self._jsonl.lines()

    def truncate(self, step: int, lines: int | None = None) -> None:
        """Remove the records of later steps, and all after the first `lines`."""
        if self._jsonl is not None:
            self._jsonl.resume(step, lines)
        if self._curves is not None:
            self._curves.resume(step)

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        for each in (self._jsonl, self._text, self._curves):
            if each is not None:
                each.close()
