"""Hyperparameters: a YAML file, overrides from the command line, and the built objects.

    hparams = load_hparams("hparams/kws/demo.yaml", {"model": {"width": 256}})

The language is HyperPyYAML's (`!new:`, `!name:`, `!apply:`, `!ref`, `!copy`, `!include:` …), with
limits and an allow-list. The list guards against typos and obvious mischief; it is no sandbox: see
SECURITY.md. A file may be a variant of another: see `trainer.config.reading`.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from trainer.compat.toolkit import SEEDING, SET_SEED
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
    TIMESTAMP,
    Keys,
    children,
    expanded_size,
    find,
    get,
    is_tuple,
    items,
    location,
    mapping,
    nodes,
    object_name,
    paths,
    plain,
    pop,
    put,
    replace_children,
    represent,
    tag,
)
from trainer.config.registry import Registry
from trainer.config.run_folder import RunFolderRegistry, check_objects, check_tags
from trainer.options import (
    BRAIN_KEYS,
    HINTS,
    RunOptions,
    checked,
    current_name,
    nearest_key,
    translate,
    translated,
)
from trainer.other_options import NAMES
from trainer.untrusted import confined, no_modules_from

logger = logging.getLogger("trainer")

# Texts that must be quoted on a command line, by their spelling there.
QUOTED = {"''": "", '""': "", "'None'": "None", '"None"': "None"}
MAX_SUMMARY = 48  # characters of a value in help and messages
TORN = "a tuple within {…} or […] is written as a list, such as [3, 4]"
NUMBER = ("a number", (INT, FLOAT, NULL))
# Type of a default: words for it, and the types of values that may replace it.
KINDS = {
    BOOL: ("true or false", (BOOL, NULL)),
    INT: NUMBER,
    FLOAT: NUMBER,
    SEQ: ("a list", (SEQ, NULL)),
    MAP: ("a mapping", (MAP, NULL)),
}


class Text(str):
    """Value typed on a command line: text if the default is text, else read as YAML."""

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
        overrides: new values of keys, also nested; run options may be added.
        allow: dotted names of packages, modules or objects that the YAML may name, in addition to
            those listed by the trainer and the recipes.
        run_folder: True for the hyperparams.yaml of a run folder, which may come from somebody
            else: only objects that a trained model needs are built (see
            `trainer.config.run_folder`). Keys with Checkpointers, or with objects that a recipe
            lists for YAML files but not for run folders, are left out.

    Returns:
        The values by key, objects built.

    Raises:
        ValueError: the file or an override is wrong; the message names key, file and line.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(overrides, Mapping | None):
        raise ValueError(f"overrides must be a mapping, such as {{'lr': 0.1}}, not {overrides!r}")
    with no_modules_from(Path(path).parent) if run_folder else nullcontext():
        configuration = Configuration(path, allow, run_folder=run_folder)
        configuration.override(overrides or {})
        return configuration.build()


def describe(path: str | os.PathLike[str]) -> list[Key]:
    """List the keys of a YAML, nested ones dotted, with defaults and comments; nothing is built."""
    return Configuration(path).described()


class Configuration:
    """A YAML file, read and not yet built; takes the arguments of `load_hparams`."""

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
        if (torn := reading.torn_tuple(self.root)) is not None:
            logger.warning("%s: %r is a text: %s", location(torn), torn.value, TORN)
        for key, node in items(self.root):
            if object_name(node) in SEEDING and not run_folder:
                self._seed(key, node)
        for name, value in items(self.root):
            is_text = HINTS.get(name) in (str, str | None)
            if is_text and tag(value) in (INT, FLOAT, TIMESTAMP):  # such as 007
                put(self.root, name, represent(value.value, value))

    def _seed(self, key: str, node: Node) -> None:
        """Use the seed in a key such as ``__set_seed: !apply:torch.manual_seed [1]`` for the run.

        A key that begins with ``__`` still seeds when it is built; any other becomes a number.
        """
        arguments = dict(items(node))
        given = arguments.get("0") or arguments.get("seed")
        if given is None or not tag(node).startswith("!apply:"):
            return  # Refused like any other function.
        own = get(self.root, "seed")
        value = summary(self._followed(given))
        if not re.fullmatch(r"\d+|!ref.*", value):
            raise ValueError(
                f"{location(node)}: a seed must be a whole number of 0 or more, not {value}"
            )
        if own in (None, node):
            put(self.root, "seed", given)
        elif (other := summary(self._followed(own))) != value:
            raise ValueError(
                f"{location(node)}: {key} seeds with {value}, and the key seed is {other}: "
                "remove one of them"
            )
        reference = ScalarNode("!ref", "<seed>", node.start_mark, node.end_mark)
        if key.startswith("__"):
            node.tag = f"!apply:{SET_SEED}"
            replace_children(node, lambda _, child: reference if child is given else child)
        elif key != "seed":
            put(self.root, key, reference)

    def _followed(self, node: Node) -> Node:
        """Return a node, or the top-level node that it refers to."""
        for _ in self.root.value:  # A limit, since references may be circular.
            name = re.fullmatch("<([^<>]+)>", str(node.value)) if node.tag == "!ref" else None
            node = (find(self.root, name[1]) if name else None) or node
        return node

    def described(self) -> list[Key]:
        """List all keys with defaults and comments, in the order of the file."""
        return list(self._described(self.root, ()))

    def _described(self, node: MappingNode, at: tuple[str, ...]) -> Iterable[Key]:
        for key, value in items(node):
            path = (*at, key)
            yield Key(".".join(path), summary(value), self.comments.get(path, ""))
            if isinstance(value, MappingNode):
                yield from self._described(value, path)

    def is_flag(self, name: str) -> bool:
        """Return True if a dotted name is a boolean run option or a boolean key of the YAML."""
        node = find(self.root, name)
        return HINTS.get(name) is bool if node is None else tag(node) == BOOL

    def override(self, changes: Mapping[str, Any]) -> None:
        """Set new values by key; a mapping, or a dotted name, changes keys below a key.

        New keys may be run options, `BRAIN_KEYS`, and arguments that the class of an object takes.

        Raises:
            ValueError: a key is unknown, or a value has another type than the default.
        """
        for key, value in changes.items():
            name = current_name(str(key))
            if get(self.root, name) is None:
                name, *below = name.split(".")
                for each in reversed(below):
                    value = {each: value}
            self._override(self.root, {name: value}, ())
        expanded_size(self.root)

    def _override(
        self, node: MappingNode, changes: Mapping[str, Any], at: Keys, copied: bool = False
    ) -> None:
        for key, value in changes.items():
            path = (*at, str(key))
            name, old = ".".join(path), get(node, path[-1])
            if old is None:
                self._check_new(node, path)
            uses = self._uses(old)
            below = isinstance(value, Mapping) and isinstance(old, MappingNode)
            shared = below and len(uses) > 1
            if shared and object_name(old):  # A shared object is changed where it is defined.
                if name != uses[0]:
                    raise ValueError(
                        f"{name} is {uses[0]} ({location(old)}), of which it is an alias: change "
                        f"that, or {name} as a whole"
                    )
                shared = False
            elif len(uses) > 1 and uses[0] == name and not copied:
                logger.warning(
                    f"{name} alone is changed: its aliases ({', '.join(uses[1:])}) keep the YAML's "
                    f"value; !ref <{name}> follows"
                )
            if shared:
                old = copy.copy(old)
                old.value = [(copy.copy(each), child) for each, child in old.value]
                put(node, path[-1], old)
            if below:
                self._override(old, value, path, copied or shared)
            elif name in HINTS:
                put(node, name, option_node(name, value))
            else:
                put(node, path[-1], _converted(old, value, name))

    def _uses(self, node: Node | None) -> list[str]:
        """Return the keys of a node: several if it has an alias or is merged in elsewhere."""
        found: dict[tuple[Node, str], str] = {}
        for name, parent in paths(self.root):
            for key, child in items(parent):
                if child is node:
                    found.setdefault((parent, key), f"{name}.{key}" if name else key)
        names = {*found.values()}  # in the order of the file, the anchor first
        return [name for name, each in paths(self.root) if each is node and name in names]

    def _check_new(self, node: MappingNode, path: Keys) -> None:
        """Raise ValueError unless a new key may be added."""
        *above, key = path
        name, parent = ".".join(path), ".".join(above)
        known = [each for each, _ in items(node)]
        target = object_name(node)
        hint = ""
        if not above:
            known += [*RunOptions.names(), *BRAIN_KEYS]
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
            dotted = [each.name for each in self.described()]
            raise ValueError(f"{problem}{nearest_key(name, known, dotted) or hint}")

    def options(self) -> dict[str, Any]:
        """Return the run options among the keys, checked; objects are left out."""
        values: dict[str, Any] = {}
        for name, node in items(self._resolved()):
            takes_object = Any in typing.get_args(HINTS.get(name))
            try:
                if name in HINTS and not (takes_object and _holds_object(node)):
                    values[name] = checked(name, plain(node))
                elif name in NAMES and not _holds_object(node):
                    values[name] = plain(node)
                    for option, meaning in translate(name, values[name]).items():
                        checked(option, meaning)
            except ValueError as error:
                raise ValueError(f"{location(node)}: {error}") from None
        return translated(values)

    def build(self) -> dict[str, Any]:
        """Build the objects, and return the values by key; raises the errors of `load_hparams`."""
        return building.build(self.checked(), self.registry)

    def checked(self) -> MappingNode:
        """Return a copy of the tree without references and training-only keys.

        Raises:
            ValueError: a reference is wrong, or a run folder has an object that is not allowed.
        """
        root = self._resolved()
        for key, value in list(root.value):
            if any(self.registry.is_for_training_only(object_name(each)) for each in nodes(value)):
                pop(root, key.value)
        if isinstance(self.registry, RunFolderRegistry):
            pop(root, "logger")  # An opened run folder records nothing.
            check_objects(root, self.registry, self.folder)
        return root

    def _resolved(self) -> MappingNode:
        """Return a copy of the tree without references."""
        if isinstance(self.registry, RunFolderRegistry):
            check_tags(self.root)
        return building.resolve(self.root, self.registry)

    def dump(self) -> str:
        """Write one YAML with base, includes and overrides merged in, references kept.

        The options `overwrite` and `change_hparams`, which are for one start, are left out.
        """
        root = copy.copy(self.root)
        for name in ("overwrite", "change_hparams"):
            pop(root, name)
        return reading.dump(root)


def option_node(name: str, value: Any) -> Node:
    """Check the value of a run option, unless it is a reference, and convert it to a node."""
    if isinstance(value, Text):
        kinds = (HINTS[name], *typing.get_args(HINTS[name]))
        if str in kinds and not value.startswith("!"):
            value = _typed_text(value, name, null=type(None) in kinds)
        else:
            value = _to_node(value, name)
    if isinstance(value, Node):
        if _holds_object(value):
            return value  # a reference, checked once it is resolved
        value = plain(value)
    return represent(checked(name, value))


def _holds_object(node: Node) -> bool:
    """Return True for an object or a reference, or a list or mapping with one."""
    return any(tag(each) not in PLAIN for each in [node, *children(node)])


def _converted(old: Node | None, value: Any, name: str) -> Node:
    """Convert the new value of a key to a node, which must have the type of the default `old`."""
    kind = NULL if old is None else SEQ if is_tuple(old) else tag(old)
    style = getattr(old, "style", None)
    if kind == STR and isinstance(value, Text) and not value.startswith("!"):
        text = _typed_text(value, name)
        return represent(None) if text is None else ScalarNode(STR, text, style=style)
    new = _to_node(value, name)
    if kind == STR and is_tuple(new) and style:
        return ScalarNode(STR, new.value, style='"')  # a text in quotes stays one
    if kind in (INT, FLOAT) and new.value in ("inf", "-inf"):
        return represent(float(new.value))
    words, fitting = KINDS.get(kind, ("", ()))
    fits = tag(new) in fitting or (kind == SEQ and is_tuple(new))
    if old is not None and fitting and tag(new) in PLAIN and not fits:
        given = repr(summary(new)) if tag(new) == STR else summary(new) or "a mapping"
        raise ValueError(
            f"{name} must be {'a tuple' if is_tuple(old) else words}, as its default "
            f"{summary(old) or '{…}'} is ({location(old)}), not {given}"
        )
    if isinstance(old, ScalarNode) and tag(old) in ("!ref", "!copy") and tag(new) == MAP:
        raise ValueError(
            f"{name} is {summary(old)} ({location(old)}): change that, or {name} as a whole"
        )
    return new


def _typed_text(value: Text, name: str, null: bool = True) -> str | None:
    """Return a typed text, None for null; the empty text and None must be quoted."""
    if null and value == "null":
        return None
    if value == "~":  # Unlike in a YAML: shells do not expand it in --data_folder=~.
        return os.path.expanduser(value)
    if null and value == "None":
        raise ValueError(f"{name}: null is written null, and the text None in quotes: '\"None\"'")
    return QUOTED.get(value, str(value))


def _to_node(value: Any, name: str) -> Node:
    """Convert any value to a node: `Text` is read as YAML, mappings key by key."""
    if isinstance(value, Mapping):
        below = mapping()
        for key, each in value.items():
            put(below, str(key), _to_node(each, f"{name}.{key}"))
        return below
    if not isinstance(value, Text):
        return represent(value)
    if value == "None":
        return represent(_typed_text(value, name))
    node = reading.compose(value, f"--{name}")
    if reading.torn_tuple(node) is not None:
        raise ValueError(f"--{name}: {TORN}")
    return node


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
