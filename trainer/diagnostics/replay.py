"""Replay of a kept batch: the driver of `Brain.fit` under ``--replay FOLDER``.

The recipe builds its Brain as for a training. The driver loads the checkpoint nearest to the
skipped step, takes batch and random generators from the folder, reruns the batch, logs what is not
finite, and ends the run. Nothing is written and nothing moves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.checkpoint.checkpointer import retry_missing
from trainer.data.batch import to_device
from trainer.defaults import Driver, DriverFinished
from trainer.diagnostics.nonfinite.report import FORMAT, KeptBatch, NonFiniteReport
from trainer.diagnostics.nonfinite.serialize import deserialize_batch
from trainer.diagnostics.nonfinite.tracer import investigate
from trainer.metrics import StepReport

if TYPE_CHECKING:
    from trainer.brain import Brain, FitArguments

logger = logging.getLogger("trainer")


class Replayed(DriverFinished):
    """Raised at the end of a replay."""


def make_replay_driver(folder: Path) -> Driver:
    """Return the driver of `Brain.fit` that replays the batch in the folder of a report."""
    fits = 0

    def drive(brain: Brain, arguments: FitArguments) -> None:
        nonlocal fits
        fits += 1
        kept = load(folder)
        if fits == kept["fits"]:
            replay(brain, arguments, kept)

    return drive


def load(folder: Path) -> dict[str, Any]:
    """Return the content of `batch.pt`, read without running anything.

    Raises:
        ValueError: if it cannot be read or is no kept batch.
    """
    path = folder / "batch.pt"
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # A file from elsewhere may raise anything.
        raise ValueError(f"{path} is no kept batch: {type(error).__name__}") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise ValueError(f"{path} is no kept batch of format {FORMAT}")
    return kept


def nearest(checkpoints: Sequence[Checkpoint], step: int) -> Checkpoint | None:
    """Return the last checkpoint at or before an optimizer step, or else the first after it."""
    place = attrgetter("step", "number")
    known = [each for each in checkpoints if each.step is not None]
    before = [each for each in known if each.step is not None and each.step <= step]
    return max(before, key=place) if before else min(known, key=place, default=None)


def load_nearest(checkpointer: Checkpointer, step: int) -> None:
    """Restore the checkpoint that is nearest to a step, as `nearest` says, if there is one."""
    found = nearest(checkpointer.list_checkpoints(), step)
    if found is not None:
        checkpointer.load_checkpoint(found)


def replay(brain: Brain, arguments: FitArguments, kept: dict[str, Any]) -> NoReturn:
    """Rerun a kept batch, as `load` returned it, and log what is not finite.

    Raises:
        Replayed: when done.
        ValueError: if the batch or a checkpoint does not fit the recipe.
    """
    progress, step = brain.progress, kept["optimizer_step"] + 1

    def recover() -> None:
        if brain.checkpointer is not None:
            retry_missing(lambda: load_nearest(brain.checkpointer, step - 1))
        # Enter the epoch of the batch, also from a checkpoint that was saved after it.
        progress.fits, progress.epoch = kept["fits"], kept["epoch"]
        progress.phase, progress.stopped = "train", False

    with brain.sandbox():
        brain.start_training(replace(arguments, epoch_counter=[kept["epoch"]]), recover)
        weights = f"those of step {brain.optimizer_step}" if brain.optimizer_step else "untrained"
        if brain.optimizer_step >= step:
            weights += " (no checkpoint from before it is left)"
        logger.info("replaying step %d, epoch %d; the weights are %s", step, kept["epoch"], weights)
        progress.epoch, progress.step = kept["epoch"], kept["step"]
        progress.optimizer_step = step - 1
        name = kept["optimizer"]
        if name not in brain.updates:
            raise ValueError(
                f"the batch was kept for the optimizer {name!r}, which this Brain lacks"
            )
        loss = None if kept["what"] == "loss" else 0.0
        skipped = StepReport(name, "skipped", loss, lr=brain.updates[name].lr)
        report = NonFiniteReport.of(brain, skipped, str(step), None)
        batch = to_device(deserialize_batch(kept["batch"]), brain.device)
        window = [KeptBatch(batch, kept["last"], kept["step"], kept["generators"])]
        investigate(brain, report, window)
        for line in (*report.lines(), *report.causes[1:]):
            logger.info("%s", line)
    raise Replayed
