"""Norms of tensors, right at every scale, at the cost of plain ones."""

from __future__ import annotations

import functools
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
# So many of one shape are measured together, in copies of so many numbers at a time.
SEVERAL, TOGETHER = 4, 100_000
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
    alike = _alike(tensors) if p == 2.0 else []
    order = [place for places in alike for place in places]
    found = [_joined([tensors[place] for place in places]) for places in alike]
    powers = [False] * len(order)
    if len(order) < len(tensors):
        taken = set(order)
        rest = [place for place in range(len(tensors)) if place not in taken]
        singly, flags = _one_by_one([tensors[place] for place in rest], p)
        order, powers = order + rest, powers + flags
        found.append(singly)
    if len(found) == 1:
        return found[0], powers
    whole = torch.cat([each.to(tensors[0].device) for each in found])
    back = sorted(range(len(order)), key=order.__getitem__)
    return whole[torch.tensor(back, device=whole.device)], [powers[place] for place in back]


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of those that several share a shape with, and that `_joined` can measure."""
    shapes: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.is_cpu and tensor.dtype is torch.float32:
            shapes.setdefault(tensor.shape, []).append(place)
    return [
        places
        for shape, places in shapes.items()
        if shape and len(places) >= SEVERAL and shape.numel() <= LONG and _row(shape.numel())
    ]


@functools.lru_cache(maxsize=4096)
def _row(size: int) -> int:
    """The length of the rows, all alike, that so many numbers are measured in; 0 where they would
    have to be short, which takes longer."""
    row = next((row for row in range(min(size, SHORT), 0, -1) if size % row == 0), 0)
    return row if row == size or row >= SHORT // 8 else 0


@torch.no_grad()
def _joined(tensors: list[Tensor]) -> Tensor:
    """The 2-norms of tensors of one shape on a CPU, (len(tensors),): by copies of a few at a time,
    which stay in its cache, in rows. One call for many, and to more digits, in the time of a
    plain norm of each."""
    shape, size = tensors[0].shape, tensors[0].numel()
    row, some = _row(size), min(max(TOGETHER // size, 1), len(tensors))
    copies = tensors[0].new_empty(some * shape[0], *shape[1:])
    parts = []
    for start in range(0, len(tensors), some):
        now = tensors[start : start + some]
        room = copies[: len(now) * shape[0]]
        parts.append(torch.linalg.vector_norm(torch.cat(now, out=room).view(-1, row), dim=1))
    found = torch.cat(parts)
    return found if row == size else torch.linalg.vector_norm(found.view(-1, size // row), dim=1)


def _one_by_one(tensors: Sequence[Tensor], p: float) -> tuple[Tensor, list[bool]]:
    """As `norms_or_powers`, of those that differ."""
    most = SHORT if p == 2.0 else SHORTEST
    # With gaps between its numbers, torch adds them one after the other.
    long = [t.is_cpu and (t.numel() > most or not t.is_contiguous()) for t in tensors]
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
        found = _by_rows(tensor.contiguous().view(-1))
        return found if tensor.dtype.itemsize >= 8 else found.float()
    if tensor.dtype.itemsize < 4:
        tensor = tensor.float()
    if size <= MEDIUM:
        flat = tensor.contiguous().view(-1)
        return flat.dot(flat)
    return tensor.mul(tensor).sum()


def _by_rows(flat: Tensor) -> Tensor:
    """Norms of few in float32, and of these in float64: as fast as one plain norm."""
    dtype = torch.promote_types(flat.dtype, torch.float32) if flat.dtype.itemsize < 4 else None
    size, rest = flat.numel(), None
    row = _row(size)
    if not row:
        row = SHORT
        flat, rest = flat.split([size // row * row, size % row])
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
