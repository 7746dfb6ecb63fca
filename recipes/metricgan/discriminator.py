"""The discriminator of MetricGAN+, which predicts scores.

Fu et al. 2021, "MetricGAN+: An Improved Version of MetricGAN for Speech Enhancement" (arXiv
2104.03538), after Fu et al. 2019 (arXiv 1905.04874). Letters: B utterances, T frames, F frequencies
or bands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

KERNEL, CONVOLUTIONS = 5, 4
REACH = CONVOLUTIONS * (KERNEL - 1) + 1  # frames, and frequencies, that one output sees


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


class Difference(nn.Module):
    """Input of the discriminator: judged, clean, and their difference, on one scale for all.

    A norm of each utterance takes its level and its spread away from either side, and with them
    most of what a little more or less of a mask changes. It has no weights.
    """

    MIDDLE, SPREAD = 1.5, 1.5  # about those of log(1 + 30 · |X|) of speech

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, 2, T, F) to (B, 3, T, F); ``valid`` (B, 1, T, 1) is 1 where there is no padding."""
        scaled = (x - self.MIDDLE) / self.SPREAD
        return torch.cat([scaled, x[:, :1] - x[:, 1:]], 1) * valid


class Discriminator(nn.Module):
    """Predicts the normalised score of an utterance from its spectrogram and that of the clean one.

    Batch norm, four spectrally normalised convolutions of 5 x 5, a mean over frames and
    frequencies, three linear layers. The spectral norms bound how fast the prediction may change,
    and so how far the generator can fool it.

    Args:
        channels: of the convolutions.
        compares: whether it sees `Difference` in place of the paper's batch norm.
    """

    def __init__(self, channels: int = 15, compares: bool = False) -> None:
        super().__init__()
        self.norm = Difference() if compares else UtteranceNorm(2)
        seen = [3 if compares else 2, *[channels] * (CONVOLUTIONS - 1)]
        self.convolutions = nn.ModuleList(
            spectral_norm(_xavier(nn.Conv2d(each, channels, KERNEL))) for each in seen
        )
        sizes = (channels, 50, 10, 1)
        self.linear = nn.ModuleList(
            _xavier(nn.Linear(a, b)) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, judged: Tensor, clean: Tensor, frames: Tensor | None = None) -> Tensor:
        """Two log magnitudes (B, T, F) to the predicted scores (B,), about 0 to 1.

        ``frames`` (B,) says where padding begins; None: nowhere. What is shorter than the
        convolutions reach (17 frames) goes on in silence.
        """
        x = torch.stack([judged, clean], 1)  # (B, 2, T, F)
        if frames is None:
            frames = torch.full((len(x),), x.shape[2], device=x.device)
        x = nn.functional.pad(x, (0, 0, 0, max(0, REACH - x.shape[2])))
        frames = frames.clamp(min=REACH)
        x = self.norm(x, _until(frames, x.shape[2]))
        for convolution in self.convolutions:
            x = nn.functional.leaky_relu(convolution(x), 0.3)
        # Frames that have seen padding do not count.
        seen = _until(frames - (REACH - 1), x.shape[2])
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
