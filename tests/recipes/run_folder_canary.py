"""Classes of an imported module that no file may have made."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path


class Eraser:
    """Empties a file when it is deleted, as some classes of well-known packages do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __del__(self) -> None:
        Path(self.name).write_text("")


Pair = namedtuple("Pair", "a b")


class Closing(namedtuple("Closing", "a")):
    """Named tuple with a finaliser."""

    def __del__(self) -> None:
        raise AssertionError("made from a file")
