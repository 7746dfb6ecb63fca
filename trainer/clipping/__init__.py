"""Gradient clipping of every kind: what happens to measured gradients before a step.

| kind | limits |
|---|---|
| `NormClip`, `ValueClip` | the joint norm of an optimizer's gradients; each element |
| `LayerClip`, `PatternClip` | the norm of each tensor; of the parameters of each name pattern |
| `GradualClip`, `MixedClip` | a limit that changes over steps; several kinds in order |
| `AutoClip`, `MedianClip`, `ZClip` | the joint norm, by the norms so far |
| `AdaGC` | the norm of each tensor, by its norms so far |
| `AGC`, `SPAM` | each unit, by its weights; each element, by its usual square |
"""

from trainer.clipping.adaptive import AdaGC, AutoClip, MedianClip, ZClip, percentile
from trainer.clipping.clip import Clip, Clipper
from trainer.clipping.composite import GradualClip, MixedClip
from trainer.clipping.fixed import LayerClip, NormClip, PatternClip, ValueClip
from trainer.clipping.gradients import Gradients, joint, limit_of, measured, norms
from trainer.clipping.setting import by_name, clippers
from trainer.clipping.unitwise import AGC, SPAM

__all__ = [
    "AGC", "AdaGC", "AutoClip", "Clip", "Clipper", "Gradients", "GradualClip", "LayerClip",
    "MedianClip", "MixedClip", "NormClip", "PatternClip", "SPAM", "ValueClip", "ZClip", "by_name",
    "clippers", "joint", "limit_of", "measured", "norms", "percentile",
]  # fmt: skip
