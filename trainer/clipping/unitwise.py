"""Clip kinds that judge units or elements of a tensor, by its weights or second moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer import checks
from trainer.clipping.clip import Clip, matching, refuse_complex, refuse_sparse
from trainer.clipping.gradients import Gradients, is_reliable, joint, norms

# Names of the running mean of squares in the states of torch.optim.
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
WITH_MOMENTS = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.Adadelta,
)  # fmt: skip


class AGC(Clip):
    """Clip each unit's gradient in proportion to its weights (Brock et al. 2021, 2102.06171).

        where ‖G_i‖ / max(‖W_i‖, ε) > λ:    G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖

    A unit i is a row of dimension 0; a tensor of one dimension is one unit. Without ε, weights that
    start at zero would never move. Sparse gradients are refused. ``limit`` is the joint norm of all
    bounds λ · max(‖W_i‖, ε).

    Args:
        clipping: the largest ratio λ of gradient to weight norm, above 0.
        eps: the smallest weight norm ε, above 0.
        exclude: patterns of names of parameters that are not clipped; the paper excludes the last
            linear layer.

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

    def bind(
        self, owner: str, names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
    ) -> None:
        """Find the excluded parameters."""
        super().bind(owner, names, optimizer)
        self._excluded = set(matching(owner, "AGC: exclude", self.exclude, names))

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        """Return for each tensor its norm after clipping, its bound and largest relative cut."""
        refuse_sparse(self, gradients)
        places = [i for i, p in enumerate(gradients.params) if p not in self._excluded]
        if not places:
            return []
        params = [gradients.params[i] for i in places]
        # Squares of huge and of tiny gradients leave the range of float32, those of weights do not.
        wide = torch.float32 if gradients.tensors[0].device.type == "mps" else torch.float64
        units = _unit_norms([gradients.tensors[i] for i in places], wide) * factor
        bounds = _unit_norms([p.detach() for p in params], torch.float32).to(units.dtype)
        bounds = bounds.clamp_(min=self.eps).mul_(self.clipping)
        shares = (bounds / units).clamp_(max=1.0)
        rows = [len(p) if p.dim() > 1 else 1 for p in params]
        self._shares = dict(zip(params, shares.float().split(rows), strict=True))
        owners = torch.tensor(places).repeat_interleave(torch.tensor(rows)).to(units.device)
        zeros = units.new_zeros(len(gradients.tensors))
        return [
            zeros.index_add(0, owners, (units * shares).square()).sqrt_(),
            zeros.index_add(0, owners, bounds.square()).sqrt_(),
            zeros.scatter_reduce(0, owners, 1.0 - shares, "amax"),
        ]

    def __call__(self, gradients: Gradients) -> bool:
        if not gradients.extra:
            return False
        after, bounds, cuts = gradients.extra
        self.limit = joint(bounds)
        clipped = [i for i, cut in enumerate(cuts) if cut > 0.0]
        if not clipped:
            return False
        for i in clipped:
            tensor = gradients.tensors[i]
            share = self._shares[gradients.params[i]].to(tensor.device)
            tensor.mul_(share.view(-1, *[1] * (tensor.dim() - 1)) if tensor.dim() > 1 else share[0])
        kept = set(clipped)
        gradients.norm_after = joint(
            [after[i] if i in kept else norm for i, norm in enumerate(gradients.norms)]
        )
        return True


