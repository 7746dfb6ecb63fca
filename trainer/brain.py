"""The loop: epochs, stages, batches, and the one call through which weights move.

    class Recogniser(Brain):
        def compute_forward(self, batch, stage): ...
        def compute_objectives(self, predictions, batch, stage): ...

    brain = Recogniser(modules, opt_class, hparams, run_opts, checkpointer)
    brain.fit(range(1, 11), train_set, valid_set)

A recipe with several optimizers overrides `init_optimizers` and `fit_batch`, and calls
`self.optimize(loss, name)` once a player: precision, clipping, the guard, accumulation and the sum
over ranks are the same there as here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from trainer import distributed
from trainer.attributes import Attributes
from trainer.data import make_loader
from trainer.data.feed import Feed
from trainer.diagnostics.layer_monitor import make_monitor
from trainer.diagnostics.nonfinite import make_forensics
from trainer.diagnostics.profiler import Profiler
from trainer.evaluation import best_weights
from trainer.hooks import Stage
from trainer.keeping import Keeper
from trainer.loggers.journal import Journal
from trainer.metrics import Mean, StageReport, StepReport
from trainer.optim.build import pick_device, prepare_modules, use_threads
from trainer.optim.ema import WeightAverage
from trainer.optim.guard import Patience, Statistics
from trainer.optim.precision import Precision
from trainer.optim.update import Update
from trainer.options import RunOptions
from trainer.tuner import search
from trainer.workings import Workings

logger = logging.getLogger("trainer")


class Brain(Workings):
    """Owns a run: what is trained, by which optimizers, for how long, and what is kept of it.

    Args:
        modules: networks by name; reached as ``self.modules.name``, on the run's device.
        opt_class: makes an optimizer from parameters, for the default `init_optimizers`.
        hparams: anything by name; reached as ``self.hparams.name``. Run options among them count,
            as do ``schedule`` (a factory that takes an optimizer) and ``early_stopping``;
            ``schedule`` and ``clip`` may be mappings by optimizer.
        run_opts: run options that win over ``hparams``: a mapping or a complete `RunOptions`.
        checkpointer: where and which checkpoints are kept; None keeps none.

    Attributes:
        updates: the `Update` of each optimizer by name, once ``fit`` has begun.
        epoch, step, optimizer_step: the current epoch, its batches so far, and the optimizer steps
            of the whole run.
        test_metrics: what ``on_stage_end`` returned for the last test.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module] | None = None,
        opt_class: Any = None,
        hparams: Mapping[str, Any] | None = None,
        run_opts: Mapping[str, Any] | RunOptions | None = None,
        checkpointer: Any = None,
    ) -> None:
        recipe = frozenset(vars(self))  # What a subclass set before it called this.
        self.options = RunOptions.build(hparams or {}, run_opts)
        use_threads(self.options.threads)
        self.device = pick_device(self.options.device)
        self.precision = Precision(self.options.precision, self.device)
        self.eval_precision = Precision(
            self.options.eval_precision or self.options.precision, self.device
        )
        self.hparams = SimpleNamespace(**(hparams or {}))
        self.opt_class, self.checkpointer = opt_class, checkpointer
        self.modules = prepare_modules(modules or {}, self.options).to(self.device)
        self.updates: dict[str, Update] = {}
        self.epoch, self.step, self.optimizer_step = 0, 0, 0
        self.average, self.patience = Mean(), Patience(self.options.nonfinite_patience)
        self.journal, self.profiler = Journal(self.options), Profiler(self.options)
        self.test_metrics: dict[str, Any] = {}
        self.statistics, self.monitor = Statistics(self.modules), make_monitor(self)
        self.forensics = make_forensics(self)
        self._prepare()
        self.weight_average: WeightAverage | None = None
        self.framework: frozenset[str] = frozenset()
        self.keeper = Keeper(self)
        self.attributes = Attributes(self)
        self.framework = frozenset(vars(self)) - recipe | {"optimizer", "optimizers_dict"}

    # ------------------------------------------------------------------ the loop, on one screen

    def fit(
        self,
        epoch_counter: Iterable[int],
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] | None = None,
        valid_loader_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Train for the epochs of ``epoch_counter``, validating after each; resumes by itself.

        ``train_set`` and ``valid_set`` are a Dataset (made into a loader with the kwargs), a
        DataLoader, or any iterable of batches. With ``find_clip`` or ``find_lr`` it only looks for
        settings, and ends the program by `trainer.tuner.SearchOver`.
        """
        if self.options.test_only:
            logger.info("test_only: no training")
            return
        train = self._feed(train_set, Stage.TRAIN, train_loader_kwargs, progressbar)
        valid = self._feed(valid_set, Stage.VALID, valid_loader_kwargs, progressbar, train)
        if self.options.searching:
            raise search(self, train, epoch_counter)
        with self.journal.running(), self.keeper.holding(), self.forensics:
            self._start_fit(epoch_counter, has_valid=valid is not None)
            for epoch in self.keeper.epochs(epoch_counter):
                if self.keeper.phase == "train":
                    report = self._fit_train(train, epoch)
                if valid is not None:
                    report = self._evaluate(valid, Stage.VALID, epoch)
                if self.keeper.end_epoch(report):
                    break

    def _fit_train(self, feed: Feed, epoch: int) -> StageReport:
        self.modules.train()
        self.on_stage_start(Stage.TRAIN, epoch)
        self.keeper.begin_training()
        with self.journal.stage("train", epoch, feed.begin(epoch), self.step), self.profiler:
            for batch, last in self.keeper.rest_of(feed, epoch):
                self._begin_batch(batch, last)
                loss = self.fit_batch(batch)
                self._end_batch(loss)
                if self.keeper.after_batch():
                    break
        self._end_training()
        return self._end_stage(Stage.TRAIN, self.average, epoch, self.step)

    def fit_batch(self, batch: Any) -> Any:
        """One training batch: forward, loss, and `optimize`. Override it for other orders.

        Returns what is averaged over the epoch: a `StepReport`, a scalar, or a dict of scalars.
        """
        should_step = self._last or self.closes_window()
        self.on_fit_batch_start(batch, should_step)
        with self.autocast():
            outputs = self.compute_forward(batch, Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, Stage.TRAIN)
        report = self.optimize(loss, last=self._last)
        self.on_fit_batch_end(batch, outputs, loss.detach(), should_step)
        return report

    def optimize(
        self,
        loss: Tensor | Mapping[str, Tensor],
        name: str | None = None,
        weight: float | None = None,
        retain_graph: bool = False,
        last: bool = False,
    ) -> StepReport:
        """Take a loss to a step: scale, backward, and where the window is full unscale, measure,
        guard, clip, step, schedule and zero. The only way in which weights move.

        Args:
            loss: a scalar with a graph, the mean over ``weight`` examples; or one for each of
                several optimizers by name, all of which go backward before any of them steps.
            name: which optimizer; None for all that `freeze_optimizers` leaves, together.
            weight: the examples that the loss is a mean over; by default those of the batch.
            retain_graph: keep the graph for another loss that shares it.
            last: close the accumulation window even if it is not full.

        Returns the report of the first optimizer.
        Raises ValueError for an unknown name, something else than a scalar, or a loss without a
        graph; NonFiniteError when patience has run out.
        """
        losses = loss.items() if isinstance(loss, Mapping) else [(name, loss)]
        parts = [(self._updates_for(each), part) for each, part in losses]
        weight = self._weight if weight is None else float(weight)
        return self._optimize(parts, weight, retain_graph, last)

    def _evaluate(self, feed: Feed, stage: Stage, epoch: int | None) -> StageReport:
        mean, steps, examples = Mean(), 0, 0.0
        with self._evaluating(stage):
            self.on_stage_start(stage, epoch)
            with self.journal.stage(stage.value, epoch, feed.length(), 0):
                for batch, _ in self.keeper.until_stopped(feed.from_batch(epoch or 0, 0)):
                    steps += 1
                    loss = self.evaluate_batch(batch, stage)
                    if loss is not None:
                        weight = self.count_examples(batch)
                        examples += weight
                        mean.update(loss, weight)
                    self.journal.tick()
            self._check_some(steps, stage)
            self._tell_lost(stage, examples - mean.weight(), examples)
            return self._end_stage(stage, mean, epoch, steps)

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        """The loss of a batch, without training."""
        with self.autocast():
            outputs = self.compute_forward(batch, stage)
            return self.compute_objectives(outputs, batch, stage).detach()

    def evaluate(
        self,
        test_set: Any,
        max_key: str | None = None,
        min_key: str | None = None,
        progressbar: bool | None = None,
        test_loader_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The average loss over ``test_set`` with the best checkpoint by a metric; changes nothing.

        With neither key the weights are those of now, or of the newest checkpoint if this Brain has
        not trained. Where ``average_checkpoints`` is above 1, the mean of so many of them is used.
        """
        feed = self._feed(test_set, Stage.TEST, test_loader_kwargs, progressbar)
        with self.journal.running(), self.keeper.testing(), best_weights(self, max_key, min_key):
            self.on_evaluate_start(max_key=max_key, min_key=min_key)
            report = self._evaluate(feed, Stage.TEST, None)
        self.test_metrics = report.metrics or {"loss": report.loss}
        return report.loss

    # ------------------------------------------------------------------------- what recipes call

    def autocast(self) -> AbstractContextManager[object]:
        """Where forward passes belong: the precision of training, or of evaluation."""
        training = self._stage is Stage.TRAIN
        return (self.precision if training else self.eval_precision).autocast()

    @contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """Within it, the parameters of these optimizers require no gradient: they are constants.

        Gradients still flow through them to what comes before. Where nothing trains, as in a test
        alone, there are no optimizers, and nothing to do.
        """
        trained = names if self.updates else ()
        params = [p for name in trained for p in self._updates_for(name)[0].params]
        for p in params:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in params:
                p.requires_grad_(True)

    def closes_window(self, name: str | None = None) -> bool:
        """Whether the next `optimize` of this optimizer steps, rather than accumulates."""
        lead = self._updates_for(name)[0]
        return lead.window.count + 1 >= lead.size

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients and open windows. `optimize` needs no call of it."""
        for update in self.updates.values():
            update.drop()
        self._suspects.clear()
        self.modules.zero_grad(set_to_none)

    def update_average(self, loss: Any, avg_loss: float) -> float:
        """A running average over the batches of an epoch, for recipes that keep one by hand.

        The epoch's own average is weighted by examples. A loss that is not finite is left out.
        """
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            return avg_loss
        return avg_loss + (value - avg_loss) / max(self.step, 1)

    def make_dataloader(self, dataset: Any, stage: Stage, **loader_kwargs: Any) -> Any:
        """Batches of a Dataset; see `trainer.data.make_loader`."""
        bad = {"on_bad": self.options.on_bad_audio, "max_bad": self.options.max_bad_audio}
        return make_loader(
            dataset,
            train=stage is Stage.TRAIN,
            seed=self.options.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            **{**bad, **loader_kwargs},
        )
