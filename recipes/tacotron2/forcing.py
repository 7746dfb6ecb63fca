"""Teacher forcing in less time: what torchaudio's decoder computes, in fewer and larger operations.

Where every input is known beforehand, only the attention and its recurrent layer must be walked
step by step: the second recurrent layer does not feed back into them. So here the pre-net's part
of the gates, the second layer and both projections take all steps at once, and the two linear
layers of the location features are one. The walk has a backward of its own, which sums the
gradients of its weights once and not at every step. `tests/recipes/tacotron2/test_forcing.py`
holds outputs and gradients to torchaudio's own.

Shapes: B utterances, T steps, L symbols, E encoder channels, A and D units of the two layers, H
attention channels, K taps of the location filters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import fold, linear, pad


def can_force(decoder: nn.Module) -> bool:
    """Whether `forced` does what this decoder does: no dropout inside its recurrence, and none of
    autocast's casts."""
    dropout = decoder.training and (decoder.attention_dropout or decoder.decoder_dropout)
    return not dropout and not torch.is_autocast_enabled(decoder.gate_layer.weight.device.type)


def forced(
    decoder: nn.Module, memory: Tensor, teacher: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``decoder(memory, teacher, memory_lengths=lengths)`` gives: mels (B, M, T * r), gate
    logits (B, T) and attention (B, T, L).

    Args: memory (B, L, E); teacher (B, M, T * r), the frames before bands in memory; lengths (B,).
    """
    size, steps = len(teacher), teacher.shape[2] // decoder.n_frames_per_step
    given = teacher.transpose(1, 2).reshape(size, steps, -1)[:, :-1]
    seen = decoder.prenet(pad(given, (0, 0, 1, 0)).transpose(0, 1))  # (T, B, P)
    hidden, context, attention = _attend(decoder, memory, seen, lengths)
    cell = decoder.decoder_rnn
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    start = hidden.new_zeros(1, size, decoder.decoder_rnn_dim)
    out, _, _ = torch.lstm(
        torch.cat((hidden, context), 2), (start, start), weights, True, 1, 0.0, False, False, False
    )
    out = torch.cat((out, context), 2).transpose(0, 1)  # (B, T, D + E)
    frames = decoder.linear_projection(out).reshape(size, -1, decoder.n_mels)
    return frames.transpose(1, 2), decoder.gate_layer(out).squeeze(2), attention.transpose(0, 1)


def _attend(
    decoder: nn.Module, memory: Tensor, seen: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The first layer's outputs (T, B, A), the contexts (T, B, E), the attention (T, B, L)."""
    cell, layer = decoder.attention_rnn, decoder.attention_layer
    known, recurrent = cell.weight_ih.split([seen.shape[2], memory.shape[2]], 1)
    location = layer.location_layer
    taps = location.location_conv.weight.flatten(1)  # (filters, 2 K)
    beyond = torch.arange(memory.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
    found: tuple[Tensor, Tensor, Tensor] = _Walk.apply(
        linear(seen, known, cell.bias_ih + cell.bias_hh),
        torch.cat((recurrent, cell.weight_hh), 1),
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
    (4 A, E + A), from state to query (H, A), from the attention before (last and total, 2 K taps
    around each symbol) to its features (H, 2 K), and from these to an energy (H,), keys (B, L, H),
    memory (B, L, E), and what of it is padding (B, L). Gives outputs (T, B, A), contexts (T, B, E)
    and attention (T, B, L).
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, recurrent: Tensor, query: Tensor, filters: Tensor, v: Tensor,
        keys: Tensor, memory: Tensor, beyond: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        steps, size, units = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        state = gates.new_zeros(size, units)
        before = gates.new_zeros(size, memory.shape[2] + units)  # context and output
        weights = total = gates.new_zeros(beyond.shape)
        opened, states, befores, attention, features = [], [state], [before], [], []
        for step in range(steps):
            each = torch.addmm(gates[step], before, recurrent.T)
            each[:, : 2 * units].sigmoid_()
            each[:, 2 * units : 3 * units].tanh_()
            each[:, 3 * units :].sigmoid_()
            write, keep, new, show = each.chunk(4, 1)
            state = torch.addcmul(keep * state, write, new)
            hidden = state.tanh() * show
            match = _near(weights, total, filters) @ filters.T
            match += keys
            match += (hidden @ query.T).unsqueeze(1)
            match.tanh_()
            weights = (match @ v).masked_fill_(beyond, -torch.inf).softmax(1)
            total = total + weights
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            before = torch.cat((context, hidden), 1)
            for kept, value in (
                (opened, each), (states, state), (befores, before), (attention, weights),
                (features, match),
            ):  # fmt: skip
                kept.append(value)
        found = torch.stack(befores)
        attended = torch.stack(attention)
        ctx.save_for_backward(
            recurrent, query, filters, v, memory, torch.stack(opened), torch.stack(states), found,
            attended, torch.stack(features),
        )  # fmt: skip
        context, hidden = found[1:].split([memory.shape[2], units], 2)
        return hidden, context, attended

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, to_hidden: Tensor, to_context: Tensor, to_attention: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments but the padding, from the last step to the first."""
        recurrent, query, filters, v, memory, opened, states, befores, attended, features = (
            ctx.saved_tensors
        )
        channels = memory.shape[2]
        totals = attended.cumsum(0)
        d_before = torch.cat((to_context, to_hidden), 2)
        d_opened, d_query = torch.empty_like(opened), []
        d_filters, d_v = torch.zeros_like(filters), torch.zeros_like(v)
        d_keys = torch.zeros_like(features[0])
        d_state = torch.zeros_like(states[0])
        d_weights = d_total = torch.zeros_like(attended[0])
        for step in reversed(range(len(opened))):
            weights, feature, d_now = attended[step], features[step], d_before[step]
            # Through the context and the softmax to the energies, and on to what they were made of.
            d_context = d_now[:, :channels].unsqueeze(2)
            d_weights = to_attention[step] + d_weights + d_total
            d_weights += torch.bmm(memory, d_context).squeeze(2)
            d_energy = weights * (d_weights - (d_weights * weights).sum(1, keepdim=True))
            d_v += feature.flatten(0, 1).T @ d_energy.flatten()
            d_match = (d_energy.unsqueeze(2) * v) * (1 - feature.square())
            d_keys += d_match
            d_query.append(d_match.sum(1))
            last = attended[step - 1] if step else torch.zeros_like(weights)
            total = totals[step - 1] if step else last
            near = _near(last, total, filters)
            d_filters += d_match.flatten(0, 1).T @ near.flatten(0, 1)
            d_weights, d_far = _spread(d_match, filters)
            d_total = d_total + d_far
            # Through the gates to the state and the output of the step before.
            d_hidden = torch.addmm(d_now[:, channels:], d_query[-1], query)
            d_state = _through_gates(
                d_hidden, d_state, opened[step], states[step], states[step + 1], d_opened[step]
            )
            if step:
                d_before[step - 1].addmm_(d_opened[step], recurrent)
        d_query.reverse()
        d_recurrent = d_opened.flatten(0, 1).T @ befores[:-1].flatten(0, 1)
        d_asked = torch.stack(d_query).flatten(0, 1).T @ befores[1:, :, channels:].flatten(0, 1)
        d_memory = attended.permute(1, 2, 0) @ d_before[:, :, :channels].transpose(0, 1)
        return d_opened, d_recurrent, d_asked, d_filters, d_v, d_keys, d_memory, None


def _near(last: Tensor, total: Tensor, filters: Tensor) -> Tensor:
    """What the location filters see of (B, L) and (B, L): (B, L, 2 K)."""
    taps = filters.shape[1] // 2
    both = pad(torch.stack((last, total), 1), (taps // 2, taps // 2))
    return both.unfold(2, taps, 1).transpose(1, 2).flatten(2)


def _spread(d_match: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `_near`: (B, L, H) to (B, L) and (B, L)."""
    taps, symbols = filters.shape[1] // 2, d_match.shape[1]
    columns = (d_match @ filters).transpose(1, 2)  # (B, 2 K, L)
    both = fold(columns, (1, symbols), (1, taps), padding=(0, taps // 2))
    return both[:, 0, 0], both[:, 1, 0]


def _through_gates(
    d_hidden: Tensor, d_state: Tensor, opened: Tensor, before: Tensor, state: Tensor, out: Tensor
) -> Tensor:
    """The gradient of the state before; that of the gates, before their functions, to ``out``."""
    write, keep, new, show = opened.chunk(4, 1)
    d_write, d_keep, d_new, d_show = out.chunk(4, 1)
    bent = state.tanh()
    d_state = d_state + d_hidden * show * (1 - bent.square())
    torch.mul(d_state * new, write * (1 - write), out=d_write)
    torch.mul(d_state * before, keep * (1 - keep), out=d_keep)
    torch.mul(d_state * write, 1 - new.square(), out=d_new)
    torch.mul(d_hidden * bent, show * (1 - show), out=d_show)
    return d_state * keep
