"""Summary of a run at its start: what is trained, on what, and where."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from trainer import distributed

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
    known = "an unknown number of" if batches is None else f"{batches:,}"
    accumulated = options.grad_accumulation_factor
    folder = "none" if options.debug else options.output_folder or "none"
    return [
        f"device: {brain.device}, precision {options.precision}"
        + (f", evaluation {options.eval_precision}" if options.eval_precision else ""),
        _trainable(brain),
        f"ranks: {ranks}",
        f"epoch: {known} batches"
        + (" on each rank" if ranks > 1 else "")
        + (f", an optimizer step every {accumulated}" if accumulated > 1 else ""),
        f"run folder: {folder}",
    ]


def _trainable(brain: Brain) -> str:
    """Return a line with the numbers of trainable and of all parameters, in total and by module."""
    trained = {p for update in brain.updates.values() for p in update.all_params if p.requires_grad}

    def counted(module: nn.Module) -> tuple[int, int]:
        params = list(module.parameters())
        return sum(p.numel() for p in params if p in trained), sum(p.numel() for p in params)

    count, total = counted(brain.modules)
    text = f"trainable: {count:,} of {total:,} parameters ({100 * count / max(total, 1):.2f} %)"
    parts = {name: counted(module) for name, module in brain.modules.named_children()}
    if len(parts) > 1:
        text += ": " + ", ".join(f"{name} {n:,} of {all_:,}" for name, (n, all_) in parts.items())
    return text
