"""SEGAN's two players: waveforms to waveforms, and pairs of waveforms to a score.

S. Pascual, A. Bonafonte, J. Serra, "SEGAN: Speech Enhancement Generative Adversarial Network",
Interspeech 2017. Both are built of the same convolutions, of stride `stride`, each of which makes a
signal shorter and gives it more channels. The normalisation of the discriminator is virtual batch
normalisation, as in the paper (T. Salimans et al., "Improved Techniques for Training GANs", 2016).

Shapes: B chunks of T samples; after the encoder C channels (1024) of L samples (8); R chunks in the
reference batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

PAPER = (16, 32, 32, 64, 64, 128, 128, 256, 256, 512, 1024)


class Generator(nn.Module):
    """Noisy chunks to enhanced ones, both pre-emphasised: (B, T) to (B, T).

    An encoder, a latent `z` of as many channels beside what it gives, and a decoder of transposed
    convolutions. The skip connections take what the encoder's convolutions give before its PReLU,
    so that what the decoder adds to is the signal itself, not half of it.

    Args:
        channels: of the encoder, from the outside in; the decoder has the same in reverse.
        kernel: the width of all filters, odd.
        stride: how much shorter each layer makes a signal.
        samples: T; a multiple of what all layers together shorten by.
        residual: add what the decoder gives to the noisy chunk, beginning with nothing. Not in the
            paper: it spares the steps in which the network learns to give back what it gets.

    Raises ValueError for a T that is none.
    """

    def __init__(
        self,
        channels: Sequence[int] = PAPER,
        kernel: int = 31,
        stride: int | Sequence[int] = 2,
        samples: int = 16384,
        residual: bool = False,
    ) -> None:
        super().__init__()
        strides = _strides(channels, stride, samples)
        pad, ins = kernel // 2, [1, *channels]
        self.residual = residual
        self.samples, self.latent = samples, (channels[-1], samples // prod(strides))
        self.encoder = nn.ModuleList(
            nn.Conv1d(a, b, kernel, s, pad)
            for (a, b), s in zip(pairwise(ins), strides, strict=True)
        )
        self.encoder_slopes = nn.ModuleList(nn.PReLU(each) for each in channels)
        # Each layer takes what the one before gives and, of the same size, z or a skip connection.
        self.decoder = nn.ModuleList(
            nn.ConvTranspose1d(2 * b, a, kernel, s, pad, output_padding=s - 1)
            for (a, b), s in reversed(list(zip(pairwise(ins), strides, strict=True)))
        )
        self.decoder_slopes = nn.ModuleList(nn.PReLU(each) for each in ins[-2:0:-1])
        if residual:
            for parameter in self.decoder[-1].parameters():
                nn.init.zeros_(parameter)
        # Without z of its own every chunk gets this one, so that a file comes out the same always.
        fixed = torch.randn(1, *self.latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, noisy: Tensor, z: Tensor | None = None) -> Tensor:
        """(B, T) and z (B, C, L) to (B, T)."""
        x = noisy.unsqueeze(1)  # (B, 1, T)
        skips = []
        for convolve, slope in zip(self.encoder, self.encoder_slopes, strict=True):
            x = convolve(x)
            skips.append(x)
            x = slope(x)
        skips[-1] = (self.fixed.expand(x.shape[0], -1, -1) if z is None else z).to(x)
        for number, convolve in enumerate(self.decoder):
            x = convolve(torch.cat([x, skips.pop()], dim=1))
            if skips:
                x = self.decoder_slopes[number](x)
        found = x.squeeze(1).tanh()
        return noisy + found if self.residual else found


class VirtualBatchNorm(nn.Module):
    """Normalises each chunk by the statistics of the reference batch and of itself.

    A chunk counts as one beside the R of the reference, so that its result does not depend on the
    others that it is computed with.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gain, self.bias = (
            nn.Parameter(fill(channels, 1)) for fill in (torch.ones, torch.zeros)
        )
        self.eps = eps

    def forward(self, x: Tensor, references: int) -> Tensor:
        """(R + B, C, T), the first ``references`` of which are the reference batch."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()  # A mean of squares needs more than half precision.
            variance, mean = torch.var_mean(x, 2, correction=0, keepdim=True)  # (R + B, C, 1)
            mean, square = (
                self._shared(each, references) for each in (mean, variance + mean.square())
            )
            deviation = (square - mean.square()).clamp(min=0).add(self.eps).sqrt()
            scale = self.gain / deviation
            return torch.addcmul(self.bias - mean * scale, x, scale)  # one pass over x

    @staticmethod
    def _shared(each: Tensor, references: int) -> Tensor:
        """A statistic (R + B, C, 1) of each chunk as that of the reference with this chunk."""
        known = each[:references].mean(0, keepdim=True)
        own = (each[references:] + references * known) / (references + 1)
        return torch.cat([known.expand(references, -1, -1), own])


class Discriminator(nn.Module):
    """Score of a pair, high for (clean, noisy), low for (enhanced, noisy): (B, 2, T) to (B,).

    The generator's encoder with two channels in, virtual batch normalisation and LeakyReLU; then
    all channels are weighted to one, and its L samples to a score.

    Args:
        channels, kernel, stride, samples: as those of the generator.
        references: R, chunks of the reference batch, which `remember` sets.
    """

    reference: Tensor

    def __init__(
        self,
        channels: Sequence[int] = PAPER,
        kernel: int = 31,
        stride: int | Sequence[int] = 2,
        samples: int = 16384,
        references: int = 16,
    ) -> None:
        super().__init__()
        strides = _strides(channels, stride, samples)
        self.encoder = nn.ModuleList(
            nn.Conv1d(a, b, kernel, s, kernel // 2)
            for (a, b), s in zip(pairwise([2, *channels]), strides, strict=True)
        )
        self.norms = nn.ModuleList(map(VirtualBatchNorm, channels))
        self.weigh = nn.Conv1d(channels[-1], 1, 1)
        self.decide = nn.Linear(samples // prod(strides), 1)
        self.register_buffer("reference", torch.zeros(references, 2, samples))

    def remember(self, reference: Tensor) -> None:
        """Set the reference batch, (R, 2, T): pairs of clean and noisy chunks, pre-emphasised."""
        if reference.shape != self.reference.shape:
            raise ValueError(
                f"the reference batch is {tuple(reference.shape)}, not "
                f"{tuple(self.reference.shape)}"
            )
        self.reference.copy_(reference)

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, 2, T) to (B,)."""
        references = len(self.reference)
        x = torch.cat([self.reference.to(pairs), pairs])
        for convolve, norm in zip(self.encoder, self.norms, strict=True):
            x = nn.functional.leaky_relu(norm(convolve(x), references), 0.3)
        scores = self.decide(self.weigh(x[references:]).squeeze(1))  # (B, 1)
        return scores.squeeze(1).float()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares (eq. 4 of the paper) of scores (B,): real ones should be 1, fake ones 0."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """The generator's part of least squares (eq. 5): its chunks should score 1."""
    return 0.5 * (fake - 1).square().mean()


