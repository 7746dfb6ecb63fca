"""Evaluation: weights to evaluate, and context managers that leave modules as they were."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checks, distributed, seed
from trainer.checkpoint.checkpointer import Checkpointer, retry_missing
from trainer.checkpoint.frozen import OtherBase, completed
from trainer.checkpoint.run_state import check_weights
from trainer.checkpoint.storage import BrokenCheckpoint, MissingCheckpoint, load_plain
from trainer.optim.ema import WeightAverage
from trainer.options import RunOptions
from trainer.texts import first_names

logger = logging.getLogger("trainer")

_rng_lock = RLock()  # Held while a thread uses the random generators of the process.


@contextmanager
def modes_kept(modules: nn.Module) -> Iterator[None]:
    """Context manager that restores on exit which modules are in training mode.

    Args:
        modules: a module, with all parts of it.
    """
    modes = [(module, module.training) for module in modules.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def training_mode(modules: nn.Module, trained: Collection[Tensor]) -> None:
    """Put modules into training mode, except frozen parts in evaluation mode.

    A part in evaluation mode of which no parameter is trained stays there, such as a pretrained
    encoder whose running statistics are not to change.

    Args:
        modules: modules of the Brain.
        trained: parameters that require gradients and that an optimizer has.
    """
    kept = [(part, part.training) for root in _frozen(modules, trained) for part in root.modules()]
    modules.train()
    for part, mode in kept:
        part.training = mode


class TrainingModes:
    """Training modes of modules, parts of which may be unfrozen within a stage.

    A part that is unfrozen gets the mode that it would have if the stage began now, as in a run
    that resumes there: a part that was in evaluation mode because it was frozen is put into
    training mode. Modes that a hook has set for other parts stay.

    Args:
        modules: modules of the Brain.
        rest: function that puts further parts into evaluation mode; None for none.
    """

    def __init__(self, modules: nn.Module, rest: Callable[[], None] | None = None) -> None:
        self._modules, self._rest = modules, rest or (lambda: None)
        self._begun: list[tuple[nn.Module, bool]] = []  # Modes at the start of the stage.

    def begin(self, trained: Collection[Tensor]) -> None:
        """Set the modes with which a stage begins; see `training_mode`.

        Args:
            trained: parameters that require gradients and that an optimizer has.
        """
        training_mode(self._modules, trained)
        self._rest()
        self._begun = [(module, module.training) for module in self._modules.modules()]

    def unfreeze(self, trained: Collection[Tensor]) -> None:
        """Update the modes after parameters were unfrozen.

        Args:
            trained: parameters that require gradients and that an optimizer has.
        """
        present = [module.training for module, _ in self._begun]
        for module, mode in self._begun:
            module.training = mode
        training_mode(self._modules, trained)
        self._rest()
        for (module, mode), own in zip(self._begun, present, strict=True):
            if module.training == mode:  # Not changed by unfreezing: keep what a hook has set.
                module.training = own


def warn_of_modes(modules: nn.Module, trained: Collection[Tensor]) -> None:
    """Warn of trained parts in evaluation mode that `fit` will put into training mode."""
    kept = {part for root in _frozen(modules, trained) for part in root.modules()}
    names = [
        f"{name}.{child}"
        for name, part in modules.named_modules()
        for child, each in part.named_children()
        if name and part.training and not each.training and each not in kept
    ]
    if names:
        logger.warning(
            "fit puts %s into training mode, since it trains; to leave it in evaluation mode, call "
            "its eval() in on_stage_start", first_names(names, 5),
        )  # fmt: skip


def _frozen(
    module: nn.Module, trained: Collection[Tensor], chosen: bool = True
) -> Iterator[nn.Module]:
    """Yield the largest parts that stay in evaluation mode.

    Args:
        module: a module; its parts are searched, too.
        trained: parameters that train.
        chosen: True if ``module`` itself was put into evaluation mode, and not a module around it.
    """
    trains = [p in trained for p in module.parameters()]
    if not module.training and not any(trains) and (trains or chosen):
        yield module
        return
    for child in module.children():
        yield from _frozen(child, trained, chosen=module.training)


@contextmanager
def gradients_kept(modules: nn.Module) -> Iterator[None]:
    """Context manager that restores the gradients of parameters on exit.

    Within it gradients are replaced and not added to, as after ``zero_grad()``.
    """
    before = [(p, p.grad) for p in modules.parameters()]
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


@contextmanager
def rng_kept() -> Iterator[None]:
    """Context manager that restores the random generators of the process on exit."""
    before = seed.rng_state()
    try:
        yield
    finally:
        seed.set_rng_state(before)


@contextmanager
def rng_kept_alone() -> Iterator[None]:
    """Context manager as `rng_kept` that one thread at a time may enter; others wait."""
    with _rng_lock, rng_kept():
        yield


@contextmanager
def evaluation_mode(modules: nn.Module) -> Iterator[None]:
    """Context manager for an evaluation, which changes nothing.

    Within it modules are in evaluation mode and nothing requires gradients. On exit modes and
    random generators are as before.
    """
    with modes_kept(modules), rng_kept(), torch.no_grad():
        modules.eval()
        yield


@contextmanager
def evaluation_weights(
    modules: nn.Module,
    average: WeightAverage | None,
    checkpointer: Checkpointer | None,
    options: RunOptions,
    trained: bool,
    max_key: str | None,
    min_key: str | None,
) -> Iterator[bool]:
    """Context manager in which the modules have the weights to test.

    These are the weights of the best checkpoint by a metric; without a metric the present ones, or
    those of the newest checkpoint if this process has not trained; the mean of several checkpoints
    with ``average_checkpoints``; exponential averages where there are some. Yields False if these
    are the present weights. On exit weights and random generators are as before.

    Args:
        modules: modules of the Brain.
        average: exponential average of the weights, or None.
        checkpointer: checkpoints of the run, or None.
        options: ``average_checkpoints`` and ``ema_decay``.
        trained: True if this process has trained.
        max_key: metric to choose the best checkpoint by; larger is better.
        min_key: metric to choose the best checkpoint by; smaller is better.

    Raises:
        ValueError: if there is nothing to test.
    """
    asked = f"min_key={min_key!r}" if min_key else f"max_key={max_key!r}" if max_key else None
    if checkpointer is None and asked:
        warnings.warn(
            f"{asked} asks for the best checkpoint, but this Brain has no checkpointer: its "
            "weights are tested as they are",
            stacklevel=7,
        )
    with rng_kept(), ExitStack() as stack:
        saved = None
        present = trained and options.average_checkpoints == 1 and not asked
        if checkpointer is not None and checkpointer.enabled and not present:
            complete = partial(completed, modules=modules)
            saved = load_weights(checkpointer, options, max_key, min_key, complete)
            if saved is None and not trained:
                raise ValueError(
                    f"there is nothing to test: this Brain has not trained, and "
                    f"{checkpointer.folder} has no sound checkpoint"
                )
        if saved is not None:
            stack.enter_context(_swapped(modules, saved))
        elif average is not None:
            stack.enter_context(average.applied(modules))
        yield saved is not None or average is not None


def has_weights(modules: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Return True if modules have these weights, bit for bit.

    Args:
        modules: the modules, on any device.
        weights: a state dict of these modules, on the CPU.
    """
    return all(
        torch.equal(own.cpu(), weights[name])
        if isinstance(own, torch.Tensor)
        else own == weights[name]
        for name, own in modules.state_dict().items()
    )


