"""Files of a checkpoint: written beside, hashed on the way, synced, then renamed into their place.

A name with a leading dot is a folder in the making or in the deleting, never a checkpoint. It says
which process of which machine works on it, so that what a killed one left can be told and removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 20  # bytes; smaller writes are gathered up to this
ABANDONED = 3600.0  # seconds without a change, after which nobody works on a temporary folder
HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40]
TEMPORARY = re.compile(r"\.(?:saving|deleting)-(\d{1,9})@([A-Za-z0-9]*)-.+", re.ASCII)


class Written(NamedTuple):
    """What the manifest says of a file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


class NewFile:
    """A file being written: it hashes what it is given, and keeps its first error until `close`.

    The error has to wait because torch's zip writer calls `write` from C++, where an exception of
    ours would come out as another one. Counting goes on, so that the error can say what was needed.
    """

    def __init__(self, path: Path) -> None:
        self.size = self.stored = 0
        self._error: BaseException | None = None
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, data: bytes | memoryview) -> int:
        """Take `data`, wholly."""
        self.size += len(data)
        self._hash.update(data)
        self._keep_error(lambda: self._store(data))
        return len(data)

    def flush(self) -> None:
        """Nothing: `close` does it, once."""

    def close(self) -> Written:
        """Everything on the disk, or the first error."""
        self._keep_error(self._drain)
        self._keep_error(lambda: os.fsync(self._file))
        os.close(self._file)
        if self._error is not None:
            raise self._error
        return Written(self.size, self._hash.hexdigest())

    def _keep_error(self, work: Callable[[], None]) -> None:
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def _store(self, data: bytes | memoryview) -> None:
        if len(data) < CHUNK:
            self._buffer += data
        if len(data) >= CHUNK or len(self._buffer) >= CHUNK:
            self._drain()
        if len(data) >= CHUNK:
            self._put(memoryview(data))

    def _drain(self) -> None:
        full, self._buffer = self._buffer, bytearray()
        self._put(memoryview(full))

    def _put(self, data: memoryview) -> None:
        while data:
            count = os.write(self._file, data)
            self.stored += count
            data = data[count:]


def write_file(path: Path, fill: Callable[[NewFile], object]) -> Written:
    """Write a new file by `fill`; an OSError says how many bytes it needs."""
    file = NewFile(path)
    try:
        try:
            fill(file)
        finally:
            written = file.close()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path.name} needs {file.size} bytes, {file.stored} of them were stored, "
            f"{shutil.disk_usage(path.parent).free} are free on the disk "
            f"({error.strerror or error})",
        ) from error
    return written


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # Windows opens no folders, and keeps their entries in its own journal.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Give a finished folder its name, for good."""
    os.rename(source, target)
    sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Create the folder of all checkpoints; ValueError where that cannot be."""
    if folder.is_dir():
        return
    try:
        os.makedirs(folder, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise ValueError(
            f"checkpoints cannot be saved in {folder}: it does not exist and cannot be made "
            f"({error.strerror}); choose another place, or make it writable"
        ) from error


def temporary(folder: Path, verb: str, name: str) -> Path:
    """Where this process is `saving` or `deleting` the checkpoint `name`."""
    return folder / f".{verb}-{os.getpid()}@{HOST}-{name}"


def delete(path: Path) -> None:
    """Remove a checkpoint; at no instant does a half of it bear its name."""
    doomed = temporary(path.parent, "deleting", path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_stale(folder: Path) -> None:
    """Remove the temporary folders of processes that are gone, and this one's: it is not saving."""
    for entry in list(os.scandir(folder)) if folder.is_dir() else []:
        match = TEMPORARY.fullmatch(entry.name)
        if match and (_is_gone(int(match[1]), match[2]) or _age(entry.path) > ABANDONED):
            shutil.rmtree(entry.path)


def _is_gone(process: int, host: str) -> bool:
    if process == os.getpid() and host == HOST:
        return True
    if host != HOST or os.name == "nt":  # Not to be asked from here.
        return False
    try:
        os.kill(process, 0)  # Signal 0 asks only whether the process exists.
    except ProcessLookupError:
        return True
    except PermissionError:  # It exists, and is somebody else's.
        return False
    return False


def _age(path: str) -> float:
    """Seconds since anything in a folder changed."""
    paths = [path, *(entry.path for entry in os.scandir(path))]
    return time.time() - max(os.stat(each).st_mtime for each in paths)
