"""SI-SNR in the best order of the estimates, and the choice of what is trained on.

Shapes: B mixtures, S sources (people) in each, T samples.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8  # of an energy: digital silence has a ratio, too


def pairwise_si_snr(estimates: Tensor, sources: Tensor, lengths: Tensor | None = None) -> Tensor:
    """SI-SNR in dB of each estimate against each source: (B, S, T) twice to (B, estimate, source).

    Scale-invariant signal-to-noise ratio (Luo and Mesgarani 2019, arXiv 1809.07454, section II-E),
    means removed. ``lengths`` (B,) are the samples that count. Computed in float32 at least,
    whatever autocast says: sums over seconds need it.
    """
    estimates, sources = _centred(estimates, lengths), _centred(sources, lengths)
    energy = sources.square().sum(-1)[:, None]  # (B, 1, S)
    with torch.autocast(sources.device.type, enabled=False):
        share = estimates @ sources.transpose(1, 2) / (energy + EPS)  # (B, S, S)
    target = share[..., None] * sources[:, None]  # (B, S, S, T)
    noise = estimates[:, :, None] - target
    ratio = (target.square().sum(-1) + EPS) / (noise.square().sum(-1) + EPS)
    return 10 * ratio.log10()


def _centred(signals: Tensor, lengths: Tensor | None) -> Tensor:
    """The valid samples with their mean removed, zeros behind them."""
    signals = signals.float() if signals.dtype.itemsize < 4 else signals
    if lengths is None:
        return signals - signals.mean(-1, keepdim=True)
    valid = torch.arange(signals.shape[-1], device=signals.device) < lengths[:, None, None]
    signals = signals * valid
    return (signals - signals.sum(-1, keepdim=True) / lengths[:, None, None]) * valid


class Assigned(NamedTuple):
    """The best of all assignments of estimates to sources."""

    score: Tensor  # (B,), the mean over sources
    order: Tensor  # (B, S): which estimate is that of each source


def best_order(scores: Tensor) -> Assigned:
    """Permutation invariance (Yu et al. 2017, arXiv 1607.00325): (B, estimate, source) to (B,).

    All S! assignments are tried, which is little for the 2 or 3 sources of a mixture.
    """
    people = scores.shape[-1]
    orders = _orders(people, scores.device)
    each = scores[:, orders, torch.arange(people, device=scores.device)].mean(-1)  # (B, S!)
    score, best = each.max(1)
    return Assigned(score, orders[best])


@cache
def _orders(people: int, device: torch.device) -> Tensor:
    """All orders of so many, (S!, S); copied to a device once, which waits for it."""
    return torch.tensor(list(permutations(range(people))), device=device)


class Kept(NamedTuple):
    """Part of a batch that is trained on."""

    loss: Tensor  # a scalar, the mean over what is kept
    weight: float | Tensor  # how many mixtures that are; 0: the batch gives nothing


def keep(losses: Tensor, threshold: float | None, upper: float) -> Kept:
    """The mean of a batch's losses (B,) without the too easy ones, and infinite above a limit.

    Losses below ``threshold`` (dB) are left out; one that is not finite, −inf too, is not easy but
    wrong, and makes the mean so. A mean above ``upper`` becomes infinite: `Brain.optimize` skips
    both on all ranks, and counts them, as it skips a batch of which nothing is left.
    """
    if threshold is None:
        mean, weight = losses.mean(), len(losses)
    else:
        wanted = (losses >= threshold) | ~losses.isfinite()
        weight = wanted.sum()  # Stays on the device.
        mean = torch.where(wanted, losses, 0.0).sum() / weight.clamp(min=1)
    return Kept(torch.where(mean > upper, torch.inf, mean), weight)
