"""Batches as tensors, texts and numbers, to save in a file that is safe to load."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch import Batch

SCALARS = (int, float, str, bool, type(None))
MAX_DEPTH = 12
MAX_REPR = 500

# A class without any of these is one whose objects consist of their attributes.
SPECIAL = ("__slots__", "__del__", "__new__", "__setattr__", "__getattribute__")


def serialize_batch(value: Any, depth: int = 0) -> Any:
    """Return a batch as nested dicts, each with a "kind", of tensors and plain values.

    Args:
        value: tensors, arrays of NumPy, plain values, a `Batch`, mappings, lists, tuples,
            dataclasses and objects that consist of their attributes, nested in any way. Of anything
            else only the repr is kept.
        depth: number of containers around it.
    """
    kind = type(value)
    if kind in SCALARS:
        return {"kind": "plain", "value": value}
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        return {"kind": "tensor", "value": value.detach().cpu().clone().contiguous()}
    if hasattr(value, "dtype") and hasattr(value, "tolist") and not isinstance(value, Tensor):
        return {"kind": "array", "dtype": str(value.dtype), "value": value.tolist()}
    if depth < MAX_DEPTH:
        if isinstance(value, Batch):
            fields = {name: serialize_batch(value[name], depth + 1) for name in value}
            return {"kind": "batch", "fields": fields, "size": len(value)}
        if isinstance(value, Mapping):
            names = [serialize_batch(name, depth + 1) for name in value]
            parts = [serialize_batch(value[name], depth + 1) for name in value]
            return _typed("mapping", value, [names, parts])
        if isinstance(value, (list, tuple)):
            return _typed("row", value, [serialize_batch(each, depth + 1) for each in value])
        if hasattr(value, "__dict__") and _is_plain(kind):
            attributes = vars(value).items()
            return _typed(
                "object",
                value,
                {name: serialize_batch(each, depth + 1) for name, each in attributes},
            )
    return {"kind": "lost", "value": repr(value)[:MAX_REPR]}


def _typed(kind: str, value: Any, parts: Any) -> dict[str, Any]:
    made = type(value)
    return {"kind": kind, "class": f"{made.__module__}:{made.__qualname__}", "parts": parts}


def _is_plain(kind: type) -> bool:
    """Return True if objects consist of their attributes, so that making one runs no code."""
    own = [each for each in kind.__mro__ if each is not object]
    return dataclasses.is_dataclass(kind) or not any(
        name in vars(each) for each in own for name in SPECIAL
    )


def deserialize_batch(kept: Mapping[str, Any]) -> Any:
    """Return the batch that `serialize_batch` was given.

    Classes are looked up in imported modules; nothing is imported.

    Args:
        kept: a result of `serialize_batch`.

    Raises:
        ValueError: if a part could not be kept, or if a class is not imported or not plain.
    """
    kind = kept["kind"]
    if kind in ("plain", "tensor"):
        return kept["value"]
    if kind == "array":
        if "numpy" not in sys.modules:
            raise ValueError("the batch holds an array of NumPy's, which this recipe never imports")
        return sys.modules["numpy"].asarray(kept["value"], dtype=kept["dtype"])
    if kind == "batch":
        fields = {name: deserialize_batch(value) for name, value in kept["fields"].items()}
        return Batch(fields, kept["size"])
    if kind == "lost":
        raise ValueError(f"a part of the batch could not be kept: {kept['value']}")
    made = _imported_class(kept["class"])
    if kind == "mapping":
        names, values = ([deserialize_batch(each) for each in part] for part in kept["parts"])
        return dict(zip(names, values, strict=True))
    if kind == "row":
        row = [deserialize_batch(each) for each in kept["parts"]]
        if made is not None and issubclass(made, tuple):
            return made(*row) if hasattr(made, "_fields") else tuple(row)
        return row
    if made is None or not _is_plain(made):
        raise ValueError(f"the batch holds a {kept['class']}, which this recipe does not know")
    new: Any = object.__new__(made)
    vars(new).update({name: deserialize_batch(value) for name, value in kept["parts"].items()})
    return new


def _imported_class(name: str) -> type | None:
    """Return a class by "module:name" if its module is imported."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def batch_fields(batch: Any) -> dict[str, Any]:
    """Return the parts of a batch by name.

    These are the items of a mapping or `Batch`, the attributes of an object, the numbered entries
    of a list or tuple, or the batch itself.
    """
    if isinstance(batch, (Batch, Mapping)):
        return {str(name): batch[name] for name in batch}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if isinstance(batch, (list, tuple)):
        return {str(number): value for number, value in enumerate(batch)}
    if not isinstance(batch, Tensor) and hasattr(batch, "__dict__"):
        return {name: value for name, value in vars(batch).items() if not name.startswith("_")}
    return {"batch": batch}


def data_and_lengths(value: Any) -> tuple[Tensor, Tensor] | None:
    """Return padded data (B, T, …) and lengths (B,) in entries of T, or None if this is neither.

    Fractions of the longest, as in SpeechBrain, are made lengths.
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
        if value.dim() <= 1 and value.numel() <= 64:
            found["values"] = value.tolist()
        return found
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        return {"texts": list(value)}
    if type(value) in SCALARS:
        return {"value": value}
    return {"type": type(value).__name__}
