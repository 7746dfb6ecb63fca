"""Noise to put behind speech: coloured noise, and babble made of other voices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coloured_noise(seed: int, samples: int, exponent: float = 0.0) -> Tensor:
    """Return noise whose power falls as ``1 / f ** exponent``.

    Args:
        seed: random seed.
        samples: number of samples, T.
        exponent: 0 for white noise, 1 for pink, 2 for brown.

    Returns:
        Samples (T,), float32, with a root mean square of 1; the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator))
    bins = torch.arange(len(spectrum)).clamp(min=1)
    return _level(torch.fft.irfft(spectrum / bins ** (exponent / 2), n=samples))


def babble(seed: int, samples: int, talkers: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return several people who talk at once, equally loud and without a pause.

    Args:
        seed: random seed: the order of each person's recordings, and where in them it begins.
        samples: number of samples, T.
        talkers: recordings (T_i,) of each person, which are repeated as long as needed.

    Returns:
        Samples (T,), float32, with a root mean square of 1.

    Raises:
        ValueError: there is no talker, or one without a recording.
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
