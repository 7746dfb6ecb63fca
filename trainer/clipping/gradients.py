"""Gradients measured once, safely: what a clipper is given, between ``backward`` and a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.clipping.norms import is_safe, joint, norms_or_powers, safe_norm

# A coefficient this small is near the end of float32's range, where it has few digits left.
SMALLEST_FACTOR = 1e-30


class Gradients:
    """The gradients of one optimizer at the end of a window, and their L2 norms.

    ``params`` are those with a gradient; ``tensors`` are the gradients, of a sparse one its
    coalesced values. ``norms`` has a float for every tensor, ``norm`` is over all of them; both are
    known after `take`. ``groups`` are the optimizer's parameter groups. Norms are right to 1e-6 of
    the float64 value for gradients of scale 1e-30 to 1e30, whatever their dtype.

    What a clipper wants to know beside it offers as ``measure(gradients, factor)``: vectors with a
    number for every tensor, of the gradients times ``factor``. They travel in the same transfer and
    are in ``extra``, one list of floats for each.
    """

    __slots__ = (
        "_meter", "_squared", "extra", "factors", "groups", "norm", "norm_after", "norms", "params",
        "tensors",
    )  # fmt: skip

    def __init__(self, groups: Sequence[Mapping[str, Any]], clip: object = None) -> None:
        self.groups = groups
        self._meter = getattr(clip, "measure", None)
        found: list[tuple[Tensor, Tensor]] = [
            (p, grad) for group in groups for p in group["params"] if (grad := p.grad) is not None
        ]
        self.params = [param for param, _ in found]
        self.tensors = [grad for _, grad in found]
        if any(tensor.is_sparse for tensor in self.tensors):
            self.tensors = [_dense(p) for p in self.params]
        self.norms: list[float] = []
        self._squared: list[bool] = []
        self.extra: list[list[float]] = []
        self.norm = math.nan
        self.norm_after: float | None = None
        self.factors: list[float] | None = None

    @property
    def indices(self) -> list[int]:
        """The place of each tensor's parameter among all of the optimizer's."""
        every = (p for group in self.groups for p in group["params"])
        return [i for i, p in enumerate(every) if p.grad is not None]

    @property
    def sparse(self) -> bool:
        """Whether any of them is in a sparse layout."""
        return any(p.grad is not None and p.grad.is_sparse for p in self.params)

    def measure(self, factor: float | Tensor = 1.0) -> list[Tensor]:
        """Vectors on the device, joined, from which `take` makes the norms; no sync.

        ``factor`` is what the gradients will be multiplied by, from sums to means.
        """
        if not self.tensors:
            return []
        found, self._squared = norms_or_powers(self.tensors)
        return [found, *(self._meter(self, factor) if self._meter else ())]

    def take(self, values: list[float]) -> None:
        """Turn the values of `measure`'s vectors into ``norms``, ``norm`` and ``extra``."""
        number = len(self.tensors)
        self.norms = _roots(values[:number], self._squared)
        self.extra = [values[i : i + number] for i in range(number, len(values), number or 1)]
        self.norm = joint(self.norms)
        if not is_safe(self.norm):
            self.norms = self._measured_again()
            self.norm = joint(self.norms)
        self.norm_after = self.norm

    def _measured_again(self) -> list[float]:
        """The norms where squares overflow or vanish, or something is not finite (rare; syncs).

        What is finite gets, to the bit, the norm that it has without the rest.
        """
        found = _safe(self.norms, self.tensors)
        good = [place for place, norm in enumerate(found) if math.isfinite(norm)]
        if len(good) < len(found):
            kept = [self.tensors[place] for place in good]
            values, squared = norms_or_powers(kept)
            alone = _safe(_roots(values.tolist(), squared), kept)
            for place, norm in zip(good, alone, strict=True):
                found[place] = norm
        return found

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.norm)

    def keep(self, flags: Sequence[bool]) -> None:
        """Leave out the parameters whose flag is false, as if they were frozen."""
        if all(flags):
            return
        for param, kept in zip(self.params, flags, strict=True):
            if not kept:
                param.grad = None
        self.params = [p for p, kept in zip(self.params, flags, strict=True) if kept]
        self.tensors = [t for t, kept in zip(self.tensors, flags, strict=True) if kept]
        self.norms = [n for n, kept in zip(self.norms, flags, strict=True) if kept]
        self.extra = [
            [n for n, kept in zip(each, flags, strict=True) if kept] for each in self.extra
        ]
        self.norm = self.norm_after = joint(self.norms)

    def rescale(self, factor: float) -> None:
        """Multiply gradients and norms: from sums to means."""
        self._multiply(factor, self.tensors)
        self.norms = [norm * factor for norm in self.norms]
        self.norm *= factor
        self.norm_after = self.norm

    def parts(self, limit: float) -> list[tuple[float, list[int]]]:
        """Limits, and the indices into ``tensors`` of what each is over.

        A parameter group with its own ``max_grad_norm`` is a part alone; ``limit`` is for the rest.
        """
        if not any("max_grad_norm" in group for group in self.groups):
            return [(limit, list(range(len(self.tensors))))]
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

    def scale(self, coefficient: float) -> None:
        """Multiply the gradients in place, and say so.

        ``factors`` are what each tensor has been multiplied by; `norm_after` follows.
        """
        self._multiply(coefficient, self.tensors)
        self._scaled([coefficient] * len(self.tensors))

    def scale_each(self, coefficients: Sequence[float]) -> bool:
        """Multiply each gradient in place by its own coefficient; whether any is not 1."""
        wide: list[tuple[Tensor, float]] = []
        for tensor, coefficient in zip(self.tensors, coefficients, strict=True):
            if coefficient == 1.0:
                continue
            if tensor.dtype.itemsize < 4 or coefficient < SMALLEST_FACTOR:
                self._multiply(coefficient, [tensor])
            else:
                wide.append((tensor, coefficient))
        if wide:
            torch._foreach_mul_([t for t, _ in wide], [c for _, c in wide])
        changed = any(coefficient != 1.0 for coefficient in coefficients)
        if changed:
            self._scaled(coefficients)
        return changed

    def _scaled(self, coefficients: Sequence[float]) -> None:
        old = self.factors or [1.0] * len(self.tensors)
        self.factors = [f * c for f, c in zip(old, coefficients, strict=True)]
        self.norm_after = joint(self.norms_after())

    def norms_after(self) -> list[float]:
        """The norm of each tensor after what `scale` did."""
        if self.factors is None:
            return self.norms
        return [norm * factor for norm, factor in zip(self.norms, self.factors, strict=True)]

    def stage(self, start: int, stop: int, factors: Sequence[float]) -> Gradients:
        """The same tensors after each was multiplied by a factor, with the extras start to stop."""
        found = copy.copy(self)
        found.factors = None
        if any(factor != 1.0 for factor in factors):
            found.norms = [n * f for n, f in zip(self.norms, factors, strict=True)]
            found.norm = joint(found.norms)
        found.extra = [
            [n * f for n, f in zip(each, factors, strict=True)] for each in self.extra[start:stop]
        ]
        found.norm_after = found.norm
        return found

    def _multiply(self, coefficient: float, tensors: list[Tensor]) -> None:
        times = 1
        if 0.0 < coefficient < SMALLEST_FACTOR:
            coefficient, times = math.sqrt(coefficient), 2
        for _ in range(times):
            dtypes = {t.dtype for t in tensors}
            for dtype in dtypes:
                alike = [t for t in tensors if t.dtype == dtype] if len(dtypes) > 1 else tensors
                if dtype.itemsize >= 4:
                    torch._foreach_mul_(alike, _multiplier(coefficient, dtype, alike))
                    continue
                for t in alike:  # The foreach of a CPU rounds the coefficient too.
                    t.mul_(coefficient)


