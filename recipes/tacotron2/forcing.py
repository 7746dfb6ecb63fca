"""Teacher forcing in less time: what torchaudio's decoder computes, in fewer and larger operations.

Where every input is known beforehand, only the attention and its recurrent layer must be walked
step by step: the second recurrent layer does not feed back into them. So here what the pre-net and
the contexts add to the gates and both projections take all steps at once, and the two linear layers
of the location features are one. The recurrences have backwards of their own, which sum the
gradients of their weights once and not at every step. `tests/recipes/tacotron2/test_forcing.py`
holds outputs and gradients to torchaudio's own.

Under autocast to bf16 the products with large weights are in bf16, which many processors multiply
several times as fast; states, energies, softmax, and all that is summed over steps stay in fp32.

Shapes: B utterances, T steps, L symbols, E encoder channels, A and D units of the two layers, H
attention channels, K taps of the location filters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from recipes.tacotron2.recurrence import (
    Recurrent,
    gates_of,
    open_gates,
    slopes_of,
    summed,
    through_gates,
    times,
)


def can_force(decoder: nn.Module) -> bool:
    """Return true if `forced` computes the same as this decoder.

    That needs a decoder without dropout inside its recurrence, and no autocast type but bf16, which
    has the range of fp32.
    """
    dropout = decoder.training and (decoder.attention_dropout or decoder.decoder_dropout)
    return not dropout and _low(decoder) in (decoder.gate_layer.weight.dtype, torch.bfloat16)


def _low(decoder: nn.Module) -> torch.dtype:
    """The type of products with weights."""
    weight: Tensor = decoder.gate_layer.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def forced(
    decoder: nn.Module, memory: Tensor, teacher: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``decoder(memory, teacher, memory_lengths=lengths)``.

    Args:
        decoder: of torchaudio's Tacotron2.
        memory: (B, L, E).
        teacher: (B, M, T * r), the frames before bands in memory.
        lengths: (B,).

    Returns:
        Mels (B, M, T * r), gate logits (B, T) and attention (B, T, L).

    Args: memory (B, L, E); teacher (B, M, T * r), the frames before bands in memory; lengths (B,).
    """
    size, steps = len(teacher), teacher.shape[2] // decoder.n_frames_per_step
    given = teacher.transpose(1, 2).reshape(size, steps, -1)[:, :-1]
    seen = decoder.prenet(pad(given, (0, 0, 1, 0)).transpose(0, 1))  # (T, B, P)
    low = _low(decoder)
    with torch.autocast(memory.device.type, enabled=False):
        memory = memory.to(decoder.gate_layer.weight.dtype)
        hidden, context, attention = _attend(decoder, memory, seen, lengths, low)
        cell = decoder.decoder_rnn
        gates = gates_of(
            torch.cat((hidden, context), 2), cell.weight_ih, cell.bias_ih, cell.bias_hh, low
        )
        out: Tensor = Recurrent.apply(gates, cell.weight_hh.to(low))
    out = torch.cat((out, context), 2).transpose(0, 1)  # (B, T, D + E)
    frames = decoder.linear_projection(out).reshape(size, -1, decoder.n_mels)
    return frames.transpose(1, 2), decoder.gate_layer(out).squeeze(2), attention.transpose(0, 1)


