"""Facts of runs, read from their folders: state, metrics, steps, age; and tables of them.

Only JSON and manifests of checkpoints are read, and nothing is built or changed: a run may be going
on, have crashed, or come from elsewhere.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import json_files
from trainer.cli import session
from trainer.cli.folder import LOCK, STATE, RunFolder, holds_lock
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration
from trainer.config.reading import get
from trainer.config.run_folder import check_tags
from trainer.loggers.files import numbers
from trainer.metrics import RESERVED
from trainer.run_files import HYPERPARAMS, is_run
from trainer.texts import number, spread
from trainer.untrusted import confined, printable

MAX_TAIL = 1 << 18  # bytes at the end of metrics.jsonl that are read
MAX_DEPTH = 6  # of folders that are searched for runs
MAX_METRICS = 3  # in a line of the list
MAX_CELL = 60  # characters
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class RunFacts:
    """State and metrics of a run, as read from its folder."""

    folder: Path
    # "running", "finished", "stopped", "crashed", or "unknown" for a run of an earlier version.
    state: str
    error: str  # Error of a crashed run; empty otherwise.
    step: int | None  # Optimizer steps; None where unknown.
    stage: str  # Stage of the metrics, "test" or "valid".
    metrics: dict[str, float]  # Last metrics of the test, else of the validation.
    changed: float  # Time of the last change in seconds since 1970.
    notes: tuple[str, ...]  # Sentences about files that could not be read.


def find_runs(roots: Iterable[Path]) -> Iterator[Path]:
    """Yield the run folders in and below folders, sorted; links are not followed."""
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{printable(str(root))} is no folder")
        for place, folders, _ in os.walk(root):
            here = Path(place)
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            if is_run(here):
                yield here
            if is_run(here) or len(here.relative_to(root).parts) >= MAX_DEPTH:
                folders.clear()


def run_folders(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the run folders among paths, and sentences about others; `~` is the home folder."""
    folders: list[Path] = []
    problems: list[str] = []
    for path in (Path(os.path.expanduser(each)) for each in given):
        if is_run(path):
            folders.append(path)
        else:
            why = f"is no run folder: it has no {HYPERPARAMS} of a run"
            problems.append(f"{printable(str(path))} {why if path.exists() else 'does not exist'}")
    return folders, problems


def beside(run: Path, ending: str) -> Path:
    """Return the path of a run folder with an ending, as in "1234-average"; works for ".", too."""
    named = run.resolve() if run.name in ("", "..") else run
    return named.with_name(f"{run.resolve().name}-{ending}")


def read_run(folder: Path) -> RunFacts:
    """Return the facts of a run; files that cannot be read are named in its notes."""
    notes: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            notes.append(printable(session.message(error)))

    record: Any = {}
    stages: dict[str, dict[str, float]] = {}
    step: int | None = None
    with noted():
        if os.path.lexists(folder / STATE):
            record = json_files.read(confined(folder, folder / STATE))
    record = record if isinstance(record, dict) else {}
    with noted():
        stages, step = _last_records(folder)
    with noted():
        step = max(RunFolder(folder).progress()[0], step or 0) or None
    stage = next((each for each in ("test", "valid") if stages.get(each)), "")
    state = str(record.get("state", "finished" if "test" in stages else "unknown"))
    state = "running" if is_locked(folder) else "crashed" if state == "running" else state
    error, changed = "", 0.0
    if state == "crashed":
        error = printable(str(record.get("error") or "killed, or the machine went down"))
    for name in ("metrics.jsonl", "train.log", STATE, HYPERPARAMS):
        with suppress(OSError):
            changed = max(changed, (folder / name).lstat().st_mtime)
    state, metrics = printable(state)[:MAX_CELL], stages.get(stage, {})
    return RunFacts(folder, state, error, step, stage, metrics, changed, tuple(notes))


def is_locked(folder: Path) -> bool:
    """Return True if any process holds the lock of a run folder; do not take it."""
    if holds_lock(folder):
        return True
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.lockf(file, os.F_TEST, 0)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(file)
    return False


