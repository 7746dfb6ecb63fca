"""Noise to put behind speech: coloured noise, and babble made of other voices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coloured_noise(seed: int, samples: int, exponent: float = 0.0) -> Tensor:
    """Noise whose power falls as ``1 / f ** exponent``: 0 is white, 1 pink, 2 brown.

    Returns (T,) float32 with a root mean square of 1, the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator))
    bins = torch.arange(len(spectrum)).clamp(min=1)
    return _level(torch.fft.irfft(spectrum / bins ** (exponent / 2), n=samples))


def babble(seed: int, samples: int, talkers: Sequence[Sequence[Tensor]]) -> Tensor:
    """Several people talking at once, equally loud and without a pause.

    ``talkers`` holds for each person some recordings, (T,) each. A person says them in an order and
    from a point that ``seed`` decides, over and over. Returns (samples,) float32 with a root mean
    square of 1.
    """
    if not talkers or not all(talkers):
        raise ValueError("babble needs at least one talker, and each at least one recording")
    generator = torch.Generator().manual_seed(seed)
    crowd = torch.zeros(samples)
    for recordings in talkers:
        order = torch.randperm(len(recordings), generator=generator).tolist()
        said = _level(torch.cat([recordings[index].float() for index in order]))
        start = int(torch.randint(len(said), (), generator=generator))
        crowd += said[(start + torch.arange(samples)) % len(said)]
    return _level(crowd)


def _level(wave: Tensor) -> Tensor:
    return wave / wave.square().mean().sqrt()
