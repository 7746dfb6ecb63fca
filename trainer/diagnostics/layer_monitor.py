"""Layer monitor: a callback that measures gradients, weights and updates, and warns.

Every ``monitor_every`` steps of an optimizer it writes a record of kind "monitor": the gradient
norms of all steps since the last record, and of each layer the norms of its gradient, weights and
update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.callbacks import Callback
from trainer.clipping import Gradients, joint, norms
from trainer.diagnostics.health import Health, Step
from trainer.diagnostics.layer_norms import LayerMeter
from trainer.loggers.callback import LoggerCallback
from trainer.metrics import StageReport, StepReport
from trainer.optim.step import Update
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")


class _Monitored:
    """State of the monitor for one optimizer.

    Attributes:
        steps: steps since the last record.
        place: step and epoch of the record whose layers are still on the device, or None.
    """

    def __init__(self, update: Update, names: Mapping[int, str]) -> None:
        self.update, self.meter, self.health = (
            update,
            LayerMeter(update, names),
            Health(update.name),
        )
        self.steps: list[Step] = []
        self.place: dict[str, int] | None = None


class LayerMonitor(Callback):
    """Measure each optimizer every so many of its steps, on rank 0: gradients are equal on all.

    A step in between costs an entry in a list. A measured step costs a copy of the weights, and its
    numbers come to the host together with those of the next step.

    It stands before the `LoggerCallback`, which counts the records: `state_dict` writes the one
    that is pending.

    Args:
        every: optimizer steps between two records.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._optimizers: dict[str, _Monitored] = {}
        self._loggers: LoggerCallback | None = None
        self._idle: str | None = None  # Warning that the first record carries.

    def on_fit_start(self, brain: Brain) -> None:
        """Find the optimizers and the loggers."""
        loggers = (each for each in brain.callbacks if isinstance(each, LoggerCallback))
        self._loggers = next(loggers, None)
        if self._optimizers:
            return
        names = {id(p): name for name, p in brain.modules.named_parameters()}
        self._optimizers = {
            name: _Monitored(update, names) for name, update in brain.updates.items()
        }
        self._idle = _without_optimizer(brain)

    def before_optimizer_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Copy the weights if this step is measured."""
        each = self._optimizers[update.name]
        if len(each.steps) + 1 >= self.every:
            each.meter.begin(self._loggers is not None and self._loggers.wants_histograms)

    def after_optimizer_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Measure what the step did, without waiting for the device."""
        each = self._optimizers[update.name]
        measured = each.meter.started
        vectors: list[Tensor] = []
        if gradients.norm_after is None:  # The clipper does not know it without measuring.
            vectors.append(norms(gradients.tensors))
        clipped = len(gradients.tensors) if vectors else 0
        if measured:
            vectors.append(each.meter.finish())
        if not vectors:
            return

        def take(values: Sequence[float]) -> None:
            norm_after = joint(values[:clipped])
            if clipped and math.isfinite(norm_after):
                each.steps[-1] = each.steps[-1]._replace(norm_after=norm_after)
            if measured:
                self._write(each, values[clipped:])

        update.read_later(torch.cat(vectors), take)

    def on_loss(self, brain: Brain, report: StepReport) -> None:
        """Add a step that was taken to those since the last record."""
        if report.outcome != "stepped" or report.norm is None:
            return
        each = self._optimizers[report.name]
        step = Step(report.norm, report.norm_after, report.limit, report.clipped, report.lr)
        each.steps.append(step)
        if len(each.steps) >= self.every:
            # The step of this batch is counted at its end.
            each.place = {"step": brain.optimizer_step + 1, "epoch": brain.epoch}

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Write the pending record at the end of training."""
        if report.stage == Stage.TRAIN.value:
            self._flush()

    def state_dict(self) -> dict[str, Any]:
        """Return, by optimizer, the steps since the last record and what its health remembers."""
        self._flush()
        return {
            name: {"steps": [list(step) for step in each.steps], "health": each.health.state_dict()}
            for name, each in self._optimizers.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; optimizers that were not monitored then start anew."""
        for name, each in self._optimizers.items():
            each.update.take_deferred()
            each.place = None
            if name in state:
                each.steps = [Step(*step) for step in state[name]["steps"]]
                each.health.load_state_dict(state[name]["health"])
                self._idle = None

    def _flush(self) -> None:
        for each in self._optimizers.values():
            each.update.read_now()

    def _write(self, each: _Monitored, values: Sequence[float]) -> None:
        """Write the record of a measured step, and log new warnings."""
        steps, each.steps = each.steps, []
        place, each.place = each.place, None
        samples, layers = each.meter.samples(), each.meter.layers(values)
        if place is None:  # The step was undone before it was reported.
            return
        facts, warnings = each.health.add(steps, layers)
        if self._idle:
            warnings, self._idle = [*warnings, self._idle], None
        for warning in warnings:
            logger.warning("step %d: %s", place["step"], warning)
        if self._loggers is None:
            return
        record = {**place, "optimizers": {each.update.name: facts}, "layers": layers}
        if warnings:
            record["warnings"] = warnings
        self._loggers.scalars("monitor", record, place["step"])
        for name, sample in samples:
            self._loggers.histogram(name, sample, place["step"])


def _without_optimizer(brain: Brain) -> str | None:
    """Return a warning about parameters that require gradients and are in no optimizer."""
    owned = {id(p) for update in brain.updates.values() for p in update.all_params}
    idle = [
        name
        for name, p in brain.modules.named_parameters()
        if p.requires_grad and id(p) not in owned
    ]
    if not idle:
        return None
    more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
    return (
        f"no optimizer has {', '.join(idle[:3])}{more}: they never move. Give them to an "
        "optimizer, or say requires_grad_(False), which saves their gradients"
    )


def make_layer_monitor(brain: Brain) -> LayerMonitor | None:
    """Return the layer monitor of a Brain; None on other ranks, in a search, and if it is off."""
    options = brain.options
    if not options.monitor_every or options.searching or not distributed.is_main():
        return None
    return LayerMonitor(options.monitor_every)
