"""Norms of tensors, right at every scale, at the cost of plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Powers of float32 leave its normal range below this, and above its inverse: the plain norm is not
# to be trusted.
SMALLEST_POWER = 1e-30
# A float32 sum over more equal numbers loses the sixth digit on a CPU (65536 of 1.7: 1.5e-5 off).
LONGEST = 1024
ROW = 256


def norms(tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
    """The p-norm of each tensor as a scalar on its device; no sync.

    As torch's clip_grad_norm_ measures, but half precision in float32 and not in its own, and long
    tensors on a CPU in rows.
    """
    short: list[Tensor] = []
    found: list[Tensor | None] = []
    for t in tensors:
        if t.numel() > LONGEST and t.is_cpu and p != math.inf:
            found.append(_by_rows(t, p))
        else:
            found.append(None)
            short.append(t)
    rest = iter(_together(short, p))
    return [next(rest) if each is None else each for each in found]


def _together(tensors: list[Tensor], p: float) -> Sequence[Tensor]:
    """One foreach for all, in float32 where they are in less."""
    if not tensors:
        return []
    if p == math.inf:  # Of nothing there is no largest.
        return torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], p)
    half = [t.dtype.itemsize < 4 for t in tensors]
    if not any(half):
        return torch._foreach_norm(tensors, p)
    if all(half):
        return torch._foreach_norm(tensors, p, torch.float32)
    return [
        torch._foreach_norm([t], p, torch.float32 if h else None)[0]
        for t, h in zip(tensors, half, strict=True)
    ]


def _by_rows(tensor: Tensor, p: float) -> Tensor:
    """Sums of few powers in float32, and of these in float64: as fast as one plain sum."""
    flat = tensor.reshape(-1)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows, rest = flat.split([flat.numel() // ROW * ROW, flat.numel() % ROW])
    parts = torch.linalg.vector_norm(rows.view(-1, ROW), p, dim=1, dtype=dtype)
    if rest.numel():
        parts = torch.cat([parts, torch.linalg.vector_norm(rest, p, dtype=dtype).reshape(1)])
    wide = torch.complex128 if parts.is_complex() else torch.float64
    total: Tensor = torch.linalg.vector_norm(parts, p, dtype=wide)
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
