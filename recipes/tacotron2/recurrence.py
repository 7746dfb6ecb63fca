"""Long short-term memory in less time: the layers of Tacotron2 as few and large operations.

PyTorch's own take a packed batch symbol by symbol, with a graph of some ten nodes for each. Here
what the inputs add to the gates is one product over all steps, and a recurrence has a backward of
its own, which sums the gradient of its weights once. The tests hold it to PyTorch's.

Shapes: T steps, B utterances, N inputs, U units; the gates (…, 4 U) are write, keep, new, show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def encoded(encoder: nn.Module, embedded: Tensor, lengths: Tensor) -> Tensor:
    """Compute ``encoder(embedded, lengths)`` of torchaudio's Tacotron2.

    Embeddings (B, C, L) of so many symbols (B,) become (B, L, C), zero beyond each text.
    """
    for convolution in encoder.convolutions:
        embedded = functional.dropout(convolution(embedded).relu(), 0.5, encoder.training)
    inputs, low = embedded.permute(2, 0, 1), embedded.dtype
    lstm, place = encoder.lstm, torch.arange(len(inputs), device=lengths.device).unsqueeze(1)
    # Backwards is forwards on each text in reverse; what is beyond a text comes after it then, too.
    turned = torch.where(place < lengths, lengths - 1 - place, place).unsqueeze(2)
    with torch.autocast(embedded.device.type, enabled=False):
        outputs = []
        for end, order in (("l0", None), ("l0_reverse", turned)):
            known, weight, *biases = (
                getattr(lstm, f"{name}_{end}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            given = inputs if order is None else inputs.gather(0, order.expand_as(inputs))
            found: Tensor = Recurrent.apply(gates_of(given, known, *biases, low), weight.to(low))
            outputs.append(found if order is None else found.gather(0, order.expand_as(found)))
    read = torch.cat(outputs, 2).masked_fill((place >= lengths).unsqueeze(2), 0.0)
    return read.transpose(0, 1)


def gates_of(inputs: Tensor, weight: Tensor, b1: Tensor, b2: Tensor, low: torch.dtype) -> Tensor:
    """Return the share of the inputs in the gates (T, B, 4 U).

    Inputs (T, B, N) are multiplied by a weight (4 U, N) in the type ``low``; two biases (4 U,) are
    added.
    """
    return functional.linear(inputs.to(low), weight.to(low)) + (b1 + b2)


class Recurrent(torch.autograd.Function):
    """Recurrent layer whose inputs' share of the gates (T, B, 4 D) is known.

    Weights go from state to gates (4 D, D); outputs are (T, B, D).
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, recurrent: Tensor) -> Tensor:
        steps, size, units = len(gates), gates.shape[1], recurrent.shape[1]
        opened = torch.empty_like(gates)
        states, outputs = gates.new_zeros(2, steps + 1, size, units)
        for step, each in enumerate(opened):
            torch.add(gates[step], times(outputs[step], recurrent), out=each)
            open_gates(each, states[step], states[step + 1], outputs[step + 1])
        ctx.save_for_backward(recurrent, opened, states, outputs)
        return outputs[1:]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, to_outputs: Tensor) -> tuple[Tensor, Tensor]:
        recurrent, opened, states, outputs = ctx.saved_tensors
        slopes, keep, through = slopes_of(opened, states)
        d_state, back = torch.zeros_like(states[0]), recurrent.T
        d_output = to_outputs[-1]
        for step in reversed(range(len(opened))):
            d_state = through_gates(d_output, d_state, slopes[step], keep[step], through[step])
            if step:
                d_output = to_outputs[step - 1] + times(slopes[step], back)
        return slopes, summed(slopes, outputs[:-1], recurrent.dtype)


def times(values: Tensor, weight: Tensor) -> Tensor:
    """Values (B, N) times a weight (M, N), in the type of the weight."""
    return values.to(weight.dtype) @ weight.T


def summed(d_gates: Tensor, inputs: Tensor, low: torch.dtype) -> Tensor:
    """The gradient of a weight (4 U, N) from those of its products (T, B, 4 U) with (T, B, N)."""
    return d_gates.flatten(0, 1).to(low).T @ inputs.flatten(0, 1).to(low)


def open_gates(gates: Tensor, state: Tensor, after: Tensor, output: Tensor) -> None:
    """Apply the functions of the gates (B, 4 U) in place, and step from ``state`` to ``after``.

    States and ``output`` are (B, U).
    """
    units = state.shape[1]
    gates[:, : 2 * units].sigmoid_()
    gates[:, 2 * units : 3 * units].tanh_()
    gates[:, 3 * units :].sigmoid_()
    write, keep, new, show = gates.chunk(4, 1)
    torch.addcmul(keep * state, write, new, out=after)
    torch.mul(after.tanh(), show, out=output)


def slopes_of(opened: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of a step.

    Output and states by the gates before their functions (T, B, 4 U), the state by the one before
    it (T, B, U), and the output by the state (T, B, U).
    """
    write, keep, new, show = opened.chunk(4, 2)
    bent = states[1:].tanh()
    slopes = torch.empty_like(opened)
    to_write, to_keep, to_new, to_show = slopes.chunk(4, 2)
    backward = torch.ops.aten.sigmoid_backward
    to_write.copy_(backward(new, write))
    to_keep.copy_(backward(states[:-1], keep))
    to_new.copy_(torch.ops.aten.tanh_backward(write, new))
    to_show.copy_(backward(bent, show))
    return slopes, keep, torch.ops.aten.tanh_backward(show, bent)


def through_gates(
    d_output: Tensor, d_state: Tensor, slopes: Tensor, keep: Tensor, through: Tensor
) -> Tensor:
    """The gradient of the state before; the ``slopes`` (B, 4 U) become the gates' gradients."""
    units = keep.shape[1]
    d_state = torch.addcmul(d_state, d_output, through)
    slopes[:, : 3 * units].unflatten(1, (3, units)).mul_(d_state.unsqueeze(1))
    slopes[:, 3 * units :].mul_(d_output)
    return d_state.mul_(keep)