def emphasise(signal: Tensor, coefficient: float) -> Tensor:
    """Apply pre-emphasis, ``y[t] = x[t] - coefficient · x[t - 1]``, to (…, T).

    High frequencies weigh more, as they do for the ear.
    """
    return torch.cat([signal[..., :1], signal[..., 1:] - coefficient * signal[..., :-1]], dim=-1)


def deemphasise(signal: Tensor, coefficient: float) -> Tensor:
    """The inverse of `emphasise`, in float32."""
    from torchaudio.functional import lfilter

    signal = signal.float()
    ones = signal.new_tensor([1.0, 0.0])
    with torch.autocast(signal.device.type, enabled=False):
        return lfilter(signal, signal.new_tensor([1.0, -coefficient]), ones, clamp=False)


def gains(noisy: Tensor, level: float | None) -> Tensor:
    """Return the gain (N, 1) to the root mean square ``level`` of each chunk (N, T); 1 for None.

    A network of ReLUs learns faster from signals that are as large as its biases, and makes the
    same of loud and soft speech. Chunks below -80 dB count as if they were as loud as that.
    """
    if level is None:
        return noisy.new_ones(len(noisy), 1)
    return level / noisy.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)


def enhance(
    generator: nn.Module, noisy: Tensor, pre_emphasis: float, level: float | None
) -> Tensor:
    """Chunks of samples (N, T) through the generator, as it was trained; (N, T), float32."""
    noisy = emphasise(noisy, pre_emphasis)
    gain = gains(noisy, level)
    return deemphasise(generator(noisy * gain).float() / gain, pre_emphasis)


def _strides(channels: Sequence[int], stride: int | Sequence[int], samples: int) -> list[int]:
    """One for each layer."""
    strides = [stride] * len(channels) if isinstance(stride, int) else list(stride)
    if len(strides) != len(channels):
        raise ValueError(f"{len(channels)} layers need as many strides, not {strides}")
    if samples % prod(strides):
        raise ValueError(
            f"chunks have {samples} samples; allowed: multiples of {prod(strides)}, by which "
            f"{len(strides)} layers of stride {stride} shorten them"
        )
    return strides
