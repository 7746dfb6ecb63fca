"""Sum gradients over ranks once a step, where the accumulation window closes.

DistributedDataParallel ties the sum to one forward and one backward pass of one module; adversarial
recipes, several forward passes, unused parameters and accumulation each break that in their own
way. A sum at the close of the window has none of these cases: a forward pass may run any number of
times, ``self.modules.x`` stays the user's own module, and a rank without a gradient sends zeros
instead of leaving the others waiting.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

import torch
from torch import Tensor

from trainer import distributed

# Bytes in one message: large enough to fill a link, small beside the gradients of a large model.
BUCKET_BYTES = 64 * 2**20


def sum_gradients(
    params: list[Tensor], factor: float, facts: Tensor, sparse: Collection[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Replace each ``p.grad`` by the sum over ranks of ``factor · p.grad``.

    Every rank must call it, with the same parameters. A parameter without a gradient on this rank
    counts as zeros and receives the sum.

    Args:
        params: parameters whose gradients are summed.
        factor: factor of this rank's gradients.
        facts: (K,) numbers of this rank, summed in the same message.
        sparse: those of ``params`` whose gradients may be in sparse layout, the same on all ranks.
            They are sent as the rows that they have.

    Returns:
        The summed facts (K,), and for each parameter the number of ranks that had a gradient
        (len(params),). Both are on the device of ``facts``; nothing waits for it.

    Raises:
        ValueError: a parameter that is not in ``sparse`` has a sparse gradient.
    """
    dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in params), torch.float32)
    had = torch.tensor([p.grad is not None for p in params], dtype=dtype, device=facts.device)
    pieces = [facts.to(dtype), had]
    dense = [p for p in params if p not in sparse]
    for p in dense:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(
                "with several processes, a sparse gradient must be that of a module with "
                f"sparse=True, such as nn.Embedding; a parameter of shape {tuple(p.shape)} is not"
            )
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        pieces.append(grad.reshape(-1).to(device=facts.device, dtype=dtype) * factor)
    summed = [torch.empty(0)] * len(pieces)
    for bucket in _buckets(pieces):
        flat = distributed.all_reduce_sum_(torch.cat([pieces[i] for i in bucket]))
        for i, part in zip(bucket, flat.split([pieces[i].numel() for i in bucket]), strict=True):
            summed[i] = part
    for p, total in zip(dense, summed[2:], strict=True):
        if p.is_complex():
            total = torch.complex(*total.view(*p.shape, 2).unbind(-1))
        p.grad = total.view_as(p).to(device=p.device, dtype=p.dtype)
    for p in params:
        if p in sparse:
            _sum_rows(p, factor)
    return summed[0], summed[1]


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


def _buckets(pieces: list[Tensor]) -> list[list[int]]:
    """Group neighbouring pieces into messages, as their indices."""
    buckets: list[list[int]] = [[]]
    size = 0
    for i, piece in enumerate(pieces):
        if size > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(i)
        size += piece.numel() * piece.element_size()
    return buckets
