"""SpeechBrain's names for the head of a recipe; import it in place of SpeechBrain.

    import trainer.compat.speechbrain as sb

    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    hparams = sb.load_hyperpyyaml(open(hparams_file), overrides)
    sb.ddp_init_group(run_opts)
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)

Other names come from SpeechBrain, which is imported when the first of them is used. `trainer.main`
does all of this itself, and more.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hyperpyyaml import dump_hyperpyyaml
from ruamel.yaml.nodes import MappingNode, Node

from trainer import distributed
from trainer.brain import Brain
from trainer.checkpoint import Checkpointer
from trainer.cli import session
from trainer.cli.arguments import parse_arguments
from trainer.cli.environment import environment
from trainer.cli.folder import RunFolder
from trainer.compat.toolkit import PACKAGE
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration
from trainer.config.reading import compose, items, object_name
from trainer.config.registry import recipe_packages
from trainer.devices import pick_device
from trainer.epochs import EpochCounter
from trainer.progress import Stage

__all__ = [
    "Brain", "Checkpointer", "EpochCounter", "Stage", "create_experiment_directory",
    "ddp_init_group", "dump_hyperpyyaml", "if_main_process", "load_hyperpyyaml", "parse_arguments",
    "run_on_main",
]  # fmt: skip

logger = logging.getLogger("trainer")

_program = ExitStack()  # Contexts of `create_experiment_directory`, until the process ends.


def __getattr__(name: str) -> Any:
    """Return an attribute of SpeechBrain, or of its module ``core``."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "core":
        return sys.modules[__name__]
    package = importlib.import_module(PACKAGE)
    if hasattr(package, name):
        return getattr(package, name)
    return getattr(importlib.import_module(f"{PACKAGE}.core"), name)


def load_hyperpyyaml(
    yaml_stream: IO[str] | str,
    overrides: str | IO[str] | Mapping[str, Any] | None = None,
    overrides_must_match: bool = True,
) -> dict[str, Any]:
    """Read a YAML and build its objects, as `trainer.load_hparams` does.

    Args:
        yaml_stream: an open file, or the text of a YAML.
        overrides: new values of keys: a mapping, or a YAML of one.
        overrides_must_match: refuse keys that the YAML does not have; False leaves them out.

    Returns:
        The values by key, objects built.

    Raises:
        ValueError: the YAML or an override is wrong; the message names key, file and line.
    """
    changes: Mapping[str, Any] = {}
    if isinstance(overrides, Mapping):
        changes = overrides
    elif overrides is not None:
        text = overrides if isinstance(overrides, str) else overrides.read()
        node = compose(text, "the overrides") if text.strip() else MappingNode("", [])
        if not isinstance(node, MappingNode):
            raise ValueError("the overrides are no mapping, such as 'lr: 0.1'")
        changes = _nested(node)
    with _path_of(yaml_stream) as path:
        configuration = Configuration(path)
        known = {key for key, _ in items(configuration.root)}
        if not overrides_must_match:
            changes = {key: value for key, value in changes.items() if key in known}
        configuration.override(changes)
        return configuration.build()


def _nested(node: Node) -> Any:
    """Return nested plain mappings as dicts, and any other node as it is."""
    if isinstance(node, MappingNode) and not object_name(node):
        return {key: _nested(each) for key, each in items(node)}
    return node


@contextmanager
def _path_of(stream: IO[str] | str) -> Iterator[Path]:
    """Context manager that yields the path of a YAML; for text, that of a temporary file."""
    name = getattr(stream, "name", None)
    if isinstance(name, str) and Path(name).is_file():
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stream.yaml")
        path.write_text(stream if isinstance(stream, str) else stream.read(), encoding="utf-8")
        yield path


