"""One restore, by all ranks: everything read and verified first, then applied, strictly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import distributed
from trainer.checkpoint import manifest, state
from trainer.checkpoint.manifest import Checkpoint
from trainer.checkpoint.together import everywhere


def restore(path: Path, recoverables: Mapping[str, Any]) -> Checkpoint:
    """Restore every recoverable from the checkpoint at `path`, on all ranks or on none.

    BrokenCheckpoint where a file is not sound: nothing has been applied then. ValueError where the
    checkpoint is sound and does not fit, or where a recoverable refuses its state.
    """
    checkpoint, states, local = everywhere(_read, path)
    everywhere(_check_fit, checkpoint, states, local, recoverables)
    everywhere(_apply, checkpoint, states, local, recoverables)
    return checkpoint


def _read(path: Path) -> tuple[Checkpoint, dict[str, Any], dict[str, Any]]:
    checkpoint = manifest.read_manifest(path)
    rank, ranks = distributed.rank(), distributed.world_size()
    return checkpoint, state.load_all(checkpoint), state.load_local(checkpoint, rank, ranks)


def _check_fit(
    checkpoint: Checkpoint,
    states: Mapping[str, Any],
    local: Mapping[str, Any],
    recoverables: Mapping[str, Any],
) -> None:
    divided = {name for name, obj in recoverables.items() if hasattr(obj, "load_local_state_dict")}
    _same_names(checkpoint, "states", set(states), set(recoverables))
    if checkpoint.processes == distributed.world_size():
        _same_names(checkpoint, "local states", set(local), divided)
    elif divided and distributed.is_main():
        warnings.warn(
            f"{checkpoint.path} was saved by {checkpoint.processes} processes and is restored by "
            f"{distributed.world_size()}: what differs per process (random generators, gradients "
            "of an unfinished accumulation window) starts anew",
            stacklevel=5,
        )


def _same_names(checkpoint: Checkpoint, what: str, has: set[str], needs: set[str]) -> None:
    if has != needs:
        missing, unknown = ", ".join(sorted(needs - has)), ", ".join(sorted(has - needs))
        raise ValueError(
            f"{checkpoint.path} does not fit this run: of the {what}, it lacks {missing or 'none'} "
            f"and this run does not know {unknown or 'none'}"
        )


def _apply(
    checkpoint: Checkpoint,
    states: Mapping[str, Any],
    local: Mapping[str, Any],
    recoverables: Mapping[str, Any],
) -> None:
    for name, obj in recoverables.items():
        try:
            obj.load_state_dict(states[name])
            if name in local:
                obj.load_local_state_dict(local[name])
        except Exception as error:
            raise ValueError(
                f"{checkpoint.path}: {name!r} ({type(obj).__name__}) cannot take its state: {error}"
            ) from error
