"""Checkpoint schedule of a run: when its state is saved, and what must wait for that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer import signals
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_state import RunState, Snapshot
from trainer.checkpoint.storage import Checkpoint
from trainer.options import RunOptions
from trainer.progress import Progress

logger = logging.getLogger("trainer")


class Saver:
    """Saves a run at moments at which its state is whole.

    Saves that hooks ask for wait for such a moment: after a batch, after a stage, at the end of an
    epoch. Without a checkpointer nothing is saved.

    Args:
        checkpointer: where and which checkpoints are kept, or None.
        state: state of the run.
        options: intervals of saves within epochs.
        on_saved: called with every checkpoint that was saved.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None,
        state: RunState,
        options: RunOptions,
        on_saved: Callable[[Checkpoint], None],
    ) -> None:
        self._checkpointer, self._state, self._options = checkpointer, state, options
        self._on_saved = on_saved
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._before_validation: Snapshot | None = None
        self._missed: set[str] = set()  # Metrics of `keep_best` that were warned of.
        if checkpointer is not None:
            checkpointer.add_recoverable("brain", state)
            if options.debug:
                checkpointer.enabled = False

    @property
    def _progress(self) -> Progress:
        return self._state.progress

    def recover(self) -> Checkpoint | None:
        """Load the newest sound checkpoint, if there is one. Collective."""
        if self._checkpointer is None or not self._checkpointer.enabled:
            return None
        self._checkpointer.prepare()
        found = self._checkpointer.recover_if_possible()
        if found is not None:
            self._saved_step = self._progress.optimizer_step
        return found

    def due(self) -> bool:
        """Return True if a save within the epoch is due on this rank."""
        steps, minutes = (
            self._options.checkpoint_every_steps,
            self._options.checkpoint_every_minutes,
        )
        if steps is not None and self._progress.optimizer_step - self._saved_step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, metrics: Mapping[str, Any], end_of_epoch: bool) -> None:
        """Save the run as it is now, and apply the rules of what to keep. Collective."""
        if self._checkpointer is None:
            return
        place = {"epoch": self._progress.epoch, "optimizer_step": self._progress.optimizer_step}
        if end_of_epoch:
            self._warn_of_missing(metrics)
        self._checkpointer.save_and_keep_only({**place, **metrics}, end_of_epoch=end_of_epoch)
        self.release()

    def _warn_of_missing(self, metrics: Mapping[str, Any]) -> None:
        """Warn once of each metric of ``keep_best`` that an epoch did not give."""
        assert self._checkpointer is not None
        wanted = {rule.metric for rule in self._checkpointer.retention.best}
        for metric in sorted(wanted - {*metrics} - self._missed):
            self._missed.add(metric)
            logger.warning(
                "keep_best names the metric %r, which the epoch did not give; it gave %s: no "
                "checkpoint can be the best by it", metric, ", ".join(metrics),
            )  # fmt: skip

    def release(self) -> bool:
        """Do the saves that waited; return True if there were any. Collective."""
        if self._checkpointer is None:
            return False
        saved = self._checkpointer.release()
        self._checkpointer.hold()
        if saved:
            self._saved_at, self._saved_step = time.monotonic(), self._progress.optimizer_step
        for each in saved:
            self._on_saved(each)
        return bool(saved)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Context manager in which saves wait, and a run that is asked to stop saves itself."""
        if self._checkpointer is None:
            yield
            return
        self._checkpointer.hold()
        try:
            yield
        except signals.Interrupted as stop:
            if self._progress.phase == "valid" and self._before_validation is not None:
                self._before_validation.restore()
            self.save({}, end_of_epoch=False)
            logger.info("saved and stopping (%s); the same command goes on from here", stop.signal)
            raise
        finally:
            self._checkpointer.drop_waiting()
            self._before_validation = None

    def begin_validation(self, snapshot: Snapshot) -> None:
        """Keep the state of hooks: a run interrupted in validation resumes at its start.

        Args:
            snapshot: state before the first hook of the validation.
        """
        self._before_validation = snapshot

    @contextmanager
    def testing(self, trained: bool) -> Iterator[None]:
        """Context manager in which saves wait, since the weights are not those of the run.

        Args:
            trained: False drops the saves that waited, with a warning.
        """
        if self._checkpointer is None:
            yield
            return
        self._checkpointer.hold()
        try:
            yield
            if trained:
                self.release()
        finally:
            if self._checkpointer.drop_waiting():
                logger.warning("a save within a test was left out: this Brain has not trained")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager in which nothing is saved, whoever asks."""
        if self._checkpointer is None:
            yield
            return
        before, self._checkpointer.enabled = self._checkpointer.enabled, False
        try:
            yield
        finally:
            self._checkpointer.enabled = before
