"""Last lines of a run: its best checkpoint, its report and the next commands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer import distributed
from trainer.checkpoint.checkpointer import Checkpointer, ranked
from trainer.cli.arguments import ALLOW, split_allowed
from trainer.config.registry import recipe_of
from trainer.run_files import HYPERPARAMS


def end_lines(
    folder: Path, checkpointer: Any, source: Path | None, argv: Sequence[str] | None
) -> list[str]:
    """Return the last lines of a run: best checkpoint, report, commands to resume, test and use.

    ``source`` is the file of the program's `train`; ``argv`` is None for a run by `launch`.
    """
    lines = _checkpoint(checkpointer) if isinstance(checkpointer, Checkpointer) else []
    usable = bool(lines) and argv is not None
    report = folder / "report.html"
    lines += [f"report: {report}"] if report.is_file() else []
    for line in go_on(folder, argv):
        lines.append(line)
        if usable:
            lines.append(f"{line.replace('to go on', 'to test', 1)} --test_only")
    if usable and source is not None and (infer := source.with_name("infer.py")).is_file():
        words = shlex.join([_python(), from_here(infer), str(folder)])
        package = recipe_of(source)
        takes = "FILE" if package is None else getattr(sys.modules[package], "INFER", "FILE")
        lines.append(f"to use it: {words} {takes}")
    return lines


def go_on(folder: Path, argv: Sequence[str] | None) -> list[str]:
    """Return the line with the command that resumes a run; none in a notebook."""
    program = Path(sys.argv[0])
    if "ipykernel" in sys.modules or program.suffix != ".py" or not program.is_file():
        return []
    start = [_python()]
    if distributed.launched():
        here, every = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
        if here is None or here != every:  # Other machines need commands of their own.
            return []
        start = ["torchrun", "--standalone", f"--nproc_per_node={here}"]
    given = sys.argv[1:]
    if argv is not None:
        allowed = [f"{ALLOW}={name}" for name in split_allowed(argv)[0]]
        given = [str(folder / HYPERPARAMS), *allowed]
    return [f"to go on: {shlex.join([*start, from_here(program), *given])}"]


def _checkpoint(checkpointer: Checkpointer) -> list[str]:
    found = checkpointer.list_checkpoints()
    for rule in checkpointer.retention.best:
        for best in ranked(found, rule.metric, rule.mode)[:1]:
            return [f"best checkpoint: {rule.metric} {best.meta[rule.metric]:.4g}, {best.path}"]
    return [f"newest checkpoint: {each.path}" for each in found[:1]]


def _python() -> str:
    """Return the shortest name by which a shell finds this Python."""
    found, this = shutil.which("python"), Path(os.path.abspath(sys.executable))
    # Console scripts run bin/python3, which equals bin/python of their environment. Links are not
    # followed: those of all environments lead to the same Python.
    same = found is not None and Path(os.path.abspath(found)).parent == this.parent
    return "python" if same and os.path.samefile(str(found), this) else sys.executable


def from_here(path: Path) -> str:
    """Return a path relative to the current folder if it lies in it, else unchanged."""
    try:
        return str(Path(os.path.abspath(path)).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
