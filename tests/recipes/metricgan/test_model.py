"""The generator: its size, its limits, and that padding and company change nothing."""

import math

import pytest
import torch

from recipes.metricgan.model import (
    HIGHEST,
    STEEPEST,
    Generator,
    LearnableSigmoid,
    Spectrum,
    enhance,
)


def small(seed: int = 0) -> tuple[Spectrum, Generator]:
    torch.manual_seed(seed)
    return Spectrum(), Generator(units=8, width=6)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_size() -> None:
    assert sum(p.numel() for p in Generator().parameters()) == 1_895_514


# ------------------------------------------------------------------------------------- spectrogram


@pytest.mark.parametrize("samples", [1, 255, 256, 257, 512, 5000, 5119, 5120, 5121])
def test_a_spectrogram_gives_its_samples_back(samples: int) -> None:
    spectrum, wav = Spectrum(), noise(2, samples)
    found = spectrum(wav)
    assert found.shape == (2, spectrum.frames(samples), spectrum.bins) == (2, found.shape[1], 257)
    torch.testing.assert_close(spectrum.invert(found, samples), wav, rtol=0, atol=1e-6)


def test_frames_of_many_are_counted_as_those_of_one() -> None:
    spectrum, lengths = Spectrum(), torch.arange(1, 2000, 7)
    assert spectrum.frames(lengths).tolist() == [spectrum.frames(n) for n in lengths.tolist()]


def test_a_hop_that_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(ValueError, match="a hop of 20 ms is 320 samples; allowed: 1 to half the"):
        Spectrum(16000, 32.0, 20.0)


def test_features_are_logarithms_of_magnitudes() -> None:
    wav = noise(1, 2000)
    for gain in (1.0, 16.0):
        spectrum = Spectrum(gain=gain)
        found = spectrum.features(spectrum(wav))
        torch.testing.assert_close(found, torch.log1p(gain * spectrum(wav).abs()))


def test_a_band_is_a_mean_over_its_frequencies() -> None:
    spectrum, wav = Spectrum(gain=30.0, bands=64), noise(1, 2000)
    found = spectrum.features(spectrum(wav))
    assert found.shape == (1, spectrum.frames(2000), 64)
    flat = torch.full((1, 3, 257), 0.2 + 0.1j)
    expected = math.log1p(30 * abs(0.2 + 0.1j))
    torch.testing.assert_close(spectrum.features(flat), torch.full((1, 3, 64), expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectrum.features(spectrum(wav)), found)


@pytest.mark.parametrize("bands", [16, 200])
def test_bands_that_cannot_be_are_refused(bands: int) -> None:
    with pytest.raises(ValueError, match=f"{bands} bands of 257 frequencies; allowed: 17 bands at"):
        Spectrum(bands=bands)


def test_silence_has_a_gradient() -> None:
    spectrum, wav = Spectrum(), torch.zeros(1, 2000, requires_grad=True)
    spectrum.features(spectrum(wav)).sum().backward()
    assert wav.grad is not None
    assert wav.grad.isfinite().all()


# --------------------------------------------------------------------------------------- generator


def test_masks_lie_between_floor_and_ceiling() -> None:
    _, generator = small()
    with torch.no_grad():
        generator.sigmoid.slope.fill_(3.5)
        generator.linear[-1].weight.mul_(50)
        mask = generator(Spectrum().features(Spectrum()(noise(3, 4000))))
    assert mask.min() == pytest.approx(0.05)
    assert 1.1 < mask.max() <= HIGHEST
    with pytest.raises(ValueError, match="the mask's floor is 1.5; allowed: 0 to below 1.2"):
        Generator(floor=1.5)


def test_every_frequency_has_a_slope_of_its_own() -> None:
    sigmoid = LearnableSigmoid(3)
    with torch.no_grad():
        sigmoid.slope.copy_(torch.tensor([0.0, 1.0, 3.0]))
    expected = [HIGHEST / (1 + math.exp(-slope * 0.7)) for slope in (0.0, 1.0, 3.0)]
    assert sigmoid(torch.full((2, 3), 0.7))[1].tolist() == pytest.approx(expected)


def test_slopes_are_limited_and_mended() -> None:
    sigmoid = LearnableSigmoid(6)
    with torch.no_grad():
        sigmoid.slope.copy_(torch.tensor([math.nan, 3.6, -9.0, 3.4, math.inf, -math.inf]))
    sigmoid.limit()
    slopes = sigmoid.slope.tolist()
    assert slopes[:2] == [STEEPEST, STEEPEST]
    assert slopes[2:4] == pytest.approx([-9.0, 3.4])
    assert slopes[4] == STEEPEST
    assert math.isfinite(slopes[5])


@pytest.mark.parametrize("length", [3000, 3071, 3072, 3073])
def test_company_does_not_change_what_is_enhanced(length: int) -> None:
    spectrum, generator = small()
    wavs = noise(3, 9000)
    lengths = torch.tensor([9000, length, 700])
    for wav, valid in zip(wavs, lengths, strict=True):
        wav[valid:] = 0
    together = enhance(spectrum, generator, wavs, lengths)
    for wav, valid, found in zip(wavs, lengths, together, strict=True):
        alone = enhance(spectrum, generator, wav[None, :valid], valid[None])[0]
        torch.testing.assert_close(found[:valid], alone, rtol=0, atol=1e-6)
        assert not found[valid:].any()


def test_layers_are_picked_by_name() -> None:
    _, generator = small()
    found = generator.weights_of(["linear", "sigmoid"])
    assert found == [*generator.linear.parameters(), generator.sigmoid.slope]
    with pytest.raises(ValueError, match="no layers 'lstm'; allowed: blstm, linear, sigmoid"):
        generator.weights_of(["lstm"])
