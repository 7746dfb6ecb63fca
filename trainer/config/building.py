"""A resolved tree as objects: HyperPyYAML's constructors, each behind the guard.

HyperPyYAML builds with a YAML loader that it is given. Ours is a safe one (no tag of Python's own),
checks every name before HyperPyYAML sees it, and says where in the user's files an error arose.
"""

from __future__ import annotations

import builtins
import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any

import ruamel.yaml
import yaml
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.loader import SafeLoader
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.config.document import compose
from trainer.config.guard import Guard
from trainer.config.nodes import (
    FLOAT,
    MAP,
    SEQ,
    STR,
    TUPLE,
    children,
    dump,
    nodes,
    plain,
    tag,
    where,
)
from trainer.config.references import ATTRIBUTE
from trainer.options import nearest

EXACT = "!float"  # ours: HyperPyYAML writes numbers once more, and loses the last digit of some
Constructor = Callable[[Any, str, Any], Any]


class Misbuilt(ValueError):
    """An object could not be built; the message has the key, the file and the line."""


def build(root: MappingNode, guard: Guard) -> dict[str, Any]:
    """The values of a tree without references, objects built.

    Raises ValueError naming key, file and line for a name that is not allowed or not there, and
    for arguments that do not fit. The tree is used up.
    """
    for node in nodes(root):
        bare = isinstance(node, ScalarNode) and tag(node) == STR and not node.style
        if bare and re.fullmatch(r"\(.*\)", node.value):
            node.tag = TUPLE
        elif tag(node) == FLOAT:
            node.tag = EXACT
        elif isinstance(node, (MappingNode, SequenceNode)):
            node.flow_style = not node.value  # In {} and [] some texts do not survive rewriting.
    try:
        values: dict[str, Any] = load_hyperpyyaml(dump(root), loader=_loader(root, guard))
    finally:
        # HyperPyYAML changes this default while it loads, and an error would leave it changed.
        for library in (yaml, ruamel.yaml):
            library.constructor.BaseConstructor.construct_object.__defaults__ = (False,)
    return values


def call(name: str, node: Node, guard: Guard) -> Any:
    """What `!applyref:name` gives for the plain arguments in its node."""
    try:
        function = guard.locate(name)
        values = plain(_untagged(node))
    except ValueError as error:
        raise Misbuilt(f"{where(node)}: {error}") from error
    args = values if isinstance(values, list) else []
    kwargs = values if isinstance(values, dict) else {}
    if set(kwargs) == {"_args", "_kwargs"}:
        args, kwargs = kwargs["_args"], kwargs["_kwargs"]
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise Misbuilt(f"{where(node)}: {name} failed: {error}") from error


def _untagged(node: Node) -> Node:
    if isinstance(node, MappingNode):
        return MappingNode(MAP, node.value)
    return SequenceNode(SEQ, node.value)


def parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """The parameters of a callable by name, None where Python cannot tell."""
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # Some compiled callables keep it to themselves.
        return None


def _loader(root: MappingNode, guard: Guard) -> type[SafeLoader]:
    """A loader class of its own for one tree, so that nothing is registered for others."""

    class Loader(SafeLoader):
        places: dict[int, str]

        def get_single_node(self) -> Any:
            """Compose, and note for each node where its original stands."""
            node = super().get_single_node()
            self.places = {}
            _pair(node, root, "", self.places)
            return node

        @classmethod
        def add_constructor(cls, tag: Any, constructor: Any) -> None:
            """HyperPyYAML's tuples are read with an unsafe loader: ours are not."""
            super().add_constructor(tag, _tuple if tag == TUPLE else constructor)

        @classmethod
        def add_implicit_resolver(cls, tag: Any, regexp: Any, first: Any) -> None:
            """HyperPyYAML's rule for tuples would hold for every YAML of this process."""

        @classmethod
        def add_multi_constructor(cls, tag_prefix: Any, multi_constructor: Any) -> None:
            """HyperPyYAML's constructors of objects, each behind the guard."""
            guarded = _guarded(tag_prefix, multi_constructor, guard)
            super().add_multi_constructor(tag_prefix, guarded)

    Loader.add_constructor(EXACT, lambda loader, node: loader.construct_yaml_float(node))
    Loader.add_constructor(ATTRIBUTE, lambda loader, node: _attribute(loader, node, guard))
    return Loader


