"""Replica check: a callback that compares weights, buffers and optimizers of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.callbacks import Callback
from trainer.distributed.replica_check import ConstantBuffers, check_replicas_in_sync
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain


class ReplicaCheck(Callback):
    """Compare all ranks after the first and each ``every``-th training batch.

    Compared are the weights, the buffers that no forward pass changes, and a part of the optimizer
    states, another one at each check, so that a check takes about one and a half times as long as
    that of the weights. Batches are counted from the start of each training stage.

    Args:
        every: batches between two checks.
    """

    def __init__(self, every: int) -> None:
        self._every, self._batches, self._turn = every, 0, 0
        self._buffers: ConstantBuffers | None = None

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        """Reset the count."""
        if stage is Stage.TRAIN:
            self._batches = 0
            if self._buffers is None:
                self._buffers = ConstantBuffers(brain.modules)
            self._buffers.note()

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        """Compare the ranks if that is due. Collective.

        Raises:
            DriftError: if something is not the same on all ranks.
        """
        if stage is not Stage.TRAIN:
            return
        self._batches += 1
        if self._batches == 1 or self._batches % self._every == 0:
            where = f"epoch {brain.progress.epoch}, batch {brain.progress.step}:"
            weights = dict(brain.modules.named_parameters())
            check_replicas_in_sync(weights, where)
            if self._buffers is not None:
                check_replicas_in_sync(self._buffers.find(), where, "buffers")
            state = optimizer_state(brain)
            size = sum(p.numel() for p in weights.values()) // 2
            check_replicas_in_sync(self._part(state, size), where, "optimizer states")

    def _part(self, state: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return the tensors whose turn it is.

        Args:
            state: all tensors by name.
            size: number of elements that they have together at least, as far as there are so many.
        """
        names, chosen, total = list(state), dict[str, Tensor](), 0
        while len(chosen) < len(names) and total <= size:
            name = names[self._turn % len(names)]
            chosen[name] = state[name]
            total += state[name].numel()
            self._turn += 1
        return chosen


def optimizer_state(brain: Brain) -> dict[str, Tensor]:
    """Return the tensors that the optimizers keep, by name."""
    names = {id(p): name for name, p in brain.modules.named_parameters()}
    return {
        f"{update.name}: {names.get(id(p), number)} {key}": value
        for update in brain.updates.values()
        for number, p in enumerate(update.all_params)
        for key, value in update.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor) and value.layout is torch.strided
    }


def make_replica_check(brain: Brain) -> ReplicaCheck | None:
    """Return the replica check of a Brain; None with one process, and if it is off."""
    every = brain.options.drift_check_every
    return ReplicaCheck(every) if every and distributed.world_size() > 1 else None
