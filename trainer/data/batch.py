"""A padded batch: examples of different lengths as tensors, with their true lengths beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Examples of different lengths as one tensor; unpacks as ``signals, lengths = batch.sig``.

    ``lengths`` counts the valid entries of each example's first dimension: samples, frames or
    tokens, **absolute** (int64), where SpeechBrain gives a fraction of the longest; `relative` is
    that.
    """

    data: Tensor  # (B, T, …)
    lengths: Tensor  # (B,)

    def relative(self) -> Tensor:
        """Each length as a fraction of the padded length, between 0 and 1: (B,)."""
        return self.lengths / max(self.data.shape[1], 1)


def pad(tensors: Sequence[Tensor], value: float = 0.0) -> Padded:
    """Stack tensors (T_i, …) that differ only in their first dimension to (B, max T_i, …).

    Raises ValueError when they differ in another dimension.
    """
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) != 1 or any(tensor.dim() == 0 for tensor in tensors):
        shown = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"only the first dimension may differ between examples; got {shown}")
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    data = torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
    return Padded(data, lengths)


class Batch:
    """Named fields of some examples: ``batch.sig``, ``batch["sig"]``, ``batch.to(device)``.

    A field is a `Padded` (data, lengths), a tensor (B,), or a list of length B.
    ``len(batch)`` is the number of examples.
    """

    def __init__(self, fields: Mapping[str, Any], size: int) -> None:
        self._fields = dict(fields)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        # Called only for what is no real attribute. Private names are never fields: copying and
        # unpickling (a batch travels between processes) ask for those before `_fields` exists.
        if not name.startswith("_") and name in self._fields:
            return self._fields[name]
        raise AttributeError(f"the batch has no field {name!r}, only {sorted(self._fields)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._fields[name] = value

    def __getstate__(self) -> tuple[dict[str, Any], int]:
        return self._fields, self._size

    def __setstate__(self, state: tuple[dict[str, Any], int]) -> None:
        self._fields, self._size = state

    def __repr__(self) -> str:
        return f"Batch({', '.join(self._fields)}; {self._size} examples)"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        # Leaving the host may always overlap; arriving there must be waited for, or be asked for.
        return self._map(lambda each: each.to(device, non_blocking=non_blocking or each.is_cpu))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch({name: _map(value, move) for name, value in self._fields.items()}, self._size)


def _map(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Padded):
        return Padded(*map(move, value))
    return value


def collate(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Join examples, each a mapping of the same names, into a `Batch`.

    Tensors (T, …) are padded with zeros in their first dimension and come with their lengths;
    scalar tensors and numbers become one tensor (B,); everything else (texts, ids) a list.
    """
    names = list(items[0])
    for item in items:
        if list(item) != names:
            raise ValueError(
                f"examples of a batch differ in their fields: {names} and {list(item)}"
            )
    return Batch({name: _join([item[name] for item in items]) for name in names}, len(items))


def _join(values: list[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        return pad(values) if any(value.dim() for value in values) else torch.stack(values)
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)
    return values
