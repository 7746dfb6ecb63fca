"""Layer monitor: a callback that measures gradients, weights and updates, and warns.

Every ``monitor_every`` steps of an optimizer it writes a record of kind "monitor": the gradient
norms of all steps since the last record, and of each layer the norms of its gradient, weights and
update. A layer is a module that holds parameters itself: "encoder.0.attention" is its weight and
bias, also where a parametrization, such as weight normalisation, makes the weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.callbacks import Callback
from trainer.checks import by_name
from trainer.clipping import AGC, AdaGC, AutoClip, Gradients, NormClip, ZClip, joint, norms
from trainer.diagnostics.health import (
    USUAL_CLIP_RATE,
    Health,
    LayerNorms,
    first_names,
    pack,
    rounded,
    unpack,
)
from trainer.loggers.callback import LoggerCallback
from trainer.metrics import StageReport, StepReport
from trainer.optim.step import Update
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

# Number of elements of a parameter that its histogram is made from, evenly spread.
SAMPLE_SIZE = 2048
# Clip kinds that give the norm after clipping, so that nothing is measured between records.
KINDS_WITH_NORM_AFTER = (AGC, AdaGC, AutoClip, NormClip, ZClip)


def _layer(name: str) -> str:
    """Return the name of the layer that a parameter is a part of."""
    layer, parametrized, _ = name.partition(".parametrizations.")
    return layer if parametrized else name.rpartition(".")[0] or name


class _Meter:
    """Measurements of one optimizer."""

    def __init__(self, update: Update, names: Mapping[int, str], clip_rate: float) -> None:
        self.update, self.health = update, Health(update.name, clip_rate)
        self.steps: list[StepReport] = []  # Since the last record.
        update.history = self.steps
        self.names = {
            id(p): names.get(id(p), f"{update.name}.{number}")
            for number, p in enumerate(update.all_params)
        }
        # Of the step that is measured: its parameters, copies of them from before it, and names
        # and values of its histograms. There are no copies while no step is measured.
        self.params: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.samples: list[tuple[str, Tensor]] = []
        # True if every step is measured, for the norm after clipping.
        self.always = not isinstance(update.clip, KINDS_WITH_NORM_AFTER)
        self.hooked = False  # True if the hooks of the monitor are called at the next step.

    @torch.no_grad()
    def begin(self, histograms: bool) -> None:
        """Copy the weights before a step; sample weights and gradients if ``histograms``."""
        self.params, self.samples = self.update.params, []
        self.copies = [p.detach().clone() for p in self.params]
        for p in self.params if histograms else ():
            name = self.names.get(id(p), self.update.name)
            self.samples.append((f"weights/{name}", _sample(p)))
            if p.grad is not None and not p.grad.is_sparse:
                self.samples.append((f"gradients/{name}", _sample(p.grad)))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the norms of the P updates, then of the P weights: (2 P,) on the device."""
        before, after = self.copies, [p.detach() for p in self.params]
        self.copies = []
        if self.samples:  # The copy is complete before the numbers of the next step are read.
            names, values = zip(*self.samples, strict=True)
            joined = torch.cat([each.to(values[0].device) for each in values])
            parts = joined.to("cpu", non_blocking=True).split(list(map(len, values)))
            self.samples = list(zip(names, parts, strict=True))
        torch._foreach_sub_(before, after)
        return torch.cat([norms(before), norms(after)])

    def layers(self, values: Sequence[float], grads: Mapping[int, float]) -> LayerNorms:
        """Return the norms of each layer.

        Args:
            values: what `measure` returned, as numbers.
            grads: norms of gradients, by id of the parameter.
        """
        found: dict[str, list[tuple[float | None, float, float]]] = {}
        number = len(self.params)
        for p, update, weight in zip(self.params, values[:number], values[number:], strict=True):
            name = self.names.get(id(p), self.update.name)
            layer = found.setdefault(_layer(name), [])
            layer.append((grads.get(id(p)), weight, update))
        return {layer: _join(parts) for layer, parts in found.items()}


