"""Strategies: how the gradients of a step travel between processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.distributed.replicate import sum_gradients


class WindowSums(NamedTuple):
    """Sums over ranks of a closed accumulation window, on the device.

    ``loss_and_weight`` (2,): sum of weighted losses, and of weights.
    ``had_gradient`` (P,): for each parameter, on how many ranks it had a gradient.
    """

    loss_and_weight: Tensor
    had_gradient: Tensor


class Strategy(Protocol):
    """Stands between the optimizers and the process group."""

    def prepare(self, modules: nn.Module) -> None:
        """Make the weights of all ranks equal, before optimizers are built. Collective."""

    def end_window(
        self,
        params: Sequence[Tensor],
        loss: Tensor,
        weight: float,
        reference: float,
        sparse: Collection[Tensor],
    ) -> WindowSums | None:
        """Sum the gradients over ranks. Collective; every rank must close its windows in one order.

        Args:
            params: parameters of the optimizers that step together.
            loss: weighted sum of the window's losses over ``reference``, a scalar.
            weight: number of examples in the window on this rank.
            reference: weight that this rank's gradients are relative to.
            sparse: those of ``params`` whose gradients may be in sparse layout.

        Returns:
            The sums, or None where there is one process and nothing to sum.
        """

    def local_gradients(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients that this rank measures and clips."""

    def sum_of_squares(self, squares: Tensor) -> Tensor:
        """Sum squares of norms over the ranks that hold parts of one gradient."""

    def share_buffers(self, modules: nn.Module) -> None:
        """Make the buffers of all ranks equal, at the end of an epoch. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, equal on all ranks."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""


class SingleProcess:
    """One process: nothing travels."""

    def prepare(self, modules: nn.Module) -> None:
        """Do nothing."""

    def end_window(
        self,
        params: Sequence[Tensor],
        loss: Tensor,
        weight: float,
        reference: float,
        sparse: Collection[Tensor],
    ) -> WindowSums | None:
        """Return None."""
        return None

    def local_gradients(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the parameters that have one."""
        return [p.grad for p in params if p.grad is not None]

    def sum_of_squares(self, squares: Tensor) -> Tensor:
        """Return the squares as they are."""
        return squares

    def share_buffers(self, modules: nn.Module) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class Replicate(SingleProcess):
    """Every rank holds all weights; gradients are summed where a window closes."""

    def prepare(self, modules: nn.Module) -> None:
        """Broadcast rank 0's parameters and buffers. Collective."""
        tensors = [*modules.parameters(), *modules.buffers()]
        distributed.broadcast_([tensor.detach() for tensor in tensors])

    def end_window(
        self,
        params: Sequence[Tensor],
        loss: Tensor,
        weight: float,
        reference: float,
        sparse: Collection[Tensor],
    ) -> WindowSums:
        """Replace each gradient by its sum over ranks. Collective."""
        total = loss * reference
        facts = torch.stack([total, total.new_full((), weight)])
        return WindowSums(*sum_gradients(list(params), reference, facts, sparse))

    def share_buffers(self, modules: nn.Module) -> None:
        """Broadcast rank 0's buffers. Collective."""
        distributed.broadcast_([buffer.detach() for buffer in modules.buffers()])


def make_strategy() -> Strategy:
    """Return the strategy for the processes of this run."""
    return Replicate() if distributed.world_size() > 1 else SingleProcess()
