"""Clip kinds that set their limit from the norms of earlier steps.

The history is saved with the optimizer. Skipped steps never enter it; nor do norms of 0, which
would lead to a limit of 0 and so freeze the weights.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence

from trainer import checks
from trainer.clipping.gradients import Clip, Gradients, is_reliable, joint, limit_of, safe_norms


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


class AutoClip(checks.Stateful, Clip):
    """Clip the joint norm at a percentile of its history.

        c_t = percentile p of ‖g_1‖ … ‖g_t‖,    g ← g · min(1, c_t / ‖g‖)

    AutoClip, Seetharaman et al. 2020 (arXiv 2007.14469, section 3). With the paper's p = 10, nine
    steps in ten are clipped, which allows a higher learning rate.

    Args:
        percentile: p, from 0 to 100; the default is the paper's.
        history: number of last norms to remember, 1 or more (the paper remembers all).

    Raises:
        ValueError: if an argument is out of range.
    """

    scale = 1.0
    saved = ("limit", "recent")

    def __init__(self, percentile: float = 10.0, history: int = 10_000) -> None:
        self.percentile = checks.within("AutoClip", "percentile", percentile, 0.0, 100.0)
        self._norms = deque[float](maxlen=checks.whole("AutoClip", "history", history, 1))
        self._sorted: list[float] = []

    def __call__(self, gradients: Gradients) -> bool:
        if not 0.0 < gradients.norm < math.inf:
            return False
        if len(self._norms) == self._norms.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._norms[0])]
        self._norms.append(gradients.norm)
        bisect.insort(self._sorted, gradients.norm)
        self.limit = self.scale * percentile(self._sorted, self.percentile)
        return _clip_joint_norm(gradients, self.limit)

    @property
    def recent(self) -> dict[str, list[float]]:
        """The remembered norms, oldest first; a longer list is cut to its last norms."""
        return {"norms": list(self._norms)}

    @recent.setter
    def recent(self, state: Mapping[str, list[float]]) -> None:
        checks.same_keys("the history of norms", state, ("norms",))
        self._norms = deque(state["norms"], self._norms.maxlen)
        self._sorted = sorted(self._norms)


class MedianClip(AutoClip):
    """Clip the joint norm at a multiple of the median of the last norms.

        c_t = scale · median(‖g_{t-history+1}‖ … ‖g_t‖),    g ← g · min(1, c_t / ‖g‖)

    The rule of the optimizer ScaledAdam in icefall, with its defaults: a usual step is unchanged,
    and a spike is cut to twice the usual norm.

    Args:
        scale: factor on the median, above 0.
        history: number of last norms to remember, 1 or more.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, scale: float = 2.0, history: int = 100) -> None:
        super().__init__(50.0, checks.whole("MedianClip", "history", history, 1))
        self.scale = checks.within("MedianClip", "scale", scale, 0.0, math.inf, "()")


