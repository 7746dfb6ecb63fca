"""`python -m trainer replay RUN STEP`: run a recipe again to replay a skipped step.

The run folder records the script that started the run. It is run again with the run's own settings,
but only if it lies in the current folder and not in the run folder, so that a folder of unknown
origin cannot choose what runs; `--script` names another script.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.folder import HYPERPARAMS, LAUNCH_HEADER

USAGE = "usage: python -m trainer replay RUN STEP [--script train.py] [--key value]…"


def replay(argv: Sequence[str]) -> int:
    """Run the command that `command` returns, and return its exit code."""
    made = command(argv)
    print(shlex.join(made), file=sys.stderr, flush=True)
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    return subprocess.run(made, env={**os.environ, "PYTHONPATH": path}).returncode


def command(argv: Sequence[str]) -> list[str]:
    """Return the command that replays a step: RUN, STEP, and further arguments of the recipe.

    Raises:
        ValueError: the folder has no such step, or does not say how the run was started.
    """
    parser = argparse.ArgumentParser(
        usage=USAGE.removeprefix("usage: "), add_help=False, allow_abbrev=False
    )
    parser.add_argument("--script", nargs="?")
    given, rest = parser.parse_known_args(argv)
    if len(rest) < 2 or rest[0].startswith("-") or rest[1].startswith("-"):
        raise ValueError(USAGE)
    run, step, *more = rest
    folder = Path(run)
    if not (folder / HYPERPARAMS).is_file():
        raise ValueError(f"{run} is not a run folder: it has no {HYPERPARAMS}")
    if (folder / HYPERPARAMS).read_text("utf-8").startswith(LAUNCH_HEADER):
        raise ValueError(
            f"{run} is a run by trainer.launch: call launch again with the hyperparameter "
            f"replay={str(folder / 'nonfinite' / step)!r}"
        )
    case = folder / "nonfinite" / step
    if not (case / "batch.pt").is_file():
        found = sorted(
            path.parent.relative_to(folder / "nonfinite").as_posix()
            for path in (folder / "nonfinite").rglob("batch.pt")
        )
        kept = f"there are {', '.join(found)}" if found else "no skipped step was kept"
        raise ValueError(f"{run} has no skipped step {step}: {kept}")
    path = Path(given.script) if given.script is not None else _recorded(folder)
    if not path.is_file():
        raise ValueError(f"there is no {path}: name the recipe's train.py with --script")
    settings = [str(folder / HYPERPARAMS), "--output_folder", run, "--replay", str(case)]
    return [sys.executable, str(path), *settings, *more]


def _recorded(folder: Path) -> Path:
    """Return the script of the run's last command, if it lies in the current folder."""
    try:
        last = (folder / "command.txt").read_text("utf-8").splitlines()[-1]
        script = Path(shlex.split(last)[3])  # date, time, python, script
    except (OSError, IndexError, ValueError):
        raise ValueError(
            f"{folder / 'command.txt'} does not say how the run was started: name the recipe's "
            "train.py with --script"
        ) from None
    place, here = script.resolve(), Path.cwd()
    if script.suffix != ".py" or here not in place.parents or folder.resolve() in place.parents:
        raise ValueError(
            f"the run was started by {script}, which is not in the current folder {here}: go "
            "where it was started, or name it with --script if you trust it"
        )
    return script
