"""SEGAN's networks have the paper's shapes and sizes, and what they promise about batches."""

import re

import pytest
import torch
from torch import Tensor

from recipes.segan.model import (
    Discriminator,
    Generator,
    VirtualBatchNorm,
    adversarial_loss,
    deemphasise,
    discriminator_loss,
    emphasise,
    gains,
)
from tests.recipes.segan.tiny import SAMPLES, SIZE


def test_the_size_and_the_shapes_of_the_paper(uninitialised: None) -> None:
    """97.5 M in all, as comparisons of enhancers list SEGAN; and section 3: 16384 x 1 to 8 x 1024
    in eleven layers, and back.
    """
    generator, discriminator = Generator(), Discriminator(references=1)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (generator, discriminator)]
    assert sizes == [73_100_049, 24_373_082]
    assert sum(sizes) == 97_473_131
    found: list[tuple[int, int]] = []
    for layer in (*generator.encoder, *generator.decoder):
        layer.register_forward_hook(lambda _, __, out: found.append(tuple(out.shape[:0:-1])))
    with torch.no_grad():
        assert generator(torch.zeros(1, 16384)).shape == (1, 16384)
    down = [
        (8192, 16), (4096, 32), (2048, 32), (1024, 64), (512, 64), (256, 128), (128, 128),
        (64, 256), (32, 256), (16, 512), (8, 1024),
    ]  # fmt: skip
    assert found == [*down, *down[-2::-1], (16384, 1)]
    assert generator.latent == (1024, 8)


@pytest.mark.parametrize("stride", [2, 4, [2, 8]])
@pytest.mark.parametrize("kernel", [5, 31])
def test_chunks_keep_their_length(stride: int | list[int], kernel: int) -> None:
    generator = Generator((3, 5), kernel, stride, 64)
    assert generator(torch.randn(2, 64)).shape == (2, 64)
    assert Discriminator((3, 5), kernel, stride, 64, 2)(torch.randn(4, 2, 64)).shape == (4,)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="chunks have 63 samples; allowed: multiples of 4, by"):
        Generator((3, 5), 5, 2, 63)
    with pytest.raises(ValueError, match=re.escape("2 layers need as many strides, not [2]")):
        Discriminator((3, 5), 5, [2], 64)


def test_the_latent_changes_what_comes_out_and_is_fixed_where_none_is_given() -> None:
    generator, noisy = Generator(**SIZE), torch.randn(2, SAMPLES)
    one, other = (generator(noisy, torch.randn(2, *generator.latent)) for _ in range(2))
    assert not torch.equal(one, other)
    alone = torch.cat([generator(each[None]) for each in noisy])
    torch.testing.assert_close(generator(noisy), alone)
    assert torch.equal(Generator(**SIZE).fixed, generator.fixed)
    assert not any("fixed" in name for name in generator.state_dict())


def test_a_residual_generator_begins_with_what_it_gets() -> None:
    generator, noisy = Generator(**SIZE, residual=True), torch.randn(2, SAMPLES)
    assert torch.equal(generator(noisy), noisy)
    generator(noisy).square().sum().backward()
    assert generator.decoder[-1].weight.grad.any()


def test_every_weight_is_used() -> None:
    generator, discriminator = Generator(**SIZE), Discriminator(**SIZE, references=3)
    discriminator.remember(torch.randn(3, 2, SAMPLES))
    noisy = torch.randn(2, SAMPLES)
    found = generator(noisy, torch.randn(2, *generator.latent))
    discriminator(torch.stack([found, noisy], 1)).square().sum().backward()
    for name, p in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_virtual_batch_norm_is_the_formula_of_salimans() -> None:
    """Mean and mean of squares of the reference and the chunk, R to 1."""
    norm = VirtualBatchNorm(3)
    reference, x = 2 + 3 * torch.randn(4, 3, 50), 5 * torch.randn(2, 3, 50)
    found = norm(torch.cat([reference, x]), 4)
    for chunk, mine in zip(x, found[4:], strict=True):
        mean = (reference.mean((0, 2)) * 4 + chunk.mean(1)) / 5
        square = (reference.square().mean((0, 2)) * 4 + chunk.square().mean(1)) / 5
        truth = (chunk - mean[:, None]) / (square - mean.square() + 1e-5).sqrt()[:, None]
        torch.testing.assert_close(mine, truth, atol=1e-5, rtol=1e-4)
    mean = reference.mean((0, 2), keepdim=True)
    deviation = reference.var((0, 2), keepdim=True, correction=0).add(1e-5).sqrt()
    torch.testing.assert_close(found[:4], (reference - mean) / deviation, atol=1e-5, rtol=1e-4)


def test_a_score_does_not_depend_on_the_company() -> None:
    discriminator, pairs = Discriminator(**SIZE, references=3), torch.randn(5, 2, SAMPLES)
    discriminator.remember(torch.randn(3, 2, SAMPLES))
    alone = torch.cat([discriminator(each[None]) for each in pairs])
    torch.testing.assert_close(discriminator(pairs), alone)
    before = discriminator(pairs)
    discriminator.remember(torch.randn(3, 2, SAMPLES))
    assert not torch.allclose(before, discriminator(pairs))
    with pytest.raises(ValueError, match=r"reference batch is \(2, 2, 64\), not \(3, 2, 64\)"):
        discriminator.remember(torch.randn(2, 2, SAMPLES))


def test_losses_are_least_squares() -> None:
    def scores(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    assert discriminator_loss(scores(1, 1), scores(0, 0)) == 0
    assert discriminator_loss(scores(0, 2), scores(0, 2)) == pytest.approx(0.5 * 1 + 0.5 * 2)
    assert adversarial_loss(scores(1, 1)) == 0
    assert adversarial_loss(scores(0, 3)) == pytest.approx(0.5 * (1 + 4) / 2)


def test_gains_bring_chunks_to_one_level() -> None:
    noisy = torch.randn(3, 500) * torch.tensor([[1.0], [0.01], [0.0]])
    found = gains(noisy, 0.1)
    assert (found * noisy)[:2].square().mean(1).sqrt().tolist() == pytest.approx([0.1, 0.1])
    assert found.isfinite().all()
    assert torch.equal(gains(noisy, None), torch.ones(3, 1))


@pytest.mark.parametrize("coefficient", [0.0, 0.95])
def test_emphasis_can_be_undone(coefficient: float) -> None:
    signal = torch.randn(3, 2000)
    there = emphasise(signal, coefficient)
    torch.testing.assert_close(deemphasise(there, coefficient), signal, atol=1e-5, rtol=0)
    torch.testing.assert_close(there[:, 5], signal[:, 5] - coefficient * signal[:, 4])
