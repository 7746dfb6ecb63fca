"""Losses of Tacotron2: four, each a mean over utterances of means over their steps.

So a batch's loss is that of its utterances alone and weighed equally, whatever the padding, and
several processes together compute what one does on the joined batch.

Shapes: B utterances, L symbols of text, F frames of mel, M bands, T decoder steps of r frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from recipes.tacotron2.model import Predictions, padding_mask


class Objective:
    """The sum of the losses, and its parts by name.

    Args:
        gate: weight of the gate's cross entropy.
        last_step: weight of an utterance's last step in it: it is one among many.
        attention: weight of the guided attention.
        spread: its g, as a share of the text.
        half_life: optimizer steps after which its weight is half; None: it stays.
        absolute: weight of the mels' absolute errors beside the squared ones. Where a sound can be
            one of two, the squared error wants their mean, which is neither.

    ``durations`` (number of symbols,), where it is set, says how long each symbol usually lasts:
    the diagonal is then one of time.
    """

    durations: Tensor | None = None

    def __init__(
        self,
        gate: float = 1.0,
        last_step: float = 1.0,
        attention: float = 1.0,
        spread: float = 0.2,
        half_life: float | None = None,
        absolute: float = 0.0,
    ) -> None:
        self.gate, self.last_step = gate, last_step
        self.attention, self.spread, self.half_life = attention, spread, half_life
        self.absolute = absolute

    def __call__(
        self,
        found: Predictions,
        tokens: Tensor,
        symbols: Tensor,
        frames: Tensor,
        optimizer_step: int = 0,
    ) -> dict[str, Tensor]:
        """Return the weighted parts: mel, refined, gate, attention.

        Texts (B, L) have so many symbols (B,), and spectrograms so many frames (B,).
        """
        reduction = found.mel.shape[1] // found.gate.shape[1]
        steps = (frames + reduction - 1) // reduction
        pull = self.attention
        if self.half_life is not None:
            pull *= 0.5 ** (optimizer_step / self.half_life)
        places = diagonal(tokens, symbols, self.durations)
        guide = guided_attention(found.attention, places, steps, self.spread)
        return {
            "mel": spectral_error(found.mel, found.target, frames, self.absolute),
            "refined": spectral_error(found.refined, found.target, frames, self.absolute),
            "gate": self.gate * gate_loss(found.gate, steps, self.last_step),
            "attention": pull * guide,
        }


def spectral_error(found: Tensor, target: Tensor, frames: Tensor, absolute: float = 0.0) -> Tensor:
    """Return the mean squared difference of spectrograms (B, F, M) over their frames (B,).

    ``absolute`` times the mean absolute difference is added.
    """
    difference = full(found) - full(target)
    error = difference.square().mean(-1)  # (B, F)
    if absolute:
        error = error + absolute * difference.abs().mean(-1)
    return mean_of_means(error, frames)


def gate_loss(logits: Tensor, steps: Tensor, last_step: float = 1.0) -> Tensor:
    """Return the cross entropy of "this step is the last one".

    Logits are (B, T), of utterances with so many steps (B,); the true last step counts
    ``last_step`` times.
    """
    last = torch.arange(logits.shape[1], device=logits.device) == steps.unsqueeze(1) - 1
    error = binary_cross_entropy_with_logits(
        full(logits),
        last.to(full(logits).dtype),
        pos_weight=full(logits).new_full((), last_step),
        reduction="none",
    )
    return mean_of_means(error, steps)


def guided_attention(
    attention: Tensor, places: Tensor, steps: Tensor, spread: float = 0.2
) -> Tensor:
    """Return the guided-attention loss of (B, T, L): its distance from the diagonal.

    Tachibana et al. 2017 (arXiv 1710.08969), equations 3 and 4.

    Symbol n costs ``W = 1 - exp(-(p_n - t/T)^2 / 2 g^2)`` at step t of T, where its place p_n (B,
    L) is n/N in the paper. The attention at a step sums to 1, so its cost is summed over symbols,
    and the mean taken over steps: from 0 to 1, N times what the paper's mean over both is.
    """
    time = torch.arange(attention.shape[1], device=attention.device) / steps.unsqueeze(1)
    distance = places.unsqueeze(1) - time.unsqueeze(2)  # (B, T, L)
    cost = 1 - torch.exp(-distance.square() / (2 * spread**2))
    return mean_of_means((full(attention) * cost).sum(-1), steps)


def diagonal(tokens: Tensor, symbols: Tensor, durations: Tensor | None = None) -> Tensor:
    """Return the places of the symbols of texts (B, L) in their utterances, as shares (B, L).

    All last alike; or, with the ``durations`` of each kind of symbol, in proportion to them.
    """
    if durations is None:
        return torch.arange(tokens.shape[1], device=tokens.device) / symbols.unsqueeze(1)
    each = durations.to(tokens.device, non_blocking=True)[tokens]
    each = each.masked_fill(padding_mask(symbols, tokens.shape[1]), 0.0)
    ends = each.cumsum(1)
    return (ends - each / 2) / ends[:, -1:]


def usual_durations(texts: Sequence[Sequence[int]], lengths: Sequence[float], kinds: int) -> Tensor:
    """Estimate the duration of each kind of symbol (kinds,), in the unit of ``lengths``.

    The estimate explains the lengths best if every symbol of a kind lasts alike.

    Least squares with a pull to the mean of all, as strong as ten utterances: rare symbols take
    that. None is shorter than a tenth of it.
    """
    counts = torch.zeros(len(texts), kinds, dtype=torch.float64)
    for row, text in zip(counts, texts, strict=True):
        row += torch.bincount(torch.tensor(text), minlength=kinds)
    given = torch.tensor(lengths, dtype=torch.float64)
    mean = given.sum() / counts.sum()
    pull = 10.0 * torch.eye(kinds, dtype=torch.float64)
    found = mean + torch.linalg.solve(
        counts.T @ counts + pull, counts.T @ (given - mean * counts.sum(1))
    )
    return found.clamp(min=mean.item() / 10).float()


def full(values: Tensor) -> Tensor:
    """The same with no less than 32 bits: sums of half precision lose what is small."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_of_means(values: Tensor, lengths: Tensor) -> Tensor:
    """The mean over utterances of the mean over the first ``lengths`` (B,) of values (B, T)."""
    kept = values.masked_fill(padding_mask(lengths, values.shape[1]), 0.0)
    return (kept.sum(1) / lengths).mean()
