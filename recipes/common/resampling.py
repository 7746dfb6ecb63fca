"""Conversion of sample rates, of whole signals and block by block, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

LARGEST_FILTER = 1 << 20  # entries of a filter with a row for each phase
ROLLOFF, ZEROS = 0.99, 6  # of torchaudio's filter: its edge, and the zeros that it has to each side


def resample(signal: Tensor, source: int, target: int) -> Tensor:
    """Convert a signal from one sample rate to another.

    The result is that of `torchaudio.transforms.Resample`, whose filter has a row for each sample
    of the target in the period that both rates share: gigabytes for 44100 Hz and 15999 Hz. The
    filter of such rates is computed sample by sample, in parts.

    Args:
        signal: samples (…, T), float32.
        source: its rate, in Hz.
        target: wanted rate, in Hz.

    Returns:
        Samples (…, ceil(T · target / source)).
    """
    unit, given, reach = _ratio(source, target)
    if given * (2 * reach + unit) <= LARGEST_FILTER:
        return _by_phase(source, target)(signal)
    edge = ROLLOFF * min(1.0, given / unit)  # as a share of half the source's rate
    taps = torch.arange(-reach, reach + 1)
    padded = torch.nn.functional.pad(signal, (reach, reach + 1))
    times = torch.arange(math.ceil(signal.shape[-1] * given / unit)) * unit
    parts = []
    for part in times.split(max(1, LARGEST_FILTER // len(taps))):
        place, phase = part // given, (part % given).double() / given
        t = ((taps - phase[:, None]) * edge).clamp(-ZEROS, ZEROS)
        weights = edge * torch.sinc(t) * (t * (math.pi / 2 / ZEROS)).cos().square()
        near = padded[..., place[:, None] + (taps + reach)]
        parts.append((near * weights.to(signal.dtype)).sum(-1))
    return torch.cat(parts, -1)


def resampled(blocks: Iterable[Tensor], source: int, target: int) -> Iterator[Tensor]:
    """Convert a signal that comes in blocks (C, ·); together they are `resample` of the whole."""
    if source == target:
        yield from blocks
        return
    convert = partial(resample, source=source, target=target)
    unit, given, reach = _ratio(source, target)
    margin = math.ceil(reach / unit)  # units of `unit` samples, each of which gives `given`
    waiting: Tensor | None = None
    behind = 0  # units at the beginning of `waiting` that have been converted
    for block in blocks:
        waiting = block if waiting is None else torch.cat([waiting, block], dim=1)
        ready = waiting.shape[1] // unit - margin - behind
        if ready > 0:
            used = waiting[:, : (behind + ready + margin) * unit]
            yield convert(used)[:, behind * given : (behind + ready) * given]
            drop = max(0, behind + ready - margin)
            waiting, behind = waiting[:, drop * unit :], behind + ready - drop
    if waiting is not None:
        yield convert(waiting)[:, behind * given :]


def delay(source: int, target: int) -> float:
    """Return how many seconds `resampled` may hold a sample back, for those that follow it."""
    if source == target:
        return 0.0
    unit, _, reach = _ratio(source, target)
    return (math.ceil(reach / unit) + 1) * unit / source


@lru_cache(8)
def _by_phase(source: int, target: int) -> Callable[[Tensor], Tensor]:
    from torchaudio.transforms import Resample  # A second to import.

    return Resample(source, target)


def _ratio(source: int, target: int) -> tuple[int, int, int]:
    """The smallest numbers of samples that last equally long, and the filter's reach to a side."""
    unit, given = (rate // math.gcd(source, target) for rate in (source, target))
    return unit, given, math.ceil(ZEROS / ROLLOFF * unit / min(unit, given))
