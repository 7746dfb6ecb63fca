"""The generator of a vocoder."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from recipes.common.mel import LogMel
from recipes.common.vocoder import Generator, check_front_end

V3 = {
    "rates": (8, 8, 4), "rate_kernels": (16, 16, 8), "kernels": (3, 5, 7),
    "dilations": ((1, 2), (2, 6), (3, 12)), "depth": 1,
}  # fmt: skip
SMALL = {"bands": 5, "rates": (4, 2), "rate_kernels": (8, 4), "kernels": (3, 5)}
KINDS = {
    "first kind": {**SMALL, "channels": 8, "dilations": ((1, 3), (1, 2))},
    "second kind": {**SMALL, "channels": 8, "dilations": ((1, 2), (2, 6)), "depth": 1},
    "uneven": {**SMALL, "channels": 4, "rates": (3, 5), "rate_kernels": (3, 11),
               "kernels": (3,), "dilations": ((4,),)},
}  # fmt: skip


def plain_size(generator: Generator) -> int:
    """Return the number of its parameters without weight norm."""
    layers = [each for each in generator.modules() if is_parametrized(each)]
    return sum(each.weight.numel() + each.bias.numel() for each in layers)


def make(kind: str = "first kind") -> Generator:
    torch.manual_seed(0)
    return Generator(**KINDS[kind])


@pytest.mark.parametrize(
    ("sizes", "millions", "exactly"),
    [
        ({}, 13.9, 13_926_017),
        ({"channels": 128}, 0.92, 925_985),
        ({"channels": 256, **V3}, 1.46, 1_462_273),
    ],
    ids=["V1", "V2", "V3"],
)
def test_the_published_sizes(sizes: dict[str, Any], millions: float, exactly: int) -> None:
    generator = Generator(**sizes)
    assert plain_size(generator) == exactly
    assert exactly / 1e6 == pytest.approx(millions, abs=0.04)
    assert generator.hop == 256


def by_the_paper(generator: Generator, mel: Tensor, depth: int) -> Tensor:
    """The same weights in one-dimensional operations, as section 2.2 tells it."""

    def convolved(x: Tensor, layer: Any) -> Tensor:
        weight, dilation = layer.weight.squeeze(2), layer.dilation[1]
        return F.conv1d(x, weight, layer.bias, padding="same", dilation=dilation)

    def refined(x: Tensor, block: Any) -> Tensor:
        for step in block.steps:
            y = convolved(F.leaky_relu(x, 0.1), step[0])
            x = x + (convolved(F.leaky_relu(y, 0.1), step[1]) if depth == 2 else y)
        return x

    x = convolved(mel, generator.first)
    for up, rate, kernel, blocks in zip(
        generator.ups, generator.rates, generator.rate_kernels, generator.blocks, strict=True
    ):
        weight = up.weight.squeeze(2)
        x = F.leaky_relu(x, 0.1)
        x = F.conv_transpose1d(x, weight, up.bias, rate, padding=(kernel - rate) // 2)
        x = torch.stack([refined(x, block) for block in blocks]).mean(0)
    return torch.tanh(convolved(F.leaky_relu(x), generator.last)).squeeze(1)


@pytest.mark.parametrize(("kind", "depth"), [("first kind", 2), ("second kind", 1), ("uneven", 2)])
def test_it_is_the_network_of_the_paper(kind: str, depth: int) -> None:
    generator, mel = make(kind), torch.randn(2, 5, 9)
    found = generator(mel)
    assert found.shape == (2, 9 * generator.hop)
    torch.testing.assert_close(found, by_the_paper(generator, mel, depth))


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_what_a_frame_depends_on(kind: str) -> None:
    generator = make(kind).double()
    middle = generator.context + 3
    mel = torch.randn(1, 5, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    wave = generator(mel)[0]
    wave[middle * generator.hop : (middle + 1) * generator.hop].square().sum().backward()
    reached = mel.grad[0].abs().sum(0).nonzero().flatten() - middle
    assert max(-int(reached[0]), int(reached[-1])) == generator.context


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rates": (4,)}, r"rates \[4\] and rate_kernels \[8, 4\] differ in length"),
        ({"rate_kernels": (7, 4)}, "rate_kernels has 7 for the rate 4; allowed: 4, 6, 8"),
        ({"rate_kernels": (2, 4)}, "rate_kernels has 2 for the rate 4"),
        ({"channels": 6}, "channels is 6, which cannot be halved 2 times; allowed: multiples of 4"),
        ({"kernels": (3,)}, r"kernels \[3\] and dilations .* must be equally many"),
        ({"kernels": (3, 4)}, "kernels has 4; allowed: odd numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Generator(**{**KINDS["first kind"], **changes})


def test_a_front_end_of_other_mels_is_refused() -> None:
    with pytest.raises(ValueError, match="the generator has hop=8, the mel front end 16"):
        check_front_end(make(), LogMel(8000, bands=5, n_fft=32, hop=16))
    with pytest.raises(ValueError, match="the generator has bands=5, the mel front end 6"):
        check_front_end(make(), LogMel(8000, bands=6, n_fft=32, hop=8))


def test_sound_is_within_full_scale() -> None:
    generator = make().double()
    nn.init.constant_(generator.last.bias, 5.0)
    found = generator(10 * torch.randn(1, 5, 9, dtype=torch.float64)).detach()
    assert math.isclose(float(found.max()), 1.0, abs_tol=1e-2)
    assert float(found.abs().max()) <= 1.0
