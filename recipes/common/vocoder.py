"""The network of a neural vocoder: from log-mel spectrograms to waveforms by HiFi-GAN's generator.

It is that of Kong et al. 2020 (arXiv 2010.05646); `recipes.hifigan` trains and uses it.

Shapes: B signals, M mel bands, F frames, S = F * hop samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

from recipes.common.mel import LogMel

SLOPE = 0.1  # of the leaky ReLUs


def conv(ins: int, outs: int, kernel: int, dilation: int = 1) -> nn.Module:
    """A weight-normalised convolution over time that keeps the length."""
    pad = (kernel - 1) // 2 * dilation
    return weight_norm(nn.Conv2d(ins, outs, (1, kernel), padding=(0, pad), dilation=(1, dilation)))


class Residual(nn.Module):
    """A residual block: dilated convolutions, each added to what it came from.

    Args:
        channels: C.
        kernel: size of the kernels, odd.
        dilations: of the convolutions.
        depth: 2 if each is followed by another one without dilation (V1 and V2 of the paper), 1 if
            it is alone (V3).
    """

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], depth: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.ModuleList(
                conv(channels, channels, kernel, dilation if n == 0 else 1) for n in range(depth)
            )
            for dilation in dilations
        )
        spans = (sum(dilation if n == 0 else 1 for n in range(depth)) for dilation in dilations)
        self.reach = (kernel - 1) // 2 * sum(spans)  # samples that are seen on each side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 1, T) to the same shape."""
        for step in self.steps:
            y = x
            for layer in step:
                y = layer(leaky_relu(y, SLOPE))
            x = x + y
        return x


class Generator(nn.Module):
    """HiFi-GAN's generator: log-mel spectrograms to waveforms.

    Transposed convolutions, each with a mean of residual blocks after it (section 2.2 of the
    paper).

    Signals are held as images of height 1 with the channels last in memory: on CPUs this is several
    times as fast as `Conv1d`, elsewhere it is no slower.

    Args:
        bands: M of the spectrograms.
        channels: C before the first up-sampling; each one halves it.
        rates: the factor of each up-sampling; their product is the hop.
        rate_kernels: the kernel of each, at least its rate and larger by an even number.
        kernels: of the residual blocks that are averaged, odd.
        dilations: of each of these blocks.
        depth: convolutions to a residual step, 2 or 1.
    """

    def __init__(
        self,
        bands: int = 80,
        channels: int = 512,
        rates: Sequence[int] = (8, 8, 2, 2),
        rate_kernels: Sequence[int] = (16, 16, 4, 4),
        kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        depth: int = 2,
    ) -> None:
        super().__init__()
        _check(channels, rates, rate_kernels, kernels, dilations)
        self.bands, self.hop = bands, math.prod(rates)
        self.rates, self.rate_kernels = list(rates), list(rate_kernels)
        self.first = conv(bands, channels, 7)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(rates, rate_kernels, strict=True):
            up = nn.ConvTranspose2d(
                channels,
                channels // 2,
                (1, kernel),
                stride=(1, rate),
                padding=(0, (kernel - rate) // 2),
            )
            channels //= 2
            self.ups.append(weight_norm(up))
            self.blocks.append(
                nn.ModuleList(
                    Residual(channels, k, d, depth) for k, d in zip(kernels, dilations, strict=True)
                )
            )
        self.last = conv(channels, 1, 7)

    @property
    def context(self) -> int:
        """Frames on each side of a frame that its samples depend on, at most."""
        samples = 3  # of the last convolution
        stages = list(zip(self.rates, self.rate_kernels, self.blocks, strict=True))
        for rate, kernel, blocks in reversed(stages):
            samples += max(block.reach for block in blocks)
            pad = (kernel - rate) // 2
            before, after = (samples + kernel - 1 - pad) // rate, (samples - 1 + pad) // rate + 1
            samples = max(before, after)
        return samples + 3

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, F) to (B, F * hop), within -1 and 1."""
        x = mel.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # (B, M, 1, F)
        x = self.first(x)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(leaky_relu(x, SLOPE))
            outs = [block(x) for block in blocks]
            x = sum(outs[1:], outs[0]) / len(outs)
        return torch.tanh(self.last(leaky_relu(x))).flatten(1)


def _check(
    channels: int,
    rates: Sequence[int],
    rate_kernels: Sequence[int],
    kernels: Sequence[int],
    dilations: Sequence[Sequence[int]],
) -> None:
    """Raise ValueError for sizes that do not fit each other."""
    if len(rates) != len(rate_kernels):
        raise ValueError(
            f"rates {list(rates)} and rate_kernels {list(rate_kernels)} differ in length"
        )
    for rate, kernel in zip(rates, rate_kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise ValueError(
                f"rate_kernels has {kernel} for the rate {rate}; allowed: {rate}, {rate + 2}, "
                f"{rate + 4} …"
            )
    if channels % 2 ** len(rates):
        raise ValueError(
            f"channels is {channels}, which cannot be halved {len(rates)} times; "
            f"allowed: multiples of {2 ** len(rates)}"
        )
    if not kernels or len(kernels) != len(dilations):
        raise ValueError(
            f"kernels {list(kernels)} and dilations {[list(each) for each in dilations]} must be "
            "equally many, at least one"
        )
    if even := [kernel for kernel in kernels if kernel % 2 == 0]:
        raise ValueError(f"kernels has {even[0]}; allowed: odd numbers")


def check_front_end(generator: Generator, mel: LogMel) -> None:
    """Raise ValueError for a front end whose mels are not those that a generator takes."""
    for name in ("bands", "hop"):
        ours, theirs = getattr(generator, name), getattr(mel, name)
        if ours != theirs:
            raise ValueError(f"the generator has {name}={ours}, the mel front end {theirs}")
