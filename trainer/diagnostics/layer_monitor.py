"""Layer monitor: a callback that measures gradients, weights and updates, and warns.

Every ``monitor_every`` steps of an optimizer it writes a record of kind "monitor": the gradient
norms of all steps since the last record, and the norms of the gradient, weights and update of each
layer. A layer is a module with parameters of its own: "encoder.0.attention" stands for its weight
and bias, even if a parametrization, such as weight normalisation, computes the weight.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.callbacks import Callback
from trainer.checks import by_name
from trainer.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    Gradients,
    NormClip,
    ZClip,
    joint,
    norms,
    percentile,
)
from trainer.loggers.callback import LoggerCallback
from trainer.metrics import StageReport, StepReport
from trainer.optim.step import Update
from trainer.progress import Stage
from trainer.texts import first_names

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

# Number of elements, evenly spread, in the histogram of a parameter: all of them would be megabytes
# to copy from a GPU.
SAMPLE_SIZE = 2048
# Clip kinds that provide the norm after clipping: nothing is measured between records.
KINDS_WITH_NORM_AFTER = (AGC, AdaGC, AutoClip, NormClip, ZClip)

WINDOW = 100  # Steps in shares and medians.
MIN_NORMS = 20  # Norms in the window before spikes are counted.
SPIKE_FACTOR = 4.0  # Factor above the median that makes a spike.
LARGE_NORM, LARGE_SHARE = 10.0, 0.8  # Warn if this share of the window is above this norm.
USUAL_CLIP_RATE = 0.95  # Adaptive clippers with a percentile of 10 clip 90 %.
TINY = 1e-6  # A vanishing norm, or share of the largest layer's norm.
PATIENCE = 3  # Records in a row before a warning about a layer.
GROWTH, BLOCKS = 4.0, 5  # Warn if this many medians in a row rise, by this total factor.

# By layer: norms "grad", "weight" and "update", and "ratio", which is update / weight. None without
# a gradient, or for a weight of 0.
LayerNorms = dict[str, dict[str, float | None]]


class Health:
    """Recent steps of an optimizer, and warnings about them, each given once.

    Args:
        name: name of the optimizer.
        expected_clip_rate: share of clipped steps, from 0 to 1, above which there is a warning.
            Above `USUAL_CLIP_RATE` there is no warning about large norms either.
    """

    def __init__(self, name: str, expected_clip_rate: float = USUAL_CLIP_RATE) -> None:
        self.name, self.expected_clip_rate = name, expected_clip_rate
        self._window: deque[StepReport] = deque(maxlen=WINDOW)
        self._medians: deque[float] = deque(maxlen=BLOCKS)
        # Records in a row, by layer, without a move, and with a gradient close to 0.
        self._still: dict[str, int] = {}
        self._faint: dict[str, int] = {}
        self._warned: set[str] = set()
        self._steps = 0

    def add(
        self, steps: Sequence[StepReport], layers: LayerNorms
    ) -> tuple[dict[str, Any], list[str]]:
        """Add the steps since the last record.

        Args:
            steps: reports of these steps, at least one.
            layers: norms of each layer at the last of these steps; empty if not measured.

        Returns:
            The figures to record, and new warnings.
        """
        norms, before = _norms(steps), _norms(self._window)
        usual = statistics.median(before) if len(before) >= MIN_NORMS else math.inf
        self._window.extend(steps)
        self._medians.append(statistics.median(norms))
        self._steps += len(steps)
        after = [step.norm_after for step in steps]
        facts = {
            "norms": list(map(rounded, norms)),
            "norms_after": [None if norm is None else rounded(norm) for norm in after],
            "limits": [step.limit for step in steps],  # Infinity (no limit) is null in JSON.
            "clipped_share": rounded(sum(s.clipped for s in self._window) / len(self._window)),
            "spikes": sum(norm > SPIKE_FACTOR * usual for norm in norms),
        }
        found = self._check_growth(len(steps)) | self._check_window() | self._check_layers(layers)
        new = [text for kind, text in found.items() if kind not in self._warned]
        self._warned |= found.keys()
        return facts, new

    def _check_growth(self, block: int) -> dict[str, str]:
        """Return a warning, by kind, about medians that rise with each of the last blocks."""
        medians = list(self._medians)
        rising = all(a < b for a, b in zip(medians, medians[1:], strict=False))
        if len(medians) < BLOCKS or not rising or medians[-1] < max(1.0, GROWTH * medians[0]):
            return {}
        factor = medians[-1] / medians[0] if medians[0] else math.inf
        return {
            "drift": f"the gradient norm of {self.name!r} has grown without a pause over the last "
            f"{BLOCKS * block} steps, from {medians[0]:.3g} to {medians[-1]:.3g} ({factor:.2g} "
            "times): a run usually diverges soon after. Lower the learning rate now, or "
            "lengthen its warm-up; a checkpoint from before the growth is the one to go back to"
        }

    def _check_window(self) -> dict[str, str]:
        """Return warnings by kind about the last `WINDOW` steps."""
        found: dict[str, str] = {}
        window = list(self._window)
        if len(window) < WINDOW:
            return found
        norms = sorted(_norms(window))
        middle, lr = statistics.median(norms), window[-1].lr
        large = sum(norm > LARGE_NORM for norm in norms)
        rate = "" if lr is None else f" (now {lr:.3g})"
        clipped = sum(step.clipped for step in window)
        meant = USUAL_CLIP_RATE * WINDOW < clipped <= self.expected_clip_rate * WINDOW
        if large >= LARGE_SHARE * WINDOW and not meant:
            found["large"] = (
                f"the gradient norm of {self.name!r} was above {LARGE_NORM:g} before clipping "
                f"in {large} of the last {WINDOW} steps (median {middle:.3g}). Lower the "
                f"learning rate{rate} or warm it up for longer; if the loss is a sum "
                "over frames or examples, take the mean"
            )
        too_often = clipped > self.expected_clip_rate * WINDOW
        if too_often and len({step.limit for step in window}) == 1:
            found["clipped"] = (
                f"{clipped} of the last {WINDOW} steps of {self.name!r} were clipped (limit "
                f"{window[-1].limit:g}, median norm {middle:.3g}): the limit, and not the "
                "gradient, decides how far a step goes. Raise max_grad_norm to about "
                f"{percentile(norms, 90):.2g}, the 90th percentile of these norms, or "
                "lower the learning rate if the loss jumps; if the limit is meant to be reached so "
                "often, set the run option expected_clip_rate to 1.0"
            )
        if norms[-1] < TINY:
            found["vanishing"] = (
                f"the gradient norm of {self.name!r} was below {TINY:g} in all of the last "
                f"{WINDOW} steps (median {middle:.3g}): nothing is learned any more. Look for "
                "a saturated output, dead activations, or a loss that is divided twice"
            )
        return found

    def _check_layers(self, layers: LayerNorms) -> dict[str, str]:
        """Return warnings by kind about layers that do not move or have hardly any gradient."""
        found: dict[str, str] = {}
        if not layers or self._window[-1].lr == 0:  # At a rate of 0 nothing moves.
            return found
        largest = max((each["grad"] or 0.0 for each in layers.values()), default=0.0)
        still, faint = [], []
        for layer, each in layers.items():
            grad = each["grad"]
            self._still[layer] = 0 if each["update"] else self._still.get(layer, 0) + 1
            weak = grad is not None and 0.0 < grad < TINY * largest
            self._faint[layer] = self._faint.get(layer, 0) + 1 if weak else 0
            if self._still[layer] == PATIENCE:
                cause = "no gradient" if grad is None else f"gradient {grad:.2g}"
                still.append(f"{layer} ({'its gradient is 0' if grad == 0.0 else cause})")
            elif self._faint[layer] == PATIENCE:
                faint.append(layer)
        if still:
            found[f"still {still[0]}"] = (
                f"{first_names(still)} did not move in the last {PATIENCE} records, {self._steps} "
                f"steps into the run. If the loss of {self.name!r} depends on it, look for a "
                "detach() or an unused output on the way; if it does not, freeze it by "
                "requires_grad_(False)"
            )
        if faint:
            found[f"faint {faint[0]}"] = (
                f"gradients vanish on their way to {first_names(faint)}: less than {TINY:g} of the "
                f"largest layer's arrives, {PATIENCE} records in a row. Residual connections, "
                "another initialisation, a normalisation or fewer saturating activations help"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the recent steps, counts and warnings."""
        return {
            "window": pack(self._window),
            "medians": list(self._medians),
            "still": dict(self._still),
            "faint": dict(self._faint),
            "said": sorted(self._warned),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self._window = deque(unpack(self.name, state["window"]), maxlen=WINDOW)
        self._medians = deque(state["medians"], maxlen=BLOCKS)
        self._still, self._faint = dict(state["still"]), dict(state["faint"])
        self._warned, self._steps = set(state["said"]), state["steps"]


def pack(steps: Iterable[StepReport]) -> list[list[Any]]:
    """Return reports as lists: norm, norm after clipping, limit, clipped, learning rate."""
    return [[each.norm, each.norm_after, each.limit, each.clipped, each.lr] for each in steps]


def unpack(name: str, packed: Iterable[Sequence[Any]]) -> list[StepReport]:
    """Return the reports of an optimizer's steps from a result of `pack`."""
    return [
        StepReport(name, "stepped", None, 1.0, norm, norm_after, limit, clipped, lr=lr)
        for norm, norm_after, limit, clipped, lr in packed
    ]


def _norms(steps: Iterable[StepReport]) -> list[float]:
    return [each.norm for each in steps if each.norm is not None]


def rounded(value: float) -> float:
    """Round to five digits, to keep records short."""
    return float(f"{value:.5g}")


def _layer(name: str) -> str:
    """Return the name of the layer that a parameter belongs to."""
    layer, parametrized, _ = name.partition(".parametrizations.")
    return layer if parametrized else name.rpartition(".")[0] or name


class _Meter:
    """Measurements of one optimizer."""

    def __init__(self, update: Update, clip_rate: float) -> None:
        self.update, self.health = update, Health(update.name, clip_rate)
        self.steps: list[StepReport] = []  # Steps since the last record.
        update.history = self.steps
        self.names = update.named()
        # For the measured step: its parameters, copies from before the step, and names and values
        # of its histograms. Empty between measurements.
        self.params: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.samples: list[tuple[str, Tensor]] = []
        # True if every step is measured, for the norm after clipping.
        self.always = not isinstance(update.clip, KINDS_WITH_NORM_AFTER)

    @torch.no_grad()
    def begin(self, histograms: bool) -> None:
        """Copy the weights before a step; sample weights and gradients if ``histograms``."""
        self.params, self.samples = self.update.params, []
        self.copies = [p.detach().clone() for p in self.params]
        for p in self.params if histograms else ():
            name = self.names.get(p, self.update.name)
            self.samples.append((f"weights/{name}", _sample(p)))
            if p.grad is not None and not p.grad.is_sparse:
                self.samples.append((f"gradients/{name}", _sample(p.grad)))

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Return the norms of the P updates, then of the P weights: (2 P,) on the device."""
        before, after = self.copies, [p.detach() for p in self.params]
        self.copies = []
        if self.samples:  # Copied before the numbers of the next step are read.
            names, values = zip(*self.samples, strict=True)
            joined = torch.cat([each.to(values[0].device) for each in values])
            parts = joined.to("cpu", non_blocking=True).split(list(map(len, values)))
            self.samples = list(zip(names, parts, strict=True))
        torch._foreach_sub_(before, after)
        return torch.cat([norms(before), norms(after)])

    def layers(self, values: Sequence[float], grads: Mapping[Tensor, float]) -> LayerNorms:
        """Return the norms of each layer, from the numbers of `measure` and norms of gradients."""
        found: dict[str, list[tuple[float | None, float, float]]] = {}
        number = len(self.params)
        for p, update, weight in zip(self.params, values[:number], values[number:], strict=True):
            name = self.names.get(p, self.update.name)
            found.setdefault(_layer(name), []).append((grads.get(p), weight, update))
        return {layer: _join(parts) for layer, parts in found.items()}


class LayerMonitor(Callback):
    """Measure the layers of each optimizer at every ``every``-th of its steps.

    It runs only on rank 0, since gradients are equal on all ranks. A step that is not measured
    costs an entry in a list. A measured step costs a copy of the weights; its numbers come to the
    host with those of the next step.

    It must come before the `LoggerCallback` in the list of callbacks: `state_dict` writes the
    pending record, and the `LoggerCallback` saves the number of records.

    Args:
        every: optimizer steps between two records; a few more for an optimizer that steps several
            times in a batch.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._meters: dict[str, _Meter] = {}
        self._loggers: LoggerCallback | None = None
        self._idle: str | None = None  # Warning for the first record.
        self._listens = False  # True while steps are watched.

    def on_fit_start(self, brain: Brain) -> None:
        loggers = (each for each in brain.callbacks if isinstance(each, LoggerCallback))
        self._loggers = next(loggers, None)
        if [meter.update for meter in self._meters.values()] == list(brain.updates.values()):
            return
        # A recipe may replace its optimizers between two calls of `fit`.
        kept = {meter.update: meter for meter in self._meters.values()}
        rate, known = brain.options.expected_clip_rate, list(brain.updates)
        self._meters = {
            name: kept.get(each)
            or _Meter(each, by_name(rate, name, known, "expected_clip_rate", USUAL_CLIP_RATE))
            for name, each in brain.updates.items()
        }
        untrained = (name for update in brain.updates.values() for name in update.untrained)
        if idle := list(dict.fromkeys(untrained)):
            self._idle = (
                f"no optimizer has {first_names(idle)}: they never move. Give them to an "
                "optimizer, or call requires_grad_(False), which saves computing their gradients"
            )

    def on_batch_start(self, brain: Brain, batch: Any) -> None:
        due = False
        for meter in self._meters.values():
            due = due or meter.always or len(meter.steps) + 1 >= self.every
        if due is not self._listens:
            self._listens = due
            change = brain.callbacks.listen if due else brain.callbacks.unlisten
            change("before_optimizer_step", self._before_step)
            change("after_optimizer_step", self._after_step)

    def _before_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Copy the weights if this step is measured."""
        meter = self._meters[update.name]
        if len(meter.steps) + 1 >= self.every:
            meter.begin(self._loggers is not None and self._loggers.wants_histograms)

    def _after_step(self, brain: Brain, update: Update, gradients: Gradients) -> None:
        """Measure the step, without waiting for the device."""
        meter = self._meters[update.name]
        # The step of this batch is counted at its end.
        place = {"step": brain.optimizer_step + 1, "epoch": brain.progress.epoch}
        grads = dict(zip(*update.measured, strict=True))
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
        """Restore a saved state; optimizers that are not in it start anew."""
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
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].float()


def make_layer_monitor(brain: Brain) -> LayerMonitor | None:
    """Return the layer monitor of a Brain; None on other ranks, in a search, and if it is off."""
    options = brain.options
    if not options.monitor_every or options.searching or not distributed.is_main():
        return None
    return LayerMonitor(options.monitor_every)
