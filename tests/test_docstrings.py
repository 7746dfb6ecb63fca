"""Docstrings of the names that users touch: arguments, results, errors, shapes and units.

The names are those of `trainer.__all__`, of the pages in docs/reference, and the recipes' models.
"""

from __future__ import annotations

import ast
import builtins
import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from torch import Tensor

import trainer
from trainer.config.registry import recipe_packages

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w[\w, *.]*?):", re.MULTILINE)
# A docstring that opens so says what is returned.
SAYS_RESULT = re.compile(
    r"(Return|Yield|Iterate|Context manager|True if|Exit function|Decorator)\b"
)
SHAPE = re.compile(
    r"\((?:[A-ZΣ0-9…]|len)[\w.()…*]*(, ?[\w…]+)*,?\)|\bscalar|\bshape|\(rows, columns\)"
)
# Names of quantities with a unit, and what their text has to say.
UNITS = {
    r"(.*_)?sample_rate|rate": r"\bHz\b",
    r"(.*_)?(seconds|duration|timeout)": r"\b(in|of) seconds\b|\bseconds (to|without|after)\b",
    r"start|end": r"\bseconds\b",
    r"(.*_)?minutes": r"\bminutes\b",
    r"(.*_)?hours": r"\bhours\b",
    r"(.*_)?snr": r"\bdB\b",
}
# An error that `Brain.train_batch` catches.
CAUGHT = {"BatchGivenUp"}


@dataclass(frozen=True)
class Name:
    """A public class or function.

    Attributes:
        path: where it is found, such as "trainer.brain.Brain.fit".
        target: the class or function.
        owner: class that it is a method of; None for a function or class.
    """

    path: str
    target: Any
    owner: type | None = None

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.target) or ""

    def section(self, *names: str) -> dict[str, str]:
        """Return the entries of the sections, by name; of run options, their help."""
        found: dict[str, str] = {}
        if is_dataclass(self.target) and "Args" in names:
            options = {f.name: f.metadata.get("option") for f in fields(self.target)}
            found = {name: each.help for name, each in options.items() if each is not None}
        parts = SECTION.split(self.doc)
        for title, text in zip(parts[1::2], parts[2::2], strict=True):
            if title in names:
                text = re.split(r"\n(?=\S)", text)[0]
                entries = ENTRY.split(text)
                for keys, meaning in zip(entries[1::2], entries[2::2], strict=True):
                    for key in keys.split(","):
                        found[key.strip().lstrip("*")] = meaning
        return found

    def has(self, section: str) -> bool:
        return section in SECTION.findall(self.doc)


