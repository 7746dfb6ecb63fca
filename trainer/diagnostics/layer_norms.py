"""Norms of gradients, weights and updates of each layer, at one step of an optimizer.

A layer is a module that holds parameters itself: "encoder.0.attention" is its weight and bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.clipping import norms
from trainer.optim.step import Update

# Number of elements of a parameter that its histogram is made from, evenly spread.
SAMPLE_SIZE = 2048

# By layer: "grad", "weight", "update" and "ratio" (update over weight).
LayerNorms = dict[str, dict[str, float | None]]


class LayerMeter:
    """Measures the layers of one optimizer at a step, without a host-device sync of its own.

    Args:
        update: the optimizer.
        names: names of parameters, by ``id``.

    Attributes:
        started: True between `begin` and `finish`.
    """

    def __init__(self, update: Update, names: Mapping[int, str]) -> None:
        self._update = update
        self._names = {
            id(p): names.get(id(p), f"{update.name}.{number}")
            for number, p in enumerate(update.all_params)
        }
        self.started = False
        self._params: list[Tensor] = []
        self._before: list[Tensor] = []
        self._grads: dict[int, float] = {}
        self._samples: list[tuple[str, Tensor]] = []

    @torch.no_grad()
    def begin(self, histograms: bool) -> None:
        """Copy the weights before the step.

        Args:
            histograms: also sample weights and gradients, for `samples`.
        """
        self.started = True
        self._params = self._update.params
        self._before = [p.detach().clone() for p in self._params]
        self._samples = []
        for p in self._params if histograms else ():
            name = self._name(p)
            self._samples.append((f"weights/{name}", _sample(p)))
            if p.grad is not None and not p.grad.is_sparse:
                self._samples.append((f"gradients/{name}", _sample(p.grad)))

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Measure after the step.

        Returns:
            A vector (2 P,) on the device for `layers`: norms of the updates, then of the weights,
            of the P parameters.
        """
        self.started = False
        self._grads = {id(p): norm for p, norm in zip(*self._update.measured, strict=True)}
        before, after = self._before, [p.detach() for p in self._params]
        self._before = []
        if self._samples:  # They are on the host before the numbers of the next step are.
            device = self._samples[0][1].device
            joined = torch.cat([values.to(device) for _, values in self._samples])
            parts = joined.to("cpu", non_blocking=True).split([len(v) for _, v in self._samples])
            self._samples = [(n, part) for (n, _), part in zip(self._samples, parts, strict=True)]
        if not after:
            return torch.zeros(0)
        torch._foreach_sub_(before, after)
        return torch.cat([norms(before), norms(after)])

    def layers(self, values: Sequence[float]) -> LayerNorms:
        """Return the norms of each layer.

        Args:
            values: the numbers of `finish`, on the host.
        """
        params, self._params = self._params, []
        layers: dict[str, list[tuple[float | None, float, float]]] = {}
        for number, p in enumerate(params):
            name = self._name(p)
            part = self._grads.get(id(p)), values[len(params) + number], values[number]
            layers.setdefault(name.rpartition(".")[0] or name, []).append(part)
        return {layer: _joined(parts) for layer, parts in layers.items()}

    def samples(self) -> list[tuple[str, Tensor]]:
        """Return named samples (N,) on the host for histograms, once."""
        samples, self._samples = self._samples, []
        return samples

    def _name(self, param: Tensor) -> str:
        return self._names.get(id(param), self._update.name)


def _joined(parts: list[tuple[float | None, float, float]]) -> dict[str, float | None]:
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


def rounded(value: float) -> float:
    """Round to five digits, to keep records short."""
    return float(f"{value:.5g}")


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # On a GPU a whole parameter would be a transfer of megabytes; a histogram needs thousands.
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].float()
