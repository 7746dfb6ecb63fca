"""Files that may come from elsewhere: confined paths, limited memory, no foreign modules."""

from __future__ import annotations

import os
import resource
import stat
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

SPARE_BYTES = 1 << 29  # memory allowed beyond that for the files of a folder
BYTES_PER_CORE = 1 << 25  # for the stacks of torch's threads, which may start at any time
MEMORY_PER_BYTE = 8  # copies of the weights: model, file, state dict, and two in float64 for a mean

# Sources that the user has named for the run folder being read; None while none is read.
_named: ContextVar[set[str] | None] = ContextVar("_named", default=None)
_limit = threading.RLock()  # One thread at a time sets the memory limit of the process.


def confined(folder: str | Path, path: str | os.PathLike[str]) -> Path:
    """Check that a path lies in a folder once links are followed, and return it unchanged.

    Args:
        folder: the folder.
        path: the path; it need not exist.

    Raises:
        ValueError: it leads outside, or to something that is neither a file nor a folder.
    """
    real = os.path.realpath(path)
    if not _is_in(real, os.path.realpath(folder)):
        raise ValueError(f"{str(path)!r} lies outside of {folder}")
    if os.path.lexists(real):
        mode = os.lstat(real).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{str(path)!r} is neither a file nor a folder")
    return Path(path)


def _is_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


@contextmanager
def sources_confined() -> Iterator[set[str]]:
    """Context manager in which `check_source` accepts only sources in the set that it yields."""
    named: set[str] = set()
    token = _named.set(named)
    try:
        yield named
    finally:
        _named.reset(token)


def check_source(source: str) -> None:
    """Raise ValueError for a source of weights that the run folder names and its user does not."""
    named = _named.get()
    if named is not None and source not in named:
        raise ValueError(
            f"the run folder lacks its frozen weights, and has their source, {source!r}, which is "
            f"outside of it: name it, as in trainer.load(run, overrides={{'source': {source!r}}})"
        )


def read_text(folder: str | Path, name: str, at_most: int = 1 << 20) -> str:
    """Return the text of a file in a folder.

    Raises:
        ValueError: it lies elsewhere, is not UTF-8, or has more than ``at_most`` bytes.
        OSError: it cannot be read.
    """
    path = confined(folder, Path(folder) / name)
    with path.open("rb") as file:
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise ValueError(f"{path} has more than {at_most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def printable(text: str) -> str:
    """Return a text without control characters, which a terminal would interpret."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def bytes_on_disk(folder: str | Path) -> int:
    """Return the bytes that the files below a folder take on the disk, without holes."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # A run that goes on replaces its checkpoints.
                info = os.lstat(os.path.join(place, name))
                found += 512 * info.st_blocks if stat.S_ISREG(info.st_mode) else 0
    return found


@contextmanager
def memory_in_proportion(folder: str | Path, more: int = 0) -> Iterator[None]:
    """Context manager that limits the memory of this process in proportion to a folder's files.

    Memory beyond the limit raises MemoryError, or torch's RuntimeError, so that a false size in a
    file does not get the process killed. The limit holds for all threads, on Linux only.

    Args:
        folder: the folder.
        more: bytes of weights from elsewhere that the folder claims to need; they raise the limit
            by half of the free memory at most.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    with _limit:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        used = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
        wanted = int(used.split()[1]) * 1024 + SPARE_BYTES + BYTES_PER_CORE * (os.cpu_count() or 1)
        wanted += MEMORY_PER_BYTE * bytes_on_disk(folder)
        wanted += min(MEMORY_PER_BYTE * max(more, 0), _free_bytes() // 2)
        known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(each.split()[1]) * 1024 for each in lines if each.startswith("MemAvailable"))


class _Finder:
    """Import hook that skips entries of Python's path for which ``holds`` returns True."""

    def __init__(self, holds: Callable[[str, str], bool]) -> None:
        self.holds = holds

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module; return None if no entry is skipped, so that Python finds it itself."""
        own = [each for each in sys.meta_path if isinstance(each, _Finder)]
        others = [each for each in sys.path if not any(one.holds(each, name) for one in own)]
        if path is not None or len(others) == len(sys.path):
            return None
        for finder in sys.meta_path:
            places = others if finder is PathFinder else None
            found = None if finder in own else finder.find_spec(name, places, target)
            if found is not None:
                return found
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def no_modules_from(folder: str | Path) -> Iterator[None]:
    """Context manager in which no module is imported from a folder or below it.

    A package that is the folder or contains it is not imported either, since the folder may have
    the name of a library. Python's own and installed packages are imported wherever they are.
    """
    root = os.path.realpath(folder)
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = [os.path.realpath(sysconfig.get_path(kind)) for kind in kinds]

    def inside(entry: str) -> bool:
        real = os.path.realpath(entry or os.curdir)
        return _is_in(real, root) and not any(_is_in(real, each) for each in installed)

    def holds(entry: str, name: str) -> bool:
        place = os.path.realpath(entry or os.curdir)
        own = os.path.realpath(Path(__file__).parents[1])
        package = os.path.realpath(os.path.join(place, name))
        return place not in (*installed, own) and _is_in(root, package)

    finder = _Finder(holds)
    hidden = [(place, entry) for place, entry in enumerate(sys.path) if inside(entry)]
    for place, _ in reversed(hidden):
        del sys.path[place]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for place, entry in hidden:
            sys.path.insert(place, entry)
