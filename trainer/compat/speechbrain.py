"""SpeechBrain's two functions for the head of a recipe, so that its recipes run with our import.

    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    hparams = load_hparams(hparams_file, overrides)
    create_experiment_directory(hparams["output_folder"], hparams_file, overrides)

`trainer.main` does all of this, and more, by itself.
"""

from __future__ import annotations

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
from trainer.config.nodes import get, plain
from trainer.options import RunOptions

_held: list[RunFolder] = []  # Their locks last as long as the process.


def parse_arguments(
    arg_list: Sequence[str] | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A command line as the YAML's path, the run options and the overrides of YAML keys, typed.

    A run option that is also a key of the YAML is in both.
    """
    given = list(sys.argv[1:] if arg_list is None else arg_list)
    path = arguments.file_of(given)
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
    return path, run_opts, overrides


def _value(root: MappingNode, name: str) -> Any:
    """What a key holds by now."""
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
    """Make the folder of an experiment, and keep in it the YAML, the command and the environment.

    The folder is this process's until it ends: a second command in it is refused (ValueError).
    """
    where = environment(Path(sys.argv[0]) if sys.argv[0] else None)
    if distributed.is_main():
        folder = RunFolder(Path(experiment_directory))
        folder.open()
        _held.append(folder)
        text = ""
        if hyperparams_to_save is not None:
            configuration = Configuration(hyperparams_to_save)
            configuration.override(overrides or {})
            text = configuration.dump()
        folder.record(text, [sys.executable, *sys.argv], where)
    distributed.barrier()
