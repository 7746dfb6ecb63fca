"""Nested containers: one walk over what batches and saved states are made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def plain_number(value: Any) -> Any:
    """Return a tensor, array or NumPy number of one element as Python's number, all else as is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        return value.item()
    return value


def map_leaves(
    function: Callable[[Any], Any],
    value: Any,
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """Apply a function to every leaf of nested containers.

    Args:
        function: called with each leaf, that is with anything but a container.
        value: mappings, lists, tuples, named tuples and dataclasses, nested in any way.
        is_leaf: returns True for a container that is passed to ``function`` as a whole.

    Returns:
        New containers of the same types with the results in place of the leaves. A mapping that
        cannot be changed becomes a dict.
    """

    def walk(value: Any) -> Any:
        if is_leaf(value):
            return function(value)
        if isinstance(value, Mapping):
            items = {key: walk(part) for key, part in value.items()}
            if type(value) is dict or not isinstance(value, MutableMapping):
                return items
            mapping = copy.copy(value)
            for key, item in items.items():  # Not update, by which a Counter would add.
                mapping[key] = item
            return mapping
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(walk, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(walk, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            made = copy.copy(value)
            for each in dataclasses.fields(value):
                object.__setattr__(made, each.name, walk(getattr(value, each.name)))
            return made
        return function(value)

    return walk(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested containers with its dotted path, such as "optimizer.state.0".

    Containers are those of `map_leaves`.
    """
    parts: Mapping[Any, Any]
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    else:
        yield path, value
        return
    for key, part in parts.items():
        yield from leaves(part, f"{path}.{key}" if path else str(key))
