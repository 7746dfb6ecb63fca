"""Gradients summed over ranks by whoever steps with them.

The usual DistributedDataParallel wrapper ties the sum to one forward and one backward of one
module; adversarial recipes, several forwards, unused parameters and accumulation each break that in
a way of their own. Summing once, where the window closes, has none of these cases: a forward may be
called any number of times, ``self.modules.x`` stays the user's own module, and a rank that has
nothing to give takes part with zeros instead of leaving the others waiting.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

import torch
from torch import Tensor

from trainer import distributed

# Bytes in one message: large enough to fill a link, small beside the gradients of a large model.
BUCKET = 64 * 2**20


def sum_gradients(
    params: list[Tensor], factor: float, facts: Tensor, sparse: Collection[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Replace each ``p.grad`` by the sum over ranks of ``factor · p.grad``, with a factor a rank.

    ``facts`` (K,) is summed in the same message. Returns the summed facts (K,) and, for each
    parameter, how many ranks had a gradient (len(params),): on the device, no sync.
    A parameter without a gradient on this rank counts as zeros and receives the sum. Those in
    ``sparse`` (the same on all ranks) travel as the rows that they have.

    Raises ValueError for a sparse gradient of another one.
    """
    dtype = reduce(torch.promote_types, (p.dtype for p in params), torch.float32)
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
        pieces.append(grad.reshape(-1).to(device=facts.device, dtype=dtype) * factor)
    summed = [torch.empty(0)] * len(pieces)
    for bucket in _buckets(pieces):
        flat = distributed.sum_(torch.cat([pieces[i] for i in bucket]))
        for i, part in zip(bucket, flat.split([pieces[i].numel() for i in bucket]), strict=True):
            summed[i] = part
    for p, total in zip(dense, summed[2:], strict=True):
        p.grad = total.view_as(p).to(device=p.device, dtype=p.dtype)
    for p in params:
        if p in sparse:
            _sum_rows(p, factor)
    return summed[0], summed[1]


def _sum_rows(param: Tensor, factor: float) -> None:
    """The sum over ranks of a gradient in sparse layout, as the rows that any rank has."""
    grad = param.grad
    if grad is None:
        rows, values = torch.zeros(0, dtype=torch.long, device=param.device), param.detach()[:0]
    else:
        own = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
        rows, values = own.indices()[0], own.values() * factor
    rows, values = distributed.gather_rows(rows), distributed.gather_rows(values)
    total = torch.sparse_coo_tensor(rows[None], values, param.shape, check_invariants=False)
    # An embedding that is used as a plain matrix too has a dense gradient.
    param.grad = total.coalesce() if grad is None or grad.is_sparse else total.to_dense()


def _buckets(pieces: list[Tensor]) -> list[list[int]]:
    """Indices of neighbouring pieces that travel together."""
    buckets: list[list[int]] = [[]]
    size = 0
    for i, piece in enumerate(pieces):
        if size > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(i)
        size += piece.numel() * piece.element_size()
    return buckets
