"""From a command line to a finished run: what `trainer.main(train)` at the end of a train.py does.

    def train(run: trainer.Run) -> dict[str, float]: ...

    if __name__ == "__main__":
        trainer.main(train)

It reads the YAML and the arguments, joins the other processes, seeds, opens the run folder, builds
the YAML's objects, calls `train`, and reports the test metrics that it returns.
"""

from __future__ import annotations

import inspect
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import ScalarNode
from torch import Tensor

from trainer import distributed
from trainer.cli import arguments, session
from trainer.cli.environment import environment
from trainer.cli.folder import RunFolder
from trainer.config.guard import NAME
from trainer.config.hyperparameters import Configuration, describe, option
from trainer.config.nodes import NULL, get, plain, tag
from trainer.diagnostics.replay import Replayed
from trainer.distributed.replica_check import DriftError
from trainer.loggers.run_log import RunLog
from trainer.optim.build import pick_device
from trainer.optim.guard import NonFiniteError
from trainer.options import RunOptions
from trainer.seed import seed_everything
from trainer.tuner import SearchOver

# Options of one command rather than of the run: they are not written to its hyperparams.yaml.
ONCE = (
    "overwrite", "test_only", "debug", "progressbar", "profile_training",
    "find_clip", "find_lr", "find_steps", "find_trials", "replay",
)  # fmt: skip

logger = logging.getLogger("trainer")


@dataclass
class Run:
    """What a recipe's `train` is given: the built YAML, the options, and the folder of the run."""

    hparams: dict[str, Any]
    options: RunOptions
    folder: Path
    argv: list[str]


Train = Callable[[Run], Mapping[str, Any] | None]


