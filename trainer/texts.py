"""Parts of messages: numbers, lists of names, and errors, each on one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from trainer.untrusted import printable

MAX_LINE = 300  # characters of an error


def number(value: float) -> str:
    """Return a number with four significant digits, and an integer as it is."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def spread(values: Iterable[float | None], form: Callable[[float], str] = number) -> str:
    """Return mean and standard deviation of the known values, such as "3.2 ± 0.1"; or ""."""
    from statistics import fmean, stdev  # Here, to keep it out of the start of training.

    known = [each for each in values if each is not None and math.isfinite(each)]
    try:
        return " ± ".join(form(measure(known)) for measure in (fmean, stdev)[: len(known)])
    except OverflowError:  # For values near the largest float.
        return "too large"


def first_names(names: Iterable[str], most: int = 3, between: str = ", ") -> str:
    """Return the first ``most`` names and the number of the others, such as "a, b and 3 more"."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return between.join(found[:most]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type; libraries may add pages."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return printable(line[:MAX_LINE])


def cause(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"
