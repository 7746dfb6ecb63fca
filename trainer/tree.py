"""Nested containers, such as batches and saved states: apply a function to leaves, or list them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import count
from typing import Any

from torch import Tensor


def plain_number(value: Any) -> Any:
    """Convert a tensor, an array or a NumPy number of one element to a number of Python.

    Anything else is returned as it is.
    """
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
        function: called with each leaf, which is anything but a container.
        value: mappings, lists, tuples, named tuples and dataclasses, nested in any way.
        is_leaf: returns True for a container that is passed to ``function`` as a whole.

    Returns:
        New containers with the results in place of the leaves; see `rebuilt`.
    """
    if is_leaf(value) or not is_container(value):
        return function(value)
    parts = parts_of(value).items()
    return rebuilt(value, {key: map_leaves(function, part, is_leaf) for key, part in parts})


def is_container(value: Any) -> bool:
    """Return True for a mapping, list, tuple, named tuple or dataclass."""
    if isinstance(value, (dict, list, tuple, Mapping)):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def parts_of(container: Any) -> Mapping[Any, Any]:
    """Return the parts of a container by key, index or name of a field."""
    if isinstance(container, (list, tuple)):
        return dict(zip(getattr(container, "_fields", count()), container, strict=False))
    if isinstance(container, Mapping):
        return container
    return {each.name: getattr(container, each.name) for each in dataclasses.fields(container)}


def rebuilt(container: Any, parts: Mapping[Any, Any]) -> Any:
    """Return a new container of the same type with other parts, keyed as in `parts_of`.

    An immutable mapping becomes a dict.
    """
    if isinstance(container, Mapping):
        if type(container) is dict or not isinstance(container, MutableMapping):
            return dict(parts)
        mapping = copy.copy(container)
        for key, part in parts.items():  # Not `update`, which would add to the counts of a Counter.
            mapping[key] = part
        return mapping
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return type(container)(*parts.values())
    if isinstance(container, (list, tuple)):
        return type(container)(parts.values())
    made = copy.copy(container)
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    return made


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested containers with its dotted path, such as "optimizer.state.0".

    Containers are those of `map_leaves`.
    """
    if not is_container(value):
        yield path, value
        return
    row = isinstance(value, (list, tuple))
    for key, part in enumerate(value) if row else parts_of(value).items():
        yield from leaves(part, f"{path}.{key}" if path else str(key))