def main(
    train: Train, argv: Sequence[str] | None = None, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a recipe by its command line; gives the test metrics that `train` returned.

    `allow` are packages that the YAML may name, beside those allowed anyway and what lies in the
    folder of `train`. What the user can mend (a wrong value, a missing file, a full disk) becomes
    one sentence on stderr and exit code 2, its traceback in train.log.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    folder: list[Path] = []
    try:
        if any(each in arguments.HELP for each in given):
            print(_help(given))
            return {}
        return _run(train, given, [*allow, *_own_modules(train)], folder)
    except SearchOver:
        return {}
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, NonFiniteError, DriftError) as error:
        if not session.meant_for_users(error):
            raise
        place = f"\n(its traceback is in {folder[0] / 'train.log'})" if folder else ""
        print(f"{session.rank()}error: {session.sentence(error)}{place}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        distributed.stop()


def _help(given: Sequence[str]) -> str:
    file = next((each for each in given if not each.startswith("-")), None)
    return arguments.help_text(Path(sys.argv[0]).name, file, describe(file) if file else ())


def _run(
    train: Train, given: list[str], allow: Sequence[str], opened: list[Path]
) -> dict[str, Any]:
    """The run itself; `opened` gets its folder as soon as that has a log."""
    configuration, options = configure(given, allow)
    distributed.start(str(pick_device(options.device)))
    seed_everything(options.seed, distributed.rank())
    with ExitStack() as stack:
        folder, changes = stack.enter_context(_folder(configuration, options, train, given))
        log = RunLog(None if options.replay else folder, main=distributed.is_main())
        stack.callback(log.close)
        stack.enter_context(session.messages(log, _module(train)))
        stack.enter_context(session.stoppable())
        stack.enter_context(session.told(log))
        if not (options.debug or options.replay):
            opened.append(folder)
        if changes:
            logger.warning("other hyperparameters than at the last start: %s", "; ".join(changes))
        try:
            metrics = _numbers(train(Run(configuration.build(), options, folder, given)))
        except Replayed:
            return {}
        if metrics:
            _report(metrics, folder)
    return metrics


def configure(given: Sequence[str], allow: Sequence[str] = ()) -> tuple[Configuration, RunOptions]:
    """The YAML with the arguments in it, and the options that follow: default < YAML < arguments.

    `seed` and `output_folder` are keys of every YAML: they are added where it has none.
    """
    path = arguments.file_of(given)
    configuration = Configuration(path, allow)
    once: dict[str, Any] = {}
    for name, value in arguments.parse(given[1:], configuration):
        if name in ONCE and get(configuration.root, name) is None:
            once[name] = plain(option(name, value))
        else:
            configuration.override(arguments.nested(name, value))
    root = configuration.root
    if get(root, "seed") is None:
        configuration.override({"seed": RunOptions().seed})
    folder = get(root, "output_folder")
    if folder is None or tag(folder) == NULL:
        file = Path(path).resolve()
        default = ScalarNode("!ref", f"results/{file.parent.name}/{file.stem}/<seed>")
        configuration.override({"output_folder": default})
    options = RunOptions.build(configuration.options(), once)
    return configuration, options


@contextmanager
def _folder(
    configuration: Configuration, options: RunOptions, train: Train, given: Sequence[str]
) -> Iterator[tuple[Path, list[str]]]:
    """The run folder, opened by the main process, and what changed in the YAML since last time."""
    if options.debug:
        with tempfile.TemporaryDirectory(prefix="debug-") as passing:
            # All ranks use that of the main process, which waits for them before it is deleted.
            options.output_folder = str(distributed.broadcast_json(passing))
            configuration.override({"output_folder": options.output_folder})
            yield Path(options.output_folder), []
            distributed.barrier()
        return
    folder = RunFolder(Path(str(options.output_folder)))
    if options.replay:  # It looks, and leaves no trace, even where the run still goes on.
        yield folder.path, []
        return
    where = environment(_source(train))
    problem, changes = None, []
    if distributed.is_main():
        command = [sys.executable, sys.argv[0], *given]
        try:
            folder.open(options.overwrite and not options.searching)
            if options.searching and folder.recorded():
                folder.note(command)  # A search leaves the run that is there as it is.
            else:
                changes = folder.record(configuration.dump(), command, where)
        except (ValueError, OSError) as error:
            problem = session.sentence(error)
    problem = distributed.broadcast_json(problem)
    try:
        if problem:
            raise ValueError(problem)
        yield folder.path, changes
    finally:
        folder.close()


def _module(train: Train) -> str:
    return str(getattr(train, "__module__", "__main__"))


def _source(train: Train) -> Path | None:
    """The file that `train` is written in."""
    try:
        file = inspect.getsourcefile(train)
    except TypeError:  # a callable object, a partial
        file = None
    return Path(file).resolve() if file else None


def _own_modules(train: Train) -> list[str]:
    """The package of `train` and the modules in its folder: they are the user's own."""
    package = getattr(train, "__globals__", {}).get("__package__") or _module(train)
    names = {package.partition(".")[0]}
    source = _source(train)
    if source is not None and source.parent == Path(sys.path[0] or ".").resolve():
        found = source.parent.iterdir()
        names |= {
            each.stem
            for each in found
            if each.suffix == ".py" or (each.is_dir() and (each / "__init__.py").exists())
        }
    # A file beside train.py may bear the name of one of Python's modules.
    others = sys.stdlib_module_names | {"trainer", "torch"}
    return sorted(name for name in names if NAME.fullmatch(name) and name not in others)


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `train` returned, as plain numbers by name."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"train must return test metrics by name, as in {{'wer': 3.2}}, not {metrics!r}"
        )
    values = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in metrics.items()
    }
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"the test metric {name!r} must be a number, not {value!r}")
    return values


def _report(metrics: dict[str, Any], folder: Path) -> None:
    """Print the line of the test, and make it the last of metrics.jsonl."""
    if not distributed.is_main():
        return
    words = (f"{name}={_readable(value)}" for name, value in metrics.items())
    print("test:", *words, flush=True)
    # Opened anew: a run that resumed has put a shorter file in the place of the first.
    log = RunLog(folder)
    log.stage({"stage": "test", **metrics})
    log.close()


def _readable(value: float) -> str:
    """Two decimals, or four digits of a number below a tenth."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.4g}"