class SPAM(Clip):
    """Clip the elements that are far above their own mean square (Huang et al. 2025, 2501.06842).

        where g² > θ·v:    g ← sign(g)·√(θ·v)

    v is the optimizer's running mean of squares (Adam's second moment). An element whose v is 0 is
    not clipped: it would never move. The paper's resets of the momentum are not part of clipping.
    Sparse and complex gradients are refused. ``limit`` is the joint norm of all bounds √(θ·v).

    Args:
        theta: the largest ratio θ of the square to its running mean, above 0.
        warmup_steps: number of first steps without clipping, in which v settles, 0 or more (the
            default is that of the authors' code).

    Raises:
        ValueError: if an argument is out of range; in `bind`, if the optimizer has no second
            moments.
    """

    scales = False

    def __init__(self, theta: float = 5000.0, warmup_steps: int = 20) -> None:
        self.theta = checks.within("SPAM", "theta", theta, 0.0, math.inf, "()")
        self.warmup_steps = checks.whole("SPAM", "warmup_steps", warmup_steps, 0)
        self._steps = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._bounds: dict[Tensor, Tensor] = {}

    def bind(
        self, owner: str, names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
    ) -> None:
        """Remember the optimizer; raise ValueError if it has no second moments."""
        super().bind(owner, names, optimizer)
        known = type(optimizer).__module__.startswith("torch.optim")
        if known and not isinstance(optimizer, WITH_MOMENTS):
            raise _no_moments(optimizer)
        self._optimizer = optimizer

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        """Return for each tensor its norm after clipping, its sum of v and its largest cut."""
        refuse_sparse(self, gradients)
        refuse_complex(self, gradients)
        moments = [self._moment(p) for p in gradients.params]
        places = [i for i, v in enumerate(moments) if v is not None]
        if self._steps < self.warmup_steps or not places:
            return []
        params = [gradients.params[i] for i in places]
        squares = [v for v in moments if v is not None]
        bounds = list(torch._foreach_sqrt(squares))
        torch._foreach_mul_(bounds, math.sqrt(self.theta))
        for bound in bounds:
            bound.masked_fill_(bound == 0, math.inf)
        self._bounds = dict(zip(params, bounds, strict=True))
        whole = [gradients.tensors[i] for i in places]
        if isinstance(factor, Tensor) or factor != 1.0:
            whole = list(torch._foreach_mul(whole, factor))
        cut = torch._foreach_minimum(whole, bounds)
        torch._foreach_maximum_(cut, torch._foreach_neg(bounds))
        cuts = torch._foreach_sub(whole, cut)
        found = [norms(cut), norms(squares, 1.0), norms(cuts, math.inf)]
        return [_spread(each, places, len(gradients.tensors)) for each in found]

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
        self._steps += 1
        self.limit = math.inf
        if not gradients.extra:
            return False
        after, squares, cuts = gradients.extra
        self.limit = math.sqrt(self.theta * math.fsum(squares))
        clipped = [i for i, cut in enumerate(cuts) if cut > 0.0]
        if not clipped:
            return False
        for i in clipped:
            tensor, bound = gradients.tensors[i], self._bounds[gradients.params[i]]
            tensor.copy_(torch.maximum(torch.minimum(tensor, bound), -bound))
        kept = set(clipped)
        norms_after = [after[i] if i in kept else n for i, n in enumerate(gradients.norms)]
        gradients.norm_after = joint(norms_after) if is_reliable(gradients.norm) else None
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps so far."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a state that `state_dict` returned."""
        checks.same_keys("SPAM", state, ("steps",))
        self._steps = state["steps"]


def _unit_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the norms of all units of all tensors, joined to one vector."""
    found = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, dtype)
        found.append(
            torch.linalg.vector_norm(
                tensor,
                dim=tuple(range(1, tensor.dim())) or None,
                dtype=None if wide == tensor.dtype else wide,
            ).reshape(-1)
        )
    device = found[0].device
    return torch.cat([norms.to(device) for norms in found])


def _spread(values: Tensor, places: Sequence[int], length: int) -> Tensor:
    """Return a vector with the values at the given indices, and 0 elsewhere."""
    if len(places) == length:
        return values
    at = torch.tensor(places, device=values.device)
    return values.new_zeros(length).index_copy_(0, at, values)


def _no_moments(optimizer: torch.optim.Optimizer) -> ValueError:
    """Return the error of SPAM for an optimizer without second moments."""
    return ValueError(
        f"SPAM needs the running mean of squares that Adam, AdamW, NAdam, RAdam, RMSprop and "
        f"Adadelta keep; {type(optimizer).__name__} has none: use another optimizer, or another "
        "kind of clipping, such as trainer.clipping.ZClip"
    )
