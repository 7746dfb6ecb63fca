"""Exponential moving average of the weights.

average = WeightAverage(modules, decay=0.999)
average.update(modules)        # after each step that moved the weights
with average.applied(modules):
    ...                        # evaluate the average
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checks


class WeightAverage:
    """An exponential moving average of the weights: steadier than the last ones, for evaluation.

        average <- average + (1 - d) * (weights - average)

    With `warmup`, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first random
    weights are soon forgotten. Parameters in half precision are averaged in float32 (a step of
    1 - d would be rounded away); buffers, and whatever is not floating point, are copied.
    """

    def __init__(self, modules: nn.Module, decay: float, warmup: bool = False) -> None:
        self.decay = checks.within("WeightAverage", "decay", decay, 0.0, 1.0, "()")
        self.warmup = warmup
        self.count = 0
        tensors = _tensors(modules)
        self._average = {n: t.detach().to(_kept_as(t), copy=True) for n, t in tensors.items()}
        self._moving = [n for n, t in tensors.items() if _moves(t)]
        self._copied = [n for n, t in tensors.items() if not _moves(t)]

    @torch.no_grad()
    def update(self, modules: nn.Module) -> None:
        """Move towards the weights as they are now; call it after a step that moved them."""
        tensors, averages = _tensors(modules), self._average
        checks.same_keys("WeightAverage", tensors, averages)
        if self._moving:
            torch._foreach_lerp_(
                [averages[name] for name in self._moving],
                [tensors[name].to(averages[name].dtype) for name in self._moving],
                1.0 - self.decay_now(),
            )
        _overwrite(averages, tensors, self._copied)
        self.count += 1

    def copy_buffers(self, modules: nn.Module) -> None:
        """Take over what is not averaged, as it is now."""
        _overwrite(self._average, _tensors(modules), self._copied)

    def restart(self, modules: nn.Module) -> None:
        """Begin anew, with the weights as they are now."""
        _overwrite(self._average, _tensors(modules), self._average)
        self.count = 0

    def decay_now(self) -> float:
        """The decay of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.count) / (10 + self.count))

    @contextmanager
    def applied(self, modules: nn.Module) -> Iterator[None]:
        """Within it, the modules have the averaged weights; after it, their own, bit for bit.

        What is done to the weights within is lost. One copy of the weights is held meanwhile.
        """
        tensors = _tensors(modules)
        checks.same_keys("WeightAverage", tensors, self._average)
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            _overwrite(tensors, self._average, tensors)
            yield
        finally:
            _overwrite(tensors, own, tensors)

    def state_dict(self) -> dict[str, Any]:
        """The averages by name and the number of updates, as they are: they move with the next."""
        return {"count": self.count, "average": dict(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; a ValueError names what is missing, unexpected or misshapen."""
        checks.same_keys("WeightAverage", state, ("count", "average"))
        checks.same_keys("WeightAverage", state["average"], self._average)
        for name, average in self._average.items():
            saved = state["average"][name]
            if saved.shape != average.shape:
                raise ValueError(
                    f"the saved average of {name!r} has shape {list(saved.shape)}; "
                    f"the model's has {list(average.shape)}"
                )
        _overwrite(self._average, state["average"], self._average)
        self.count = state["count"]


def _tensors(modules: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a shared one has one name."""
    return {**dict(modules.named_parameters()), **dict(modules.named_buffers())}


def _moves(tensor: Tensor) -> bool:
    """Whether it is averaged: a parameter of real or complex numbers. The rest is copied."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return isinstance(tensor, nn.Parameter) and numbers


def _kept_as(tensor: Tensor) -> torch.dtype:
    half = _moves(tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else tensor.dtype


@torch.no_grad()
def _overwrite(
    targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], names: Iterable[str]
) -> None:
    pairs = [(targets[name], sources[name]) for name in names]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
