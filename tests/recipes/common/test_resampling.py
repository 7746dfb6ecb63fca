"""Rates are converted as torchaudio would, in little memory whatever they are."""

import resource
import sys

import pytest
import torch
from torchaudio.functional import resample as by_torchaudio

from recipes.common import resampling
from recipes.common.resampling import resample, resampled
from tests.processes import Forks
from tests.recipes.common.speakers import noise

USUAL = [(44100, 16000), (16000, 44100), (48000, 16000), (8000, 16000), (16000, 16000)]
ODD = [(44100, 15999), (15999, 44100), (22050, 16001), (16000, 44101), (1009, 1013), (48000, 997)]


@pytest.mark.parametrize(("source", "target"), [*USUAL, *ODD])
@pytest.mark.parametrize("size", [100, 777, 50000])
def test_blocks_are_resampled_as_the_whole_would_be(source: int, target: int, size: int) -> None:
    signal = torch.stack([noise(20011, 1), noise(20011, 2)])
    whole = resample(signal, source, target)
    found = torch.cat(list(resampled(iter(signal.split(size, dim=1)), source, target)), dim=1)
    torch.testing.assert_close(found, whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("source", "target"), [(441, 160), (160, 441), (997, 101), (101, 997)])
@pytest.mark.parametrize("samples", [1, 7, 1000, 5003])
def test_the_filter_by_samples_is_that_by_phases(
    source: int, target: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal = noise(samples)
    whole = by_torchaudio(signal[None], source, target)[0]
    torch.testing.assert_close(resample(signal, source, target), whole, atol=5e-5, rtol=0)
    monkeypatch.setattr(resampling, "LARGEST_FILTER", 2000)  # In more than one part, too.
    torch.testing.assert_close(resample(signal, source, target), whole, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("source", "target"), ODD)
def test_a_tone_stays_a_tone_at_odd_rates(source: int, target: int) -> None:
    frequency = 0.1 * min(source, target)
    tone, wanted = (
        torch.sin(2 * torch.pi * frequency * torch.arange(rate).double() / rate).float()
        for rate in (source, target)
    )
    found = resample(tone, source, target)
    assert len(found) == target
    assert (found - wanted)[target // 20 : -target // 20].abs().max() < 0.02


def grown_by_odd_rates() -> int:
    resample(torch.zeros(1000), 48000, 16000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resample(torch.zeros(2, 441000), 44100, 15999).shape == (2, 159990)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_odd_rates_need_little_memory(forks: Forks) -> None:
    grown = forks(grown_by_odd_rates)
    assert grown * (1 if sys.platform != "darwin" else 1 / 1024) < 200_000  # kB; were 3 GB
