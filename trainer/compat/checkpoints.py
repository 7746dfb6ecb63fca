"""Replacement of SpeechBrain's Checkpointer by a `Checkpointer` of this package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.compat.toolkit import is_theirs


def adapted(checkpointer: Any, hparams: SimpleNamespace) -> Any:
    """Return a `Checkpointer` of this package with the folder and recoverables of SpeechBrain's.

    Args:
        checkpointer: the checkpointer of a Brain; any other than SpeechBrain's is returned as it
            is.
        hparams: hyperparameters, in which it is replaced, too.
    """
    if not is_theirs(checkpointer):
        return checkpointer
    ours = Checkpointer(
        checkpointer.checkpoints_dir, allow_partial_load=checkpointer.allow_partial_load
    )
    for name, obj in checkpointer.recoverables.items():
        ours.add_recoverable(
            name,
            obj,
            checkpointer.custom_load_hooks.get(name),
            checkpointer.custom_save_hooks.get(name),
            checkpointer.optional_recoverables.get(name, False),
        )
    for name, value in vars(hparams).items():
        if value is checkpointer:
            setattr(hparams, name, ours)
    return ours
