"""Clip kinds that use others: a limit that changes over steps, and several kinds in order."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trainer import checks
from trainer.clipping.fixed import NormClip, PatternClip, ValueClip
from trainer.clipping.gradients import Clip, Gradients, Names, limit_of, measured


class GradualClip(checks.Stateful, Clip):
    """Change the limit of another kind over the optimizer's steps.

        c(t) = c_a + (c_b - c_a) · s(x),    x = (t - a) / (b - a)
        s(x) = x  ("linear"),  (1 - cos(πx)) / 2  ("cosine"),  0  ("stepwise")

    a and b are the given steps around step t, c_a and c_b their limits. Before the first given step
    and from the last one on, the limit is constant. Skipped steps do not count.

    Args:
        limits: limits by step number, counted from 0: ``{0: 10.0, 5000: 1.0}``.
        shape: the interpolation: "linear", "cosine" or "stepwise".
        clip: the kind to use, a `NormClip`, `LayerClip` or `ValueClip`; None for `NormClip`.

    Raises:
        ValueError: if an argument is not allowed.
    """

    by_group = True
    saved = ("steps",)
    SHAPES = ("linear", "cosine", "stepwise")

    def __init__(
        self,
        limits: Mapping[int, float | None],
        shape: str = "linear",
        clip: NormClip | ValueClip | None = None,
    ) -> None:
        if not isinstance(limits, Mapping) or not limits:
            raise ValueError(
                f"GradualClip: limits is {limits!r}; allowed: a mapping of steps to limits, such "
                "as {0: 10.0, 5000: 1.0}"
            )
        self.shape = checks.one_of("GradualClip", "shape", shape, self.SHAPES)
        steps = sorted((checks.whole("GradualClip", "a step", k, 0), k) for k in limits)
        self._steps = [step for step, _ in steps]
        self._limits = [limit_of(limits[k], f"GradualClip: limit at {k}") for _, k in steps]
        if shape != "stepwise" and not all(map(math.isfinite, self._limits)):
            raise ValueError(
                f"GradualClip: a {shape} limit cannot pass through infinity; use stepwise, or a "
                "large number"
            )
        self.clip = NormClip() if clip is None else clip
        if not isinstance(self.clip, (NormClip, ValueClip)) or isinstance(self.clip, PatternClip):
            raise ValueError(
                f"GradualClip: clip is {clip!r}; allowed: a kind with one limit, that is NormClip, "
                "LayerClip or ValueClip"
            )
        self.steps = 0
        self.limit = self.limit_at(0)

    def limit_at(self, step: int) -> float:
        """Return the limit of a step, counted from 0."""
        right = bisect.bisect_right(self._steps, step)
        if right == 0 or right == len(self._steps) or self.shape == "stepwise":
            return self._limits[max(right - 1, 0)]
        start, stop = self._steps[right - 1 : right + 1]
        before, after = self._limits[right - 1 : right + 1]
        share = (step - start) / (stop - start)
        if self.shape == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return before + (after - before) * share

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        return self.clip.measure(gradients, factor)

    def __call__(self, gradients: Gradients) -> bool:
        self.limit = self.clip.limit = self.limit_at(self.steps)
        self.steps += 1
        return self.clip(gradients)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.limit = self.limit_at(self.steps)


class MixedClip(Clip):
    """Apply several kinds in order, each to the result of the one before.

    The reported ``limit`` is that of the last kind that clipped in this step, else of the first.
    The gradients are measured again, at the cost of a second host-device sync, after a kind that
    changes their direction (`ValueClip`, `AGC`, `SPAM`) has clipped, and before `AGC` or `SPAM` if
    any kind has clipped.

    Args:
        clips: the kinds, each a different object; no `MixedClip`.

    Raises:
        ValueError: if ``clips`` is not such a list.
    """

    by_group = True

    def __init__(self, clips: Sequence[Any]) -> None:
        if not isinstance(clips, (list, tuple)) or not clips:
            raise ValueError(f"MixedClip: clips is {clips!r}; allowed: a list of clippers")
        for each in clips:
            if not isinstance(each, Clip) or isinstance(each, MixedClip):
                raise ValueError(
                    f"MixedClip: one of its clips is {each!r}; allowed: kinds of trainer.clipping "
                    "but MixedClip itself"
                )
        if len({id(each) for each in clips}) < len(clips):
            raise ValueError(
                "MixedClip: clips has the same object twice; allowed: a different object for each"
            )
        self.clips: list[Clip] = list(clips)
        self.limit = self.clips[0].limit
        self._slices: list[tuple[int, int]] = []  # Slice of `extra` for each kind.

    def bind(self, owner: str, names: Names, optimizer: Optimizer) -> None:
        for clip in self.clips:
            clip.bind(owner, names, optimizer)

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        found = [clip.measure(gradients, factor) for clip in self.clips]
        ends = [0, *accumulate(map(len, found))]
        self._slices = list(pairwise(ends))
        return list(chain(*found))

    def __call__(self, gradients: Gradients) -> bool:
        self.limit, clipped = self.clips[0].limit, False
        base, stale = gradients, False
        for i, clip in enumerate(self.clips):
            if stale or (clipped and not clip.scales):
                base, stale = measured(gradients.groups, self), False  # A second sync.
            stage = base.stage(*self._slices[i])
            if clip(stage):
                clipped, self.limit = True, clip.limit
                if stage.factors is None:
                    stale = True  # The kind has changed more than the scale.
                else:
                    old = base.factors or [1.0] * len(base.tensors)
                    base.factors = [f * g for f, g in zip(old, stage.factors, strict=True)]
            gradients.norm_after = stage.norm_after
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """Return the class name and the state of every kind."""
        return {
            "kinds": [type(clip).__name__ for clip in self.clips],
            "clips": [getattr(clip, "state_dict", dict)() for clip in self.clips],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            ValueError: if it is of other kinds.
        """
        checks.same_keys("MixedClip", state, ("kinds", "clips"))
        kinds = [type(clip).__name__ for clip in self.clips]
        if list(state["kinds"]) != kinds:
            raise ValueError(
                f"the saved MixedClip has {', '.join(state['kinds'])}, this Brain's has "
                f"{', '.join(kinds)}: the checkpoint was made with other settings"
            )
        for clip, each in zip(self.clips, state["clips"], strict=True):
            getattr(clip, "load_state_dict", lambda _: None)(each)
