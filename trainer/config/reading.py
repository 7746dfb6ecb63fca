"""YAML files as trees of nodes: parsed within limits, with base files and includes merged in.

This module builds no object and imports no module. A node is a scalar (its value is text), a
mapping (pairs of nodes) or a sequence (nodes) with a tag for its type; an alias is the same node in
two places. Nodes know their file and line for error messages.

A variant names its base file and lists only the differences::

    base: demo.yaml          # a path that ends in .yaml or .yml, relative to this file
    model: {width: 256}      # merged into the base, key by key

An untagged mapping, or one with the same tag as the base's, is merged into the base's mapping;
anything else (another class, a list, a number) replaces it. A key `base` that names no YAML file is
an ordinary key.
"""

from __future__ import annotations

import codecs
import copy
import io
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import StreamEndEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from trainer.options import ALIASES, at_home, current_name

# Far above real configurations, and low enough to refuse hostile files quickly.
MAX_NODES = 5_000  # shared nodes count once per use
MAX_DEPTH = 50
MAX_CHARACTERS = 64 * 1024
MAX_FILES = 50
MAX_BITS = 1024  # of an integer; Python cannot print one of more than 14,000 bits
MAX_QUOTED = 60  # characters of a value in a message

CORE = "tag:yaml.org,2002:"
STR, INT, FLOAT, BOOL, NULL = (CORE + name for name in ("str", "int", "float", "bool", "null"))
MAP, SEQ, MERGE, TIMESTAMP = (CORE + name for name in ("map", "seq", "merge", "timestamp"))
PLAIN = {STR, INT, FLOAT, BOOL, NULL, MAP, SEQ, TIMESTAMP}
NAMING = ("!new:", "!name:", "!module:", "!apply:", "!applyref:")  # tags that name Python objects
INCLUDE = "!include:"
TUPLE = "!tuple"
REFERENCES = ("!ref", "!copy")
TAGS = (*REFERENCES, TUPLE, "!PLACEHOLDER")
REFERENCE = re.compile(r"<([^<>]*)>")
OPENING_BRACKETS = re.compile(rf"(?:[\[{{] *){{{MAX_DEPTH + 1}}}")

YAML_SUFFIXES = (".yaml", ".yml")

Keys = tuple[str, ...]  # keys from the root to a value; for lists, the index


