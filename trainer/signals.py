"""Requests to stop: SIGTERM and Ctrl-C end a run at its next safe point, after a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DEFAULT = int(signal.SIGTERM)  # Reported by a rank that stops because another one was signalled.
_received: int | None = None
_deferring = 0  # Depth of `at_safe_points` blocks.


class Interrupted(SystemExit):
    """Exit of a run that was asked to stop and has saved a checkpoint.

    Args:
        number: number of the signal; the exit code is 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def at_safe_points() -> Iterator[None]:
    """Context manager in which requests only set what `requested` returns.

    Outside of it a request raises at once: KeyboardInterrupt for SIGINT, `Interrupted` for others.
    """
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


def _handle(number: int, _frame: FrameType | None) -> None:
    global _received
    if not _deferring:
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)
    if number == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt  # A second Ctrl-C does not wait for a safe point.
    _received = number


def install() -> None:
    """Install the handler of SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def requested() -> int | None:
    """Return the number of the signal that asked for a stop, or None."""
    return _received


def reset() -> None:
    """Forget a request to stop."""
    global _received
    _received = None
