"""Norms of tensors, right at every scale, at the cost of plain ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Powers of float32 leave its normal range below this, and above its inverse: the plain norm is not
# to be trusted.
SMALLEST_POWER = 1e-30
# A float32 norm of more equal numbers loses the sixth digit on a CPU (65536 of 1.7: 1.5e-5 off).
# For more there is, in this order: BLAS's dot, which has more sums at a time; `Tensor.sum`, which
# adds in pairs, but its squares take memory; and rows of few, which cost several calls.
SHORT, MEDIUM, LONG = 1024, 4096, 2**15
ROW = 512
# Of other powers: so many by a plain norm, and so many at once by `Tensor.sum`.
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
    long = [t.is_cpu and t.numel() > most for t in tensors]
    short = [t for t, is_long in zip(tensors, long, strict=True) if not is_long]
    plain: Iterator[Tensor] = iter(_together(short, p) if short else ())
    return _stacked(
        [_power(t, p) if is_long else next(plain) for t, is_long in zip(tensors, long, strict=True)]
    ), long


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
    size = tensor.numel()
    if p == 2.0 and MEDIUM < size <= LONG and tensor.dtype is torch.float32:  # the usual case
        return tensor.mul(tensor).sum()
    if p != 2.0:
        sums = []
        for chunk in tensor.reshape(-1).split(CHUNK):
            positive = chunk.abs()
            if positive.dtype.itemsize < 4:
                positive = positive.float()
            sums.append(positive.pow_(p).sum() if p != 1.0 else positive.sum())
        return torch.stack(sums).sum()
    if size > LONG or tensor.is_complex():
        found = _by_rows(tensor.reshape(-1))
        return found if tensor.dtype.itemsize >= 8 else found.float()
    if tensor.dtype.itemsize < 4:
        tensor = tensor.float()
    if size <= MEDIUM:
        flat = tensor.reshape(-1)
        return flat.dot(flat)
    return tensor.mul(tensor).sum()


def _by_rows(flat: Tensor) -> Tensor:
    """Norms of few in float32, and of these in float64: as fast as one plain norm."""
    dtype = torch.promote_types(flat.dtype, torch.float32) if flat.dtype.itemsize < 4 else None
    size = flat.numel()
    row = min(size & -size, ROW)  # The largest power of two that divides it.
    rest = None
    if row < ROW // 2:  # Shorter ones take longer.
        row = ROW
        flat, rest = flat.split([size // ROW * ROW, size % ROW])
    parts = torch.linalg.vector_norm(flat.view(-1, row), dim=1, dtype=dtype).double()
    total: Tensor = parts.dot(parts)
    if rest is not None:
        total += torch.linalg.vector_norm(rest, dtype=dtype).double().square()
    return total


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