def resolve(path: str) -> Any:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def roots() -> Iterator[Any]:
    """Yield the classes and functions that users touch."""
    yield from (getattr(trainer, name) for name in trainer.__all__)
    for page in sorted((ROOT / "docs/reference").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            found = resolve(path)
            if not isinstance(found, ModuleType):
                yield found
                continue
            exported = getattr(found, "__all__", None)
            for name, each in vars(found).items():
                here = getattr(each, "__module__", None) == found.__name__
                if name in exported if exported else here and not name.startswith("_"):
                    yield each
    for package in recipe_packages():
        models = getattr(importlib.import_module(package), "MODEL", {})
        for model in [models] if isinstance(models, str) else models.values():
            yield resolve(f"{package}.{model}")


def public() -> dict[str, Name]:
    """Return the public classes, functions and methods by their paths."""
    found: dict[str, Name] = {}
    for root in roots():
        own = getattr(root, "__module__", "").partition(".")[0] in ("trainer", "recipes")
        if not own or not (inspect.isclass(root) or inspect.isfunction(root)):
            continue
        path = f"{root.__module__}.{root.__qualname__}"
        found[path] = Name(path, root)
        if inspect.isclass(root):
            for base in root.__mro__:
                if base.__module__.split(".")[0] not in ("trainer", "recipes"):
                    continue
                for name, each in vars(base).items():
                    if isinstance(each, (staticmethod, classmethod)):
                        each = each.__func__
                    each = inspect.unwrap(each) if callable(each) else each
                    if name.startswith("_") or not inspect.isfunction(each):
                        continue
                    first = next(b for b in base.__mro__[::-1] if name in vars(b))
                    if first is base:  # An override is documented where it is first defined.
                        path = f"{base.__module__}.{base.__qualname__}.{name}"
                        found[path] = Name(path, each, base)
    return found


PUBLIC = public()


def parameters(name: Name) -> dict[str, str]:
    """Return annotations of the parameters by name, without self."""
    target = name.target
    if inspect.isclass(target):
        if issubclass(target, (BaseException, enum.Enum)) or getattr(target, "_is_protocol", False):
            return {}
        if issubclass(target, trainer.Model) and target is not trainer.Model:
            return {}  # `trainer.load` makes them.
        target = target.__init__
        if not is_dataclass(name.target) and not inspect.isfunction(target):
            return {}
    found = inspect.signature(target).parameters
    return {
        each.name: str(each.annotation) for each in found.values()
        if each.name not in ("self", "cls") and not each.name.startswith("_")
    }  # fmt: skip


def body(target: Any) -> ast.AST | None:
    """Return the code of a function, or of the constructor of a class."""
    if inspect.isclass(target):
        own = {} if getattr(target, "_is_protocol", False) else vars(target)
        target = own.get("__post_init__") if is_dataclass(target) else own.get("__init__")
        if target is None:
            return None
    return ast.parse(textwrap.dedent(inspect.getsource(target))).body[0]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions in it."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from nodes(child)


def raised(name: Name) -> set[str]:
    """Return the errors that a body raises itself."""
    tree, found = body(name.target), set()
    for node in nodes(tree) if tree is not None else ():
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            label = ast.unparse(error).rsplit(".", 1)[-1]
            if label[0].isupper() and label != "NotImplementedError" and label not in CAUGHT:
                found.add(label)
    return found


def names_of_error(name: Name, error: str) -> set[str]:
    """Return the names of an error and of what it derives from."""
    module = inspect.getmodule(name.target)
    kind = vars(module).get(error) or getattr(builtins, error, None)
    return {each.__name__ for each in kind.__mro__} if isinstance(kind, type) else {error}


def faults_of_arguments(names: dict[str, Name]) -> list[str]:
    found = []
    for path, name in names.items():
        known = name.section("Args", "Attributes")
        given = parameters(name)
        if len(given) > 1:
            found += [f"{path}: {each}" for each in given if each not in known]
        if name.owner is None and is_dataclass(name.target):
            continue
        signature = {*given}
        if not inspect.isclass(name.target):
            found += [f"{path}: no {e}" for e in name.section("Args") if e not in signature]
    return found


def faults_of_results(names: dict[str, Name]) -> list[str]:
    found = []
    for path, name in names.items():
        if inspect.isclass(name.target):
            continue
        result = str(inspect.signature(name.target).return_annotation)
        if result in ("None", "Never", "NoReturn"):
            continue
        if not (name.has("Returns") or name.has("Yields") or SAYS_RESULT.match(name.doc)):
            found.append(path)
    return found


def faults_of_errors(names: dict[str, Name]) -> list[str]:
    return [
        f"{path}: {error}"
        for path, name in names.items()
        for error in sorted(raised(name))
        if names_of_error(name, error).isdisjoint(
            {each.rsplit(".", 1)[-1] for each in name.section("Raises")}
            - {"object", "Exception", "BaseException"}
        )
    ]


def faults_of_shapes(names: dict[str, Name]) -> list[str]:
    found = []
    for path, name in names.items():
        known = name.section("Args", "Attributes")
        for each, kind in parameters(name).items():
            if re.search(r"\bTensor\b", kind) and not SHAPE.search(known.get(each, name.doc)):
                found.append(f"{path}: {each}")
        if not inspect.isclass(name.target):
            result = str(inspect.signature(name.target).return_annotation)
            if re.search(r"\bTensor\b", result) and not SHAPE.search(name.doc):
                found.append(f"{path}: result")
    return found


def faults_of_units(names: dict[str, Name]) -> list[str]:
    found = []
    for path, name in names.items():
        known = name.section("Args", "Attributes")
        kinds = getattr(name.target, "__annotations__", {}) | parameters(name)
        for each in sorted({*kinds, *known}):
            kind, text = str(kinds.get(each, "float")), known.get(each, name.doc)
            for pattern, unit in UNITS.items():
                number = "float" in kind or ("int" in kind and "rate" in each)
                if number and re.fullmatch(pattern, each) and not re.search(unit, text):
                    found.append(f"{path}: {each}")
    return found


FAULTS: dict[str, Callable[[dict[str, Name]], list[str]]] = {
    "arguments": faults_of_arguments,
    "results": faults_of_results,
    "errors": faults_of_errors,
    "shapes": faults_of_shapes,
    "units": faults_of_units,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_docstrings_of_public_names_are_complete(kind: str) -> None:
    assert len(PUBLIC) > 250
    found = FAULTS[kind](PUBLIC)
    assert not found, "\n".join(found)


def test_every_public_name_has_a_docstring() -> None:
    assert not [path for path, name in PUBLIC.items() if not name.doc]


def resampled(samples: Tensor, rate: int) -> Tensor:
    """Change the rate.

    Args:
        samples: samples (C, T).
        rate: sample rate in Hz.

    Returns:
        Samples (C, T).

    Raises:
        ValueError: the rate is not positive.
    """
    if rate <= 0:
        raise ValueError(rate)
    return samples


@pytest.mark.parametrize(
    ("kind", "text", "other"),
    [
        ("arguments", "        rate: sample rate in Hz.\n", ""),
        ("arguments", "        rate: sample", "        speed: sample"),
        ("results", "Returns:\n        Samples (C, T).", ""),
        ("errors", "ValueError", "OSError"),
        ("shapes", "samples: samples (C, T).", "samples: the samples."),
        ("units", " in Hz", ""),
    ],
)
def test_a_docstring_that_lacks_something_is_found(kind: str, text: str, other: str) -> None:
    function = FunctionType(resampled.__code__, globals())
    function.__annotations__ = resampled.__annotations__
    for doc in (resampled.__doc__ or "", (resampled.__doc__ or "").replace(text, other)):
        function.__doc__ = doc
        found = FAULTS[kind]({"resampled": Name("resampled", function)})
        assert bool(found) == (doc != resampled.__doc__), doc
