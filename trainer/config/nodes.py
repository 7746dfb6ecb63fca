"""YAML as nodes: the helpers that reading, overriding and resolving share.

A node is a scalar (its value is text), a mapping (pairs of nodes) or a sequence (nodes), with a tag
that says its type. An alias is the same node in two places.
"""

from __future__ import annotations

import copy
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# Far above any real configuration, and low enough that hostile ones are refused at once.
MAX_NODES = 5_000  # shared nodes counted as often as they are used
MAX_DEPTH = 50

CORE = "tag:yaml.org,2002:"
STR, INT, FLOAT, BOOL, NULL = (CORE + name for name in ("str", "int", "float", "bool", "null"))
MAP, SEQ, MERGE = CORE + "map", CORE + "seq", CORE + "merge"
PLAIN = {STR, INT, FLOAT, BOOL, NULL, MAP, SEQ, CORE + "timestamp"}
NAMING = ("!new:", "!name:", "!module:", "!apply:", "!applyref:")  # tags that name Python objects
TUPLE = "!tuple"
REFERENCE = re.compile(r"<([^<>]*)>")


def tag(node: Node) -> str:
    """The tag of a node as text: `MAP`, "!ref", "!new:torch.nn.Linear"."""
    return str(node.tag)


def where(node: Node) -> str:
    """The file and line of a node: "hparams/asr/demo.yaml, line 12"; an option for its value."""
    mark = node.start_mark
    if mark is None:
        return "overrides"
    return mark.name if mark.name.startswith("--") else f"{mark.name}, line {mark.line + 1}"


def children(node: Node) -> list[Node]:
    """The values right below a node."""
    if isinstance(node, MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, SequenceNode) else []


def nodes(root: Node) -> Iterator[Node]:
    """Every node of a tree once, shared ones too."""
    seen: set[int] = set()
    open_ = [root]
    while open_:
        node = open_.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            open_ += reversed(children(node))


def mapping(type_: str = MAP) -> MappingNode:
    """A new and empty mapping node."""
    return MappingNode(tag=type_, value=[], flow_style=True)


def get(node: MappingNode, key: str) -> Any:
    """The node under `key`, or None."""
    return next((value for each, value in node.value if each.value == key), None)


def put(node: MappingNode, key: str, value: Node) -> None:
    """Set `key`, in its place where it exists, else at the end."""
    for slot, (each, _) in enumerate(node.value):
        if each.value == key:
            node.value[slot] = (each, value)
            return
    node.value.append((represent(key), value))


def pop(node: MappingNode, key: str) -> Any:
    """Remove `key` and give its node, or None."""
    found = get(node, key)
    node.value = [pair for pair in node.value if pair[0].value != key]
    return found


def clone(root: Node) -> Any:
    """A copy of a tree; what is shared in it is shared in the copy."""
    copies: dict[int, Node] = {}

    def cloned(node: Node) -> Node:
        if id(node) not in copies:
            new = copies[id(node)] = copy.copy(node)
            if isinstance(node, MappingNode):
                new.value = [(key, cloned(value)) for key, value in node.value]
            elif isinstance(node, SequenceNode):
                new.value = [cloned(value) for value in node.value]
        return copies[id(node)]

    return cloned(root)


def expanded_size(root: Node) -> int:
    """How many values the tree has with every alias written out; ValueError above the limits."""
    sizes: dict[int, int] = {}
    active: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in active:
            raise ValueError(f"{where(node)}: the value contains itself")
        if len(active) > MAX_DEPTH:
            raise ValueError(f"{where(node)}: nested more than {MAX_DEPTH} levels deep")
        if id(node) not in sizes:
            active.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in children(node))
            active.discard(id(node))
        if sizes[id(node)] > MAX_NODES:
            raise ValueError(
                f"{where(node)}: more than {MAX_NODES} values with aliases and references written "
                "out: too many for a YAML"
            )
        return sizes[id(node)]

    return size(root)


def represent(value: Any, near: Node | None = None) -> Node:
    """A plain Python value as a node, placed where `near` is; ValueError for an object."""
    if isinstance(value, Node):
        return value
    mark: dict[str, Any] = {}
    if near is not None:
        mark = {"start_mark": near.start_mark, "end_mark": near.end_mark}
    if isinstance(value, Mapping):
        pairs = [(represent(key, near), represent(each, near)) for key, each in value.items()]
        return MappingNode(MAP, pairs, flow_style=not pairs, **mark)
    if isinstance(value, list):
        items = [represent(each, near) for each in value]
        return SequenceNode(SEQ, items, flow_style=True, **mark)
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
        return ScalarNode(NULL if value is None else BOOL, text, **mark)
    if isinstance(value, int):
        return ScalarNode(INT, int.__repr__(value), **mark)
    if isinstance(value, float):
        text = float.__repr__(value).replace("inf", ".inf").replace("nan", ".nan")
        return ScalarNode(FLOAT, text, **mark)
    if isinstance(value, tuple):
        return ScalarNode(STR, str(value).replace(",)", ")"), **mark)  # what is read as a tuple
    if isinstance(value, (str, os.PathLike)):
        simple = re.fullmatch(r"[\w./][\w./ -]*|\(.*\)", str(value))
        return ScalarNode(STR, str(value), style=None if simple else '"', **mark)
    place = "" if near is None else f"{where(near)}: "
    raise ValueError(
        f"{place}{value!r} is a {type(value).__name__}; a YAML value must be a number, a text, "
        "true, false, null, a list or a mapping (!apply: builds objects, !applyref: does not)"
    )


def plain(node: Node) -> Any:
    """The Python value of a node without objects; ValueError where there is one."""
    for each in nodes(node):
        if tag(each) not in PLAIN:
            raise ValueError(f"{where(each)}: {tag(each)} is not a plain value")
    return YAML(typ="safe", pure=True).constructor.construct_document(clone(node))


def dump(root: Node) -> str:
    """The tree as YAML text; what is shared is written once, with an alias for the rest."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.width = 100
    yaml.serialize(root, stream)
    return stream.getvalue()
