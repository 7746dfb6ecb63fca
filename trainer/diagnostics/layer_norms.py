"""Norms of gradients, weights and updates, layer by layer, at one step of an optimizer.

A layer is a module that has parameters itself: "encoder.0.attention" is its weight and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.clipping import Gradients, joint, norms

# Elements of a parameter that its histogram is drawn from, evenly spread.
SAMPLE = 2048

Measured = dict[str, dict[str, float | None]]


class Layers:
    """The layers of one optimizer (an `Update`), named by what ``names`` calls their parameters.

    ``told`` is called when something has been measured, with the norm after clipping if that was.

    A look is at one step, once `arm` has been called. What is measured there waits on the device
    in ``waiting``, for the host to fetch with what it must know of the next step anyway; so does
    the norm after clipping, where a clipper does not know it without measuring again.
    """

    def __init__(
        self, update: Any, names: Mapping[int, str], told: Callable[[float | None], None]
    ) -> None:
        self._update, self._told = update, told
        own = [p for group in update.optimizer.param_groups for p in group["params"]]
        self._names = {
            id(p): names.get(id(p), f"{update.name}.{number}") for number, p in enumerate(own)
        }
        self._armed = self._histograms = False
        self._params: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._grads: dict[int, float] = {}
        self._samples: list[tuple[str, Tensor]] = []
        self._clipped = 0  # So many of the numbers that wait are norms after clipping.
        self.waiting: Tensor | None = None
        self.measured: Measured = {}

    def arm(self, histograms: bool) -> None:
        """Look at the next step; ``histograms`` wants samples of weights and gradients, too."""
        self._armed, self._histograms = True, histograms

    @torch.no_grad()
    def before(self) -> None:
        """The optimizer is about to step: keep the weights as they are."""
        if not self._armed:
            return
        self._params = self._update.params
        self._kept = [p.detach().clone() for p in self._params]
        self._samples = []
        if self._histograms:
            for p in self._params:
                name = self._names.get(id(p), self._update.name)
                self._samples.append((f"weights/{name}", _sample(p)))
                if p.grad is not None and not p.grad.is_sparse:
                    self._samples.append((f"gradients/{name}", _sample(p.grad)))

    @torch.no_grad()
    def after(self, gradients: Gradients) -> None:
        """The optimizer has stepped: measure, without waiting for the device."""
        found = [norms(gradients.tensors)] if gradients.norm_after is None else []
        self._clipped = len(gradients.tensors) if found else 0
        if self._armed:
            self._armed = False
            self._grads = {id(p): norm for p, norm in zip(*self._update.seen, strict=True)}
            found += self._moved() or [torch.zeros(0)]
            self._take_samples()
        self.waiting = torch.cat(found) if found else None

    def _moved(self) -> list[Tensor]:
        """How far the step went, and where it led: a norm for each parameter."""
        kept, now = self._kept, [p.detach() for p in self._params]
        self._kept = []
        if not now:
            return []
        torch._foreach_sub_(kept, now)
        return [norms(kept), norms(now)]

    def _take_samples(self) -> None:
        """On their way to the host, where they are before the next transfer is."""
        if self._samples:
            device = self._samples[0][1].device
            joined = torch.cat([values.to(device) for _, values in self._samples])
            parts = joined.to("cpu", non_blocking=True).split([len(v) for _, v in self._samples])
            self._samples = [(n, part) for (n, _), part in zip(self._samples, parts, strict=True)]

    def take(self, values: Sequence[float]) -> None:
        """The values of ``waiting``, fetched."""
        self.waiting = None
        after = joint(values[: self._clipped]) if self._clipped else math.nan
        values = values[self._clipped :]
        params, self._params = self._params, []
        layers: dict[str, list[tuple[float | None, float, float]]] = {}
        for number, p in enumerate(params):
            name = self._names.get(id(p), self._update.name)
            layer = name.rpartition(".")[0] or name
            part = self._grads.get(id(p)), values[len(params) + number], values[number]
            layers.setdefault(layer, []).append(part)
        self.measured = {layer: _joined(parts) for layer, parts in layers.items()}
        self._told(after if math.isfinite(after) else None)

    def forget(self) -> None:
        """What was measured is of a state that is no more."""
        self.waiting = None
        self._params, self._samples = [], []

    def fetch(self) -> None:
        """Do not wait for the next step: one host-device sync."""
        if self.waiting is not None:
            self.take(self.waiting.tolist())

    def samples(self) -> list[tuple[str, Tensor]]:
        """For histograms, on the host, as soon as `take` was called; then forgotten."""
        samples, self._samples = self._samples, []
        return samples


def _joined(parts: list[tuple[float | None, float, float]]) -> dict[str, float | None]:
    """A layer from its parameters; its gradient is None where none of them has one."""
    grads = [grad for grad, _, _ in parts if grad is not None]
    weight = math.hypot(*(weight for _, weight, _ in parts))
    update = math.hypot(*(moved for _, _, moved in parts))
    return {
        "grad": rounded(math.hypot(*grads)) if grads else None,
        "weight": rounded(weight),
        "update": rounded(update),
        "ratio": rounded(update / weight) if weight else None,
    }


def rounded(value: float) -> float:
    """Five digits: a line is read by people, too, and a thousand layers make it long."""
    return float(f"{value:.5g}")


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # On a GPU a whole parameter would be a transfer of megabytes; a histogram needs thousands.
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float()
