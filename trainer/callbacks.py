"""Callbacks: objects that watch a run.

    class Printer(Callback):
        def on_loss(self, brain, report):
            print(report.name, report.loss)

    brain = MyBrain(modules, opt_class, callbacks=[Printer()])

A `Brain` has the callbacks of `trainer.defaults` (progress bar, loggers, report, layer monitor,
replica check, profiler), then those of ``Brain(callbacks=[…])``, of the YAML key ``callbacks`` and
of `Brain.configure_callbacks`. They are called in this order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.checkpoint import Checkpoint
    from trainer.clipping import Gradients
    from trainer.metrics import StageReport, StepReport
    from trainer.optim.step import Update
    from trainer.progress import Stage
    from trainer.samples import Samples

logger = logging.getLogger("trainer")


class Callback:
    """Base class of callbacks. Every method does nothing by default.

    A callback reads; it must not change weights, gradients or the loss. Each method says on which
    ranks it runs, and whether it may call a collective, such as
    `trainer.distributed.all_gather_json`, which every rank must then call.

    Only methods that a subclass overrides are called, so that the others cost nothing. An exception
    in a callback ends the run, and its message names the callback. After one in `on_fit_end`,
    `on_evaluate_end` or `on_exception`, the other callbacks are still called; if an exception ends
    the run already, that of the callback is only logged.

    A callback that has ``state_dict`` and ``load_state_dict`` is saved with every checkpoint, as
    a rank's own state. A resumed run calls `on_fit_start`, and within an epoch `on_stage_start`,
    before it restores this state.
    """

    def on_fit_start(self, brain: Brain) -> None:
        """Called when `Brain.fit` begins, after optimizers exist and a checkpoint was loaded.

        Runs on every rank; may call a collective.
        """

    def on_resume(self, brain: Brain) -> None:
        """Called once a checkpoint is completely restored.

        A run that resumes within an epoch calls it after `on_fit_start`, before the next batch.
        Runs on every rank; may call a collective.
        """

    def on_fit_end(self, brain: Brain) -> None:
        """Called when `Brain.fit` ends, also after an exception.

        A hook may call `fit` while another `fit` runs: starts and ends are nested then. Runs on
        every rank; must not call a collective, since one rank alone may have failed.
        """

    def on_evaluate_start(self, brain: Brain) -> None:
        """Called when `Brain.evaluate` begins, which may be within a `fit`.

        Runs on every rank; may call a collective.
        """

    def on_evaluate_end(self, brain: Brain) -> None:
        """Called when `Brain.evaluate` ends, also after an exception.

        Runs on every rank; must not call a collective, since one rank alone may have failed.
        """

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        """Called before the first batch of a pass over data, after `Brain.on_stage_start`.

        Runs on every rank; may call a collective.

        Args:
            brain: the Brain that runs.
            stage: TRAIN, VALID or TEST.
            epoch: current epoch; None in a test.
            total: batches of the pass on this rank; None where unknown. A resumed pass has done
                ``brain.progress.step`` of them.
        """

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Called after a pass, with its average loss and metrics, which are equal on all ranks.

        Runs on every rank; may call a collective. Its values for `Brain.log` belong to the next
        pass.

        Args:
            brain: the Brain that runs.
            report: loss, metrics, counts and duration of the pass.
        """

    def on_batch_start(self, brain: Brain, batch: Any) -> None:
        """Called before `Brain.fit_batch`, in training only.

        Runs on every rank; may call a collective, since ranks train on equally many batches.

        Args:
            brain: the Brain that runs.
            batch: the batch, on the run's device.
        """

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        """Called after each batch of any stage.

        Runs on every rank; may call a collective in training. In evaluation ranks may have
        different numbers of batches, and it must not.

        Args:
            brain: the Brain that runs.
            stage: TRAIN, VALID or TEST.
            loss: what `Brain.fit_batch` or `Brain.evaluate_batch` returned.
        """

    def on_loss(self, brain: Brain, report: StepReport) -> None:
        """Called for each loss that went through `Brain.optimize`, with its outcome.

        Runs on every rank; must not call a collective, since a recipe may give a loss on one rank
        alone within an accumulation window.

        Args:
            brain: the Brain that runs.
            report: what `Brain.optimize` returns, of one optimizer.
        """

    def before_optimizer_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Called before a step that will be taken: gradients are measured, not yet clipped.

        Runs on every rank, with gradients that are equal on all; may call a collective.

        Args:
            brain: the Brain that runs.
            update: the optimizer with its name, schedule and clipper.
            gradients: its gradients and their norms.
        """

    def after_optimizer_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Called when the optimizer has stepped, before its gradients are released.

        Runs on every rank; may call a collective.

        Args:
            brain: the Brain that runs.
            update: the optimizer with its name, schedule and clipper.
            gradients: its gradients as they were clipped, with the norms before and after.
        """

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        """Called every ``log_interval`` optimizer steps with averages since the last call.

        Runs on every rank; may call a collective.

        Args:
            brain: the Brain that runs.
            record: step, epoch, loss, examples per second, and figures of each optimizer.
        """

    def on_samples(self, brain: Brain, samples: Samples) -> None:
        """Called by `Brain.show`.

        Runs on the ranks that call it; must not call a collective.

        Args:
            brain: the Brain that runs.
            samples: title, rows and note, with optimizer step and epoch.
        """

    def on_checkpoint(self, brain: Brain, checkpoint: Checkpoint) -> None:
        """Called after a checkpoint was saved.

        Runs on every rank; may call a collective.

        Args:
            brain: the Brain that runs.
            checkpoint: the checkpoint, whose ``path`` is its folder and ``meta`` has its metrics.
        """

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        """Called when an exception leaves the outermost `fit` or `evaluate`.

        Runs on the ranks that fail; must not call a collective.

        Args:
            brain: the Brain that runs.
            error: the exception, which is raised again afterwards.
        """