def _attend(
    decoder: nn.Module, memory: Tensor, seen: Tensor, lengths: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The first layer's outputs (T, B, A), the contexts (T, B, E), the attention (T, B, L)."""
    cell, layer = decoder.attention_rnn, decoder.attention_layer
    known, recurrent = cell.weight_ih.split([seen.shape[2], memory.shape[2]], 1)
    location = layer.location_layer
    taps = location.location_conv.weight.transpose(1, 2).flatten(1)  # (filters, K * 2)
    beyond = torch.arange(memory.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
    found: tuple[Tensor, Tensor, Tensor] = _Walk.apply(
        gates_of(seen, known, cell.bias_ih, cell.bias_hh, low),
        torch.cat((recurrent, cell.weight_hh), 1).to(low),
        layer.query_layer.weight,
        location.location_dense.weight @ taps,
        layer.v.weight[0],
        layer.memory_layer(memory),
        memory,
        beyond,
    )
    return found


class _Walk(torch.autograd.Function):
    """The recurrence of attention and its layer.

    Takes gates (T, B, 4 A) without their recurrent part, weights from context and state to them
    (4 A, E + A), from state to query (H, A), from the attention before (K taps around each symbol,
    of last and total) to its features (H, K * 2), and from these to an energy (H,), keys (B, L, H),
    memory (B, L, E), and what of it is padding (B, L). Gives outputs (T, B, A), contexts (T, B, E)
    and attention (T, B, L).
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, recurrent: Tensor, query: Tensor, filters: Tensor, v: Tensor,
        keys: Tensor, memory: Tensor, beyond: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        steps, (size, symbols, channels), units = len(gates), memory.shape, query.shape[1]
        opened = torch.empty_like(gates)
        states = gates.new_zeros(steps + 1, size, units)
        befores = gates.new_zeros(steps + 1, size, channels + units)  # context and output
        margin = filters.shape[1] // 4
        pasts = gates.new_zeros(steps + 1, size, symbols + 2 * margin, 2)  # last and total
        features = gates.new_empty(steps, *keys.shape)
        energies = gates.new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf).flatten()
        output = gates.new_empty(size, units)
        for step, (each, feature) in enumerate(zip(opened, features, strict=True)):
            torch.add(gates[step], times(befores[step], recurrent), out=each)
            open_gates(each, states[step], states[step + 1], output)
            near, match = _near(pasts[step], filters), feature.flatten(0, 1)
            torch.addmm(keys.flatten(0, 1), near, filters.T, out=match)
            feature.add_((output @ query.T).unsqueeze(1)).tanh_()
            weights = torch.addmv(energies, match, v).view(beyond.shape).softmax(1)
            past = pasts[step + 1, :, margin : margin + symbols]
            past[:, :, 0] = weights
            torch.add(pasts[step, :, margin : margin + symbols, 1], weights, out=past[:, :, 1])
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            torch.cat((context, output), 1, out=befores[step + 1])
        ctx.save_for_backward(
            recurrent, query, filters, v, memory, opened, states, befores, pasts, features
        )
        context, output = befores[1:].split([channels, units], 2)
        return output, context, pasts[1:, :, margin : margin + symbols, 0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, to_output: Tensor, to_context: Tensor, to_attention: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments but the padding, from the last step to the first."""
        recurrent, query, filters, v, memory, opened, states, befores, pasts, features = (
            ctx.saved_tensors
        )
        channels, margin, back = memory.shape[2], filters.shape[1] // 4, recurrent.T
        attended = pasts[1:, :, margin : margin + memory.shape[1], 0].contiguous()
        transposed = memory.transpose(1, 2)
        slopes, keep, through = slopes_of(opened, states)
        d_before = torch.cat((to_context, to_output), 2)
        d_query = torch.empty_like(features[:, :, 0])
        d_filters, d_v = torch.zeros_like(filters), torch.zeros_like(v)
        d_keys = torch.zeros_like(features[0])
        d_state = torch.zeros_like(states[0])
        d_last = d_total = torch.zeros_like(attended[0])
        for step in reversed(range(len(opened))):
            weights, feature, d_now = attended[step], features[step], d_before[step]
            # Through the context and the softmax to the energies, and on to what they were made of.
            d_weights = torch.bmm(d_now[:, :channels].unsqueeze(1), transposed).squeeze(1)
            d_weights.add_(to_attention[step]).add_(d_last).add_(d_total).mul_(weights)
            d_energy = torch.addcmul(d_weights, weights, d_weights.sum(1, keepdim=True), value=-1)
            d_v.addmv_(feature.flatten(0, 1).T, d_energy.flatten())
            d_match = torch.ops.aten.tanh_backward(d_energy.unsqueeze(2) * v, feature)
            d_keys += d_match
            torch.sum(d_match, 1, out=d_query[step])
            d_last, d_far = _back_from(d_match, pasts[step], filters, d_filters)
            d_total = d_total + d_far
            # Through the gates to the state and the output of the step before.
            d_output = torch.addmm(d_now[:, channels:], d_query[step], query)
            d_state = through_gates(d_output, d_state, slopes[step], keep[step], through[step])
            if step:
                d_before[step - 1] += times(slopes[step], back)
        d_recurrent = summed(slopes, befores[:-1], recurrent.dtype)
        d_asked = d_query.flatten(0, 1).T @ befores[1:, :, channels:].flatten(0, 1)
        d_memory = attended.permute(1, 2, 0) @ d_before[:, :, :channels].transpose(0, 1)
        return slopes, d_recurrent, d_asked, d_filters, d_v, d_keys, d_memory, None


def _near(past: Tensor, filters: Tensor) -> Tensor:
    """Unfold (B, K - 1 + L, 2) to the location filters' input at each symbol: (B * L, K * 2)."""
    taps = filters.shape[1] // 2
    return past.flatten(1).unfold(1, 2 * taps, 2).reshape(-1, 2 * taps)


def _back_from(
    d_match: Tensor, past: Tensor, filters: Tensor, d_filters: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of last and total attention (B, L).

    They follow from the gradients of the location features (B, L, H). The gradient of the filters
    is added to ``d_filters``.
    """
    (size, symbols, _), taps = d_match.shape, filters.shape[1] // 2
    flat = d_match.flatten(0, 1)
    d_filters.addmm_(flat.T, _near(past, filters))
    # Symbol n was seen at tap k from symbol n + K // 2 - k: with the taps in reverse, all that came
    # of it lies on a diagonal, which is summed as a view, in a third of the time of `fold`.
    seen = filters.unflatten(1, (taps, 2)).flip(1).flatten(1)
    columns = pad((flat @ seen).view(size, symbols, taps, 2), (0, 0, 0, 0, taps // 2, taps // 2))
    rows, row, tap, _ = columns.stride()
    both = columns.as_strided((size, symbols, taps, 2), (rows, row, row + tap, 1)).sum(2)
    return both[:, :, 0], both[:, :, 1]