class LayerMonitor(Callback):
    """Measure the layers of each optimizer at every ``every``-th of its steps.

    It runs on rank 0 alone, since gradients are equal on all ranks. A step in between costs an
    entry in a list. A measured step costs a copy of the weights, and its numbers come to the host
    together with those of the next step.

    It must come before the `LoggerCallback` in the list of callbacks: `state_dict` writes the
    pending record, and the `LoggerCallback` saves the number of records.

    Args:
        every: optimizer steps between two records. Of an optimizer that steps several times in a
            batch, there may be a few more.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._meters: dict[str, _Meter] = {}
        self._brain: Brain | None = None
        self._loggers: LoggerCallback | None = None
        self._idle: str | None = None  # Warning that the first record carries.

    def on_fit_start(self, brain: Brain) -> None:
        """Find the optimizers and the loggers."""
        loggers = (each for each in brain.callbacks if isinstance(each, LoggerCallback))
        self._loggers, self._brain = next(loggers, None), brain
        if self._meters:
            return
        params = dict(brain.modules.named_parameters())
        names = {id(p): name for name, p in params.items()}
        rate, known = brain.options.expected_clip_rate, list(brain.updates)
        self._meters = {
            name: _Meter(
                each, names, by_name(rate, name, known, "expected_clip_rate", USUAL_CLIP_RATE)
            )
            for name, each in brain.updates.items()
        }
        owned = {id(p) for update in brain.updates.values() for p in update.all_params}
        idle = [name for name, p in params.items() if p.requires_grad and id(p) not in owned]
        if idle:
            self._idle = (
                f"no optimizer has {first_names(idle)}: they never move. Give them to an "
                "optimizer, or call requires_grad_(False), which saves computing their gradients"
            )

    def on_batch_start(self, brain: Brain, batch: Any) -> None:
        """Hook into the next step if there is something to measure in it."""
        for meter in self._meters.values():
            due = meter.always or len(meter.steps) + 1 >= self.every
            if due == meter.hooked:
                continue
            meter.hooked, update = due, meter.update
            if due:
                update.before_step.append(self._before_step)
                update.after_step.append(self._after_step)
            else:
                update.before_step.remove(self._before_step)
                update.after_step.remove(self._after_step)

    def _before_step(self, update: Update, gradients: Gradients) -> None:
        """Copy the weights if this step is measured."""
        meter = self._meters[update.name]
        if len(meter.steps) + 1 >= self.every:
            meter.begin(self._loggers is not None and self._loggers.wants_histograms)

    def _after_step(self, update: Update, gradients: Gradients) -> None:
        """Measure what the step did, without waiting for the device."""
        meter, brain = self._meters[update.name], self._brain
        if brain is None or brain.callbacks.muted:
            meter.copies = []
            return
        # The step of this batch is counted at its end.
        place = {"step": brain.optimizer_step + 1, "epoch": brain.progress.epoch}
        grads = {id(p): norm for p, norm in zip(*update.measured, strict=True)}
        unknown = gradients.tensors if gradients.norm_after is None else []
        vectors = [norms(unknown)] if unknown else []
        if measured := bool(meter.copies):
            vectors.append(meter.measure())

        def take(values: Sequence[float]) -> None:
            norm_after = joint(values[: len(unknown)])
            if unknown and math.isfinite(norm_after):
                meter.steps[-1] = replace(meter.steps[-1], norm_after=norm_after)
            if measured:
                self._write(meter, place, meter.layers(values[len(unknown) :], grads))

        if vectors:
            update.read_later(torch.cat(vectors), take)

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Write the pending record at the end of training."""
        if report.stage == Stage.TRAIN.value:
            for meter in self._meters.values():
                meter.update.read_now()

    def state_dict(self) -> dict[str, Any]:
        """Return the steps since the last record and the state of `Health`, by optimizer."""
        for meter in self._meters.values():
            meter.update.read_now()
        return {
            name: {"steps": pack(meter.steps), "health": meter.health.state_dict()}
            for name, meter in self._meters.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; optimizers that were not monitored then start anew."""
        for name, meter in self._meters.items():
            meter.update.deferred.clear()
            meter.copies = []
            if name in state:
                meter.steps[:] = unpack(name, state[name]["steps"])
                meter.health.load_state_dict(state[name]["health"])
                self._idle = None

    def _write(self, meter: _Meter, place: dict[str, int], layers: LayerNorms) -> None:
        """Write the record of a measured step, and log new warnings."""
        facts, warnings = meter.health.add(meter.steps, layers)
        meter.steps.clear()
        if self._idle:
            warnings, self._idle = [*warnings, self._idle], None
        for warning in warnings:
            logger.warning("step %d: %s", place["step"], warning)
        if self._loggers is None:
            return
        record = {**place, "optimizers": {meter.update.name: facts}, "layers": layers}
        if warnings:
            record["warnings"] = warnings
        self._loggers.scalars("monitor", record, place["step"])
        for name, sample in meter.samples:
            self._loggers.histogram(name, sample, place["step"])


def _join(parts: list[tuple[float | None, float, float]]) -> dict[str, float | None]:
    """Return the norms of a layer from those of its parameters."""
    grads = [grad for grad, _, _ in parts if grad is not None]
    weight = math.hypot(*(weight for _, weight, _ in parts))
    update = math.hypot(*(update for _, _, update in parts))
    return {
        "grad": rounded(math.hypot(*grads)) if grads else None,
        "weight": rounded(weight),
        "update": rounded(update),
        "ratio": rounded(update / weight) if weight else None,
    }


def _sample(tensor: Tensor) -> Tensor:
    """Return at most `SAMPLE_SIZE` values, evenly spread over a tensor."""
    flat = tensor.detach().reshape(-1)
    # A whole parameter would be megabytes to copy from a GPU; a histogram needs a few thousand
    # values.
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].float()


def make_layer_monitor(brain: Brain) -> LayerMonitor | None:
    """Return the layer monitor of a Brain; None on other ranks, in a search, and if it is off."""
    options = brain.options
    if not options.monitor_every or options.searching or not distributed.is_main():
        return None
    return LayerMonitor(options.monitor_every)
