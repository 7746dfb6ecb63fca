"""SpeechBrain's two functions for the head of a recipe.

    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    hparams = load_hparams(hparams_file, overrides)
    create_experiment_directory(hparams["output_folder"], hparams_file, overrides)

`trainer.main` does all of this, and more, by itself.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode

from trainer import distributed
from trainer.cli import arguments
from trainer.cli.environment import environment
from trainer.cli.folder import RunFolder
from trainer.config.hyperparameters import Configuration, option
from trainer.config.reading import get, plain
from trainer.options import RunOptions

logger = logging.getLogger("trainer")

_open_folders: list[RunFolder] = []  # locked until the process ends


def parse_arguments(
    arg_list: Sequence[str] | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Parse a command line.

    Args:
        arg_list: the YAML file and further arguments; None: those of the process.

    Returns:
        The path of the YAML, the run options, and the overrides of its keys, both with typed
        values. A run option that is also a key of the YAML is in both.

    Raises:
        ValueError: an argument or the YAML is wrong.
    """
    given = list(sys.argv[1:] if arg_list is None else arg_list)
    path = arguments.yaml_path(given)
    configuration = Configuration(path)
    keys = [str(key.value) for key, _ in configuration.root.value]
    run_opts: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for name, value in arguments.parse(given[1:], configuration):
        if name in RunOptions.names():
            run_opts[name] = plain(option(name, value))
            if name in keys:
                overrides[name] = run_opts[name]
        else:
            configuration.override(arguments.nested(name, value))
            _insert(overrides, name.split("."), _value(configuration.root, name))
    if run_opts.get("overwrite"):
        logger.warning(
            "--overwrite has no effect with create_experiment_directory: delete the folder, or end "
            "the program in trainer.main(train)"
        )
    return path, run_opts, overrides


def _value(root: MappingNode, name: str) -> Any:
    """Return the plain value of a dotted key."""
    node: Any = root
    for part in name.split("."):
        node = get(node, part)
    return plain(node)


def _insert(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def create_experiment_directory(
    experiment_directory: str | os.PathLike[str],
    hyperparams_to_save: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Make the folder of an experiment and record YAML, command and environment in it.

    The folder is locked until the process ends. Every rank must call this function. It does not
    start over, and messages do not go to train.log; `trainer.main` does both.

    Args:
        experiment_directory: the folder.
        hyperparams_to_save: the YAML file.
        overrides: new values of its keys.

    Raises:
        ValueError: another command is using the folder, or it is not a run's.
        OSError: the folder cannot be written.
    """
    where = environment(Path(sys.argv[0]) if sys.argv[0] else None)
    if distributed.is_main():
        folder = RunFolder(Path(experiment_directory))
        folder.open()
        _open_folders.append(folder)
        text = ""
        if hyperparams_to_save is not None:
            configuration = Configuration(hyperparams_to_save)
            configuration.override(overrides or {})
            text = configuration.dump()
        folder.record(text, [sys.executable, *sys.argv], where)
    distributed.barrier()
