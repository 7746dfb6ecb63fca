"""Replica check: compare weights, buffers and optimizers of all ranks, to the last bit.

Equal weights stay equal as long as every step uses the gradients of all ranks. A change on one rank
alone, such as by an optimizer that the Brain does not know or by code that depends on the rank,
makes several models of one, and no loss shows it. The same holds for states of optimizers, and for
buffers that no forward pass changes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer import distributed
from trainer.callbacks import Callback
from trainer.progress import Stage
from trainer.texts import first_names

if TYPE_CHECKING:
    from trainer.brain import Brain

ROW = 4096  # Words of 8 bytes in a row; rows are summed, then the sums of rows.
BLOCK = 256  # Rows multiplied at once, to bound the memory.


class DriftError(RuntimeError):
    """Error for ranks whose weights differ; raised on all of them."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's words of 8 bytes, each times an odd number for its position.

    Modulo 2^64, a change of one word always changes the sum; changes of several words, even if they
    cancel in a plain sum, do so with a probability of about 1 - 2^-60. The tensor must be dense;
    the result is an int64 scalar on its device.
    """
    values = tensor.detach().resolve_conj().resolve_neg()
    values = torch.view_as_real(values) if values.is_complex() else values
    values = values.reshape(-1).contiguous()
    if values.storage_offset() * values.itemsize % 8:
        values = values.clone()
    data = values.view(torch.uint8)
    whole = len(data) // (8 * ROW) * 8 * ROW
    tail = torch.cat([data[whole:], data.new_zeros(-len(data) % 8)]).view(torch.int64)
    columns = _weights(ROW, 1, data.device)
    blocks = data[:whole].view(torch.int64).view(-1, ROW).split(BLOCK)
    sums = [(block * columns).sum(1) for block in blocks]
    rows = torch.cat([*sums, (tail * columns[: len(tail)]).sum().reshape(1)])
    size = 1 << len(rows).bit_length()  # Few sizes, for the cache.
    return (rows * _weights(size, 2, data.device)[: len(rows)]).sum()


@functools.lru_cache(maxsize=32)
def _weights(number: int, key: int, device: torch.device) -> Tensor:
    """Return odd pseudorandom numbers (N,) of 64 bits, the same on all ranks (SplitMix64)."""
    x = (torch.arange(number, device=device) + (key << 40)) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1


def find_differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that differ between ranks. Collective.

    Raises:
        DriftError: ranks have tensors of other names, or in another order.
    """
    if distributed.world_size() == 1:
        return []
    device = distributed.device()
    names = zlib.crc32("\n".join(tensors).encode(errors="replace"))
    if not _agree(torch.tensor([names, len(tensors)], device=device)).all():
        raise DriftError("the ranks have different names of weights, buffers or optimizer states")
    if not tensors:
        return []
    found = [fingerprint(tensor) for tensor in tensors.values()]
    own = torch.zeros(len(found), dtype=torch.int64, device=device)
    for place in {each.device for each in found}:
        chosen = [n for n, each in enumerate(found) if each.device == place]
        own[chosen] = torch.stack([found[n] for n in chosen]).to(device)
    equal = _agree(own).tolist()
    return [name for name, same in zip(tensors, equal, strict=True) if not same]


def _agree(numbers: Tensor) -> Tensor:
    """Return flags (N,): True for numbers that are equal on all ranks. Collective."""
    # ~x falls as x rises: the largest ~x of all ranks is that of the smallest x.
    largest, smallest = distributed.all_reduce_max_(torch.cat([numbers, ~numbers])).chunk(2)
    return largest.eq(~smallest)


def check_replicas_in_sync(
    tensors: Mapping[str, Tensor], where: str, what: str = "weights"
) -> None:
    """Check that tensors are equal on all ranks, to the bit. Collective.

    Args:
        tensors: tensors with the same names and order on all ranks.
        where: place in the run, as the beginning of the error message.
        what: kind of the tensors, for the error message.

    Raises:
        DriftError: a tensor is not the same on all ranks; raised on every rank.
    """
    names = find_differing(tensors)
    if not names:
        return
    of = f" of {len(tensors)}" if len(names) > 1 else ""
    raise DriftError(
        f"{where} the ranks have different {what}: {first_names(names, 1)}{of}. Something moved "
        "them on one rank alone: a step of an optimizer that is not among self.updates, or a "
        "change of weights that depends on the rank. Weights move through self.optimize; "
        "drift_check_every: 0 turns this check off"
    )


