"""A batch as tensors, texts and numbers, to be kept in a file and made a batch again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch import Batch

SCALARS = (int, float, str, bool, type(None))
DEEPEST = 12


def packed(value: Any, depth: int = 0) -> Any:
    """``value`` as a dict with a "kind", in which everything is safe to load."""
    kind = type(value)
    if kind in SCALARS:
        return {"kind": "plain", "value": value}
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        return {"kind": "tensor", "value": value.detach().cpu().clone().contiguous()}
    if hasattr(value, "dtype") and hasattr(value, "tolist") and not isinstance(value, Tensor):
        return {"kind": "array", "dtype": str(value.dtype), "value": value.tolist()}
    if depth < DEEPEST:
        if isinstance(value, Batch):
            fields = {name: packed(value[name], depth + 1) for name in value}
            return {"kind": "batch", "fields": fields, "size": len(value)}
        if isinstance(value, Mapping):
            names = [packed(name, depth + 1) for name in value]
            return _of("mapping", value, [names, [packed(value[n], depth + 1) for n in value]])
        if isinstance(value, (list, tuple)):
            return _of("row", value, [packed(each, depth + 1) for each in value])
        if dataclasses.is_dataclass(value) or _plain_object(kind):
            parts = {name: packed(each, depth + 1) for name, each in vars(value).items()}
            return _of("object", value, parts)
    return {"kind": "lost", "value": repr(value)[:500]}


def _of(kind: str, value: Any, parts: Any) -> dict[str, Any]:
    made = type(value)
    return {"kind": kind, "class": f"{made.__module__}:{made.__qualname__}", "parts": parts}


def _plain_object(kind: type) -> bool:
    """An object that is its attributes: to make it anew runs none of its code."""
    own = [each for each in kind.__mro__ if each is not object]
    special = ("__slots__", "__del__", "__new__", "__setattr__", "__getattribute__")
    return all(each.__flags__ & 1 << 9 for each in own) and not any(
        name in vars(each) for each in own for name in special
    )


def unpacked(kept: Mapping[str, Any]) -> Any:
    """What `packed` was given. Classes are looked for in what is imported, never imported.

    Raises ValueError where a class is not there, or is not one whose objects are their attributes.
    """
    kind = kept["kind"]
    if kind in ("plain", "tensor"):
        return kept["value"]
    if kind == "array":
        if "numpy" not in sys.modules:
            raise ValueError("the batch holds an array of NumPy's, which this recipe never imports")
        return sys.modules["numpy"].asarray(kept["value"], dtype=kept["dtype"])
    if kind == "batch":
        fields = {name: unpacked(value) for name, value in kept["fields"].items()}
        return Batch(fields, kept["size"])
    if kind == "lost":
        raise ValueError(f"a part of the batch could not be kept: {kept['value']}")
    made = _class(kept["class"])
    if kind == "mapping":
        names, values = ([unpacked(each) for each in part] for part in kept["parts"])
        return dict(zip(names, values, strict=True))
    if kind == "row":
        row = [unpacked(each) for each in kept["parts"]]
        if made is not None and issubclass(made, tuple):
            return made(*row) if hasattr(made, "_fields") else tuple(row)
        return row
    if made is None or not (dataclasses.is_dataclass(made) or _plain_object(made)):
        raise ValueError(f"the batch holds a {kept['class']}, which this recipe does not know")
    new: Any = object.__new__(made)
    vars(new).update({name: unpacked(value) for name, value in kept["parts"].items()})
    return new


def _class(name: str) -> type | None:
    """A class by "module:name", if that is imported and is one."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def described(batch: Any) -> dict[str, dict[str, Any]]:
    """The fields of a batch by name: their lengths, their texts, their shapes.

    Any batch has fields: those of a mapping or `Batch`, the attributes of an object, the numbered
    entries of a row, or itself.
    """
    return {name: _described(value) for name, value in fields(batch).items()}


def fields(batch: Any) -> dict[str, Any]:
    """What a batch is made of, by name."""
    if isinstance(batch, (Batch, Mapping)):
        return {str(name): batch[name] for name in batch}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if isinstance(batch, (list, tuple)):
        return {str(number): value for number, value in enumerate(batch)}
    if not isinstance(batch, Tensor) and hasattr(batch, "__dict__"):
        return {name: value for name, value in vars(batch).items() if not name.startswith("_")}
    return {"batch": batch}


def with_lengths(value: Any) -> tuple[Tensor, Tensor] | None:
    """Data (B, T, …) and lengths (B,) in entries of T, where a field is both.

    Fractions of the longest, as SpeechBrain has them, are made lengths.
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


def _described(value: Any) -> dict[str, Any]:
    both = with_lengths(value)
    if both is not None:
        return {"shape": list(both[0].shape), "lengths": both[1].tolist()}
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
