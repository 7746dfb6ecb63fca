"""Runs: `main` at the end of a train.py, and `launch` in a script or a notebook.

Both join the processes of torchrun, seed, open the run folder, handle messages and signals, call
`train`, and report the test metrics that it returns.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import inspect
import logging
import numbers
import os
import pkgutil
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from trainer import checks, distributed, signals
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.cli import arguments, session
from trainer.cli.ending import end_lines, go_on
from trainer.cli.environment import environment
from trainer.cli.folder import RunFolder
from trainer.config.changes import EXTENDING, RECORDING, Change, Settings, is_place
from trainer.config.hyperparameters import Configuration, describe
from trainer.config.reading import dump, represent
from trainer.config.registry import NAME, Registry, recipe_packages
from trainer.defaults import DriverFinished
from trainer.devices import pick_device
from trainer.diagnostics.replica_check import DriftError
from trainer.loggers import JsonlLogger
from trainer.optim.guard import NonFiniteError
from trainer.options import TRANSIENT_OPTIONS, RunOptions, current_names
from trainer.run_files import CHECKPOINTS, HEADER, HYPERPARAMS, LAUNCH_HEADER
from trainer.seed import seed_everything
from trainer.signals import Interrupted, KeyboardInterrupted
from trainer.texts import first_names, number

# Errors that users may have caused; `session.is_user_error` decides.
USER_ERRORS = (
    ValueError, OSError, ImportError, NonFiniteError, DriftError, torch.OutOfMemoryError,
)  # fmt: skip
LOCK_SECONDS = 15.0  # of waiting for the run folder after a restart by torchrun
MAX_CHANGES = 8  # that an error lists
MAX_REPR = 500  # characters of an object in hyperparams.yaml
MAX_LIST, MAX_MAPPING = 2_000, 16_000  # characters of a value of `launch` in hyperparams.yaml

logger = logging.getLogger("trainer")


@dataclass
class Run:
    """Argument of a recipe's `train`.

    Args:
        hparams: hyperparameters by key, objects built.
        options: run options.
        folder: the run folder; every rank has the same.
        argv: arguments of the command line; empty for `launch`.
    """

    hparams: dict[str, Any]
    options: RunOptions
    folder: Path
    argv: list[str] = field(default_factory=list)

    @functools.cached_property
    def checkpointer(self) -> Checkpointer:
        """Checkpointer from the hyperparameters, else one that keeps the newest checkpoint."""
        own: Checkpointer | None = self.hparams.get("checkpointer")
        return own if own is not None else Checkpointer(self.folder / CHECKPOINTS)


Train = Callable[[Run], Mapping[str, Any] | None]


def main(
    train: Train, argv: Sequence[str] | None = None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a recipe by its command line: `train.py FILE [--key value]…`.

    Args:
        train: function that trains, and returns the test metrics by name or None. Every rank calls
            it.
        argv: arguments of the command line; None for those of the process.
        allow: packages and single objects that the YAML may name, in addition to those listed, the
            modules beside the file of `train`, and the names given by `--allow`.

    Returns:
        The test metrics that `train` returned; empty after `--help`, a search or a replay.

    Raises:
        SystemExit: with code 2 and one sentence on stderr for errors that users can correct (a
            wrong value, a missing file, a full disk), whose traceback is in train.log; with code
            143 after SIGTERM, 130 after Ctrl-C, and 75 after any other request to stop.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    asks_help = any(each in arguments.HELP for each in given)
    code = 0
    try:
        if asks_help:
            file = next((each for each in given if not each.startswith("-")), None)
            keys = describe(file) if file else ()
            print(arguments.help_text(Path(sys.argv[0]).name, file, keys), flush=True)
            return {}
        allowed = [allow] if isinstance(allow, str) else [*allow]
        hyperparameters, options = arguments.configure(given, [*allowed, *_own_modules(train)])
        return _run(train, hyperparameters, options, given)
    except BrokenPipeError:  # The reader of the help, such as head, has closed the pipe.
        if not asks_help:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return {}
    except KeyboardInterrupt:
        code = 130
        session.say("interrupted")
        raise SystemExit(code) from None
    except Interrupted as stop:
        code = signals.exit_code(stop.number)
        session.tell_launcher(f"stopped ({stop.signal})")
        raise
    except session.OtherRankFailed as error:
        code = 1
        session.say(f"stopped: {error}", delay=2)  # After the rank that failed.
        raise SystemExit(code) from None
    except Exception as error:
        code = 1
        session.trim(error)
        if not isinstance(error, USER_ERRORS) or not session.is_user_error(error):
            session.tell_launcher("".join(traceback.format_exception(error)))
            raise
        code = 2
        message = "\n".join([session.message(error), *getattr(error, "__notes__", [])])
        session.say(f"error: {message}")
        raise SystemExit(code) from None
    finally:
        own = getattr(train, "__globals__", None) is vars(sys.modules["__main__"])
        if code and (distributed.launched() or own):  # The process ends now.
            signals.end_with(code)
        distributed.stop()


def launch(
    train: Train,
    hparams: Mapping[str, Any] | None = None,
    output_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Run a `train` function from a script or a notebook, with all guarantees of `main`.

    The run folder is locked and keeps hyperparams.yaml, command.txt, environment.json, train.log
    and metrics.jsonl; the same call resumes a run. A process that torchrun started joins the
    others; none are started here. Signal handlers are restored afterwards.

    Args:
        train: function that trains, and returns the test metrics by name or None. Every rank calls
            it, after seeding, so that its networks have the same weights in each run.
        hparams: hyperparameters by key: values, and objects, which are recorded by their repr. Keys
            that are run options (`seed`, `precision`, `debug`, …) set them; the command line is not
            read.
        output_folder: the run folder; None for that of `hparams`.

    Returns:
        The test metrics that `train` returned; empty after a search or a replay.

    Raises:
        ValueError: a run option is wrong; the folder is in use, or is not a run folder; or a
            hyperparameter differs from those that the run has been trained with.
        OSError: the run folder cannot be written.
        KeyboardInterrupt: Ctrl-C, once a checkpoint is saved; uncaught it is exit code 130.
        SystemExit: another request to stop, once a checkpoint is saved, with its exit code.
        Exception: whatever `train` raises, after its traceback is in train.log.

    Example::

        def train(run):
            adam = partial(torch.optim.Adam, lr=run.hparams["lr"])
            brain = Digits({"net": Net()}, adam, run.hparams, run.options, run.checkpointer)
            brain.fit(range(10), train_data, valid_data)

        trainer.launch(train, {"lr": 1e-3}, output_folder="runs/digits")
    """
    if not callable(train):
        raise ValueError(f"train must be a function that takes a Run, not {train!r}")
    if not isinstance(hparams, Mapping | None):
        raise ValueError(f"hparams must be a mapping of keys to values, not {hparams!r}")
    values = current_names({str(key): value for key, value in (hparams or {}).items()})
    if output_folder is not None:
        values["output_folder"] = output_folder
    if values.get("output_folder") is None:
        raise ValueError("launch needs a run folder: launch(train, hparams, output_folder='…')")
    options = RunOptions.build(values)
    _warn_of_arguments(values)
    hyperparameters = _PlainHyperparameters(
        {**values, "seed": options.seed, "output_folder": options.output_folder}
    )
    if distributed.launched():
        atexit.register(distributed.stop)  # Not at the end of this call: another may follow.
    try:
        return _run(train, hyperparameters, options, None)
    except KeyboardInterrupt:
        raise KeyboardInterrupted from None
    except Interrupted as stopped:
        if not stopped.saves:  # Collectives of ranks that wait for this one fail now.
            distributed.stop()
        if stopped.signal == "SIGINT":
            raise KeyboardInterrupted from None
        raise
    except Exception as error:
        session.trim(error)
        session.tell_launcher("".join(traceback.format_exception(error)))
        raise


