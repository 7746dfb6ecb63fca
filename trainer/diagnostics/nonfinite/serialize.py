"""Batches as tensors, texts and numbers, to save in a file that is safe to load."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.tree import is_container, parts_of

SCALARS = (int, float, str, bool, type(None))
MAX_DEPTH = 12
MAX_REPR = 500

# Dtypes of NumPy arrays that can be kept: as lists of Python values, read without pickle.
ARRAY = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|[<>=|]?[SU]\d{1,6}")


def serialize_batch(value: Any, depth: int = 0) -> Any:
    """Return a batch as nested dicts, each with a "kind", of tensors and plain values.

    Args:
        value: tensors, arrays of NumPy, plain values, a `Batch`, mappings, lists, tuples and
            dataclasses, nested up to `MAX_DEPTH` deep. For anything else only the repr is kept.
        depth: number of containers around the value.
    """
    made = type(value)
    if made in SCALARS:
        return {"kind": "plain", "value": value}
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        return {"kind": "tensor", "value": value.detach().cpu().clone().contiguous()}
    numbers = hasattr(value, "tolist") and not isinstance(value, Tensor)
    if numbers and ARRAY.fullmatch(str(getattr(value, "dtype", ""))):
        return {"kind": "array", "dtype": str(value.dtype), "value": value.tolist()}
    if depth == MAX_DEPTH:
        return {"kind": "lost", "value": repr(value)[:MAX_REPR]}
    each = partial(serialize_batch, depth=depth + 1)
    named = {"class": f"{made.__module__}:{made.__qualname__}"}
    if isinstance(value, Batch):
        fields = {name: each(part) for name, part in dict(value).items()}
        return {"kind": "batch", "fields": fields, "size": len(value)}
    if isinstance(value, Mapping):
        parts = [list(map(each, value)), [each(value[name]) for name in value]]
        return {"kind": "mapping", **named, "parts": parts}
    if isinstance(value, (list, tuple)):
        return {"kind": "row", **named, "parts": list(map(each, value))}
    if hasattr(value, "__dict__") and _is_record(made):
        attributes = {name: each(part) for name, part in vars(value).items()}
        return {"kind": "object", **named, "parts": attributes}
    return {"kind": "lost", "value": repr(value)[:MAX_REPR]}


def _is_record(kind: type) -> bool:
    """Return True for a dataclass whose objects can be made and deleted without running code."""
    own = {name for each in kind.__mro__ if each is not object for name in vars(each)}
    return dataclasses.is_dataclass(kind) and not own & {"__del__", "__getattribute__"}


def own_modules(kind: type) -> frozenset[str]:
    """Return the names of the imported modules of the program that a Brain belongs to.

    These are the modules in the folders that define the classes of the Brain, except the trainer.

    Args:
        kind: class of the Brain.
    """
    folders = {name: _folder(name, module) for name, module in list(sys.modules.items())}
    own = {
        folders.get(each.__module__)
        for each in kind.__mro__
        if each is not object and each.__module__.partition(".")[0] != "trainer"
    }
    return frozenset(name for name, folder in folders.items() if folder in own)


def _folder(name: str, module: Any) -> str:
    """Return the folder of a module; for a module without a file, a unique name."""
    file = vars(module).get("__file__")  # Attribute access could import a lazy module.
    return os.path.dirname(os.path.realpath(file)) if isinstance(file, str) else f"<{name}>"


def deserialize_batch(kept: Any, own: Collection[str] = ()) -> Any:
    """Return the batch from a result of `serialize_batch`.

    The file is untrusted: among the classes that it names, only `Batch`, named tuples, and
    dataclasses of the program itself are made. No method of a class is called, and nothing is
    imported.

    Args:
        kept: a result of `serialize_batch`, or anything else that the file holds.
        own: names of the program's modules, from `own_modules`.

    Raises:
        ValueError: if a part could not be kept, has a class that is not allowed, or is damaged.
    """
    try:
        return _read(kept, own, 0)
    except (LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"the kept batch is damaged: {type(error).__name__}: {error}") from error


def _read(kept: Any, own: Collection[str], depth: int) -> Any:
    """Return the value of a part of a kept batch."""
    if type(kept) is not dict or depth > MAX_DEPTH:
        what = "nested too deep" if type(kept) is dict else f"a {type(kept).__name__}"
        raise ValueError(f"the kept batch is damaged: a part of it is {what}")
    kind = kept["kind"]
    if kind == "plain" and type(kept["value"]) in SCALARS:
        return kept["value"]
    if kind == "tensor" and _is_stored(kept["value"]):
        return kept["value"]
    if kind == "array" and ARRAY.fullmatch(kept["dtype"]):
        if "numpy" not in sys.modules:
            raise ValueError("the batch holds an array of NumPy's, which this recipe never imports")
        try:
            return sys.modules["numpy"].asarray(kept["value"], dtype=kept["dtype"])
        except ValueError as error:
            raise ValueError(f"the kept batch is damaged: {error}") from error
    if kind == "lost":
        raise ValueError(
            f"a part of the batch could not be kept: {str(kept['value'])[:MAX_REPR]}; kept are "
            "tensors, arrays, plain values, a Batch, mappings, lists, tuples and dataclasses"
        )
    if kind == "batch" and type(kept["size"]) is int and kept["size"] >= 0:
        return Batch(_fields(kept["fields"], own, depth), kept["size"])
    if kind == "mapping":
        names, values = (_row(part, own, depth) for part in kept["parts"])
        return dict(zip(names, values, strict=True))
    if kind in ("row", "object"):
        return _make(kind, kept["class"], kept["parts"], own, depth)
    raise ValueError(f"the kept batch is damaged: a part of it is no {str(kind)[:80]!r}")


def _make(kind: str, name: Any, parts: Any, own: Collection[str], depth: int) -> Any:
    """Make a list, tuple, named tuple or dataclass; call no method of its class."""
    made = _imported_class(name)
    if made is not None and kind == "object" and made.__module__ in own and _is_record(made):
        new: Any = object.__new__(made)
        vars(new).update(_fields(parts, own, depth))
        return new
    if made is not None and kind == "row" and issubclass(made, (list, tuple)):
        row = _row(parts, own, depth)
        fields = getattr(made, "_fields", None)
        if issubclass(made, list) or fields is None:
            return row if issubclass(made, list) else tuple(row)
        if type(fields) is tuple and len(fields) == len(row) and _is_named_tuple(made):
            return tuple.__new__(made, row)
    raise ValueError(
        f"the batch holds a {str(name)[:80]}, which this recipe does not know: allowed are named "
        "tuples, and dataclasses of the recipe's own modules"
    )


def _is_named_tuple(made: type) -> bool:
    """Return True for a class that `collections.namedtuple` made: its constructor runs no code.

    Moving or copying a batch calls the constructor.
    """
    own = f"namedtuple_{made.__name__}"  # The module of the constructor.
    return (
        made.__bases__[0] is tuple
        and getattr(made.__new__, "__globals__", {}).get("__name__") == own
        and "__del__" not in vars(made)
    )


def _row(parts: Any, own: Collection[str], depth: int) -> list[Any]:
    return [_read(each, own, depth + 1) for each in parts]


def _fields(parts: Any, own: Collection[str], depth: int) -> dict[str, Any]:
    if type(parts) is not dict or not all(type(name) is str for name in parts):
        raise ValueError("the kept batch is damaged: fields must have names")
    return {name: _read(each, own, depth + 1) for name, each in parts.items()}


def _is_stored(value: Any) -> bool:
    """Return True for a plain dense tensor on the host with memory for every element."""
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.is_contiguous()
    )


def _imported_class(name: Any) -> type | None:
    """Return the class "module:name" if that module is imported and defines it."""
    module, _, path = str(name).partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        # Not by getattr, with which a module may import a submodule.
        found = getattr(found, "__dict__", {}).get(part)
    if isinstance(found, type) and (found.__module__, found.__qualname__) == (module, path):
        return found
    return None


def batch_fields(batch: Any) -> dict[str, Any]:
    """Return the parts of a batch by name.

    These are the items of a mapping or `Batch`, the attributes of an object, the numbered entries
    of a list or tuple, or the batch itself.
    """
    batch = dict(batch) if isinstance(batch, Batch) else batch
    if is_container(batch):
        return {str(name): value for name, value in parts_of(batch).items()}
    if not isinstance(batch, Tensor) and hasattr(batch, "__dict__"):
        return {name: value for name, value in vars(batch).items() if not name.startswith("_")}
    return {"batch": batch}


def data_and_lengths(value: Any) -> tuple[Tensor, Tensor] | None:
    """Return padded data (B, T, …) and lengths (B,) in entries of T, or None if this is neither.

    Fractions of the longest, as in SpeechBrain, are converted to lengths.
    """
    if not (isinstance(value, tuple) and len(value) == 2):
        return None
    data, lengths = value
    if not all(isinstance(each, Tensor) for each in value) or data.dim() < 2:
        return None
    if lengths.shape != data.shape[:1]:
        return None
    if lengths.is_floating_point():
        lengths = (lengths * data.shape[1]).round()
    return data, lengths.long()


def describe_batch(batch: Any) -> dict[str, dict[str, Any]]:
    """Return the shapes, lengths, texts or values of the fields of a batch."""
    return {name: _describe(value) for name, value in batch_fields(batch).items()}


def _describe(value: Any) -> dict[str, Any]:
    padded = data_and_lengths(value)
    if padded is not None:
        return {"shape": list(padded[0].shape), "lengths": padded[1].tolist()}
    if isinstance(value, Tensor):
        found: dict[str, Any] = {"shape": list(value.shape)}
        if value.layout is torch.strided and value.dim() <= 1 and value.numel() <= 64:
            found["values"] = value.tolist()
        return found
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        return {"texts": list(value)}
    if type(value) in SCALARS:
        return {"value": value}
    return {"type": type(value).__name__}
