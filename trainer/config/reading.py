"""YAML files as trees of nodes: parsed within limits, with base files and includes merged in.

Nothing here builds an object or imports a module. A node is a scalar (its value is text), a mapping
(pairs of nodes) or a sequence (nodes) with a tag for its type; an alias is the same node in two
places. Nodes remember their file and line for error messages.

A variant names its base file and lists only the differences::

    base: demo.yaml          # relative to this file
    model: {width: 256}      # merged into the base, key by key

An untagged mapping, or one with the tag of the base's, is merged into the base's mapping; anything
else (another class, a list, a number) replaces it.
"""

from __future__ import annotations

import copy
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.options import ALIASES, current_name

# Far above any real configuration, and low enough to refuse hostile files at once.
MAX_NODES = 5_000  # shared nodes count once per use
MAX_DEPTH = 50
MAX_BYTES = 64 * 1024
MAX_FILES = 50

CORE = "tag:yaml.org,2002:"
STR, INT, FLOAT, BOOL, NULL = (CORE + name for name in ("str", "int", "float", "bool", "null"))
MAP, SEQ, MERGE = CORE + "map", CORE + "seq", CORE + "merge"
PLAIN = {STR, INT, FLOAT, BOOL, NULL, MAP, SEQ, CORE + "timestamp"}
NAMING = ("!new:", "!name:", "!module:", "!apply:", "!applyref:")  # tags that name Python objects
INCLUDE = "!include:"
TUPLE = "!tuple"
TAGS = ("!ref", "!copy", TUPLE, "!PLACEHOLDER")
REFERENCE = re.compile(r"<([^<>]*)>")
COMMENT = re.compile(r"\s*#+\s*(.*?)\s*$")
OPENINGS = re.compile(rf"(?:[\[{{] *){{{MAX_DEPTH + 1}}}")

Keys = tuple[str, ...]  # keys from the root to a value; for lists, the index


@dataclass
class Document:
    """A YAML with its base and includes merged in, and the comments of its keys by path."""

    root: MappingNode
    comments: dict[Keys, str] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file and merge it over its base.

    Raises:
        ValueError: a file does not parse, is too large or too deep, or uses a tag that HyperPyYAML
            does not have; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    reader = _Reader()
    root = reader.read(Path(path), ())
    expanded_size(root)
    return Document(root, reader.comments)


class _Reader:
    """Reads a file and the files that it names within one budget, and collects their comments."""

    def __init__(self) -> None:
        self.comments: dict[Keys, str] = {}
        self.files = 0

    def read(self, path: Path, chain: tuple[Path, ...], at: Keys = ()) -> MappingNode:
        """Read one file; `chain` are the files that led to it, `at` the keys of its place."""
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
            raise ValueError(f"{location(root)}: the file must be a mapping of keys to values")
        for key, _ in root.value:
            if tag(key) != STR:
                raise ValueError(f"{location(key)}: the key {key.value!r} must be text; quote it")
        if not at:  # Keys of included files are below another key: they are no run options.
            _rename_options(root)
        for place, comment in _comments(root, text.splitlines(), at):
            self.comments.setdefault(place, comment)  # A variant is read before its base.

        def read_other(node: Node, name: str, place: Keys) -> MappingNode:
            try:
                return self.read(path.parent / name, (*chain, real), (*at, *place))
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{location(node)}: {name} cannot be read: {reason}") from None

        _include(root, (), read_other)
        base = pop(root, "base")
        if base is None:
            return root
        if not isinstance(base, ScalarNode) or Path(base.value).suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"{location(base)}: base must be the path of a YAML file, ending in .yaml"
            )
        return merge(read_other(base, base.value, ()), root)


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES // 1024} KiB: too large for a YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _rename_options(root: MappingNode) -> None:
    """Replace former names of run options, as keys and in references, by their current names."""
    names = {key.value for key, _ in root.value}
    for key, _ in root.value:
        if key.value in ALIASES:
            if ALIASES[key.value] in names:
                raise ValueError(
                    f"{location(key)}: {key.value} is the former name of {ALIASES[key.value]}, "
                    "which is there too; remove one"
                )
            key.value = current_name(key.value)

    def renamed(match: re.Match[str]) -> str:
        return f"<{ALIASES.get(match[1], match[1])}{match[2]}>"

    for node in nodes(root):
        if tag(node) in ("!ref", "!copy") and isinstance(node, ScalarNode):
            node.value = re.sub(r"<(\w+)([^<>]*)>", renamed, node.value)