def measured(groups: Sequence[Mapping[str, Any]], clip: object = None) -> Gradients:
    """The gradients as they are now, measured for a clipper (syncs)."""
    gradients = Gradients(groups, clip)
    vectors = gradients.measure()
    gradients.take(torch.cat(vectors).tolist() if vectors else [])
    return gradients


def _roots(values: Sequence[float], squared: Sequence[bool]) -> list[float]:
    """Norms, of which the flagged ones are given as squares."""
    return [math.sqrt(v) if flag else v for v, flag in zip(values, squared, strict=True)]


def _safe(norms: list[float], tensors: Sequence[Tensor]) -> list[float]:
    """The norms; where that of all is not to be trusted, those that are not measured safely."""
    if is_safe(joint(norms)):
        return norms
    return [n if is_safe(n) else safe_norm(t) for n, t in zip(norms, tensors, strict=True)]


def _dense(param: Tensor) -> Tensor:
    """The numbers of a gradient; of a sparse one, of which rows may come twice, their sums."""
    grad = param.grad
    assert grad is not None
    if not grad.is_sparse:
        return grad
    param.grad = grad = grad.coalesce()
    return grad.values()


def _multiplier(coefficient: float, dtype: torch.dtype, tensors: list[Tensor]) -> float | Tensor:
    """The coefficient as the foreach of a CPU takes it fastest: as a tensor of the same dtype."""
    if dtype.is_complex or not all(t.is_cpu for t in tensors):
        return coefficient
    return torch.tensor(coefficient, dtype=dtype)


def limit_of(value: float | None, name: str = "max_grad_norm") -> float:
    """A limit as users write it: None, infinity, 0 and below mean "measure, do not clip".

    A negative limit would turn descent into ascent, and 0 would freeze the weights.
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(
            f"{name} is {value!r}; allowed: a number; null, inf, 0 or below mean no clipping"
        )
    return float(value) if value > 0 else math.inf
