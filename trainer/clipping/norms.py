"""Norms of tensors, right at every scale, at the cost of plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Powers of float32 leave its normal range below this, and above its inverse: the plain norm is not
# to be trusted.
SMALLEST_POWER = 1e-30
# On a CPU torch's float32 norm of more equal numbers loses the sixth digit (10,000: 7e-6 off). The
# dot of BLAS has more sums at a time: a block of 5,000 is 3e-7 off, in less time. It is called by
# NumPy, whose calls are quicker than torch's.
SHORT, BLOCK = 1024, 5000
# Of other powers so many by a plain norm, and so many at once by `Tensor.sum`, which adds in pairs.
SHORTEST, CHUNK = 64, 2**20


def norms(tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """The p-norm of each tensor, (len(tensors),), on the device of the first; no sync.

    As torch's clip_grad_norm_ measures, but half precision in float32 and not in its own, and long
    ones on a CPU to more digits.
    """
    found, powers = norms_or_powers(tensors, p)
    if not any(powers):
        return found
    return torch.where(torch.tensor(powers, device=found.device), found.pow(1.0 / p), found)


def norms_or_powers(tensors: Sequence[Tensor], p: float = 2.0) -> tuple[Tensor, list[bool]]:
    """The same, but of the flagged ones the p-th power: on the host a root costs nothing."""
    if not tensors:
        return torch.zeros(0), []
    if p == math.inf:
        largest = _largest([t if t.numel() else t.new_zeros(1) for t in tensors])
        return largest, [False] * len(tensors)
    most = SHORT if p == 2.0 else SHORTEST
    own = [on_host(t) and t.numel() > most for t in tensors]
    mine = [t for t, is_own in zip(tensors, own, strict=True) if is_own]
    powers = _squares(mine) if p == 2.0 else [_power(t, p) for t in mine]
    if all(own):
        return powers if isinstance(powers, Tensor) else torch.stack(powers), own
    rest = [t for t, is_own in zip(tensors, own, strict=True) if not is_own]
    first, second = iter(powers), iter(_together(rest, p))
    return _stacked([next(first if is_own else second) for is_own in own]), own


def on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be read without waiting for a device."""
    return tensor.is_cpu


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of squares of each, on a CPU, in float64."""
    with np.errstate(all="ignore"):  # What overflows is infinite, and looked at by `is_safe`.
        return torch.from_numpy(np.array([_square(t) for t in tensors], dtype=np.float64))


def _square(tensor: Tensor) -> float:
    """The sum of squares of one."""
    usual = tensor.dtype is torch.float32 or tensor.dtype is torch.float64
    if not usual or tensor.requires_grad or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    flat = tensor.numpy().ravel()
    if flat.size <= BLOCK:
        return float(flat.dot(flat))
    if flat.size <= 2 * BLOCK:
        head, tail = flat[:BLOCK], flat[BLOCK:]
        return float(head.dot(head)) + float(tail.dot(tail))
    whole = flat.size // BLOCK * BLOCK
    rows, tail = flat[:whole].reshape(-1, BLOCK), flat[whole:]
    return float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(tail.dot(tail))


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of each."""
    if any(not t.is_cpu or t.is_complex() for t in tensors):
        return _stacked(torch._foreach_norm(tensors, math.inf))
    ends = [torch.aminmax(t) for t in tensors]  # On a CPU, twice as fast as that norm.
    lowest = torch.stack([end.min for end in ends])
    return torch.maximum(lowest.neg_(), torch.stack([end.max for end in ends]))


def _together(tensors: list[Tensor], p: float) -> Sequence[Tensor]:
    """One foreach for all, in float32 where they are in less."""
    half = [t.dtype.itemsize < 4 for t in tensors]
    if not any(half):
        return torch._foreach_norm(tensors, p)
    if all(half):
        return torch._foreach_norm(tensors, p, torch.float32)
    return [
        torch._foreach_norm([t], p, torch.float32 if h else None)[0]
        for t, h in zip(tensors, half, strict=True)
    ]


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars, perhaps of several devices and dtypes, as a vector."""
    device = scalars[0].device
    if any(scalar.device != device for scalar in scalars):
        scalars = [scalar.to(device) for scalar in scalars]
    return torch.stack(tuple(scalars))


def _power(tensor: Tensor, p: float) -> Tensor:
    """The sum of p-th powers of many elements, on a CPU."""
    sums = []
    for chunk in tensor.reshape(-1).split(CHUNK):
        positive = chunk.abs()
        if positive.dtype.itemsize < 4:
            positive = positive.float()
        sums.append(positive.pow_(p).sum() if p != 1.0 else positive.sum())
    return torch.stack(sums).sum()


def safe_norm(tensor: Tensor, p: float = 2.0) -> float:
    """m·‖g/m‖ with m = max|g|, in float64: for any scale, but it waits for the device."""
    size = tensor.abs()
    largest = float(size.max()) if size.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(size.double() / largest, p))


def is_safe(norm: float, p: float = 2.0) -> bool:
    """Whether a plain p-norm of this size is right: nothing overflowed, nothing vanished."""
    if p == math.inf:
        return math.isfinite(norm)
    smallest: float = SMALLEST_POWER ** (1 / p)
    return smallest < norm < 1 / smallest


def joint(norms: Sequence[float], p: float = 2.0) -> float:
    """The p-norm of all from those of each."""
    if p == 2.0:
        return math.hypot(*norms)
    largest = max(norms, default=0.0)
    if p == math.inf or largest == 0.0 or not math.isfinite(largest):
        return largest
    return float(largest * math.fsum((n / largest) ** p for n in norms) ** (1 / p))
