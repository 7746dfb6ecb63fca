"""Frames of a traceback: tell users' code from that of libraries."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch


@functools.cache
def _libraries() -> set[Path]:
    """Return the folders of Python, of installed packages and of the trainer."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = [Path(__file__).parent, Path(torch.__path__[0]).parent]
    return {path.resolve() for path in (*own, *map(Path, places))}


def is_library(file: str) -> bool:
    """Return True for a file of Python, of an installed package, or of the trainer."""
    return file.startswith("<") or not _libraries().isdisjoint(Path(file).resolve().parents)
