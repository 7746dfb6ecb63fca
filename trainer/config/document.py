"""YAML files as trees of nodes: read within limits, variants merged, includes put in their place.

Nothing here builds an object or imports a module. A node remembers its file and line, so that
every message about it can say where it stands.

A variant names the file that it varies and says only what differs::

    base: demo.yaml          # relative to this file
    model: {width: 256}      # merged into the base's, key by key

An untagged mapping, or one with the base's own tag, is merged into the base's; anything else
(another class, a list, a number) takes its place.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.config.comments import comments
from trainer.config.nodes import (
    CORE,
    MAP,
    MAX_DEPTH,
    MAX_NODES,
    MERGE,
    NAMING,
    PLAIN,
    REFERENCE,
    STR,
    TUPLE,
    children,
    expanded_size,
    mapping,
    nodes,
    pop,
    tag,
    where,
)

MAX_BYTES = 64 * 1024
MAX_FILES = 50
INCLUDE = "!include:"
OPENINGS = re.compile(rf"(?:[\[{{] *){{{MAX_DEPTH + 1}}}")
TAGS = ("!ref", "!copy", TUPLE, "!PLACEHOLDER")

Keys = tuple[str, ...]  # The keys from the root to a value; of lists, the index.


@dataclass
class Document:
    """A YAML with its base and its includes in it, and the comments on its keys by their path."""

    root: MappingNode
    comments: dict[Keys, str] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Document:
    """The YAML at `path`, merged over its base.

    Raises ValueError with file and line for what does not parse, is too large, is too deep or uses
    a tag that is not HyperPyYAML's; FileNotFoundError where there is no such file.
    """
    reader = _Reader()
    root = reader.read(Path(path), ())
    expanded_size(root)
    return Document(root, reader.comments)


class _Reader:
    """Reads a file and those that it names, all within one budget, and gathers their comments."""

    def __init__(self) -> None:
        self.comments: dict[Keys, str] = {}
        self.files = 0

    def read(self, path: Path, chain: tuple[Path, ...], at: Keys = ()) -> MappingNode:
        """The mapping in a file; `chain` are the files that led to it, `at` is where it goes."""
        real = path.resolve()
        if real in chain:
            loop = " -> ".join(str(each) for each in (*chain[chain.index(real) :], real))
            raise ValueError(f"YAML files name each other in a circle: {loop}")
        self.files += 1
        if self.files > MAX_FILES:
            raise ValueError(f"{path}: more than {MAX_FILES} YAML files are read for one run")
        text = _read_text(path)
        root = compose(text, str(path)) or mapping()
        if not isinstance(root, MappingNode) or tag(root) != MAP:
            raise ValueError(f"{where(root)}: the file must be a mapping of keys to values")
        for key, _ in root.value:
            if tag(key) != STR:
                raise ValueError(f"{where(key)}: the key {key.value!r} must be text; quote it")
        for place, comment in comments(root, text.splitlines(), at):
            self.comments.setdefault(place, comment)  # A variant is read before its base.

        def other(node: Node, name: str, place: Keys) -> MappingNode:
            try:
                return self.read(path.parent / name, (*chain, real), (*at, *place))
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{where(node)}: {name} cannot be read: {reason}") from None

        _include(root, (), other)
        below = pop(root, "base")
        if below is None:
            return root
        if not isinstance(below, ScalarNode) or Path(below.value).suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"{where(below)}: base is the YAML that this file varies: a path that ends in .yaml"
            )
        return merged(other(below, below.value, ()), root)


def _include(node: Node, at: Keys, read: Callable[[Node, str, Keys], MappingNode]) -> None:
    """Replace what is tagged `!include:file` below `node` by what is in the file."""
    for slot, child in enumerate(children(node)):
        key = node.value[slot][0].value if isinstance(node, MappingNode) else slot
        place = (*at, str(key))
        if tag(child).startswith(INCLUDE):
            included = read(child, tag(child)[len(INCLUDE) :], place)
            _move_references(included, place)
            if not isinstance(child, MappingNode):
                raise ValueError(f"{where(child)}: what an included file changes must be a mapping")
            child = merged(included, child)
            if isinstance(node, MappingNode):
                node.value[slot] = (node.value[slot][0], child)
            else:
                node.value[slot] = child
        _include(child, place, read)


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES // 1024} KiB: too large for a YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def compose(text: str, name: str) -> Node | None:
    """The node tree of a YAML text, None of an empty one; `name` says in messages where it stood.

    Aliases are shared nodes; merge keys (`<<`) are merged in.
    """
    try:
        _check_size(text, name)
        root: Node | None = YAML(typ="safe", pure=True).compose(_named(text, name))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if name.startswith("--") else f", line {mark.line + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ValueError(f"{name}{line}: not valid YAML: {error.problem}{context}") from None
    except YAMLError as error:
        raise ValueError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if root is not None:
        expanded_size(root)
        for node in nodes(root):
            _check(node)
        root = _with_arguments(root)
    return root


def _named(text: str, name: str) -> io.StringIO:
    stream = io.StringIO(text)
    stream.name = name  # The marks get their file from here.
    return stream


def _check_size(text: str, name: str) -> None:
    """Walk the events, which costs no memory, and stop at too many or too deep ones."""
    depth = documents = 0
    anchors: set[str] = set()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES // 1024} KiB: too large for a YAML")
    too_deep = OPENINGS.search(text)
    if too_deep:  # The parser would take its time over them.
        line = text.count("\n", 0, too_deep.start()) + 1
        raise ValueError(f"{name}, line {line}: nested more than {MAX_DEPTH} levels deep")
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(_named(text, name))):
        kind = type(event).__name__
        depth += kind in ("MappingStartEvent", "SequenceStartEvent")
        depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
        documents += kind == "DocumentStartEvent"
        line = event.start_mark.line + 1
        if count > MAX_NODES:
            raise ValueError(
                f"{name}, line {line}: more than {MAX_NODES} values: too many for a YAML"
            )
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}, line {line}: nested more than {MAX_DEPTH} levels deep")
        if documents > 1:
            raise ValueError(f"{name}, line {line}: a second document begins; there must be one")
        if kind != "AliasEvent" and getattr(event, "anchor", None):
            if event.anchor in anchors:
                raise ValueError(
                    f"{name}, line {line}: the anchor &{event.anchor} is defined twice"
                )
            anchors.add(event.anchor)


def _check(node: Node) -> None:
    """Refuse tags that are not HyperPyYAML's, and keys that are not simple or not unique."""
    name = tag(node)
    if name not in PLAIN and name not in TAGS and not name.startswith((*NAMING, INCLUDE)):
        raise ValueError(
            f"{where(node)}: the tag {name.replace(CORE, '!!')} is not allowed; allowed are "
            f"{', '.join((*TAGS, *NAMING, INCLUDE))}"
        )
    if isinstance(node, ScalarNode) and name == TUPLE:
        node.tag, node.style = STR, None  # "(3, 4)" is text until it is built.
    if not isinstance(node, MappingNode):
        return
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode) or tag(key) not in PLAIN | {MERGE}:
            raise ValueError(f"{where(key)}: a key must be plain text or a number")
        if key.value in seen:
            raise ValueError(f"{where(key)}: the key {key.value!r} is there twice")
        seen.add(key.value)
    _flatten(node)


