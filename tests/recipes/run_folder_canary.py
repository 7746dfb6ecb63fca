"""Classes of an imported module that no file may have made."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Eraser:
    """Empties a file when it is deleted, as some classes of well-known packages do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __del__(self) -> None:
        Path(self.name).write_text("")


@dataclass
class Record:
    """Plain, but of another program."""

    name: str


Pair = namedtuple("Pair", "a b")


class Closing(namedtuple("Closing", "a")):
    """Named tuple with a finaliser."""

    def __del__(self) -> None:
        raise AssertionError("made from a file")


class Finalised(NamedTuple):
    """The same, in the other notation."""

    a: Any

    def __del__(self) -> None:
        raise AssertionError("made from a file")


class Writing(namedtuple("Writing", "a")):
    """Named tuple whose constructor writes a file."""

    def __new__(cls, a: str) -> Writing:
        Path(a).write_text("")
        return super().__new__(cls, a)
