"""The two players: their sizes, their limits, and that padding and company change nothing."""

import math

import pytest
import torch

from recipes.metricgan.model import (
    HIGHEST,
    STEEPEST,
    Discriminator,
    Generator,
    LearnableSigmoid,
    Spectrum,
    enhance,
)


def small(seed: int = 0) -> tuple[Spectrum, Generator, Discriminator]:
    torch.manual_seed(seed)
    return Spectrum(), Generator(units=8, width=6), Discriminator(channels=3)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_published_sizes() -> None:
    assert sum(p.numel() for p in Generator().parameters()) == 1_895_514
    assert sum(p.numel() for p in Discriminator().parameters()) == 19_010


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


def test_silence_has_a_gradient() -> None:
    spectrum, wav = Spectrum(), torch.zeros(1, 2000, requires_grad=True)
    spectrum.features(spectrum(wav)).sum().backward()
    assert wav.grad is not None
    assert wav.grad.isfinite().all()


# --------------------------------------------------------------------------------------- generator


def test_masks_lie_between_floor_and_ceiling() -> None:
    _, generator, _ = small()
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
    spectrum, generator, _ = small()
    wavs = noise(3, 9000)
    lengths = torch.tensor([9000, length, 700])
    for wav, valid in zip(wavs, lengths, strict=True):
        wav[valid:] = 0
    together = enhance(spectrum, generator, wavs, lengths)
    for wav, valid, found in zip(wavs, lengths, together, strict=True):
        alone = enhance(spectrum, generator, wav[None, :valid], valid[None])[0]
        torch.testing.assert_close(found[:valid], alone, rtol=0, atol=1e-6)
        assert not found[valid:].any()


# ----------------------------------------------------------------------------------- discriminator


def features(frames: int, seed: int) -> torch.Tensor:
    return torch.rand(1, frames, 257, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 16, 17, 40])
def test_company_does_not_change_a_score(frames: int) -> None:
    _, _, judge = small()
    judge.eval()  # no power iteration between the two
    judged, clean = torch.zeros(2, 3, 60, 257)
    lengths = torch.tensor([60, frames, 25])
    for i, length in enumerate(lengths.tolist()):
        judged[i, :length], clean[i, :length] = features(length, i)[0], features(length, i + 9)[0]
    together = judge(judged, clean, lengths)
    alone = [judge(judged[i : i + 1, :n], clean[i : i + 1, :n]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    assert together.unique().numel() == 3


def test_a_score_depends_on_both_signals() -> None:
    _, _, judge = small()
    judge.eval()
    a, b = features(30, 0), features(30, 1)
    assert len({judge(*pair).item() for pair in ((a, a), (a, b), (b, a))}) == 3


def test_convolutions_are_spectrally_normalised() -> None:
    _, _, judge = small()
    with torch.no_grad():
        for layer in judge.convolutions:
            layer.parametrizations.weight.original.mul_(7)
        for _ in range(60):  # power iterations
            judge(features(20, 0), features(20, 1))
    judge.eval()
    norms = [
        torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
        for layer in judge.convolutions
    ]
    assert len(norms) == 4
    assert norms == pytest.approx([1.0] * 4, abs=2e-2)
