"""Files of every run: `metrics.jsonl`, `train.log`, `samples` and `report.html`.

A line of `metrics.jsonl` is one JSON object: {"kind": "step", "step": 120, "loss": 1.2, …} for a
logged step, {"kind": "stage", "stage": "valid", "epoch": 2, "step": 120, "wer": 3.2, …} for a
finished stage, {"kind": "monitor", "step": 100, "layers": {…}, …} for layer norms. ``step`` is the
number of optimizer steps since the run began. Lines are strict JSON: non-finite numbers are null.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trainer import json_files
from trainer.loggers.protocol import Logger
from trainer.options import RunOptions
from trainer.samples import Samples, record_of

METRICS = "metrics.jsonl"
SAMPLES, TABLE = "samples", "samples.json"
MAX_ROWS = 20  # of a set of samples
MAX_SETS = 12  # More are deleted, oldest first.
OWN = re.compile(r"\d+-\d+-\d+\.(flac|wav|png)")

logger = logging.getLogger("trainer")


def run_folder(options: RunOptions) -> Path | None:
    """Return the folder to record a run in; None without one, with --debug and in a replay."""
    if not options.output_folder or options.debug or options.replay:
        return None
    return Path(options.output_folder)


@contextlib.contextmanager
def readable_errors(path: Path, what: str = "log") -> Iterator[None]:
    """Context manager that adds the path and advice to an OSError.

    The message calls the file ``what``, such as "log" or "report".
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the run's {what} could not be written ({error.strerror}); "
            "free some space or choose another output_folder",
            str(path),
        ) from error


@contextlib.contextmanager
def file_with(content: bytes, name: str) -> Iterator[str]:
    """Context manager that yields the path of a temporary file with this name and content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield str(path)


def temporary(path: Path) -> Path:
    """Return the path for writing a file or folder before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.new")


def replace_file(path: Path, lines: Iterable[bytes], what: str = "log") -> None:
    """Replace the content of a file, or leave it unchanged on an error.

    Args:
        path: the file.
        lines: the new content, in parts.
        what: word for the file in error messages, such as "report".

    Raises:
        OSError: if it cannot be written.
    """
    new = temporary(path)
    with readable_errors(path, what):
        try:
            with new.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


