"""What a recipe says under ``clip``, and the clipper of each optimizer that it means."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.clipping.clip import Clipper
from trainer.clipping.fixed import NormClip, ValueClip
from trainer.clipping.gradients import limit_of

WORDS = {"norm": NormClip, "value": ValueClip}


def by_name(setting: Any, name: str, known: Sequence[str], key: str, default: Any = None) -> Any:
    """The part of a setting that is for the optimizer ``name``: itself, or its entry if a mapping.

    An optimizer without an entry has the ``default``.

    Raises ValueError for a mapping that names an optimizer which does not exist.
    """
    if not isinstance(setting, Mapping):
        return setting
    unknown = [each for each in setting if each not in known]
    if unknown:
        raise ValueError(
            f"{key} names the optimizer {unknown[0]!r}, which does not exist; "
            f"this Brain has {', '.join(map(repr, known))}"
        )
    return setting.get(name, default)


def clippers(
    setting: Any, limit: Any, usual: Any, optimizers: Mapping[str, torch.optim.Optimizer],
    names: Mapping[Tensor, str],
) -> dict[str, Clipper]:  # fmt: skip
    """The clipper of each optimizer, bound to it.

    ``setting`` is "norm", "value", None (no clipping), a clipper, or a mapping of these by
    optimizer. ``limit`` is that of the words, or a mapping by optimizer; who is not in it has the
    ``usual`` one. A clipper that is given once for several optimizers is copied: each has a history
    of its own. ``names`` are those of the parameters.

    Raises ValueError for anything else, and for what a clipper refuses; warns of a limit that a
    clipper object leaves unused.
    """
    found: dict[str, Clipper] = {}
    known = list(optimizers)
    for name in optimizers:
        own = by_name(setting, name, known, "clip", "norm")
        bound = limit_of(by_name(limit, name, known, "max_grad_norm", usual))
        clip = _clipper(own, bound)
        if not isinstance(own, (str, type(None))) and bound not in (usual, math.inf):
            warnings.warn(
                f"max_grad_norm {bound:g} is not used for the optimizer {name!r}: its clipper, "
                f"{type(clip).__name__}, has limits of its own",
                stacklevel=2,
            )
        found[name] = copy.deepcopy(clip) if any(clip is each for each in found.values()) else clip
    for name, optimizer in optimizers.items():
        bind = getattr(found[name], "bind", None)
        if bind is not None:
            bind(name, _named(optimizer, names), optimizer)
    return found


def _clipper(setting: Any, limit: float) -> Clipper:
    """What one optimizer's part of the setting means."""
    if setting is None:
        return NormClip(None)
    if isinstance(setting, str) and setting in WORDS:
        clip: Clipper = WORDS[setting](limit)
        return clip
    if isinstance(setting, (list, tuple)):
        raise ValueError(
            f"clip is a list of {len(setting)}, and an optimizer has one clipper; for several in "
            "order write clip: !new:trainer.clipping.MixedClip {clips: […]}"
        )
    if callable(setting) and hasattr(setting, "limit") and not isinstance(setting, type):
        return setting  # type: ignore[no-any-return]
    raise ValueError(
        f"clip is {setting!r}; allowed: norm or value (max_grad_norm is their limit), null, a "
        "clipper such as !new:trainer.clipping.AutoClip {percentile: 10}, or a mapping of these by "
        "optimizer"
    )


def _named(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """The names of an optimizer's parameters; of one that no module has, its place."""
    return {
        param: names.get(param, f"group {number}, parameter {place}")
        for number, group in enumerate(optimizer.param_groups)
        for place, param in enumerate(group["params"])
    }
