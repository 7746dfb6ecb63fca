"""Checks of what a YAML or a saved state gives, with sentences that say what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(owner: str, name: str, value: float, low: int) -> int:
    """A count, `low` or more. A YAML reads 25e3 as a float, so that whole floats count as well."""
    if not _is_number(value) or not math.isfinite(value) or value != int(value) or value < low:
        raise ValueError(f"{owner}: {name} must be a whole number, {low} or more; got {value!r}")
    return int(value)


def within(owner: str, name: str, value: float, low: float, high: float, ends: str = "[]") -> float:
    """A number inside an interval; `ends`, such as "(]", says which of its ends belong to it."""
    above = _is_number(value) and (value >= low if ends[0] == "[" else value > low)
    below = _is_number(value) and (value <= high if ends[1] == "]" else value < high)
    if not (above and below):
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{owner}: {name} must be a number in {interval}; got {value!r}")
    return float(value)


def one_of(owner: str, name: str, value: str, allowed: Collection[str]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be {' or '.join(allowed)}; got {value!r}")
    return value


def same_keys(owner: str, state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """A saved state must hold exactly the expected keys, no matter in which order."""
    missing, unexpected = set(expected) - set(state), set(state) - set(expected)
    if missing or unexpected:
        raise ValueError(
            f"the saved state does not fit {owner}: missing {sorted(missing) or 'nothing'}, "
            f"unexpected {sorted(unexpected) or 'nothing'}"
        )
