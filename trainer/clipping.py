"""Gradients measured once, safely, and clipped: what happens between ``backward`` and a step.

A clipper is any object that is called with measured, finite `Gradients` and may change them. It
keeps its limit in ``limit`` and, where it has a history, offers ``state_dict``/``load_state_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Squares of float32 leave its normal range outside of these: the plain norm is not to be trusted.
SMALLEST_SAFE, LARGEST_SAFE = 1e-15, 1e15
# A float32 sum over more equal numbers loses the sixth digit on a CPU (65536 of 1.7: 1.5e-5 off).
LONGEST = 1024
ROW = 256
# A coefficient this small is near the end of float32's range, where it has few digits left.
SMALLEST_FACTOR = 1e-30


class Gradients:
    """The gradients of one optimizer at the end of a window, and their L2 norms.

    ``norms`` has a float for every tensor of ``tensors``, ``norm`` is over all of them; both are
    known after `take`. ``groups`` are the optimizer's parameter groups. Norms are right to 1e-6 of
    the float64 value for gradients of scale 1e-30 to 1e30, whatever their dtype. With
    ``elementwise`` the largest element of each tensor is measured too, into ``maxima``.
    """

    __slots__ = (
        "elementwise", "groups", "maxima", "norm", "norm_after", "norms", "params", "tensors",
    )  # fmt: skip

    def __init__(self, groups: Sequence[Mapping[str, Any]], elementwise: bool = False) -> None:
        self.groups, self.elementwise = groups, elementwise
        self.params: list[Tensor] = [
            p for group in groups for p in group["params"] if p.grad is not None
        ]
        self.tensors: list[Tensor] = [p.grad for p in self.params if p.grad is not None]
        self.norms: list[float] = []
        self.maxima: list[float] = []
        self.norm = math.nan
        self.norm_after: float | None = None

    def measure(self) -> list[Tensor]:
        """Scalars on the device from which `take` makes the norms; no sync."""
        long = [t.numel() > LONGEST and t.is_cpu and not t.is_sparse for t in self.tensors]
        others = iter(
            _norms([t for t, is_long in zip(self.tensors, long, strict=True) if not is_long])
        )
        scalars = [
            _norm_by_rows(t) if is_long else next(others)
            for t, is_long in zip(self.tensors, long, strict=True)
        ]
        if self.elementwise and self.tensors:
            scalars += torch._foreach_norm(self.tensors, math.inf)
        return scalars

    def take(self, values: list[float]) -> None:
        """Turn the values of `measure`'s scalars into `norms`, `norm` and `maxima`."""
        number = len(self.tensors)
        self.norms, self.maxima = values[:number], values[number:]
        self.norm = math.hypot(*self.norms)
        if not SMALLEST_SAFE < self.norm < LARGEST_SAFE:
            # Squares overflow or vanish, or something is not finite (rare; syncs).
            self.norms = [_safe_norm(t) for t in self.tensors]
            self.norm = math.hypot(*self.norms)
        self.norm_after = self.norm

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.norm)

    def keep(self, flags: Sequence[bool]) -> None:
        """Leave out the parameters whose flag is false, as if they were frozen."""
        for param, kept in zip(self.params, flags, strict=True):
            if not kept:
                param.grad = None
        self.params = [p for p, kept in zip(self.params, flags, strict=True) if kept]
        self.tensors = [t for t, kept in zip(self.tensors, flags, strict=True) if kept]
        self.norms = [n for n, kept in zip(self.norms, flags, strict=True) if kept]
        self.maxima = [n for n, kept in zip(self.maxima, flags, strict=self.elementwise) if kept]
        self.norm = self.norm_after = math.hypot(*self.norms)

    def rescale(self, factor: float) -> None:
        """Multiply gradients and norms: from sums to means."""
        self.scale(factor)
        self.norms = [norm * factor for norm in self.norms]
        self.maxima = [largest * factor for largest in self.maxima]
        self.norm *= factor
        self.norm_after = self.norm

    def parts(self, limit: float) -> list[tuple[float, list[int]]]:
        """Limits, and the indices into ``tensors`` of what each is over.

        A parameter group with its own ``max_grad_norm`` is a part alone; ``limit`` is for the rest.
        """
        found: list[tuple[float, list[int]]] = []
        rest: list[int] = []
        start = 0
        for group in self.groups:
            stop = start + sum(p.grad is not None for p in group["params"])
            if "max_grad_norm" in group:
                found.append((limit_of(group["max_grad_norm"]), list(range(start, stop))))
            else:
                rest += range(start, stop)
            start = stop
        return [*found, (limit, rest)]

    def scale(self, coefficient: float, where: Sequence[int] | None = None) -> None:
        """Multiply the gradients (those with the indices ``where``) in place."""
        tensors = self.tensors if where is None else [self.tensors[i] for i in where]
        times = 1
        if 0.0 < coefficient < SMALLEST_FACTOR:
            coefficient, times = math.sqrt(coefficient), 2
        for _ in range(times):
            wide = [t for t in tensors if t.dtype.itemsize >= 4]
            if wide:
                torch._foreach_mul_(wide, coefficient)
            for t in tensors:
                if t.dtype.itemsize < 4:  # There, the foreach of a CPU rounds the coefficient too.
                    t.mul_(coefficient)


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """As torch's clip_grad_norm_ measures, but half precision in float32 and not in its own."""
    if not tensors:
        return []
    half = [t.dtype.itemsize < 4 for t in tensors]
    if all(half) or not any(half):
        return torch._foreach_norm(tensors, 2, torch.float32 if half[0] else None)
    return [
        torch._foreach_norm([t], 2, torch.float32 if h else None)[0]
        for t, h in zip(tensors, half, strict=True)
    ]


