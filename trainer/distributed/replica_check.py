"""Replica check: compare the weights of all ranks, to the last bit.

Weights that are equal stay equal as long as every step is taken with the gradients of all ranks.
Anything that changes them on one rank alone, such as an optimizer that the Brain does not know or a
change that depends on the rank, makes several models of one, and no loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer import distributed

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(RuntimeError):
    """Error for ranks whose weights differ; raised on all of them."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum the bits of a tensor, read as integers: a change of any one element changes the sum.

    Args:
        tensor: of any shape and of any dtype of at most 8 bytes, or complex.

    Returns:
        A scalar of dtype int64, on the device of the tensor.
    """
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype is torch.bool:
        values = values.to(torch.int8)
    bits = values.reshape(-1).view(INTEGERS[values.dtype.itemsize])
    return bits.sum(dtype=torch.int64)


def find_differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Find the tensors that differ between ranks, by one message. Every rank must call it.

    Args:
        tensors: the same names, shapes and order on all ranks.

    Returns:
        Their names; none in a run of one process.
    """
    if not tensors or distributed.world_size() == 1:
        return []
    device = next(iter(tensors.values())).device
    own = torch.stack([fingerprint(tensor).to(device) for tensor in tensors.values()])
    # ~x falls as x rises: the largest ~x of all ranks is that of the smallest x.
    largest, smallest = distributed.all_reduce_max_(torch.cat([own, ~own])).chunk(2)
    equal = largest.eq(~smallest).tolist()
    return [name for name, same in zip(tensors, equal, strict=True) if not same]


def check_replicas_in_sync(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are equal on all ranks, to the bit. Every rank must call it.

    Args:
        tensors: the same names, shapes and order on all ranks.
        where: place in the run, with which the error begins.

    Raises:
        DriftError: a tensor is not the same on all ranks; raised on every rank.
    """
    names = find_differing(tensors)
    if not names:
        return
    more = f" and {len(names) - 1} more of {len(tensors)}" if len(names) > 1 else ""
    raise DriftError(
        f"{where} the ranks have different weights: {names[0]}{more}. Something moved them on one "
        "rank alone: a step of an optimizer that is not among self.updates, or a change of weights "
        "that depends on the rank. Weights move through self.optimize; drift_check_every: 0 turns "
        "this check off"
    )