def _warn_of_arguments(values: Mapping[str, Any]) -> None:
    """Warn of run options on a command line that `launch` does not read."""
    for name in (each[2:].partition("=")[0] for each in sys.argv[1:] if each.startswith("--")):
        if name in RunOptions.names() and name not in values:
            logger.warning(
                "launch reads no command line: --%s has no effect; give {%r: …} in hparams",
                name, name,
            )  # fmt: skip


class _PlainHyperparameters:
    """Hyperparameters of `launch`: values and objects instead of a YAML.

    Has the methods of `Configuration` that a run needs.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.registry = Registry()

    @property
    def root(self) -> Any:
        """The values as a YAML tree, objects by their repr."""
        return represent(
            {k: _recordable(v) for k, v in self.values.items() if k not in TRANSIENT_OPTIONS}
        )

    def override(self, changes: Mapping[str, Any]) -> None:
        """Replace values."""
        self.values |= changes

    def dump(self) -> str:
        """Return the text of hyperparams.yaml."""
        return dump(self.root)

    def build(self) -> dict[str, Any]:
        """Return the values as they are."""
        return dict(self.values)


Hyperparameters = Configuration | _PlainHyperparameters


def _recordable(value: Any) -> Any:
    """Replace objects in nested values by their repr, and shorten long values."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (numbers.Integral, numbers.Real)):  # of NumPy
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, Mapping):
        value = {str(k): _recordable(each) for k, each in value.items()}
    elif isinstance(value, (list, tuple)):
        value = [_recordable(each) for each in value]
    elif not isinstance(value, str):
        return f"repr: {_description(value)}"
    text = repr(value)
    most = MAX_MAPPING if isinstance(value, dict) else MAX_LIST
    return value if len(text) <= most else f"repr: {_beginning(text)}"


