"""Where a run is, what is saved of it and when, and how it goes on from there."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from trainer import distributed, interrupt, state
from trainer.report import StageReport

logger = logging.getLogger("trainer")

Phase = Literal["train", "valid", "done"]


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
        self._resumed = False
        self._own: Mapping[str, Any] | None = None
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
        state.load_common(self.brain, saved)
        self._resumed = True

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's own part of it."""
        return state.own(self.brain)

    def load_local_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Kept until the moment that it was saved at comes round again."""
        self._own = saved

    def position(self) -> dict[str, Any]:
        """Which part of the epoch comes next, and whether the run is over."""
        return {"phase": self.phase, "stopped": self.stopped}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Restore what `position` gave."""
        self.phase, self.stopped = position["phase"], position["stopped"]

    def recover(self) -> None:
        """Restore the newest sound checkpoint, if there is one, and say so."""
        brain = self.brain
        if self.checkpointer is None or not self.checkpointer.enabled:
            return
        self.checkpointer.prepare()
        checkpoint = self.checkpointer.recover_if_possible()
        if checkpoint is None:
            return
        brain.journal.log.truncate(brain.optimizer_step)
        logger.info(
            "resuming after epoch %d, batch %d (optimizer step %d) from %s",
            brain.epoch, brain.step, brain.optimizer_step, checkpoint.path,
        )  # fmt: skip
        if self.phase != "train":
            self._restore_own()

    def _restore_own(self) -> None:
        if self._own is not None:
            state.load_own(self.brain, self._own)
            self._own = None

    # ------------------------------------------------------------------------------- the position

    def epochs(self, counter: Iterable[int]) -> Iterator[int]:
        """The epochs that are still to do; each is entered where it was left."""
        brain = self.brain
        resumed, self._resumed = self._resumed, False
        if resumed and hasattr(counter, "current"):
            counter.current = brain.epoch - (self.phase != "done")
        first = True
        for number, epoch in enumerate(counter, 1):
            if self.stopped or self._limit_reached():
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
        if self.brain.step == 0 and self._own is None:
            self.brain.average = type(self.brain.average)()
            self.brain.patience.reset()
        self._restore_own()

    def after_batch(self) -> bool:
        """Save and stop where that is due; whether the training ends here."""
        signal, due = interrupt.requested(), self._due()
        if distributed.world_size() > 1:
            asked, due = distributed.agree(signal is not None, due)
            signal = signal or (interrupt.DEFAULT if asked else None)
        if self.checkpointer is not None:
            if due:
                self.save({}, end_of_epoch=False)
            self._save_waiting()
        if signal is not None:
            raise interrupt.Interrupted(signal)
        return self._limit_reached()

    def after_evaluated_batch(self) -> None:
        """Stop where that was asked for. Ranks cannot agree here: their batches are not paired."""
        if distributed.world_size() == 1 and (signal := interrupt.requested()) is not None:
            raise interrupt.Interrupted(signal)

    def end_epoch(self, report: StageReport) -> bool:
        """Schedules, early stopping and the epoch's checkpoint; whether the run is over."""
        brain = self.brain
        metrics = _metrics(report)
        for update in brain.updates.values():
            if update.schedule is not None and update.schedule.every == "epoch":
                _advance(update.schedule, metrics)
        stopping = getattr(brain.hparams, "early_stopping", None)
        if stopping is not None:
            self.stopped = stopping.update(_pick(metrics, stopping.metric, "early_stopping"))
            if self.stopped:
                logger.info("stopping early: %s has not improved", stopping.metric)
        self.phase = "done"
        if self.checkpointer is not None and not self._save_waiting():
            self.save(metrics, end_of_epoch=True)
        return self.stopped or self._limit_reached()

    def _limit_reached(self) -> bool:
        limit = self.brain.options.optimizer_step_limit
        return limit is not None and self.brain.optimizer_step >= limit

    # --------------------------------------------------------------------------------- checkpoints

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While it lasts, saves wait for a safe point; a run that is asked to stop saves itself."""
        if self.checkpointer is None:
            yield
            return
        self.checkpointer.hold()
        try:
            yield
        except interrupt.Interrupted as stop:
            self.save({}, end_of_epoch=False)
            logger.info("saved and stopping (%s); the same command goes on from here", stop.signal)
            raise
        finally:
            self.checkpointer.drop_waiting()

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
        if self.checkpointer is not None:
            self._save_waiting()

    def _due(self) -> bool:
        options = self.brain.options
        steps, minutes = options.checkpoint_every_steps, options.checkpoint_every_minutes
        if steps is not None and self.brain.optimizer_step - self._saved_step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    @contextmanager
    def best_weights(self, max_key: str | None, min_key: str | None) -> Iterator[None]:
        """Within it, the modules have the weights to test; after it, their own again.

        Those of the best checkpoint by a metric, or of the newest where this Brain has not trained;
        the mean of several where ``average_checkpoints`` says so; the exponential average where
        there is one.
        """
        brain = self.brain
        saved = self._weights_to_test(max_key, min_key)
        with ExitStack() as stack:
            if saved is not None:
                stack.enter_context(_swapped(brain.modules, saved))
            elif brain.weight_average is not None:
                stack.enter_context(brain.weight_average.applied(brain.modules))
            yield

    def _weights_to_test(self, max_key: str | None, min_key: str | None) -> Any:
        brain, checkpointer = self.brain, self.checkpointer
        number = brain.options.average_checkpoints
        if checkpointer is None or not checkpointer.enabled:
            return None
        if self.trained and number == 1 and not (max_key or min_key):
            return None
        found = checkpointer.find(min_key=min_key, max_key=max_key, n=None)
        path = ("modules",) if brain.options.ema_decay is None else ("weight_average", "average")
        while found:
            try:
                weights = checkpointer.average(found[:number], "brain", path)
            except ValueError as broken:
                warnings.warn(str(broken), stacklevel=2)
                found = found[number:]
                continue
            names = ", ".join(each.path.name for each in found[:number])
            logger.info("testing with the weights of %s", names)
            return weights
        if not self.trained:
            raise ValueError(
                f"there is nothing to test: this Brain has not trained, and {checkpointer.folder} "
                "has no sound checkpoint"
            )
        return None


@contextmanager
def _swapped(modules: torch.nn.Module, weights: Mapping[str, Any]) -> Iterator[None]:
    own = {name: tensor.clone() for name, tensor in modules.state_dict().items()}
    weights = {name: weights[name] for name in own if name in weights}
    state.check_modules(modules, weights)
    modules.load_state_dict(weights)
    try:
        yield
    finally:
        modules.load_state_dict(own)


def _metrics(report: StageReport) -> dict[str, Any]:
    """Loss and metrics of a stage in one mapping; several losses under their names."""
    loss = report.loss
    return {**(loss if isinstance(loss, dict) else {"loss": loss}), **report.metrics}


def _pick(metrics: Mapping[str, Any], name: str, asker: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"{asker} watches the metric {name!r}, which the stage did not give; it gave "
            f"{', '.join(metrics)}: return it from on_stage_end"
        )
    value = metrics[name]
    return float("nan") if value is None else float(value)


def _advance(schedule: Any, metrics: Mapping[str, Any]) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if getattr(schedule, "needs_metric", isinstance(schedule, plateau)):
        schedule.step(_pick(metrics, getattr(schedule, "metric", "loss"), "schedule"))
    else:
        schedule.step()
