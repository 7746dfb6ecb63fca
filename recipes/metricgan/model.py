"""The two players of MetricGAN+: a generator of masks, and a discriminator that predicts scores.

Fu et al. 2021, "MetricGAN+: An Improved Version of MetricGAN for Speech Enhancement" (arXiv
2104.03538), after Fu et al. 2019 (arXiv 1905.04874). Letters: B utterances, S samples, T frames, F
frequencies.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

HIGHEST = 1.2  # of a mask; above 1 since a frame of speech may be louder than its mixture
STEEPEST = 3.5  # slope of a learnable sigmoid


class Spectrum(nn.Module):
    """Samples to a complex spectrogram and back, with a Hamming window.

    Args:
        sample_rate: in Hz.
        window_ms, hop_ms: in milliseconds; the FFT is as long as the window.
        gain: of the magnitudes that the players see. Speech as it is mostly recorded is so low that
            log(1 + x) is hardly a logarithm, and a larger gain shows more of what is quiet.
    """

    window: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        window_ms: float = 32.0,
        hop_ms: float = 16.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.gain = gain
        self.size, self.hop = (round(sample_rate * ms / 1000) for ms in (window_ms, hop_ms))
        if not 0 < self.hop <= self.size // 2:
            raise ValueError(
                f"a hop of {hop_ms:g} ms is {self.hop} samples; allowed: 1 to half the window's "
                f"{self.size}, so that spectrograms can be inverted"
            )
        self.register_buffer("window", torch.hamming_window(self.size), persistent=False)

    @property
    def bins(self) -> int:
        """How many frequencies there are."""
        return self.size // 2 + 1

    def frames(self, samples: Any) -> Any:
        """How many frames so many samples have; of numbers, or tensors of numbers.

        The last one's middle lies at the end or behind it, so that whatever may follow in a padded
        batch has no part in the samples.
        """
        return 1 - (-samples // self.hop)

    def forward(self, wav: Tensor) -> Tensor:
        """Samples (B, S) to a spectrogram (B, T, F), complex."""
        wav = nn.functional.pad(wav.float(), (0, -wav.shape[-1] % self.hop))
        found = torch.stft(
            wav, self.size, self.hop, window=self.window, pad_mode="constant",
            return_complex=True,
        )  # fmt: skip
        return found.transpose(1, 2)

    def invert(self, spectrum: Tensor, samples: int) -> Tensor:
        """A spectrogram (B, T, F) to samples (B, samples)."""
        return torch.istft(
            spectrum.transpose(1, 2), self.size, self.hop, window=self.window, length=samples
        )

    def features(self, spectrum: Tensor) -> Tensor:
        """What both players see of a spectrogram (B, T, F): log(1 + gain · |X|)."""
        # The gradient of a magnitude at 0 is not defined; a little power makes it 0 there.
        power = spectrum.real.square() + spectrum.imag.square()
        return ((power + 1e-10).sqrt() * self.gain).log1p()


class LearnableSigmoid(nn.Module):
    """1.2 · σ(slope · x) with a slope for each frequency (section 2.3 of MetricGAN+)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(bins))

    def forward(self, x: Tensor) -> Tensor:
        return HIGHEST * torch.sigmoid(self.slope * x)

    @torch.no_grad()
    def limit(self) -> None:
        """Bring slopes above 3.5 back to it, and those that are no numbers.

        Without a limit the metric's gradient lets them grow until the mask is all or nothing.
        """
        self.slope.nan_to_num_(nan=STEEPEST, posinf=STEEPEST).clamp_(max=STEEPEST)