def _beginning(text: str) -> str:
    """Return a text; of a long one its beginning, and a hash of the whole."""
    if len(text) <= MAX_REPR:
        return text
    return f"{text[:MAX_REPR]}…, {_hash(text.encode())}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _description(value: Any) -> str:
    """Return the repr of an object, with the arguments that it lacks and a hash of its data."""
    # Addresses differ from one start to the next.
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(repr(value).split()))
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    with contextlib.suppress(TypeError, ValueError, BufferError):  # no buffer, or one of objects
        view = memoryview(value)
        text += "" if "O" in view.format else f", {_hash(view.tobytes())}"
    for each in value.modules() if isinstance(value, Module) else [value]:
        text += _arguments(each)
    return _beginning(text)


def _arguments(value: Any) -> str:
    """Return constructor arguments that an object has as attributes, such as ", width=8".

    The text is empty for a class with a repr of its own, which should show them.
    """
    kind, text = type(value), ""
    name = f"{kind.__module__}.{kind.__qualname__}"
    own = {each for kinds in kind.__mro__ if kinds not in (Module, object) for each in vars(kinds)}
    if own.isdisjoint(("__repr__", "extra_repr")) and not RECORDING.search(name):
        with contextlib.suppress(TypeError, ValueError):  # no signature
            for key in inspect.signature(kind).parameters:
                given = getattr(value, key, None)
                plain = isinstance(given, (bool, int, float, str, tuple, list))
                if plain and not (EXTENDING.search(f"{name}.{key}") or is_place(key)):
                    text += f", {key}={_recordable(given)}"
    return text


def _run(
    train: Train, hyperparameters: Hyperparameters, options: RunOptions, argv: list[str] | None
) -> dict[str, Any]:
    """Run `train` in a run folder; return its metrics. `argv` is None for `launch`."""
    session.end_with_launcher()
    with ExitStack() as stack:
        # The hang watch comes first: a collective that times out does not say which rank hangs.
        timeout = timedelta(seconds=max(600.0, 6 * options.hang_timeout))
        # A signal may end a rank that waits for the others here.
        distributed.start(str(pick_device(options.device)), timeout)
        stack.enter_context(session.signals_at_safe_points())
        seed_everything(options.seed, distributed.rank())
        source = _source(train)
        folder, notes = stack.enter_context(_run_folder(hyperparameters, options, source, argv))
        writes = folder if distributed.is_main() and not options.replay else None
        names = [str(getattr(train, "__module__", "__main__")), *recipe_packages()]
        log = stack.enter_context(session.recorded(writes, names))
        kept = not (options.debug or options.replay)
        path = folder / "train.log" if kept else None
        note = f"(its traceback is in {path})" if kept else ""
        stack.enter_context(session.logged_exceptions(log, path, note))
        stack.enter_context(session.failing_as_one())
        for each in notes:
            logger.warning("%s", each)

        def announce(lines: Sequence[str]) -> None:
            for line in lines if kept and distributed.is_main() else ():
                logger.info("%s", line)

        try:
            run = Run(hyperparameters.build(), options, folder, argv or [])
            metrics = _test_metrics(train(run))
        except DriverFinished:
            return {}
        except (Interrupted, KeyboardInterrupt):
            announce(go_on(folder, argv))
            raise
        if metrics and distributed.is_main():
            _report(metrics, folder)
        if kept:
            own = run.hparams.get("checkpointer") or run.checkpointer
            announce(end_lines(folder, own, source, argv))
    return metrics


@contextmanager
def _run_folder(
    hyperparameters: Hyperparameters,
    options: RunOptions,
    source: Path | None,
    argv: list[str] | None,
) -> Iterator[tuple[Path, list[str]]]:
    """Context manager that opens and records the run folder on rank 0, and closes it at its end.

    With ``debug`` it is a temporary one. Yields the folder, and notes on changed hyperparameters.
    """
    if options.debug:
        with tempfile.TemporaryDirectory(prefix="debug-") as temporary:
            # All ranks use the folder of rank 0, which waits for them before it deletes it.
            options.output_folder = str(distributed.broadcast_json(temporary))
            hyperparameters.override({"output_folder": options.output_folder})
            yield Path(options.output_folder), []
            distributed.barrier()
        return
    folder = RunFolder(Path(str(options.output_folder)))
    if options.replay:  # A replay writes nothing, even while the run itself goes on.
        yield folder.path, []
        return
    where = environment(source)
    problem, notes = None, []
    if distributed.is_main():
        try:
            notes = _record_start(folder, hyperparameters, options, where, argv)
        except (ValueError, OSError) as error:
            problem = session.message(error)
    problem = distributed.broadcast_json(problem)
    with ExitStack() as stack:
        stack.callback(folder.close)
        if problem:
            raise ValueError(problem)
        if distributed.is_main():
            trains = not (options.searching or options.test_only)
            stack.enter_context(folder.end_recorded(trains))
        yield folder.path, notes


