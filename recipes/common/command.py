"""What the command lines of all ``infer.py`` share: errors and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import soundfile

Item = TypeVar("Item")


def told(work: Callable[[], int]) -> int:
    """Do ``work``, and return its exit code: 2 after an error that the user can mend, on stderr."""
    try:
        return work()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def each_of(items: Iterable[Item], work: Callable[[Item], None]) -> int:
    """Do ``work`` with each item; the exit code, 2 if any of them failed.

    One that cannot be used, or whose result cannot be written, is named on stderr, and the others
    are still done.
    """
    failed = False
    for item in items:
        try:
            work(item)
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0
