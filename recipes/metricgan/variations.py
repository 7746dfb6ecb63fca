"""Masks a little different from the generator's own, of which the discriminator learns, too.

What a generator makes in one round is much alike. Of that alone a young discriminator learns which
utterances score high, and hardly what a change of the mask does to a score, which is all that the
generator asks it. A mask raised to a power takes away more of the noise (and of the speech), or
less. This is not in the paper, whose discriminator sees 750 rounds of a changing generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LEAST, MOST = -0.8, 1.0  # of the logarithm of an exponent: 0.45 to 2.7
SPREAD, BANDS = 0.3, 4  # standard deviation over frequency, between so many points


def exponents(seeds: Sequence[int], bins: int) -> Tensor:
    """For each utterance a smooth curve over frequency, around a value of its own: (B, 1, F)."""
    curves = []
    for seed in seeds:
        drawn = torch.Generator().manual_seed(seed)
        middle = torch.empty(1, 1, 1).uniform_(LEAST, MOST, generator=drawn)
        points = SPREAD * torch.randn(1, 1, BANDS, generator=drawn)
        bends = nn.functional.interpolate(points, bins, mode="linear", align_corners=True)
        curves.append((middle + bends).exp())
    return torch.cat(curves)


def losses(errors: Tensor, within: float) -> Tensor:
    """Of errors of predicted scores (versions, B), the clean one first, the loss of each utterance.

    The mean square, and ``within`` times that of how far the versions of an utterance, the clean
    one left out, are off beside each other. Scores of utterances differ five times as much as those
    of what can be made of one of them, and it is these that the generator asks about.
    """
    heard = errors[1:]
    return errors.square().mean(0) + within * (heard - heard.mean(0)).square().mean(0)


def version_of(name: str, version: int) -> str:
    """The name under which a version of an utterance is scored; 0 is the generator's own.

    >>> version_of("p226_001", 0), version_of("p226_001", 2)
    ('p226_001', 'p226_001 (varied 2)')
    """
    return f"{name} (varied {version})" if version else name
