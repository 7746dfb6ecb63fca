"""Kinds that find their limit in the norms so far, which are saved; a skipped step never enters.

A norm of 0 does not enter either: it would teach a limit of 0, which freezes what it is for.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from trainer import checks
from trainer.clipping.clip import Clip
from trainer.clipping.gradients import Gradients, is_reliable, joint, limit_of, safe_norms


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values as in numpy.

    Args:
        sorted_values: the values in ascending order.
        percent: the percentile, from 0 to 100.

    Returns:
        The percentile; NaN without values.

    >>> percentile([1.0, 2.0, 4.0], 75)
    3.0
    """
    if not sorted_values:
        return math.nan
    rank = percent / 100.0 * (len(sorted_values) - 1)
    low = int(rank)
    below, above = sorted_values[low], sorted_values[min(low + 1, len(sorted_values) - 1)]
    return below + (above - below) * (rank - low)


class AutoClip(Clip):
    """Norm clipping at a percentile of the norms so far (Seetharaman et al. 2020, 2007.14469).

    c_t = percentile p of ‖g_1‖ … ‖g_t‖, g ← g · min(1, c_t / ‖g‖). With the paper's 10, nine steps
    in ten are clipped; the learning rate may be higher for it. ``history``: so many norms are
    looked back on (the paper keeps all).
    """

    scale = 1.0

    def __init__(self, percentile: float = 10.0, history: int = 10_000) -> None:
        self.percentile = checks.within("AutoClip", "percentile", percentile, 0.0, 100.0)
        self._norms = deque[float](maxlen=checks.whole("AutoClip", "history", history, 1))
        self._sorted: list[float] = []

    def __call__(self, gradients: Gradients) -> bool:
        if not learns_from(gradients.norm):
            return False
        if len(self._norms) == self._norms.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._norms[0])]
        self._norms.append(gradients.norm)
        bisect.insort(self._sorted, gradients.norm)
        self.limit = self.scale * percentile(self._sorted, self.percentile)
        return shrunk(gradients, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """The norms that it looks back on, and the limit of the last step."""
        return {"limit": self.limit, "recent": {"norms": list(self._norms)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        checks.same_keys(type(self).__name__, state, ("limit", "recent"))
        self.limit = state["limit"]
        self._norms.clear()
        self._norms.extend(state["recent"]["norms"])  # The last ones, if there are too many.
        self._sorted = sorted(self._norms)


class MedianClip(AutoClip):
    """Norm clipping at so many times the median of the last norms, as icefall's ScaledAdam has it.

    c_t = ``scale`` · median of the last ``history`` norms, the one of this step included: with the
    default 2.0 a usual step is left as it is, and a spike is cut to twice the usual.
    """

    def __init__(self, scale: float = 2.0, history: int = 100) -> None:
        super().__init__(50.0, checks.whole("MedianClip", "history", history, 1))
        self.scale = checks.within("MedianClip", "scale", scale, 0.0, math.inf, "()")


class ZClip(Clip):
    """Clip the norms that are far above a running mean (Kumar et al. 2025, 2504.02507).

    With μ and σ² the moving mean and variance of the norm n: z = (n − μ) / (σ + ε); where
    z > ``z``, c = μ + z*·σ / (z / z*), else nothing is clipped. Then μ ← αμ + (1 − α)n,
    σ² ← ασ² + (1 − α)(n − μ)², with n = c where it was clipped. The first ``warmup_steps`` norms
    give the first mean and variance. ``max_norm`` is a limit that holds besides, also in the
    warm-up. ``limit`` is c, or the norm above which there would have been one.
    """

    EPSILON = 1e-6

    def __init__(
        self,
        z: float = 2.5,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        max_norm: float | None = None,
    ) -> None:
        self.z = checks.within("ZClip", "z", z, 0.0, math.inf, "()")
        self.alpha = checks.within("ZClip", "alpha", alpha, 0.0, 1.0, "()")
        self.warmup_steps = checks.whole("ZClip", "warmup_steps", warmup_steps, 1)
        self.max_norm = limit_of(max_norm, "ZClip: max_norm")
        self.limit = self.max_norm
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def __call__(self, gradients: Gradients) -> bool:
        norm = gradients.norm
        if not learns_from(norm):
            return False
        if len(self._first) < self.warmup_steps:
            self._warm_up(norm)
            self.limit = self.max_norm
        else:
            self.limit = min(self._judge(norm), self.max_norm)
        return shrunk(gradients, self.limit)

    def _warm_up(self, norm: float) -> None:
        self._first.append(norm)
        if len(self._first) == self.warmup_steps:
            self._mean = math.fsum(self._first) / self.warmup_steps
            squares = ((each - self._mean) ** 2 for each in self._first)
            self._variance = math.fsum(squares) / self.warmup_steps

    def _judge(self, norm: float) -> float:
        """The limit for this norm; mean and variance move on."""
        deviation = math.sqrt(self._variance)
        score = (norm - self._mean) / (deviation + self.EPSILON)
        limit = self._mean + self.z * (deviation + self.EPSILON)
        if score > self.z:
            limit = norm = self._mean + self.z * deviation / (score / self.z)
        self._mean = self.alpha * self._mean + (1 - self.alpha) * norm
        self._variance = self.alpha * self._variance + (1 - self.alpha) * (norm - self._mean) ** 2
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance, the norms of the warm-up, and the limit of the last step."""
        return {
            "limit": self.limit, "first": list(self._first),
            "mean": self._mean, "variance": self._variance,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        checks.same_keys("ZClip", state, ("limit", "first", "mean", "variance"))
        self.limit, self._first = state["limit"], list(state["first"])
        self._mean, self._variance = state["mean"], state["variance"]


class AdaGC(Clip):
    """Clip each tensor at its own moving average (Wang et al. 2025, 2502.11034, algorithm 1).

    After ``warmup_steps``: h = min(1, λ_rel·γ / ‖g‖), g ← h·g, γ ← βγ + (1 − β)‖h·g‖, for each
    tensor alone. Until then the joint norm is clipped at λ_abs and γ is the smallest norm that the
    tensor had after that. A tensor that has had no gradient but 0 has no γ, and is not clipped.
    ``limit`` is the joint norm that was allowed: λ_abs, then that of all λ_rel·γ.
    """

    def __init__(
        self,
        beta: float = 0.98,
        lambda_rel: float = 1.05,
        lambda_abs: float = 1.0,
        warmup_steps: int = 100,
    ) -> None:
        self.beta = checks.within("AdaGC", "beta", beta, 0.0, 1.0, "[)")
        self.lambda_rel = checks.within("AdaGC", "lambda_rel", lambda_rel, 0.0, math.inf, "()")
        self.lambda_abs = checks.within("AdaGC", "lambda_abs", lambda_abs, 0.0, math.inf, "(]")
        self.warmup_steps = checks.whole("AdaGC", "warmup_steps", warmup_steps, 0)
        self.limit = self.lambda_abs
        self._steps = 0
        self._averages: dict[int, float] = {}  # By the parameter's place in the optimizer.

    def __call__(self, gradients: Gradients) -> bool:
        if not gradients.finite:
            return False
        # A tensor's own norm may vanish beside larger ones; here it matters (rare; syncs).
        small = [i for i, norm in enumerate(gradients.norms) if not is_reliable(norm)]
        again = dict(zip(small, safe_norms([gradients.tensors[i] for i in small]), strict=True))
        gradients.norms = [again.get(i, norm) for i, norm in enumerate(gradients.norms)]
        self._steps += 1
        if self._steps <= self.warmup_steps:
            return self._warm_up(gradients)
        limits = [self.lambda_rel * self._averages.get(i, math.inf) for i in gradients.indices]
        self.limit = joint(limits)
        coefficients = [
            limit / norm if norm > limit else 1.0
            for norm, limit in zip(gradients.norms, limits, strict=True)
        ]
        clipped = gradients.scale_each(coefficients)
        for i, norm in zip(gradients.indices, gradients.norms_after(), strict=True):
            if norm > 0.0:
                old = self._averages.get(i, norm)
                self._averages[i] = self.beta * old + (1.0 - self.beta) * norm
        return clipped

    def _warm_up(self, gradients: Gradients) -> bool:
        self.limit = self.lambda_abs
        clipped = shrunk(gradients, self.limit)
        for i, norm in zip(gradients.indices, gradients.norms_after(), strict=True):
            if norm > 0.0:
                self._averages[i] = min(self._averages.get(i, math.inf), norm)
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """Steps, the average of each tensor, and the limit of the last step."""
        return {"limit": self.limit, "steps": self._steps, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        checks.same_keys("AdaGC", state, ("limit", "steps", "averages"))
        self.limit, self._steps = state["limit"], state["steps"]
        self._averages = dict(state["averages"])


def learns_from(norm: float) -> bool:
    """Whether a norm may enter a history."""
    return math.isfinite(norm) and norm > 0.0


def shrunk(gradients: Gradients, limit: float) -> bool:
    """Scale the gradients down to a joint norm of ``limit``; whether they were above it."""
    if not 0.0 < limit < gradients.norm:
        return False
    gradients.scale(limit / gradients.norm)
    return True
