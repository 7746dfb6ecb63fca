"""Hyperparameters: a YAML file, what the command line changes in it, and the objects it builds.

    hparams = load_hparams("hparams/asr/demo.yaml", {"model": {"width": 256}})

The language is HyperPyYAML's (`!new:`, `!name:`, `!apply:`, `!ref`, `!copy`, `!include:` …), read
within limits and behind an allow-list, so that a YAML from elsewhere can be looked at and run. A
file may vary another one: see `trainer.config.document`.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from trainer.config import building, document
from trainer.config.guard import Guard
from trainer.config.nodes import (
    BOOL,
    FLOAT,
    INT,
    MAP,
    NAMING,
    NULL,
    PLAIN,
    SEQ,
    STR,
    children,
    dump,
    expanded_size,
    get,
    mapping,
    plain,
    put,
    represent,
    tag,
    where,
)
from trainer.config.references import resolve
from trainer.options import HINTS, RunOptions, checked, nearest

NUMBER = ("a number", (INT, FLOAT, NULL))
KINDS = {
    BOOL: ("true or false", (BOOL, NULL)),
    INT: NUMBER,
    FLOAT: NUMBER,
    SEQ: ("a list", (SEQ, NULL)),
    MAP: ("a mapping", (MAP, NULL)),
}


class Text(str):
    """A value as it was typed: read as YAML, or kept as text where the key holds text."""

    __slots__ = ()


class Key(NamedTuple):
    """A key of a YAML as `--help` shows it: "model.width", "144", "channels of the encoder"."""

    name: str
    default: str
    comment: str


def load_hparams(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """The values of a YAML by key, objects built.

    `overrides` change keys, nested ones too, and may add run options; `allow` are packages that
    the YAML may name in addition to those allowed anyway. Raises ValueError with one sentence that
    names key, file and line; FileNotFoundError where the file is missing.
    """
    configuration = Configuration(path, allow)
    configuration.override(overrides or {})
    return configuration.build()


def describe(path: str | os.PathLike[str]) -> list[Key]:
    """The keys of a YAML, nested ones dotted, with defaults and comments; nothing is built."""
    return Configuration(path).described()


class Configuration:
    """A YAML between being read and being built: its keys can be looked at and changed."""

    def __init__(self, path: str | os.PathLike[str], allow: Sequence[str] = ()) -> None:
        self.guard = Guard(allow)
        self.document = document.read(path)
        self.root = self.document.root

    def described(self) -> list[Key]:
        """All keys with defaults and comments, in the order of the file."""
        return list(self._described(self.root, ()))

    def _described(self, node: MappingNode, at: tuple[str, ...]) -> Iterable[Key]:
        for key, value in node.value:
            path = (*at, str(key.value))
            yield Key(".".join(path), brief(value), self.document.comments.get(path, ""))
            if isinstance(value, MappingNode):
                yield from self._described(value, path)

    def is_flag(self, name: str) -> bool:
        """Whether `name`, dotted, is a run option or a key of the YAML that is true or false."""
        node: Any = self.root
        for part in name.split("."):
            node = get(node, part) if isinstance(node, MappingNode) else None
        return HINTS.get(name) is bool if node is None else tag(node) == BOOL

    def override(self, changes: Mapping[str, Any]) -> None:
        """Change keys; mappings change what is below theirs. Run options may be new keys.

        An argument that the YAML leaves out can be given to an object if its class takes it. An
        unknown key, or a value of another type than the default, is a ValueError.
        """
        self._override(self.root, changes, ())
        expanded_size(self.root)

    def _override(self, node: MappingNode, changes: Mapping[str, Any], at: tuple[str, ...]) -> None:
        for key, value in changes.items():
            path = (*at, str(key))
            old = get(node, str(key))
            if old is None:
                self._check_new(node, path)
            if isinstance(value, Mapping) and isinstance(old, MappingNode):
                self._override(old, value, path)
            elif len(path) == 1 and key in HINTS:
                put(node, str(key), option(str(key), value))
            else:
                put(node, str(key), _fitting(old, value, ".".join(path)))

    def _check_new(self, node: MappingNode, path: tuple[str, ...]) -> None:
        """ValueError unless a key that the YAML does not have may be added."""
        *above, key = path
        name, parent = ".".join(path), ".".join(above)
        known = [str(each.value) for each, _ in node.value]
        if not above:
            known += RunOptions.names()
            if key not in known:
                raise ValueError(f"there is no key or run option {key!r}{nearest(key, known)}")
        elif tag(node).startswith(NAMING):
            target = tag(node).partition(":")[2]
            try:
                takes = building.parameters(self.guard.locate(target)) or {}
            except ValueError as error:
                raise ValueError(f"{parent} ({where(node)}): {error}") from error
            if key not in takes and not any(
                each.kind == each.VAR_KEYWORD for each in takes.values()
            ):
                raise ValueError(
                    f"there is no key {name!r}: {target} has no argument {key!r}"
                    f"{nearest(key, [*known, *takes])}"
                )
        elif known:  # An empty mapping takes any key.
            raise ValueError(
                f"there is no key {name!r} below {parent} ({where(node)}){nearest(key, known)}"
            )

    def resolved(self) -> MappingNode:
        """The tree with every reference replaced by what it means."""
        return resolve(self.root, lambda name, node: building.call(name, node, self.guard))

    def options(self) -> dict[str, Any]:
        """The run options among the keys, checked; objects are not built by now."""
        values, root = {}, self.resolved()
        for name in RunOptions.names():
            node = get(root, name)
            if node is not None and not (Any in typing.get_args(HINTS[name]) and _builds(node)):
                try:
                    values[name] = checked(name, plain(node))
                except ValueError as error:
                    raise ValueError(f"{where(node)}: {error}") from None
        return values

    def build(self) -> dict[str, Any]:
        """The values by key, objects built."""
        return building.build(self.resolved(), self.guard)

    def dump(self) -> str:
        """One YAML that says it all: base, includes and overrides in it, references kept."""
        return dump(self.root)


def option(name: str, value: Any) -> Node:
    """The value of a run option as a node, checked unless it is a reference."""
    if isinstance(value, Text):
        kinds = (HINTS[name], *typing.get_args(HINTS[name]))
        if str in kinds and not value.startswith("!"):
            value = None if type(None) in kinds and value in ("null", "~") else str(value)
        else:
            value = _node(value, name)
    if isinstance(value, Node):
        if _builds(value):
            return value  # A reference: checked once it is resolved.
        value = plain(value)
    return represent(checked(name, value))


def _builds(node: Node) -> bool:
    """Whether a value is, or holds, an object or a reference."""
    return any(tag(each) not in PLAIN for each in [node, *children(node)])


def _fitting(old: Node | None, value: Any, name: str) -> Node:
    """The new value of a key as a node, if it is of the type of the old one."""
    kind = NULL if old is None else tag(old)
    if kind == STR and isinstance(value, Text) and not value.startswith("!"):
        if value in ("null", "~"):
            return represent(None)
        return ScalarNode(STR, str(value), style=getattr(old, "style", None))
    new = _node(value, name)
    if kind in (INT, FLOAT) and new.value in ("inf", "-inf"):
        return represent(float(new.value))
    words, fitting = KINDS.get(kind, ("", ()))
    if fitting and tag(new) in PLAIN and tag(new) not in fitting:
        assert old is not None  # It gave the kind.
        given = repr(brief(new)) if tag(new) == STR else brief(new) or "a mapping"
        raise ValueError(
            f"{name} must be {words}, as its default {brief(old)} is ({where(old)}), not {given}"
        )
    if isinstance(old, ScalarNode) and tag(old) in ("!ref", "!copy") and tag(new) == MAP:
        raise ValueError(
            f"{name} is {brief(old)} ({where(old)}): change that, or {name} as a whole"
        )
    return new


def _node(value: Any, name: str) -> Node:
    """Any value as a node: typed text read as YAML, mappings and lists item by item."""
    if isinstance(value, Text):
        return document.compose(value, f"--{name}") or represent(None)
    if isinstance(value, Mapping):
        node = mapping()
        for key, each in value.items():
            put(node, str(key), _node(each, f"{name}.{key}"))
        return node
    return represent(value)


def brief(node: Node, width: int = 48) -> str:
    """A value in a few characters: a number, a list, the tag of an object."""
    if isinstance(node, ScalarNode):
        text = str(node.value) if tag(node) in PLAIN else f"{tag(node)} {node.value}".strip()
        text = " ".join(text.split()) or ("null" if tag(node) == NULL else "''")
    elif isinstance(node, MappingNode):
        text = "" if tag(node) == MAP and node.value else tag(node).replace(MAP, "{}")
    else:
        items = f"[{', '.join(brief(each) or '{…}' for each in children(node))}]"
        text = items if tag(node) == SEQ else f"{tag(node)} {items}"
    return text if len(text) <= width else f"{text[: width - 1]}…"
