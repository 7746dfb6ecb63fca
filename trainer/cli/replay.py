"""`cortex replay RUN STEP`: rerun the batch of a skipped step.

The Brain of an installed recipe is built from the run folder, as by `trainer.load`, and reruns the
batch; no data is needed. A run of another script is replayed by that script if `--script` names it:
a run folder, which may come from elsewhere, never chooses a program.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.brain import Brain, FitArguments
from trainer.cli import session
from trainer.cli.arguments import parse
from trainer.config.hyperparameters import option_node
from trainer.config.reading import plain
from trainer.config.registry import recipe_of
from trainer.diagnostics import replay as replaying
from trainer.inference.loading import OF_THE_MODEL, OF_THE_TRAINING, open_run, recipe_class
from trainer.options import RunOptions
from trainer.report.history import commands_of
from trainer.run_files import HYPERPARAMS, LAUNCH_HEADER
from trainer.seed import seed_everything
from trainer.untrusted import confined, printable, read_text

USAGE = "usage: cortex replay RUN STEP [--script train.py] [--key value]…"
STEP = re.compile(r"\d{1,18}(-\d{1,9})?(/rank\d{1,6})?", re.ASCII)
MAX_SHOWN = 500  # characters of a recorded command in a message


def replay(argv: Sequence[str]) -> int:
    """Replay a step, and return the exit code."""
    run, case, script, more = _parse(argv)
    if script is None:
        _replay_recipe(run, case, more)
        return 0
    made = command(argv)
    print(shlex.join(made), file=sys.stderr, flush=True)
    return subprocess.run(made, env=session.environment_of_children()).returncode


def command(argv: Sequence[str]) -> list[str]:
    """Return the command that replays a step by the script that `--script` names."""
    run, case, script, more = _parse(argv)
    if script is None or not Path(script).is_file():
        raise ValueError(f"there is no {script}: name the run's train.py with --script")
    settings = [str(run / HYPERPARAMS), "--output_folder", str(run)]
    return [sys.executable, script, *settings, "--replay", str(case), *more]


def _parse(argv: Sequence[str]) -> tuple[Path, Path, str | None, list[str]]:
    """Return run, folder of the step, script, and arguments of the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script", nargs="?")
    given, rest = parser.parse_known_args(argv)
    if len(rest) < 2 or rest[0].startswith("-") or rest[1].startswith("-"):
        raise ValueError(USAGE)
    run, step, *more = rest
    folder = Path(os.path.expanduser(run))
    if not (folder / HYPERPARAMS).is_file():
        raise ValueError(f"{run} is not a run folder: it has no {HYPERPARAMS}")
    if read_text(folder, HYPERPARAMS).startswith(LAUNCH_HEADER):
        raise ValueError(
            f"{run} is a run by trainer.launch: call launch again with the hyperparameter "
            f"replay={str(folder / 'nonfinite' / step)!r}"
        )
    cases = folder / "nonfinite"
    if not STEP.fullmatch(step) or not (confined(folder, cases / step) / "batch.pt").is_file():
        found = [each.parent.relative_to(cases).as_posix() for each in cases.rglob("batch.pt")]
        names = ", ".join(sorted(filter(STEP.fullmatch, found)))
        kept = f"there are {names}" if names else "no skipped step was kept"
        raise ValueError(f"{run} has no skipped step {printable(step)}: {kept}")
    return folder, cases / step, given.script, more


def _replay_recipe(run: Path, case: Path, more: Sequence[str]) -> None:
    """Replay a step of an installed recipe, in this process and without its data."""
    package, kept = _recipe(run), replaying.load(case)
    with session.recorded(None, [package]):
        brain = _build(run, case, more, package)
        try:
            replaying.replay(brain, FitArguments([kept["epoch"]], [None]), case, kept)
        except replaying.Replayed:
            pass
        except ValueError:
            raise
        except Exception as error:  # Something that the recipe's train() sets up may be missing.
            raise ValueError(
                f"the step cannot be replayed without the data of the run ({type(error).__name__}: "
                f"{error}): name the recipe's train.py with --script"
            ) from error


def _build(run: Path, case: Path, more: Sequence[str], package: str) -> Brain:
    """Build the Brain of a recipe, as for training."""
    used, device = (*OF_THE_MODEL, *OF_THE_TRAINING), "auto"
    with open_run(run) as opened:
        for name, value in parse(more, opened.configuration):
            if name == "device":
                device = plain(option_node(name, value))
            elif name in RunOptions.names() and name not in used:
                raise ValueError(f"--{name} has no effect on a replay")
            else:
                opened.override({name: value})
        options = opened.options(*used, device=device, replay=str(case))
        kind = recipe_class(package, "BRAIN", opened.names())
        with opened.limited():
            seed_everything(options.seed)
            hparams: dict[str, Any] = opened.build()
            optimizer, checkpoints = hparams.get("opt_class"), opened.checkpointer
            brain: Brain = kind(hparams["modules"], optimizer, hparams, options, checkpoints)
            return brain


def _recipe(folder: Path) -> str:
    """Return the package of the installed recipe whose train.py the last command names."""
    try:
        commands, _ = commands_of(read_text(folder, "command.txt").splitlines())
        started = commands[-1][1]
        script = Path(started[1])  # Behind Python.
    except (ValueError, OSError, IndexError):
        raise ValueError(
            f"{folder / 'command.txt'} does not say how the run was started: name the recipe's "
            "train.py with --script"
        ) from None
    if (package := recipe_of(script)) is not None:
        return package
    shown = printable(shlex.join(started))
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"
    raise ValueError(
        f"the run was not started by an installed recipe, but by {shown}: name the script with "
        "--script if you trust it and the run folder"
    )
