"""Gradient clipping: one measurement of an optimizer's gradients, and the kinds that act on it.

| kind | limits |
|---|---|
| `NormClip`, `ValueClip` | the joint norm of an optimizer's gradients; each element |
| `LayerClip`, `PatternClip` | the norm of each tensor; of the parameters of each name pattern |
| `GradualClip`, `MixedClip` | a limit that changes over steps; several kinds in order |
| `AutoClip`, `MedianClip`, `ZClip` | the joint norm, relative to earlier norms |
| `AdaGC` | the norm of each tensor, relative to its earlier norms |
| `AGC`, `SPAM` | each unit, relative to its weights; each element, relative to its mean square |
"""

from trainer.clipping.adaptive import AdaGC, AutoClip, MedianClip, ZClip, percentile
from trainer.clipping.composite import GradualClip, MixedClip
from trainer.clipping.fixed import LayerClip, NormClip, PatternClip, ValueClip
from trainer.clipping.gradients import Clip, Clipper, Gradients, joint, measured, norms
from trainer.clipping.unitwise import AGC, SPAM

__all__ = [
    "AGC", "AdaGC", "AutoClip", "Clip", "Clipper", "Gradients", "GradualClip", "LayerClip",
    "MedianClip", "MixedClip", "NormClip", "PatternClip", "SPAM", "ValueClip", "ZClip", "joint",
    "measured", "norms", "percentile",
]  # fmt: skip
