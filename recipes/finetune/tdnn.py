"""A small encoder without pretraining: a time-delay network over log-mels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from recipes.asr.model import LogMel, padding_mask


class TDNN(nn.Module):
    """Dilated convolutions over log-mel features (Snyder et al. 2018, x-vectors, table 1).

    Smaller, and with layer norm over each frame in place of batch norm: an utterance has the same
    features alone and in a batch. For what has to run in minutes on a CPU.

    Args:
        sample_rate: Hz.
        bands: mel bands.
        size: channels of every layer.
        kernels: frames that each layer sees.
        dilations: of these.

    Attributes:
        size: features of a frame.
        rate: Hz.
        shortest: fewest samples of an utterance.
    """

    def __init__(
        self,
        sample_rate: int,
        bands: int = 40,
        size: int = 128,
        kernels: Sequence[int] = (5, 3, 3, 1),
        dilations: Sequence[int] = (1, 2, 3, 1),
    ) -> None:
        super().__init__()
        self.features = LogMel(sample_rate, bands)
        self.size, self.rate, self.shortest = size, sample_rate, self.features.hop
        ins = [bands, *[size] * (len(kernels) - 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, size, kernel, dilation=dilation, padding="same")
            for width, kernel, dilation in zip(ins, kernels, dilations, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in kernels)

    def forward(self, wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) and samples (B,) to (B, T, D), zero beyond each utterance, and frames (B,)."""
        x, frames = self.features(wavs, lengths)  # (B, T, M)
        padding = padding_mask(frames, x.shape[1]).unsqueeze(-1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(relu(convolution(x.transpose(1, 2)).transpose(1, 2)))
            x = x.masked_fill(padding, 0.0)
        return x, frames
