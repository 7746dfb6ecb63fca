"""Batches: padding, collation, moving to a device, number and names of examples."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence
from torch.utils.data import default_collate

from trainer.tree import is_container, map_leaves, parts_of, rebuilt

NUMBERS = (bool, int, float, complex)


class Padded(NamedTuple):
    """Examples of different lengths as one tensor; unpacks as ``signals, lengths = batch.sig``.

    Args:
        data: padded examples, (B, T, …).
        lengths: number of valid entries in each example's first dimension (samples, frames or
            tokens), int64, (B,). SpeechBrain stores fractions of the padded length instead; see
            `relative`.
    """

    data: Tensor
    lengths: Tensor

    def relative(self) -> Tensor:
        """Return the lengths as fractions of the padded length, between 0 and 1, (B,)."""
        return self.lengths / max(self.data.shape[1], 1)

    def _refuse(self, other: Any) -> Any:  # For a tuple, + and * would join and repeat the fields.
        raise TypeError("arithmetic with a Padded, which is a tensor and its lengths")

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse  # type: ignore[misc]


def pad(tensors: Sequence[Tensor], value: float = 0.0) -> Padded:
    """Pad tensors at the end of their first dimension and stack them.

    Args:
        tensors: B tensors (T_i, …) that differ only in their first dimension. Different dtypes are
            promoted as by `torch.promote_types`.
        value: value of the padding.

    Returns:
        Data (B, max T_i, …) and lengths T_i (B,).

    Raises:
        ValueError: there are no tensors, they differ in another dimension, one is a scalar, or no
            dtype holds all their numbers and the padding.
    """
    if not len(tensors):
        raise ValueError("pad got no tensors; allowed: one or more")
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) != 1 or any(tensor.dim() == 0 for tensor in tensors):
        shown = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"only the first dimension may differ between examples; got {shown}")
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    joinable = _to_one_dtype(tensors)
    dtype = joinable[0].dtype
    if value and not (dtype.is_floating_point or dtype.is_complex):
        limits = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not limits[0] <= value <= limits[1] or value != int(value):
            raise ValueError(f"{dtype} cannot hold the padding {value}")
    return Padded(pad_sequence(joinable, batch_first=True, padding_value=value), lengths)


def _to_one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype, promoted if they differ, without changing a number.

    Raises:
        ValueError: no dtype holds all the numbers.
    """
    dtypes = sorted({tensor.dtype for tensor in tensors}, key=str)
    if len(dtypes) == 1:
        return list(tensors)
    try:
        dtype = reduce(torch.promote_types, dtypes)
    except RuntimeError as error:
        named = ", ".join(map(str, dtypes))
        raise ValueError(f"no dtype holds the numbers of {named}: give all examples one") from error
    if dtype.is_floating_point or dtype.is_complex:
        limit = int(2 / torch.finfo(dtype).eps)  # Whole numbers up to here are exact.
        for tensor in tensors:
            whole = not (tensor.is_floating_point() or tensor.is_complex())
            if whole and tensor.numel() and float(tensor.double().abs().max()) > limit:
                raise ValueError(
                    f"examples of {tensor.dtype} would become {dtype}, which holds whole numbers "
                    f"up to {limit}: give all examples one dtype"
                )
    return [tensor.to(dtype) for tensor in tensors]