def read(path: str | os.PathLike[str], alone: bool = False) -> tuple[MappingNode, dict[Keys, str]]:
    """Read a YAML file, and merge it over its base unless it must stand alone.

    Returns:
        The tree, and the comments of its keys.

    Raises:
        ValueError: a file does not parse, is too large or too deep, or uses a tag that HyperPyYAML
            does not have; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    reader = _Reader(alone)
    root = reader.read(Path(path), ())
    expanded_size(root)
    return root, reader.comments


class _Reader:
    """Reads a file and the files that it names, and collects their comments."""

    def __init__(self, alone: bool) -> None:
        self.comments: dict[Keys, str] = {}
        self.files = 0
        self.alone = alone

    def read(self, path: Path, chain: tuple[Path, ...], at: Keys = ()) -> MappingNode:
        """Read one file; `chain` has the files that include it, `at` the keys of its content."""
        real = path.resolve()
        if real in chain:
            loop = " -> ".join(str(each) for each in (*chain[chain.index(real) :], real))
            raise ValueError(f"YAML files name each other in a circle: {loop}")
        self.files += 1
        if self.files > MAX_FILES:
            raise ValueError(f"{path}: more than {MAX_FILES} YAML files are read for one run")
        text = _read_text(path)
        root = _root_mapping(compose(text, str(path)))
        if not at:  # Keys of included files lie below another key, and are no run options.
            _rename_options(root)
        for place, comment in _comments(root, text.splitlines(), at):
            self.comments.setdefault(place, comment)  # A variant is read before its base.

        def read_other(node: Node, name: str, place: Keys) -> MappingNode:
            if self.alone:
                raise ValueError(f"{location(node)}: a run folder's YAML may name no other file")
            try:
                return self.read(path.parent / at_home(name), (*chain, real), (*at, *place))
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{location(node)}: {name} cannot be read: {reason}") from None

        _include(root, (), read_other)
        base = get(root, "base")
        several = base.value if isinstance(base, SequenceNode) else [base] if base else []
        texts = [str(each.value) for each in several if tag(each) == STR]
        if not any(
            Path(each).suffix in YAML_SUFFIXES or os.path.isfile(path.parent / at_home(each))
            for each in texts
        ):
            return root  # A file may have a key `base` of its own.
        if not isinstance(base, ScalarNode) or Path(base.value).suffix not in YAML_SUFFIXES:
            raise ValueError(
                f"{location(base)}: base must be the path of one YAML file, ending in .yaml; a key "
                "of your own that holds the path of a file needs another name"
            )
        pop(root, "base")
        return merge(read_other(base, base.value, ()), root)


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = io.TextIOWrapper(file, encoding="utf-16" if wide else "utf-8-sig")
        try:
            return text.read(MAX_CHARACTERS + 1)  # `compose` refuses longer texts.
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None


def _root_mapping(root: Node) -> MappingNode:
    """Return the root of a file, which must be a mapping with text as keys, or empty."""
    if tag(root) == NULL:
        return mapping()
    if not isinstance(root, MappingNode) or tag(root) != MAP:
        raise ValueError(f"{location(root)}: the file must be a mapping of keys to values")
    for key, _ in root.value:
        if tag(key) != STR:
            raise ValueError(f"{location(key)}: the key {key.value!r} must be text; quote it")
    return root


def _rename_options(root: MappingNode) -> None:
    """Replace former names of run options, as keys and in references, by their current names."""
    for key, _ in root.value:
        new = ALIASES.get(key.value)
        if new is not None and get(root, new) is not None:
            raise ValueError(
                f"{location(key)}: {key.value} is the former name of {new}, which is given too; "
                "remove one"
            )
        key.value = current_name(key.value)
    _rewrite_references(root, lambda key: ALIASES.get(key, key))


def _include(node: Node, at: Keys, read: Callable[[Node, str, Keys], MappingNode]) -> None:
    """Replace every node tagged `!include:file` below `node` by the content of the file."""

    def included(key: str, child: Node) -> Node:
        place = (*at, key)
        if tag(child).startswith(INCLUDE):
            content = read(child, tag(child).removeprefix(INCLUDE), place)
            # The file's references are relative to its own root.
            above = place[0] + "".join(f"[{each}]" for each in place[1:])
            _rewrite_references(content, lambda first: f"{above}[{first}]")
            if not isinstance(child, MappingNode):
                raise ValueError(
                    f"{location(child)}: changes to an included file must be a mapping"
                )
            child = merge(content, child)
        _include(child, place, read)
        return child

    replace_children(node, included)


def _rewrite_references(root: Node, rewrite: Callable[[str], str]) -> None:
    """Replace the first key of every reference: `<a[b]>` becomes `<{rewrite("a")}[b]>`."""
    for node in nodes(root):
        if isinstance(node, ScalarNode) and tag(node) in REFERENCES:
            node.value = re.sub(
                r"<([^<>\[.]*)(?=[^<>]*>)", lambda match: f"<{rewrite(match[1])}", node.value
            )


def merge(base: MappingNode, changes: MappingNode) -> MappingNode:
    """Merge the keys of `changes` into `base`, mapping by mapping, and return `base`."""
    for key, value in changes.value:
        old = get(base, key.value)
        both = isinstance(old, MappingNode) and isinstance(value, MappingNode)
        if both and tag(value) in (MAP, tag(old)):
            merge(old, value)
        elif old is None:
            base.value.append((key, value))
        else:
            put(base, key.value, value)
    return base


# ---------------------------------------------------------------- text to nodes


def compose(text: str, name: str) -> Node:
    """Parse the text of one YAML document into a tree of nodes.

    Aliases become shared nodes; merge keys (`<<`) are merged in; `!new:x` is read as `!new:x {}`.
    The root of an empty text is null. Messages have `name`, such as a path or "--width".

    Raises:
        ValueError: the text is not valid YAML, exceeds a limit, or uses a tag that is not allowed.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has more than {MAX_CHARACTERS // 1024} KiB: too large for a YAML")
    if brackets := OPENING_BRACKETS.search(text):  # ruamel.yaml's scanner is slow on these.
        line = text.count("\n", 0, brackets.start()) + 1
        raise ValueError(f"{name}, line {line}: nested more than {MAX_DEPTH} levels deep")
    stream = io.StringIO(text)
    stream.name = name  # The marks take their file name from here.
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        root: Node = yaml.compose(stream) or represent(None)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        place = _location_of(mark) if mark else name
        raise ValueError(f"{place}: not valid YAML: {error.problem}{context}") from None
    except YAMLError as error:
        raise ValueError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    expanded_size(root)
    return root


class _Composer(Composer):
    """Composer of ruamel.yaml that refuses too large or forbidden content while it reads."""

    count = 0
    depth = 0

    def compose_document(self) -> Node:
        """Compose the only document."""
        self.warn_double_anchors = False  # An alias refers to the last anchor before it.
        root: Node = super().compose_document()
        if not self.parser.check_event(StreamEndEvent):
            place = _location_of(self.parser.peek_event().start_mark)
            raise ValueError(f"{place}: a second document begins; there must be one")
        return root

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        """Compose a node and what is below it."""
        place = _location_of(self.parser.peek_event().start_mark)
        self.count += 1
        self.depth += 1
        if self.count > MAX_NODES:
            raise ValueError(f"{place}: more than {MAX_NODES} values: too many for a YAML")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"{place}: nested more than {MAX_DEPTH} levels deep")
        node: Node = super().compose_node(parent, index)
        self.depth -= 1
        name = tag(node)
        if name in TAGS and not isinstance(node, ScalarNode):
            raise ValueError(
                f"{location(node)}: {name} takes a text; quote what begins with [ or {{"
            )
        known = name in (*PLAIN, *TAGS) or name.startswith((*NAMING, INCLUDE))
        if not known and not (name == MERGE and index is None):
            raise ValueError(
                f"{location(node)}: the tag {name.replace(CORE, '!!')} is not allowed; allowed are "
                f"{', '.join((*TAGS, *NAMING, INCLUDE))}"
            )
        return node

    def compose_scalar_node(self, anchor: str | None) -> Node:
        """Compose a scalar; `!new:x` becomes a mapping, so that arguments can be added to it."""
        node: ScalarNode = super().compose_scalar_node(anchor)
        name, text = tag(node), str(node.value)
        shown = repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…")
        if name == TUPLE:
            node.tag, node.style = STR, None  # "(3, 4)" is text until it is built.
        if name in PLAIN - {STR}:
            try:
                plain(node)
            except Exception:  # of many kinds: `!!int x`, `!!bool x`, 2001-99-99
                kind = name.removeprefix(CORE)
                raise ValueError(
                    f"{location(node)}: {shown} is no {kind}; quote it if it is text"
                ) from None
        if not name.startswith((*NAMING, INCLUDE)):
            return node
        if text:
            raise ValueError(
                f"{location(node)}: the arguments of {name} must be a mapping or a list, "
                f"not {shown}"
            )
        new = mapping(name, node)
        if anchor is not None:
            self.anchors[anchor] = new
        return new

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        """Compose a mapping with unique keys; keys merged in by `<<` come first, as defaults."""
        node: MappingNode = super().compose_mapping_node(anchor)
        pairs: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or tag(key) not in PLAIN | {MERGE}:
                raise ValueError(f"{location(key)}: a key must be plain text or a number")
            if key.value in pairs:
                raise ValueError(f"{location(key)}: the key {key.value!r} is defined twice")
            pairs[key.value] = copy.copy(key), value  # A shared key would be written as an alias.
        if "<<" in pairs and tag(pairs["<<"][0]) == MERGE:
            _, merged = pairs.pop("<<")
            added: dict[str, tuple[Node, Node]] = {}
            for source in reversed(merged.value) if isinstance(merged, SequenceNode) else [merged]:
                if not isinstance(source, MappingNode):
                    raise ValueError(f"{location(merged)}: << merges mappings, nothing else")
                self.count += len(source.value)
                for key, value in source.value:
                    added[key.value] = copy.copy(key), value
            pairs = added | pairs
        node.value = list(pairs.values())
        return node