def _pair(node: Node, original: Node, at: str, places: dict[int, str]) -> None:
    if id(node) in places:
        return
    places[id(node)] = f"{at} ({where(original)})"
    if isinstance(node, MappingNode) and isinstance(original, MappingNode):
        keys = [str(key.value) for key, _ in node.value]
    else:
        keys = [str(slot) for slot, _ in enumerate(children(node))]
    for key, below, its in zip(keys, children(node), children(original), strict=True):
        _pair(below, its, f"{at}.{key}" if at else key, places)


def _guarded(prefix: str, constructor: Constructor, guard: Guard) -> Constructor:
    """A constructor that runs only for what the guard lets through, with arguments that fit."""

    def construct(loader: Any, name: str, node: Any) -> Any:
        place = loader.places[id(node)]
        try:
            target = guard.locate(name)
            # In place of a built-in it would import a file of that name.
            whole = f"builtins.{name}" if target is getattr(builtins, name, None) else name
            if pydoc.locate(whole) is not target:  # HyperPyYAML is about to look it up like this.
                raise ValueError(f"{name} is both a module and something else; give its full name")
            _check_arguments(prefix, name, target, node)
        except ValueError as error:
            raise Misbuilt(f"{place}: {error}") from error
        try:
            return constructor(loader, whole, node)
        except Misbuilt:
            raise
        except (TypeError, ValueError) as error:
            # HyperPyYAML puts a sentence of its own before the message of a TypeError.
            reason = error.args[-1] if error.args else error
            raise Misbuilt(f"{place}: {name} could not be built: {reason}") from error

    return construct


def _check_arguments(prefix: str, name: str, target: Any, node: Node) -> None:
    """Refuse arguments that the callable does not take, before anything is built."""
    known = parameters(target) if callable(target) else None
    if known is None or prefix == "!module:":
        return
    keys = [str(key.value) for key, _ in node.value] if isinstance(node, MappingNode) else []
    count = len(node.value) if isinstance(node, SequenceNode) else 0
    signature = inspect.signature(target)
    bind = signature.bind_partial if prefix == "!name:" else signature.bind
    try:
        bind(*[None] * count, **dict.fromkeys(keys))
    except TypeError as error:
        takes = ", ".join(_shown(each) for each in known.values()) or "none"
        unknown = next((key for key in keys if key not in known), None)
        hint = nearest(unknown, known) if unknown is not None else ""
        raise ValueError(f"{name}: {error}{hint}; its arguments are: {takes}") from None


def _shown(parameter: inspect.Parameter) -> str:
    """A parameter as "width" or "bias=True"."""
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def _attribute(loader: Any, node: Any, guard: Guard) -> Any:
    """What `!ref <object.attribute>` means, once the object is built."""
    value, name = loader.construct_sequence(node, deep=True)
    place = loader.places[id(node)]
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            known = [each for each in dir(value) if not each.startswith("_")]
            raise Misbuilt(
                f"{place}: {type(value).__name__} has no attribute {part!r}{nearest(part, known)}"
            ) from None
        try:
            guard.check_attribute(value, name)
        except ValueError as error:
            raise Misbuilt(f"{place}: {error}") from None
    return value


def _tuple(loader: Any, node: Any) -> tuple[Any, ...]:
    """ "(3, 4)" as (3, 4): what is in the parentheses is read like a list of plain values."""
    text = loader.construct_scalar(node)
    place = loader.places[id(node)]
    try:
        items = compose(f"[{text.strip()[1:-1]}]", place)
        return tuple(plain(items)) if items is not None else ()
    except ValueError as error:
        raise Misbuilt(f"{place}: {text} is no tuple; quote it if it is text: {error}") from None
