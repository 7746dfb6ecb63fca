"""Strategies: how the weights and gradients of several processes are kept equal.

Gradients are summed over ranks once a step, where the accumulation window closes.
DistributedDataParallel ties the sum to one forward and one backward pass of one module; adversarial
recipes, several forward passes, unused parameters and accumulation each break that in their own
way. A sum at the close of the window has none of these cases: a forward pass may run any number of
times, ``self.modules.x`` stays the user's own module, and a rank without a gradient sends zeros
instead of leaving the others waiting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer import distributed

# Bytes in one message: large enough to fill a link, small beside the gradients of a large model.
BUCKET_BYTES = 64 * 2**20


class WindowSums(NamedTuple):
    """Sums over ranks of a closed accumulation window, on the device.

    Args:
        loss_and_weight: sum of weighted losses, and sum of weights, (2,).
        had_gradient: for each of P parameters, the number of ranks on which it had a gradient,
            (P,).
    """

    loss_and_weight: Tensor
    had_gradient: Tensor


class Strategy:
    """Base class of strategies, and the strategy of a single process: nothing is communicated.

    A strategy stands between the optimizers and the process group.
    """

    def prepare(self, modules: nn.Module) -> None:
        """Make the weights of all ranks equal, before optimizers are built. Collective."""

    def begin_window(self, params: Sequence[Tensor]) -> None:
        """Prepare for the backward passes of an accumulation window over these parameters."""

    def end_window(
        self,
        params: Sequence[Tensor],
        loss: Tensor,
        weight: float,
        reference: float,
        sparse: Collection[Tensor],
    ) -> WindowSums | None:
        """Sum the gradients of a window over ranks. Every rank must close its windows in one order.

        Each ``p.grad`` becomes the sum over ranks of ``reference · p.grad``. A parameter without a
        gradient on this rank counts as zeros and receives the sum.

        Args:
            params: parameters of the optimizers that step together, the same on all ranks.
            loss: weighted sum of the window's losses over ``reference``, a scalar.
            weight: number of examples in the window on this rank.
            reference: weight that this rank's gradients are relative to.
            sparse: those of ``params`` whose gradients may be in sparse layout, the same on all
                ranks. They are sent as the rows that they have.

        Returns:
            The sums, on the device of ``loss``, without waiting for it; None for a single process.

        Raises:
            ValueError: a parameter that is not in ``sparse`` has a sparse gradient.
        """
        return None

    def local_gradients(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients, or the parts of them, that this rank measures and clips."""
        return [p.grad for p in params if p.grad is not None]

    def sum_of_squares(self, squares: Tensor) -> Tensor:
        """Sum squared norms (N,) over the ranks that hold parts of the same gradients."""
        return squares

    def share_buffers(self, modules: nn.Module) -> None:
        """Make the buffers of all ranks equal, at the end of an epoch. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""


class Replicate(Strategy):
    """Strategy in which every rank holds all weights."""

    def prepare(self, modules: nn.Module) -> None:
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
        device = loss.device
        dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in params), torch.float32)
        had = torch.tensor([p.grad is not None for p in params], dtype=dtype, device=device)
        total = loss * reference
        pieces = [torch.stack([total, total.new_full((), weight)]).to(dtype), had]
        dense = [p for p in params if p not in sparse]
        for p in dense:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(
                    "with several processes, a sparse gradient must be that of a module with "
                    f"sparse=True, such as nn.Embedding; a parameter of shape {tuple(p.shape)} is "
                    "not"
                )
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
            pieces.append(grad.reshape(-1).to(device=device, dtype=dtype) * reference)
        summed = [part for bucket in _buckets(pieces) for part in _sum_together(bucket)]
        for p, part in zip(dense, summed[2:], strict=True):
            if p.is_complex():
                part = torch.complex(*part.view(*p.shape, 2).unbind(-1))
            p.grad = part.view_as(p).to(device=p.device, dtype=p.dtype)
        for p in params:
            if p in sparse:
                _sum_rows(p, reference)
        return WindowSums(summed[0], summed[1])

    def share_buffers(self, modules: nn.Module) -> None:
        distributed.broadcast_([buffer.detach() for buffer in modules.buffers()])


def make_strategy() -> Strategy:
    """Return the strategy for the processes of this run."""
    return Replicate() if distributed.world_size() > 1 else Strategy()


def _buckets(pieces: list[Tensor]) -> list[list[Tensor]]:
    """Group neighbouring vectors into messages."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for piece in pieces:
        if size > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(piece)
        size += piece.nbytes
    return buckets


def _sum_together(vectors: list[Tensor]) -> Sequence[Tensor]:
    """Sum vectors over ranks by one message."""
    total = distributed.all_reduce_sum_(torch.cat(vectors))
    return torch.split(total, [len(vector) for vector in vectors])


def _sum_rows(param: Tensor, factor: float) -> None:
    """Sum a gradient in sparse layout over ranks, by the rows that any rank has."""
    grad = param.grad
    if grad is None:
        rows, values = torch.zeros(0, dtype=torch.long, device=param.device), param.detach()[:0]
    else:
        own = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
        rows, values = own.indices()[0], own.values() * factor
    rows, values = distributed.all_gather_rows(rows), distributed.all_gather_rows(values)
    total = torch.sparse_coo_tensor(rows[None], values, param.shape, check_invariants=False)
    # An embedding that is used as a plain matrix too has a dense gradient.
    param.grad = total.coalesce() if grad is None or grad.is_sparse else total.to_dense()
