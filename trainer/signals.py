"""A polite stop: SIGTERM and Ctrl-C ask for it; the loop saves and leaves at a safe point."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DEFAULT = int(signal.SIGTERM)  # What a rank is told that another one received.
_received: int | None = None
_waiting = 0


class Interrupted(SystemExit):
    """The run was asked to stop, has saved a checkpoint, and leaves (exit code 128 + signal)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def at_safe_points() -> Iterator[None]:
    """While it lasts requests wait until they are asked for; outside they are followed at once."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


def _note(number: int, _frame: FrameType | None) -> None:
    global _received
    if not _waiting:
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)
    if number == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt  # The second Ctrl-C means now.
    _received = number


def install() -> None:
    """Turn SIGTERM and SIGINT into requests that `requested` reports."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def requested() -> int | None:
    """The signal that asked for a stop, or None."""
    return _received


def reset() -> None:
    """Forget a request."""
    global _received
    _received = None
