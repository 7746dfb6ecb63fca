"""Varied masks: smooth over frequency, from their seed, of more and of less than the mask."""

import pytest
import torch

from recipes.metricgan.model import Generator, Spectrum, enhance
from recipes.metricgan.variations import LEAST, MOST, exponents, losses, version_of


def test_each_seed_has_a_smooth_curve_of_its_own() -> None:
    curves = exponents(range(200), 257)
    assert curves.shape == (200, 1, 257)
    assert torch.equal(curves[7:8], exponents([7], 257))
    assert (curves > 0).all()
    assert (curves.log().diff(dim=-1).abs() < 0.03).all()
    middles = curves.log().mean(-1)
    assert middles.min() < 0.6 * LEAST
    assert middles.max() > 0.6 * MOST


def test_a_larger_exponent_takes_more_away() -> None:
    torch.manual_seed(0)
    spectrum, generator = Spectrum(), Generator(units=4, layers=1, width=5)
    wav, lengths = torch.randn(2, 4000), torch.tensor([4000, 3000])
    with torch.no_grad():
        half, own, double = (
            enhance(spectrum, generator, wav, lengths, torch.full((2, 1, 257), power)).norm()
            for power in (0.5, 1.0, 2.0)
        )
        assert torch.equal(own, enhance(spectrum, generator, wav, lengths).norm())
    assert half > 1.1 * own > 1.2 * double


def test_what_all_versions_share_is_no_error_between_them() -> None:
    shared = torch.tensor([[0.0, 0.0], [0.3, 0.1], [0.3, 0.1], [0.3, 0.1]])
    mean = torch.tensor([3 * 0.09 / 4, 3 * 0.01 / 4])
    for within in (0.0, 20.0):
        torch.testing.assert_close(losses(shared, within), mean)
    apart = torch.tensor([[0.5], [0.2], [-0.2]])  # 0.5 is that of the clean signal
    found = (losses(apart, 20.0) - losses(apart, 0.0)).item()
    assert found == pytest.approx(20 * 0.04)


def test_versions_are_named() -> None:
    assert [version_of("a", number) for number in range(3)] == ["a", "a (varied 1)", "a (varied 2)"]
