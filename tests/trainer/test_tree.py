"""Nested containers: every leaf once, in containers of the same types."""

from collections import Counter, OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from trainer.tree import leaves, map_leaves


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


CONTAINERS = {
    "dict": {"a": 1, "b": 2},
    "OrderedDict": OrderedDict(b=1, a=2),
    "UserDict": UserDict({"a": 1, "b": 2}),
    "defaultdict": defaultdict(list, {"a": 1, "b": 2}),
    "Counter": Counter(a=1, b=2),
    "list": [1, 2],
    "tuple": (1, 2),
    "named tuple": Point(1, 2),
    "dataclass": Pair(1, 2),
    "nested": [{"a": (1, Pair(Point(2, 3), [4]))}, [], 5],
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_leaves_change_and_containers_keep_their_types(name: str) -> None:
    value = CONTAINERS[name]
    before = list(leaves(value))
    mapped = map_leaves(lambda leaf: leaf + 10, value)
    assert type(mapped) is type(value)
    assert list(leaves(mapped)) == [(path, leaf + 10) for path, leaf in before]
    assert list(leaves(value)) == before
    assert map_leaves(lambda leaf: leaf, value) == value


def test_every_leaf_has_its_path() -> None:
    nested = {"a": [1, {"b": 2}], "c": Pair(3, Point(4, 5))}
    found = {"a.0": 1, "a.1.b": 2, "c.left": 3, "c.right.0": 4, "c.right.1": 5}
    assert dict(leaves(nested)) == found
    assert list(leaves(7)) == [("", 7)]


def test_a_mapping_that_cannot_be_changed_becomes_a_dict() -> None:
    assert map_leaves(str, MappingProxyType({"a": 1})) == {"a": "1"}


def test_a_container_may_be_taken_as_a_leaf() -> None:
    found = map_leaves(str, [(1, 2), [3]], is_leaf=lambda value: isinstance(value, tuple))
    assert found == ["(1, 2)", ["3"]]


def test_texts_tensors_and_classes_are_leaves() -> None:
    values = ["abc", torch.ones(2, 2), Pair]
    assert [leaf for _, leaf in leaves(values)] == values
