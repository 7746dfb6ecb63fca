"""A batch whose step was skipped, trained on once more: what `fit` does under ``--replay FOLDER``.

The recipe builds its Brain as for a training; `fit` then takes the checkpoint nearest to the step,
the batch and the random generators from the folder, finds out what is not finite, and ends the run.
Nothing is written and nothing moves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.data.batch import to_device
from trainer.defaults import DriverFinished
from trainer.diagnostics.nonfinite import Entry, investigate
from trainer.diagnostics.nonfinite.case import FORMAT, Case
from trainer.diagnostics.nonfinite.keepsake import unpacked
from trainer.hooks import Stage
from trainer.metrics import StepReport

logger = logging.getLogger("trainer")


class Replayed(DriverFinished):
    """The replay is over, and with it the run."""


def load(folder: Path) -> dict[str, Any]:
    """What `batch.pt` of a case holds, read without running anything.

    Raises ValueError where it is none.
    """
    path = folder / "batch.pt"
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # Whatever an unpickler meets in bytes that somebody else wrote.
        raise ValueError(f"{path} is no kept batch: {type(error).__name__}") from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        raise ValueError(f"{path} is no kept batch of format {FORMAT}")
    return kept


def nearest(checkpoints: Sequence[Any], step: int) -> Any:
    """The last checkpoint at or before an optimizer step, else the first after it, else None."""
    known = [each for each in checkpoints if each.step is not None]
    before = [each for each in known if each.step <= step]
    if before:
        return max(before, key=lambda each: (each.step, each.number))
    return min(known, key=lambda each: (each.step, each.number), default=None)


def restore(brain: Any) -> Any:
    """Load the checkpoint nearest to the step that is replayed; None where there is none."""
    step = load(Path(brain.options.replay))["optimizer_step"]
    checkpoint = nearest(brain.checkpointer.list_checkpoints(), step)
    if checkpoint is not None:
        brain.checkpointer.load_checkpoint(checkpoint)
    return checkpoint


def run(brain: Any) -> None:
    """Replay, say what was found, and raise Replayed; returns where it is another `fit`'s turn."""
    folder = Path(brain.options.replay)
    kept = load(folder)
    if brain.keeper.fits != kept["fits"]:
        return
    step = kept["optimizer_step"] + 1
    weights = f"those of step {brain.optimizer_step}" if brain.optimizer_step else "untrained"
    if brain.optimizer_step >= step:
        weights += " (no checkpoint from before it is left)"
    logger.info("replaying step %d, epoch %d; the weights are %s", step, kept["epoch"], weights)
    brain.modules.train()
    brain.on_stage_start(Stage.TRAIN, kept["epoch"])
    brain.keeper.begin_training()
    brain.epoch, brain.step, brain.optimizer_step = kept["epoch"], kept["step"], step - 1
    batch = to_device(unpacked(kept["batch"]), brain.device)
    entry = Entry(batch, kept["weight"], kept["last"], kept["step"], None)
    loss = None if kept["what"] == "loss" else 0.0
    report = StepReport(kept["optimizer"], "skipped", loss, lr=brain.updates[kept["optimizer"]].lr)
    case = Case.of(brain, report, str(step), None)
    investigate(brain, case, [entry], [kept["generators"]])
    for line in (*case.lines(), *case.causes[1:]):
        logger.info("%s", line)
    raise Replayed
