"""Linear and logarithmic axes with round ticks, and the formatting of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

TINY = 1e-290  # Smaller powers of ten lose digits.


class Axis:
    """Map a range of values to pixels.

    The axis is logarithmic if all values are positive and span more than 1:50.

    Args:
        values: the values to show; NaN and infinities are not allowed.
        pixels: positions of the lower and the upper end of the axis.
        from_zero: True for a linear axis from 0.
        whole: True for whole numbers, such as steps: a linear axis with whole ticks.
    """

    def __init__(
        self,
        values: Iterable[float],
        pixels: tuple[float, float],
        from_zero: bool = False,
        whole: bool = False,
    ) -> None:
        known = list(values)
        low, high = min(known, default=0.0), max(known, default=1.0)
        self.start, self.end = pixels
        self.whole = whole
        self.log = not from_zero and not whole and low > TINY and high / low >= 50
        if self.log:
            low, high = math.log10(low), math.log10(high)
        low = min(low, 0.0) if from_zero else low
        rounding = max(1e-4 * max(abs(low), abs(high)), TINY)
        if whole:
            room = 0.5 if high - low < 1 else 0.0
        elif high - low <= rounding:  # All values are equal up to rounding.
            room = 0.1 * abs(high) if abs(high) > TINY else 1.0
        else:
            room = 0.04 * (high - low)
        low, high = low - room * (not from_zero or low < 0), high + room
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        """Return the pixel of a value; NaN if the axis cannot show it."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        place = math.log10(value) if self.log else value
        share = (place - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Return about ``count`` round values within the range, with their labels."""
        if self.log:
            return self._decades()
        step = _round_up((self.high - self.low) / count)
        step = max(1.0, step) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(n * step, number(n * step, step)) for n in range(first, last + 1)]

    def _decades(self) -> list[tuple[float, str]]:
        low, high = math.floor(self.low), math.ceil(self.high)
        every = math.ceil((high - low) / 6)
        parts = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        ticks = [part * 10.0**n for n in range(low, high + 1, every) for part in parts]
        return [(tick, number(tick)) for tick in ticks if self.low <= math.log10(tick) <= self.high]


def _round_up(step: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((part * power for part in (1, 2, 5) if part * power >= step), 10 * power)


def number(value: float, step: float | None = None) -> str:
    """Format a number, such as "3.21", "12.35k" or "1e−5".

    Args:
        value: the number; NaN and infinities become a dash.
        step: distance of two ticks, whose last digit is the last one shown. By default four digits
            without trailing zeros.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size = _exponent(value)
    digits = 4 if step is None else max(1, size - _exponent(step) + 1)
    size = _exponent(float(f"{value:.{digits - 1}e}"))  # 9999.9 is rounded up to 10k.
    if not -4 < size < 15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{_short(mantissa)}e{int(exponent)}"
    elif size >= 4:
        unit = size // 3
        decimals = max(0, digits - 1 - size + 3 * unit)
        text = _short(f"{value / 10.0 ** (3 * unit):.{decimals}f}") + " kMGT"[unit]
    else:
        text = f"{value:.{max(0, digits - 1 - size)}f}"
        text = _short(text) if step is None else text
    return text.replace("-", "−")


def count(value: float) -> str:
    """Format a whole number in full, such as "12,345", and any other by `number`."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value.is_integer() else number(value)


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


def _short(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
