"""Ranks that drift apart, found: now and then they compare their weights, to the last bit.

Weights that were equal stay equal where every step is taken with gradients of all ranks. Whatever
moves them on one rank alone, such as an optimizer that the Brain does not know, or a change of
weights that depends on the rank, makes several models of one, and no loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer import distributed

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RuntimeError):
    """The ranks have different weights; raised on all of them."""


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers: another one if any single element differs."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype is torch.bool:
        values = values.to(torch.int8)
    bits = values.reshape(-1).view(INTEGERS[values.dtype.itemsize])
    return bits.sum(dtype=torch.int64)


def different(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not the same on all ranks. One message, one sync."""
    if not tensors or distributed.world_size() == 1:
        return []
    first = next(iter(tensors.values())).device
    own = torch.stack([fingerprint(tensor).to(first) for tensor in tensors.values()])
    # ~x falls as x rises: the largest ~x of all ranks is that of the smallest x.
    largest, smallest = distributed.largest_(torch.cat([own, ~own])).chunk(2)
    same = largest.eq(~smallest).tolist()
    return [name for name, equal in zip(tensors, same, strict=True) if not equal]


def check(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise DriftError on every rank if a tensor is not the same on all of them."""
    names = different(tensors)
    if not names:
        return
    more = f" and {len(names) - 1} more of {len(tensors)}" if len(names) > 1 else ""
    raise DriftError(
        f"{where} the ranks have different weights: {names[0]}{more}. Something moved them on one "
        "rank alone: a step of an optimizer that is not among self.updates, or a change of weights "
        "that depends on the rank. Weights move through self.optimize; drift_check_every: 0 turns "
        "this check off"
    )
