"""Clip kinds with given limits: of the norm, of each layer, by name, and of each element."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import checks
from trainer.clipping.gradients import (
    Clip,
    Gradients,
    Names,
    is_reliable,
    joint,
    limit_of,
    norms,
    safe_norms,
)

logger = logging.getLogger("trainer")


class NormClip(Clip):
    """Scale the gradients of an optimizer down so that their joint norm is at most ``limit``.

        g ← g · min(1, c / (‖g‖ + 1e-6)),    c = limit

    ‖g‖ is the norm of all gradients of the optimizer as one vector (Pascanu et al. 2013, arXiv
    1211.5063). The formula is that of `torch.nn.utils.clip_grad_norm_`. A parameter group with its
    own ``max_grad_norm`` is measured and clipped alone.

    Args:
        limit: largest norm c; None, inf, 0 or below for no clipping. The default, 5, is usual in
            recognition and separation of speech; 1 is usual for Transformers and synthesis.
        p: order of the norm, above 0; inf for the largest absolute value.

    Raises:
        ValueError: if an argument is out of range.
    """

    by_group = True

    def __init__(self, limit: float | None = 5.0, p: float = 2.0) -> None:
        self.limit = limit_of(limit, f"{type(self).__name__}: limit")
        p = float(p) if isinstance(p, str) and p == "inf" else p
        self.p = checks.within(type(self).__name__, "p", p, 0.0, math.inf, "(]")

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        return [] if self.p == 2.0 else [norms(gradients.tensors, self.p) * factor]

    def p_norms(self, gradients: Gradients) -> list[float]:
        """Return the p-norm of each tensor, (len(gradients.tensors),)."""
        if self.p == 2.0:
            return gradients.norms
        if is_reliable(joint(gradients.extra[0], self.p), self.p):
            return gradients.extra[0]
        return safe_norms(gradients.tensors, self.p)  # Syncs, but is rare.

    def _parts(self, gradients: Gradients) -> list[tuple[float, list[int]]]:
        """Return the limit and the tensor indices of each part that is clipped by itself."""
        return gradients.parts(self.limit)

    def __call__(self, gradients: Gradients) -> bool:
        each = self.p_norms(gradients)
        coefficients = [1.0] * len(each)
        for limit, members in self._parts(gradients):
            norm = joint([each[i] for i in members], self.p)
            if norm > limit:
                for i in members:
                    coefficients[i] = limit / (norm + 1e-6)
        return gradients.scale_each(coefficients)


class LayerClip(NormClip):
    """Scale each gradient tensor down so that its own norm is at most ``limit``.

        g_i ← g_i · min(1, c / (‖g_i‖ + 1e-6)),    c = limit, for each tensor g_i

    This is `NormClip` for each parameter alone: a large gradient in one layer leaves the others
    unchanged. In a parameter group with its own ``max_grad_norm``, that is the limit c.

    Args:
        limit: largest norm c of a tensor; None, inf, 0 or below for no clipping.
        p: order of the norm, above 0; inf for the largest absolute value.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, limit: float | None = 1.0, p: float = 2.0) -> None:
        super().__init__(limit, p)

    def _parts(self, gradients: Gradients) -> list[tuple[float, list[int]]]:
        parts = super()._parts(gradients)
        return [(limit, [i]) for limit, members in parts for i in members]


class PatternClip(NormClip):
    """Clip the joint norm of the parameters of each name pattern.

        g_k ← g_k · min(1, c_k / (‖g_k‖ + 1e-6)),    c_k = limits[pattern k]

    g_k are the gradients of the parameters whose names match pattern k and no earlier one, as one
    vector. Parameters that match no pattern are not clipped. The reported ``limit`` is the joint
    norm of all limits.

    Args:
        limits: a limit for each pattern of parameter names, with ``*``, ``?`` and ``[…]`` as in
            file names: ``{"encoder.*": 1.0, "*.bias": null, "*": 5.0}``.
        p: order of the norm, above 0; inf for the largest absolute value.

    Raises:
        ValueError: if an argument is out of range; in `bind`, if a pattern has no parameter.
    """

    by_group = False

    def __init__(self, limits: Mapping[str, float | None], p: float = 2.0) -> None:
        super().__init__(None, p)
        if not isinstance(limits, Mapping) or not limits:
            raise ValueError(
                f"PatternClip: limits is {limits!r}; allowed: a mapping of patterns of parameter "
                'names to limits, such as {"encoder.*": 1.0, "*": 5.0}'
            )
        self.limits = {str(k): limit_of(v, f"PatternClip: limit of {k}") for k, v in limits.items()}
        self.limit = joint(list(self.limits.values()), self.p)
        self._pattern: dict[Tensor, str] | None = None

    def bind(self, owner: str, names: Names, optimizer: Optimizer) -> None:
        super().bind(owner, names, optimizer)
        self._pattern = self.match_patterns(owner, "PatternClip: the pattern", list(self.limits))
        found = list(self._pattern.values())
        parts = [f"{k} {v:g} ({found.count(k)} parameters)" for k, v in self.limits.items()]
        if len(found) < len(names):
            parts.append(f"no limit for {len(names) - len(found)} others")
        logger.info("clipping of the optimizer %r: %s", owner, ", ".join(parts))

    def _parts(self, gradients: Gradients) -> list[tuple[float, list[int]]]:
        if self._pattern is None:
            raise ValueError("PatternClip does not know the names of the parameters: call bind")
        found = [self._pattern.get(param) for param in gradients.params]
        return [
            (limit, [i for i, each in enumerate(found) if each == pattern])
            for pattern, limit in self.limits.items()
        ]


class ValueClip(Clip):
    """Clamp every element of the gradients to [-limit, limit].

        g ← min(max(g, -c), c),    c = limit

    The formula is that of `torch.nn.utils.clip_grad_value_`; it may change the direction of the
    gradients. In a parameter group with its own ``max_grad_norm``, that is the limit c. Complex
    gradients are refused: complex numbers have no order.

    Args:
        limit: largest absolute value c; None, inf, 0 or below for no clipping.

    Raises:
        ValueError: if ``limit`` is not a number.
    """

    by_group = True

    def __init__(self, limit: float | None = 5.0) -> None:
        self.limit = limit_of(limit, "ValueClip: limit")

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        self.refuse_complex(gradients)
        return [norms(gradients.tensors, math.inf) * factor]

    def __call__(self, gradients: Gradients) -> bool:
        clipped = False
        for limit, members in gradients.parts(self.limit):
            over = [gradients.tensors[i] for i in members if gradients.extra[0][i] > limit]
            if over:
                torch._foreach_clamp_max_(over, limit)
                torch._foreach_clamp_min_(over, -limit)
                gradients.norm_after = None  # Measuring again would cost a host-device sync.
                clipped = True
        return clipped
