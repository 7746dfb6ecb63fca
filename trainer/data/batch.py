"""Batches: padding and collation, moving to a device, number and names of the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.tree import map_leaves


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


def pad(tensors: Sequence[Tensor], value: float = 0.0) -> Padded:
    """Pad tensors at the end of their first dimension and stack them.

    Args:
        tensors: B tensors (T_i, …) that differ only in their first dimension.
        value: value of the padding.

    Returns:
        Data (B, max T_i, …) and lengths T_i (B,).

    Raises:
        ValueError: the tensors differ in another dimension, or one of them is a scalar.
    """
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) != 1 or any(tensor.dim() == 0 for tensor in tensors):
        shown = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"only the first dimension may differ between examples; got {shown}")
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    data = torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
    return Padded(data, lengths)


class Batch:
    """Named fields of several examples.

    Fields are read as ``batch.sig`` or ``batch["sig"]``, and set as ``batch.sig = value``.
    ``len(batch)`` is the number of examples.

    Args:
        fields: values by name: a `Padded`, a tensor (B, …), or a list of length B.
        size: number of examples, B.
        host: the same batch as it was loaded, if this one was moved to a device.
    """

    def __init__(self, fields: Mapping[str, Any], size: int, host: Batch | None = None) -> None:
        self._fields = dict(fields)
        self._size = size
        self._host = host

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        # Called only for what is no real attribute. Copying and unpickling, by which a batch
        # travels between processes, ask for private names before `_fields` exists.
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
        """The batch as it was loaded, before `to` moved it; itself if it was not moved.

        Python reads lengths and counts from it without waiting for the device.
        """
        return self if self._host is None else self._host

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return a batch with the same fields whose tensors are on ``device``.

        Args:
            device: target device.
            non_blocking: copy from a GPU without waiting, too. Copies of page-locked memory to a
                GPU never wait.
        """
        moved = self._map(lambda each: each.to(device, non_blocking=non_blocking or each.is_cpu))
        if torch.device(device).type != "cpu":
            moved._host = self.on_host
        return moved

    def pin_memory(self) -> Batch:
        """Return a batch with the same fields whose tensors are in page-locked memory."""
        return self._map(lambda each: each.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def on_tensors(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        return Batch(map_leaves(on_tensors, self._fields), self._size)


def collate(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Join examples into a `Batch`.

    Args:
        items: B mappings of the same names. Tensors (T, …) become a `Padded`, scalar tensors and
            numbers a tensor (B,), everything else (texts, ids) a list of length B.

    Raises:
        ValueError: the examples differ in their names, or their tensors in another dimension than
            the first.
    """
    names = list(items[0])
    for item in items:
        if list(item) != names:
            raise ValueError(
                f"examples of a batch differ in their fields: {names} and {list(item)}"
            )
    return Batch({name: _collate([item[name] for item in items]) for name in names}, len(items))


def _collate(values: list[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        return pad(values) if any(value.dim() for value in values) else torch.stack(values)
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)
    return values


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device. Copies of page-locked memory to a GPU do not wait.

    Args:
        batch: a tensor, any other object with a method ``to`` (moved by it), or mappings, lists,
            tuples, named tuples and dataclasses of these. Anything else is left as it is.
        device: target device.

    Returns:
        A batch of the same types; the given one is left where it is, unless its own ``to`` moves it
        in place.
    """

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=value.is_cpu)
        if not _has_to(value):
            return value
        if isinstance(value, MutableMapping):
            value = copy.copy(value)  # The batches of transformers' processors move in place.
        return value.to(device)

    return map_leaves(move, batch, is_leaf=_has_to)


def _has_to(value: Any) -> bool:
    return callable(getattr(value, "to", None))


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch.

    Returns:
        The first dimension of the first tensor in a tensor, or in nested mappings, lists and
        tuples. Without one, the length of the first list of a mapping; or else the length of the
        batch, where it has one; or else 1. A list of mappings counts as that many examples.
    """
    tensor = _first_tensor(batch)
    if tensor is not None:
        return tensor.shape[0]
    if isinstance(batch, Mapping):
        return next((len(part) for part in batch.values() if isinstance(part, (list, tuple))), 1)
    return len(batch) if hasattr(batch, "__len__") and not isinstance(batch, (Tensor, str)) else 1


def _first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor that has dimensions."""
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    if isinstance(batch, (list, tuple)):
        # Tensors are asked first: to ask for an abstract class takes long.
        if any(not isinstance(part, Tensor) and isinstance(part, Mapping) for part in batch):
            return None  # A list of mappings holds examples that were not collated.
    elif isinstance(batch, Mapping):
        batch = batch.values()
    else:
        return None
    for part in batch:
        if (tensor := _first_tensor(part)) is not None:
            return tensor
    return None


def batch_ids(batch: Any) -> list[str]:
    """Return the names of the examples in a batch: its field or attribute ``id``, or none."""
    ids = batch.get("id", []) if isinstance(batch, Mapping) else getattr(batch, "id", [])
    return [str(each) for each in ids] if isinstance(ids, (list, tuple)) else [str(ids)]


def batch_sizes(batch: Any) -> str:
    """Return the shapes of the tensors in a batch by name, and the lengths of padded ones."""
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        parts: Iterable[tuple[Any, Any]] = batch.items()
    elif isinstance(batch, (list, tuple)):
        parts = enumerate(batch)
    else:
        parts = getattr(batch, "__dict__", {}).items()
    told = []
    for name, part in parts:
        padded = isinstance(part, tuple) and len(part) == 2
        data, lengths = part if padded else (part, None)
        if isinstance(data, Tensor):
            told.append(f"{name} {tuple(data.shape)}")
            if isinstance(lengths, Tensor) and lengths.dim() == 1:
                told[-1] += f" of lengths {' '.join(f'{n:g}' for n in lengths.tolist())}"
    return ", ".join(told)
