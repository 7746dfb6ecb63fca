"""Replay of a kept batch: the driver of `Brain.fit` under ``--replay FOLDER``.

The Brain is built as for training. `replay` loads the checkpoint nearest to the skipped step, takes
batch and random generators from the folder, reruns the batch, logs non-finite values, and ends the
run. Nothing is written, and no weight changes. The folder is untrusted: its content is read as
data, and runs no code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainer import seed
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.checkpoint.checkpointer import retry_missing
from trainer.data.batch import to_device
from trainer.defaults import Driver, DriverFinished
from trainer.diagnostics.nonfinite.serialize import deserialize_batch, own_modules
from trainer.diagnostics.nonfinite.tracer import FORMAT, KeptBatch, NonFiniteReport, investigate
from trainer.evaluation import rng_kept
from trainer.metrics import StepReport
from trainer.untrusted import confined, memory_in_proportion, printable

if TYPE_CHECKING:
    from trainer.brain import Brain, FitArguments

logger = logging.getLogger("trainer")

# Entries of `batch.pt`, as `NonFiniteReport.write` saves them, and their types.
FIELDS: dict[str, type] = {
    "batch": dict, "generators": dict, "last": bool, "step": int, "epoch": int,
    "optimizer_step": int, "fits": int, "what": str, "optimizer": str,
}  # fmt: skip
MAX_COUNT = 2**53  # of steps and epochs


class Replayed(DriverFinished):
    """Raised at the end of a replay."""


def make_replay_driver(folder: Path) -> Driver:
    """Return the driver of `Brain.fit` that replays the batch in the folder of a report.

    Calls of `fit` before that of the batch do nothing.
    """
    fits = 0

    def drive(brain: Brain, arguments: FitArguments) -> None:
        nonlocal fits
        fits += 1
        kept = load(folder)
        if fits == kept["fits"]:
            replay(brain, arguments, folder, kept)

    return drive


def load(folder: Path) -> dict[str, Any]:
    """Return the content of `batch.pt`; run no code in it.

    Raises:
        ValueError: if it cannot be read or is no kept batch.
    """
    path = folder / "batch.pt"
    try:
        confined(folder, path)
        with memory_in_proportion(folder):
            kept = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # An untrusted file may raise anything.
        raise ValueError(
            f"{path} is no kept batch ({type(error).__name__}); allowed: the batch.pt of a report "
            "in the folder nonfinite of a run"
        ) from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no kept batch of format {FORMAT}, the only one that this version reads"
        )
    for name, kind in FIELDS.items():
        value = kept.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value <= MAX_COUNT):
            raise ValueError(f"{path} is no kept batch: its {name!r} is no valid {kind.__name__}")
    return kept


def checked_generators(kept: dict[str, Any]) -> dict[str, Any]:
    """Return the states of random generators in a kept batch, or raise ValueError."""
    generators: dict[str, Any] = kept["generators"]
    try:
        with rng_kept():
            seed.set_rng_state({**seed.rng_state(), **generators})
    except Exception as error:  # torch, NumPy and Python raise different exceptions.
        raise ValueError(
            f"its states of random generators cannot be restored ({type(error).__name__})"
        ) from error
    return generators


def nearest(checkpoints: Sequence[Checkpoint], step: int) -> Checkpoint | None:
    """Return the last checkpoint at or before an optimizer step, else the first after it."""
    place = attrgetter("step", "number")
    known = [each for each in checkpoints if each.step is not None]
    before = [each for each in known if each.step is not None and each.step <= step]
    return max(before, key=place) if before else min(known, key=place, default=None)


def load_nearest(checkpointer: Checkpointer, step: int) -> None:
    """Restore the complete checkpoint that `nearest` selects for a step, if there is one."""
    found = nearest([each for each in checkpointer.list_checkpoints() if each.complete], step)
    if found is not None:
        with memory_in_proportion(checkpointer.folder):
            checkpointer.load_checkpoint(found)


def replay(brain: Brain, arguments: FitArguments, folder: Path, kept: dict[str, Any]) -> NoReturn:
    """Rerun a kept batch from `load`, and log non-finite values.

    Args:
        brain: the Brain, before its training.
        arguments: the arguments of `fit`.
        folder: folder of the report, for messages.
        kept: the batch.

    Raises:
        Replayed: when done.
        ValueError: if the batch or a checkpoint does not fit the recipe.
    """
    progress, step = brain.progress, kept["optimizer_step"] + 1
    try:
        generators = checked_generators(kept)
        with memory_in_proportion(folder):
            batch = deserialize_batch(kept["batch"], own_modules(type(brain)))
    except ValueError as error:
        raise ValueError(f"{folder / 'batch.pt'}: {printable(str(error))}") from error

    def recover() -> None:
        if brain.checkpointer is not None:
            retry_missing(lambda: load_nearest(brain.checkpointer, step - 1))
        # Enter the epoch of the batch, even from a later checkpoint.
        progress.fits, progress.epoch = kept["fits"], kept["epoch"]
        progress.phase, progress.stopped = "train", False

    with brain.sandbox():
        brain.start_training(replace(arguments, epoch_counter=[kept["epoch"]]), recover)
        at = brain.progress.optimizer_step
        weights = f"those of step {at}" if at else "untrained"
        if at >= step:
            weights += " (no checkpoint from before it is left)"
        logger.info("replaying step %d, epoch %d; the weights are %s", step, kept["epoch"], weights)
        progress.epoch, progress.step = kept["epoch"], kept["step"]
        progress.optimizer_step = step - 1
        name = kept["optimizer"]
        if name not in brain.updates:
            raise ValueError(
                f"the batch was kept for the optimizer {name!r}, which this Brain lacks; it has "
                f"{', '.join(brain.updates)}"
            )
        loss = None if kept["what"] == "loss" else 0.0
        skipped = StepReport(name, "skipped", loss, lr=brain.updates[name].lr)
        report = NonFiniteReport.of(brain, skipped, str(step), None)
        batch = to_device(batch, brain.device)
        window = [KeptBatch(batch, kept["last"], kept["step"], generators)]
        investigate(brain, report, window)
        for line in (*report.lines(), *report.causes[1:]):
            logger.info("%s", printable(line))
    raise Replayed
