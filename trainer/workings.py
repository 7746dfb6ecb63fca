"""How a `Brain` does what its loop says: the start of a fit, evaluation, and the ends of stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trainer import distributed, seed
from trainer.data.feed import Feed, feed
from trainer.diagnostics import replay
from trainer.hooks import Stage
from trainer.metrics import Mean, StageReport
from trainer.optim.build import make_updates
from trainer.optim.ema import WeightAverage
from trainer.optim.epoch_end import agreed
from trainer.training import Training

logger = logging.getLogger("trainer")


class Workings(Training):
    """The part of `Brain` that neither its users nor its recipes call."""

    def _feed(
        self,
        source: Any,
        stage: Stage,
        options: Mapping[str, Any] | None,
        progressbar: bool | None,
        train: Feed | None = None,
    ) -> Any:
        """Batches of what was given; to overfit, those of training are for validation too."""
        self.journal.shown = self.options.progressbar if progressbar is None else progressbar
        if source is None and stage is Stage.VALID:
            return None
        if train is not None and self.options.overfit_batches:
            return train
        return feed(self, source, stage is Stage.TRAIN, stage, options or {})

    def _start_fit(self, epochs: Any, has_valid: bool) -> None:
        if not isinstance(epochs, Iterable):
            raise ValueError(
                f"the epoch_counter is {epochs!r}; allowed: an iterable of epochs, such as "
                "range(1, 11) or EpochCounter(10)"
            )
        self.has_valid = has_valid
        if not self.updates:
            self.attributes.begin()
            if distributed.world_size() > 1:  # Equal weights, different dropout.
                tensors = [*self.modules.parameters(), *self.modules.buffers()]
                distributed.broadcast_([tensor.detach() for tensor in tensors])
                seed.seed_everything(self.options.seed, distributed.rank())
            self.init_optimizers()
            self.updates = make_updates(self, self._on_hand_step)
            self.monitor.watch()
            if self.options.ema_decay is not None:
                self.weight_average = WeightAverage(self.modules, self.options.ema_decay)
        self.keeper.begin_fit()
        self.on_fit_start()
        self.keeper.fit_started()
        if self.options.replay:
            replay.run(self)

    def _tell_lost(self, stage: Stage, lost: float, examples: float) -> None:
        """Say what an average of an evaluation leaves out."""
        if lost > 0:
            logger.warning(
                "%s: the loss of %g of %g examples was not finite; the average leaves them out",
                stage.value, lost, examples,
            )  # fmt: skip

    def _end_stage(self, stage: Stage, mean: Mean, epoch: int | None, steps: int) -> StageReport:
        """The stage's average and metrics, on all ranks; its line in the log; saves that waited."""
        if stage is Stage.TRAIN:
            self.keeper.phase = "valid" if self.has_valid else "done"
        average = mean.reduce().value()
        loss = math.nan if average is None else average
        metrics = self.on_stage_end(stage, loss, epoch)
        if metrics is not None and not isinstance(metrics, Mapping):
            raise ValueError(
                f"on_stage_end returned a {type(metrics).__name__}; allowed: a mapping from names "
                "of metrics to numbers, or None"
            )
        counts = self.journal.counts if stage is Stage.TRAIN else {}
        report = StageReport(
            stage.value, epoch, loss, agreed(metrics or {}), self.optimizer_step, steps,
            mean.weight(), self.journal.stage_seconds(), **counts,
        )  # fmt: skip
        self.journal.finish(report, [update.lr for update in self.updates.values()])
        if stage is Stage.TRAIN and self.has_valid:
            self.keeper.save_waiting()
        return report

    @contextmanager
    def _evaluating(self, stage: Stage) -> Iterator[None]:
        """Evaluation changes nothing: modes and random generators are as before."""
        modes = [(module, module.training) for module in self.modules.modules()]
        generators, before = seed.rng_state(), self._stage
        self._stage = stage
        if stage is Stage.VALID:
            self.keeper.begin_validation()
        self.modules.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if self.weight_average is not None and stage is Stage.VALID:
                    stack.enter_context(self.weight_average.applied(self.modules))
                yield
        finally:
            self._stage = before
            for module, mode in modes:
                module.training = mode
            seed.set_rng_state(generators)
