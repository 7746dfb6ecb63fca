"""`!ref`, `!copy`, `!applyref:`, `!PLACEHOLDER`: every reference replaced by what it means.

HyperPyYAML's language: `<key[inner]>` is the value under those keys (`<key.inner>` too, where it is
a plain mapping), `<object.attribute>` an attribute of a built object; text around references is
kept, and sums of numbers are done. Beyond it, references may point forward and chain in any order,
and what cannot be resolved is named with its file and line.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.config.nodes import (
    MAX_DEPTH,
    MAX_NODES,
    PLAIN,
    REFERENCE,
    STR,
    children,
    clone,
    expanded_size,
    plain,
    represent,
    tag,
    where,
)
from trainer.options import nearest

ATTRIBUTE = "!attribute"  # [object, "name.of.attribute"], ours, of `!ref <object.name>`
MAX_TEXT = 16 * 1024  # characters of a text with its references in it
MAX_POWER = 64  # of an exponent
Call = Callable[[str, Node], Any]  # a dotted name, and the node with its arguments


def resolve(root: MappingNode, call: Call) -> MappingNode:
    """A copy of the tree without references; `call` does what `!applyref:` asks for.

    Raises ValueError for placeholders (all of them at once), unknown and circular references.
    """
    missing = {path: node for path, node in _paths(root) if tag(node) == "!PLACEHOLDER"}
    if missing:
        places = ", ".join(f"{path} ({where(node)})" for path, node in missing.items())
        options = " ".join(f"--{path} …" for path in missing)
        raise ValueError(
            f"no value for {places}, which the YAML leaves open (!PLACEHOLDER); "
            f"give {'it' if len(missing) == 1 else 'them'} as {options}"
        )
    root = clone(root)
    _Resolver(root, call).fill(root)
    expanded_size(root)
    return root


def _paths(root: Node, at: str = "") -> list[tuple[str, Node]]:
    """Every node with its keys as the command line writes them: "model.width"."""
    found = [(at, root)]
    for key, child in _items(root):
        found += _paths(child, f"{at}.{key}" if at else str(key))
    return found


def _items(node: Node) -> list[tuple[str, Node]]:
    if isinstance(node, MappingNode):
        return [(str(key.value), value) for key, value in node.value]
    return [(str(slot), value) for slot, value in enumerate(children(node))]


class _Resolver:
    """Replaces references in place; each node is done once, and none while it is being done."""

    def __init__(self, root: MappingNode, call: Call) -> None:
        self.root = root
        self.call = call
        self.done: dict[int, Node] = {}
        self.active: list[Node] = []
        self.alive: list[Node] = []  # Replaced nodes stay alive, so that their ids stay theirs.
        self.copied = 0

    def fill(self, node: Node) -> Node:
        """What `node` stands for, with everything below it resolved."""
        if id(node) in self.done:
            return self.done[id(node)]
        if node in self.active or len(self.active) > MAX_DEPTH:
            lines = " -> ".join(where(each) for each in (*self.active[-MAX_DEPTH:], node))
            why = "circular" if node in self.active else f"nested more than {MAX_DEPTH} deep"
            raise ValueError(f"{where(node)}: the reference is {why}: {lines}")
        self.active.append(node)
        result = self._replace(node)
        self.active.pop()
        self.alive.append(node)
        self.done[id(node)] = self.done[id(result)] = result
        return result

    def _replace(self, node: Node) -> Node:
        if isinstance(node, ScalarNode):
            return self._reference(node) if tag(node) in ("!ref", "!copy") else node
        if isinstance(node, MappingNode):
            node.value = [(key, self.fill(value)) for key, value in node.value]
        else:
            node.value = [self.fill(value) for value in children(node)]
        if tag(node).startswith("!applyref:"):
            value = self.call(tag(node).partition(":")[2], node)
            return represent(value, node)
        return node

    def _reference(self, node: ScalarNode) -> Node:
        text = str(node.value)
        whole = REFERENCE.fullmatch(text.strip())
        if whole:
            target = self._target(whole[1], node)
            if isinstance(target, ScalarNode) and tag(target) in PLAIN:
                return copy.copy(target)  # A shared scalar would be written as an alias.
            return self._copy(target) if tag(node) == "!copy" else target
        result = REFERENCE.sub(lambda match: self._text(match[1], node), text)
        if len(result) > MAX_TEXT:
            raise ValueError(f"{where(node)}: the text is longer than {MAX_TEXT} characters")
        try:
            return represent(arithmetic(result), node)
        except (SyntaxError, TypeError, RecursionError, MemoryError):
            return represent(result, node)  # It is no sum: a path, say.
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"{where(node)}: {result} cannot be worked out: {error}") from None

    def _text(self, name: str, node: Node) -> str:
        target = self._target(name, node)
        if tag(target) not in PLAIN:
            raise ValueError(
                f"{where(node)}: <{name}> is an object ({tag(target)}), which cannot be in a text"
            )
        return str(plain(target))

    def _copy(self, target: Node) -> Node:
        self.copied += expanded_size(target)
        if self.copied > MAX_NODES:
            raise ValueError(f"{where(target)}: more than {MAX_NODES} values are copied by !copy")
        return clone(target)  # type: ignore[no-any-return]

    def _target(self, name: str, node: Node) -> Node:
        """The resolved node that `<name>` means, or one that reads an attribute of it."""
        branch: Node = self.root
        steps = _steps(name)
        for count, (step, dotted) in enumerate(steps):
            if tag(branch) in ("!ref", "!copy"):
                branch = self.fill(branch)
            below = dict(_items(branch))
            if dotted and (tag(branch) not in PLAIN or isinstance(branch, ScalarNode)):
                attribute = ".".join(each for each, _ in steps[count:])
                return _attribute(self.fill(branch), attribute, node)
            if step not in below:
                raise ValueError(
                    f"{where(node)}: the reference <{name}> leads nowhere: there is no {step!r}"
                    f"{nearest(step, below)}"
                )
            branch = below[step]
        return self.fill(branch)


def _steps(name: str) -> list[tuple[str, bool]]:
    """ "a[b].c" as ("a", False), ("b", False), ("c", True): keys, and whether a dot led to them."""
    steps = []
    for index, part in enumerate(name.split(".")):
        first, *keys = part.replace("]", "").split("[")
        steps += [(first.strip(), index > 0), *((key.strip(), False) for key in keys)]
    return steps


def _attribute(owner: Node, name: str, node: Node) -> Node:
    if any(not part.isidentifier() or part.startswith("_") for part in name.split(".")):
        raise ValueError(
            f"{where(node)}: {name!r} is not a public attribute; references may not read others"
        )
    values = [owner, ScalarNode(tag=STR, value=name)]
    return SequenceNode(ATTRIBUTE, values, node.start_mark, node.end_mark, flow_style=True)


def arithmetic(text: str) -> int | float:
    """The number that a sum comes to: "2 * (3 + 4)" is 14.

    Raises SyntaxError or TypeError for what is not one, ArithmeticError for one without a result.
    """
    number: int | float = _evaluate(ast.parse(text.strip(), mode="eval").body)
    return number


_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_POWER:
            raise OverflowError(f"an exponent may be at most {MAX_POWER}")
        result = _BINARY[type(node.op)](left, right)
        if isinstance(result, int) and result.bit_length() > 1024:
            raise OverflowError("the number is too large")
        return result
    raise TypeError(type(node).__name__)
