"""Base class and protocol of the clip kinds, which are called once a step."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trainer.clipping.gradients import Gradients


class Clipper(Protocol):
    """Protocol of a clipper, as an `Update` calls it.

    It may also offer

    - ``bind(owner, names, optimizer)``, called once before the first step (see `Clip.bind`),
    - ``measure(gradients, factor)``, for measurements beside L2 norms (see `Gradients`),
    - ``state_dict`` and ``load_state_dict``, if it has a history.

    Attributes:
        limit: the threshold of the last step, inf without clipping.
    """

    limit: float

    def __call__(self, gradients: Gradients) -> bool:
        """Clip the measured gradients in place; return true if any of them changed."""


class Clip:
    """Base class of the clip kinds.

    Attributes:
        limit: the threshold of the last step, inf without clipping.
        names: the names of the optimizer's parameters, known after `bind`.
        by_group: true if a parameter group may have its own ``max_grad_norm``.
        scales: true if what `measure` returns scales with the gradients.
    """

    limit: float = math.inf
    names: Mapping[Tensor, str] = MappingProxyType({})
    by_group: ClassVar[bool] = False
    scales: ClassVar[bool] = True

    def bind(
        self, owner: str, names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
    ) -> None:
        """Attach the clipper to an optimizer, before the first step.

        Args:
            owner: the name of the optimizer.
            names: the names of its parameters, such as "encoder.0.weight".
            optimizer: the optimizer.

        Raises:
            ValueError: if this kind cannot clip what the optimizer has.
        """
        self.names = names
        limited = any("max_grad_norm" in group for group in optimizer.param_groups)
        if limited and not self.by_group:
            raise ValueError(
                f"the optimizer {owner!r} has two clippers: {type(self).__name__}, and parameter "
                "groups with a max_grad_norm of their own, which that does not heed; leave one "
                "out, or use trainer.clipping.NormClip, LayerClip or ValueClip"
            )

    def __call__(self, gradients: Gradients) -> bool:
        """Clip the measured gradients in place; return true if any of them changed."""
        raise NotImplementedError


def matching(
    owner: str, key: str, patterns: Sequence[str], names: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """Return the first pattern that each parameter's name matches, for those that match any.

    Args:
        owner: the name of the optimizer, for messages.
        key: the name of the setting, for messages.
        patterns: patterns with ``*``, ``?`` and ``[…]`` as in file names, in order.
        names: the names of the optimizer's parameters.

    Raises:
        ValueError: if no parameter is left for a pattern.
    """
    found: dict[Tensor, str] = {}
    for pattern in patterns:
        matched = [p for p, name in names.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names.values(), n=3, cutoff=0.0)
            raise ValueError(
                f"{key} {pattern!r} matches no parameter of the optimizer {owner!r}; "
                f"the nearest names are {', '.join(near)}"
            )
        left = [p for p in matched if p not in found]
        if not left:
            raise ValueError(
                f"{key} {pattern!r} comes too late: earlier patterns take every parameter of the "
                f"optimizer {owner!r} that it matches, such as {names[matched[0]]}"
            )
        found.update(dict.fromkeys(left, pattern))
    return found


def refuse_complex(clip: object, gradients: Gradients) -> None:
    """Raise ValueError if gradients are complex, for kinds that compare elements."""
    if any(tensor.is_complex() for tensor in gradients.tensors):
        raise ValueError(f"{type(clip).__name__} cannot take complex gradients; use NormClip")


def refuse_sparse(clip: Clip, gradients: Gradients) -> None:
    """Raise ValueError if gradients are sparse, for kinds that need the shape of a parameter."""
    if gradients.sparse:
        param = next(p for p in gradients.params if p.grad is not None and p.grad.is_sparse)
        raise ValueError(
            f"{type(clip).__name__} cannot take the sparse gradient of "
            f"{clip.names.get(param, 'a parameter')}: it looks at whole parameters; use a kind "
            "that needs norms alone, or an embedding with sparse=False"
        )