def _include(node: Node, at: Keys, read: Callable[[Node, str, Keys], MappingNode]) -> None:
    """Replace every node tagged `!include:file` below `node` by the content of the file."""
    for slot, child in enumerate(children(node)):
        key = node.value[slot][0].value if isinstance(node, MappingNode) else slot
        place = (*at, str(key))
        if tag(child).startswith(INCLUDE):
            included = read(child, tag(child)[len(INCLUDE) :], place)
            _move_references(included, place)
            if not isinstance(child, MappingNode):
                raise ValueError(
                    f"{location(child)}: changes to an included file must be a mapping"
                )
            child = merge(included, child)
            if isinstance(node, MappingNode):
                node.value[slot] = (node.value[slot][0], child)
            else:
                node.value[slot] = child
        _include(child, place, read)


def _move_references(root: Node, place: Keys) -> None:
    """Rewrite references of an included file: `<a[b]>` becomes `<place[a][b]>`."""
    prefix = place[0] + "".join(f"[{key}]" for key in place[1:])

    def moved(match: re.Match[str]) -> str:
        first = re.match(r"[^\[.]*", match[1])
        assert first is not None  # The pattern matches the empty text too.
        return f"<{prefix}[{first[0]}]{match[1][first.end() :]}>"

    for node in nodes(root):
        if tag(node) in ("!ref", "!copy") and isinstance(node, ScalarNode):
            node.value = REFERENCE.sub(moved, node.value)


def merge(below: MappingNode, above: MappingNode) -> MappingNode:
    """Merge the keys of `above` into `below`, mapping by mapping, and return `below`."""
    slots = {key.value: slot for slot, (key, _) in enumerate(below.value)}
    for key, value in above.value:
        if key.value not in slots:
            below.value.append((key, value))
            continue
        slot = slots[key.value]
        old = below.value[slot][1]
        both = isinstance(old, MappingNode) and isinstance(value, MappingNode)
        if both and tag(value) in (MAP, tag(old)):
            merge(old, value)
        else:
            below.value[slot] = (key, value)
    return below


# ---------------------------------------------------------------- text to nodes


def compose(text: str, name: str) -> Node | None:
    """Parse a YAML text into a tree of nodes.

    Aliases become shared nodes; merge keys (`<<`) are merged in.

    Args:
        text: one YAML document.
        name: origin of the text for error messages: a path, or an option such as "--width".

    Returns:
        The root node, None for an empty text.

    Raises:
        ValueError: the text is not valid YAML, exceeds a limit, or uses a tag that is not allowed.
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
    stream.name = name  # The marks take their file name from here.
    return stream


def _check_size(text: str, name: str) -> None:
    """Refuse a text with too many or too deep values; walking the events costs no memory."""
    depth = documents = 0
    anchors: set[str] = set()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES // 1024} KiB: too large for a YAML")
    too_deep = OPENINGS.search(text)
    if too_deep:  # The parser would be slow on these.
        line = text.count("\n", 0, too_deep.start()) + 1
        raise ValueError(f"{name}, line {line}: nested more than {MAX_DEPTH} levels deep")
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(_named(text, name))):
        kind = type(event).__name__
        depth += kind in ("MappingStartEvent", "SequenceStartEvent")
        depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
        documents += kind == "DocumentStartEvent"
        at = f"{name}, line {event.start_mark.line + 1}"
        if count > MAX_NODES:
            raise ValueError(f"{at}: more than {MAX_NODES} values: too many for a YAML")
        if depth > MAX_DEPTH:
            raise ValueError(f"{at}: nested more than {MAX_DEPTH} levels deep")
        if documents > 1:
            raise ValueError(f"{at}: a second document begins; there must be one")
        if kind != "AliasEvent" and getattr(event, "anchor", None):
            if event.anchor in anchors:
                raise ValueError(f"{at}: the anchor &{event.anchor} is defined twice")
            anchors.add(event.anchor)


def _check(node: Node) -> None:
    """Refuse tags that are not HyperPyYAML's, and keys that are not simple or not unique."""
    name = tag(node)
    if name not in PLAIN and name not in TAGS and not name.startswith((*NAMING, INCLUDE)):
        raise ValueError(
            f"{location(node)}: the tag {name.replace(CORE, '!!')} is not allowed; allowed are "
            f"{', '.join((*TAGS, *NAMING, INCLUDE))}"
        )
    if isinstance(node, ScalarNode) and name == TUPLE:
        node.tag, node.style = STR, None  # "(3, 4)" is text until it is built.
    if not isinstance(node, MappingNode):
        return
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode) or tag(key) not in PLAIN | {MERGE}:
            raise ValueError(f"{location(key)}: a key must be plain text or a number")
        if key.value in seen:
            raise ValueError(f"{location(key)}: the key {key.value!r} is there twice")
        seen.add(key.value)
    _flatten(node)


