"""Gradients of one optimizer and their norms, measured once between ``backward`` and a step.

Norms are measured in float32 by one foreach call, read by the host in the one transfer of the step,
and joined there in float64. If the joint norm is not finite or too small to be reliable, the
tensors are measured again by a form that works at any scale.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import checks

Names = Mapping[Tensor, str]  # Names of parameters, such as "encoder.0.weight".

# The smallest sum of p-th powers that float32 holds with all its digits.
SMALLEST_POWER = 1e-30
# Smaller coefficients are near the end of float32's range and have few digits.
SMALLEST_COEFFICIENT = 1e-30

COMPLEX = {torch.complex32, torch.complex64, torch.complex128}
WIDE = {torch.float32, torch.float64, torch.complex64, torch.complex128}  # No half precision.


class Gradients:
    """Gradients of one optimizer at the end of an accumulation window, and their L2 norms.

    Norms have the accuracy of torch's float32 foreach norm, for gradients of scale 1e-30 to 1e30
    and of any dtype. A clipper may measure more by ``measure(gradients, factor)``, which returns
    vectors with one number for each tensor of the gradients times ``factor``; the same transfer
    brings them to the host.

    Args:
        groups: the optimizer's parameter groups.
        clip: the clipper, for its ``measure``.

    Attributes:
        params: the parameters that have a gradient.
        tensors: their gradients; for a sparse gradient, its coalesced values.
        norms: the L2 norm of each tensor, known after `take`.
        norm: the joint L2 norm of all tensors, known after `take`; NaN before.
        norm_after: the joint norm after clipping; None if it is not known.
        extra: the values of each vector that the clipper measured.
        factors: the coefficient that each tensor was scaled by; None if none was.
    """

    __slots__ = (
        "_measure_extra", "extra", "factors", "groups", "norm", "norm_after", "norms", "params",
        "tensors",
    )  # fmt: skip

    def __init__(self, groups: Sequence[Mapping[str, Any]], clip: object = None) -> None:
        self.groups = groups
        self._measure_extra = getattr(clip, "measure", None)
        found: list[tuple[Tensor, Tensor]] = [
            (p, grad) for group in groups for p in group["params"] if (grad := p.grad) is not None
        ]
        self.params = [param for param, _ in found]
        self.tensors = [grad for _, grad in found]
        for i, (param, grad) in enumerate(found):
            if grad.is_sparse:  # Coalescing adds up repeated rows.
                param.grad = grad.coalesce()
                self.tensors[i] = param.grad.values()
            elif grad.is_conj():  # A lazy view, which foreach calls and optimizers refuse.
                self.tensors[i] = param.grad = grad.resolve_conj()
        self.norms: list[float] = []
        self.extra: list[list[float]] = []
        self.norm = math.nan
        self.norm_after: float | None = None
        self.factors: list[float] | None = None

    @property
    def indices(self) -> list[int]:
        """Index of each tensor's parameter among all parameters of the optimizer."""
        every = (p for group in self.groups for p in group["params"])
        return [i for i, p in enumerate(every) if p.grad is not None]

    def measure(self, factor: float | Tensor = 1.0) -> Tensor:
        """Return the norms and the clipper's measurements, without waiting for the device.

        Args:
            factor: number or scalar tensor by which `rescale` will multiply the gradients.

        Returns:
            Numbers (K,) on the device; give them to `take` once they are on the host.
        """
        found = norms(self.tensors)
        extra = self._measure_extra(self, factor) if self.tensors and self._measure_extra else ()
        return torch.cat([found, *extra]) if extra else found

    def take(self, values: list[float]) -> None:
        """Set ``norms``, ``norm`` and ``extra``.

        Args:
            values: the numbers that `measure` returned.
        """
        number = len(self.tensors)
        self.norms = values[:number]
        self.extra = [values[i : i + number] for i in range(number, len(values), number or 1)]
        self.norm = joint(self.norms)
        if not is_reliable(self.norm):  # Syncs, but is rare.
            safe = safe_norms(self.tensors)
            # Norms of finite gradients do not depend on the others.
            finite = [n for n, s in zip(self.norms, safe, strict=True) if math.isfinite(s)]
            if is_reliable(joint(finite)):
                safe = [n if math.isfinite(s) else s for n, s in zip(self.norms, safe, strict=True)]
            self.norms, self.norm = safe, joint(safe)
        self.norm_after = self.norm

    @property
    def finite(self) -> bool:
        """True if every gradient is finite."""
        return math.isfinite(self.norm)

    def keep(self, flags: Sequence[bool]) -> None:
        """Drop some gradients, as if their parameters were frozen.

        Args:
            flags: for each tensor, False to drop it.
        """
        if all(flags):
            return
        for param, kept in zip(self.params, flags, strict=True):
            if not kept:
                param.grad = None
        self.params = list(compress(self.params, flags))
        self.tensors = list(compress(self.tensors, flags))
        self.norms = list(compress(self.norms, flags))
        self.extra = [list(compress(each, flags)) for each in self.extra]
        self.norm = self.norm_after = joint(self.norms)

    def rescale(self, factor: float) -> None:
        """Multiply gradients and norms in place, to turn sums into means.

        Args:
            factor: the number passed to `measure`.
        """
        _multiply(self.tensors, [factor] * len(self.tensors))
        self.norms = [norm * factor for norm in self.norms]
        self.norm = self.norm_after = joint(self.norms)

    def parts(self, limit: float) -> list[tuple[float, list[int]]]:
        """Split the tensors by their limit.

        Args:
            limit: the limit of parameter groups without their own ``max_grad_norm``.

        Returns:
            Pairs of a limit and the indices of its tensors: one for each parameter group with its
            own ``max_grad_norm``, or for all with the same ``clipped_with``, and one for the rest.
        """
        if not any("max_grad_norm" in group for group in self.groups):
            return [(limit, list(range(len(self.tensors))))]
        found: dict[Any, tuple[float, list[int]]] = {}
        start = 0
        for number, group in enumerate(self.groups):
            stop = start + sum(p.grad is not None for p in group["params"])
            part = None, limit
            if "max_grad_norm" in group:
                part = group.get("clipped_with", number), limit_of(group["max_grad_norm"])
            found.setdefault(part[0], (part[1], []))[1].extend(range(start, stop))
            start = stop
        return list(found.values())

    def scale_each(self, coefficients: Sequence[float]) -> bool:
        """Multiply each gradient in place by its own coefficient.

        Returns:
            True if any coefficient is not 1.
        """
        changed = [i for i, coefficient in enumerate(coefficients) if coefficient != 1.0]
        if not changed:
            return False
        _multiply([self.tensors[i] for i in changed], [coefficients[i] for i in changed])
        old = self.factors or [1.0] * len(self.tensors)
        self.factors = [f * c for f, c in zip(old, coefficients, strict=True)]
        self.norm_after = joint(self.norms_after())
        return True

    def norms_after(self) -> list[float]:
        """Return the norm of each tensor after scaling."""
        if self.factors is None:
            return self.norms
        return [norm * factor for norm, factor in zip(self.norms, self.factors, strict=True)]

    def stage(self, start: int, stop: int) -> Gradients:
        """Return these gradients for one of several clippers, as if measured after scaling.

        Args:
            start: index of the first vector of ``extra`` that this clipper measured.
            stop: index after its last one.
        """
        found = copy.copy(self)
        found.extra = self.extra[start:stop]
        if self.factors is not None:
            found.norms = self.norms_after()
            found.norm = joint(found.norms)
            found.extra = [
                [n * f for n, f in zip(each, self.factors, strict=True)] for each in found.extra
            ]
            found.factors = None
        found.norm_after = found.norm
        return found