def _with_arguments(root: Node) -> Node:
    """The tree with `!new:x` written as `!new:x {}`, so that arguments can be added to it."""
    written: dict[int, Node] = {}

    def changed(node: Node) -> Node:
        if not isinstance(node, ScalarNode) or not tag(node).startswith((*NAMING, INCLUDE)):
            return node
        if node.value:
            raise ValueError(
                f"{where(node)}: the arguments of {tag(node)} must be a mapping or a list, "
                f"not {node.value!r}"
            )
        new = mapping(tag(node))
        new.start_mark, new.end_mark = node.start_mark, node.end_mark
        return written.setdefault(id(node), new)

    for node in nodes(root):
        if isinstance(node, MappingNode):
            node.value = [(key, changed(value)) for key, value in node.value]
        elif isinstance(node, SequenceNode):
            node.value = [changed(value) for value in node.value]
    return changed(root)


def _flatten(node: MappingNode) -> None:
    """Put what `<<: *alias` merges in among the mapping's own keys, beneath them."""
    for slot, (key, value) in enumerate(node.value):
        if tag(key) == MERGE:
            del node.value[slot]
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(source, MappingNode):
                    raise ValueError(f"{where(value)}: << merges mappings, nothing else")
                _flatten(source)
                present = {each.value for each, _ in node.value}
                node.value += [pair for pair in source.value if pair[0].value not in present]
            return


def _move_references(root: Node, place: Keys) -> None:
    """`<a[b]>` of an included file means `<place[a][b]>` in the one that includes it."""
    prefix = place[0] + "".join(f"[{key}]" for key in place[1:])

    def moved(match: re.Match[str]) -> str:
        first = re.match(r"[^\[.]*", match[1])
        assert first is not None  # The pattern matches the empty text too.
        return f"<{prefix}[{first[0]}]{match[1][first.end() :]}>"

    for node in nodes(root):
        if tag(node) in ("!ref", "!copy") and isinstance(node, ScalarNode):
            node.value = REFERENCE.sub(moved, node.value)


def merged(below: MappingNode, above: MappingNode) -> MappingNode:
    """`below` with the keys of `above` in it, mapping by mapping."""
    slots = {key.value: slot for slot, (key, _) in enumerate(below.value)}
    for key, value in above.value:
        if key.value not in slots:
            below.value.append((key, value))
            continue
        slot = slots[key.value]
        old = below.value[slot][1]
        both = isinstance(old, MappingNode) and isinstance(value, MappingNode)
        if both and tag(value) in (MAP, tag(old)):
            merged(old, value)
        else:
            below.value[slot] = (key, value)
    return below
