"""The records of a run, read from `metrics.jsonl` as curves and stages."""

from __future__ import annotations

import math
import re
import shlex
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

from trainer import json_files
from trainer.loggers.files import numbers
from trainer.metrics import RESERVED


class Curve:
    """Values over ascending steps or epochs; NaN is a gap, for a non-finite value."""

    __slots__ = ("xs", "ys")

    def __init__(self, xs: Iterable[float] = (), ys: Iterable[float] = ()) -> None:
        self.xs, self.ys = array("d", xs), array("d", ys)

    def add(self, x: float, y: float | None) -> None:
        """Append a point; one at or before an earlier x replaces all points from there on."""
        xs = self.xs
        while xs and xs[-1] >= x:
            xs.pop()
            self.ys.pop()
        xs.append(x)
        self.ys.append(math.nan if y is None else y)

    def known(self) -> list[tuple[float, float]]:
        """Return the points without the gaps."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(y)]

    def last(self) -> float:
        """Return the last known value; NaN without any."""
        return ([math.nan] + [y for _, y in self.known()])[-1]

    def sum(self) -> float:
        """Return the sum of the known values."""
        return math.fsum(y for _, y in self.known())

    def total(self) -> Curve:
        """Return the running sum; a gap adds nothing."""
        return Curve(self.xs, accumulate(y if math.isfinite(y) else 0.0 for y in self.ys))

    def scaled(self, factor: float) -> Curve:
        """Return a curve with every value multiplied by a factor."""
        return Curve(self.xs, (y * factor for y in self.ys))


Curves = defaultdict[str, Curve]


@dataclass(slots=True)
class History:
    """The records of a run.

    Of several records of one stage and epoch (resumed run, repeated test, summary of a test) the
    last counts.
    """

    # Curves of the step records by dotted name, such as "optimizers.main.lr".
    steps: Curves = field(default_factory=lambda: Curves(Curve))
    # Curves of monitor records by optimizer and name, such as gradient norms of every step.
    norms: dict[str, Curves] = field(default_factory=dict)
    layers: dict[str, Curves] = field(default_factory=dict)  # The same, by layer and name.
    warnings: list[tuple[float, str]] = field(default_factory=list)  # Step and text.
    stages: list[dict[str, Any]] = field(default_factory=list)  # In the order of the file.
    last_step: int = 0  # Largest optimizer step of any record.
    seconds: float = 0.0  # Training time at the last step record, in seconds.
    unreadable: int = 0  # Lines that are no records.

    def optimizers(self) -> list[str]:
        """Return the names of the optimizers, in the order of the file."""
        names = [key.split(".") for key in self.steps if key.startswith("optimizers.")]
        return list(dict.fromkeys(".".join(parts[1:-1]) for parts in names))

    def of_step(self, name: str) -> Curve:
        """Return a curve of the step records; empty if not logged."""
        return self.steps.get(name, Curve())

    def of_optimizer(self, optimizer: str, key: str) -> Curve:
        """Return a curve of one optimizer; empty if not logged."""
        return self.of_step(f"optimizers.{optimizer}.{key}")

    def stage_names(self) -> list[str]:
        """Return the names of the stages, in the order of the file."""
        return list(dict.fromkeys(str(record["stage"]) for record in self.stages))

    def measures(self) -> list[str]:
        """Return the dotted names of losses and metrics of the stage records."""
        names = (name for record in self.stages for name, _ in measures_of(record))
        return list(dict.fromkeys(names))

    def by_epoch(self, stage: str, measure: str) -> Curve:
        """Return a loss or metric of a stage over the epochs."""
        curve = Curve()
        for record in self.stages:
            values = dict(measures_of(record))
            if record["stage"] == stage and _is_number(record.get("epoch")) and measure in values:
                curve.add(record["epoch"], values[measure])
        return curve


def measures_of(record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the losses and metrics of a stage record with their dotted names."""
    return list(_numbers({key: value for key, value in record.items() if key not in RESERVED}))


def read_history(path: Path) -> History:
    """Read a `metrics.jsonl`; a missing one gives an empty history."""
    history = History()
    stages: dict[tuple[str, Any], dict[str, Any]] = {}
    if not path.exists():
        return history
    with path.open("rb") as file:
        for line in json_files.lines(file):
            record = json_files.mapping(line)
            kind, step = record.get("kind"), record.get("step")
            if kind == "step" and _is_number(step):
                _add(history.steps, step, record)
                if _is_number(record.get("seconds")):
                    history.seconds = record["seconds"]
            elif kind == "monitor" and _is_number(step):
                _add_monitor(history, step, record)
            elif "stage" in record:
                key = (str(record["stage"]), str(record.get("epoch")))
                # A later record replaces an earlier one, but keeps its additional keys.
                stages[key] = stages.pop(key, {}) | record
            else:
                history.unreadable += 1
                continue
            if _is_number(step):
                history.last_step = max(history.last_step, int(step))  # A run of only a test has 0.
    history.stages = list(stages.values())
    return history


def commands_of(lines: Iterable[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Return time and words of each command in `command.txt`, and the changes between starts."""
    commands, changes = [], []
    for line in filter(str.strip, lines):
        if line.startswith("#"):
            changes.append(line[1:].strip())
            continue
        found = re.fullmatch(r"(\d+-\d+-\d+ \d+:\d+:\d+)? *(.*)", line)
        time, command = (found[1] or "", found[2]) if found else ("", line)
        try:
            words = shlex.split(command)
        except ValueError:  # Cut within quotes.
            words = command.split()
        commands.append((time, words))
    return commands, changes


def _add(curves: Curves, step: float, record: Mapping[str, Any]) -> None:
    for name, value in _numbers(record):
        curves[name].add(step, value)


def _add_monitor(history: History, step: float, record: Mapping[str, Any]) -> None:
    """Add the norms of all steps of an optimizer since its last record, and its layers."""
    for name, facts in _parts(record.get("optimizers")).items():
        curves = history.norms.setdefault(name, Curves(Curve))
        for key in ("norms", "norms_after", "limits"):
            values = facts.get(key)
            if isinstance(values, list):
                for number, value in enumerate(values, int(step) - len(values) + 1):
                    curves[key].add(number, float(value) if _is_number(value) else None)
        _add(curves, step, facts)
    for name, facts in _parts(record.get("layers")).items():
        _add(history.layers.setdefault(name, Curves(Curve)), step, facts)
    warnings = record.get("warnings")
    if isinstance(warnings, list):
        history.warnings += [(step, text) for text in warnings if isinstance(text, str)]


def _parts(value: Any) -> dict[str, dict[str, Any]]:
    """Return the mappings in a mapping, by name."""
    found = value if isinstance(value, dict) else {}
    return {name: part for name, part in found.items() if isinstance(part, dict)}


def _is_number(value: object) -> TypeGuard[float]:
    """Return True if a value can be a step or an epoch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield the numbers of a record with their dotted names; None for unknown ones."""
    for name, value in numbers(record):
        # Beyond 1e300 distances overflow, and no chart can show the numbers.
        if value is None or not abs(value) < 1e300:
            yield name, None
        else:
            yield name, float(value) if abs(value) > 1e-300 else 0.0