def _last_records(folder: Path) -> tuple[dict[str, dict[str, float]], int | None]:
    """Return the metrics of the last record of each stage, and the last step.

    Incomplete lines, such as the last one of a killed run, are left out.
    """
    path = folder / "metrics.jsonl"
    if not os.path.lexists(path):
        return {}, None
    with confined(folder, path).open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - MAX_TAIL))
        lines = file.read(MAX_TAIL).split(b"\n")
    stages: dict[str, dict[str, float]] = {}
    step = None
    for line in reversed(lines):
        record = json_files.mapping(line)
        place = record.get("step")
        if step is None and isinstance(place, int) and abs(place) < 1e15:
            step = place
        stage = record.get("stage")
        if record.get("kind") == "stage" and isinstance(stage, str) and stage not in stages:
            found = {k: v for k, v in record.items() if k not in RESERVED or k == "loss"}
            stages[stage] = {k: v for k, v in numbers(found) if v is not None}
    return stages, step


# ---------------------------------------------------------------------------------------- tables


def list_lines(runs: Sequence[RunFacts]) -> list[str]:
    """Return the lines of `cortex ls`: a table of runs, and sentences about them."""
    rows = [("run", "state", "step", "metrics", "age")]
    for run in runs:
        names = [name for name in run.metrics if name != "loss"] or list(run.metrics)
        text = ", ".join(f"{printable(k)} {number(run.metrics[k])}" for k in names[:MAX_METRICS])
        age = duration(time.time() - run.changed)
        rows.append((*_first_cells(run), f"{run.stage} {text}".strip(), age))
    return _with_sentences(table(rows), runs, {})


def _first_cells(run: RunFacts) -> tuple[str, str, str]:
    step = "" if run.step is None else str(run.step)
    return printable(str(run.folder)), run.state, step


def _with_sentences(
    lines: list[str], runs: Sequence[RunFacts], unread: Mapping[Path, str]
) -> list[str]:
    """Return the lines of a table, followed by errors of runs and of reading them."""
    notes = [
        f"{printable(str(run.folder))}: {text}"
        for run in runs
        for text in (unread.get(run.folder), run.error, *run.notes)
        if text
    ]
    return [*lines, *([""] if notes else []), *notes]


def compare_lines(runs: Sequence[RunFacts]) -> list[str]:
    """Return the lines of `cortex compare`: a table, and sentences about the runs.

    The table has a row for each run, with its last metrics and the hyperparameters that differ, and
    a row with mean and standard deviation for runs that differ only in their seeds.
    """
    values, unread = {}, {}
    for run in runs:
        try:
            values[run.folder] = settings(run.folder)
        except (ValueError, OSError) as error:
            unread[run.folder] = printable(str(error))
    every = {key: [each.get(key) for each in values.values()] for key in _keys(values.values())}
    keys = [key for key, found in every.items() if any(each != found[0] for each in found)]
    tests = [run.metrics for run in runs]
    only_loss = any([*each] == ["loss"] for each in tests)
    names = [name for name in _keys(tests) if name != "loss" or only_loss]
    rows: list[tuple[str, ...]] = [("run", "state", "step", "stage", *names, *keys)]
    groups: dict[tuple[str, ...], list[tuple[RunFacts, dict[str, str]]]] = {}
    for run in runs:
        own = values.get(run.folder, {})
        cells = {key: _cell(own.get(key)) for key in keys}
        measured = (number(run.metrics[n]) if n in run.metrics else "" for n in names)
        rows.append((*_first_cells(run), run.stage, *measured, *cells.values()))
        if run.folder in values:
            alike = {**cells, "seed": "any"} if "seed" in cells else cells
            groups.setdefault((run.stage, *alike.values()), []).append((run, cells))
    for (stage, *shared), group in groups.items():
        if len({cells.get("seed") for _, cells in group}) > 1:
            means = (spread(run.metrics.get(name) for run, _ in group) for name in names)
            rows.append((f"mean of {len(group)}", "", "", stage, *means, *shared))
    return _with_sentences(table(rows), runs, unread)


def settings(folder: Path) -> dict[str, Any]:
    """Return the hyperparameters of a run by key, without references and neutral keys.

    Paths in the run folder are relative to it.
    """
    configuration = Configuration(folder / HYPERPARAMS, run_folder=True)
    check_tags(configuration.root)
    found = Settings(configuration.root, configuration.registry)
    own = str(getattr(get(configuration.root, "output_folder"), "value", "")) or str(folder)
    return {
        key: value.replace(f"{own}{os.sep}", "") if isinstance(value, str) else value
        for key, value in found.values.items()
        if found.origin(key) == key and found.kind(key) != "neutral"
    }


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for each in mappings for key in each))


def _cell(value: Any) -> str:
    text = printable(str(value)) if value is not None else ""
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """Return a time in its largest unit, such as "3 h"."""
    for length, unit in UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "0 s"


def size(count: int) -> str:
    """Return a number of bytes, such as "1.2 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
