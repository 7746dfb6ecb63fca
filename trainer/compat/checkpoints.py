"""SpeechBrain's Checkpointer and its folders, for `Brain` and our `Checkpointer`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.compat.toolkit import is_theirs


def adapted(checkpointer: Any, hparams: SimpleNamespace) -> Any:
    """Return a `Checkpointer` of ours in place of one of SpeechBrain's, which a YAML has built.

    It has the same folder and recoverables. Anything else is returned as it is.

    Args:
        checkpointer: what the Brain was given.
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