def ddp_init_group(run_opts: Mapping[str, Any] | None = None) -> None:
    """Join the processes that torchrun launched; do nothing in a process that it did not launch.

    Every rank must call it. The constructor of a `Brain` does the same.

    Args:
        run_opts: the run options; only ``device`` is used.
    """
    session.end_with_launcher()
    device = (run_opts or {}).get("device") or "auto"
    distributed.join(str(pick_device(str(device))))


if_main_process = distributed.is_main


def run_on_main(
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    post_func: Callable[..., Any] | None = None,
    post_args: Sequence[Any] | None = None,
    post_kwargs: Mapping[str, Any] | None = None,
    run_post_on_main: bool = False,
) -> Any:
    """Call a function on rank 0, then another on the other ranks. Every rank must call it.

    An error on one rank is raised on all of them.

    Args:
        func: called on rank 0.
        args: its positional arguments.
        kwargs: its keyword arguments.
        post_func: called on the other ranks once rank 0 is done, for example to load its files.
        post_args: its positional arguments.
        post_kwargs: its keyword arguments.
        run_post_on_main: call ``post_func`` on rank 0, too.

    Returns:
        The result of ``func``, on every rank; sent as JSON.
    """
    result = distributed.run_on_main(lambda: func(*(args or ()), **(kwargs or {})))
    if post_func is not None:
        after = run_post_on_main or not distributed.is_main()
        post = post_func
        distributed.run_on_all(
            lambda: post(*(post_args or ()), **(post_kwargs or {})) if after else None
        )
    return result


def create_experiment_directory(
    experiment_directory: str | os.PathLike[str],
    hyperparams_to_save: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    log_config: Any = None,
    save_env_desc: bool = True,
) -> None:
    """Make the folder of an experiment and record YAML, command and environment in it.

    The folder is locked until the process ends. If a program calls this function in its own file,
    messages then go to train.log and to the terminal, and the program saves and stops at signals.
    Every rank must call it.

    Args:
        experiment_directory: the folder.
        hyperparams_to_save: the YAML file.
        overrides: new values of its keys.
        log_config: not used.
        save_env_desc: not used: the environment is always recorded.

    Raises:
        ValueError: another command is using the folder, or it is not a run folder.
        OSError: the folder cannot be written.
    """
    ddp_init_group()
    path = Path(experiment_directory).expanduser()
    where = environment(Path(sys.argv[0]) if sys.argv[0] else None)
    close()

    def make() -> list[str]:
        folder = RunFolder(path)
        folder.open()
        _program.callback(folder.close)
        text, changes = "", []
        if hyperparams_to_save is not None:
            configuration = Configuration(hyperparams_to_save)
            configuration.override({"output_folder": str(folder.path), **(overrides or {})})
            text = configuration.dump()
            now = Settings(configuration.root, configuration.registry)
            changes = folder.changes(now)
        folder.record(text, [sys.executable, *sys.argv], where, changes=changes)
        return list(map(str, changes))

    changes = distributed.run_on_main(make)
    if sys._getframe(1).f_globals.get("__name__") == "__main__":
        _begin_program(path)
    if changes:
        logger.warning(
            "the run in %s goes on with other hyperparameters: %s", path, "; ".join(changes)
        )


def _begin_program(folder: Path) -> None:
    """Set up messages, signals and the hook for errors, until the process ends.

    An error is written to train.log and sent to the other ranks.
    """
    session.end_with_launcher()
    names = ["__main__", PACKAGE, *recipe_packages()]
    log = _program.enter_context(session.recorded(folder if distributed.is_main() else None, names))
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            with session.logged_exceptions(log, folder / "train.log"), session.failing_as_one():
                raise error.with_traceback(trace)
        except BaseException as final:
            session.tell_launcher(f"{type(final).__name__}: {final}")
            before(type(final), final, final.__traceback__)

    _program.enter_context(session.signals_at_safe_points())
    _program.callback(setattr, sys, "excepthook", before)
    sys.excepthook = hook
    atexit.register(close)


def close() -> None:
    """Release the folder, and undo what `create_experiment_directory` set up in this process."""
    _program.close()
