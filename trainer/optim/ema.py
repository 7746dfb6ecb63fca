"""Exponential moving average of the weights.

average = WeightAverage(modules, decay=0.999)
average.update(modules)        # after each step that moved the weights
with average.applied(modules):
    ...                        # evaluate the average
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer import checks

if TYPE_CHECKING:
    from trainer.optim.step import Update


class WeightAverage:
    """Exponential moving average of the weights, for evaluation.

        average <- average + (1 - d) * (weights - average)

    Parameters in half precision are averaged in float32, where a step of 1 - d is not rounded away.
    Buffers and integer tensors are copied.

    Args:
        modules: the modules whose weights are averaged.
        decay: d, in (0, 1), or a mapping from names of parameters to d; others have no average.
        constant: names of parameters that never change and need no average.

    Attributes:
        count: number of updates.
    """

    def __init__(
        self,
        modules: nn.Module,
        decay: float | Mapping[str, float],
        constant: Collection[str] = (),
    ) -> None:
        names = {name for name, _ in modules.named_parameters()}
        each = decay if isinstance(decay, Mapping) else dict.fromkeys(names, decay)
        self._groups: dict[float, set[str]] = {}  # Names by decay.
        for name, value in each.items():
            d = checks.within("WeightAverage", "decay", value, 0.0, 1.0, "()")
            self._groups.setdefault(d, set()).add(name)
        self._constant = frozenset(constant) | (names - set(each))
        self.count = 0
        self._moving: list[str] = []  # Names of parameters of real or complex numbers.
        self._copied: list[str] = []
        self._average: dict[str, Tensor] = {}
        for name, tensor in self._tensors(modules).items():
            moves = isinstance(tensor, nn.Parameter) and (
                tensor.is_floating_point() or tensor.is_complex()
            )
            (self._moving if moves else self._copied).append(name)
            half = moves and tensor.dtype in (torch.float16, torch.bfloat16)
            kept_as = torch.float32 if half else tensor.dtype
            self._average[name] = tensor.detach().to(kept_as, copy=True)

    @torch.no_grad()
    def update(self, modules: nn.Module, still: Collection[str] = ()) -> None:
        """Move the average towards the present weights; called after each optimizer step.

        Args:
            modules: the modules, with their present weights.
            still: names of parameters whose optimizer has not stepped, and whose average stays.
        """
        tensors, averages = self._tensors(modules), self._average
        checks.same_keys("WeightAverage", tensors, averages)
        for decay, group in self._groups.items():
            if names := [n for n in self._moving if n in group and n not in still]:
                torch._foreach_lerp_(
                    [averages[name] for name in names],
                    [tensors[name].to(averages[name].dtype) for name in names],
                    1.0 - decay,
                )
        _overwrite(averages, tensors, self._copied)
        self.count += 1

    def copy_buffers(self, modules: nn.Module) -> None:
        """Copy tensors that are not averaged, such as buffers.

        Args:
            modules: the modules, with their present buffers.
        """
        _overwrite(self._average, self._tensors(modules), self._copied)

    def restart(self, modules: nn.Module) -> None:
        """Restart the average from the present weights.

        Args:
            modules: the modules, with their present weights.
        """
        _overwrite(self._average, self._tensors(modules), self._average)
        self.count = 0

    @contextmanager
    def applied(self, modules: nn.Module) -> Iterator[None]:
        """Context manager in which the modules have the averaged weights.

        On exit their own weights are restored, bit for bit; changes of weights within the context
        are lost. It holds a copy of the weights.

        Args:
            modules: the modules, with the same parameters and buffers.
        """
        tensors = self._tensors(modules)
        checks.same_keys("WeightAverage", tensors, self._average)
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            _overwrite(tensors, self._average, tensors)
            yield
        finally:
            _overwrite(tensors, own, tensors)

    def _tensors(self, modules: nn.Module) -> dict[str, Tensor]:
        """Return parameters and buffers by name, each once."""
        tensors = {**dict(modules.named_parameters()), **dict(modules.named_buffers())}
        for name in self._constant:
            del tensors[name]
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name, not copied, and the number of updates."""
        return {"count": self.count, "average": dict(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: for a name that is missing or unexpected, and for another shape.
        """
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


def decays(
    setting: float | Mapping[str, float | None], updates: Mapping[str, Update]
) -> float | dict[str, float]:
    """Convert the run option `ema_decay` to the argument of `WeightAverage`.

    Args:
        setting: a decay for all weights, or a mapping from optimizers to decays, where None or no
            entry means no average.
        updates: the optimizers by name.

    Raises:
        ValueError: an optimizer is unknown, or two that share a parameter have different decays.
    """
    if not isinstance(setting, Mapping):
        return setting
    found: dict[str, float] = {}
    for owner, update in updates.items():
        decay = checks.by_name(setting, owner, list(updates), "ema_decay")
        for name in () if decay is None else _names(update):
            if found.setdefault(name, decay) != decay:
                raise ValueError(
                    f"ema_decay has {found[name]:g} and {decay:g} for {name}, which is a parameter "
                    "of several optimizers; allowed: the same for these"
                )
    return found


def still(updates: Mapping[str, Update], stepped: Collection[str]) -> set[str]:
    """Return the names of the parameters that no optimizer in ``stepped`` has."""
    if len(stepped) == len(updates):
        return set()
    moved = {name for owner in stepped for name in _names(updates[owner])}
    return {name for update in updates.values() for name in _names(update)} - moved


def _names(update: Update) -> list[str]:
    return [update.names[p] for p in update.all_params if p in update.names]


@torch.no_grad()
def _overwrite(
    targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], names: Iterable[str]
) -> None:
    if names := list(names):
        torch._foreach_copy_([targets[name] for name in names], [sources[name] for name in names])