class Generator(nn.Module):
    """A mask for each frequency of each frame, between 0.05 and 1.2.

    Args:
        bins: frequencies F.
        units: of each of the two directions of an LSTM layer.
        layers: LSTM layers.
        width: of the linear layer between LSTM and mask.
        floor: the lowest value of a mask; it hides what sounds like water in the music.
    """

    def __init__(
        self,
        bins: int = 257,
        units: int = 200,
        layers: int = 2,
        width: int = 300,
        floor: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0.0 <= floor < HIGHEST:
            raise ValueError(f"the mask's floor is {floor!r}; allowed: 0 to below {HIGHEST}")
        self.floor = floor
        self.blstm = nn.LSTM(bins, units, layers, batch_first=True, bidirectional=True)
        self.linear = nn.Sequential(
            nn.Linear(2 * units, width), nn.LeakyReLU(0.3), nn.Linear(width, bins)
        )
        self.sigmoid = LearnableSigmoid(bins)

    def forward(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        """Log magnitudes (B, T, F) to masks (B, T, F).

        ``frames`` (B,) says where padding begins; None: nowhere. What an utterance gets does not
        depend on what it is batched with.
        """
        padded = frames is not None and bool((frames < features.shape[1]).any())
        if padded:
            assert frames is not None
            packed = pack_padded_sequence(
                features, frames.cpu(), batch_first=True, enforce_sorted=False
            )
            hidden, _ = pad_packed_sequence(
                self.recur(packed), batch_first=True, total_length=features.shape[1]
            )
        else:
            hidden = self.recur(features)
        # In full precision from here on: a step of bf16 is audible in a mask near its floor.
        return self.sigmoid(self.linear(hidden).float()).clamp(min=self.floor)

    def recur(self, features: Any) -> Any:
        """The LSTM: features (B, T, F), packed or not, to (B, T, 2 · units)."""
        kind = self.sigmoid.slope.device.type
        # A CPU has no LSTM in fp16.
        full = kind == "cpu" and torch.get_autocast_dtype(kind) is torch.float16
        with torch.autocast(kind, enabled=False) if full else nullcontext():
            return self.blstm(features)[0]


class UtteranceNorm(nn.Module):
    """Batch norm over one utterance: its own mean and variance a channel, then a scale and shift.

    The published training has one utterance in a batch, so that this is what its batch norm does.
    Statistics of each utterance alone make a score independent of what it is batched with, of
    padding, and of how many processes there are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, C, T, F) to the same; ``valid`` (B, 1, T, 1) is 1 where there is no padding."""
        count = valid.sum(dim=(2, 3), keepdim=True) * x.shape[3]
        mean = (x * valid).sum(dim=(2, 3), keepdim=True) / count
        centred = (x - mean) * valid
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        scaled = centred * (variance + 1e-5).rsqrt()
        return (scaled * self.weight[:, None, None] + self.bias[:, None, None]) * valid


class Discriminator(nn.Module):
    """Predicts the normalised score of an utterance from its spectrogram and that of the clean one.

    Batch norm, four spectrally normalised convolutions of 5 x 5, a mean over frames and
    frequencies, three linear layers. The spectral norms bound how fast the prediction may change,
    and so how far the generator can fool it.

    Args:
        channels: of the convolutions.
    """

    KERNEL, CONVOLUTIONS = 5, 4

    def __init__(self, channels: int = 15) -> None:
        super().__init__()
        self.norm = UtteranceNorm(2)
        self.convolutions = nn.ModuleList(
            spectral_norm(_xavier(nn.Conv2d(2 if first else channels, channels, self.KERNEL)))
            for first in (True, *[False] * (self.CONVOLUTIONS - 1))
        )
        sizes = (channels, 50, 10, 1)
        self.linear = nn.ModuleList(
            _xavier(nn.Linear(a, b)) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    @property
    def reach(self) -> int:
        """How many frames one output of the convolutions sees."""
        return self.CONVOLUTIONS * (self.KERNEL - 1) + 1

    def forward(self, judged: Tensor, clean: Tensor, frames: Tensor | None = None) -> Tensor:
        """Two log magnitudes (B, T, F) to the predicted scores (B,), about 0 to 1.

        ``frames`` (B,) says where padding begins; None: nowhere. What is shorter than the
        convolutions reach (17 frames) goes on in silence.
        """
        x = torch.stack([judged, clean], 1)  # (B, 2, T, F)
        if frames is None:
            frames = torch.full((len(x),), x.shape[2], device=x.device)
        x = nn.functional.pad(x, (0, 0, 0, max(0, self.reach - x.shape[2])))
        frames = frames.clamp(min=self.reach)
        x = self.norm(x, _until(frames, x.shape[2]))
        for convolution in self.convolutions:
            x = nn.functional.leaky_relu(convolution(x), 0.3)
        # Frames that have seen padding do not count.
        seen = _until(frames - (self.reach - 1), x.shape[2])
        mean = (x.float() * seen).sum(dim=(2, 3)) / (seen.sum(dim=(2, 3)) * x.shape[3])
        first, second, last = self.linear
        hidden = nn.functional.leaky_relu(second(nn.functional.leaky_relu(first(mean), 0.3)), 0.3)
        return last(hidden).squeeze(-1).float()


def _until(frames: Tensor, length: int) -> Tensor:
    """(B, 1, T, 1): 1.0 in the first so many frames of each utterance."""
    valid = torch.arange(length, device=frames.device) < frames[:, None]
    return valid[:, None, :, None].float()


def _xavier(layer: Any) -> Any:
    nn.init.xavier_uniform_(layer.weight, math.sqrt(2.0))
    nn.init.zeros_(layer.bias)
    return layer


def enhance(
    spectrum: Spectrum,
    generator: nn.Module,
    wav: Tensor,
    lengths: Tensor,
    power: Tensor | None = None,
) -> Tensor:
    """Samples (B, S) with the mask on their magnitude and their own phase, (B, S).

    They are valid up to ``lengths`` (B,), and what is returned is silent behind. With ``power``
    (B, 1, F) the mask is raised to it: above 1 takes away more, below 1 less. Differentiable.
    """
    noisy = spectrum(wav)
    mask = generator(spectrum.features(noisy), spectrum.frames(lengths))
    mask = mask if power is None else mask**power
    clean = spectrum.invert(noisy * mask.float(), wav.shape[1])
    return clean * (torch.arange(wav.shape[1], device=wav.device) < lengths[:, None])
