"""One save, by all ranks: into a temporary folder, sealed by rank 0, renamed when it is whole."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.checkpoint import files, manifest, state
from trainer.checkpoint.files import NewFile, Written
from trainer.checkpoint.manifest import Checkpoint
from trainer.checkpoint.retention import Keep
from trainer.checkpoint.together import everywhere, on_main


@dataclass(frozen=True)
class Request:
    """A save that was asked for; it may have to wait for the end of a hook."""

    meta: dict[str, Any]
    end_of_epoch: bool
    label: str | None
    keep: Keep | None  # None: delete nothing


def draft(folder: Path, number: int, request: Request) -> tuple[str, dict[str, Any]]:
    """The name of a new checkpoint in `folder`, and its manifest's fields but for the files.

    It is called as the request says, else by the optimizer step in its meta, else by its number.
    """
    step = request.meta.get("optimizer_step", request.meta.get("step"))
    step = step if type(step) is int else None
    wanted = request.label or (f"save-{number:08d}" if step is None else f"step-{step:08d}")
    attempts = (wanted if n == 1 else f"{wanted}-{n}" for n in itertools.count(1))
    name = next(each for each in attempts if not os.path.lexists(folder / each))
    return name, {
        "number": number,
        "time": datetime.now(timezone.utc).isoformat(),
        "step": step,
        "label": request.label,
        "pinned": request.label is not None and request.keep is None,
        "end_of_epoch": request.end_of_epoch,
        "processes": distributed.world_size(),
        "meta": request.meta,
    }


def save(planned: Checkpoint, recoverables: Mapping[str, Any]) -> Checkpoint:
    """Write the checkpoint that `planned` describes; a failure on any rank leaves nothing."""
    try:
        return _save(planned, recoverables)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint {planned.path} could not be saved: {error.strerror or error}",
        ) from error


def _save(planned: Checkpoint, recoverables: Mapping[str, Any]) -> Checkpoint:
    place = planned.path.parent / on_main(_make_place, planned)
    try:
        mine = everywhere(_write_states, place, recoverables)
        written = [entry for rank_files in distributed.gather(mine) for entry in rank_files]
        checkpoint = replace(planned, files={name: Written(*entry) for name, *entry in written})
        on_main(_publish, place, checkpoint)
    except BaseException:
        if distributed.is_main():
            # What cannot be removed now is removed by the next start; the error matters more.
            shutil.rmtree(place, ignore_errors=True)
        raise
    return checkpoint


def _make_place(planned: Checkpoint) -> str:
    place = files.temporary(planned.path.parent, "saving", planned.name)
    os.mkdir(place)
    return place.name


def _write_states(place: Path, recoverables: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """This rank's files, one in memory at a time: (name, size, hash)."""
    written = []
    for name, obj in recoverables.items() if distributed.is_main() else ():
        whole = obj.state_dict()
        state.check(whole, name)
        for file, content in state.pieces(name, whole):
            written.append((file, *_write(place / file, content)))
    local = {
        name: obj.local_state_dict()
        for name, obj in recoverables.items()
        if hasattr(obj, "local_state_dict")
    }
    if local:
        state.check(local, f"the local state of rank {distributed.rank()}")
        file = f"rank-{distributed.rank()}.pt"
        written.append((file, *_write(place / file, local)))
    return written


def _write(path: Path, content: Any) -> Written:
    def fill(file: NewFile) -> None:
        torch.save(content, file)  # type: ignore[arg-type]  # it needs write and flush only

    return files.write_file(path, fill)


def _publish(place: Path, checkpoint: Checkpoint) -> None:
    """The manifest last, then the name: from that instant on it is a checkpoint."""
    sealed = manifest.render(manifest.content(checkpoint))
    if len(sealed) > manifest.LARGEST:
        raise ValueError(f"the meta of {checkpoint.path} is too large ({len(sealed)} bytes)")
    files.write_file(place / manifest.MANIFEST, lambda file: file.write(sealed))
    files.sync_folder(place)
    files.rename(place, checkpoint.path)
