"""Sweeps: `cortex sweep FILE 'lr=1e-3,3e-4' 'width=128,256'` trains every combination of values.

The combinations are trained one after the other, each in a process and a run folder of its own: its
default folder, or the folder that the YAML names with the values appended. Finished runs are left
out and others are resumed, so that the same command continues a sweep that was stopped.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer import signals
from trainer.cli.arguments import configure
from trainer.cli.folder import RunFolder
from trainer.cli.recipe import Recipe
from trainer.cli.runs import is_run, read_run
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration
from trainer.options import RunOptions

OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Trial:
    """Run of a sweep.

    Attributes:
        arguments: its arguments after the YAML.
        folder: its run folder.
        finished: the run is finished, with the same hyperparameters.
    """

    arguments: tuple[str, ...]
    folder: Path
    finished: bool


def parse_values(given: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return keys and their values from texts such as "lr=1e-3,3e-4".

    Commas within brackets and quotes belong to a value.

    Raises:
        ValueError: a text is not of this form, or names a key or a value twice.
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
    """Split a text at the commas that are outside of brackets and quotes."""
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
    """Return the runs of a sweep.

    Args:
        recipe: program and YAML.
        given: keys and values, such as "lr=1e-3,3e-4".
        more: further arguments of every run.

    Raises:
        ValueError: an argument is wrong, or two runs have the same folder.
    """
    listed, allow = parse_values(given), recipe.own_modules()
    every = [
        (*(f"--{key}={value}" for (key, _), value in zip(listed, chosen, strict=True)), *more)
        for chosen in itertools.product(*(values for _, values in listed))
    ]

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


class SweepStopped(Exception):
    """End of a sweep by a signal, once its run has saved.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def sweep(recipe: Recipe, runs: Sequence[Trial]) -> dict[Path, int]:
    """Train what is not finished, one run after the other; return the exit codes by folder.

    After a run that fails the next one is trained.

    Args:
        recipe: program and YAML.
        runs: the runs, as `trials` returns them.

    Raises:
        SweepStopped: on a signal, once the run that was going on has ended.
    """
    codes: dict[Path, int] = {}
    with _relaying() as relay:
        for number, each in enumerate(runs, 1):
            place = f"[{number}/{len(runs)}] {each.folder}"
            if each.finished:
                _say(f"{place}: finished already")
                codes[each.folder] = 0
                continue
            _say(place)
            command = [sys.executable, *recipe.command(), *each.arguments]
            codes[each.folder] = code = relay.run(command)
            if relay.number is not None:
                raise SweepStopped(relay.number)
            if code:
                _say(f"{place}: ended with exit code {code}")
    return codes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Relay:
    """Runner of commands that forwards signals to them.

    A command is in a process group of its own, so that it gets each signal once, also Ctrl-C.

    Attributes:
        number: number of the first signal; None before one.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, _frame: object) -> None:
        """Handle a signal: forward it to the command that runs."""
        self.number = self.number or number
        if self._child is not None:
            self._child.send_signal(number)  # Popen sends nothing to a process that has ended.

    def run(self, command: Sequence[str]) -> int:
        """Run a command and return its exit code; after a signal nothing is run."""
        if self.number is None:
            path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, process_group=0,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            if self.number is not None:  # It came while the process began.
                self._child.send_signal(self.number)
            code = self._child.wait()
            return code if code >= 0 else 128 - code
        return signals.exit_code(self.number)


@contextmanager
def _relaying() -> Iterator[_Relay]:
    """Context manager in which signals that ask to stop are forwarded to the command that runs."""
    relay, numbers = _Relay(), (*signals.ALWAYS, *signals.UNLESS_IN_USE)
    used = [each for each in numbers if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, relay.handle) for each in used}
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
