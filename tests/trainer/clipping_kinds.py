"""Clip kinds with settings that clip small gradients within a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer import clipping
from trainer.clipping import Gradients, measured

KINDS: dict[str, Callable[[], Any]] = {
    "norm": lambda: clipping.NormClip(0.1),
    "norm-1": lambda: clipping.NormClip(0.1, p=1),
    "norm-3": lambda: clipping.NormClip(0.05, p=3.0),
    "norm-inf": lambda: clipping.NormClip(0.01, p=math.inf),
    "value": lambda: clipping.ValueClip(0.01),
    "layer": lambda: clipping.LayerClip(0.05),
    "pattern": lambda: clipping.PatternClip({"*bias": 0.01, "*": 0.1}),
    "gradual-linear": lambda: clipping.GradualClip({0: 1.0, 20: 0.01}),
    "gradual-cosine": lambda: clipping.GradualClip({0: 1.0, 20: 0.01}, "cosine"),
    "gradual-stepwise": lambda: clipping.GradualClip(
        {0: None, 4: 0.1, 8: 0.01}, "stepwise", clipping.LayerClip()
    ),
    "layer-value": lambda: clipping.MixedClip([clipping.LayerClip(0.1), clipping.ValueClip(0.02)]),
    "value-auto": lambda: clipping.MixedClip([clipping.ValueClip(0.02), clipping.AutoClip(50)]),
    "auto": lambda: clipping.AutoClip(30.0, history=8),
    "median": lambda: clipping.MedianClip(0.9, history=8),
    "z": lambda: clipping.ZClip(z=0.5, warmup_steps=4),
    "adagc": lambda: clipping.AdaGC(warmup_steps=4),
    "agc": lambda: clipping.AGC(),
    "spam": lambda: clipping.SPAM(theta=2.0, warmup_steps=3),
}
# Kinds whose limit depends on earlier steps.
ADAPTIVE = ("value-auto", "auto", "median", "z", "adagc")
# Kinds that need the shape of a gradient.
DENSE = ("agc", "spam")


def bind(clip: Any, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Bind a clipper to parameters, with names in which every second one is a bias."""
    words = ("weight", "bias")
    names: Mapping[Tensor, str] = {p: f"layer{i}.{words[i % 2]}" for i, p in enumerate(params)}
    if hasattr(clip, "bind"):
        clip.bind("main", names, optimizer)


def clipped(
    clip: Any, optimizer: torch.optim.Optimizer, grads: list[Tensor]
) -> tuple[Gradients, bool]:
    """Set the gradients of the optimizer's parameters, measure them, and clip."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    gradients = measured(optimizer.param_groups, clip)
    return gradients, bool(clip(gradients))
