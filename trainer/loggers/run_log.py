"""The record of a run: `metrics.jsonl` for programs, `train.log` for people, TensorBoard if asked.

A line of `metrics.jsonl` is one JSON object: {"kind": "step", "step": 120, "loss": 1.2, …} for a
logged step, {"kind": "stage", "stage": "valid", "epoch": 2, "step": 120, "wer": 3.2, …} for a
stage, {"kind": "monitor", "step": 100, "layers": {…}, …} for a look at the gradients. `step` is the
number of optimizer steps since the run began. What is not a finite number is null: the file is
strict JSON, and a lost number is never 0.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence with the path and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the run's log could not be written ({error.strerror}); "
            "free some space or choose another --output_folder",
            str(path),
        ) from error


class _Lines:
    """A text file that grows by whole lines.

    Each line is one write, so that a kill leaves at most one partial line, and opening the file
    again cuts that away. A line that does not fit on the disk leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _saying(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.temporary.unlink(missing_ok=True)
            self._file = self._open()

    @property
    def temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}.new")

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        end = os.fstat(file).st_size
        whole, block = end, b""
        while whole > 0 and b"\n" not in block:  # back to behind the last line end
            start = max(0, whole - 65536)
            block = os.pread(file, whole - start, start)
            whole = start
        whole += block.rfind(b"\n") + 1
        if whole < end:
            os.ftruncate(file, whole)
        return file

    def add(self, line: str) -> None:
        # half a surrogate pair (a file name that is not UTF-8) becomes its escape, in JSON as well
        data = f"{line}\n".encode(errors="backslashreplace")
        with _saying(self.path):
            end = os.fstat(self._file).st_size
            try:
                while data:  # a second turn only on a disk that fills up, to learn its error
                    data = data[os.write(self._file, data) :]
            except OSError:
                os.ftruncate(self._file, end)
                raise

    def keep(self, wanted: list[bytes]) -> None:
        """Replace the content, all or nothing."""
        with _saying(self.path):
            with self.temporary.open("wb") as new:
                new.writelines(wanted)
                new.flush()
                os.fsync(new.fileno())
            os.replace(self.temporary, self.path)
            os.close(self._file)
            self._file = self._open()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class RunLog:
    """Writes what a run reports into its folder; without a folder, or off the main rank, nothing.

    Errors: an OSError with a sentence where the folder cannot be written or the disk is full, a
    ValueError where TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path | str | None = None, tensorboard: bool = False, main: bool = True
    ) -> None:
        self.folder = Path(folder) if folder is not None and main else None
        self._metrics = self._text = None
        self._curves: _Curves | None = None
        if self.folder is not None:
            self._metrics = _Lines(self.folder / "metrics.jsonl")
            self._text = _Lines(self.folder / "train.log")
            self._curves = _Curves(self.folder / "tensorboard") if tensorboard else None

    def step(self, record: Mapping[str, Any]) -> None:
        """A logged training step. `record` has "step" and whatever else was measured."""
        self._record({"kind": "step", **record})

    def stage(self, record: Mapping[str, Any]) -> None:
        """A finished stage. `record` has "stage", "epoch", "step", the loss and the metrics."""
        self._record({"kind": "stage", **record})

    def monitor(self, record: Mapping[str, Any]) -> None:
        """A look at the gradients. `record` has "step", "optimizers" and "layers"."""
        self._record({"kind": "monitor", **record})

    @property
    def draws(self) -> bool:
        """Whether histograms go anywhere."""
        return self._curves is not None

    def histograms(self, samples: Iterable[tuple[str, Any]], step: int) -> None:
        """Distributions by name, from tensors on the host."""
        if self._curves is not None:
            for name, values in samples:
                self._curves.histogram(name, values, step)

    def _record(self, record: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        plain = as_json(record)
        self._metrics.add(json.dumps(plain, ensure_ascii=False, allow_nan=False))
        if self._curves is not None:
            self._curves.add(plain)

    def text(self, line: str) -> None:
        """A line for people, with the time before it."""
        if self._text is not None:
            self._text.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def lines(self) -> int | None:
        """How many records there are; None where none are kept."""
        if self._metrics is None:
            return None
        with self._metrics.path.open("rb") as file:
            return sum(1 for _ in file)

    def truncate(self, step: int, lines: int | None = None) -> None:
        """Forget the records of steps after `step`, and all after the first `lines`: a resumed run
        is about to log them again.
        """
        if self._metrics is None:
            return
        with self._metrics.path.open("rb") as file:
            known = list(file)
        wanted = [line for line in known[:lines] if _step_of(line) <= step]
        if len(wanted) < len(known):
            self._metrics.keep(wanted)
        if self._curves is not None:
            self._curves.purge_step = step + 1

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        for each in (self._metrics, self._text, self._curves):
            if each is not None:
                each.close()


class _Curves:
    """TensorBoard's files, opened at the first record (by then it is known what to purge)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard was asked for and is not installed; "
                "pip install tensorboard, or leave out --tensorboard"
            ) from error
        self._open = SummaryWriter
        self._writer: Any = None
        self.folder = folder
        self.purge_step: int | None = None

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Values that are not finite have no place in a histogram."""
        finite = values[values.isfinite()]
        if len(finite):
            self._opened().add_histogram(name, finite, step)

    def _opened(self) -> Any:
        if self._writer is None:
            with _saying(self.folder):
                self._writer = self._open(str(self.folder), purge_step=self.purge_step)
        return self._writer

    def add(self, record: Mapping[str, Any]) -> None:
        writer = self._opened()
        stage = f"{record.get('stage', 'train')}_{record['kind']}"
        for name, value in _numbers(record):
            if name != "step":
                writer.add_scalar(f"{stage}/{name}", value, record.get("step"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def as_json(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinities are null, scalar tensors are numbers.

    Reading a tensor waits for its device. What JSON does not know becomes its text.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if hasattr(value, "tolist"):  # tensors and NumPy's numbers and arrays
        return as_json(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record with their dotted names."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for one that cannot be read, so that it is dropped."""
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError):
        return math.inf
    return step if isinstance(step, (int, float)) else -math.inf
