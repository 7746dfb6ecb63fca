"""Summary of a run at its start: what is trained, on what, and where."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from trainer import distributed
from trainer.adapters import describe_trainable

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")


def announce(line: str, prints: bool) -> None:
    """Log a line; in a program that has not set up logging, print it if ``prints``."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    elif prints:
        tqdm.write(line, file=sys.stderr)


def start_lines(brain: Brain, batches: int | None) -> list[str]:
    """Return the lines: device and precision, parameters, ranks, batches, run folder.

    Args:
        brain: the Brain, about to train.
        batches: batches of an epoch on this rank; None where unknown.
    """
    options, ranks = brain.options, distributed.world_size()
    trained = [p for update in brain.updates.values() for p in update.all_params]
    known = "an unknown number of" if batches is None else f"{batches:,}"
    accumulated = options.grad_accumulation_factor
    folder = "none" if options.debug else options.output_folder or "none"
    return [
        f"device: {brain.device}, precision {options.precision}"
        + (f", evaluation {options.eval_precision}" if options.eval_precision else ""),
        describe_trainable(brain.modules, trained),
        f"ranks: {ranks}",
        f"epoch: {known} batches"
        + (" on each rank" if ranks > 1 else "")
        + (f", an optimizer step every {accumulated}" if accumulated > 1 else ""),
        f"run folder: {folder}",
    ]