def _record_start(
    folder: RunFolder,
    hyperparameters: Hyperparameters,
    options: RunOptions,
    where: dict[str, Any],
    argv: list[str] | None,
) -> list[str]:
    """Open the run folder and record a start in it; return notes for the log."""
    command = [sys.executable, *(sys.argv if argv is None else [sys.argv[0], *argv])]
    # A restarted run resumes; its former process may still be ending.
    restarted = distributed.restarts() > 0
    overwrite = options.overwrite and not options.searching and not restarted
    folder.open(overwrite, patience=LOCK_SECONDS if restarted else 0.0)
    has_record = (folder.path / HYPERPARAMS).exists()
    if options.searching and has_record:
        folder.add_command(command)  # The record of the earlier run stays.
        return []
    now, notes = Settings(hyperparameters.root, hyperparameters.registry), []
    try:
        changes = folder.changes(now)
    except ValueError as error:
        changes, notes = [], [f"cannot compare with the last start: {error}"]
    _check_changes(changes, options, folder.path, "" if argv is None else "--")
    if changes:
        told = "; ".join(map(str, changes))
        notes.append(f"other hyperparameters than at the last start: {told}")
    if options.test_only and has_record:
        folder.add_command(command)
        return notes
    if folder.was_edited():
        notes.append(
            f"{folder.path / HYPERPARAMS} was edited by hand: it is rewritten with the "
            "values in force"
        )
    header = LAUNCH_HEADER if argv is None else HEADER
    folder.record(hyperparameters.dump(), command, where, header, changes)
    return notes


def _check_changes(
    changes: Sequence[Change], options: RunOptions, folder: Path, prefix: str
) -> None:
    """Raise ValueError if settings that the run was trained with have changed unasked."""
    refused = [str(change) for change in changes if change.kind == "training"]
    if refused and not options.change_hparams:
        told = first_names(refused, MAX_CHANGES, "; ")
        raise ValueError(
            f"the run in {folder} has been trained with other hyperparameters "
            f"({told}): give another {prefix}output_folder, "
            f"{prefix}overwrite to start anew, or {prefix}change_hparams to go on with the new "
            "values (a key that only extends a run is listed under resumable_keys)"
        )


def _source(train: Train) -> Path | None:
    """Return the file that `train` is written in."""
    try:
        file = inspect.getsourcefile(train)
    except TypeError:  # a callable object, a partial
        file = None
    return Path(file).resolve() if file else None


def _own_modules(train: Train) -> list[str]:
    """Return the package of `train` and the modules in its folder, which are the user's own."""
    own = str(getattr(train, "__globals__", {}).get("__package__") or train.__module__)
    if not hasattr(sys.modules.get(own), "YAML_NAMES"):  # a package that lists no names is open
        own = own.partition(".")[0]
    names = {own}
    source = _source(train)
    if source is not None and source.parent == Path(sys.path[0] or ".").resolve():
        names |= {each.name for each in pkgutil.iter_modules([str(source.parent)])}
    # A file beside train.py may have the name of a standard module.
    others = sys.stdlib_module_names | {"trainer", "torch"}
    return sorted(name for name in names if NAME.fullmatch(name) and name not in others)


def _test_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metrics that `train` returned as plain numbers by name, or raise ValueError."""
    if not isinstance(metrics, Mapping | None):
        raise ValueError(
            f"train must return test metrics by name, as in {{'wer': 3.2}}, not {metrics!r}"
        )
    values = {}
    for name, value in (metrics or {}).items():
        if (found := checks.as_number(value)) is None:
            raise ValueError(f"the test metric {name!r} must be a number, not {value!r}")
        values[name] = found
    return values


def _report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the test metrics, and write them as the last line of metrics.jsonl.

    The screen shows two decimals, or four digits of a number below a tenth.
    """
    shown = []
    for name, value in metrics.items():
        small = isinstance(value, int) or 0 < abs(value) < 0.1
        shown.append(f"{name}={number(value) if small else f'{value:.2f}'}")
    print("test:", *shown, flush=True)
    try:
        log = JsonlLogger(folder)
        log.write({"kind": "stage", "stage": "test", **metrics})
        log.close()
    except OSError as error:  # The run is complete, and its metrics are printed.
        logger.warning("metrics.jsonl lacks the test metrics: %s", error)
