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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import distributed
from trainer.cli.arguments import parse_arguments
from trainer.cli.environment import environment
from trainer.cli.folder import RunFolder
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration

__all__ = ["create_experiment_directory", "parse_arguments"]

logger = logging.getLogger("trainer")

_open_folders: list[RunFolder] = []  # locked until the process ends


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
        ValueError: another command is using the folder, or it is not a run folder.
        OSError: the folder cannot be written.
    """
    where = environment(Path(sys.argv[0]) if sys.argv[0] else None)
    if distributed.is_main():
        folder = RunFolder(Path(experiment_directory).expanduser())
        folder.open()
        _open_folders.append(folder)
        text, changes = "", []
        if hyperparams_to_save is not None:
            configuration = Configuration(hyperparams_to_save)
            configuration.override({"output_folder": str(folder.path), **(overrides or {})})
            text = configuration.dump()
            now = Settings(configuration.root, configuration.registry)
            changes = folder.changes(now)
        if changes:
            told = "; ".join(map(str, changes))
            logger.warning(
                "the run in %s goes on with other hyperparameters: %s", folder.path, told
            )
        folder.record(text, [sys.executable, *sys.argv], where, changes=changes)
    distributed.barrier()