def _comments(root: Node, lines: list[str], at: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield the path and the comment of each key below `root` that has one.

    A comment belongs to the key on its line; comment lines belong to the key directly below with
    the same indentation.
    """
    for key, value in root.value if isinstance(root, MappingNode) else ():
        path = (*at, str(key.value))
        comment = _trailing_comment(key, value, lines) or _preceding_comment(key, lines)
        if comment:
            yield path, comment
        # The comments of an alias are yielded where it is defined.
        if value.start_mark.index > key.start_mark.index:
            yield from _comments(value, lines, path)


def _trailing_comment(key: Node, value: Node, lines: list[str]) -> str:
    """Return the comment at the end of the key's line, or of the last line of a list in [ ]."""
    end, between = key.end_mark, r":.*?\s"  # ": !new:x", an alias, or "|"
    flow = value.end_mark.line == end.line or getattr(value, "flow_style", False)
    if flow and value.end_mark.index > end.index:
        end, between = value.end_mark, r"\s*"
    match = re.match(rf"{between}#+\s*(.*?)\s*$", lines[end.line][end.column :])
    return match[1] if match else ""


def _preceding_comment(key: Node, lines: list[str]) -> str:
    """Return the comment lines directly above a key, unless they open the file."""
    end = key.start_mark.line
    start = end
    while start and re.match(rf" {{{key.start_mark.column}}}#", lines[start - 1]):
        start -= 1
    # The opening comment is about the file; rulers are left out.
    texts = [line.strip("# \t") for line in lines[start:end]] if start else []
    return " ".join(t for t in texts if re.search(r"\w", t) and not t.startswith("----"))


# ---------------------------------------------------------------- nodes


def tag(node: Node) -> str:
    """Return the tag of a node as text: `MAP`, "!ref", "!new:torch.nn.Linear"."""
    return str(node.tag)


def object_name(node: Node) -> str:
    """Return the dotted name of the Python object that a node names, or an empty text."""
    return tag(node).partition(":")[2] if tag(node).startswith(NAMING) else ""


def location(node: Node) -> str:
    """Return the origin of a node: "hparams/kws/demo.yaml, line 12", or the name of an option."""
    return "overrides" if node.start_mark is None else _location_of(node.start_mark)


def _location_of(mark: Any) -> str:
    """Return the file and line of a mark; for the value of an option, only its name."""
    return mark.name if mark.name.startswith("--") else f"{mark.name}, line {mark.line + 1}"


def items(node: Node) -> list[tuple[str, Node]]:
    """Return the values directly below a node with their keys; for a list, the indices."""
    if isinstance(node, MappingNode):
        return [(str(key.value), value) for key, value in node.value]
    values = node.value if isinstance(node, SequenceNode) else []
    return [(str(index), each) for index, each in enumerate(values)]


def is_tuple(node: Node) -> bool:
    """Return True for a text that is built as a tuple: (3, 4) without quotes."""
    bare = isinstance(node, ScalarNode) and tag(node) == STR and not node.style
    return bare and re.fullmatch(r"\(.*\)", node.value) is not None


def children(node: Node) -> list[Node]:
    """Return the values directly below a node."""
    return [child for _, child in items(node)]


def torn_tuple(root: Node) -> Node | None:
    """Return the first part, such as "(3", of a tuple that YAML splits within […] or {…}."""
    for node in nodes(root):
        pairs: Any = node.value if isinstance(node, MappingNode) else zip(children(node))
        below = [each for pair in pairs for each in pair if getattr(node, "flow_style", False)]
        texts = [each for each in below if tag(each) == STR and not each.style]
        begins: list[Node] = [each for each in texts if re.fullmatch(r"\([^)]*", each.value)]
        if begins and any(re.fullmatch(r"[^(]*\)", each.value) for each in texts):
            return begins[0]
    return None


def replace_children(node: Node, replace: Callable[[str, Node], Node]) -> None:
    """Replace each value directly below a node by the result of `replace(key, value)`."""
    if isinstance(node, MappingNode):
        node.value = [(key, replace(str(key.value), value)) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        node.value = [replace(str(index), each) for index, each in enumerate(node.value)]


def nodes(root: Node) -> Iterator[Node]:
    """Yield every node of a tree once, shared ones too."""
    seen: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += reversed(children(node))


def paths(root: Node, at: str = "") -> list[tuple[str, Node]]:
    """Return every value with its dotted key, such as "model.width"; shared values once per use."""
    found = [(at, root)]
    for key, child in items(root):
        found += paths(child, f"{at}.{key}" if at else key)
    return found


def mapping(type_: str = MAP, near: Node | None = None) -> MappingNode:
    """Make an empty mapping node, with the file and line of another one."""
    start, end = (None, None) if near is None else (near.start_mark, near.end_mark)
    return MappingNode(type_, [], start, end, flow_style=True)


def get(node: MappingNode, key: str) -> Any:
    """Return the node under `key`, or None."""
    return next((value for each, value in node.value if each.value == key), None)


def find(root: Node, name: str) -> Any:
    """Return the node under a dotted key such as "model.width", or None."""
    head, _, rest = name.partition(".")
    child = get(root, head) if isinstance(root, MappingNode) else None
    return find(child, rest) if rest and child is not None else child


def put(node: MappingNode, key: str, value: Node) -> None:
    """Set `key` in its place if it exists, else at the end."""
    if get(node, key) is None:
        node.value.append((represent(key), value))
    node.value = [(each, value if each.value == key else old) for each, old in node.value]


def pop(node: MappingNode, key: str) -> Any:
    """Remove `key` and return its node, or None."""
    found = get(node, key)
    node.value = [pair for pair in node.value if pair[0].value != key]
    return found


def expanded_size(root: Node) -> int:
    """Return the number of values with every alias written out; ValueError above the limits."""
    sizes: dict[Node, int] = {}
    active: set[Node] = set()

    def size(node: Node) -> int:
        if node in active:
            raise ValueError(f"{location(node)}: the value contains itself")
        if len(active) > MAX_DEPTH:
            raise ValueError(f"{location(node)}: nested more than {MAX_DEPTH} levels deep")
        if node not in sizes:
            active.add(node)
            sizes[node] = 1 + sum(size(child) for child in children(node))
            active.discard(node)
        if sizes[node] > MAX_NODES:
            raise ValueError(
                f"{location(node)}: more than {MAX_NODES} values with aliases and references "
                "written out: too many for a YAML"
            )
        return sizes[node]

    return size(root)


def represent(value: Any, near: Node | None = None) -> Node:
    """Convert a value to a node.

    Args:
        value: a number, text, path, None, node, or a list, tuple or mapping of these.
        near: node whose file and line the new one gets.

    Raises:
        ValueError: the value is, or holds, another object or too large a number.
    """
    if isinstance(value, Node):
        return value
    node: Node
    place = "" if near is None else f"{location(near)}: "
    if isinstance(value, Mapping):
        pairs = [(represent(key, near), represent(each, near)) for key, each in value.items()]
        node = MappingNode(MAP, pairs, flow_style=not pairs)
    elif isinstance(value, list):
        node = SequenceNode(SEQ, [represent(each, near) for each in value], flow_style=True)
    elif value is None:
        node = ScalarNode(NULL, "null")
    elif isinstance(value, bool):
        node = ScalarNode(BOOL, str(value).lower())
    elif isinstance(value, numbers.Integral):  # NumPy's too
        if (bits := int(value).bit_length()) > MAX_BITS:
            raise ValueError(
                f"{place}the number is too large: it has {bits} bits, more than {MAX_BITS}"
            )
        node = ScalarNode(INT, repr(int(value)))
    elif isinstance(value, numbers.Real):
        text = repr(float(value)).replace("inf", ".inf").replace("nan", ".nan")
        node = ScalarNode(FLOAT, text)
    elif isinstance(value, tuple):  # text from which a tuple is built
        nested = any(isinstance(each, (tuple, list)) for each in value)
        node = ScalarNode(STR, str(value) if nested else f"({', '.join(map(_in_tuple, value))})")
    elif isinstance(value, (str, os.PathLike)):
        simple = re.fullmatch(r"[\w./][\w./ -]*|\(.*\)", str(value))
        node = ScalarNode(STR, str(value), style=None if simple else '"')
    else:
        shown = " ".join(repr(value)[:MAX_QUOTED].split())
        raise ValueError(
            f"{place}{shown} is a {type(value).__name__}; a YAML value must be a number, a text, "
            "true, false, null, a list or a mapping (!apply: builds objects, !applyref: does not)"
        )
    if near is not None:
        node.start_mark, node.end_mark = near.start_mark, near.end_mark
    return node


def _in_tuple(value: Any) -> str:
    """Write a number, a text or the like as an item of a tuple."""
    node = represent(value)
    return json.dumps(node.value, ensure_ascii=False) if tag(node) == STR else str(node.value)


def plain(node: Node) -> Any:
    """Return the Python value of a node; ValueError if it is, or holds, an object."""
    for each in nodes(node):
        if tag(each) not in PLAIN:
            raise ValueError(f"{location(each)}: {tag(each)} is not a plain value")
    return YAML(typ="safe", pure=True).constructor.construct_document(node)


class _Resolver(VersionedResolver):
    """Resolver without the rule for tuples that HyperPyYAML adds for all YAML of the process."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag of a node that has none."""
        found = super().resolve(kind, value, implicit)
        return Tag(suffix=STR) if str(found) == TUPLE else found


def dump(root: Node) -> str:
    """Write a tree as YAML text; shared nodes are written once, with aliases for the rest."""
    for node in nodes(root):
        if isinstance(node, ScalarNode) and tag(node) == STR and not node.value:
            node.tag, node.style = STR, '"'  # An empty `!!str` would be written as null.
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    yaml.width = 100
    yaml.brace_single_entry_mapping_in_flow_sequence = True  # A tag would need them.
    yaml.serialize(root, stream)
    return stream.getvalue()
