"""Clip kinds that judge units or elements of a tensor, by its weights or second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import checks
from trainer.clipping.gradients import Clip, Gradients, Names, is_reliable, joint, norms

# Names of the running mean of squares in the states of torch.optim.
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
WITH_MOMENTS = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.Adadelta,
)  # fmt: skip


class AGC(Clip):
    """Clip the gradient of each unit relative to the norm of its weights.

        if ‖G_i‖ > λ · max(‖W_i‖, ε):    G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖

    Adaptive gradient clipping, Brock et al. 2021 (arXiv 2102.06171, equation 3), with the paper's
    defaults. A unit i is an index of dimension 0 (a row of a matrix, an output channel of a
    convolution); a tensor of one dimension is one unit. Without ε, weights that start at zero would
    never move. Sparse gradients are refused. The reported ``limit`` is the joint norm of all bounds
    λ · max(‖W_i‖, ε).

    Args:
        clipping: largest ratio λ of gradient norm to weight norm, above 0.
        eps: smallest weight norm ε, above 0.
        exclude: patterns of names of parameters that are not clipped, as in `PatternClip`. The
            paper excludes the last linear layer.

    Raises:
        ValueError: if an argument is out of range; in `bind`, if a pattern has no parameter.
    """

    scales = False

    def __init__(
        self, clipping: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()
    ) -> None:
        self.clipping = checks.within("AGC", "clipping", clipping, 0.0, math.inf, "()")
        self.eps = checks.within("AGC", "eps", eps, 0.0, math.inf, "()")
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self._excluded: set[Tensor] = set()
        self._shares: dict[Tensor, Tensor] = {}

    def bind(self, owner: str, names: Names, optimizer: Optimizer) -> None:
        super().bind(owner, names, optimizer)
        self._excluded = set(self.match_patterns(owner, "AGC: exclude", self.exclude))

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        self.refuse_sparse(gradients)
        params = gradients.params
        # Squares of huge and of tiny gradients leave the range of float32, those of weights do not.
        wide = torch.float32 if gradients.tensors[0].device.type == "mps" else torch.float64
        units = _unit_norms(gradients.tensors, wide) * factor
        bounds = _unit_norms([p.detach() for p in params], torch.float32).to(units.dtype)
        bounds = bounds.clamp_(min=self.eps).mul_(self.clipping)
        rows = [len(p) if p.dim() > 1 else 1 for p in params]
        for p, bound in zip(params, bounds.split(rows), strict=True):
            if p in self._excluded:
                bound.fill_(math.inf)
        shares = (bounds / units).clamp_(max=1.0)
        self._shares = dict(zip(params, shares.float().split(rows), strict=True))
        return [
            norms((units * shares).split(rows)),  # After clipping.
            norms(bounds.split(rows)),
            norms((1.0 - shares).split(rows), math.inf),  # The largest relative cut.
        ]

    def __call__(self, gradients: Gradients) -> bool:
        if not gradients.extra:
            return False
        after, bounds, cuts = gradients.extra
        self.limit = joint([bound for bound in bounds if bound < math.inf]) or math.inf
        return _clip_where(gradients, cuts, after, self._clip)

    def _clip(self, param: Tensor, grad: Tensor) -> None:
        share = self._shares[param].to(grad.device)
        grad.mul_(share.view(-1, *[1] * (grad.dim() - 1)) if grad.dim() > 1 else share[0])


class SPAM(checks.Stateful, Clip):
    """Clip each element whose square is far above its running mean.

        if g² > θ·v:    g ← sign(g) · √(θ·v)

    SPAM, Huang et al. 2025 (arXiv 2501.06842, equation 2), without the paper's resets of the
    momentum. v is the running mean of squares that the optimizer keeps, such as Adam's second
    moment. An element whose v is 0 is not clipped: it would never move. Sparse and complex
    gradients are refused. The reported ``limit`` is the joint norm of all bounds √(θ·v).

    Args:
        theta: largest ratio θ of the square to its running mean, above 0; the default is the
            paper's.
        warmup_steps: number of first steps without clipping, in which v settles, 0 or more; the
            default is that of the authors' code.

    Raises:
        ValueError: if an argument is out of range; in `bind`, if the optimizer has no second
            moments.
    """

    scales = False
    saved = ("steps",)

    def __init__(self, theta: float = 5000.0, warmup_steps: int = 20) -> None:
        self.theta = checks.within("SPAM", "theta", theta, 0.0, math.inf, "()")
        self.warmup_steps = checks.whole("SPAM", "warmup_steps", warmup_steps, 0)
        self.steps = 0
        self._optimizer: Optimizer | None = None
        self._bounds: dict[Tensor, Tensor] = {}

    def bind(self, owner: str, names: Names, optimizer: Optimizer) -> None:
        super().bind(owner, names, optimizer)
        known = type(optimizer).__module__.startswith("torch.optim")
        if known and not isinstance(optimizer, WITH_MOMENTS):
            raise _no_moments(optimizer)
        self._optimizer = optimizer

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        self.refuse_sparse(gradients)
        self.refuse_complex(gradients)
        moments = [self._moment(p) for p in gradients.params]
        if self.steps < self.warmup_steps or all(v is None for v in moments):
            return []
        whole = gradients.tensors
        squares = [
            torch.zeros_like(t) if v is None else v for t, v in zip(whole, moments, strict=True)
        ]
        bounds = list(torch._foreach_sqrt(squares))
        torch._foreach_mul_(bounds, math.sqrt(self.theta))
        for bound in bounds:
            bound.masked_fill_(bound == 0, math.inf)
        self._bounds = dict(zip(gradients.params, bounds, strict=True))
        if isinstance(factor, Tensor) or factor != 1.0:
            whole = list(torch._foreach_mul(whole, factor))
        cut = torch._foreach_minimum(whole, bounds)
        torch._foreach_maximum_(cut, torch._foreach_neg(bounds))
        cuts = torch._foreach_sub(whole, cut)
        return [norms(cut), norms(squares, 1.0), norms(cuts, math.inf)]

    def _moment(self, param: Tensor) -> Tensor | None:
        """Return the running mean of squares of a parameter; None before its first step."""
        if self._optimizer is None:
            raise ValueError("SPAM does not know its optimizer: call bind")
        state = self._optimizer.state.get(param)
        if not state:
            return None
        for name in SECOND_MOMENTS:
            if name in state:
                moment: Tensor = state[name]
                return moment
        raise _no_moments(self._optimizer)

    def __call__(self, gradients: Gradients) -> bool:
        self.steps += 1
        self.limit = math.inf
        if not gradients.extra:
            return False
        after, squares, cuts = gradients.extra
        self.limit = math.sqrt(self.theta * math.fsum(squares))
        clipped = _clip_where(gradients, cuts, after, self._clip)
        if clipped and not is_reliable(gradients.norm):
            gradients.norm_after = None
        return clipped

    def _clip(self, param: Tensor, grad: Tensor) -> None:
        bound = self._bounds[param]
        grad.copy_(torch.maximum(torch.minimum(grad, bound), -bound))


def _clip_where(
    gradients: Gradients,
    cuts: Sequence[float],
    after: Sequence[float],
    clip: Callable[[Tensor, Tensor], None],
) -> bool:
    """Clip the tensors above a bound, and set the joint norm; return True if there are any."""
    clipped = [cut > 0.0 for cut in cuts]
    for param, grad in compress(zip(gradients.params, gradients.tensors, strict=True), clipped):
        clip(param, grad)
    if any(clipped):
        each = zip(clipped, after, gradients.norms, strict=True)
        gradients.norm_after = joint([new if cut else old for cut, new, old in each])
    return any(clipped)


def _unit_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the norms of all units of all tensors, as one vector."""
    found = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, dtype)
        cast = None if wide == tensor.dtype else wide
        dim = tuple(range(1, tensor.dim())) or None
        found.append(torch.linalg.vector_norm(tensor, dim=dim, dtype=cast).reshape(-1))
    return torch.cat([each.to(found[0].device) for each in found])


def _no_moments(optimizer: Optimizer) -> ValueError:
    """Return the error of SPAM for an optimizer without second moments."""
    return ValueError(
        f"SPAM needs the running mean of squares that Adam, AdamW, NAdam, RAdam, RMSprop and "
        f"Adadelta keep; {type(optimizer).__name__} has none: use another optimizer, or another "
        "kind of clipping, such as trainer.clipping.ZClip"
    )
