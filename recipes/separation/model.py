"""The networks, each from mixtures (B, 1, T) to tracks (B, S, T), so that a YAML exchanges them.

torchaudio's `ConvTasNet` is used as it is, or with filters that begin as sines. `SepFormer` is a
dual-path network: short pieces are attended to within and across. It is written from the paper,
Subakan et al. 2021, "Attention Is All You Need in Speech Separation" (arXiv 2010.13154), whose
figures and sections are named below.

Shapes: B mixtures, S sources, T samples, F frames of the encoder, D features, L pieces of K frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.functional import pad


class SineTasNet(torchaudio.models.ConvTasNet):
    """torchaudio's ConvTasNet, whose filters begin as the sines of a short-time spectrum.

    All of its arguments are allowed. Encoder and decoder together then begin as the identity, and
    only the masks are to be learned. With filters of 32 ms that saves the first minutes of a short
    training on a CPU; the filters are trained like everything else.
    """

    def __init__(self, **network: Any) -> None:
        super().__init__(**network)
        filters = windowed_sines(self.enc_num_feats, self.enc_kernel_size)[:, None]  # (F, 1, L)
        with torch.no_grad():
            self.encoder.weight.copy_(filters)
            self.decoder.weight.copy_(filters)


def windowed_sines(filters: int, samples: int) -> Tensor:
    """Cosines and sines of evenly spaced frequencies under the root of a Hann window: (F, L).

    Analysed and put together by them with a hop of half their length, a signal is what it was, as
    long as there are at least as many filters as samples in one.

    Raises ValueError for an odd number of filters, or of samples.
    """
    if filters % 2 or samples % 2:
        raise ValueError(
            f"{filters} filters of {samples} samples cannot be cosines and sines; allowed: even "
            "numbers"
        )
    # Each frequency is the middle of its band, so that none is 0, whose sine is nothing.
    frequencies = (torch.arange(filters // 2, dtype=torch.float64) + 0.5) / filters  # of the rate
    angles = 2 * math.pi * frequencies[:, None] * torch.arange(samples)
    window = torch.hann_window(samples, dtype=torch.float64).sqrt()
    return (torch.cat([angles.cos(), angles.sin()]) * window * math.sqrt(2 / filters)).float()


class SepFormer(nn.Module):
    """Mixtures (B, 1, T) to sources (B, S, T): encoder, mask of each source, decoder (figure 1).

    Args:
        num_sources: S, how many people talk.
        features: D, filters of the encoder and width of the transformers.
        kernel, stride: of the encoder and the decoder, in samples.
        chunk: K frames in a piece; pieces overlap by half.
        paths: N times within pieces and across pieces.
        layers: of each transformer.
        heads, feedforward: attention heads, and the width of the layers behind them.

    Raises ValueError for an odd chunk, which has no half.
    """

    def __init__(
        self,
        num_sources: int = 2,
        features: int = 256,
        kernel: int = 16,
        stride: int = 8,
        chunk: int = 250,
        paths: int = 2,
        layers: int = 8,
        **transformer: int,
    ) -> None:
        super().__init__()
        if chunk < 2 or chunk % 2:
            raise ValueError(f"chunk is {chunk}; allowed: an even number of frames, 2 or more")
        self.num_sources, self.kernel, self.stride, self.chunk = num_sources, kernel, stride, chunk
        self.encoder = nn.Conv1d(1, features, kernel, stride, bias=False)
        self.decoder = nn.ConvTranspose1d(features, 1, kernel, stride, bias=False)
        self.norm = nn.LayerNorm(features)
        self.project = nn.Linear(features, features, bias=False)
        self.within = nn.ModuleList(
            Transformer(features, layers, **transformer) for _ in range(paths)
        )
        self.across = nn.ModuleList(
            Transformer(features, layers, **transformer) for _ in range(paths)
        )
        self.activate = nn.PReLU()
        self.spread = nn.Linear(features, num_sources * features)
        self.value = nn.Linear(features, features)
        self.gate = nn.Linear(features, features)
        self.mask = nn.Linear(features, features, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """(B, 1, T) to (B, S, T), of any length."""
        samples = mixture.shape[-1]
        # Frames that cover every sample, the first ones as well as the others.
        edge = self.kernel - self.stride
        rest = -(samples + 2 * edge - self.kernel) % self.stride
        frames = self.encoder(pad(mixture, (edge, edge + rest))).relu()  # (B, D, F)
        masks = self.masks(frames.transpose(1, 2))  # (B, S, D, F)
        masked = (masks * frames[:, None]).flatten(0, 1)  # (B·S, D, F)
        tracks = self.decoder(masked).view(len(mixture), self.num_sources, -1)
        return tracks[..., edge : edge + samples]

    def masks(self, frames: Tensor) -> Tensor:
        """(B, F, D) to a mask of each source, 0 or above: (B, S, D, F) (section 2.2)."""
        count, width = frames.shape[1:]
        pieces = split(self.project(self.norm(frames)), self.chunk)  # (B, L, K, D)
        for within, across in zip(self.within, self.across, strict=True):
            pieces = within(pieces)
            pieces = across(pieces.transpose(1, 2)).transpose(1, 2)
        pieces = self.spread(self.activate(pieces))  # (B, L, K, S·D)
        joined = join(pieces)[:, :count].unflatten(-1, (self.num_sources, width))  # (B, F, S, D)
        # The paper's feed-forward layers, gated as in the dual-path network that it builds on
        # (Luo et al. 2020, arXiv 1910.06379).
        gated = self.value(joined).tanh() * self.gate(joined).sigmoid()
        return self.mask(gated).relu().permute(0, 2, 3, 1)


class Transformer(nn.Module):
    """Pre-norm transformer layers over the second last dimension, added to their input (figure 3).

    Positions are told by sines, once, before the first layer.
    """

    def __init__(self, width: int, layers: int, heads: int = 8, feedforward: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, feedforward, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, sequences: Tensor) -> Tensor:
        """(B, N, K, D) to the same; the B·N sequences of length K do not see each other."""
        x = sequences.flatten(0, 1)
        y = x + positions(x.shape[1], x.shape[2], x)
        for layer in self.layers:
            y = layer(y)
        return (self.norm(y) + x).view_as(sequences)


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of geometric wavelengths: (length, width) (Vaswani et al. 2017, 3.5)."""
    rates = torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width)
    angles = torch.arange(length, device=like.device)[:, None] * rates.exp()
    both = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # sine, cosine, sine …
    return both[:, :width].to(like.dtype)


def split(frames: Tensor, chunk: int) -> Tensor:
    """(B, F, D) to pieces that overlap by half, each frame in two of them: (B, L, K, D)."""
    hop = chunk // 2
    rest = -frames.shape[1] % hop
    return pad(frames, (0, 0, hop, hop + rest)).unfold(1, chunk, hop).transpose(2, 3)


def join(pieces: Tensor) -> Tensor:
    """Undo `split`: each frame is the sum of the two pieces it is in, (B, F, D), with padding."""
    first, second = pieces.chunk(2, dim=2)  # halves of hop frames
    return (second[:, :-1] + first[:, 1:]).flatten(1, 2)
