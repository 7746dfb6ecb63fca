"""Which weights a test uses, and how they are put in place and taken out again."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trainer import seed, state

logger = logging.getLogger("trainer")


@contextmanager
def best_weights(brain: Any, max_key: str | None, min_key: str | None) -> Iterator[None]:
    """Within it, the modules of a Brain have the weights to test; after it, their own again.

    Those of the best checkpoint by a metric, or of the newest where this Brain has not trained;
    the mean of several where ``average_checkpoints`` says so; the exponential average where
    there is one. Random generators are as before, too.
    """
    saved, generators = _weights_to_test(brain, max_key, min_key), seed.rng_state()
    with ExitStack() as stack:
        stack.callback(seed.set_rng_state, generators)
        if saved is not None:
            stack.enter_context(_swapped(brain.modules, saved))
        elif brain.weight_average is not None:
            stack.enter_context(brain.weight_average.applied(brain.modules))
        yield


def _weights_to_test(brain: Any, max_key: str | None, min_key: str | None) -> Any:
    checkpointer, number = brain.checkpointer, brain.options.average_checkpoints
    trained = brain.keeper.trained
    if checkpointer is None and (max_key or min_key):
        warnings.warn(
            f"{f'min_key={min_key!r}' if min_key else f'max_key={max_key!r}'} asks for the best "
            "checkpoint, but this Brain has no checkpointer: its weights are tested as they are",
            stacklevel=5,
        )
    if checkpointer is None or not checkpointer.enabled:
        return None
    if trained and number == 1 and not (max_key or min_key):
        return None
    found = checkpointer.find(min_key=min_key, max_key=max_key, n=None)
    path = ("modules",) if brain.options.ema_decay is None else ("weight_average", "average")
    while found:
        try:
            weights = checkpointer.average(found[:number], "brain", path)
        except ValueError as broken:
            warnings.warn(str(broken), stacklevel=2)
            found = found[number:]
            continue
        names = ", ".join(each.path.name for each in found[:number])
        logger.info("testing with the weights of %s", names)
        return weights
    if not trained:
        raise ValueError(
            f"there is nothing to test: this Brain has not trained, and {checkpointer.folder} "
            "has no sound checkpoint"
        )
    return None


@contextmanager
def _swapped(modules: torch.nn.Module, weights: Mapping[str, Any]) -> Iterator[None]:
    own = copy.deepcopy(modules.state_dict())
    weights = {name: weights[name] for name in own if name in weights}
    state.check_modules(modules, weights)
    modules.load_state_dict(weights)
    try:
        yield
    finally:
        modules.load_state_dict(own)
