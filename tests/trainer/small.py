"""What the tests of the loop share: states to compare, gradients to poison, small Brains."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor


def snapshot(*parts: Any) -> list[Any]:
    return copy.deepcopy([part.state_dict() for part in parts])


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def poison(parameter: Tensor, value: float = math.nan) -> Tensor:
    """A finite number, 0, whose gradient is NaN (or infinite) in one element of the parameter."""
    element = parameter.reshape(-1)[0]
    if math.isnan(value):
        return (element * 0).sqrt()
    return (element - element.detach()).abs().sqrt()
