"""Norms of gradients, weights and updates, layer by layer, at one step of an optimizer.

A layer is a module that has parameters itself: "encoder.0.attention" is its weight and bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Elements of a parameter that its histogram is drawn from, evenly spread.
SAMPLE = 2048

Measured = dict[str, dict[str, float | None]]


class Layers:
    """The layers of one optimizer (an `Update`), named by what ``names`` calls their parameters."""

    def __init__(self, update: Any, names: Mapping[int, str]) -> None:
        self._update = update
        own = [p for group in update.optimizer.param_groups for p in group["params"]]
        self._names = {
            id(p): names.get(id(p), f"{update.name}.{number}") for number, p in enumerate(own)
        }
        self._params: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._samples: list[tuple[str, Tensor]] = []
        self._measured: Measured = {}

    @torch.no_grad()
    def before(self, histograms: bool) -> None:
        """The optimizer is about to step: keep the weights as they are."""
        self._params = self._update.params
        self._kept = [p.detach().clone() for p in self._params]
        if histograms:
            for p in self._params:
                name = self._names.get(id(p), self._update.name)
                self._samples.append((f"weights/{name}", _sample(p)))
                if p.grad is not None and not p.grad.is_sparse:
                    self._samples.append((f"gradients/{name}", _sample(p.grad)))

    @torch.no_grad()
    def after(self) -> None:
        """The optimizer has stepped: measure how far, in one host-device sync."""
        if not self._params:
            return
        params, kept = self._params, self._kept
        self._params, self._kept = [], []
        torch._foreach_sub_(kept, [p.detach() for p in params])
        norms = [*_norms(kept), *_norms([p.detach() for p in params])]
        # The host-device sync.
        values = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]).tolist()
        updates, weights = values[: len(params)], values[len(params) :]
        seen = {id(p): norm for p, norm in zip(*self._update.seen, strict=True)}
        layers: dict[str, list[tuple[float | None, float, float]]] = {}
        for p, weight, moved in zip(params, weights, updates, strict=True):
            name = self._names.get(id(p), self._update.name)
            layer = name.rpartition(".")[0] or name
            layers.setdefault(layer, []).append((seen.get(id(p)), weight, moved))
        self._measured = {layer: _joined(parts) for layer, parts in layers.items()}

    def measured(self) -> tuple[Measured, list[tuple[str, Tensor]]]:
        """What the last look found, and samples for histograms on the host; then forgotten."""
        measured, samples = self._measured, self._samples
        self._measured, self._samples = {}, []
        if samples:
            lengths = [len(values) for _, values in samples]
            device = samples[0][1].device
            joined = torch.cat([values.to(device) for _, values in samples]).cpu()
            parts = joined.split(lengths)
            samples = [(name, part) for (name, _), part in zip(samples, parts, strict=True)]
        return measured, samples


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


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norms, those of half precision in float32. One kernel for many where all are alike."""
    if len({(t.dtype, t.device) for t in tensors}) == 1 and tensors[0].dtype.itemsize >= 4:
        return list(torch._foreach_norm(tensors))
    return [torch.linalg.vector_norm(t.float() if t.dtype.itemsize < 4 else t) for t in tensors]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # On a GPU a whole parameter would be a transfer of megabytes; a histogram needs thousands.
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].float()