EVENTS = tuple(name for name in vars(Callback) if name.startswith(("on_", "before_", "after_")))


class CallbackList:
    """The callbacks of a Brain, in the order in which they are called.

    Attributes:
        muted: True while no callback is called, as within `Brain.sandbox`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.muted = False
        self._callbacks: list[Callback] = []
        self._methods: dict[str, list[Callable[..., None]]] = {name: [] for name in EVENTS}
        self.extend(callbacks)

    def extend(self, callbacks: Iterable[Callback]) -> None:
        """Add callbacks behind the others.

        Raises:
            ValueError: if it is not a list of `Callback`.
        """
        if isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Iterable):
            raise ValueError(
                f"callbacks is a {type(callbacks).__name__}; allowed: a list of objects of a class "
                "that derives from trainer.Callback"
            )
        for each in callbacks:
            self.append(each)

    def append(self, callback: Callback) -> None:
        """Add a callback behind the others.

        Raises:
            ValueError: if it is not a `Callback`.
        """
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks holds a {type(callback).__name__}; allowed: objects of a class that "
                "derives from trainer.Callback"
            )
        one = [name for name in ("state_dict", "load_state_dict") if hasattr(callback, name)]
        if len(one) == 1:
            logger.warning(
                "the callback %s has %s alone, so that it is not saved: it needs state_dict and "
                "load_state_dict", type(callback).__name__, one[0],
            )  # fmt: skip
        self._callbacks.append(callback)
        for name in EVENTS:
            if getattr(type(callback), name) is not getattr(Callback, name):
                self._methods[name].append(getattr(callback, name))

    def listen(self, event: str, method: Callable[..., None]) -> None:
        """Call a function at an event until `unlisten`; for callbacks that watch single steps.

        Args:
            event: name of a method of `Callback`, such as "on_loss".
            method: the function, called with the arguments of that method.
        """
        self._methods[event] = [*self._methods[event], method]

    def unlisten(self, event: str, method: Callable[..., None]) -> None:
        """Undo `listen`; may be called within the event.

        Args:
            event: name of the event.
            method: the function to remove.
        """
        self._methods[event] = [each for each in self._methods[event] if each != method]

    def call(self, event: str, *arguments: Any) -> None:
        """Call a method of every callback that overrides it.

        Args:
            event: name of the method, such as "on_loss".
            *arguments: arguments of the method.

        Raises:
            Exception: whatever a callback raises, with a note that names it.
        """
        methods = self._methods[event]
        if not methods or self.muted:
            return
        for method in methods:
            try:
                method(*arguments)
            except Exception as error:
                error.add_note(f"raised by the callback {_name(method)}")
                raise

    def call_every(self, event: str, error: BaseException | None, *arguments: Any) -> None:
        """Call a method of every callback, even if one of them raises.

        Args:
            event: name of the method, such as "on_fit_end".
            error: the exception that is being raised, if any; one of a callback is then only
                logged.
            *arguments: arguments of the method.

        Raises:
            Exception: the first one that a callback raises, with a note that names it.
        """
        first: Exception | None = None
        for method in () if self.muted else self._methods[event]:
            try:
                method(*arguments)
            except Exception as failure:
                if error is None and first is None:
                    failure.add_note(f"raised by the callback {_name(method)}")
                    first = failure
                else:
                    logger.warning(
                        "the callback %s failed (%s: %s)",
                        _name(method), type(failure).__name__, failure,
                    )  # fmt: skip
        if first is not None:
            raise first

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)


def _name(method: Callable[..., None]) -> str:
    """Return the name of a method or another callable."""
    return getattr(method, "__qualname__", repr(method))