class ReplicaCheck(Callback):
    """Compare all ranks after the first and each ``every``-th training batch.

    Compares the weights, the buffers that no forward pass changes, and a part of the optimizer
    states, another part at each check: a check takes about 1.5 times as long as one of the weights.
    Batches are counted from the start of each training stage.

    Args:
        every: batches between two checks.
    """

    def __init__(self, every: int) -> None:
        self._every, self._batches, self._turn = every, 0, 0
        # Names of buffers that may differ: running statistics of batch norms, which differ until an
        # epoch ends, buffers that changed on every rank between two checks, and buffers that grow.
        self._free: set[str] = set()
        self._noted: dict[str, tuple[torch.Size, int]] = {}  # Shape and content of the others.

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        if stage is Stage.TRAIN:
            self._batches = 0
            self._free |= {
                f"{path}.{name}".lstrip(".")
                for path, module in brain.modules.named_modules()
                if isinstance(module, _NormBase)
                for name, _ in module.named_buffers(recurse=False)
            }
            self._note_buffers(brain.modules)

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        if stage is not Stage.TRAIN:
            return
        self._batches += 1
        if self._batches == 1 or self._batches % self._every == 0:
            where = f"epoch {brain.progress.epoch}, batch {brain.progress.step}:"
            weights = dict(brain.modules.named_parameters())
            check_replicas_in_sync(weights, where)
            check_replicas_in_sync(self._constant_buffers(brain.modules), where, "buffers")
            size = sum(p.numel() for p in weights.values()) // 2
            state = self._part(optimizer_state(brain), size)
            check_replicas_in_sync(state, where, "optimizer states")

    def _note_buffers(self, modules: nn.Module) -> dict[str, Tensor]:
        """Record the contents of the buffers that may not differ, and return them by name."""
        buffers = {
            name: buffer
            for name, buffer in modules.named_buffers()
            if name not in self._free and buffer.layout is torch.strided
        }
        self._noted = {n: (b.shape, int(fingerprint(b))) for n, b in buffers.items()}
        return buffers

    def _constant_buffers(self, modules: nn.Module) -> dict[str, Tensor]:
        """Return the buffers that must be equal on all ranks, by name. Collective."""
        before, buffers = self._noted, self._note_buffers(modules)
        names = [name for name in before if name in buffers]
        pairs = [(*before[name], *self._noted[name]) for name in names]
        flags = distributed.any_rank(
            *(shape != new_shape for shape, _, new_shape, _ in pairs),
            *(bits == new_bits for _, bits, _, new_bits in pairs),
        )
        grown, still = flags[: len(names)], flags[len(names) :]
        constant = [n for n, g, s in zip(names, grown, still, strict=True) if s and not g]
        self._free |= set(names) - set(constant)
        return {name: buffers[name] for name in constant}

    def _part(self, state: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return the next tensors to compare: more than ``size`` elements in total, or all."""
        names, chosen, total = list(state), dict[str, Tensor](), 0
        while len(chosen) < len(names) and total <= size:
            name = names[self._turn % len(names)]
            chosen[name] = state[name]
            total += state[name].numel()
            self._turn += 1
        return chosen


def optimizer_state(brain: Brain) -> dict[str, Tensor]:
    """Return the tensors in the states of the optimizers, by name."""
    return {
        f"{update.name}: {name} {key}": value
        for update in brain.updates.values()
        for p, name in update.named().items()
        for key, value in update.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor) and value.layout is torch.strided
    }


def make_replica_check(brain: Brain) -> ReplicaCheck | None:
    """Return the replica check of a Brain; None with one process, or if it is off."""
    every = brain.options.drift_check_every
    return ReplicaCheck(every) if every and distributed.world_size() > 1 else None
