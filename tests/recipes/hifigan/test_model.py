"""The discriminators and the losses of both players."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from recipes.hifigan.model import (
    Discriminators,
    Judgement,
    PeriodDiscriminator,
    ScaleDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from tests.recipes.hifigan.tiny import discriminators


def size(module: nn.Module) -> int:
    """Parameters, those of weight norm's directions and lengths counted as one weight."""
    for each in module.modules():
        if is_parametrized(each, "weight"):
            remove_parametrizations(each, "weight")
    return sum(p.numel() for p in module.parameters())


def test_the_published_size() -> None:
    judge = Discriminators()
    periods, scales = judge.parts[:5], judge.parts[5:]
    assert [each.period for each in periods] == [2, 3, 5, 7, 11]
    assert [each.halvings for each in scales] == [0, 1, 2]
    assert size(judge) == 70_702_792
    assert size(periods) == 41_092_165
    assert size(scales) == 29_610_627


def test_the_full_rate_has_spectral_norm_and_the_others_weight_norm() -> None:
    def norms(part: Any) -> set[str]:
        return {type(layer.parametrizations.weight[0]).__name__ for layer in part.layers}

    found = [norms(part) for part in discriminators().parts]
    assert found == [{"_WeightNorm"}, {"_WeightNorm"}, {"_SpectralNorm"}, {"_WeightNorm"}]


def test_a_period_compares_samples_that_are_so_far_apart() -> None:
    """A change at one phase reaches only the scores of that phase."""
    judge = PeriodDiscriminator(3, (2, 4)).double()
    wav = torch.randn(1, 99, dtype=torch.float64, requires_grad=True)
    scores = judge(wav).scores.reshape(1, -1, 3)
    scores[..., 1].square().sum().backward()
    reached = wav.grad[0].nonzero().flatten() % 3
    assert reached.unique().tolist() == [1]


@pytest.mark.parametrize("samples", [96, 97, 98])
def test_a_period_takes_any_length(samples: int) -> None:
    judge = PeriodDiscriminator(3, (2, 4))
    found = judge(torch.randn(2, samples))
    assert found.scores.shape == (2, 3 * 4)  # 33 rows, of which strides of 3 leave 11 and 4
    assert torch.isfinite(found.scores).all()


def test_a_scale_sees_the_average_of_neighbours() -> None:
    judge = ScaleDiscriminator(1, ((4, 5, 1, 1),))
    wav = torch.randn(2, 64)
    quick = wav + 0.5 * torch.tensor([1.0, -1.0]).repeat(32)  # the highest frequency there is
    inside = slice(4, -4)
    torch.testing.assert_close(
        judge(wav).scores[:, inside], judge(quick).scores[:, inside], atol=1e-5, rtol=0
    )


def test_features_are_those_of_every_layer_and_the_scores_are_the_last() -> None:
    for part in discriminators().parts:
        found = part(torch.randn(2, 64))
        assert len(found.features) == len(part.layers)
        assert torch.equal(found.scores, found.features[-1].flatten(1))


def judged(*scores: float, features: float = 0.0) -> list[Judgement]:
    return [
        Judgement(torch.full((2, 3), score), [torch.full((2, 4), features), torch.ones(2, 3)])
        for score in scores
    ]


def test_losses_by_hand() -> None:
    real, fake = judged(0.8, 0.5, features=1.0), judged(0.1, 0.3, features=-0.5)
    assert discriminator_loss(real, fake).item() == pytest.approx(0.04 + 0.01 + 0.25 + 0.09)
    assert adversarial_loss(fake).item() == pytest.approx(0.81 + 0.49)
    assert feature_loss(real, fake).item() == pytest.approx(1.5 + 0.0 + 1.5 + 0.0)
    assert discriminator_loss(judged(1.0), judged(0.0)).item() == 0.0
    assert adversarial_loss(judged(1.0)).item() == 0.0
    assert feature_loss(real, real).item() == 0.0


def test_a_fixed_generator_is_told_apart() -> None:
    """The loss is one that a discriminator can learn by."""
    torch.manual_seed(0)
    judge = discriminators()
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.01)
    real, fake = torch.sin(torch.arange(256.0) * 0.3).repeat(4, 1), torch.randn(4, 256)
    first = None
    for _ in range(30):
        loss = discriminator_loss(judge(real), judge(fake))
        first = first or loss.item()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_no_discriminator_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no discriminator: give some periods"):
        Discriminators((), scales=0)
