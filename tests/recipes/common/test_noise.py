"""Noise has the colour, the level and the reproducibility that was asked for."""

import pytest
import torch

from recipes.common.noise import babble, coloured_noise


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_power_falls_by_the_exponent(exponent: float) -> None:
    power = torch.fft.rfft(coloured_noise(5, 1 << 16, exponent).double()).abs().square()
    # Mean power of octaves; a regression of its logarithm over the octaves is the slope.
    octaves = torch.stack([power[1 << n : 2 << n].mean() for n in range(6, 15)]).log2()
    slope = (octaves[-1] - octaves[0]) / (len(octaves) - 1)
    assert slope == pytest.approx(-exponent, abs=0.1)


@pytest.mark.parametrize("samples", [1000, 1001])
def test_noise_has_level_one_and_its_seed_decides_it(samples: int) -> None:
    noise = coloured_noise(1, samples, 1.0)
    assert noise.shape == (samples,)
    assert noise.square().mean() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(noise, coloured_noise(1, samples, 1.0))
    assert not torch.equal(noise, coloured_noise(2, samples, 1.0))


def test_babble_hears_every_talker_equally() -> None:
    time = torch.arange(8000) / 8000
    tones = [torch.sin(2 * torch.pi * f * time) * loud for f, loud in ((500, 0.1), (900, 5.0))]
    crowd = babble(0, 16000, [[tones[0]], [tones[1]]])
    assert crowd.shape == (16000,)
    assert crowd.square().mean() == pytest.approx(1.0, rel=1e-4)
    spectrum = torch.fft.rfft(crowd).abs()
    assert spectrum[1000] == pytest.approx(spectrum[1800].item(), rel=0.01)
    assert torch.equal(crowd, babble(0, 16000, [[tones[0]], [tones[1]]]))
    assert not torch.equal(crowd, babble(1, 16000, [[tones[0]], [tones[1]]]))


@pytest.mark.parametrize("talkers", [[], [[torch.ones(5)], []]])
def test_babble_of_nobody_is_refused(talkers: list[list[torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="at least one talker, and each at least one recording"):
        babble(0, 100, talkers)
