"""The discriminators of HiFi-GAN and the losses of both players (Kong et al. 2020).

The paper is arXiv 2010.05646. The generator is in `recipes.common.vocoder`.

Shapes: B signals of S samples; a discriminator gives scores (B, N), and the features of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, leaky_relu, pad
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SLOPE = 0.1  # of the leaky ReLUs


class Judgement(NamedTuple):
    """Output of one discriminator for a batch of signals."""

    scores: Tensor  # (B, N): 1 for what it takes for real, 0 for what it takes for generated
    features: list[Tensor]  # after each layer, the scores last


class PeriodDiscriminator(nn.Module):
    """Discriminator of one period (section 2.3, "Multi-period discriminator").

    The signal is folded to a matrix of rows of ``period`` samples, whose columns are convolved.

    ``channels`` are those of its layers of kernel 5 and stride 3; another one without stride
    follows, of as many channels as the last.
    """

    def __init__(self, period: int, channels: Sequence[int] = (32, 128, 512, 1024)) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        layers = [
            nn.Conv2d(i, o, (5, 1), (3, 1), padding=(2, 0))
            for i, o in zip(sizes, channels, strict=False)
        ]
        layers.append(nn.Conv2d(channels[-1], channels[-1], (5, 1), padding=(2, 0)))
        layers.append(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, wav: Tensor) -> Judgement:
        """(B, S) to its judgement."""
        wav = pad(wav, (0, -wav.shape[1] % self.period), mode="reflect")
        return _judge(self.layers, wav.reshape(len(wav), 1, -1, self.period))


class ScaleLayer(NamedTuple):
    """A convolution over time of a `ScaleDiscriminator`."""

    channels: int
    kernel: int
    stride: int
    groups: int


SCALE_LAYERS = (
    ScaleLayer(128, 15, 1, 1), ScaleLayer(128, 41, 2, 4), ScaleLayer(256, 41, 2, 16),
    ScaleLayer(512, 41, 4, 16), ScaleLayer(1024, 41, 4, 16), ScaleLayer(1024, 41, 1, 16),
    ScaleLayer(1024, 5, 1, 1),
)  # fmt: skip


class ScaleDiscriminator(nn.Module):
    """Discriminator of one scale (section 2.3, "Multi-scale discriminator").

    It sees all samples, at the full rate or at one averaged ``halvings`` times by two.

    At the full rate its weights have spectral norm, below it weight norm, as in the paper.
    """

    def __init__(self, halvings: int = 0, layers: Sequence[Sequence[int]] = SCALE_LAYERS) -> None:
        super().__init__()
        self.halvings = halvings
        norm = weight_norm if halvings else spectral_norm
        found, ins = [], 1
        for each in layers:
            outs, kernel, stride, groups = each
            found.append(
                nn.Conv2d(
                    ins, outs, (1, kernel), (1, stride), padding=(0, kernel // 2), groups=groups
                )
            )
            ins = outs
        found.append(nn.Conv2d(ins, 1, (1, 3), padding=(0, 1)))
        self.layers = nn.ModuleList(norm(layer) for layer in found)

    def forward(self, wav: Tensor) -> Judgement:
        """(B, S) to its judgement."""
        for _ in range(self.halvings):
            wav = avg_pool1d(wav, 4, 2, padding=2)
        return _judge(self.layers, wav[:, None, None])


class Discriminators(nn.Module):
    """All discriminators as one: those of periods, then those of scales.

    Args:
        periods: of the multi-period discriminator.
        period_channels: of each of these.
        scales: how many rates the multi-scale discriminator looks at, each half of the one before.
        scale_layers: of each of these, [channels, kernel, stride, groups] a layer.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        period_channels: Sequence[int] = (32, 128, 512, 1024),
        scales: int = 3,
        scale_layers: Sequence[Sequence[int]] = SCALE_LAYERS,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [
                *(PeriodDiscriminator(period, period_channels) for period in periods),
                *(ScaleDiscriminator(halvings, scale_layers) for halvings in range(scales)),
            ]
        )
        if not self.parts:
            raise ValueError("there is no discriminator: give some periods, or 1 or more scales")

    def forward(self, wav: Tensor) -> list[Judgement]:
        """(B, S) to what each of them makes of it."""
        return [part(wav) for part in self.parts]


def _judge(layers: nn.ModuleList, x: Tensor) -> Judgement:
    # Channels last in memory: on CPUs several times as fast, elsewhere no slower.
    x = x.contiguous(memory_format=torch.channels_last)
    features = []
    *inner, last = layers
    for layer in inner:
        x = leaky_relu(layer(x), SLOPE)
        features.append(x)
    features.append(last(x))
    return Judgement(features[-1].flatten(1), features)


def pairs(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Iterator[tuple[Tensor, Tensor]]:
    """The features of each layer for real and for generated signals."""
    for one, other in zip(real, fake, strict=True):
        yield from zip(one.features, other.features, strict=True)


def discriminator_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Least squares: real signals shall get 1, generated ones 0 (equation 1 of the paper)."""
    parts = [
        (1 - one.scores.float()).square().mean() + other.scores.float().square().mean()
        for one, other in zip(real, fake, strict=True)
    ]
    return torch.stack(parts).sum()


def adversarial_loss(fake: Sequence[Judgement]) -> Tensor:
    """Least squares: generated signals shall get 1 (equation 2)."""
    return torch.stack([(1 - each.scores.float()).square().mean() for each in fake]).sum()


def feature_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """The mean distance of the features, layer by layer, the layers summed (equation 4)."""
    parts = [(one.float() - other.float()).abs().mean() for one, other in pairs(real, fake)]
    return torch.stack(parts).sum()
