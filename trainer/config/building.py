"""References and objects of a YAML tree.

`resolve` replaces `!ref`, `!copy` and `!applyref:`, and reports `!PLACEHOLDER`. The language is
HyperPyYAML's: `<key[inner]>` is the value under those keys (in a plain mapping `<key.inner>` too),
`<object.attribute>` an attribute of a built object; text around references is kept, and arithmetic
is evaluated, on numbers and on texts in quotes. A reference to a text that contains references
("run <seed>") fills them in. Beyond HyperPyYAML, references may point forward and to each other in
any order; `~/` at the beginning of a text is the home folder; and dates and texts that look like
sums ("555-1234") are not calculated.

`build` checks every name in the tree with the registry before it builds anything. Errors name key,
file and line.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from torch.utils.data import DataLoader

from trainer.config import pretrained
from trainer.config.reading import (
    BOOL,
    FLOAT,
    INT,
    MAP,
    MAX_BITS,
    MAX_DEPTH,
    MAX_NODES,
    PLAIN,
    REFERENCE,
    REFERENCES,
    SEQ,
    STR,
    TIMESTAMP,
    children,
    compose,
    expanded_size,
    get,
    is_tuple,
    items,
    location,
    nodes,
    object_name,
    paths,
    plain,
    replace_children,
    represent,
    tag,
)
from trainer.config.registry import Registry, is_maker
from trainer.options import at_home, nearest

# Tag of [object, "name.of.attribute"], for `!ref <object.name>`; it is refused in a YAML.
ATTRIBUTE = "!attribute"
STEP = re.compile(r"(^|\.|\[)([^.\[\]]*)")  # the steps of "a[b].c" are "a", "[b" and ".c"
MAX_TEXT = 16 * 1024  # characters of a text after its references are filled in
MAX_POWER = 64  # largest exponent in arithmetic
NO_ARITHMETIC = (SyntaxError, TypeError, RecursionError, MemoryError)  # of a path, for example
# Words in annotations of parameters that take only texts.
TEXT_TYPES = {
    *("class", "str", "None", "NoneType", "typing", "Optional", "Union", "pathlib", "Path", "os"),
    *("PathLike", "list", "List", "tuple", "Tuple", "collections", "abc", "Sequence", "Iterable"),
}


class BuildError(ValueError):
    """Error for an object that cannot be built; names the key, the file and the line."""


# ---------------------------------------------------------------- references


def resolve(root: MappingNode, registry: Registry) -> MappingNode:
    """Return a copy of a tree in which every reference is replaced by its value.

    Raises:
        ValueError: placeholders have no value, or a reference is unknown, circular or too large.
    """
    missing = {path: node for path, node in paths(root) if tag(node) == "!PLACEHOLDER"}
    if missing:
        places = ", ".join(f"{path} ({location(node)})" for path, node in missing.items())
        options = " ".join(f"--{path} …" for path in missing)
        raise ValueError(
            f"no value for {places}, which the YAML leaves open (!PLACEHOLDER); "
            f"give {'it' if len(missing) == 1 else 'them'} as {options}"
        )
    root = copy.deepcopy(root)
    for node in nodes(root):
        if isinstance(node, ScalarNode) and tag(node) in (STR, *REFERENCES):
            node.value = at_home(node.value)
    _Resolver(root, registry).fill(root)
    expanded_size(root)
    return root


class _Resolver:
    """Replaces references in place, each node once, and refuses circular ones."""

    def __init__(self, root: MappingNode, registry: Registry) -> None:
        self.root = root
        self.registry = registry
        self.done: dict[Node, Node] = {}
        self.texts: dict[Node, Node] = {}  # references made from texts with references
        self.active: list[Node] = []
        self.copied = 0  # nodes

    def fill(self, node: Node) -> Node:
        """Return the replacement of a node, with everything below it resolved."""
        if node in self.done:
            return self.done[node]
        if node in self.active or len(self.active) > MAX_DEPTH:
            lines = " -> ".join(location(each) for each in (*self.active[-MAX_DEPTH:], node))
            why = "circular" if node in self.active else f"nested more than {MAX_DEPTH} deep"
            raise ValueError(f"{location(node)}: the reference is {why}: {lines}")
        self.active.append(node)
        result = node
        if isinstance(node, ScalarNode):
            if tag(node) in REFERENCES:
                result = self._reference(node)
        else:
            replace_children(node, lambda _, child: self.fill(child))
            if tag(node).startswith("!applyref:"):
                result = represent(_apply(node, self.registry), node)
        self.active.pop()
        self.done[node] = self.done[result] = result
        return result

    def _reference(self, node: ScalarNode) -> Node:
        """Return the value of a reference: another node, a text, or the result of a sum."""
        text = str(node.value)
        names = REFERENCE.findall(text)
        if not names:
            return represent(text, node)
        targets = {name: self._target(name, node) for name in names}
        if REFERENCE.fullmatch(text):
            (target,) = targets.values()
            return self._copy(target) if tag(node) == "!copy" else target
        values: dict[str, str] = {}
        for name, target in targets.items():
            if tag(target) not in PLAIN:
                read = tag(target) == ATTRIBUTE
                what = "read from an object" if read else f"an object ({tag(target)})"
                raise ValueError(
                    f"{location(node)}: <{name}> is {what}, which cannot be part of a text or of a "
                    "sum"
                )
            values[name] = str(plain(target))
        result = at_home(REFERENCE.sub(lambda match: values[match[1]], text))
        if len(result) > MAX_TEXT:
            raise ValueError(
                f"{location(node)}: with its references filled in, the text is longer than "
                f"{MAX_TEXT} characters"
            )
        if any(map(_is_no_number, targets.values())):
            return represent(result, node)
        # A power of <x> is one of its whole value: in parentheses, since -2 ** 2 is -4.
        power = re.sub(rf"(?<![\w.])({REFERENCE.pattern})(?=\s*\*\*)", r"(\1)", text)
        try:
            exact = REFERENCE.sub(lambda match: values[match[1]], power)
            return represent(arithmetic(exact), node)
        except NO_ARITHMETIC:
            return represent(result, node)
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"{location(node)}: {result} cannot be evaluated: {error}") from None

    def _copy(self, target: Node) -> Node:
        self.copied += expanded_size(target)
        if self.copied > MAX_NODES:
            raise ValueError(
                f"{location(target)}: more than {MAX_NODES} values are copied by !copy"
            )
        return copy.deepcopy(target)

    def _target(self, name: str, node: Node) -> Node:
        """Return the resolved node of `<name>`, or one that reads an attribute."""
        branch: Node = self.root
        steps = [(before, key.strip()) for before, key in STEP.findall(name)]
        for count, (before, step) in enumerate(steps):
            if tag(branch) in REFERENCES:
                branch = self.fill(branch)
            below = dict(items(branch))
            if before == "." and (tag(branch) not in PLAIN or isinstance(branch, ScalarNode)):
                names = [each for _, each in steps[count:]]
                text = ".".join(names)
                if any(not each.isidentifier() or each.startswith("_") for each in names):
                    raise ValueError(
                        f"{location(node)}: {text!r} is not a public attribute; references may not "
                        "read others"
                    )
                values = [self.fill(branch), ScalarNode(STR, text)]
                marks = node.start_mark, node.end_mark
                return SequenceNode(ATTRIBUTE, values, *marks, flow_style=True)
            if step not in below:
                raise ValueError(
                    f"{location(node)}: the reference <{name}> leads nowhere: there is no {step!r}"
                    f"{nearest(step, below)}"
                )
            branch = below[step]
        branch = self.fill(branch)
        if tag(branch) == STR and self._refers(branch):
            reference = ScalarNode("!ref", branch.value, branch.start_mark, branch.end_mark)
            return self.fill(self.texts.setdefault(branch, reference))
        return branch

    def _refers(self, node: Node) -> bool:
        """Return True for a text with references to other keys, and none like `<unk>`."""
        first = [STEP.findall(each)[0][1].strip() for each in REFERENCE.findall(node.value)]
        return bool(first) and all(get(self.root, each) not in (None, node) for each in first)


def _is_no_number(node: Node) -> bool:
    """Return True for a date, and for a text that only looks like a sum, such as "555-1234"."""
    if tag(node) != STR or re.fullmatch(r"[-+]?[\d.]+", node.value):
        return tag(node) == TIMESTAMP
    try:
        return isinstance(arithmetic(node.value), (int, float))
    except NO_ARITHMETIC:
        return False
    except (ArithmeticError, ValueError):
        return True


def arithmetic(text: str) -> Any:
    """Evaluate arithmetic on numbers, and on texts in quotes: "2 * (3 + 4)" is 14.

    Raises:
        SyntaxError: the text is not an expression.
        TypeError: the text holds anything but these and `+ - * / // % **`.
        ValueError: a format after `%` is invalid.
        ArithmeticError: there is no result, or it is too large.
    """
    return _evaluate(ast.parse(text.strip(), mode="eval").body)


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
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp) or type(node.op) not in _BINARY:
        raise TypeError(type(node).__name__)
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Pow) and abs(right) > MAX_POWER:
        raise OverflowError(f"an exponent may be at most {MAX_POWER}")
    text, other = (left, right) if isinstance(left, str) else (right, left)
    if isinstance(text, str):
        repeated = isinstance(node.op, ast.Mult) and isinstance(other, int)
        wide = isinstance(node.op, ast.Mod) and re.search(r"%[^%a-zA-Z]*\d{4}", text)
        if (repeated and len(text) * other > MAX_TEXT) or wide:
            raise OverflowError(f"the text is too long; allowed are {MAX_TEXT} characters")
    result = _BINARY[type(node.op)](left, right)
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise OverflowError(f"the number has more than {MAX_BITS} bits")
    return result


def _apply(node: Node, registry: Registry) -> Any:
    """Call the function of an `!applyref:name` with the plain arguments in its node."""
    name = object_name(node)
    kind, plain_tag = (MappingNode, MAP) if isinstance(node, MappingNode) else (SequenceNode, SEQ)
    try:
        function, values = registry.locate(name), plain(kind(plain_tag, node.value))
        if is_maker(function):
            raise ValueError(f"{name} makes an object, which !apply:{name} is for")
    except ValueError as error:
        raise BuildError(f"{location(node)}: {error}") from error
    both = isinstance(values, dict) and set(values) == {"_args", "_kwargs"}
    args, kwargs = (values["_args"], values["_kwargs"]) if both else (values, {})
    try:
        return function(*args, **kwargs) if isinstance(args, list) else function(**args)
    except Exception as error:
        raise BuildError(f"{location(node)}: {name} failed: {error}") from error


# ---------------------------------------------------------------- objects


def build(root: MappingNode, registry: Registry) -> dict[str, Any]:
    """Check every name in a resolved tree, then build its values by key.

    Values of keys that begin with ``__`` are built and left out.

    Raises:
        ValueError: a name is not allowed or does not exist, or arguments do not fit.
    """
    builder = _Builder(root, registry)
    values = {key.value: builder.value(node) for key, node in root.value}
    return {key: value for key, value in values.items() if not key.startswith("__")}


class _Builder:
    """Builds each node of a tree once; errors name key, file and line."""

    def __init__(self, root: Node, registry: Registry) -> None:
        self.registry = registry
        self.scalar = YAML(typ="safe", pure=True).constructor.construct_document
        # The first key and the location of each node, for messages.
        self.places = {node: f"{path} ({location(node)})" for path, node in reversed(paths(root))}
        self.targets: dict[Node, Any] = {}
        self.makers: dict[Node, Callable[..., Any]] = {}  # called instead of targets
        self.built: dict[Node, Any] = {}
        for node in nodes(root):
            if object_name(node):
                try:
                    self.targets[node] = target = _check_object(node, registry)
                    if is_maker(target):
                        self.makers[node] = pretrained.maker(node, target, registry.downloads)
                except ValueError as error:
                    raise BuildError(f"{self.places[node]}: {error}") from error
        for node in self.targets:
            if not registry.is_own(object_name(node)) and self._takes_loader(node):
                raise BuildError(
                    f"{self.places[node]}: {object_name(node).removeprefix('builtins.')} takes no "
                    "DataLoader, whose worker processes it could start; give the dataset and the "
                    "arguments of its loader instead"
                )

    def _takes_loader(self, node: Node) -> bool:
        """Return True for an object with a DataLoader among its arguments, or within one."""
        return any(
            (inspect.isclass(kind := self.targets.get(each)) and issubclass(kind, DataLoader))
            or (tag(each) != ATTRIBUTE and self._takes_loader(each))
            for each in children(node)
        )

    def value(self, node: Node) -> Any:
        """Return the value of a node, built with everything below it."""
        if node in self.built:
            return self.built[node]
        try:
            self.built[node] = self._make(node)
        except BuildError:
            raise
        except Exception as error:
            known = isinstance(error, (TypeError, ValueError))
            reason = error if known else f"{type(error).__name__}: {error}"
            what = object_name(node).removeprefix("builtins.") or tag(node)
            raise BuildError(f"{self.places[node]}: {what} could not be built: {reason}") from error
        return self.built[node]

    def _make(self, node: Node) -> Any:
        if is_tuple(node):
            return _tuple(node.value, self.places[node])
        if isinstance(node, ScalarNode):
            return self.scalar(node)
        args: list[Any] = []
        kwargs: dict[Any, Any] = {}
        is_mapping = isinstance(node, MappingNode)
        if is_mapping:
            kwargs = {self.scalar(key): self.value(each) for key, each in node.value}
        else:
            args = [self.value(each) for each in node.value]
        if tag(node) == ATTRIBUTE:
            owner, attribute = args
            return self._attribute(owner, attribute, self.places[node])
        if tag(node) == (MAP if is_mapping else SEQ):
            return kwargs if is_mapping else args
        if node not in self.targets:
            raise ValueError(f"the tag {tag(node)} is not allowed here")
        target = self.makers.get(node, self.targets[node])
        if node in self.makers or tag(node).startswith(("!new:", "!apply:")):
            return target(*args, **kwargs)
        return functools.partial(target, *args, **kwargs) if args or kwargs else target

    def _attribute(self, value: Any, name: str, place: str) -> Any:
        """Read the attribute of a built object that a `!ref <object.attribute>` names."""
        for part in name.split("."):
            try:
                value = self.registry.read(value, part)
            except AttributeError:
                known = [each for each in dir(value) if not each.startswith("_")]
                raise BuildError(
                    f"{place}: {type(value).__name__} has no attribute {part!r}"
                    f"{nearest(part, known)}"
                ) from None
            except ValueError as error:
                raise BuildError(f"{place}: {error}") from error
            except Exception as error:  # of a property
                kind = f"{type(value).__name__} failed: {type(error).__name__}"
                raise BuildError(f"{place}: reading {part!r} of a {kind}: {error}") from error
        return value


def _check_object(node: Node, registry: Registry) -> Any:
    """Check that a node may be built from its arguments, and return the object that it names.

    Numbers for parameters that take texts become the texts in the YAML.
    """
    name = object_name(node)
    prefix = tag(node).removesuffix(name)
    target = registry.locate(name)
    is_class, is_function = inspect.isclass(target), inspect.isroutine(target)
    fits = {
        "!new:": is_class,
        "!apply:": is_function,
        "!name:": is_class or is_function or not node.value,
        "!module:": inspect.ismodule(target) and not node.value,
    }
    if not fits[prefix]:
        what = f"{target!r:.200}, for which {prefix} is not made"
        if is_class:
            what = f"a class, which !new:{name} builds; !apply: calls a function"
        elif is_function:
            what = f"a function, which !apply:{name} calls; !new: builds a class"
        raise ValueError(f"{name} is {what}")
    below = {key for each in nodes(node) for key, _ in items(each)}
    if name.startswith(pretrained.PACKAGES) or "trust_remote_code" in below:
        pretrained.check_arguments(node)
    known = signature(target)
    # Configuration classes take any keyword, and the signature of `from_config` lacks some.
    bases = getattr(target, "__mro__", ())
    takes_any = is_maker(target) or "pretrainedconfig" in {each.__name__.lower() for each in bases}
    if known is None or prefix == "!module:" or takes_any:
        return target
    keys = dict(items(node)) if isinstance(node, MappingNode) else {}
    bind = known.bind_partial if prefix == "!name:" else known.bind
    try:
        bind(*(node.value if isinstance(node, SequenceNode) else ()), **keys)
    except TypeError as error:
        # A parameter is shown as "width" or "bias=True".
        shown = (each.replace(annotation=each.empty) for each in known.parameters.values())
        takes = ", ".join(map(str, shown)) or "none"
        unknown = next((key for key in keys if key not in known.parameters), None)
        hint = nearest(unknown, known.parameters) if unknown is not None else ""
        if unknown is not None and unknown.endswith(")"):
            hint = " (a tuple within {…} or […] is written as a list: [0.9, 0.98])"
        raise ValueError(f"{name}: {error}{hint}; its arguments are: {takes}") from None
    texts: dict[str, Node] = {}
    for key, parameter, value in arguments(node, target):
        words = set(re.findall(r"\w+", str(parameter.annotation)))
        if "Callable" in words and "str" not in words and tag(value) in (STR, INT, FLOAT, BOOL):
            raise ValueError(
                f"{name}: {parameter.name} must be a function, not {value.value!r}; a function of "
                "a module beside train.py is given by !name:module.function"
            )
        if words & {"str", "Path", "PathLike"} and words <= TEXT_TYPES:
            texts[key] = _as_text(value)
    replace_children(node, lambda key, value: texts.get(key, value))
    return target


def arguments(node: Node, target: Any) -> Iterator[tuple[str, inspect.Parameter, Node]]:
    """Yield key, parameter and value of those arguments whose parameters are known."""
    known = signature(target)
    parameters = {} if known is None else dict(known.parameters)
    names = list(parameters) if isinstance(node, SequenceNode) else []
    for key, value in items(node):
        name = names[int(key)] if names and int(key) < len(names) else key
        if name in parameters:
            yield key, parameters[name], value


def _as_text(node: Node) -> Node:
    """Convert numbers and dates, also in a list, to their texts in the YAML, such as 007."""
    marks = node.start_mark, node.end_mark
    if tag(node) in (INT, FLOAT, TIMESTAMP):
        return ScalarNode(STR, node.value, *marks, style="'")
    if tag(node) != SEQ:
        return node
    values = [_as_text(each) for each in node.value]
    return node if values == node.value else SequenceNode(SEQ, values, *marks, flow_style=True)


def signature(target: Any) -> inspect.Signature | None:
    """Return the signature of a callable; None if it has none."""
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # Some compiled callables have none.
        return None


def _tuple(text: str, place: str) -> tuple[Any, ...]:
    """Read "(3, 4)" as (3, 4); the content of the parentheses is a list of plain values."""
    if "(" in text[1:]:  # a tuple of tuples
        with suppress(ValueError, SyntaxError):
            nested = ast.literal_eval(text)
            return nested if isinstance(nested, tuple) else (nested,)
    try:
        return tuple(plain(compose(f"[{text[1:-1]}]", place)))
    except ValueError as error:
        raise BuildError(f"{place}: {text} is no tuple; quote it if it is text: {error}") from None
