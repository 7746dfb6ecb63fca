"""Summary of a run at its start: what is trained, on what, and where."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from trainer import distributed

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

MAX_MODULES = 8  # that are listed by name


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
        f"parameters (trainable of all): {_parameters(brain.modules)}",
        f"ranks: {ranks}" + (f", of which this is {distributed.rank()}" if ranks > 1 else ""),
        f"epoch: {known} batches"
        + (" on each rank" if ranks > 1 else "")
        + (f", an optimizer step every {accumulated}" if accumulated > 1 else ""),
        f"run folder: {folder}",
    ]


def _parameters(modules: nn.ModuleDict) -> str:
    """Return the numbers of parameters of each module."""
    found = [f"{name} {_count(each)}" for name, each in modules.items()]
    more = [f"and {len(found) - MAX_MODULES} more"] if len(found) > MAX_MODULES else []
    total = [f"{_count(modules)} in all"] if len(found) > 1 else []
    return ", ".join([*found[:MAX_MODULES], *more, *total]) or "none"


def _count(module: nn.Module) -> str:
    parameters = list(module.parameters())
    if any(map(is_lazy, parameters)):
        return "not made yet"
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{trainable:,} of {sum(p.numel() for p in parameters):,}"
