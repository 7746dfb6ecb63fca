"""The Brain: hooks, the training loop, and the one call through which weights move.

    class Recogniser(Brain):
        def compute_forward(self, batch, stage): ...
        def compute_objectives(self, predictions, batch, stage): ...

    brain = Recogniser(modules, opt_class, hparams, run_opts, checkpointer)
    brain.fit(range(1, 11), train_set, valid_set)

A recipe with several optimizers overrides `init_optimizers` and `fit_batch`, and calls
`self.optimize(loss, name)` once per player: precision, clipping, the non-finite guard, accumulation
and the sum over ranks are the same there as here.

Internals have names with two leading underscores, which Python makes private to this class: an
attribute that a subclass sets never collides with them.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from numbers import Real
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainer import defaults, distributed, seed, signals
from trainer.adapters import apply_adapters, base_parameters, drop_base
from trainer.callbacks import Callback, CallbackList
from trainer.checkpoint.frozen import FrozenBase
from trainer.checkpoint.run_state import (
    BufferState,
    RunState,
    Saver,
    Snapshot,
    StateEntry,
    TrainableState,
    copied,
)
from trainer.checkpoint.storage import Checkpoint
from trainer.checkpoint.user_state import UserAttributes, find_stateful
from trainer.data import (
    DataFeed,
    batch_ids,
    batch_sizes,
    count_examples,
    make_feed,
    make_loader,
)
from trainer.data.batch import add_advice
from trainer.devices import pick_device, prepare_modules
from trainer.distributed.announcements import NO_VOTES
from trainer.distributed.strategy import BatchGivenUp, make_strategy
from trainer.evaluation import (
    TrainingModes,
    counters_as_saved,
    evaluation_mode,
    evaluation_weights,
    gradients_kept,
    has_weights,
    modes_kept,
    warn_of_modes,
)
from trainer.metrics import RESERVED, Mean, StageReport, StepReport, TrainingMetrics, as_weight
from trainer.optim import ema, epoch_end, step
from trainer.optim.build import (
    check_early_stopping,
    connect,
    find_optimizers,
    make_updates,
    warn_of_totals,
)
from trainer.optim.ema import WeightAverage
from trainer.optim.groups import ParameterGroups
from trainer.optim.guard import (
    MEMORY_ADVICE,
    MemoryGuard,
    NonFiniteGuard,
    Tracer,
    is_out_of_memory,
)
from trainer.optim.precision import Precision
from trainer.optim.step import Update, WindowState
from trainer.options import RunOptions, given_options, warn_of_similar_names
from trainer.progress import Phase, Progress, Stage
from trainer.samples import Cell, Samples
from trainer.speechbrain_names import SETTINGS, SpeechBrainNames
from trainer.texts import first_line
from trainer.tree import plain_number

logger = logging.getLogger("trainer")

# Losses of one call of `Brain.optimize`: the optimizers that step together, and their loss.
Losses = list[tuple[list[Update], Tensor]]
Optimize = Callable[[Losses, float, bool, bool], StepReport]

# Public attributes of a Brain; all others belong to the user and are saved as state.
ATTRIBUTES = frozenset({
    "callbacks", "checkpointer", "device", "driver", "hparams", "modules", "opt_class", "optimizer",
    "optimizers_dict", "options", "progress", "test_metrics", "updates",
})  # fmt: skip

# Attributes that Brain sets itself.
OWN = ATTRIBUTES - {"optimizer", "optimizers_dict"}

# Public names that may not be set once a Brain is made, and what to do instead.
FIXED = {
    "callbacks": "use self.callbacks.append(…), Brain(callbacks=[…]) or configure_callbacks()",
    "device": "use the run option device",
    "is_last_batch": "it is known from the data; last_batch and other names are yours",
    "options": "give run_opts to the constructor",
    "progress": "set its fields, as in self.progress.epoch = 3",
    "updates": "set self.optimizer or self.optimizers_dict in init_optimizers",
}


COUNTS = ("step", "optimizer_step", "nonfinite_count")  # A subclass may set them to numbers.


class AttributeInUse(AttributeError, ValueError):
    """Error for an attribute of a subclass that would replace one of `Brain`."""


@dataclass
class FitArguments:
    """The arguments of a call of `Brain.fit`, for its driver."""

    epoch_counter: Iterable[int]
    train_set: Any
    valid_set: Any = None
    progressbar: bool | None = None
    train_loader_kwargs: Mapping[str, Any] | None = None
    valid_loader_kwargs: Mapping[str, Any] | None = None


@dataclass
class _Batch:
    """The current training batch."""

    batch: Any = None
    weight: float = 1.0
    is_last: bool = False
    reports: list[StepReport] = field(default_factory=list)
    stepped_by_hand: bool = False
    stepping: bool = False  # An optimizer may be moving weights.
    # During an override of `optimizers_step`: the optimizers, and the contents of their window.
    closing: tuple[list[Update], step.Settled] | None = None
    closed: list[StepReport] | None = None  # Reports of that call.

    def moved(self) -> bool:
        """Return True if an optimizer has stepped."""
        return self.stepped_by_hand or any(report.stepped for report in self.reports)


class Brain(SpeechBrainNames):
    """Owns a run: modules, optimizers, the training loop and its state.

    Args:
        modules: networks by name; reached as ``self.modules.name``, on the run's device.
        opt_class: makes an optimizer from parameters, for the default `init_optimizers`.
        hparams: values and objects by name; reached as ``self.hparams.name``. Run options among
            them count, as do ``schedule`` (a factory that takes an optimizer), ``param_groups``,
            ``early_stopping`` and ``callbacks``; the first two and ``clip`` may be mappings by
            optimizer.
        run_opts: run options, which win over ``hparams``: a mapping or a complete `RunOptions`.
        checkpointer: storage and retention of checkpoints; None saves none.
        callbacks: objects that watch the run, called after those that every Brain has.

    Attributes:
        modules: the networks, an ``nn.ModuleDict`` on ``device``.
        hparams: the hyperparameters, a namespace.
        options: the `RunOptions` in force.
        updates: the guarded optimizers (`trainer.optim.step.Update`) by name, once `fit` has begun.
        progress: epoch, step and the like; plain values, saved with every checkpoint.
        callbacks: the `CallbackList`.
        driver: called with this Brain and `FitArguments` in place of the loop of `fit`, as by
            ``--find_lr`` and ``--replay``; usually None.
        test_metrics: metrics of the last `evaluate`, by name.

    Raises:
        ValueError: for an option, device or module that cannot be used.
    """

    optimizers_dict: Mapping[str, torch.optim.Optimizer] | None = None

    # ----------------------------------------------------------- hooks: what a subclass overrides

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        """Return predictions for a batch; called under autocast where precision is mixed.

        Args:
            batch: a batch of the loader, on the run's device.
            stage: TRAIN, VALID or TEST.

        Returns:
            Anything that `compute_objectives` takes.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no compute_forward(batch, stage), "
            "which the default fit_batch and evaluate_batch call"
        )

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Tensor:
        """Return the loss: a scalar, the mean over what `count_examples` counts.

        Args:
            predictions: what `compute_forward` returned.
            batch: the batch of these predictions.
            stage: TRAIN, VALID or TEST; in VALID and TEST also the place to update metrics.

        Returns:
            The loss, a scalar tensor; in training with its graph.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no compute_objectives(predictions, batch, stage), "
            "which the default fit_batch and evaluate_batch call"
        )

    def init_optimizers(self) -> None:
        """Make the optimizers: by default ``opt_class`` over all parameters of ``modules``.

        Parameters that adapters have frozen are removed from every optimizer afterwards.

        An override sets ``self.optimizer``, or ``self.optimizers_dict`` with a name for each.

        Raises:
            ValueError: if ``opt_class`` makes no optimizer.
        """
        if self.opt_class is not None:
            if not callable(self.opt_class):
                raise ValueError(
                    f"opt_class is a {type(self.opt_class).__name__}; allowed: a callable that "
                    "makes an optimizer from parameters, such as partial(torch.optim.Adam, lr=1e-3)"
                )
            self.optimizer = self.opt_class(self.modules.parameters())
            if not isinstance(self.optimizer, torch.optim.Optimizer):
                raise ValueError(
                    f"opt_class has made a {type(self.optimizer).__name__}; allowed: a "
                    "torch.optim.Optimizer, or a subclass that wraps another one"
                )

    def freeze_optimizers(
        self, optimizers: dict[str, torch.optim.Optimizer]
    ) -> dict[str, torch.optim.Optimizer]:
        """Choose the optimizers that train; called at the start of every accumulation window.

        Args:
            optimizers: all of them by name.

        Returns:
            The optimizers that step at the end of the window. Parameters of the others collect no
            gradients in it.
        """
        return optimizers

    def configure_callbacks(self) -> Iterable[Callback]:
        """Return further callbacks. Called once, when the first `fit` or `evaluate` begins."""
        return ()

    def on_fit_start(self) -> None:
        """Called before the first epoch, after the last checkpoint was restored.

        A resumed run restores the saved numbers and stateful objects again after this hook, which
        undoes its changes to them. Its changes to weights and optimizers stay.
        """

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        """Called before each pass over data; the place to create metrics.

        A run that resumes within a pass calls it again and then restores the saved state, so that
        its changes do not apply twice. Create objects whose state outlives the pass earlier, in the
        constructor or in `on_fit_start`.

        Args:
            stage: TRAIN, VALID or TEST.
            epoch: current epoch; None in a test.
        """

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        """Called after each pass, on every rank.

        Args:
            stage: TRAIN, VALID or TEST.
            stage_loss: average loss over examples: a float, or a dict if `fit_batch` returns dicts.
            epoch: current epoch; None in a test.

        Returns:
            Metrics by name, such as ``{"wer": 3.2}``, or None. They are logged, and decide
            about checkpoints, schedules and early stopping.
        """

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Called by the default `fit_batch` before the forward pass.

        Args:
            batch: the batch, on the run's device.
            should_step: True if the batch closes an accumulation window.
        """

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        """Called by the default `fit_batch` after `optimize`.

        Args:
            batch: the batch, on the run's device.
            outputs: what `compute_forward` returned.
            loss: what `compute_objectives` returned, detached: a scalar tensor.
            should_step: True if the batch closed an accumulation window.
        """

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        """Called when `evaluate` begins, after the weights to evaluate were loaded.

        Args:
            max_key: metric to choose the best checkpoint by; larger is better. None for none.
            min_key: metric to choose the best checkpoint by; smaller is better. None for none.
        """

    def count_examples(self, batch: Any) -> float:
        """Return the weight of a batch in averages and windows: the count its loss is a mean over.

        By default its number of examples: the first dimension of the first tensor in a tensor,
        list, tuple or mapping; the length of a list of mappings, and of anything else.
        """
        return float(count_examples(batch))

    def batch_ids(self, batch: Any) -> list[str]:
        """Return names of the examples for messages: by default the batch's ``id``, if any."""
        return batch_ids(batch)

    # ------------------------------------------------------------------------------- construction

    def __init__(
        self,
        modules: Mapping[str, nn.Module] | None = None,
        opt_class: Any = None,
        hparams: Mapping[str, Any] | None = None,
        run_opts: Mapping[str, Any] | RunOptions | None = None,
        checkpointer: Any = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        _check_early(
            self, hparams=hparams, modules=modules, opt_class=opt_class, checkpointer=checkpointer
        )
        self.__ready = False
        if hparams is not None and not isinstance(hparams, Mapping):
            raise ValueError(
                f"hparams is a {type(hparams).__name__}; allowed: a mapping from names to values"
            )
        run_opts = given_options(run_opts)
        if run_opts is not None and not isinstance(run_opts, (Mapping, RunOptions)):
            raise ValueError(
                f"run_opts is a {type(run_opts).__name__}; allowed: a mapping from names of run "
                "options to values, or RunOptions"
            )
        warn_of_similar_names(hparams or {})
        self.options = RunOptions.build(hparams or {}, run_opts)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        self.hparams = SimpleNamespace(**(hparams or {}))
        self.__conventions = defaults.make_conventions(self)
        checkpointer = self.__conventions.checkpointer(checkpointer, self.hparams)
        distributed.join(str(pick_device(self.options.device)))
        self.device = pick_device(self.options.device)
        self.opt_class = opt_class
        self.modules = prepare_modules(modules or {}, self.options, self.device)
        apply_adapters(self.modules, getattr(self.hparams, "adapters", None))
        self.updates: dict[str, Update] = {}
        self.progress = Progress()
        self.test_metrics: dict[str, Any] = {}
        self.__precision = Precision(self.options.precision, self.device)
        self.__eval_precision = Precision(
            self.options.eval_precision or self.options.precision, self.device
        )
        self.__stage, self.__batch = Stage.TRAIN, _Batch()
        self.__replaced = False  # The modules have evaluation weights.
        self.__depth = 0  # A hook of one `fit` may call another.
        self.__in_a_stage = False
        self.__nested_fits = 0  # Number of nested fits so far.
        self.__data: DataFeed | None = None  # Training data.
        self.__data_epoch = 0  # A nested `fit` counts from the outer one's.
        self.__trained = self.__optimized = self.__stepped_by_hand = self.__configured = False
        self.__initialised = False
        self.__groups: ParameterGroups | None = None
        self.__modes = TrainingModes(self.modules)
        self.__measuring = False  # A recipe without an optimizer, where that is allowed.
        self.__own_step = type(self).optimizers_step is not Brain.optimizers_step
        self.__made_by: tuple[Any, Any] = None, None  # What made the present optimizers.
        self.__epochs_to_do: int | None = None  # Of this `fit`, when it began.
        self.__ticked = time.perf_counter()
        self.__intercept: Optimize | None = None
        self.__on_loss: Callable[[StepReport], None] | None = None
        self.__ema: WeightAverage | None = None
        self.__strategy = make_strategy()
        self.__strategy.ballot = self.__ballot
        self.__metrics = TrainingMetrics()
        self.__trainable = TrainableState(self.modules)
        self.__attributes = UserAttributes(self, self.__user_attributes)
        self.__guard = NonFiniteGuard(
            self.modules, self.options.nonfinite_patience, self.progress, self.__in_window
        )
        self.__memory = MemoryGuard(self.options.oom_patience, self.progress)
        self.__votes = NO_VOTES  # Of the last batch.
        self.__state = RunState(self.progress, self.stateful)
        self.callbacks = CallbackList(defaults.make_callbacks(self))
        for given in (getattr(self.hparams, "callbacks", None) or (), callbacks):
            self.callbacks.extend(given)
        self.__tracer = defaults.make_tracer(self) or Tracer()
        self.driver = defaults.make_driver(self)
        self.checkpointer = checkpointer
        self.__saver = Saver(checkpointer, self.__state, self.options, self.__on_saved)
        self.__ready = True

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for kind in takewhile(lambda kind: kind is not Brain, cls.__mro__):  # Mixins, too.
            if private := ", ".join(sorted(_names_of_ours(kind))):
                raise AttributeInUse(
                    f"{kind.__name__} uses {private}: in a class of this name Python takes these "
                    "for names of trainer.Brain; rename the class, or give one underscore"
                )
            for name, value in vars(kind).items():
                _check_class_attribute(cls, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_Brain__"):  # Set several times a step; `super` would be too slow.
            object.__setattr__(self, name, value)
            return
        ready = vars(self).get("_Brain__ready")  # None before the constructor, False within.
        if name in FIXED and ready is not False:
            if name == "device" and ready and _is_same_device(value, self.device):
                return
            raise AttributeInUse(f"{type(self).__name__}.{name} cannot be set: {FIXED[name]}")
        if ready and isinstance(value, SETTINGS.get(name, ())):
            raise AttributeInUse(
                f"{type(self).__name__}.{name} cannot be set: it is a run option, which takes "
                "effect where the Brain is made: give it in run_opts or hparams"
            )
        if not callable(value) and name in METHODS:
            raise AttributeInUse(_replaces_method(type(self), name, value))
        if name == "driver" and not (value is None or callable(value)):
            raise AttributeInUse(
                f"{type(self).__name__}.driver is called in place of the loop of fit; {value!r} "
                "cannot be called: choose another name for the attribute"
            )
        if name in COUNTS and (ready is None or not isinstance(value, Real)):
            raise AttributeInUse(
                f"{type(self).__name__}.{name} is a count, which begins with super().__init__(): "
                f"{value!r} cannot be set{' before it' if ready is None else ''}; choose another "
                "name for the attribute"
            )
        if name == "hparams" and ready is not None and isinstance(value, Mapping):
            value = SimpleNamespace(**value)
        elif name == "hparams" and ready is not None and not hasattr(value, "__dict__"):
            raise AttributeInUse(
                f"{type(self).__name__}.hparams holds the hyperparameters by name; {value!r} is no "
                "mapping: choose another name for the attribute"
            )
        if name in ("modules", "checkpointer") and ready:
            value = self.__exchange(name, value)
        super().__setattr__(name, value)

    def __exchange(self, name: str, value: Any) -> Any:
        """Prepare modules or a checkpointer that are set before the first `fit`."""
        if self.updates:
            raise AttributeInUse(
                f"{type(self).__name__}.{name} cannot be set once fit has begun: set it before"
            )
        if name == "checkpointer":
            value = self.__conventions.checkpointer(value, self.hparams)
            self.__saver = Saver(value, self.__state, self.options, self.__on_saved)
            return value
        modules = prepare_modules(value, self.options, self.device)
        apply_adapters(modules, getattr(self.hparams, "adapters", None))
        self.__trainable = TrainableState(modules)
        self.__guard = NonFiniteGuard(
            modules, self.options.nonfinite_patience, self.progress, self.__in_window
        )
        return modules

    # ----------------------------------------------------------------------------------- the loop

    def fit(
        self,
        epoch_counter: Iterable[int],
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] | None = None,
        valid_loader_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Train for some epochs, each with a validation at its end; resume by itself.

        A `fit` may be called within a hook of another one: it trains the same weights, and the
        outer one then goes on exactly where it was, its open accumulation window included. A
        request to stop waits for the outer one's next batch, after which it can resume. When a
        resumed run calls a hook again, a `fit` within it does nothing.

        Args:
            epoch_counter: numbers of the epochs, such as ``range(1, 11)`` or an `EpochCounter`.
            train_set: a Dataset (made into a loader with the kwargs), a DataLoader, or any iterable
                of batches.
            valid_set: the same, for validation; None for none.
            progressbar: show a bar; None for the run option.
            train_loader_kwargs: arguments of `make_dataloader` for a training Dataset.
            valid_loader_kwargs: arguments of `make_dataloader` for a validation Dataset.

        Raises:
            ValueError: for arguments that cannot be used.
            ValueError: in an evaluation with other weights than those of training, and within an
                optimizer step.
            NonFiniteError: after more skipped steps in an epoch than ``nonfinite_patience``.
        """
        if self.options.test_only:
            logger.info("test_only: no training")
            return
        arguments = FitArguments(
            epoch_counter, train_set, valid_set, progressbar, train_loader_kwargs,
            valid_loader_kwargs,
        )  # fmt: skip
        self.__configure_callbacks()
        self.__initialise()
        if self.driver is not None and not self.__depth:
            self.driver(self, arguments)
            return
        if self.__depth and self.__state.restoring:
            logger.info("a fit in a hook ended before the checkpoint: nothing to do")
            return
        with self.__fitting() as stack:
            train, valid = self.__feeds(arguments)
            if self.__depth == 1:
                self.__data = train
            self.__prepare(epoch_counter, self.__saver.recover)
            if self.__depth == 1:
                self.__epochs_to_do = _length(epoch_counter)
            stack.push(self.__telling_end("on_fit_end"))
            self.__start()
            for epoch in self.__epochs(epoch_counter, valid is not None):
                if self.progress.phase == "train":
                    report = self.__train(train, epoch, "valid" if valid is not None else "done")
                if valid is not None:
                    report = self.__evaluate(valid, Stage.VALID, epoch)
                if self.__end_epoch(report):
                    break
            if self.__depth == 1 and any(distributed.any_rank(signals.requested() is not None)):
                signals.raise_agreed()  # The next check may be a long time away.

    def __train(self, feed: DataFeed, epoch: int, then: Phase) -> StageReport:
        """Train on the rest of an epoch; ``then`` is the phase that follows."""
        progress, started = self.progress, time.perf_counter()
        with self.__in_stage(Stage.TRAIN):
            if progress.step == 0:
                self.__metrics.begin_logging(Stage.TRAIN.value)
            resumed, total = self.__begin_training(feed)
            data_epoch = self.__data_epoch
            if self.__depth == 1:
                self.__state.enter_epoch(epoch, total)
                if not self.options.debug:
                    warn_of_totals(
                        self.updates.values(), self.__epochs_to_do, total,
                        self.options.optimizer_step_limit,
                    )  # fmt: skip
            restored = Snapshot(self.progress, self.__callback_state) if resumed else None
            self.callbacks.call("on_stage_start", self, Stage.TRAIN, epoch, total)
            if restored is not None:  # The stage had begun before it was saved.
                restored.restore()
            self.__metrics.start_clock()
            ended = self.__limit_reached()
            batches = () if ended else feed.from_batch(data_epoch, progress.step)
            done = 0  # In this process.
            with distributed.watch_for_hangs(
                self.options.hang_timeout, lambda: (progress.epoch, progress.step)
            ):
                for batch, is_last in self.__awaited(feed, batches, self.__depth == 1):
                    before = progress.optimizer_step
                    self.train_batch(batch, is_last)
                    done += 1
                    if before < progress.optimizer_step and self.__logs():
                        feed.judge_bad(at_end=False)
                    if self.__after_batch():
                        break
            self.__metrics.stop_clock()
            bad = feed.judge_bad()
            self.__close_windows(done)
            progress.phase = then
            average = self.__metrics.average
            return self.__end_stage(Stage.TRAIN, average, epoch, progress.step, started, bad)

    def train_batch(self, batch: Any, is_last: bool = False) -> Any:
        """Train on one batch as `fit` does: `fit_batch`, averages, counters and callbacks.

        If memory runs out on any rank, all ranks give up the batch and drop the open accumulation
        windows.

        Args:
            batch: a batch on the run's device.
            is_last: True if it is the last of its epoch.

        Returns:
            What `fit_batch` returned; None for a batch that was given up.

        Raises:
            torch.OutOfMemoryError: after more such batches in a row than ``oom_patience``, or if
                an optimizer has stepped in this batch already.
        """
        progress, guard = self.progress, self.__guard
        groups = self.__groups
        if groups is not None and groups.begin_window(self.updates, progress.optimizer_step):
            self.__modes.unfreeze(self.__trained_parameters())
        opens_window = not self.__in_window()
        if opens_window:
            guard.begin_window()
            progress.joint = None
        weight = self.__weigh(batch)
        progress.step += 1
        progress.counted_by_hand = False
        outer, self.__batch = self.__batch, _Batch(batch, weight, is_last)
        try:
            guard.begin_batch()
            self.__tracer.begin_batch(batch, is_last, opens_window)
            self.callbacks.call("on_batch_start", self, batch)
            loss = self.__fit_or_give_up(batch)
            if not self.__votes.gave_up:
                progress.out_of_memory_count = 0
                progress.averaged = loss.name if isinstance(loss, StepReport) else None
                self.__account(loss, self.__batch)
            self.__tracer.end_batch()
            self.callbacks.call("on_batch_end", self, Stage.TRAIN, loss)
        except BaseException as error:
            if isinstance(error, (TypeError, AttributeError)):
                add_advice(error, batch)
            if not self.__batch.moved():
                guard.roll_back()  # The batch may have put NaN into buffers.
            raise
        finally:
            self.__batch = outer
        return loss

    def fit_batch(self, batch: Any) -> Any:
        """Train on one batch: forward, loss and `optimize`. Override it for several optimizers.

        Returns:
            The value to average over the epoch: a `StepReport`, a scalar, or a dict of scalars.
        """
        last = self.is_last_batch
        should_step = last or self.closes_window()
        self.on_fit_batch_start(batch, should_step)
        with self.autocast():
            outputs = self.compute_forward(batch, Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, Stage.TRAIN)
        if self.__measuring:
            report: Any = loss.detach()
        else:
            report = self.optimize(loss, last=last)
        self.on_fit_batch_end(batch, outputs, loss.detach(), should_step)
        return report

    def optimize(
        self,
        loss: Tensor | Mapping[str, Tensor],
        name: str | None = None,
        weight: float | Tensor | None = None,
        retain_graph: bool = False,
        last: bool = False,
    ) -> StepReport:
        """Backpropagate a loss and step its optimizer; the only method that moves weights.

        The loss is scaled and backpropagated. When the accumulation window is full, gradients are
        unscaled, measured, guarded and clipped, and the optimizer steps.

        Args:
            loss: a scalar with a graph, the mean over ``weight`` examples; or a mapping from names
                of optimizers to such scalars, all backpropagated before any optimizer steps.
            name: name of the optimizer; None for all that `freeze_optimizers` leaves, together.
            weight: number of examples that the loss is a mean over; by default the batch's. A
                scalar tensor on the device is not waited for; where it is 0, the loss must be
                finite.
            retain_graph: keep the graph for another loss that shares it.
            last: close the accumulation window even if it is not full.

        Returns:
            The report of the first optimizer.

        Raises:
            ValueError: for an unknown name, and for a loss that is no scalar or has no graph.
            NonFiniteError: after more skipped steps in an epoch than ``nonfinite_patience``.
        """
        losses = dict(loss).items() if isinstance(loss, Mapping) else [(name, loss)]
        parts = [(self.__updates_for(each), part) for each, part in losses]
        if weight is None:
            weight = self.__batch.weight
        elif not isinstance(weight, Tensor):
            weight = float(weight)
        if self.__intercept is not None:
            return self.__intercept(parts, float(weight), retain_graph, last)
        found: list[StepReport] = []
        try:
            if self.__strategy.communicates:
                closing = [updates for updates, _ in parts if step.closes(updates, last)]
                if closing:
                    names = [[each.name for each in updates] for updates in closing]
                    self.__strategy.announce(names)
            for number, (updates, part) in enumerate(parts, 1):
                step.accumulate(updates, part, weight, retain_graph or number < len(parts), last)
                if updates[0].size > 1:
                    ids = self.batch_ids(self.__batch.batch)
                    self.__guard.add_loss(updates[0].name, ids, part)
            for (each, _), (updates, _) in zip(losses, parts, strict=True):
                reports = self.__finish(updates, weight, last)
                if each is None and reports[0].outcome != "accumulated":
                    self.progress.joint = None
                self.__take_reports(reports)
                found += reports
        except (RuntimeError, MemoryError) as error:
            if self.__batch.batch is None or not is_out_of_memory(error):
                raise
            # A recipe's own handling of errors must not catch this one: other ranks wait for an
            # answer, and some weights may have moved.
            raise BatchGivenUp from error
        return found[0]

    def optimizers_step(self) -> None:
        """Step the optimizers that `freeze_optimizers` returned; `optimize` calls this, too.

        An override decides about the step where an accumulation window closes: it may do something
        before and after ``super().optimizers_step()``, or step otherwise. The gradients are means
        over the window, on all ranks, without the fp16 scale. A `fit_batch` that calls
        ``backward()`` itself calls it to have its gradients clipped and checked.
        """
        batch = self.__batch
        if batch.closing:
            batch.closed = step.close(*batch.closing)
        elif not self.__measuring:
            updates = self.__updates_for(None)
            for update in updates:
                self.__strategy.average(update.name)
            self.__optimized = True
            if step.step_by_gradients(updates):
                batch.stepped_by_hand = True
            else:
                self.progress.nonfinite_count += 1

    def __finish(
        self, updates: list[Update], weight: float | Tensor, last: bool
    ) -> list[StepReport]:
        """Step if the window is full or ``last``, through `optimizers_step` if overridden."""
        if updates[0].window.count < updates[0].size and not last:
            return step.finish(updates, weight)
        batch = self.__batch
        batch.stepping = True
        settled = step.settle(updates)
        if not self.__own_step:
            try:
                return step.close(updates, settled)
            except step.NoGradientError as error:
                self.__conventions.step_without_gradients(error)
                return step.leave(updates, settled)
        batch.closing, batch.closed = (updates, settled), None
        try:
            self.optimizers_step()
        finally:
            batch.closing = None
        return step.leave(updates, settled) if batch.closed is None else batch.closed

    def evaluate(
        self,
        test_set: Any,
        max_key: str | None = None,
        min_key: str | None = None,
        progressbar: bool | None = None,
        test_loader_kwargs: Mapping[str, Any] | None = None,
        keep_weights: bool = False,
    ) -> Any:
        """Return the average loss of the best checkpoint over data; leave the Brain as it was.

        Without a key the weights are the present ones, or those of the newest checkpoint if this
        Brain has not trained. With ``average_checkpoints`` above 1, the mean of that many
        checkpoints is used.

        Args:
            test_set: a Dataset, a DataLoader, or any iterable of batches.
            max_key: metric to choose the best checkpoint by; larger is better.
            min_key: metric to choose the best checkpoint by; smaller is better.
            progressbar: show a bar; None for the run option.
            test_loader_kwargs: arguments of `make_dataloader` for a Dataset.
            keep_weights: leave the tested weights in the modules, as SpeechBrain does;
                later training goes on with them.

        Returns:
            The average loss over examples, a float; a dict by name if `evaluate_batch` returns one.

        Raises:
            ValueError: if there is nothing to test.
        """
        self.__configure_callbacks()
        self.__initialise()
        tested = None
        with ExitStack() as stack:
            if not self.__depth:
                stack.enter_context(self.__reporting_exceptions())
            feed = self.__feed(test_set, Stage.TEST, test_loader_kwargs)
            self.__show_progress(progressbar)
            own = stack.enter_context(self.__weights_of_run_kept())
            if not self.__depth:
                stack.enter_context(self.__saver.testing(self.__trained))
                signals.set_limit(self.options.max_hours)
                if distributed.world_size() > 1:  # All ranks stop after the same batch.
                    stack.enter_context(signals.at_safe_points())
            stack.enter_context(self.best_weights(max_key, min_key))
            stack.enter_context(self.__outside_stages())
            stack.push(self.__telling_end("on_evaluate_end"))
            self.callbacks.call("on_evaluate_start", self)
            placed = copied(self.modules.state_dict()) if own is not None else {}
            self.on_evaluate_start(max_key=max_key, min_key=min_key)
            report = self.__evaluate(feed, Stage.TEST, None)
            if own is not None and not self.__depth and not has_weights(self.modules, placed):
                self.__state.weights_of_run = own  # A waiting save must not get the tested weights.
                self.__saver.release()
                self.__state.weights_of_run = None
            if keep_weights:
                tested = copied(self.modules.state_dict())
        if tested is not None:
            self.modules.load_state_dict(tested)
        self.test_metrics = report.metrics or {"loss": report.loss}
        return report.loss

    @contextmanager
    def __weights_of_run_kept(self) -> Iterator[dict[str, Any] | None]:
        """Context manager that undoes a test hook's changes of weights; yields the run's own."""
        if not self.__trained or type(self).on_evaluate_start is Brain.on_evaluate_start:
            yield None
            return
        own = copied(self.modules.state_dict())
        try:
            yield own
        finally:
            self.__state.weights_of_run = None
            self.modules.load_state_dict(own)

    def __evaluate(self, feed: DataFeed, stage: Stage, epoch: int | None) -> StageReport:
        mean, steps, examples, started = Mean(), 0, 0.0, time.perf_counter()
        shares = distributed.world_size() if self.__conventions.whole else 1
        fits, outermost = self.__nested_fits, stage is Stage.VALID and self.__depth == 1
        with self.__in_stage(stage), distributed.pause(), ExitStack() as stack:
            if outermost:
                # A run interrupted in a validation resumes at its start.
                before = Snapshot(self.progress, self.__hook_state)
                stack.enter_context(before.restored_after(signals.Interrupted))
            stack.enter_context(evaluation_mode(self.modules))
            stack.enter_context(self.__metrics.evaluation_logged(stage.value))
            if self.__ema is not None and stage is Stage.VALID:
                stack.enter_context(self.__ema.applied(self.modules))
                stack.enter_context(self.__weights_replaced(True))
            self.on_stage_start(stage, epoch)
            self.callbacks.call("on_stage_start", self, stage, epoch, feed.length())

            def may_stop() -> bool:
                # An evaluation in a hook of `fit` runs to its end, since the hook cannot be
                # resumed, and so does one whose hooks have moved weights.
                return not self.__depth or (outermost and fits == self.__nested_fits)

            batches = self.__awaited(feed, feed.from_batch(epoch or 0, 0), may_stop())
            for batch, _ in self.__until_stopped(batches, may_stop):
                steps += 1
                try:
                    loss = self.evaluate_batch(batch, stage)
                except (TypeError, AttributeError) as error:
                    add_advice(error, batch)
                    raise
                if loss is not None:
                    weight = self.__weigh(batch) / shares
                    examples += weight
                    mean.update(loss, weight)
                self.callbacks.call("on_batch_end", self, stage, loss)
            bad = feed.judge_bad()
            self.__check_some(steps, stage)
            lost = examples - mean.weight()
            if lost > 0:
                logger.warning(
                    "%s: the loss of %g of %g examples was not finite; the average leaves them out",
                    stage.value, lost, examples,
                )  # fmt: skip
            return self.__end_stage(stage, mean, epoch, steps, started, bad)

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        """Return the loss of a batch, without training.

        Args:
            batch: a batch on the run's device.
            stage: VALID or TEST.

        Returns:
            The value to average over the pass: a scalar or a dict of scalars; None is left out.
        """
        with self.autocast():
            outputs = self.compute_forward(batch, stage)
            return self.compute_objectives(outputs, batch, stage).detach()

    # ------------------------------------------------------------------------- what recipes call

    def log(self, name: str, value: float | Tensor, weight: float = 1.0) -> None:
        """Log a value; may be called in any hook.

        The values of a stage are averaged by weight over the stage and over ranks; a value logged
        between two stages belongs to the second. The average is among the metrics of the stage: in
        its line, in the loggers, and for ``keep_best``. A value counts even if the step of its
        batch is skipped.

        Args:
            name: name of the metric.
            value: a number or a scalar tensor, which is not read before the stage ends.
            weight: number of examples that the value is a mean over.

        Raises:
            ValueError: for a value that is no scalar, and for a name that cannot be one.
        """
        if not isinstance(name, str) or not name or name in RESERVED:
            raise ValueError(
                f"log got the name {name!r}; allowed: any text but {', '.join(RESERVED)}, which "
                "every stage line uses already"
            )
        stage = self.__stage.value if self.__in_a_stage else ""
        self.__metrics.log(stage, name, value, weight)

    def show(self, title: str, rows: Sequence[Mapping[str, Cell]], note: str = "") -> None:
        """Show samples in the report of the run and in the loggers.

        The run folder keeps the latest rows of each title, at most 20. Only rank 0 records samples.
        Without a run folder nothing is recorded.

        Args:
            title: name of the set, such as "test" or "valid".
            rows: for each row a mapping from names to cells: texts, numbers, and the classes of
                `trainer.samples` (sounds, pictures, aligned words, matrices, histograms). The cell
                "id" is the heading of its row.
            note: a sentence above the rows.
        """
        epoch = None if self.__stage is Stage.TEST else self.progress.epoch
        step = self.progress.optimizer_step
        self.callbacks.call("on_samples", self, Samples(title, rows, step, epoch, note=note))

    def autocast(self, stage: Stage | None = None) -> AbstractContextManager[object]:
        """Return the autocast context manager for a forward pass.

        Args:
            stage: TRAIN for the precision of training, anything else for that of evaluation; None
                for the present stage.
        """
        training = self.__stage is Stage.TRAIN if stage is None else stage == Stage.TRAIN
        return (self.__precision if training else self.__eval_precision).autocast()

    @property
    def is_last_batch(self) -> bool:
        """True if the present batch is known to be the last of its epoch.

        The default `fit_batch` gives it to `optimize` as ``last``, so that a short accumulation
        window steps with this batch. Windows that are still open after the last batch step then,
        in the order of the optimizers; a `fit_batch` whose players must step in another order
        gives it to `optimize`, too.
        """
        return self.__batch.is_last

    @contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """Context manager in which the parameters of these optimizers require no gradient.

        Gradients still flow through them to earlier layers. Without optimizers, as in a test alone,
        it does nothing.
        """
        trained = names if self.updates else ()
        params = [p for name in trained for p in self.__updates_for(name)[0].params]
        for p in params:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in params:
                p.requires_grad_(True)

    @contextmanager
    def best_weights(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> Iterator[None]:
        """Context manager in which the modules have the weights that `evaluate` uses.

        Args:
            max_key: metric to choose the best checkpoint by; larger is better.
            min_key: metric to choose the best checkpoint by; smaller is better.

        Raises:
            ValueError: if this Brain has not trained and there is no sound checkpoint.
        """
        weights = evaluation_weights(
            self.modules, self.__ema, self.checkpointer, self.options, self.__trained,
            max_key, min_key,
        )  # fmt: skip
        objects = vars(self.hparams).values()
        counters = counters_as_saved(self.checkpointer, objects, max_key, min_key)
        with weights as replaced, self.__weights_replaced(replaced), counters:
            yield

    def closes_window(self, name: str | None = None) -> bool:
        """Return True if the next `optimize` of this optimizer steps, rather than accumulates."""
        if self.__measuring:
            return True
        lead = self.__updates_for(name)[0]
        return lead.window.count + 1 >= lead.size

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients and open windows; `optimize` never needs it."""
        for update in self.updates.values():
            update.drop_window()
        self.__metrics.forget_windows()
        self.__guard.forget()
        self.modules.zero_grad(set_to_none)

    def update_average(self, loss: Any, avg_loss: float) -> float:
        """Return a running average over the batches of an epoch, for recipes that keep their own.

        The epoch's own average is weighted by examples. A loss that is not finite is left out.

        Args:
            loss: loss of the present batch: a number or a scalar tensor.
            avg_loss: average over the earlier batches; 0.0 before the first.
        """
        value = float(plain_number(loss))
        if not math.isfinite(value):
            return avg_loss
        return avg_loss + (value - avg_loss) / max(self.progress.step, 1)

    def make_dataloader(
        self, dataset: Any, stage: Stage, ckpt_prefix: str | None = None, **loader_kwargs: Any
    ) -> Any:
        """Return a loader of batches of a Dataset; see `trainer.data.make_loader`.

        Args:
            dataset: the dataset.
            stage: TRAIN, VALID or TEST.
            ckpt_prefix: ignored; checkpoints store the position in the data themselves.
            **loader_kwargs: arguments of `make_loader`.

        Returns:
            A `trainer.data.Loader`; any iterable of batches from an override.
        """
        bad = {"on_bad": self.options.on_bad_item, "max_bad": self.options.max_bad_item}
        train = stage == Stage.TRAIN
        whole = self.__conventions.whole and not train
        make = partial(
            make_loader,
            train=train,
            seed=self.options.seed,
            rank=0 if whole else distributed.rank(),
            world_size=1 if whole else distributed.world_size(),
        )
        options = {**bad, "timeout": self.options.item_timeout, **loader_kwargs}
        return self.__conventions.make_loader(make, dataset, train, options)

    # ---------------------------------------------------------------------------------- the state

    def stateful(self) -> dict[str, StateEntry]:
        """Return everything that has state, besides ``progress``.

        An override may add entries to those of ``super().stateful()``. Checkpoints, nested fits,
        the tuner and replays carry them all. Entries are restored in this order.
        """
        entries = {"modules": StateEntry(self.modules, "shared", trained=True)}
        for name, update in self.updates.items():
            entries[f"optimizers.{name}"] = StateEntry(update, "shared", trained=True)
        if self.__ema is not None:
            restart = partial(self.__ema.restart, self.modules)
            entries["ema"] = StateEntry(self.__ema, "shared", trained=True, restart=restart)
        for name, part in self.__objects().items():
            networks = isinstance(part, nn.Module) and any(True for _ in part.parameters())
            entries[f"objects.{name}"] = StateEntry(
                part, "shared" if networks else "both", of_fit=name == "hparams.early_stopping"
            )
        entries["trainable"] = StateEntry(self.__trainable, "shared")
        if self.__strategy.communicates:
            entries["strategy"] = StateEntry(self.__strategy, "shared")
        entries["buffers"] = StateEntry(
            BufferState(self.modules),
            "memory" if distributed.is_main() else "rank",  # Rank 0's are saved with the modules.
        )
        for name, update in self.updates.items():
            entries[f"windows.{name}"] = StateEntry(WindowState(update, self.updates), of_fit=True)
        entries["guard"] = StateEntry(self.__guard, of_fit=True, snapshot=self.__guard.snapshot)
        entries["metrics"] = StateEntry(self.__metrics, of_fit=True)
        entries["attributes"] = StateEntry(self.__attributes, snapshot=self.__attributes.snapshot)
        for callback in self.callbacks:
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                name = key = f"callbacks.{type(callback).__name__}"
                number = 1
                while key in entries:
                    number += 1
                    key = f"{name}-{number}"
                entries[key] = StateEntry(callback)
        if self.__data is not None and self.__data.stateful is not None:
            entries["data"] = StateEntry(self.__data, snapshot=dict)
        entries["rng"] = StateEntry(seed.RngState())
        return entries

    @contextmanager
    def sandbox(
        self,
        optimize: Optimize | None = None,
        on_loss: Callable[[StepReport], None] | None = None,
        precision: str | None = None,
    ) -> Iterator[None]:
        """Context manager that restores the run's state on exit; for drivers and diagnostics.

        Within it nothing is saved, and no callback is called. It restores progress, everything in
        `stateful`, training modes and gradients.

        Args:
            optimize: called in place of the step with losses, weight, ``retain_graph`` and
                ``last``; None lets optimizers step as usual.
            on_loss: called with the report of each loss, in place of `Callback.on_loss`.
            precision: precision of forward passes in training; None for that of the run.
        """
        snapshot = Snapshot(self.progress, self.stateful)
        trained, has_optimizers = self.__trained, bool(self.updates)
        made = {n: v for n, v in vars(self).items() if n in ("optimizer", "optimizers_dict")}
        muted, intercept, tracer = self.callbacks.muted, self.__intercept, self.__tracer
        outer, self.__on_loss = (self.__on_loss, self.__precision), on_loss
        if precision is not None:
            self.__precision = Precision(precision, self.device)
        self.callbacks.muted, self.__intercept, self.__tracer = True, optimize, Tracer()
        self.__depth += 1
        try:
            with modes_kept(self.modules), gradients_kept(self.modules), self.__saver.disabled():
                self.zero_grad()
                yield
        finally:
            self.__depth -= 1
            self.callbacks.muted, self.__intercept, self.__tracer = muted, intercept, tracer
            self.__on_loss, self.__precision = outer
            if not has_optimizers:  # The first `fit` builds them.
                self.updates.clear()
                self.__ema, self.__trained = None, trained
                for name in ("optimizer", "optimizers_dict"):
                    vars(self).pop(name, None)
                vars(self).update(made)
            snapshot.restore()

    def start_training(
        self, arguments: FitArguments, recover: Callable[[], Any] | None = None
    ) -> DataFeed:
        """Do what `fit` does before its first batch; for drivers.

        Builds the optimizers, loads a checkpoint, and runs the hooks up to the first batch.

        Args:
            arguments: the arguments of `fit`.
            recover: function that loads and returns a checkpoint, or returns None; by default the
                newest is loaded.

        Returns:
            The training data, whose `DataFeed.from_batch` gives the batches.

        Raises:
            ValueError: if there is no epoch to train.
        """
        train, _ = self.__feeds(arguments)
        self.__prepare(arguments.epoch_counter, recover or self.__saver.recover)
        self.__start()
        if next(iter(self.__epochs(arguments.epoch_counter, False)), None) is None:
            raise ValueError("there is nothing to train: the epoch_counter has no epoch")
        self.__begin_training(train)
        return train

    # ---------------------------------------------------- parts of the loop, in their order of use

    def __configure_callbacks(self) -> None:
        if not self.__configured:
            self.__configured = True
            self.callbacks.extend(self.configure_callbacks())

    def __initialise(self) -> None:
        """Load the weights that a new run starts from, once."""
        options = self.options
        if self.__initialised or options.init_from is None:
            return
        self.__initialised = True
        if self.__saver.is_fresh() or options.save == "trainable":
            defaults.initialise(self.modules, options.init_from, options.init_map)
        else:
            logger.info("init_from is not read: the run goes on from its checkpoint")

    def __feeds(self, arguments: FitArguments) -> tuple[DataFeed, DataFeed | None]:
        train = self.__feed(arguments.train_set, Stage.TRAIN, arguments.train_loader_kwargs)
        valid = None
        if arguments.valid_set is not None:
            overfit = self.options.overfit_batches > 0
            valid = train if overfit else self.__feed(
                arguments.valid_set, Stage.VALID, arguments.valid_loader_kwargs
            )  # fmt: skip
        self.__show_progress(arguments.progressbar)
        return train, valid

    def __feed(self, source: Any, stage: Stage, kwargs: Mapping[str, Any] | None) -> DataFeed:
        return make_feed(
            source,
            train=stage is Stage.TRAIN,
            name=stage.value,
            device=self.device,
            options=self.options,
            make_loader=lambda dataset, **kw: self.make_dataloader(dataset, stage=stage, **kw),
            makes_datasets=type(self).make_dataloader is not Brain.make_dataloader,
            whole=stage is not Stage.TRAIN and self.__conventions.whole,
            loader_kwargs=kwargs or {},
        )

    def __show_progress(self, shown: bool | None) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "progressbar_shown"):
                callback.progressbar_shown = self.options.progressbar if shown is None else shown

    @contextmanager
    def __fitting(self) -> Iterator[ExitStack]:
        """Context manager around a `fit`, which may be within a hook of another one."""
        if self.__replaced:
            raise ValueError(
                "fit was called while the modules have the weights of an evaluation, such as "
                "averages: what it trained would be lost. Allowed: anywhere else, such as in "
                "on_stage_end of a training"
            )
        if self.__batch.stepping:
            raise ValueError(
                "fit was called within the step of an optimizer, whose gradients it would replace. "
                "Allowed: after it, such as in on_fit_batch_end"
            )
        with ExitStack() as stack:
            if self.__depth or self.__in_a_stage:
                stack.enter_context(modes_kept(self.modules))
                stack.enter_context(torch.enable_grad())
            if self.__depth:  # On exit, everything but the trained weights is restored.
                self.__nested_fits += 1
                self.__guard.settle()
                snapshot = Snapshot(self.progress, self.stateful, of_fit=True)
                stack.callback(snapshot.restore)
                stack.callback(setattr, self, "_Brain__data_epoch", self.__data_epoch)
                if self.progress.outer_epoch is None:
                    self.progress.outer_epoch = self.progress.epoch
                stack.enter_context(gradients_kept(self.modules))
                stack.callback(setattr, self.__strategy, "votes", self.__strategy.votes)
                self.__metrics.load_state_dict(TrainingMetrics().state_dict())
                self.__tick()
            else:
                stack.enter_context(self.__reporting_exceptions())
                signals.set_limit(self.options.max_hours)
                stack.enter_context(signals.at_safe_points())
                stack.enter_context(self.__saver.holding())
            stack.enter_context(self.__tracer)
            stack.enter_context(self.__outside_stages())
            self.__ticked = time.perf_counter()
            self.__depth += 1
            try:
                with ExitStack() as inner:
                    yield inner
            finally:
                self.__depth -= 1

    @contextmanager
    def __reporting_exceptions(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if is_out_of_memory(error) and MEMORY_ADVICE not in str(error):
                error.add_note(MEMORY_ADVICE)
            self.callbacks.call_every("on_exception", error, self, error)
            raise

    def __telling_end(self, event: str) -> Callable[..., None]:
        """Return the exit function of a context manager that calls the callbacks."""

        def tell(kind: object, error: BaseException | None, trace: object) -> None:
            self.callbacks.call_every(event, error, self)

        return tell

    def __prepare(self, epochs: Any, recover: Callable[[], Any]) -> None:
        """Build the optimizers, and load a checkpoint."""
        if not isinstance(epochs, Iterable):
            raise ValueError(
                f"the epoch_counter is {epochs!r}; allowed: an iterable of epochs, such as "
                "range(1, 11) or EpochCounter(10)"
            )
        progress, outermost = self.progress, self.__depth <= 1
        if not self.updates and not self.__measuring:
            self.__build_optimizers()
        elif outermost:
            self.__exchange_optimizers()
        if outermost:
            progress.fits += 1
            if progress.fits != self.__state.resumed_fit:
                progress.stopped = False
            elif progress.fits > 1:
                self.__state.load_optimizers()
            if progress.fits == 1 and (found := recover()) is not None:
                logger.info(
                    "resuming after epoch %d, batch %d (optimizer step %d) from %s",
                    progress.epoch, progress.step, progress.optimizer_step, found.path,
                )  # fmt: skip
                early_stopping = getattr(self.hparams, "early_stopping", None)
                progress.stopped &= epoch_end.still_stopped(early_stopping)
                if progress.stopped:
                    logger.info("early stopping has ended the training; more patience resumes it")
            self.__trained = True

    def __start(self) -> None:
        """Run the hooks and callbacks that precede the first epoch."""
        progress, outermost = self.progress, self.__depth <= 1
        self.callbacks.call("on_fit_start", self)
        self.on_fit_start()
        if outermost and progress.fits == self.__state.resumed_fit and self.__state.fit_started():
            self.callbacks.call("on_resume", self)

    def __build_optimizers(self) -> None:
        options, modules = self.options, self.modules
        self.__attributes.begin()
        self.__trainable.begin()
        self.__strategy.prepare(modules)
        if options.save == "trainable":
            self.__state.base = FrozenBase(modules)
        if distributed.world_size() > 1:  # Equal weights, but different dropout on each rank.
            seed.seed_everything(options.seed, distributed.rank())
        self.init_optimizers()
        optimizers, adapters = self.__optimizers(), getattr(self.hparams, "adapters", None)
        if adapters:
            drop_base(optimizers.values(), modules, adapters)
        check_early_stopping(getattr(self.hparams, "early_stopping", None))
        patterns = getattr(self.hparams, "param_groups", None)
        groups = self.__groups = None if patterns is None else ParameterGroups(patterns)
        self.__modes = TrainingModes(modules, groups.rest if groups else None)
        self.__make_updates(optimizers)
        if groups is not None:
            groups.begin_window(self.updates, self.progress.optimizer_step)
        warn_of_modes(modules, self.__trained_parameters())
        if options.ema_decay is not None:
            base = base_parameters(modules, adapters or {})
            decay = ema.decays(options.ema_decay, self.updates)
            self.__ema = WeightAverage(modules, decay, base)

    def __optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the recipe's optimizers by name, as it has them now."""
        attributes = self.__user_attributes(True)
        return find_optimizers(self.optimizers_dict, attributes, self.__precision)

    def __make_updates(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.__measuring = self.__conventions.measures and not optimizers
        if self.__measuring:
            logger.warning("no optimizer: nothing is trained by gradients, as in k-means")
        schedules = getattr(self.hparams, "schedule", None)
        kept = {n: u for n, u in self.updates.items() if optimizers.get(n) is u.optimizer}
        made = make_updates(
            optimizers, self.modules, self.options, self.__precision, schedules, self.__strategy,
            self.__on_hand_step, self.__groups, kept,
        )  # fmt: skip
        for update in self.updates.values():
            if update not in kept.values():
                update.unwatch()
        self.updates.clear()
        self.updates.update(made)
        self.__made_by = self.opt_class, schedules
        for update in made.values():
            if update not in kept.values():
                call = self.callbacks.call
                update.before_step.append(partial(call, "before_optimizer_step", self))
                update.after_step.append(partial(call, "after_optimizer_step", self))

    def __exchange_optimizers(self) -> None:
        """Take over the optimizers that the recipe has made since the last `fit`."""
        optimizers = self.__optimizers()
        if self.__trains_with(optimizers):
            if self.__made_by != (self.opt_class, getattr(self.hparams, "schedule", None)):
                logger.warning(
                    "opt_class or hparams.schedule was set after the optimizers were made, and has "
                    "no effect on them: call init_optimizers() before fit"
                )
            return
        self.zero_grad()
        self.__make_updates(optimizers)
        kinds = ", ".join(f"{n!r} ({type(o).__name__})" for n, o in optimizers.items())
        logger.info("this fit trains with new optimizers: %s", kinds)

    def __trains_with(self, optimizers: dict[str, torch.optim.Optimizer]) -> bool:
        """Return True if these optimizers are those of ``updates``."""
        return list(self.updates) == list(optimizers) and all(
            self.updates[name].optimizer is optimizer for name, optimizer in optimizers.items()
        )

    def __epochs(self, counter: Iterable[int], has_valid: bool) -> Iterator[int]:
        """Yield the epochs still to do; the first may have been begun before."""
        progress, resumed, nested = self.progress, False, self.__depth > 1
        if not nested:
            if progress.fits < self.__state.resumed_fit:
                logger.info("fit number %d has ended already: nothing to do", progress.fits)
                return
            resumed = progress.fits == self.__state.resumed_fit
        if progress.phase == "valid" and not has_valid:
            progress.phase = "done"
        if resumed and hasattr(counter, "current"):
            counter.current = progress.epoch - (progress.phase != "done")
        first = True
        for number, epoch in enumerate(counter, 1):
            self.__data_epoch = (progress.outer_epoch or 0) + number - 1 if nested else epoch
            done = progress.phase == "done"
            if progress.stopped or (self.__limit_reached() and done):
                return
            if resumed and (epoch < progress.epoch or (epoch == progress.epoch and done)):
                continue
            if not (resumed and first and epoch == progress.epoch):
                if self.__limit_reached():
                    return
                progress.epoch, progress.step, progress.phase = epoch, 0, "train"
            first = False
            yield epoch
            if self.options.debug and number >= self.options.debug_epochs:
                return

    def __begin_training(self, feed: DataFeed) -> tuple[bool, int | None]:
        """Run the stage's hook, and prepare for the first batch.

        Returns:
            True if a run resumes here; and the number of batches of the epoch, None if unknown.
        """
        self.__modes.begin(self.__trained_parameters())
        self.on_stage_start(Stage.TRAIN, self.progress.epoch)
        self.__guard.begin_stage()
        if self.progress.step == 0:
            if not self.__trains_with(self.__optimizers()):
                logger.warning(
                    "a hook has replaced the optimizers during fit, which goes on with the old "
                    "ones: replace them between two calls of fit, or change their groups"
                )
            self.zero_grad()  # Gradients that an error in an earlier epoch, or the user, left.
            self.__metrics.begin_epoch()
            self.progress.nonfinite_count = 0
            # Hooks may have added layers or loaded weights.
            connect(list(self.updates.values()), self.__named_parameters())
            # The batch around a nested `fit` may have stepped before its update of the average.
            if self.__ema is not None and not (self.__ema.count or self.__batch.moved()):
                self.__ema.restart(self.modules)
        resumed = self.__depth <= 1 and self.__state.training_started()
        if resumed:
            self.callbacks.call("on_resume", self)
        # Restored objects may choose the data.
        return resumed, feed.begin(self.__data_epoch)

    def __updates_for(self, name: str | None) -> list[Update]:
        """Return the optimizer of this name, or those that step together in this window."""
        if name is not None:
            if name not in self.updates:
                known = ", ".join(map(repr, self.updates)) or "none yet: fit makes them"
                raise ValueError(f"there is no optimizer {name!r}; this Brain has {known}")
            return [self.updates[name]]
        if self.progress.joint is None:
            optimizers = {name: update.optimizer for name, update in self.updates.items()}
            joint = list(self.freeze_optimizers(optimizers))
            if not joint:
                raise ValueError(
                    "there is no optimizer to train with: give opt_class, set self.optimizer in "
                    "init_optimizers, or let freeze_optimizers leave one"
                )
            self.progress.joint = joint
        return [self.updates[name] for name in self.progress.joint]

    def __weigh(self, batch: Any) -> float:
        """Return what `count_examples` gives for a batch."""
        return as_weight(self.count_examples(batch), "count_examples returned")

    def __fit_or_give_up(self, batch: Any) -> Any:
        """Call `fit_batch` and learn the votes of all ranks; give the batch up if one has to."""
        if self.__intercept is not None:  # One rank alone runs this.
            return self.fit_batch(batch)
        strategy, known, loss, reason = self.__strategy, self.__batch, None, None
        strategy.begin_batch()
        try:
            loss = self.fit_batch(batch)
        except BatchGivenUp as left:
            if left.__cause__ is not None:
                reason = self.__reason_to_give_up(left.__cause__)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = self.__reason_to_give_up(error)
        except ValueError as error:
            self.__explain(error)
            raise
        # Outside the handler, whose traceback keeps the tensors of the batch alive.
        if reason is not None:
            strategy.give_up_batch(
                lambda: [update.name for update in self.__updates_for(None)],
                lambda name: self.updates[name].all_params,
            )
        votes = strategy.votes
        # A rank may give up until an optimizer has stepped; a skipped step does not count.
        if votes is None or not (votes.gave_up or known.moved()):
            votes = strategy.vote()
        if votes is not self.__votes:
            self.__votes = votes
        if not votes.gave_up:
            return loss
        self.zero_grad()
        self.__guard.roll_back()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self.__metrics.counts["out_of_memory"] += 1
        self.__memory.skip(reason)
        return None

    def __explain(self, error: ValueError) -> None:
        """Explain the error of a batch norm that gets one value per channel."""
        if "Expected more than 1 value per channel" in str(error):
            ids = ", ".join(self.batch_ids(self.__batch.batch)) or "without ids"
            raise ValueError(
                f"epoch {self.progress.epoch}, batch {self.progress.step} ({ids}) has one value "
                "per channel, which has no variance for batch norm: leave out a short last "
                "batch by drop_last=True in train_loader_kwargs, or choose another batch_size"
            ) from error

    def __reason_to_give_up(self, error: BaseException) -> str:
        """Return the batch and error for the log; raise if the batch cannot be given up."""
        known, batch = self.__batch, self.__batch.batch
        ids = ", ".join(self.batch_ids(batch)) or "without ids"
        what = f"{ids}; {batch_sizes(batch)}: {first_line(error)}"
        moved = next((report.name for report in known.reports if report.stepped), None)
        why = ""
        if known.stepping:
            why = "in the step of an optimizer, which may have moved a part of the weights"
        elif moved is not None or known.stepped_by_hand:
            why = f"after an optimizer{f', {moved!r},' if moved else ''} had stepped in this batch"
        elif distributed.world_size() > 1 and any(
            isinstance(part, nn.SyncBatchNorm) for part in self.modules.modules()
        ):
            why = "and the other ranks wait for this one in a SyncBatchNorm"
        if why:
            raise torch.OutOfMemoryError(
                f"memory ran out in epoch {self.progress.epoch}, batch {self.progress.step} "
                f"({what}), {why}. The run ends; its last checkpoint is sound. {MEMORY_ADVICE}"
            ) from error
        return what

    def __take_reports(self, reports: list[StepReport]) -> None:
        """Count the outcome of a loss, and tell callbacks and the guard."""
        if not self.__optimized:
            self.__optimized = True
        self.__batch.stepping = False
        self.__batch.reports += reports
        for report in reports:
            self.__metrics.add_report(report)
            self.callbacks.call("on_loss", self, report)
            if self.__on_loss is not None:
                self.__on_loss(report)
        lead = self.updates[reports[0].name]
        if reports[0].outcome == "skipped":
            batch = self.__batch.batch  # None where an epoch's end closes a window.
            ids = list[str] if batch is None else partial(self.batch_ids, batch)
            trace = partial(self.__tracer.skipped, reports[0], self.__batch.reports)
            self.__guard.skip(reports[0], ids, lead.last_norm, trace)
        if lead.size > 1 and reports[0].outcome != "accumulated":
            self.__guard.close_window(lead.name)

    def __account(self, loss: Any, batch: _Batch) -> None:
        """Take the loss into the averages, and count a step that was taken."""
        progress, metrics = self.progress, self.__metrics
        self.__guard.settle()
        outcomes = [report.outcome for report in batch.reports]
        if isinstance(loss, StepReport):
            if loss.outcome != "skipped" and loss.loss is not None:
                # Loss and weight are sums over ranks already, and will be summed again.
                ranks = distributed.world_size() if self.__strategy.communicates else 1
                metrics.add_loss(loss.loss, loss.weight / ranks)
        elif loss is not None and "skipped" not in outcomes:
            last = {report.name: report.outcome for report in batch.reports}
            windows = [name for name, outcome in last.items() if outcome == "accumulated"]
            metrics.add_loss(loss, batch.weight, windows)
        metrics.examples += batch.weight
        if "stepped" in outcomes or batch.stepped_by_hand:
            if not progress.counted_by_hand:
                progress.optimizer_step += 1
            if self.__ema is not None:
                stepped = {report.name for report in batch.reports if report.stepped}
                moved = self.updates if batch.stepped_by_hand else stepped
                self.__ema.update(self.modules, ema.still(self.updates, moved))
            if self.__logs():
                self.__tick()
                record = metrics.record(progress.epoch, progress.optimizer_step, progress.seconds)
                self.callbacks.call("on_log", self, record)

    def __logs(self) -> bool:
        """Return True if the present optimizer step ends a logging interval."""
        return self.progress.optimizer_step % self.options.log_interval == 0

    def __after_batch(self) -> bool:
        """Save and stop where that is due; return True if the training ends here."""
        asked, due, _ = self.__votes
        if self.__depth == 1 and (asked or due or self.__saver.pending()):
            self.__tick()
            with distributed.pause():
                if due or self.__saver.due_by_steps():
                    self.__saver.save({}, end_of_epoch=False)
                self.__saver.release()
            if asked:
                signals.raise_agreed()
        return self.__limit_reached()

    def __ballot(self) -> tuple[bool, bool]:
        """Return True if this rank was asked to stop, and if it is time for it to save."""
        return signals.requested() is not None, self.__saver.due_by_time()

    def __limit_reached(self) -> bool:
        limit = self.options.optimizer_step_limit
        return limit is not None and self.progress.optimizer_step >= limit

    def __close_windows(self, done: int) -> None:
        """Step with windows that the epoch's end left open, and check that anything trained.

        Args:
            done: batches of this stage in this process.
        """
        progress = self.progress
        self.__check_some(progress.step, Stage.TRAIN)
        joint = [self.updates[name] for name in progress.joint or ()]
        groups = [joint, *([update] for update in self.updates.values() if update not in joint)]
        batch = self.__batch = _Batch(weight=0.0)
        progress.counted_by_hand = False
        self.__guard.begin_batch()
        for updates in groups:
            if any(update.window.count for update in updates):
                if self.__limit_reached():  # No further step, not even of a short window.
                    for update in updates:
                        update.drop_window()
                else:
                    self.__take_reports(self.__finish(updates, 0.0, last=True))
        if batch.reports:
            loss = next((r for r in batch.reports if r.name == progress.averaged), None)
            self.__account(loss, batch)
        self.__tracer.end_batch()
        trained = (
            self.__optimized
            or self.__stepped_by_hand
            or progress.optimizer_step
            or self.__measuring
        )
        if done and not trained and not self.__metrics.counts["out_of_memory"]:
            raise ValueError(
                f"{type(self).__name__}.fit_batch ran {done} times and never called "
                "self.optimize(loss, name): nothing was trained"
            )
        self.__strategy.share_buffers(self.modules)
        if distributed.world_size() > 1 and self.__ema is not None:
            self.__ema.copy_buffers(self.modules)

    def __check_some(self, steps: int, stage: Stage) -> None:
        if not steps and (stage is Stage.TRAIN or distributed.world_size() == 1):
            where = "" if stage is Stage.TEST else f" in epoch {self.progress.epoch}"
            raise ValueError(
                f"the {stage.value} set gave no batch{where}: is it empty, or a generator, which "
                "can be read only once?"
            )

    def __awaited(self, feed: DataFeed, batches: Iterable[Any], may_stop: bool) -> Iterator[Any]:
        """Return batches; if ``may_stop``, a request to stop ends the wait for one that hangs.

        The state is then that after the last batch; several ranks save it only if all of them wait.
        """
        if not may_stop or not feed.may_hang:
            return iter(batches)
        return self.__await(feed, batches)

    def __await(self, feed: DataFeed, batches: Iterable[Any]) -> Iterator[Any]:
        def rescue(number: int) -> None:
            if self.__stage is Stage.TRAIN and distributed.world_size() == 1:
                feed.undo_draws()
                self.__saver.save_stopped(signals.Interrupted(number))
            else:
                distributed.depart(request=number)

        wait, iterator = signals.waiting(feed.describe_wait, rescue), iter(batches)
        while True:
            try:
                with wait:
                    batch = next(iterator)
            except StopIteration:
                return
            except signals.Interrupted as stop:
                feed.undo_draws()
                if distributed.meet("stop", seconds=2.0):
                    signals.raise_agreed()
                distributed.depart(request=stop.number)
                stop.saves = False
                raise
            yield batch

    def __until_stopped(
        self, batches: Iterable[Any], may_stop: Callable[[], bool]
    ) -> Iterator[Any]:
        """Yield the batches of an evaluation, whose number may differ between ranks.

        After each batch all ranks vote on stopping, also those without further batches.
        """

        def vote(working: bool) -> bool:
            asked, working = distributed.any_rank(signals.requested() is not None, working)
            if asked and may_stop():
                signals.raise_agreed()
            return working

        for batch in batches:
            yield batch
            vote(working=True)
        while vote(working=False):
            pass

    def __end_stage(
        self, stage: Stage, mean: Mean, epoch: int | None, steps: int, started: float, bad: int
    ) -> StageReport:
        """Report average and metrics of a stage over all ranks, and do the saves that waited."""
        average = mean.reduce().value()
        loss = math.nan if average is None else average
        metrics = self.on_stage_end(stage, loss, epoch)
        if metrics is not None and not isinstance(metrics, Mapping):
            raise ValueError(
                f"on_stage_end returned a {type(metrics).__name__}; allowed: a mapping from names "
                "of metrics to numbers, or None"
            )
        logged = self.__metrics.end_stage(stage.value)
        self.__tick()
        report = StageReport(
            stage.value, epoch, loss, epoch_end.agree_on_metrics({**logged, **(metrics or {})}),
            self.progress.optimizer_step, steps, mean.weight(),
            round(time.perf_counter() - started, 3),
            **(self.__metrics.counts if stage is Stage.TRAIN else {}), bad_files=bad,
        )  # fmt: skip
        self.callbacks.call("on_stage_end", self, report)
        if self.__depth == 1 and self.progress.phase == "valid" and stage is Stage.TRAIN:
            self.__saver.release()
        return report

    def __end_epoch(self, report: StageReport) -> bool:
        """Advance schedules and early stopping, and save; return True if the training is over."""
        progress = self.progress
        metrics = epoch_end.all_metrics(report)
        epoch_end.advance_schedules(self.updates.values(), metrics)
        early_stopping = getattr(self.hparams, "early_stopping", None)
        progress.stopped = epoch_end.should_stop(early_stopping, metrics, report.epoch)
        progress.phase = "done"
        if self.__depth == 1 and not self.__saver.release():
            self.__saver.save(metrics, end_of_epoch=True)
        return progress.stopped or self.__limit_reached()

    # ----------------------------------------------------------------------------- small internals

    @contextmanager
    def __weights_replaced(self, replaced: bool) -> Iterator[None]:
        """Context manager in which the modules have temporary weights, if ``replaced``."""
        outer, self.__replaced = self.__replaced, self.__replaced or replaced
        try:
            yield
        finally:
            self.__replaced = outer

    @contextmanager
    def __in_stage(self, stage: Stage) -> Iterator[None]:
        outer = self.__stage, self.__in_a_stage, self.__batch
        self.__stage, self.__in_a_stage = stage, True
        try:
            yield
        finally:
            self.__stage, self.__in_a_stage, self.__batch = outer

    @contextmanager
    def __outside_stages(self) -> Iterator[None]:
        """Context manager for hooks before the first stage of a `fit` or an evaluation."""
        outer, self.__in_a_stage = self.__in_a_stage, False
        try:
            yield
        finally:
            self.__in_a_stage = outer

    def __tick(self) -> None:
        """Add the time since the last call to the run's training time."""
        now = time.perf_counter()
        self.progress.seconds += now - self.__ticked
        self.__ticked = now

    def __named_parameters(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.modules.named_parameters()}

    def __trained_parameters(self) -> set[Tensor]:
        return {p for update in self.updates.values() for p in update.params}

    def __in_window(self) -> bool:
        return any(map(attrgetter("window.count"), self.updates.values()))

    def __user_attributes(self, optimizers: bool = False) -> dict[str, Any]:
        """Return the attributes that are not the framework's, by name."""
        own = ("optimizer",) if optimizers else ()
        return {
            name: value
            for name, value in vars(self).items()
            if (name not in ATTRIBUTES or name in own) and not name.startswith("_Brain__")
        }

    def __objects(self) -> dict[str, Any]:
        """Return the stateful objects among hparams and users' attributes, by name."""
        own = [self, self.checkpointer, *self.modules.modules(), *self.callbacks]
        if self.__data is not None:
            own += self.__data.sources
        known = {id(part) for part in own}
        for update in self.updates.values():
            known |= {id(part) for part in (update.optimizer, update.schedule, update.clip, update)}
        named = {f"hparams.{name}": value for name, value in vars(self.hparams).items()}
        return find_stateful({**named, **self.__user_attributes()}, known, self.modules)

    def __hook_state(self) -> dict[str, StateEntry]:
        """Return the state that validation hooks may change: not networks and optimizers."""
        return {
            name: entry
            for name, entry in self.stateful().items()
            if name == "metrics"
            or entry.scope == "both"
            or not (entry.scope == "shared" or entry.of_fit or name in ("buffers", "rng"))
        }

    def __callback_state(self) -> dict[str, StateEntry]:
        """Return the entries of the callbacks."""
        return {n: e for n, e in self.stateful().items() if n.startswith("callbacks.")}

    def __on_saved(self, checkpoint: Checkpoint) -> None:
        self.callbacks.call("on_checkpoint", self, checkpoint)

    def __on_hand_step(self, update: Update) -> None:
        """Warn that a recipe steps an optimizer itself, and average its gradients over ranks."""
        self.__batch.stepped_by_hand = True
        own = self.__batch.closing is not None
        if not self.__stepped_by_hand:
            self.__stepped_by_hand = True
            warnings.warn(
                f"{type(self).__name__}.optimizers_step calls the step of {update.name!r} itself: "
                "clipping and the non-finite guard do not apply. super().optimizers_step() in its "
                "place has them"
                if own
                else f"{type(self).__name__}.fit_batch calls backward() and the step of "
                f"{update.name!r} itself: precision, clipping, the non-finite guard and "
                f"accumulation do not apply. self.optimize(loss, {update.name!r}) in their place "
                "has all of them",
                stacklevel=4,
            )
        if not own:  # Gradients of a closing window are summed over ranks already.
            self.__strategy.average(update.name)


def _length(counter: Iterable[int]) -> int | None:
    """Return the number of epochs of a counter; None if unknown."""
    if isinstance(counter, Sized):
        return len(counter)
    limit, current = getattr(counter, "limit", None), getattr(counter, "current", 0)
    return None if limit is None else limit - current


def _is_same_device(value: Any, device: torch.device) -> bool:
    try:
        other = torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return other.type == device.type and other.index in (None, device.index)


def _names_of_ours(kind: type) -> set[str]:
    """Return names that Python makes private to `Brain`, in a class that is called Brain."""
    functions = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
    own = [each for each in functions if each.__module__ != __name__]  # `fit = Brain.fit` is ours.
    used = chain(vars(kind), *(function.__code__.co_names for function in own))
    return {f"__{name.removeprefix('_Brain__')}" for name in used if name.startswith("_Brain__")}


def _check_early(brain: Brain, **given: Any) -> None:
    """Raise AttributeInUse for attributes set before the constructor, which replaces them.

    A subclass may set its arguments to read them there, if it gives them to the constructor, too.
    """
    for name in sorted(OWN & vars(brain).keys()):
        if vars(brain)[name] is not None and given.get(name) is None:
            raise AttributeInUse(
                f"{type(brain).__name__}.{name} is set by super().__init__(): set it afterwards, "
                "or give it as an argument if it is one"
            )


def _check_class_attribute(kind: type, name: str, value: Any) -> None:
    """Raise AttributeInUse for an attribute of a class that would break `Brain` or do nothing."""
    described = isinstance(value, (property, staticmethod, classmethod))
    if name in METHODS and not (described or callable(value)):
        raise AttributeInUse(_replaces_method(kind, name, value))
    if name in OWN and isinstance(value, property) and value.fset is None:
        raise AttributeInUse(
            f"{kind.__name__}.{name} is a property without a setter, and Brain sets this "
            "attribute itself: choose another name for the property"
        )
    if name in OWN | FIXED.keys() and not isinstance(value, property):
        instead = FIXED.get(name, f"super().__init__() sets it; set self.{name} afterwards")
        raise AttributeInUse(f"{kind.__name__}.{name} cannot be set in a class: {instead}")


def _replaces_method(kind: type, name: str, value: Any) -> str:
    return (
        f"{kind.__name__}.{name} is a method of Brain; {value!r} would replace it: choose another "
        "name for the attribute"
    )


METHODS = frozenset(
    name for name, value in vars(Brain).items() if not name.startswith("_") and callable(value)
)
