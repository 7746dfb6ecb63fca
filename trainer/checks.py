"""Hyperparameters and saved states: checks, and a base class of objects that have a state.

Each check takes an owner (the class that takes the value, or the object that a state is for) and
the name of the value. It raises a ValueError that names both, and what is allowed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.texts import first_names
from trainer.tree import plain_number

logger = logging.getLogger("trainer")


def as_number(value: object) -> int | float | None:
    """Return a number of Python, of NumPy or in a tensor as an int or a float; None for others.

    True and False are no numbers.
    """
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def whole(owner: str, name: str, value: float, low: int) -> int:
    """Return a whole number of at least ``low`` as an int; floats such as YAML's 25e3 are allowed.

    Raises:
        ValueError: if the value is no whole number, or below ``low``.
    """
    found = as_number(value)
    if found is None or not math.isfinite(found) or found != int(found) or found < low:
        raise ValueError(f"{owner}: {name} must be a whole number, {low} or more; got {value!r}")
    return int(found)


def within(owner: str, name: str, value: float, low: float, high: float, ends: str = "[]") -> float:
    """Return a number from the interval between ``low`` and ``high`` as a float.

    The brackets "[" and "]" in ``ends`` include an end of the interval, "(" and ")" exclude it.

    Raises:
        ValueError: if the value is no number, or outside of the interval.
    """
    found = as_number(value)
    if found is None or not (
        (found >= low if ends[0] == "[" else found > low)
        and (found <= high if ends[1] == "]" else found < high)
    ):
        interval = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{owner}: {name} must be a number in {interval}; got {value!r}")
    return float(found)


def one_of(owner: str, name: str, value: str, allowed: Collection[str]) -> str:
    """Return a value if it is among those allowed; raise ValueError for another one."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be {' or '.join(allowed)}; got {value!r}")
    return value


def by_name(setting: Any, name: str, known: Sequence[str], key: str, default: Any = None) -> Any:
    """Return the value of a setting for one optimizer.

    Args:
        setting: a value for all optimizers, or a mapping from their names to values.
        name: the name of the optimizer.
        known: the names of all optimizers.
        key: the name of the setting, for messages.
        default: the value for an optimizer that is not in the mapping.

    Raises:
        ValueError: a mapping names an optimizer that does not exist.
    """
    if not isinstance(setting, Mapping):
        return setting
    for each in setting:
        if each not in known:
            raise ValueError(
                f"{key} names the optimizer {each!r}, which does not exist; "
                f"this Brain has {', '.join(map(repr, known))}"
            )
    return setting.get(name, default)


def same_keys(owner: str, state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise ValueError unless a saved state has exactly the expected keys, in any order."""
    missing, unexpected = set(expected) - set(state), set(state) - set(expected)
    if missing or unexpected:
        raise ValueError(
            f"the saved state does not fit {owner}: missing {sorted(missing) or 'nothing'}, "
            f"unexpected {sorted(unexpected) or 'nothing'}"
        )


def warn_of_nonfinite(source: object, weights: Mapping[str, Any]) -> None:
    """Warn of read weights that are not finite, as after a diverged run.

    Tensors whose only non-finite value is -inf count as masks.

    Args:
        source: the file, folder or name that they were read from.
        weights: tensors by name; other values are left out.
    """
    bad = [name for name, each in weights.items() if isinstance(each, Tensor) and _is_bad(each)]
    if bad:
        logger.warning(
            "%s: the weights %s are not finite (nan or inf), and nor are their results: use "
            "another checkpoint or file", source, first_names(bad, 1),
        )  # fmt: skip


def _is_bad(tensor: Tensor) -> bool:
    floats = tensor.is_floating_point() and tensor.itemsize > 1 or tensor.is_complex()
    if not floats or tensor.is_meta or tensor.layout != torch.strided:
        return False
    # The sum settles almost all tensors in one pass; it may overflow itself.
    if tensor.detach().sum().isfinite():
        return False
    return not (tensor.isfinite() | (tensor == -math.inf)).all().item()


class Stateful:
    """Base class of objects whose state is some of their attributes.

    Hyperparameters are not saved: a resumed run uses its own.
    """

    saved: ClassVar[tuple[str, ...]] = ()  # names of these attributes

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, as plain values."""
        return {name: copy(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            ValueError: if it is the state of another class.
        """
        same_keys(type(self).__name__, state_dict, self.saved)
        for name in self.saved:
            setattr(self, name, copy(state_dict[name]))
