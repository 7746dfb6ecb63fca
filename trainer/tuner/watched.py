"""Clippers for trials: of the recipe's own kind, and watched for what they would have to clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer.clipping import Clipper, Gradients, LayerClip, NormClip, ValueClip, joint


def like(clip: Any) -> Callable[[float], Clipper]:
    """What makes clippers of the kind of ``clip`` from a limit.

    A kind that chooses its limits itself has none to be looked for: the joint norm stands in.
    """
    if type(clip) is ValueClip:
        return ValueClip
    if type(clip) in (NormClip, LayerClip):
        kind, p = type(clip), clip.p
        return lambda limit: kind(limit, p)
    return NormClip


class Watched:
    """A clipper, and in ``seen`` what it compared with its limit at each step."""

    def __init__(self, clip: Any) -> None:
        self.clip, self.seen = clip, list[float]()
        self.limit: float = clip.limit

    def measure(self, gradients: Gradients, factor: float | Tensor) -> list[Tensor]:
        """What the clipper wants to know."""
        found: list[Tensor] = self.clip.measure(gradients, factor)
        return found

    def __call__(self, gradients: Gradients) -> bool:
        self.seen.append(self._size(gradients))
        clipped: bool = self.clip(gradients)
        return clipped

    def _size(self, gradients: Gradients) -> float:
        """The largest element, the largest norm of a tensor, or the joint norm."""
        if isinstance(self.clip, ValueClip):
            return max(gradients.extra[0])
        norms = self.clip.p_norms(gradients)
        if isinstance(self.clip, LayerClip):
            return float(max(norms))
        return float(joint(norms, self.clip.p))