def _flatten(node: MappingNode) -> None:
    """Add the keys that `<<: *alias` merges in, unless the mapping has them itself."""
    for slot, (key, value) in enumerate(node.value):
        if tag(key) == MERGE:
            del node.value[slot]
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(source, MappingNode):
                    raise ValueError(f"{location(value)}: << merges mappings, nothing else")
                _flatten(source)
                present = {each.value for each, _ in node.value}
                node.value += [pair for pair in source.value if pair[0].value not in present]
            return


def _with_arguments(root: Node) -> Node:
    """Write `!new:x` as `!new:x {}`, so that arguments can be added to it."""
    written: dict[int, Node] = {}

    def changed(node: Node) -> Node:
        if not isinstance(node, ScalarNode) or not tag(node).startswith((*NAMING, INCLUDE)):
            return node
        if node.value:
            raise ValueError(
                f"{location(node)}: the arguments of {tag(node)} must be a mapping or a list, "
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


def _comments(root: Node, lines: list[str], at: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield the path and the comment of each key below `root` that has one.

    A comment belongs to the key on its line; comment lines belong to the key directly below, if
    they are indented like it.
    """
    if not isinstance(root, MappingNode):
        return
    for key, value in root.value:
        path = (*at, str(key.value))
        comment = _comment_behind(key, value, lines) or _comment_above(key, lines)
        if comment:
            yield path, comment
        # An alias is defined elsewhere: its comments are yielded there.
        if value.start_mark.index > key.start_mark.index:
            yield from _comments(value, lines, path)


def _comment_behind(key: Node, value: Node, lines: list[str]) -> str:
    """Return the comment at the end of the key's line, or of the last line of its value."""
    block = isinstance(value, ScalarNode) and value.style in ("|", ">")
    flow = isinstance(value, ScalarNode) or getattr(value, "flow_style", False)
    written = value.end_mark.index > value.start_mark.index  # a key may have no value
    if flow and not block and written and value.end_mark.index > key.end_mark.index:
        rest = lines[value.end_mark.line][value.end_mark.column :]
    else:  # The rest of the line is ": !new:x", an alias, or "|".
        rest = lines[key.end_mark.line][key.end_mark.column :]
        rest = re.sub(r"^:[^#]*?(?=\s#|$)", "", rest)
    match = COMMENT.match(rest)
    return match[1] if match else ""


def _comment_above(key: Node, lines: list[str]) -> str:
    """Return the comment lines directly above a key, unless they open the file."""
    found: list[str] = []
    indent = key.start_mark.column
    for number in range(key.start_mark.line - 1, -1, -1):
        line = lines[number]
        if not re.match(rf" {{{indent}}}#", line):
            break
        if number == 0:
            return ""  # A comment that opens the file is about the file.
        text = line.strip("# \t")
        if re.search(r"\w", text):  # not a line drawn by dashes
            found.append(text)
    return " ".join(reversed(found))


# ---------------------------------------------------------------- nodes


def tag(node: Node) -> str:
    """Return the tag of a node as text: `MAP`, "!ref", "!new:torch.nn.Linear"."""
    return str(node.tag)


def location(node: Node) -> str:
    """Return the origin of a node: "hparams/asr/demo.yaml, line 12", or the name of an option."""
    mark = node.start_mark
    if mark is None:
        return "overrides"
    return mark.name if mark.name.startswith("--") else f"{mark.name}, line {mark.line + 1}"


def children(node: Node) -> list[Node]:
    """Return the values directly below a node."""
    if isinstance(node, MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, SequenceNode) else []


def items(node: Node) -> list[tuple[str, Node]]:
    """Return the values directly below a node with their keys; for a list, the indices."""
    if isinstance(node, MappingNode):
        return [(str(key.value), value) for key, value in node.value]
    return [(str(index), value) for index, value in enumerate(children(node))]


def nodes(root: Node) -> Iterator[Node]:
    """Yield every node of a tree once, shared ones too."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += reversed(children(node))


def mapping(type_: str = MAP) -> MappingNode:
    """Make an empty mapping node."""
    return MappingNode(tag=type_, value=[], flow_style=True)


def get(node: MappingNode, key: str) -> Any:
    """Return the node under `key`, or None."""
    return next((value for each, value in node.value if each.value == key), None)


def put(node: MappingNode, key: str, value: Node) -> None:
    """Set `key`: in its place where it exists, else at the end."""
    for slot, (each, _) in enumerate(node.value):
        if each.value == key:
            node.value[slot] = (each, value)
            return
    node.value.append((represent(key), value))


def pop(node: MappingNode, key: str) -> Any:
    """Remove `key` and return its node, or None."""
    found = get(node, key)
    node.value = [pair for pair in node.value if pair[0].value != key]
    return found


def clone(root: Node) -> Any:
    """Copy a tree; shared nodes are shared in the copy."""
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
    """Return the number of values with every alias written out; ValueError above the limits."""
    sizes: dict[int, int] = {}
    active: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in active:
            raise ValueError(f"{location(node)}: the value contains itself")
        if len(active) > MAX_DEPTH:
            raise ValueError(f"{location(node)}: nested more than {MAX_DEPTH} levels deep")
        if id(node) not in sizes:
            active.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in children(node))
            active.discard(id(node))
        if sizes[id(node)] > MAX_NODES:
            raise ValueError(
                f"{location(node)}: more than {MAX_NODES} values with aliases and references "
                "written out: too many for a YAML"
            )
        return sizes[id(node)]

    return size(root)


def represent(value: Any, near: Node | None = None) -> Node:
    """Convert a plain Python value to a node.

    Args:
        value: numbers, text, paths, None, lists, tuples and mappings of these.
        near: the node whose file and line the new node takes.

    Raises:
        ValueError: the value is, or holds, another object.
    """
    if isinstance(value, Node):
        return value
    mark: dict[str, Any] = {}
    if near is not None:
        mark = {"start_mark": near.start_mark, "end_mark": near.end_mark}
    if isinstance(value, Mapping):
        pairs = [(represent(key, near), represent(each, near)) for key, each in value.items()]
        return MappingNode(MAP, pairs, flow_style=not pairs, **mark)
    if isinstance(value, list):
        parts = [represent(each, near) for each in value]
        return SequenceNode(SEQ, parts, flow_style=True, **mark)
    if value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
        return ScalarNode(NULL if value is None else BOOL, text, **mark)
    if isinstance(value, int):
        return ScalarNode(INT, int.__repr__(value), **mark)
    if isinstance(value, float):
        text = float.__repr__(value).replace("inf", ".inf").replace("nan", ".nan")
        return ScalarNode(FLOAT, text, **mark)
    if isinstance(value, tuple):
        return ScalarNode(STR, str(value).replace(",)", ")"), **mark)  # text that reads as a tuple
    if isinstance(value, (str, os.PathLike)):
        simple = re.fullmatch(r"[\w./][\w./ -]*|\(.*\)", str(value))
        return ScalarNode(STR, str(value), style=None if simple else '"', **mark)
    place = "" if near is None else f"{location(near)}: "
    raise ValueError(
        f"{place}{value!r} is a {type(value).__name__}; a YAML value must be a number, a text, "
        "true, false, null, a list or a mapping (!apply: builds objects, !applyref: does not)"
    )


def plain(node: Node) -> Any:
    """Return the Python value of a node; ValueError if it is, or holds, an object."""
    for each in nodes(node):
        if tag(each) not in PLAIN:
            raise ValueError(f"{location(each)}: {tag(each)} is not a plain value")
    return YAML(typ="safe", pure=True).constructor.construct_document(clone(node))


def dump(root: Node) -> str:
    """Write a tree as YAML text; shared nodes are written once, with aliases for the rest."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.width = 100
    yaml.serialize(root, stream)
    return stream.getvalue()