class LineFile:
    """Text file that grows by whole lines.

    Each line is one write, so that a killed process leaves at most one partial line, which is
    removed when the file is opened again. A line that does not fit on the disk leaves nothing
    behind.

    Args:
        path: the file; created with its folder if missing.

    Attributes:
        lines: number of lines.

    Raises:
        OSError: if the file cannot be opened, read or written (all methods).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary(path).unlink(missing_ok=True)  # Left by a killed process.
            self._file = self._open()

    def _open(self) -> int:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.lines = read = end = 0
        with self.path.open("rb") as content:
            while chunk := content.read(1 << 20):
                self.lines += chunk.count(b"\n")
                end = read + chunk.rfind(b"\n") + 1 if b"\n" in chunk else end
                read += len(chunk)
        os.ftruncate(file, end)
        return file

    def append(self, line: str) -> None:
        """Write a line."""
        # Half a surrogate pair (a file name that is not UTF-8) is escaped, also in JSON.
        data = f"{line}\n".encode(errors="backslashreplace")
        with readable_errors(self.path):
            end = os.fstat(self._file).st_size
            try:
                while data:  # Repeats only on a full disk; the next write raises the error.
                    data = data[os.write(self._file, data) :]
            except OSError:
                os.ftruncate(self._file, end)
                raise
        self.lines += 1

    def replace(self, lines: Iterable[bytes]) -> None:
        """Replace the content by these lines, or leave it unchanged on an error."""
        replace_file(self.path, lines)
        with readable_errors(self.path):
            os.close(self._file)
            self._file = self._open()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class TextLog:
    """`train.log`: messages, each with the local time.

    A line that cannot be written is left out. The first failure is a warning, and the run goes on.

    Args:
        folder: run folder; None writes nothing.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else LineFile(folder / "train.log")
        self._warned = False

    def write(self, line: str) -> None:
        """Write a line."""
        if self._file is None:
            return
        try:
            self._file.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        except OSError as error:
            if not self._warned:
                self._warned = True  # Before the warning, which may be written here, too.
                logger.warning("train.log lacks lines from here on: %s", error)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonlLogger(LineFile, Logger):
    """Write numbers as lines of `metrics.jsonl` in a run folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / METRICS)

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write a record of numbers."""
        self.write({"kind": kind, **values, "step": step})

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record, whose values are converted by `as_json`."""
        self.append(json.dumps(as_json(record), ensure_ascii=False, allow_nan=False))

    def resume(self, step: int, lines: int | None = None) -> None:
        """Remove records of later steps, which a resumed run writes again.

        Args:
            step: optimizer steps at the checkpoint. Records without a step are kept, unreadable
                lines are removed.
            lines: number of records at the checkpoint; later ones are removed, too, since several
                records may have one step. None for no limit.
        """
        if self.lines and sum(1 for _ in self._kept(step, lines)) < self.lines:
            self.replace(self._kept(step, lines))

    def _kept(self, step: int, lines: int | None) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for line in islice(json_files.lines(file), lines):
                if _step_of(line) <= step:
                    yield line


def as_json(value: Any) -> Any:
    """Convert a value to dicts and lists of numbers, texts, booleans and None.

    NaN and infinities become None; a tensor or array becomes a number or lists of numbers (waits
    for a GPU); anything else that JSON cannot hold becomes its text.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if hasattr(value, "tolist"):  # Tensors, and NumPy's numbers and arrays.
        return as_json(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield numbers and nulls of a nested record by dotted name; lists are left out."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield f"{prefix}{key}", value


def finite(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a record by dotted name, without its step.

    For layer norms the epoch is left out, too: a GAN has such a record for each optimizer.
    """
    when = ("step", "epoch") if kind == "monitor" else ("step",)
    for name, value in numbers(as_json(values)):
        if value is not None and name not in when:
            yield name, float(value)


def _step_of(line: bytes) -> float:
    """Return the step of a line: -inf if it has none, inf if it cannot be read."""
    record = json_files.mapping(line)
    step = record.get("step") if record else math.inf
    return step if isinstance(step, (int, float)) else -math.inf


class SampleLogger(Logger):
    """Keep the latest samples of `Brain.show` in the folder `samples` of the run.

    It has at most `MAX_ROWS` rows of each of `MAX_SETS` titles, as samples/TITLE/samples.json and
    the files that this table names, such as 300-0-1.flac (optimizer step, row and column). The
    files are written before the table: a killed process leaves the earlier set or the new one.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / SAMPLES

    def samples(self, samples: Samples) -> None:
        """Write the first rows, which replace earlier ones of this title."""
        place = self.folder / slug(samples.title)
        written: set[str] = set()

        def write(at: str, suffix: str, content: bytes) -> str:
            path = place / f"{samples.step}-{at}{suffix}"
            path.write_bytes(content)
            written.add(path.name)
            return path.name

        with readable_errors(place, "samples"):
            place.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    str(name): record_of(cell, partial(write, f"{number}-{column}"))
                    for column, (name, cell) in enumerate(row.items())
                }
                for number, row in enumerate(samples.rows[:MAX_ROWS])
            ]
        table = vars(samples) | {"rows": rows, "left_out": max(0, len(samples.rows) - MAX_ROWS)}
        text = json.dumps(as_json(table), ensure_ascii=True)
        replace_file(place / TABLE, [text.encode()], "samples")
        for path in place.iterdir():
            if OWN.fullmatch(path.name) and path.name not in written:
                path.unlink()
        old = sorted(self._tables(), key=lambda each: each.stat().st_mtime_ns)
        for each in old[: max(0, len(old) - MAX_SETS)]:
            self._remove(each)

    def resume(self, step: int) -> None:
        """Delete samples of later steps, since they will come again."""
        for path in self._tables():
            shown = json_files.read_mapping(self.folder, path).get("step")
            if isinstance(shown, int) and shown > step:
                with contextlib.suppress(OSError):
                    self._remove(path)

    def _tables(self) -> list[Path]:
        return [each for each in self.folder.glob(f"*/{TABLE}") if not each.parent.is_symlink()]

    @staticmethod
    def _remove(table: Path) -> None:
        table.unlink()  # First: the other files have no meaning without it.
        shutil.rmtree(table.parent, ignore_errors=True)


def slug(title: str) -> str:
    """Return the folder name of a title; different titles have different names."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", title).strip("._")[:60]
    check = zlib.crc32(title.encode(errors="backslashreplace"))
    return name if name and name == title else f"{name or SAMPLES}-{check:08x}"


class ReportLogger(Logger):
    """Keep `report.html` up to date, at about 1 % of the run's time.

    Reading a long log takes seconds, and a stage may be short: the report is written after a stage
    only if a hundred times the duration of the last writing has passed, and again when the logger
    is closed. It reads the files of `JsonlLogger` and `SampleLogger`, and must come after them in
    the list of loggers. The first failure is a warning.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stale = self._warned = False
        self._written, self._duration = -math.inf, 0.0

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write the report after a stage if that is cheap."""
        if kind == "stage":
            self._refresh()

    def artifact(self, name: str, path: Path) -> None:
        """Write the report if that is cheap: it lists the reports of skipped steps."""
        self._refresh()

    def samples(self, samples: Samples) -> None:
        """Write the report before the logger is closed."""
        self._stale = True

    def close(self) -> None:
        """Write the report unless it is up to date."""
        if not self._stale:
            return
        from trainer import report  # Here, since its many modules would slow down a start.

        started = time.perf_counter()
        try:
            report.write_html(self.folder)
        except Exception as error:  # A failed report must not end the run.
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the report of the run is not up to date (%s: %s)", type(error).__name__, error
                )
        self._written = time.perf_counter()
        self._duration, self._stale = self._written - started, False

    def _refresh(self) -> None:
        self._stale = True
        if time.perf_counter() - self._written >= 100 * self._duration:
            self.close()
