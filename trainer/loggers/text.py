"""Text files that grow by whole lines, and `train.log`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("trainer")


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Context manager that adds the path and what to do to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the run's log could not be written ({error.strerror}); "
            "free some space or choose another --output_folder",
            str(path),
        ) from error


class LineFile:
    """Text file that grows by whole lines.

    Each line is one write, so that a killed process leaves at most one partial line, which is cut
    away when the file is opened again. A line that does not fit on the disk leaves nothing behind.

    Args:
        path: the file. It and its folder are created where they are missing.

    Raises:
        OSError: if the file cannot be opened or written (all methods).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new")
        with readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.unlink(missing_ok=True)
            self._file = self._open()

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        end = os.fstat(file).st_size
        whole, block = end, b""
        while whole > 0 and b"\n" not in block:  # Go back to the end of the last whole line.
            start = max(0, whole - 65536)
            block = os.pread(file, whole - start, start)
            whole = start
        whole += block.rfind(b"\n") + 1
        if whole < end:
            os.ftruncate(file, whole)
        return file

    def append(self, line: str) -> None:
        """Write a line."""
        # Half a surrogate pair (a file name that is not UTF-8) becomes its escape, in JSON as well.
        data = f"{line}\n".encode(errors="backslashreplace")
        with readable_errors(self.path):
            end = os.fstat(self._file).st_size
            try:
                while data:  # Loops only on a disk that fills up; the next write raises the error.
                    data = data[os.write(self._file, data) :]
            except OSError:
                os.ftruncate(self._file, end)
                raise

    def read(self) -> list[bytes]:
        """Return all lines with their line ends."""
        with self.path.open("rb") as file:
            return list(file)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Replace the content by these lines, or leave it as it is if that fails."""
        with readable_errors(self.path):
            with self._temporary.open("wb") as new:
                new.writelines(lines)
                new.flush()
                os.fsync(new.fileno())
            os.replace(self._temporary, self.path)
            os.close(self._file)
            self._file = self._open()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class TextLog:
    """`train.log`: messages for people, each with the local time before it.

    A line that cannot be written is left out. The first such failure is a warning, and the run goes
    on.

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
                self._warned = True  # Before the warning, which may come back here as a line.
                logger.warning("train.log lacks lines from here on: %s", error)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None
