"""What becomes of a training batch: its losses, its step, its place in averages and counts."""

from __future__ import annotations

import logging
import math
import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.attributes import Attributes
from trainer.diagnostics.layer_monitor import Off
from trainer.diagnostics.nonfinite import Off as NoForensics
from trainer.diagnostics.profiler import Profiler
from trainer.distributed import replica_check as drift
from trainer.distributed.replicate import sum_gradients
from trainer.hooks import Hooks, Stage
from trainer.keeping import Keeper
from trainer.loggers.journal import Journal
from trainer.metrics import Mean, StepReport
from trainer.optim import step
from trainer.optim.ema import WeightAverage
from trainer.optim.guard import NonFiniteError, Patience, Statistics
from trainer.optim.update import Update

logger = logging.getLogger("trainer")


class Training(Hooks):
    """The part of `Brain` that is about one batch, and about the windows that batches make."""

    device: torch.device
    updates: dict[str, Update]
    epoch: int
    step: int
    optimizer_step: int
    average: Mean
    weight_average: WeightAverage | None
    patience: Patience
    statistics: Statistics
    attributes: Attributes
    journal: Journal
    monitor: Off
    forensics: NoForensics
    profiler: Profiler
    keeper: Keeper

    def _prepare(self) -> None:
        """The state of the loop between its calls; everything public is the constructor's."""
        self._stage = Stage.TRAIN
        self._reports: list[StepReport] = []
        self._joint: list[Update] | None = None
        self._batch: Any = None
        self._weight, self._last, self.has_valid = 1.0, False, False
        self._batches = 0  # In this process and epoch.
        self._averaged: str | None = None
        self._suspects: dict[str, list[tuple[list[str], Tensor]]] = {}
        self._spent = self._spoilt = False
        self._guarded = self._by_hand = self._hand_stepped = False

    def _updates_for(self, name: str | None) -> list[Update]:
        if name is not None:
            if name not in self.updates:
                known = ", ".join(map(repr, self.updates)) or "none yet: fit makes them"
                raise ValueError(f"there is no optimizer {name!r}; this Brain has {known}")
            return [self.updates[name]]
        if self._joint is None:
            optimizers = {name: update.optimizer for name, update in self.updates.items()}
            self._joint = [self.updates[name] for name in self.freeze_optimizers(optimizers)]
            if not self._joint:
                raise ValueError(
                    "there is no optimizer to train with: give opt_class, set self.optimizer in "
                    "init_optimizers, or let freeze_optimizers leave one"
                )
        return self._joint

    @property
    def last_batch(self) -> bool:
        """Whether this is known to be the epoch's last batch, whose windows close however short.

        A recipe whose players must step in order gives it to `optimize` as ``last``.
        """
        return self._last

    def in_window(self) -> bool:
        """Whether any optimizer has an accumulation window open."""
        return any(update.window.count for update in self.updates.values())

    def _begin_batch(self, batch: Any, last: bool) -> None:
        if not self.in_window():
            self.statistics.keep()
            self._joint = None
        self._batch, self._last, self._weight = batch, last, float(self.count_examples(batch))
        if not 0.0 <= self._weight < math.inf:
            raise ValueError(
                f"count_examples returned {self._weight}; allowed: a finite number, 0 or more"
            )
        self.step += 1
        self.forensics.begin_batch()
        self._spent = False
        self._batches += 1
        self._reports, self._hand_stepped = [], False

    def _optimize(
        self,
        parts: list[tuple[list[Update], Any]],
        weight: float,
        retain_graph: bool,
        last: bool,
    ) -> StepReport:
        """All backward passes, then all steps."""
        for number, (updates, loss) in enumerate(parts, 1):
            step.accumulate(updates, loss, weight, retain_graph or number < len(parts))
            if updates[0].size > 1:
                suspect = (self.batch_ids(self._batch), loss.detach())
                self._suspects.setdefault(updates[0].name, []).append(suspect)
        found: list[StepReport] = []
        for updates, _ in parts:
            reports = step.finish(updates, weight, last)
            if reports[0].outcome != "accumulated" and updates is self._joint:
                self._joint = None
            self._note(reports)
            found += reports
        return found[0]

    def _culprits(self, name: str) -> list[str]:
        """Whom to name for a skipped window: the batches of a loss that is not finite, or all."""
        window = self._suspects.get(name) or [(self.batch_ids(self._batch), torch.zeros(()))]
        bad = [ids for ids, loss in window if not math.isfinite(loss.item())]  # Rare; syncs.
        own = list(chain(*(bad or [ids for ids, _ in window])))
        return list(chain(*distributed.gather(own)))

    def _note(self, reports: list[StepReport]) -> None:
        """Take in what became of a loss: counts, and patience where it was not finite."""
        self._reports += reports
        for report in reports:
            self.journal.note(report)
            self.monitor.take(report)
        report = reports[0]
        self._spoilt |= report.outcome == "skipped"
        if report.outcome == "skipped" and report.weight > 0:
            ids = self._culprits(report.name)
            logger.warning(
                "epoch %d, batch %d: %s of %r not finite, step skipped (batch %s)",
                self.epoch, self.step, "loss" if report.loss is None else "gradients",
                report.name, ", ".join(ids) or "without ids",
            )  # fmt: skip
            hint = self.forensics.note(report)
            if not self._spent:  # One bad batch is one, however many losses it spoils.
                self._spend(report.name, ids, hint)
        if report.outcome != "accumulated":
            self._suspects.pop(report.name, None)

    def _spend(self, name: str, ids: list[str], hint: str) -> None:
        self._spent, norm = True, self.updates[name].last_norm
        try:
            self.patience.spend(name, norm, self.epoch, self.step, ids, hint)
        except NonFiniteError:
            self.statistics.put_back()
            raise

    def _end_batch(self, loss: Any) -> None:
        """Averages, counters and log lines after `fit_batch`."""
        self._averaged = loss.name if isinstance(loss, StepReport) else None
        self._take_in(loss)
        self.forensics.settle()
        every = self.options.drift_check_every
        if every and (self._batches == 1 or self._batches % every == 0):  # As many on every rank.
            drift.check(
                dict(self.modules.named_parameters()), f"epoch {self.epoch}, batch {self.step}:"
            )
        self.journal.tick(loss.loss if isinstance(loss, StepReport) else None)
        self.profiler.step()

    def _take_in(self, loss: Any) -> None:
        """The averages, and the step if one was taken."""
        if self._spoilt:  # Only now: until here the graphs of other losses held them.
            self.statistics.put_back()
            self._spoilt = False
        outcomes = [report.outcome for report in self._reports]
        self._guarded |= bool(outcomes)
        if isinstance(loss, StepReport):
            if loss.outcome in ("stepped", "overflowed") and loss.loss is not None:
                # Loss and weight are already those of all ranks, which will be summed again.
                share = loss.weight / distributed.world_size()
                self.average.update(loss.loss, share)
                self.journal.mean.update(loss.loss, share)
        elif loss is not None and "skipped" not in outcomes:
            self.average.update(loss, self._weight)
            self.journal.mean.update(loss, self._weight)
        self.journal.examples += self._weight
        if "stepped" in outcomes or self._hand_stepped:
            self.optimizer_step += 1
            if self.weight_average is not None:
                self.weight_average.update(self.modules)
            if self.optimizer_step % self.options.log_interval == 0:
                self.average.read()  # With the line's own, which waits for the device anyway.
                self.journal.line(self.epoch, self.optimizer_step)

    def _end_training(self) -> None:
        """Step with windows that the epoch's end left open, and check that anything trained."""
        self._check_some(self.step, Stage.TRAIN)
        joint = self._joint or []
        groups = [joint, *([update] for update in self.updates.values() if update not in joint)]
        self._last, self._reports, self._weight = False, [], 0.0
        self._spent = self._hand_stepped = False
        for updates in groups:
            if any(update.window.count for update in updates):
                if self.keeper.limit_reached():  # No step more, not even a short one.
                    for update in updates:
                        update.drop()
                else:
                    self._note(step.close(updates))
        if self._reports:
            self._take_in(next((r for r in self._reports if r.name == self._averaged), None))
        self.monitor.flush()
        self.forensics.settle()
        if self._batches and not (self._guarded or self._by_hand or self.optimizer_step):
            raise ValueError(
                f"{type(self).__name__}.fit_batch ran {self._batches} times and never called "
                "self.optimize(loss, name): nothing was trained"
            )
        if distributed.world_size() > 1:
            distributed.broadcast_([b.detach() for b in self.modules.buffers()])
            if self.weight_average is not None:
                self.weight_average.copy_buffers(self.modules)

    def _check_some(self, steps: int, stage: Stage) -> None:
        """Raise ValueError where a stage had nothing to do."""
        if not steps and (stage is Stage.TRAIN or distributed.world_size() == 1):
            where = "" if stage is Stage.TEST else f" in epoch {self.epoch}"
            raise ValueError(
                f"the {stage.value} set gave no batch{where}: is it empty, or a generator, which "
                "can be read only once?"
            )

    def _on_hand_step(self, update: Update) -> None:
        """A recipe steps an optimizer itself: it may, unprotected, and ranks still stay equal."""
        self._hand_stepped = True
        if not self._by_hand:
            self._by_hand = True
            warnings.warn(
                f"{type(self).__name__}.fit_batch calls backward() and the step of {update.name!r} "
                "itself: precision, clipping, the non-finite guard and accumulation do not apply. "
                f"self.optimize(loss, {update.name!r}) in their place has all of them",
                stacklevel=4,
            )
        if distributed.world_size() > 1:
            share = 1 / distributed.world_size()
            _, had = sum_gradients(update.params, share, torch.zeros(1, device=self.device))
            for p, ranks in zip(update.params, had.tolist(), strict=True):
                p.grad = p.grad if ranks else None  # As without ranks: it does not move at all.
