"""What every kind of clipping is: it is called once a step, with measured gradients."""

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
    """What an `Update` needs of a clipper. It may also offer

    - ``bind(owner, names, optimizer)``, called once before the first step (see `Clip.bind`),
    - ``measure(gradients, factor)``, for what it wants to know beside L2 norms (see `Gradients`),
    - ``state_dict`` and ``load_state_dict``, where it has a history.
    """

    limit: float

    def __call__(self, gradients: Gradients) -> bool:
        """Change the gradients in place where they exceed the limit; say whether that was so."""


class Clip:
    """What the kinds share.

    ``limit`` is the threshold of the last step, infinity where nothing is clipped.
    """

    limit: float = math.inf
    names: Mapping[Tensor, str] = MappingProxyType({})
    # Whether a parameter group may have a `max_grad_norm` of its own.
    by_group: ClassVar[bool] = False
    # Whether what it measures is multiplied where the gradients are.
    scales: ClassVar[bool] = True

    def bind(
        self, owner: str, names: Mapping[Tensor, str], optimizer: torch.optim.Optimizer
    ) -> None:
        """Learn what it is for, before the first step: the optimizer called ``owner``.

        ``names`` are those of its parameters, such as "encoder.0.weight".
        Raises ValueError where this kind cannot do what was asked for.
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
        """Change the gradients in place where they exceed the limit; say whether that was so."""
        raise NotImplementedError


def matching(
    owner: str, key: str, patterns: Sequence[str], names: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """The first pattern that each parameter's name matches, for those that match any.

    Raises ValueError for a pattern to which no parameter is left.
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
    """ValueError where a kind that looks at elements is given numbers without an order."""
    if any(tensor.is_complex() for tensor in gradients.tensors):
        raise ValueError(f"{type(clip).__name__} knows no complex gradients; use NormClip")


def refuse_sparse(clip: Clip, gradients: Gradients) -> None:
    """ValueError where a kind that needs the shape of a parameter is given a sparse layout."""
    if gradients.sparse:
        param = next(p for p in gradients.params if p.grad is not None and p.grad.is_sparse)
        raise ValueError(
            f"{type(clip).__name__} cannot take the sparse gradient of "
            f"{clip.names.get(param, 'a parameter')}: it looks at whole parameters; use a kind "
            "that needs norms alone, or an embedding with sparse=False"
        )
