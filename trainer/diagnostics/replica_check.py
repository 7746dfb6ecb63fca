"""Replica check: a callback that compares the weights of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer import distributed
from trainer.callbacks import Callback
from trainer.distributed.replica_check import check_replicas_in_sync
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain


class ReplicaCheck(Callback):
    """Compare the weights of all ranks after the first and each ``every``-th training batch.

    Batches are counted in each training stage of this process, of which all ranks have as many.
    """

    def __init__(self, every: int) -> None:
        self._every, self._batches = every, 0

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        """Reset the count."""
        if stage is Stage.TRAIN:
            self._batches = 0

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        """Compare the weights if that is due. Collective.

        Raises:
            DriftError: a parameter is not the same on all ranks.
        """
        if stage is not Stage.TRAIN:
            return
        self._batches += 1
        if self._batches == 1 or self._batches % self._every == 0:
            where = f"epoch {brain.epoch}, batch {brain.step}:"
            check_replicas_in_sync(dict(brain.modules.named_parameters()), where)


def make_replica_check(brain: Brain) -> ReplicaCheck | None:
    """Return the replica check of a Brain; None with one process, and if it is off."""
    every = brain.options.drift_check_every
    return ReplicaCheck(every) if every and distributed.world_size() > 1 else None