class Batch:
    """Named fields of several examples.

    Fields are read as ``batch.sig`` or ``batch["sig"]``, and set as ``batch.sig = value``. Their
    values unpack in order, as in ``ids, signals = batch``; ``keys`` returns the names, and
    ``"sig" in batch`` tests for one. ``len(batch)`` is the number of examples.

    Args:
        fields: values by name: a `Padded`, a tensor (B, …), a list of length B, or containers of
            these.
        size: number of examples, B.
        host: the same batch as it was loaded, if this one was moved to a device.
    """

    def __init__(self, fields: Mapping[str, Any], size: int, host: Batch | None = None) -> None:
        self._fields = dict(fields)
        self._size = size
        self._host = host

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        return iter(self._fields.values())

    def keys(self) -> list[str]:
        """Return the names of the fields."""
        return list(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise KeyError(f"the batch has no field {name!r}, only {sorted(self._fields)}")
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes. Copying and unpickling, as between processes, read
        # private names before `_fields` exists.
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._fields:
            return self._fields[name]
        raise AttributeError(f"the batch has no field {name!r}, only {sorted(self._fields)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._fields[name] = value

    def __repr__(self) -> str:
        return f"Batch({', '.join(self._fields)}; {self._size} examples)"

    @property
    def on_host(self) -> Batch:
        """The batch as it was loaded, before `to` moved it; the batch itself if it was not moved.

        Reading lengths and counts from it does not wait for the device.
        """
        return self if self._host is None else self._host

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return a batch with the same fields whose tensors are on ``device``.

        Args:
            device: target device; `to_device` describes what is moved.
            non_blocking: do not wait for copies from a GPU either. Copies of page-locked memory to
                a GPU never wait.
        """
        host = None if torch.device(device).type == "cpu" else self.on_host
        return Batch(_move(self._fields, device, non_blocking), self._size, host)

    def pin_memory(self) -> Batch:
        """Return a batch with the same fields whose tensors are in page-locked memory."""

        def pins(leaf: Any) -> bool:
            return _has(leaf, "pin_memory")

        pinned = map_leaves(lambda x: x.pin_memory() if pins(x) else x, self._fields, pins)
        return Batch(pinned, self._size)


def collate(items: Sequence[Any]) -> Any:
    """Join examples that have named fields.

    Tensors and arrays (T, …) become a `Padded`; scalars and numbers a tensor (B,). Fields that are
    mappings, named tuples or dataclasses are joined field by field, and keep their type.
    Everything else (texts, ids, lists, None) becomes a list of length B. Different dtypes are
    promoted.

    Args:
        items: B mappings or dataclasses with the same fields, in any order.

    Returns:
        A `Batch` of mappings; of dataclasses, one of the same type.

    Raises:
        ValueError: there are no examples, they have no fields or differ in them, or a field cannot
            be joined; the message names it.
    """
    if not len(items):
        raise ValueError("collate got no examples; allowed: one or more")
    fields = _join_fields(items)
    return Batch(fields, len(items)) if isinstance(items[0], Mapping) else rebuilt(items[0], fields)


def _join_fields(items: Sequence[Any]) -> dict[Any, Any]:
    for item in items:
        if not is_container(item):
            kind = type(item).__name__
            raise ValueError(
                f"an example of a batch is of type {kind}; allowed: a mapping or dataclass"
            )
    joined, rows = {}, [parts_of(item) for item in items]
    _check_fields(rows)
    for name in rows[0]:
        try:
            joined[name] = _join([row[name] for row in rows])
        except (ValueError, TypeError) as error:
            raise ValueError(f"field {name!r}: {error}") from error
    return joined


def _check_fields(rows: Sequence[Any]) -> None:
    """Raise ValueError for mappings with different keys."""
    for row in rows if all(isinstance(row, Mapping) for row in rows) else ():
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"examples of a batch differ in their fields: {list(rows[0])} and {list(row)}"
            )


def _join(values: list[Any]) -> Any:
    """Join one field of all examples."""
    first = values[0]
    if type(first) in NUMBERS and len({*map(type, values)}) == 1:
        with suppress(RuntimeError, ValueError, OverflowError):  # Beyond 64 bits: see below.
            return torch.tensor(values)
    tensors: list[Tensor] = []
    for value in values:
        tensor = as_tensor(value)
        if tensor is None:
            break
        tensors.append(tensor)
    else:
        if any(tensor.dim() for tensor in tensors):
            return pad(tensors)
        scalars = _to_one_dtype(tensors)
        for index, value in enumerate(values):
            if type(value) in NUMBERS:  # It is as exact as its neighbours.
                scalars[index] = torch.tensor(value, dtype=scalars[0].dtype)
        return torch.stack(scalars)
    named = is_container(first) and not isinstance(first, list) and type(first) is not tuple
    if isinstance(first, tuple):
        named = hasattr(first, "_fields") and not isinstance(first, PackedSequence)
    if named and all(type(value) is type(first) for value in values):
        return rebuilt(first, _join_fields(values))
    return values


def as_tensor(value: Any) -> Tensor | None:
    """Convert a tensor, number, or array of numbers to a tensor; return None for anything else."""
    if isinstance(value, Tensor):
        return value
    if is_array(value):
        if value.dtype.kind not in "biufc" or hasattr(value, "mask"):
            return None
        # A copy: torch takes no foreign byte order, negative strides or read-only memory.
        native = value.dtype.newbyteorder("=")
        return torch.from_numpy(sys.modules["numpy"].array(value, dtype=native, order="C"))
    if not isinstance(value, NUMBERS):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit 64 bits: give it as a text")
    return torch.tensor(value)


def is_array(value: Any) -> bool:
    """Return True for an array or scalar of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def collate_plain(items: list[Any]) -> Any:
    """Join examples by torch's `default_collate`; values that it refuses become a list.

    Raises:
        ValueError: mappings differ in their keys; torch would drop some.
        RuntimeError: tensors or lists differ in their sizes.
    """
    first = items[0]
    _check_fields(items)
    if any(item is None for item in items):
        return items
    if is_dataclass(first):
        return collate(items)
    alike = is_container(first) and len({*map(type, items)}) == 1
    if alike and len({*map(len, items)}) == 1:
        rows = [parts_of(item) for item in items]
        joined = {name: collate_plain([row[name] for row in rows]) for name in rows[0]}
        return list(joined.values()) if type(first) is tuple else rebuilt(first, joined)
    try:
        return default_collate(items)
    except TypeError:  # An object of another type.
        return items
    except RuntimeError as error:
        error.add_note("the loader option collate_fn=trainer.data.collate pads examples with names")
        raise


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device. Copies of page-locked memory to a GPU do not wait.

    Args:
        batch: a tensor, any other object with a method ``to`` (moved by it), or mappings, lists,
            tuples, named tuples and dataclasses of these. Anything else is left as it is.
        device: target device.

    Returns:
        A batch of the same types; the given one stays where it is, unless its own ``to`` moves it
        in place.
    """
    return _move(batch, device)


def _move(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    def movable(value: Any) -> bool:
        return _has(value, "to") and not isinstance(value, type)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=non_blocking or value.is_cpu)
        if not movable(value):
            return value
        if isinstance(value, MutableMapping):
            value = copy.copy(value)  # Batches of transformers' processors move in place.
        moved = value.to(device)
        return value if moved is None else moved

    return map_leaves(move, batch, is_leaf=movable)


def _has(value: Any, method: str) -> bool:
    return callable(getattr(value, method, None))


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch.

    Returns:
        The first dimension of the first tensor or array in the batch: a tensor, nested mappings,
        lists, tuples and dataclasses, or attributes of an object without a length. Else the length
        of the first list among the fields, else of the batch, else 1. A list of mappings or
        dataclasses counts as that many examples, as does a field that lists tensors of different
        lengths, which were not padded.
    """
    if (size := _first_size(batch)) is not None:
        return size
    if isinstance(batch, (Tensor, str, bytes)) or is_array(batch):
        return 1
    if not isinstance(batch, Mapping) and hasattr(type(batch), "__len__"):
        return len(batch)
    fields = tuple(_fields(batch).values())
    if (size := _first_size(fields)) is not None:
        return size
    return next((len(part) for part in fields if isinstance(part, (list, tuple))), 1)


def _fields(batch: Any) -> Mapping[Any, Any]:
    return parts_of(batch) if is_container(batch) else getattr(batch, "__dict__", {})


def _first_size(batch: Any) -> int | None:
    """Return the first dimension of the first tensor that has dimensions."""
    if isinstance(batch, Tensor) or is_array(batch):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, list) and _holds_examples(batch):
        return None
    if isinstance(batch, (list, tuple)):
        parts: Iterable[Any] = batch
    elif isinstance(batch, Mapping):
        parts = batch.values()
    elif is_container(batch):
        parts = parts_of(batch).values()
    else:
        return len(batch) if isinstance(batch, Batch) else None
    for part in parts:
        if isinstance(part, (list, tuple)) and _is_ragged(part):
            return len(part)
        if (size := _first_size(part)) is not None:
            return size
    return None


def _holds_examples(parts: list[Any]) -> bool:
    """Return True for a list of mappings, dataclasses or ragged tuples: examples not collated."""
    # Tensors are tested first, since isinstance of an abstract class such as Mapping is slow.
    return any(
        not isinstance(part, Tensor) and (isinstance(part, Mapping) or is_dataclass(part))
        for part in parts
    ) or (all(type(part) is tuple for part in parts) and _is_ragged(parts))


def _is_ragged(parts: Sequence[Any]) -> bool:
    """Return True for tensors, or rows of them, that differ only in their first dimension."""
    if len(parts) < 2 or isinstance(parts, PackedSequence):
        return False
    if all(type(part) in (list, tuple) for part in parts):
        return len({*map(len, parts)}) == 1 and any(
            _is_ragged(each) for each in zip(*parts, strict=True)
        )
    if not all((isinstance(each, Tensor) or is_array(each)) and each.ndim for each in parts):
        return False
    alike = len({(each.dtype, tuple(each.shape[1:])) for each in parts}) == 1
    return alike and len({len(each) for each in parts}) > 1


def batch_ids(batch: Any) -> list[str]:
    """Return the names of the examples in a batch: its field or attribute ``id``, else []."""
    ids: Any = batch.get("id", []) if isinstance(batch, Mapping) else getattr(batch, "id", [])
    if isinstance(ids, Tensor) or is_array(ids):
        ids = ids.tolist()
    return [str(each) for each in ids] if isinstance(ids, (list, tuple)) else [str(ids)]


def batch_sizes(batch: Any) -> str:
    """Return the shapes of the tensors in a batch by name, and the lengths of padded ones."""
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Batch):
        batch = dict(batch)
    found = []
    for name, part in _fields(batch).items():
        padded = isinstance(part, tuple) and len(part) == 2
        data, lengths = part if padded else (part, None)
        if isinstance(data, Tensor):
            found.append(f"{name} {tuple(data.shape)}")
            if isinstance(lengths, Tensor) and lengths.dim() == 1:
                found[-1] += f" of lengths {' '.join(f'{n:g}' for n in lengths.tolist())}"
    return ", ".join(found)


def add_advice(error: BaseException, batch: Any) -> None:
    """Add a note to an error of a recipe that used a `Padded` as a tensor."""
    if "Padded" not in str(error):
        return
    name, access = "data", "padded"
    if isinstance(batch, (Batch, Mapping)):
        fields = dict(batch).items()
        names = {id(value): str(name) for name, value in fields if isinstance(value, Padded)}
        name, trace = next(iter(names.values()), name), error.__traceback__
        while trace is not None:  # Finds the innermost function with one of them.
            for value in trace.tb_frame.f_locals.values():
                name = names.get(id(value), name)
            trace = trace.tb_next
        access = f"batch.{name}" if isinstance(batch, Batch) else f"batch[{name!r}]"
    note = (
        f"{access} is a Padded, a tensor and the lengths of its examples: write "
        f"`{name}, lengths = {access}`, and use `{name}`"
    )
    if note not in getattr(error, "__notes__", ()):  # The batch may be of a `fit` in a hook.
        error.add_note(note)
