"""Hyperparameters: a YAML file, overrides from the command line, and the objects it builds.

    hparams = load_hparams("hparams/asr/demo.yaml", {"model": {"width": 256}})

The language is HyperPyYAML's (`!new:`, `!name:`, `!apply:`, `!ref`, `!copy`, `!include:` …), read
within limits and behind an allow-list, which is a guard against typos and obvious mischief and no
sandbox: see SECURITY.md. A file may be a variant of another one: see `trainer.config.reading`.
"""

from __future__ import annotations

import copy
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from trainer.config import building, reading
from trainer.config.reading import (
    BOOL,
    FLOAT,
    INT,
    MAP,
    NULL,
    PLAIN,
    SEQ,
    STR,
    children,
    expanded_size,
    find,
    get,
    items,
    location,
    mapping,
    nodes,
    object_name,
    plain,
    pop,
    put,
    represent,
    tag,
)
from trainer.config.registry import Registry
from trainer.config.run_folder import RunFolderRegistry, check_objects, check_tags
from trainer.options import HINTS, RunOptions, checked, current_name, nearest_key
from trainer.untrusted import confined, no_modules_from

MAX_SUMMARY = 48  # characters of a value in help and messages
NUMBER = ("a number", (INT, FLOAT, NULL))
KINDS = {
    BOOL: ("true or false", (BOOL, NULL)),
    INT: NUMBER,
    FLOAT: NUMBER,
    SEQ: ("a list", (SEQ, NULL)),
    MAP: ("a mapping", (MAP, NULL)),
}


class Text(str):
    """Value as typed on a command line: kept as text if the key holds text, else read as YAML."""

    __slots__ = ()


class Key(NamedTuple):
    """Key of a YAML for `--help`: name ("model.width"), default ("144") and comment."""

    name: str
    default: str
    comment: str


def load_hparams(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    *,
    run_folder: bool = False,
) -> dict[str, Any]:
    """Read a YAML file and build its objects.

    Args:
        path: the YAML file.
        overrides: new values of keys, nested ones too; run options may be added.
        allow: packages, modules or objects by dotted name that the YAML may name in addition to
            those that the trainer and the recipes list.
        run_folder: the file is the hyperparams.yaml of a run folder, which may come from somebody
            else. Only the objects that a trained model needs are built, see
            `trainer.config.run_folder`: keys with objects that a recipe lists for YAML files but
            not for run folders are left out, and so are Checkpointers.

    Returns:
        The values by key, objects built.

    Raises:
        ValueError: the file or an override is wrong; the message names key, file and line.
        FileNotFoundError: there is no such file.
    """
    with no_modules_from(Path(path).parent) if run_folder else nullcontext():
        configuration = Configuration(path, allow, run_folder=run_folder)
        configuration.override(overrides or {})
        return configuration.build()


def describe(path: str | os.PathLike[str]) -> list[Key]:
    """List the keys of a YAML, nested ones dotted, with defaults and comments; nothing is built."""
    return Configuration(path).described()


