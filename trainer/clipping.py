"""Gradients measured once, safely, and clipped: what happens between ``backward`` and a step.

A clipper is any object that is called with measured, finite `Gradients` and may change them. It
keeps its limit in ``limit`` and, where it has a history, offers ``state_dict``/``load_state_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Squares of float32 leave its normal range outside of these: the plain norm is not to be trusted.
SMALLEST_SAFE, LARGEST_SAFE = 1e-15, 1e15
# A float32 sum over more elements loses the sixth digit on a CPU (4 M elements: 8e-5 off).
CHUNK = 1 << 16


class Gradients:
    """The gradients of one optimizer at the end of a window, and their L2 norms.

    ``norms`` has a float for every tensor of ``tensors``, ``norm`` is over all of them; both are
    known after `take`. ``groups`` are the optimizer's parameter groups. Norms are right to 1e-6 of
    the float64 value for gradients of scale 1e-30 to 1e30, whatever their dtype.
    """

    __slots__ = ("_pieces", "groups", "norm", "norm_after", "norms", "params", "tensors")

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.groups = groups
        self.params: list[Tensor] = [
            p for group in groups for p in group["params"] if p.grad is not None
        ]
        self.tensors: list[Tensor] = [p.grad for p in self.params if p.grad is not None]
        self.norms: list[float] = []
        self.norm = math.nan
        self.norm_after: float | None = None

    def measure(self) -> list[Tensor]:
        """Scalars on the device from which `take` makes the norms; no sync."""
        self._pieces: list[int] | None = None
        tensors = self.tensors
        if any(t.numel() > CHUNK and t.device.type == "cpu" for t in tensors):
            chunks = [t.reshape(-1).split(CHUNK) for t in tensors]
            self._pieces = [len(chunk) for chunk in chunks]
            tensors = [piece for chunk in chunks for piece in chunk]
        if not tensors:
            return []
        # As torch's clip_grad_norm_ does; its public get_total_norm answers in half precision.
        wide = None if tensors[0].dtype.itemsize >= 4 else torch.float32
        return list(torch._foreach_norm(tensors, 2, wide))

    def take(self, norms: list[float]) -> None:
        """Turn the values of `measure`'s scalars into `norms` and `norm`."""
        if self._pieces is not None:
            values = iter(norms)
            norms = [math.hypot(*(next(values) for _ in range(n))) for n in self._pieces]
        self.norms = norms
        self.norm = math.hypot(*norms)
        if not SMALLEST_SAFE < self.norm < LARGEST_SAFE:
            self._take_safely()
        self.norm_after = self.norm

    def _take_safely(self) -> None:
        """Norms of gradients whose squares would overflow or vanish: m·‖g/m‖ (rare; syncs)."""
        self.norms = [_safe_norm(t) for t in self.tensors]
        self.norm = math.hypot(*self.norms)

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
        self.norm = self.norm_after = math.hypot(*self.norms)

    def rescale(self, factor: float) -> None:
        """Multiply gradients and norms: from sums to means."""
        self.scale(factor)
        self.norms = [norm * factor for norm in self.norms]
        self.norm *= factor
        self.norm_after = self.norm

    def parts(self) -> Iterator[tuple[float | None, slice]]:
        """The stretches of ``tensors`` that share a limit: groups with a ``max_grad_norm`` alone.

        Yields (that limit, where). A group without one is not yielded here.
        """
        start = 0
        for group in self.groups:
            stop = start + sum(p.grad is not None for p in group["params"])
            if "max_grad_norm" in group:
                yield group["max_grad_norm"], slice(start, stop)
            start = stop

    def scale(self, coefficient: float, where: Sequence[int] | None = None) -> None:
        """Multiply the gradients (those with the indices ``where``) in place."""
        tensors = self.tensors if where is None else [self.tensors[i] for i in where]
        torch._foreach_mul_(tensors, coefficient)


def _safe_norm(tensor: Tensor) -> float:
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(tensor.double() / largest))


class Clipper(Protocol):
    """What an `Update` needs of a clipper."""

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
        norms = gradients.norms
        rest = set(range(len(norms)))
        parts = []
        for limit, where in gradients.parts():
            indices = range(*where.indices(len(norms)))
            rest.difference_update(indices)
            parts.append((limit_of(limit), list(indices)))
        parts.append((self.limit, sorted(rest)))
        after, clipped = [], False
        for limit, members in parts:
            norm = math.hypot(*(norms[i] for i in members))
            if norm > limit:
                coefficient = limit / (norm + 1e-6)
                gradients.scale(coefficient, members)
                norm, clipped = norm * coefficient, True
            after.append(norm)
        gradients.norm_after = math.hypot(*after)
        return clipped


class ValueClip:
    """Clamp every element of the gradients to [-limit, limit]; this may change their direction."""

    def __init__(self, limit: float | None = 5.0) -> None:
        self.limit = limit_of(limit)

    def __call__(self, gradients: Gradients) -> bool:
        # No element exceeds the norm, so that below the limit there is nothing to do.
        if gradients.norm <= self.limit:
            return False
        torch._foreach_clamp_max_(gradients.tensors, self.limit)
        torch._foreach_clamp_min_(gradients.tensors, -self.limit)
        gradients.norm_after = None  # Measuring again would cost a host-device sync.
        return True


def by_name(setting: Any, name: str, known: Sequence[str], key: str) -> Any:
    """The part of a setting that is for the optimizer ``name``: itself, or its entry if a mapping.

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
    return setting.get(name)
