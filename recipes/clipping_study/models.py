"""The networks of the study: small enough for hundreds of trainings on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Unrolled(torch.autograd.Function):
    """h_t = tanh(a_t + h_{t−1} Uᵀ) for all t, and its backpropagation through time.

    Written out, since a long loop of small operations is mostly autograd's own bookkeeping: this is
    several times as fast as `torch.nn.RNN` on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, recurrent: Tensor) -> Tensor:
        """From inputs (T, B, H) and U (H, H) to states (T, B, H); the state before is 0."""
        states = torch.empty_like(inputs)
        state = torch.zeros_like(inputs[0])
        transposed = recurrent.t().contiguous()
        for given, place in zip(inputs.unbind(), states.unbind(), strict=True):
            state = torch.addmm(given, state, transposed, out=place).tanh_()
        ctx.save_for_backward(states, recurrent)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        states, recurrent = ctx.saved_tensors
        slopes = torch.addcmul(torch.ones_like(states), states, states, value=-1.0)
        inner = torch.empty_like(states)  # gradients of a_t
        later = torch.zeros_like(states[0])
        every = zip(grads[0].unbind(), slopes.unbind(), inner.unbind(), strict=True)
        for grad, slope, place in reversed(list(every)):
            later = torch.addmm(grad, later, recurrent, out=place).mul_(slope)
        before = states[:-1].flatten(0, 1)
        return inner, inner[1:].flatten(0, 1).t() @ before


class Recurrent(nn.Module):
    """A plain tanh network of Elman's kind: inputs (B, T, F) to the states (B, T, H).

    Its recurrent matrix begins as a random orthogonal one times ``gain``: with 1 gradients neither
    vanish nor explode before training begins.
    """

    def __init__(self, features: int, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.recurrent = nn.Parameter(gain * nn.init.orthogonal_(torch.empty(width, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = _Unrolled.apply(self.inner(inputs.transpose(0, 1)), self.recurrent)
        return states.transpose(0, 1)


class Recaller(nn.Module):
    """Reads a sequence (B, T, F) and names its class by logits (B, C) from the last state."""

    def __init__(self, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.states = Recurrent(features, width)
        self.output = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.output(self.states(inputs)[:, -1])
        return logits


class RecurrentWriter(nn.Module):
    """The next word by a recurrent network: words (B, T) to logits (B, T, V)."""

    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.states = Recurrent(width, width)
        self.output = nn.Linear(width, words)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.output(self.states(self.words(inputs)))
        return logits


class Writer(nn.Module):
    """Next-word transformer with layer norm after each sum (post-LN).

    This kind is known to need a warm-up. Words (B, T) to logits (B, T, V).
    """

    def __init__(self, words: int, length: int, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=False
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameter in self.layers.parameters():  # The copies are alike until here.
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.output = nn.Linear(width, words)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.words(inputs) * math.sqrt(self.places.shape[1]) + self.places
        logits: Tensor = self.output(self.layers(hidden, mask=self.mask, is_causal=True))
        return logits


class Classifier(nn.Module):
    """Three linear layers with rectifiers between; layer i computes ``scales[i]`` times W x + b.

    Scales change nothing of what the network can say, but the gradient of a layer is as many times
    as large as its scale: weights are drawn as many times smaller.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        width: int = 48,
        scales: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        sizes = [inputs, width, width, classes]
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(3))
        self.scales = scales
        with torch.no_grad():
            for layer, scale in zip(self.layers, scales, strict=True):
                for parameter in layer.parameters():
                    parameter.div_(scale)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for number, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            hidden = scale * layer(hidden if number == 0 else torch.relu(hidden))
        return hidden