class Configuration:
    """A YAML file that is read and not yet built: its keys can be listed and changed.

    The arguments are those of `load_hparams`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        allow: Sequence[str] = (),
        *,
        run_folder: bool = False,
    ) -> None:
        self.registry = RunFolderRegistry(allow) if run_folder else Registry(allow)
        self.folder = Path(path).parent
        if run_folder:
            confined(self.folder, path)
        self.root, self.comments = reading.read(path, alone=run_folder)

    def described(self) -> list[Key]:
        """List all keys with defaults and comments, in the order of the file."""
        return list(self._described(self.root, ()))

    def _described(self, node: MappingNode, at: tuple[str, ...]) -> Iterable[Key]:
        for key, value in node.value:
            path = (*at, str(key.value))
            yield Key(".".join(path), summary(value), self.comments.get(path, ""))
            if isinstance(value, MappingNode):
                yield from self._described(value, path)

    def is_flag(self, name: str) -> bool:
        """Return True if `name`, dotted, is a boolean run option or a boolean key of the YAML."""
        node = find(self.root, name)
        return HINTS.get(name) is bool if node is None else tag(node) == BOOL

    def override(self, changes: Mapping[str, Any]) -> None:
        """Change keys; mappings change the keys below theirs.

        Run options may be new keys, and so may arguments that the class of an object takes.

        Raises:
            ValueError: a key is unknown, or a value has another type than the default.
        """
        changes = {current_name(str(key)): value for key, value in changes.items()}
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
                put(node, str(key), option_node(str(key), value))
            else:
                put(node, str(key), _converted(old, value, ".".join(path)))

    def _check_new(self, node: MappingNode, path: tuple[str, ...]) -> None:
        """Raise ValueError unless a key that the YAML does not have may be added."""
        *above, key = path
        name, parent = ".".join(path), ".".join(above)
        known = [each for each, _ in items(node)]
        dotted = [each.name for each in self.described()]
        target = object_name(node)
        hint = ""
        if not above:
            known += RunOptions.names()
            problem = f"there is no key or run option {key!r}"
        elif target:
            try:
                signature = building.signature(self.registry.locate(target))
            except ValueError as error:
                raise ValueError(f"{parent} ({location(node)}): {error}") from error
            takes = signature.parameters if signature is not None else {}
            if any(each.kind == each.VAR_KEYWORD for each in takes.values()):
                return
            known += takes
            problem = f"there is no key {name!r}: {target} has no argument {key!r}"
            hint = f"; its arguments are: {', '.join(takes) or 'none'}"
        elif not known:  # An empty mapping takes any key.
            return
        else:
            problem = f"there is no key {name!r} below {parent} ({location(node)})"
        if key not in known:
            raise ValueError(f"{problem}{nearest_key(name, known, dotted) or hint}")

    def options(self) -> dict[str, Any]:
        """Return the run options among the keys, checked; objects are left out."""
        values, root = {}, self._resolved()
        for name in RunOptions.names():
            node = get(root, name)
            if node is not None and not (
                Any in typing.get_args(HINTS[name]) and _holds_object(node)
            ):
                try:
                    values[name] = checked(name, plain(node))
                except ValueError as error:
                    raise ValueError(f"{location(node)}: {error}") from None
        return values

    def build(self) -> dict[str, Any]:
        """Build the objects; return the values by key."""
        return building.build(self._checked(), self.registry)

    def check(self) -> None:
        """Check the references, and in a run folder the objects, whose modules are imported."""
        self._checked()

    def _checked(self) -> MappingNode:
        """Return a copy of the tree without references and without what only training needs."""
        root = self._resolved()
        for key, value in list(root.value):
            if any(self.registry.is_for_training_only(object_name(each)) for each in nodes(value)):
                pop(root, key.value)
        if isinstance(self.registry, RunFolderRegistry):
            check_objects(root, self.registry, self.folder)
        return root

    def _resolved(self) -> MappingNode:
        """Return a copy of the tree without references."""
        if isinstance(self.registry, RunFolderRegistry):
            check_tags(self.root)
        return building.resolve(self.root, self.registry)

    def dump(self) -> str:
        """Write one YAML with base, includes and overrides merged in, references kept.

        It is that of the run: what one start does with the folder is left out.
        """
        root = copy.copy(self.root)
        for name in ("overwrite", "change_hparams"):
            pop(root, name)
        return reading.dump(root)


def option_node(name: str, value: Any) -> Node:
    """Convert the value of a run option to a node; it is checked unless it is a reference."""
    if isinstance(value, Text):
        kinds = (HINTS[name], *typing.get_args(HINTS[name]))
        if str in kinds and not value.startswith("!"):
            value = None if type(None) in kinds and value in ("null", "~") else str(value)
        else:
            value = _to_node(value, name)
    if isinstance(value, Node):
        if _holds_object(value):
            return value  # a reference, checked once it is resolved
        value = plain(value)
    return represent(checked(name, value))


def _holds_object(node: Node) -> bool:
    """Return True if a value is an object or a reference, or a list or mapping of some."""
    return any(tag(each) not in PLAIN for each in [node, *children(node)])


def _converted(old: Node | None, value: Any, name: str) -> Node:
    """Convert the new value of a key to a node, which must have the type of the default `old`."""
    kind = NULL if old is None else tag(old)
    if kind == STR and isinstance(value, Text) and not value.startswith("!"):
        if value in ("null", "~"):
            return represent(None)
        return ScalarNode(STR, str(value), style=getattr(old, "style", None))
    new = _to_node(value, name)
    if kind in (INT, FLOAT) and new.value in ("inf", "-inf"):
        return represent(float(new.value))
    words, fitting = KINDS.get(kind, ("", ()))
    if fitting and tag(new) in PLAIN and tag(new) not in fitting:
        assert old is not None  # NULL has no fitting tags.
        given = repr(summary(new)) if tag(new) == STR else summary(new) or "a mapping"
        raise ValueError(
            f"{name} must be {words}, as its default {summary(old)} is ({location(old)}), "
            f"not {given}"
        )
    if isinstance(old, ScalarNode) and tag(old) in ("!ref", "!copy") and tag(new) == MAP:
        raise ValueError(
            f"{name} is {summary(old)} ({location(old)}): change that, or {name} as a whole"
        )
    return new


def _to_node(value: Any, name: str) -> Node:
    """Convert any value to a node: `Text` is read as YAML, mappings key by key."""
    if isinstance(value, Text):
        return reading.compose(value, f"--{name}")
    if isinstance(value, Mapping):
        node = mapping()
        for key, each in value.items():
            put(node, str(key), _to_node(each, f"{name}.{key}"))
        return node
    return represent(value)


def summary(node: Node) -> str:
    """Return a value in a few characters: a number, a list, the tag of an object."""
    if isinstance(node, ScalarNode):
        text = str(node.value) if tag(node) in PLAIN else f"{tag(node)} {node.value}".strip()
        text = " ".join(text.split()) or ("null" if tag(node) == NULL else "''")
    elif isinstance(node, MappingNode):
        text = "" if tag(node) == MAP and node.value else tag(node).replace(MAP, "{}")
    else:
        text = f"[{', '.join(summary(each) or '{…}' for each in children(node))}]"
        text = text if tag(node) == SEQ else f"{tag(node)} {text}"
    return text if len(text) <= MAX_SUMMARY else f"{text[: MAX_SUMMARY - 1]}…"
