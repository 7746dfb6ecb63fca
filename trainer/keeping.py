"""Where a run is, what is saved of it and when, and how it goes on from there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from trainer import distributed, signals, state
from trainer.data.feed import Feed
from trainer.diagnostics import replay
from trainer.metrics import StageReport
from trainer.optim.epoch_end import judge
from trainer.resumption import Resumption, place_kept

logger = logging.getLogger("trainer")

Phase = Literal["train", "valid", "done"]
T = TypeVar("T")


class Keeper:
    """The position of a Brain in its run, and its checkpoints.

    ``phase`` says what of the current epoch comes next: the rest of its training, its validation,
    or nothing. Saves that hooks ask for wait for a moment at which the state is whole: after a
    batch, after a stage, at the end of an epoch.
    """

    def __init__(self, brain: Any) -> None:
        self.brain = brain
        self.phase: Phase = "done"
        self.stopped = False
        self.trained = False
        self.fits = 0  # Calls of `fit`: each goes through epochs of its own.
        self._resumed = False
        self._resumed_fit = 0
        self._batches: int | None = None  # Of the epoch, where known.
        self._depth = 0  # A hook of one `fit` may call another.
        self._resumption = Resumption(brain)
        self._before_valid: tuple[Any, Any] | None = None
        self._saved_at, self._saved_step = time.monotonic(), 0
        self.checkpointer = brain.checkpointer
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("brain", self)
            if brain.options.debug:
                self.checkpointer.enabled = False

    # ------------------------------------------------------------------------- state and resuming

    def state_dict(self) -> dict[str, Any]:
        """What the Checkpointer saves: the whole Brain."""
        return state.common(self.brain)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the Brain; its position becomes the saved one."""
        self._resumption.take(saved)
        self._resumed = True

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's own part of it."""
        return state.own(self.brain)

    def load_local_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Kept until the moment that it was saved at comes round again."""
        self._resumption.take_own(saved)

    def position(self) -> dict[str, Any]:
        """Which part of the epoch comes next, and whether the run is over."""
        return {
            "phase": self.phase,
            "stopped": self.stopped,
            "fits": self.fits,
            "processes": distributed.world_size(),
            "batches": self._batches,
            "log_lines": self.brain.journal.log.lines(),
        }

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Restore what `position` gave."""
        self.phase, self.stopped = position["phase"], position["stopped"]
        self._resumed_fit, self._batches = position["fits"], position["batches"]
        if self.phase == "train":
            self._resumption.go_to_batch(position["batches"], position["processes"])
        self.brain.journal.log.truncate(self.brain.optimizer_step, position["log_lines"])

    def begin_fit(self) -> None:
        """Another `fit` begins; the first one resumes."""
        if self._depth > 1:
            return
        self.fits += 1
        if self.fits != self._resumed_fit:
            self.stopped = False
        if self.fits == 1:
            self._recover()
        self.trained = True

    def fit_started(self) -> None:
        """The hook has run."""
        if self._depth == 1 and self.fits == self._resumed_fit:
            self._resumption.fit_started(within_training=self.phase == "train")

    def _recover(self) -> None:
        """Restore the newest sound checkpoint, if there is one, and say so."""
        brain = self.brain
        if self.checkpointer is None or not self.checkpointer.enabled:
            return
        if brain.options.replay:
            checkpoint = replay.restore(brain)
        else:
            self.checkpointer.prepare()
            checkpoint = self.checkpointer.recover_if_possible()
        if checkpoint is None:
            return
        self._saved_step = brain.optimizer_step
        logger.info(
            "resuming after epoch %d, batch %d (optimizer step %d) from %s",
            brain.epoch, brain.step, brain.optimizer_step, checkpoint.path,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- the position

    def epochs(self, counter: Iterable[int]) -> Iterator[int]:
        """The epochs that are still to do; each is entered where it was left."""
        brain, resumed = self.brain, False
        if brain.options.replay:  # Of another `fit`, or there would be no return from it.
            return
        if self._depth == 1:
            if self.fits < self._resumed_fit:
                logger.info("fit number %d was over before: nothing to do", self.fits)
                return
            resumed, self._resumed = self._resumed, False
        if self.phase == "valid" and not brain.has_valid:
            self.phase = "done"
        if resumed and hasattr(counter, "current"):
            counter.current = brain.epoch - (self.phase != "done")
        first = True
        for number, epoch in enumerate(counter, 1):
            if self.stopped or (self.limit_reached() and self.phase == "done"):
                return
            if resumed and (epoch < brain.epoch or (epoch == brain.epoch and self.phase == "done")):
                continue
            if not (resumed and first and epoch == brain.epoch):
                brain.epoch, brain.step, self.phase = epoch, 0, "train"
            first = False
            yield epoch
            if brain.options.debug and number >= brain.options.debug_epochs:
                return

    def begin_training(self) -> None:
        """The stage's hook has run; the first batch comes next."""
        self.brain.statistics.begin()
        if self.brain.step == 0:
            self.brain.zero_grad()  # What an error in an earlier epoch, or the user, left there.
            self.brain.average = type(self.brain.average)()
            self.brain.patience.reset()
        if self._depth == 1:
            self._resumption.training_started()

    def rest_of(self, feed: Feed, epoch: int) -> Iterable[tuple[Any, bool]]:
        """The batches of the epoch that are still to train on."""
        if self.limit_reached():
            return ()
        length = feed.begin(epoch)
        if self._depth == 1:
            self._resumption.epoch_begun(epoch, length)
            self._batches = length
        return feed.from_batch(epoch, self.brain.step)

    def begin_validation(self) -> None:
        """To be stopped within the validation is to have stopped before it."""
        objects = state.copied(state.light(state.objects(self.brain)))
        self._before_valid = objects, self.brain.attributes.state_dict()

    def after_batch(self) -> bool:
        """Save and stop where that is due; whether the training ends here."""
        signal = signals.requested()
        asked, due = distributed.agree(signal is not None, self._due())
        if self._saves():
            if due:
                self.save({}, end_of_epoch=False)
            self._save_waiting()
        if asked:
            raise signals.Interrupted(signal or signals.DEFAULT)
        return self.limit_reached()

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation, of which ranks may have different numbers.

        After each, all ranks ask each other whether to stop, also those that have no more.
        """
        for batch in batches:
            yield batch
            self._vote(working=True)
        while self._vote(working=False):
            pass

    def _vote(self, working: bool) -> bool:
        """Stop where any rank was asked to; whether any rank still works."""
        signal = signals.requested()
        asked, working = distributed.agree(signal is not None, working)
        if asked:
            raise signals.Interrupted(signal or signals.DEFAULT)
        return working

    def end_epoch(self, report: StageReport) -> bool:
        """What the epoch's metrics decide, and its checkpoint; whether the run is over."""
        metrics, self.stopped = judge(self.brain, report)
        self.phase = "done"
        if self._saves() and not self._save_waiting():
            self.save(metrics, end_of_epoch=True)
        return self.stopped or self.limit_reached()

    def limit_reached(self) -> bool:
        """Whether the run has all the optimizer steps that it may have."""
        limit = self.brain.options.optimizer_step_limit
        return limit is not None and self.brain.optimizer_step >= limit

    # --------------------------------------------------------------------------------- checkpoints

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While it lasts, saves wait for a safe point; a run that is asked to stop saves itself."""
        self._depth += 1
        whole = self._depth == 1
        try:
            with signals.at_safe_points(), self._saving() if whole else place_kept(self.brain):
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def _saving(self) -> Iterator[None]:
        if self.checkpointer is None:
            yield
            return
        self.checkpointer.hold()
        try:
            yield
        except signals.Interrupted as stop:
            if self.phase == "valid" and self._before_valid is not None:
                objects, attributes = self._before_valid
                state.load_objects(self.brain, objects)
                self.brain.attributes.load_state_dict(attributes)
            self.save({}, end_of_epoch=False)
            logger.info("saved and stopping (%s); the same command goes on from here", stop.signal)
            raise
        finally:
            self.checkpointer.drop_waiting()

    @contextmanager
    def testing(self) -> Iterator[None]:
        """While it lasts saves wait: the weights are not those of the run."""
        if self.checkpointer is None or self._depth:
            yield
            return
        self.checkpointer.hold()
        try:
            yield
            if self.trained:
                self._save_waiting()
        finally:
            if self.checkpointer.drop_waiting():
                logger.warning("a save within a test was left out: this Brain has not trained")

    def save(self, metrics: Mapping[str, Any], end_of_epoch: bool) -> None:
        """Save the Brain as it is now."""
        brain = self.brain
        meta = {"epoch": brain.epoch, "optimizer_step": brain.optimizer_step, **metrics}
        self.checkpointer.save_and_keep_only(meta, end_of_epoch=end_of_epoch)
        self._save_waiting()

    def _save_waiting(self) -> bool:
        """Do the saves that waited; whether there were any."""
        saved = self.checkpointer.release()
        self.checkpointer.hold()
        if saved:
            self._saved_at, self._saved_step = time.monotonic(), self.brain.optimizer_step
        return bool(saved)

    def save_waiting(self) -> None:
        """A stage is over: a moment at which the state is whole."""
        if self._saves():
            self._save_waiting()

    def _saves(self) -> bool:
        """Whether now may be a moment to save: within a hook's own `fit` none is."""
        return self.checkpointer is not None and self._depth == 1

    def _due(self) -> bool:
        options = self.brain.options
        steps, minutes = options.checkpoint_every_steps, options.checkpoint_every_minutes
        if steps is not None and self.brain.optimizer_step - self._saved_step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