@contextmanager
def counters_as_saved(
    checkpointer: Checkpointer | None,
    objects: Iterable[Any],
    max_key: str | None,
    min_key: str | None,
) -> Iterator[None]:
    """Context manager in which epoch counters have the epoch of the checkpoint that is tested.

    Args:
        checkpointer: checkpoints of the run, or None.
        objects: any objects; those with ``current`` and ``limit`` are epoch counters.
        max_key: metric to choose the best checkpoint by; larger is better.
        min_key: metric to choose the best checkpoint by; smaller is better.
    """
    counters = [each for each in objects if hasattr(each, "current") and hasattr(each, "limit")]
    own = [(counter, counter.current) for counter in counters]
    if counters and checkpointer is not None and checkpointer.enabled and (max_key or min_key):
        for best in checkpointer.find(min_key=min_key, max_key=max_key):
            try:
                epoch = load_plain(best, "brain").get("progress", {}).get("epoch")
            except BrokenCheckpoint as broken:  # Its weights, in another file, may be sound.
                warnings.warn(f"{broken}; epoch counters keep their present epoch", stacklevel=2)
                continue
            for counter in counters if epoch is not None else ():
                counter.current = epoch
    try:
        yield
    finally:
        for counter, current in own:
            counter.current = current


def load_weights(
    checkpointer: Checkpointer,
    options: RunOptions,
    max_key: str | None,
    min_key: str | None,
    complete: Callable[[Any], Any] = lambda weights: weights,
) -> Any:
    """Return the weights of the best sound checkpoints, or None. Every rank must call it.

    Args:
        checkpointer: checkpoints of the run.
        options: ``average_checkpoints`` and ``ema_decay``.
        max_key: metric to choose the best checkpoint by; larger is better.
        min_key: metric to choose the best checkpoint by; smaller is better.
        complete: `completed` for the modules that the weights are for; by default, frozen weights
            that checkpoints have left out are left out.

    Returns:
        A state dict of the Brain's modules, on the CPU; None without a sound checkpoint.

    Raises:
        OtherBase: the modules have another base than the checkpoints.
    """
    # Another process that saves there may delete one that is being read.
    return retry_missing(lambda: _load_weights(checkpointer, options, max_key, min_key, complete))


