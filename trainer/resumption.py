"""From a checkpoint that was read to a run that is where it was saved, and fits within fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer import distributed, state

logger = logging.getLogger("trainer")

# What a `fit` within a hook of another one leaves as it was.
PLACE = (
    "epoch", "step", "average", "has_valid", "_batch", "_weight", "_last", "_reports", "_joint",
    "_batches", "_guarded", "_hand_stepped", "_spoilt", "_spent", "_averaged",
)  # fmt: skip


class Resumption:
    """A checkpoint that was read, until the run has come to the place where it was saved.

    Hooks run once more on the way. `on_fit_start` may change weights and optimizers, which is then
    meant. Whatever else hooks do was done before the save as well, and is undone.
    """

    def __init__(self, brain: Any) -> None:
        self._brain = brain
        self._common: Mapping[str, Any] | None = None
        self._own: Mapping[str, Any] | None = None
        self._weights: Mapping[str, Any] | None = None
        self._place: tuple[int, int | None, int] | None = None
        self._late: list[str] = []  # Objects that hooks must have made by the next stage.

    def take(self, common: Mapping[str, Any]) -> None:
        """Restore what all ranks share, as far as it exists by now."""
        state.load_common(self._brain, common)
        self._common = common

    def take_own(self, own: Mapping[str, Any]) -> None:
        """Keep this rank's own part until the place is reached."""
        self._own = own

    def go_to_batch(self, batches: int | None, processes: int) -> None:
        """Go to the Brain's step, saved by so many processes in an epoch of so many batches."""
        self._place = self._brain.step, batches, processes
        # An epoch has as many more batches a rank as there are fewer ranks.
        self._brain.step = self._brain.step * processes // distributed.world_size()

    def epoch_begun(self, epoch: int, length: int | None) -> None:
        """Where the epoch has other batches than when it was left, leave out the same share."""
        place, self._place = self._place, None
        step, batches, processes = place or (0, None, 1)
        if length is None or not batches:
            return
        ranks = distributed.world_size()
        if abs(length * ranks - batches * processes) >= max(ranks, processes):
            self._brain.step = step * length // batches
            logger.warning(
                "epoch %d has %d batches now, and had %d when it was left after %d: going on after "
                "%d", epoch, length, batches, step, self._brain.step,
            )  # fmt: skip

    def fit_started(self, within_training: bool) -> None:
        """`on_fit_start` has run; within an epoch's training, the stage's hook still has to."""
        if self._common is None:
            return
        if within_training:
            self._weights = state.copied(state.weights(self._brain))
        else:
            self._restore(self._common, strict=False)

    def training_started(self) -> None:
        """The hook of the stage has run."""
        if self._common is not None:
            if self._weights is not None:
                state.load_weights(self._brain, self._weights)
            state.load_position(self._brain, self._common["position"])
            self._restore(self._common, strict=True)
        elif self._late:
            found = state.objects(self._brain)
            state.check_objects([name for name in self._late if name in found], self._late)
            self._late = []

    def _restore(self, common: Mapping[str, Any], strict: bool) -> None:
        """``strict``: every saved object must exist by now. Else the hook of the next stage may
        make those that do not, and they are to be as new as it makes them.
        """
        found = state.objects(self._brain)
        if strict:
            state.check_objects([n for n in common["objects"] if n in found], common["objects"])
        self._late = [name for name in common["objects"] if name not in found]
        state.load_objects(self._brain, common["objects"])
        state.load_trainable(self._brain, common["trainable"])
        if self._own is not None:
            state.load_own(self._brain, self._own)
        self._common = self._own = self._weights = None


@contextmanager
def place_kept(brain: Any) -> Iterator[None]:
    """After it, the Brain goes on where it was: for a `fit` that a hook of another one calls."""
    place = {name: getattr(brain, name) for name in PLACE}
    phase, stopped = brain.keeper.phase, brain.keeper.stopped
    patience, counts = brain.patience.state_dict(), dict(brain.journal.counts)
    try:
        yield
    finally:
        vars(brain).update(place)
        brain.keeper.phase, brain.keeper.stopped = phase, stopped
        brain.patience.load_state_dict(patience)
        brain.journal.counts = counts
