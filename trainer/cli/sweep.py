"""Sweeps: `cortex sweep FILE 'lr=1e-3,3e-4' 'width=128,256'` trains every combination of values.

Each run has a process and a run folder of its own: the default folder, or the folder in the YAML
with the values appended. Finished runs are left out and others resumed, so that the same command
continues a stopped sweep.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer import signals
from trainer.cli import session
from trainer.cli.arguments import configure
from trainer.cli.folder import RunFolder
from trainer.cli.recipe import Recipe
from trainer.cli.runs import read_run
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration
from trainer.options import RunOptions
from trainer.run_files import is_run

OPEN, CLOSE = "[{(", "]})"


class Trial(NamedTuple):
    """Run of a sweep."""

    arguments: tuple[str, ...]  # After the YAML.
    folder: Path
    finished: bool  # True for a finished run with the same hyperparameters.


def parse_values(given: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split texts such as "lr=1e-3,3e-4" into keys and their values.

    Commas within brackets and quotes belong to a value.
    """
    found: list[tuple[str, list[str]]] = []
    for text in given:
        key, equals, listed = text.partition("=")
        values = _split(listed)
        if not (key and equals and all(values)):
            raise ValueError(f"{text!r} is no list of values, such as 'lr=1e-3,3e-4'")
        twice = [each for each in values if values.count(each) > 1]
        if twice or key in dict(found):
            raise ValueError(f"{text!r} names {twice[0] if twice else key!r} twice")
        found.append((key, values))
    return found


def _split(text: str) -> list[str]:
    """Split a text at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for each in text:
        if quote or each in "'\"":
            quote = "" if each == quote else quote or each
        elif each in OPEN:
            depth += 1
        elif each in CLOSE:
            depth -= 1
        if each == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += each
    return [each.strip() for each in parts]


def trials(recipe: Recipe, given: Sequence[str], more: Sequence[str]) -> list[Trial]:
    """Return the runs of a sweep over values such as "lr=1e-3,3e-4".

    Every run has the arguments ``more`` as well.
    """
    allow = recipe.own_modules()
    choices = [[f"--{key}={each}" for each in values] for key, values in parse_values(given)]
    every = [(*chosen, *more) for chosen in itertools.product(*choices)]

    def configured(apart: bool) -> list[tuple[Configuration, RunOptions]]:
        return [configure([str(recipe.file), *each], allow, apart=apart) for each in every]

    settings = configured(apart=False)
    if len({str(options.output_folder) for _, options in settings}) < len(every):
        # The YAML names one folder for all of them.
        settings = configured(apart=True)
        every = [
            (*each, f"--output_folder={options.output_folder}")
            for each, (_, options) in zip(every, settings, strict=True)
        ]
    found: dict[Path, Trial] = {}
    for arguments, (configuration, options) in zip(every, settings, strict=True):
        folder = Path(str(options.output_folder))
        if folder in found:
            raise ValueError(
                f"{shlex.join(found[folder].arguments)} and {shlex.join(arguments)} have the same "
                f"folder, {folder}: neutral keys are not part of its name; leave out "
                "--output_folder, or let the YAML's refer to the key, as in !ref results/<seed>"
            )
        now = Settings(configuration.root, configuration.registry)
        finished = (
            not options.overwrite
            and is_run(folder)
            and read_run(folder).state == "finished"
            and not RunFolder(folder).changes(now)
        )
        found[folder] = Trial(arguments, folder, finished)
    return list(found.values())


def sweep(recipe: Recipe, runs: Sequence[Trial]) -> dict[Path, int]:
    """Train the unfinished runs, one after the other; return the exit codes by folder.

    If a run fails, the next one is still trained.

    Raises:
        Interrupted: after a signal, once the current run has ended.
    """
    codes: dict[Path, int] = {}
    with _signals_relayed() as run:
        for number, each in enumerate(runs, 1):
            place, code = f"[{number}/{len(runs)}] {each.folder}", 0
            _say(f"{place}: finished already" if each.finished else place)
            if not each.finished:
                code = run([sys.executable, *recipe.command(), *each.arguments])
            if code:
                _say(f"{place}: ended with exit code {code}")
            codes[each.folder] = code
    return codes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _signals_relayed() -> Iterator[Callable[[Sequence[str]], int]]:
    """Context manager that yields a function to run a command and forward signals to it.

    The command has its own process group, so that it gets each signal once, even Ctrl-C. After a
    signal the function raises `Interrupted` once the command has ended.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)  # Popen sends nothing to a process that has ended.

    def run(command: Sequence[str]) -> int:
        code = 0
        if not received:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, process_group=0,
                env=session.environment_of_children(),
            )  # fmt: skip
            children[:] = [child]
            if received:  # It came while the process started.
                child.send_signal(received[0])
            code = child.wait()
        if received:
            raise signals.Interrupted(received[0])
        return code if code >= 0 else 128 - code

    numbers = (*signals.ALWAYS, *signals.UNLESS_IN_USE)
    used = [each for each in numbers if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, handle) for each in used}
    try:
        yield run
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