class ZClip(checks.Stateful, Clip):
    """Clip the joint norm where it is far above its moving mean.

        z = (n - μ) / (σ + ε),    n = ‖g‖,    ε = 1e-6
        if z > z*:    c = μ + z*·σ / (z / z*),    g ← g · c / n,    n ← c
        μ ← αμ + (1 - α)n,    σ² ← ασ² + (1 - α)(n - μ)²

    ZClip, Kumar et al. 2025 (arXiv 2504.02507, algorithm 1, reciprocal clipping), with the paper's
    defaults. μ and σ² start as mean and variance of the first ``warmup_steps`` norms. The reported
    ``limit`` is c in a step that was clipped, else the norm above which it clips.

    Args:
        z: threshold z*, above 0.
        alpha: decay α of the moving mean and variance, between 0 and 1.
        warmup_steps: number of steps before clipping begins, 1 or more.
        max_norm: fixed limit that holds in addition, also during the warm-up; None for none.

    Raises:
        ValueError: if an argument is out of range.
    """

    EPSILON = 1e-6
    saved = ("limit", "first", "mean", "variance")

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
        self.first: list[float] = []  # Norms of the warm-up.
        self.mean = self.variance = 0.0

    def __call__(self, gradients: Gradients) -> bool:
        norm = gradients.norm
        if not 0.0 < norm < math.inf:
            return False
        # A run that resumes within the warm-up with fewer warmup_steps has no mean yet.
        if len(self.first) < self.warmup_steps or not self.mean:
            self.limit = self.max_norm
            self.first.append(norm)
            if len(self.first) >= self.warmup_steps:
                self.mean = math.fsum(self.first) / len(self.first)
                squares = ((each - self.mean) ** 2 for each in self.first)
                self.variance = math.fsum(squares) / len(self.first)
        else:
            self.limit = min(self._update(norm), self.max_norm)
        return _clip_joint_norm(gradients, self.limit)

    def _update(self, norm: float) -> float:
        """Return the limit for this norm, and update mean and variance."""
        deviation = math.sqrt(self.variance)
        score = (norm - self.mean) / (deviation + self.EPSILON)
        limit = self.mean + self.z * (deviation + self.EPSILON)
        if score > self.z:
            limit = norm = self.mean + self.z * deviation / (score / self.z)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (norm - self.mean) ** 2
        return limit


class AdaGC(checks.Stateful, Clip):
    """Clip each tensor relative to the moving average of its own norm.

        h = min(1, λ_rel·γ / ‖g‖),    g ← h·g,    γ ← βγ + (1 - β)‖h·g‖,    for each tensor g

    AdaGC, Wang et al. 2025 (arXiv 2502.11034, algorithm 1), with the paper's defaults. During the
    first ``warmup_steps`` steps the joint norm of all tensors is clipped at λ_abs instead, and γ is
    the smallest norm of the tensor after that clipping. A tensor whose gradients have all been 0
    has no γ and is not clipped. The reported ``limit`` is the largest joint norm allowed: λ_abs,
    then the joint norm of all λ_rel·γ.

    Args:
        beta: decay β of the average, in [0, 1).
        lambda_rel: limit λ_rel relative to the average, above 0.
        lambda_abs: limit λ_abs of the joint norm during the warm-up, above 0; may be inf.
        warmup_steps: number of warm-up steps, 0 or more.

    Raises:
        ValueError: if an argument is out of range.
    """

    saved = ("limit", "steps", "averages")

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
        self.steps = 0
        self.averages: dict[int, float] = {}  # γ, by the parameter's index in the optimizer.

    def __call__(self, gradients: Gradients) -> bool:
        if not gradients.finite:
            return False
        # The joint norm may be reliable while those of small tensors are not: measure these again.
        small = [i for i, norm in enumerate(gradients.norms) if not is_reliable(norm)]
        again = dict(zip(small, safe_norms([gradients.tensors[i] for i in small]), strict=True))
        gradients.norms = [again.get(i, norm) for i, norm in enumerate(gradients.norms)]
        self.steps += 1
        warming_up = self.steps <= self.warmup_steps
        if warming_up:
            self.limit = self.lambda_abs
            clipped = _clip_joint_norm(gradients, self.limit)
        else:
            limits = [self.lambda_rel * self.averages.get(i, math.inf) for i in gradients.indices]
            self.limit = joint(limits)
            pairs = zip(gradients.norms, limits, strict=True)
            clipped = gradients.scale_each(
                [limit / norm if norm > limit else 1.0 for norm, limit in pairs]
            )
        for i, norm in zip(gradients.indices, gradients.norms_after(), strict=True):
            if norm > 0.0:
                old = self.averages.get(i, norm)
                average = self.beta * old + (1.0 - self.beta) * norm
                self.averages[i] = min(old, norm) if warming_up else average
        return clipped


def _clip_joint_norm(gradients: Gradients, limit: float) -> bool:
    """Scale the gradients down to the limit; return True if their norm was above it."""
    if not 0.0 < limit < gradients.norm:
        return False
    return gradients.scale_each([limit / gradients.norm] * len(gradients.tensors))
