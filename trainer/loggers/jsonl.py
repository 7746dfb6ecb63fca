"""Logger that writes `metrics.jsonl`.

A line is one JSON object: {"kind": "step", "step": 120, "loss": 1.2, …} for a logged step,
{"kind": "stage", "stage": "valid", "epoch": 2, "step": 120, "wer": 3.2, …} for a finished stage,
{"kind": "monitor", "step": 100, "layers": {…}, …} for layer norms. ``step`` is the number of
optimizer steps since the run began. The file is strict JSON: a number that is not finite is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.loggers.protocol import Logger
from trainer.loggers.text import LineFile


class JsonlLogger(Logger):
    """Write records as lines of `metrics.jsonl`; histograms, pictures and sounds are left out.

    Args:
        folder: run folder. A partial last line, as a killed process leaves it, is cut away.

    Raises:
        OSError: if the file cannot be opened, written or read (all methods).
    """

    def __init__(self, folder: Path) -> None:
        self._file = LineFile(folder / "metrics.jsonl")

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write a record of numbers."""
        self.write({"kind": kind, **values, "step": step})

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record as it is.

        Args:
            record: values by name; what JSON does not know is converted by `as_json`.
        """
        self._file.append(json.dumps(as_json(record), ensure_ascii=False, allow_nan=False))

    def lines(self) -> int:
        """Return the number of records in the file."""
        return len(self._file.read())

    def resume(self, step: int, lines: int | None = None) -> None:
        """Remove records of later steps, which a resumed run is about to write again.

        Args:
            step: optimizer steps at the checkpoint. Records without a step are kept, lines that
                cannot be read are removed.
            lines: number of records at the checkpoint; those behind them are removed, too, since
                several records may have one step. None: as many as there are.
        """
        known = self._file.read()
        kept = [line for line in known[:lines] if _step_of(line) <= step]
        if len(kept) < len(known):
            self._file.replace(kept)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()


def as_json(value: Any) -> Any:
    """Convert a value to what strict JSON can hold.

    Args:
        value: mappings, lists and tuples, nested in any way, of numbers, texts, tensors and NumPy
            arrays. Reading a tensor on a GPU waits for the device.

    Returns:
        Dicts and lists of numbers, texts, booleans and None: None for NaN and infinities, a number
        or lists of numbers for a tensor, the text of anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    if hasattr(value, "tolist"):  # Tensors, and NumPy's numbers and arrays.
        return as_json(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _step_of(line: bytes) -> float:
    """Return the step of a line: -inf where it has none, inf where it cannot be read."""
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError, RecursionError):
        return math.inf
    return step if isinstance(step, (int, float)) else -math.inf
