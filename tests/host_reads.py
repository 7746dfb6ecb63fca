"""Count what makes the host wait for a device, where there is none but the CPU.

Some tensors are declared to be on a device, and what is computed from them is, too. Counted are
the operators that bring values of such a tensor to the host, from wherever they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from trainer.data import Batch
from trainer.tree import leaves, map_leaves

# Operators with a result that the host needs, or whose size it needs.
READS = {
    "_local_scalar_dense", "_unique2", "allclose", "bincount", "equal", "is_nonzero",
    "masked_select", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
# Functions that copy to the host without an operator, if what they are given is there already.
COPIES = {"cpu", "numpy", "tolist", "__array__"}
# Operators whose results, from the second on, are on the host.
FOR_HOST = {"_pack_padded_sequence"}
# Functions that copy lengths to the host, and which argument these are.
LENGTHS = {"_pack_padded_sequence": (1,), "ctc_loss": (2, 3)}


class HostReads:
    """Tensors that are on the device, and the reads of them.

    Attributes:
        calls: name of each operator or function that read a tensor on the device.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._storages: set[int] = set()
        self._kept: list[Tensor] = []  # So that no other tensor comes to lie where one was.

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Declare tensors to be on the device."""
        for tensor in tensors:
            if tensor.layout is torch.strided:
                self._storages.add(tensor.untyped_storage().data_ptr())
                self._kept.append(tensor)

    def has(self, value: Any) -> bool:
        """Return True for a tensor on the device."""
        return (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and value.numel() > 0
            and value.untyped_storage().data_ptr() in self._storages
        )

    def moved(self, batch: Any) -> Any:
        """Return a copy of a batch that is on the device."""

        def move(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        if isinstance(batch, Batch):
            fields = map_leaves(move, dict(batch))
            found: Any = Batch(fields, len(batch), host=batch)
        else:
            fields = found = map_leaves(move, batch)
        self.place(leaf for _, leaf in leaves(fields) if isinstance(leaf, Tensor))
        return found

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context manager in which reads are counted, and results of the device are on it."""
        with _Operators(self), _Functions(self):
            yield


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if not any(map(self._reads.has, given)):
            return result
        name = func.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _has_mask(args)):
            self._reads.calls.append(name)
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self._reads.place(results[:1] if name in FOR_HOST else results)
        return result


def _has_mask(args: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype is torch.bool for i in tree_leaves(args[1:2]))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES and self._reads.has(args[0]):
            self._reads.calls.append(name)
            if name == "cpu":
                with _disable_current_modes():  # The copy is on the host.
                    return args[0].detach().clone()
        lengths = [args[i] for i in LENGTHS.get(name, ()) if i < len(args)]
        self._reads.calls += [name] * sum(map(self._reads.has, lengths))
        return func(*args, **(kwargs or {}))
