"""Output of a run to the terminal, which may be a file on a full disk or a closed pipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

logger = logging.getLogger("trainer")


class TolerantStream:
    """Text stream that drops text that cannot be written, with one warning.

    Args:
        stream: the stream to write to, whose other attributes it has too.
        name: its name in the warning, such as "stdout".
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._warned = stream, name, False

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._warn(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or do nothing."""
        try:
            self._stream.flush()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True  # Before the warning, which comes back here.
            logger.warning("%s lacks text from here on: %s", self._name, error.strerror or error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Context manager in which a full disk or a closed pipe behind the output ends no run."""
    outer = sys.stdout, sys.stderr
    out, err = TolerantStream(sys.stdout, "stdout"), TolerantStream(sys.stderr, "stderr")
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        if sys.stdout is out:  # Not if somebody has redirected it meanwhile, as notebooks do.
            sys.stdout = outer[0]
        if sys.stderr is err:
            sys.stderr = outer[1]
