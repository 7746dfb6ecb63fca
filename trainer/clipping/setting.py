"""Options ``clip`` and ``max_grad_norm``: build the clipper of each optimizer."""

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

KINDS = {"norm": NormClip, "value": ValueClip}


def by_name(setting: Any, name: str, known: Sequence[str], key: str, default: Any = None) -> Any:
    """Return one optimizer's part of a setting.

    Args:
        setting: a value for all optimizers, or a mapping from their names to values.
        name: the name of the optimizer.
        known: the names of all optimizers.
        key: the name of the setting, for messages.
        default: the value of an optimizer that a mapping leaves out.

    Raises:
        ValueError: if a mapping names an optimizer that does not exist.
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
    setting: Any, limit: Any, default_limit: Any, optimizers: Mapping[str, torch.optim.Optimizer],
    names: Mapping[Tensor, str],
) -> dict[str, Clipper]:  # fmt: skip
    """Build the clipper of each optimizer, and bind it.

    A clipper that is given for several optimizers is copied, so that each has its own history. A
    limit that a clipper object does not use is warned of.

    Args:
        setting: "norm", "value", None (no clipping), a clipper, or a mapping of these by optimizer.
        limit: the limit for "norm" and "value", or a mapping of limits by optimizer.
        default_limit: the limit of an optimizer that the mapping leaves out.
        optimizers: the optimizers by name.
        names: the names of the parameters.

    Returns:
        The clippers by name of the optimizer.

    Raises:
        ValueError: if a setting or limit is not allowed, or a clipper refuses its optimizer.
    """
    found: dict[str, Clipper] = {}
    known = list(optimizers)
    for name in optimizers:
        own = by_name(setting, name, known, "clip", "norm")
        bound = limit_of(by_name(limit, name, known, "max_grad_norm", default_limit))
        clip = _clipper(own, bound)
        if not isinstance(own, (str, type(None))) and bound not in (default_limit, math.inf):
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
    """Build a clipper from one optimizer's part of the setting."""
    if setting is None:
        return NormClip(None)
    if isinstance(setting, str) and setting in KINDS:
        clip: Clipper = KINDS[setting](limit)
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
    """Return the names of an optimizer's parameters; for one of no module, its position."""
    return {
        param: names.get(param, f"group {number}, parameter {place}")
        for number, group in enumerate(optimizer.param_groups)
        for place, param in enumerate(group["params"])
    }