def _norm_by_rows(tensor: Tensor) -> Tensor:
    """Sums of few squares in float32, and of these in float64: as fast as one plain sum."""
    flat = tensor.reshape(-1)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows, rest = flat.split([flat.numel() // ROW * ROW, flat.numel() % ROW])
    norms = torch.linalg.vector_norm(rows.view(-1, ROW), dim=1, dtype=dtype)
    if rest.numel():
        norms = torch.cat([norms, torch.linalg.vector_norm(rest, dtype=dtype).reshape(1)])
    total: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return total


def _safe_norm(tensor: Tensor) -> float:
    """m·‖g/m‖ with m = max|g|."""
    size = (tensor.coalesce().values() if tensor.is_sparse else tensor).abs()
    largest = float(size.max()) if size.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(size.double() / largest))


class Clipper(Protocol):
    """What an `Update` needs of a clipper; one with ``elementwise = True`` is given maxima too."""

    limit: float

    def __call__(self, gradients: Gradients) -> bool:
        """Change the gradients in place where they exceed the limit; say whether that was so."""


def limit_of(value: float | None) -> float:
    """A limit as users write it: None, infinity, 0 and below mean "measure, do not clip".

    A negative limit would turn descent into ascent, and 0 would freeze the weights.
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(
            f"max_grad_norm is {value!r}; allowed: a number; null, inf, 0 or below mean no clipping"
        )
    return float(value) if value > 0 else math.inf


class NormClip:
    """Scale the gradients of an optimizer down so that their joint L2 norm is at most ``limit``.

    g ← g · min(1, c / (‖g‖ + 1e-6)), with ‖g‖ over every parameter group of the optimizer (Pascanu
    et al. 2013). A parameter group with its own ``max_grad_norm`` is measured and clipped alone.
    """

    def __init__(self, limit: float | None = 5.0) -> None:
        self.limit = limit_of(limit)

    def __call__(self, gradients: Gradients) -> bool:
        if any("max_grad_norm" in group for group in gradients.groups):
            return self._by_group(gradients)
        if gradients.norm <= self.limit:
            return False
        coefficient = self.limit / (gradients.norm + 1e-6)
        gradients.scale(coefficient)
        gradients.norm_after = gradients.norm * coefficient
        return True

    def _by_group(self, gradients: Gradients) -> bool:
        after, clipped = [], False
        for limit, members in gradients.parts(self.limit):
            norm = math.hypot(*(gradients.norms[i] for i in members))
            if norm > limit:
                coefficient = limit / (norm + 1e-6)
                gradients.scale(coefficient, members)
                norm, clipped = norm * coefficient, True
            after.append(norm)
        gradients.norm_after = math.hypot(*after)
        return clipped


class ValueClip:
    """Clamp every element of the gradients to [-limit, limit]; this may change their direction.

    A parameter group with its own ``max_grad_norm`` is clamped to that.
    """

    elementwise = True

    def __init__(self, limit: float | None = 5.0) -> None:
        self.limit = limit_of(limit)

    def __call__(self, gradients: Gradients) -> bool:
        clipped = False
        for limit, members in gradients.parts(self.limit):
            over = [gradients.tensors[i] for i in members if gradients.maxima[i] > limit]
            if any(tensor.is_sparse or tensor.is_complex() for tensor in over):
                raise ValueError("clip: value knows no sparse or complex gradients; use norm")
            if over:
                torch._foreach_clamp_max_(over, limit)
                torch._foreach_clamp_min_(over, -limit)
                clipped = True
        if clipped:
            gradients.norm_after = None  # Measuring again would cost a host-device sync.
        return clipped


def by_name(setting: Any, name: str, known: Sequence[str], key: str, default: Any = None) -> Any:
    """The part of a setting that is for the optimizer ``name``: itself, or its entry if a mapping.

    An optimizer without an entry has the ``default``.

    Raises ValueError for a mapping that names an optimizer which does not exist.
    """
    if not isinstance(setting, Mapping):
        return setting
    unknown = [each for each in setting if each not in known]
    if unknown:
        raise ValueError(
            f"{key} names the optimizer {unknown[0]!r}, which does not exist; "
            f"this Brain has {', '.join(map(repr, known))}"
        )
    return setting.get(name, default)
