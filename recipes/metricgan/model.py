"""The generator of MetricGAN+, which masks a spectrogram, and the spectrogram.

Fu et al. 2021, "MetricGAN+: An Improved Version of MetricGAN for Speech Enhancement" (arXiv
2104.03538), after Fu et al. 2019 (arXiv 1905.04874). Letters: B utterances, S samples, T frames, F
frequencies.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.functional import melscale_fbanks

from recipes.metricgan.discriminator import REACH

HIGHEST = 1.2  # of a mask; above 1 since a frame of speech may be louder than its mixture
STEEPEST = 3.5  # slope of a learnable sigmoid


class Spectrum(nn.Module):
    """Samples to a complex spectrogram and back, with a Hamming window.

    Args:
        sample_rate: in Hz.
        window_ms, hop_ms: in milliseconds; the FFT is as long as the window.
        gain: of the magnitudes that the players see. Speech as it is mostly recorded is so low that
            log(1 + x) is hardly a logarithm, and a larger gain shows more of what is quiet.
        bands: of the mel scale, in whose mean powers the players see a spectrogram; None: every
            frequency by itself.
    """

    window: Tensor
    filters: Tensor | None

    def __init__(
        self,
        sample_rate: int = 16000,
        window_ms: float = 32.0,
        hop_ms: float = 16.0,
        gain: float = 1.0,
        bands: int | None = None,
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
        filters = None if bands is None else _filters(sample_rate, self.bins, bands)
        self.register_buffer("filters", filters, persistent=False)

    @property
    def bins(self) -> int:
        """Return the number of frequencies."""
        return self.size // 2 + 1

    def frames(self, samples: Any) -> Any:
        """Return the number of frames of so many samples; of numbers, or tensors of numbers.

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
        # As `torch.istft`, which also reads from the device whether the windows overlap.
        frames = torch.fft.irfft(spectrum, self.size) * self.window  # (B, T, size)
        weights = self.window.square().expand_as(frames[:1])
        size = self.size + self.hop * (frames.shape[1] - 1)
        wav, weight = (
            torch.ops.aten.unfold_backward(each, [len(each), size], 1, self.size, self.hop)
            for each in (frames, weights)
        )
        valid = slice(self.size // 2, self.size // 2 + samples)
        return wav[:, valid] / weight[:, valid]

    def features(self, spectrum: Tensor) -> Tensor:
        """Return the input of both players, log(1 + gain · |X|) by frequency or band.

        A spectrogram (B, T, F) becomes (B, T, bands).
        """
        # The gradient of a magnitude at 0 is not defined; a little power makes it 0 there.
        power = spectrum.real.square() + spectrum.imag.square()
        if self.filters is not None:
            with torch.autocast(power.device.type, enabled=False):
                power = power @ self.filters
        return ((power + 1e-10).sqrt() * self.gain).log1p()


def _filters(sample_rate: int, bins: int, bands: int) -> Tensor:
    """Powers at each frequency to their mean in each band, (F, bands)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty bands, which are refused below
        found = melscale_fbanks(bins, 0.0, sample_rate / 2, bands, sample_rate)
    if bands < REACH or not found.any(0).all():
        raise ValueError(
            f"{bands} bands of {bins} frequencies; allowed: {REACH} bands at least, "
            "and so few that there is a frequency in each"
        )
    return found / found.sum(0)


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

        ``frames`` (B,), best on the host, says where padding begins; None: nowhere. What an
        utterance gets does not depend on what it is batched with.
        """
        frames = None if frames is None else frames.cpu()
        if frames is not None and bool((frames < features.shape[1]).any()):
            packed = pack_padded_sequence(features, frames, batch_first=True, enforce_sorted=False)
            hidden, _ = pad_packed_sequence(
                self.recur(packed), batch_first=True, total_length=features.shape[1]
            )
        else:
            hidden = self.recur(features)
        # In full precision from here on: a step of bf16 is audible in a mask near its floor.
        return self.sigmoid(self.linear(hidden).float()).clamp(min=self.floor)

    def weights_of(self, parts: Sequence[str]) -> list[nn.Parameter]:
        """The weights of some of ``blstm``, ``linear`` and ``sigmoid``."""
        own = dict(self.named_children())
        for name in parts:
            if name not in own:
                raise ValueError(f"the generator has no layers {name!r}; allowed: {', '.join(own)}")
        return [weight for name in parts for weight in own[name].parameters()]

    def recur(self, features: Any) -> Any:
        """The LSTM: features (B, T, F), packed or not, to (B, T, 2 · units)."""
        kind = self.sigmoid.slope.device.type
        # A CPU has no LSTM in fp16.
        full = kind == "cpu" and torch.get_autocast_dtype(kind) is torch.float16
        with torch.autocast(kind, enabled=False) if full else nullcontext():
            return self.blstm(features)[0]


def enhance(
    spectrum: Spectrum,
    generator: nn.Module,
    wav: Tensor,
    lengths: Tensor,
    power: Tensor | None = None,
) -> Tensor:
    """Samples (B, S) with the mask on their magnitude and their own phase, (B, S).

    They are valid up to ``lengths`` (B,), best on the host, and what is returned is silent behind.
    With ``power`` (B, 1, F) the mask is raised to it: above 1 takes away more, below 1 less.
    Differentiable.
    """
    noisy = spectrum(wav)
    mask = generator(spectrum.features(noisy), spectrum.frames(lengths))
    mask = mask if power is None else mask**power
    clean = spectrum.invert(noisy * mask.float(), wav.shape[1])
    lengths = lengths.to(wav.device, non_blocking=True)
    return clean * (torch.arange(wav.shape[1], device=wav.device) < lengths[:, None])