def _load_weights(
    checkpointer: Checkpointer,
    options: RunOptions,
    max_key: str | None,
    min_key: str | None,
    complete: Callable[[Any], Any],
) -> Any:
    number = options.average_checkpoints
    found = checkpointer.find(min_key=min_key, max_key=max_key, n=None)
    for start in range(0, len(found), number):
        chosen = found[start : start + number]
        names = ", ".join(each.name for each in chosen)
        try:
            weights = checkpointer.average(chosen, "brain", ("modules",), complete)
            if options.ema_decay is not None:
                try:
                    averages = checkpointer.average(chosen, "brain", ("ema", "average"), complete)
                except (BrokenCheckpoint, OtherBase):
                    raise
                except ValueError:
                    logger.warning(
                        "ema_decay is %s, but the run had none when %s was saved: its weights are "
                        "tested, not their average", options.ema_decay, names,
                    )  # fmt: skip
                else:
                    weights = _with_averages(weights, averages)
        except (MissingCheckpoint, OtherBase):  # `retry_missing` handles a MissingCheckpoint.
            raise
        except ValueError as broken:
            warnings.warn(str(broken), stacklevel=2)
            continue
        if len(chosen) < number:
            logger.warning(
                "average_checkpoints is %d, and there are %d: %s", number, len(chosen), names
            )
        logger.info("testing with the weights of %s", names)
        if distributed.is_main():
            checks.warn_of_nonfinite(checkpointer.folder / names, weights)
        return weights
    return None


def _with_averages(weights: Any, averages: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return weights with parameters replaced by their averages.

    A tied parameter has several names for the same memory; its average has one.
    """
    tied = {_memory(value): averages[name] for name, value in weights.items() if name in averages}
    return {
        name: tied.get(_memory(value), value) if isinstance(value, Tensor) else value
        for name, value in weights.items()
    }


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@contextmanager
def _swapped(modules: nn.Module, weights: Mapping[str, Any]) -> Iterator[None]:
    own = copy.deepcopy(modules.state_dict())
    check_weights(modules, weights)
    modules.load_state_dict(weights)
    try:
        yield
    finally:
        modules.load_state_dict(own)
