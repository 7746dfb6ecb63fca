"""Reading JSON from files that may be broken or hostile: any such content raises `BadJson`.

The JSON is strict and in UTF-8, with a byte order mark or without. Numbers fit a float, and nesting
is limited, so that a caller may convert numbers and walk through the values without checks.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from trainer.untrusted import confined

MAX_DEPTH = 50  # of nested lists and mappings
MAX_DIGITS = 300  # of a whole number; the largest float has 309
MAX_BYTES = 16 << 20  # of one value
MAX_LINE = 4 << 20  # bytes of a line; one of a monitored network with 1,000 layers has 200,000


DIGITS = bytes.maketrans(b"123456789E", b"000000000e")
# A number that no float holds has at least so many digits, or an exponent of three.
LARGE = (b"0" * 200, b"e000", b"e+000")


class BadJson(ValueError):
    """Error for content that is not JSON as this module reads it."""


def parse(data: bytes, allow_nan: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        data: the text.
        allow_nan: take NaN and infinities, too, as Python writes them.

    Raises:
        BadJson: the text is not strict JSON in UTF-8, is too large or too deeply nested, or holds
            too large a number.
    """
    if len(data) > MAX_BYTES:
        raise BadJson(f"it has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        digits = data.translate(DIGITS)
        large = any(each in digits for each in LARGE)
        value = _decoder(allow_nan, large).decode(data.decode("utf-8-sig"))
    except RecursionError:
        raise BadJson("it is nested too deeply") from None
    except ValueError as error:
        raise BadJson(str(error)) from error
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def read(path: Path) -> Any:
    """Return the value of a JSON file, which may not hold NaN or infinities.

    Raises:
        BadJson: the content is not such JSON; names the path.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return parse(data)
    except BadJson as error:
        raise BadJson(f"{path}: it is not JSON ({error})") from None


def mapping(data: bytes) -> dict[str, Any]:
    """Return the mapping of a JSON text; an empty one for anything else."""
    with suppress(BadJson):
        value = parse(data)
        return value if isinstance(value, dict) else {}
    return {}


def read_mapping(folder: Path, path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file in a folder; an empty one for anything else."""
    with suppress(OSError, ValueError):
        value = read(confined(folder, path))
        return value if isinstance(value, dict) else {}
    return {}


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; a line of more than `MAX_LINE` bytes becomes an empty one."""
    while line := file.readline(MAX_LINE):
        if line.endswith(b"\n") or len(line) < MAX_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield b""


def _constant(text: str) -> Any:
    raise BadJson(f"{text} is no number of JSON")


def _int(text: str) -> int:
    if (digits := len(text.lstrip("-"))) > MAX_DIGITS:
        raise BadJson(f"a number has {digits} digits, more than {MAX_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson(f"the number {text[:40]} is too large")
    return value


@functools.cache
def _decoder(allow_nan: bool, large: bool) -> json.JSONDecoder:
    """Return a decoder; one that does not check each number takes half the time."""
    checks: dict[str, Any] = {"parse_int": _int, "parse_float": _float} if large else {}
    return json.JSONDecoder(parse_constant=float if allow_nan else _constant, **checks)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            part
            for each in level
            for part in (each.values() if type(each) is dict else each)
            if type(part) is dict or type(part) is list
        ]
    if level:
        raise BadJson(f"it is nested more than {MAX_DEPTH} deep")