def measured(groups: Sequence[Mapping[str, Any]], clip: object = None) -> Gradients:
    """Return the current gradients, measured for a clipper (syncs).

    Args:
        groups: the optimizer's parameter groups.
        clip: the clipper, for its ``measure``.
    """
    gradients = Gradients(groups, clip)
    gradients.take(gradients.measure().tolist())
    return gradients


def norms(tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Return the p-norm of each tensor, without waiting for the device.

    Half precision is measured in float32. A norm for which `is_reliable` holds is as accurate as
    torch's foreach norm.

    Args:
        tensors: tensors of any shapes, dtypes and devices; not sparse.
        p: the order of the norm, above 0; inf is the largest absolute value.

    Returns:
        The norms, shape (len(tensors),), on the device of the first tensor.
    """
    if not tensors:
        return torch.zeros(0)
    tensors = list(tensors)
    dtypes = {t.dtype for t in tensors}
    if not dtypes.isdisjoint(COMPLEX):
        real = (lambda t: torch.view_as_real(t.resolve_conj())) if p == 2.0 else torch.abs
        tensors = [real(t) if t.is_complex() else t for t in tensors]
    if p == math.inf:
        tensors = [t if t.numel() else t.new_zeros(1) for t in tensors]
    if p == math.inf and all(t.is_cpu for t in tensors):  # Much faster there than that norm.
        found = torch._foreach_max(torch._foreach_abs(tensors))
    elif dtypes <= WIDE:
        found = torch._foreach_norm(tensors, p)
    else:
        doubles = not dtypes.isdisjoint({torch.float64, torch.complex128})
        found = torch._foreach_norm(tensors, p, torch.float64 if doubles else torch.float32)
    if len({norm.device for norm in found}) > 1:
        found = tuple(norm.to(found[0].device) for norm in found)
    vector = torch.stack(found)
    return vector if vector.dtype.itemsize >= 4 else vector.float()


def safe_norms(tensors: Sequence[Tensor], p: float = 2.0) -> list[float]:
    """Return the p-norm of each tensor at any scale: m · ‖g / m‖ with m = max|g| (syncs).

    Args:
        tensors: tensors of any shapes, dtypes and devices; not sparse.
        p: the order of the norm, above 0; inf is the largest absolute value.
    """
    if not tensors:
        return []
    wide = [t.float() if t.dtype.itemsize < 4 else t for t in tensors]
    largest = norms(wide, math.inf)
    ratios = [t / m.to(t.device) for t, m in zip(wide, largest, strict=True)]
    pairs = zip(largest.tolist(), norms(ratios, p).tolist(), strict=True)
    return [m * norm if 0.0 < m < math.inf else m for m, norm in pairs]


def is_reliable(norm: float, p: float = 2.0) -> bool:
    """Return True if no power overflowed or vanished in a p-norm that `norms` measured."""
    return (p == math.inf or norm >= SMALLEST_POWER ** (1 / p)) and norm < math.inf


def joint(norms: Sequence[float], p: float = 2.0) -> float:
    """Return the joint p-norm of parts from their p-norms, in float64.

    Args:
        norms: the norms of the parts.
        p: the order of the norm, above 0; inf is the largest absolute value.
    """
    if p == 2.0:
        return math.hypot(*norms)
    largest = max(norms, default=0.0)
    if p == math.inf or largest == 0.0 or not math.isfinite(largest):
        return largest
    return float(largest * math.fsum((n / largest) ** p for n in norms) ** (1 / p))


def _multiply(tensors: list[Tensor], coefficients: Sequence[float]) -> None:
    """Multiply each tensor in place by its own coefficient."""
    if not tensors:
        return
    times = 1
    if min(coefficients) < SMALLEST_COEFFICIENT:
        coefficients, times = [math.sqrt(each) for each in coefficients], 2
    factors: Any = coefficients[0] if len(set(coefficients)) == 1 else list(coefficients)
    if all(map(attrgetter("is_cpu"), tensors)):
        # On the CPU foreach is fastest with a tensor, and would round a Python number to half
        # precision.
        wide = max(map(attrgetter("dtype.itemsize"), tensors)) > 4
        factors = torch.tensor(factors, dtype=torch.float64 if wide else torch.float32)
        factors = factors.unbind() if factors.dim() else factors
    for _ in range(times):
        torch._foreach_mul_(tensors, factors)


def limit_of(value: float | None, name: str = "max_grad_norm") -> float:
    """Return a limit as a float above 0, inf for no clipping.

    Args:
        value: a number, or None; None, inf, 0 and below mean no clipping: a negative limit would
            turn descent into ascent, and 0 would freeze the weights.
        name: the name of the setting, for messages.

    Raises:
        ValueError: if ``value`` is not a number.
    """
    if value is None:
        return math.inf
    found = checks.as_number(value)
    if found is None or math.isnan(found):
        raise ValueError(
            f"{name} is {value!r}; allowed: a number; null, inf, 0 or below mean no clipping"
        )
    return float(found) if found > 0 else math.inf


class Clipper(Protocol):
    """Protocol of a clipper, as an `Update` calls it.

    It may also offer

    - ``bind(owner, names, optimizer)``, called once before the first step (see `Clip.bind`),
    - ``measure(gradients, factor)``, for measurements besides L2 norms (see `Gradients`),
    - ``state_dict`` and ``load_state_dict``, if it has a history.

    Attributes:
        limit: the threshold of the last step, inf without clipping.
    """

    limit: float

    def __call__(self, gradients: Gradients) -> bool:
        """Clip the measured gradients in place; return True if any of them changed."""


class Clip:
    """Base class of the clip kinds.

    Attributes:
        limit: the threshold of the last step, inf without clipping.
        names: the names of the optimizer's parameters, known after `bind`.
        by_group: True if a parameter group may have its own ``max_grad_norm``.
        scales: True if the result of `measure` scales with the gradients.
    """

    limit: float = math.inf
    names: Names = MappingProxyType({})
    by_group: ClassVar[bool] = False
    scales: ClassVar[bool] = True

    def bind(self, owner: str, names: Names, optimizer: Optimizer) -> None:
        """Attach the clipper to an optimizer, before the first step.

        Args:
            owner: the name of the optimizer.
            names: the names of its parameters, of any shape, such as "encoder.0.weight".
            optimizer: the optimizer.

        Raises:
            ValueError: if this kind cannot clip the gradients of this optimizer.
        """
        self.names = names
        limited = any("max_grad_norm" in group for group in optimizer.param_groups)
        if limited and not self.by_group:
            raise ValueError(
                f"the optimizer {owner!r} has two clippers: {type(self).__name__}, and parameter "
                "groups with a max_grad_norm of their own, which it ignores; leave one out, or "
                "use trainer.clipping.NormClip, LayerClip or ValueClip"
            )

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        """Return the measurements of this kind besides L2 norms; they become ``extra``.

        Args:
            gradients: the gradients to measure.
            factor: number or scalar tensor by which they will be multiplied.

        Returns:
            Vectors (len(gradients.tensors),); empty for a kind that needs only norms.
        """
        return []

    def __call__(self, gradients: Gradients) -> bool:
        """Clip the measured gradients in place; return True if any of them changed."""
        raise NotImplementedError

    def refuse_complex(self, gradients: Gradients) -> None:
        """Refuse complex gradients, for kinds that compare elements.

        Raises:
            ValueError: if any gradient is complex.
        """
        if any(tensor.is_complex() for tensor in gradients.tensors):
            raise ValueError(f"{type(self).__name__} cannot take complex gradients; use NormClip")

    def refuse_sparse(self, gradients: Gradients) -> None:
        """Refuse sparse gradients, for kinds that need whole parameters.

        Raises:
            ValueError: if any gradient is sparse.
        """
        for param in gradients.params:
            if param.grad is not None and param.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} cannot take the sparse gradient of "
                    f"{self.names.get(param, 'a parameter')}: it looks at whole parameters; use a "
                    "kind that needs norms alone, or an embedding with sparse=False"
                )

    def match_patterns(self, owner: str, key: str, patterns: Sequence[str]) -> dict[Tensor, str]:
        """Return the first pattern that each name matches, by parameters of any shape.

        Args:
            owner: name of the optimizer, for messages.
            key: name of the setting, for messages.
            patterns: patterns with ``*``, ``?`` and ``[…]`` as in file names, in order.

        Raises:
            ValueError: if no parameter is left for a pattern.
        """
        found: dict[Tensor, str] = {}
        for pattern in patterns:
            matched = [p for p, name in self.names.items() if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                near = difflib.get_close_matches(pattern, self.names.values(), n=3, cutoff=0.0)
                raise ValueError(
                    f"{key} {pattern!r} matches no parameter of the optimizer {owner!r}; "
                    f"the nearest names are {', '.join(near)}"
                )
            left = [p for p in matched if p not in found]
            if not left:
                raise ValueError(
                    f"{key} {pattern!r} comes too late: earlier patterns take every parameter of "
                    f"the optimizer {owner!r} that it matches, such as {self.names[matched[0]]}"
                )
            found.update(dict.fromkeys(left, pattern))
        return found
