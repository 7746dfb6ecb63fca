"""Averages: of losses over the examples of a stage, and of weights over the steps of a run.

loss = Mean()
loss.update(batch_loss, weight=len(batch))
loss.reduce().value()          # over all examples of all ranks

average = WeightAverage(modules, decay=0.999)
average.update(modules)        # after each step that moved the weights
with average.applied(modules):
    ...                        # evaluate the average
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checks, distributed

# Tensors that wait to be read, at most: what they hold stays small in the longest epoch.
MOST_WAITING = 4096


class _Sum:
    """A weighted sum in which nothing that is not finite enters."""

    __slots__ = ("total", "weight")

    def __init__(self, total: float = 0.0, weight: float = 0.0) -> None:
        self.total, self.weight = total, weight

    def add(self, value: float, weight: float) -> None:
        term = value * weight
        if term - term == 0.0:  # false for NaN and for both infinities
            self.total += term
            self.weight += weight


class Mean:
    """The average of a loss, or of each of several named losses, weighted by examples.

    Values are floats, scalar tensors, or mappings from names to these. A value that is not finite
    never enters, nor does one of weight 0; `value` is None where nothing has entered, and never 0
    for want of a number. Tensors are not read when they come, wherever they live: `read` (as well
    as `value`, `weight`, `reduce` and `state_dict`, which call it) fetches all of them at once, and
    adds them in float64 in the order in which they came, so that when it is called changes no bit.
    """

    def __init__(self) -> None:
        self._named: bool | None = None  # whether the values are mappings; the first one decides
        self._sums: dict[str, _Sum] = {}
        self._waiting: list[tuple[_Sum, float | Tensor, float]] = []

    def update(
        self, value: float | Tensor | Mapping[str, float | Tensor], weight: float = 1.0
    ) -> None:
        """Take in the average `value` of `weight` examples."""
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"the weight of a value must be finite, 0 or more; got {weight!r}")
        if type(value) is float and self._named is False and not self._waiting:
            self._sums[""].add(value, weight)  # the usual case, in half the time
            return
        named = isinstance(value, Mapping)
        if named is not self._named:
            self._decide(named)
        if isinstance(value, Mapping):
            for name, part in value.items():
                self._add(name, part, weight)
        else:
            self._add("", value, weight)

    def _decide(self, named: bool) -> None:
        if self._named is not None:
            raise ValueError(
                "an average is either of plain values or of mappings; got "
                f"{'a mapping' if named else 'a plain value'} after the other"
            )
        self._named = named

    def _add(self, name: str, value: float | Tensor, weight: float) -> None:
        of = f" of {name!r}" if name else ""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"an average is of scalars; got a tensor{of} of shape {list(value.shape)}"
                )
            # A copy, since whoever made it may go on computing in place.
            value = value.detach().clone()
            value = value.reshape(()) if value.dim() else value
        elif not isinstance(value, (int, float)):
            raise ValueError(f"an average is of numbers; got a {type(value).__name__}{of}")
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = _Sum()
        if self._waiting or isinstance(value, Tensor):
            self._waiting.append((total, value, weight))
            if len(self._waiting) >= MOST_WAITING:
                self.read()
        else:
            total.add(value, weight)

    def read(self) -> None:
        """Fetch the tensors that wait: one host-device sync for each device that has some."""
        waiting, self._waiting = self._waiting, []
        devices: dict[torch.device, list[Tensor]] = {}
        for _, value, _ in waiting:
            if isinstance(value, Tensor):
                devices.setdefault(value.device, []).append(value)
        read = {device: iter(torch.stack(t).tolist()) for device, t in devices.items()}
        for total, value, weight in waiting:
            total.add(next(read[value.device]) if isinstance(value, Tensor) else value, weight)

    def value(self) -> float | dict[str, float | None] | None:
        """The average so far: None without any value, a mapping where the values were mappings."""
        self.read()
        means = {name: s.total / s.weight if s.weight else None for name, s in self._sums.items()}
        return means if self._named else means.get("")

    def weight(self) -> float:
        """How many examples have entered: the most of any name."""
        self.read()
        return max((each.weight for each in self._sums.values()), default=0.0)

    def reduce(self) -> Mean:
        """Make this the average over all ranks, and return it. Every rank must call it, once.

        The sums are added in the order of ranks, so that all ranks get the same bits. A rank
        that has seen nothing takes part with nothing.
        """
        if distributed.world_size() == 1:
            return self
        states = distributed.gather(self.state_dict())
        merged: dict[str, list[float]] = {}
        for state in states:
            for name, (total, weight) in state["sums"].items():
                old = merged.get(name, [0.0, 0.0])
                merged[name] = [old[0] + total, old[1] + weight]
        named = next((s["named"] for s in states if s["named"] is not None), None)
        self.load_state_dict({"named": named, "sums": merged})
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what has been summed so far."""
        self.read()
        sums = {name: [each.total, each.weight] for name, each in self._sums.items()}
        return {"named": self._named, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, to the bit."""
        checks.same_keys("Mean", state, ("named", "sums"))
        self._named, self._waiting = state["named"], []
        self._sums = {name: _Sum(*pair) for name, pair in state["sums"].items()}


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
