"""From frames to one vector an utterance, and from vectors to classes.

Padding never counts: an utterance has the same vector alone and in a batch. A pooling layer takes
frames (B, T, D) and the number of valid frames (B,), and gives vectors (B, ``size``).

B utterances, T frames, D features a frame, E the size of an embedding, C classes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from recipes.asr.model import padding_mask
from trainer.seed import derive

SMALLEST_VARIANCE = 1e-6  # The root of a smaller one has a gradient that is too large.


class Sized(Protocol):
    """A module that says the size of what it gives, such as an encoder."""

    size: int


def _size(features: int | Sized) -> int:
    return features if isinstance(features, int) else features.size


def _moments(frames: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and deviations (B, D); weights (B, T, 1 or D) sum to 1 over the frames."""
    mean = (frames * weights).sum(1)
    variance = ((frames - mean.unsqueeze(1)).square() * weights).sum(1)
    return mean, variance.clamp(min=SMALLEST_VARIANCE).sqrt()


def _valid(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The frames in fp32, zero beyond each length; equal weights of the others; the padding."""
    padding = padding_mask(lengths.clamp(min=1), frames.shape[1]).unsqueeze(-1)  # (B, T, 1)
    frames = frames.float().masked_fill(padding, 0.0)  # Also what is not finite there.
    weights = (~padding).float()
    return frames, weights / weights.sum(1, keepdim=True), padding


class Pooling(nn.Module):
    """Base of the pooling layers; ``size`` is the size of their vectors."""

    size: int

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) to (B, size)."""
        raise NotImplementedError


class MeanPooling(Pooling):
    """Mean over the valid frames.

    Args:
        features: D, or the encoder that gives the frames.
    """

    def __init__(self, features: int | Sized) -> None:
        super().__init__()
        self.size = _size(features)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) to (B, D)."""
        with torch.autocast(frames.device.type, enabled=False):
            frames, weights, _ = _valid(frames, lengths)
            return (frames * weights).sum(1)


class StatisticsPooling(Pooling):
    """Mean and standard deviation over the valid frames (Snyder et al. 2018, x-vectors).

    Args:
        features: D, or the encoder that gives the frames.
    """

    def __init__(self, features: int | Sized) -> None:
        super().__init__()
        self.size = 2 * _size(features)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) to (B, 2 D)."""
        with torch.autocast(frames.device.type, enabled=False):
            frames, weights, _ = _valid(frames, lengths)
            return torch.cat(_moments(frames, weights), dim=1)


class AttentiveStatistics(Pooling):
    """Mean and deviation over the valid frames, weighted by attention (Okabe et al. 2018).

    By default each feature has weights of its own, and attention sees mean and deviation of the
    whole utterance, as in ECAPA-TDNN (Desplanques et al. 2020, section 3.1; here without its batch
    norm, which would mix utterances and padding).

    Args:
        features: D, or the encoder that gives the frames.
        hidden: size of the layer in between.
        per_feature: weights for each feature, in place of one for each frame (Okabe et al.).
        context: attention sees the statistics of the utterance beside the frame.
    """

    def __init__(
        self,
        features: int | Sized,
        hidden: int = 128,
        per_feature: bool = True,
        context: bool = True,
    ) -> None:
        super().__init__()
        features = _size(features)
        self.size = 2 * features
        self.context = context
        self.inner = nn.Linear(features * (3 if context else 1), hidden)
        self.outer = nn.Linear(hidden, features if per_feature else 1)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) to (B, 2 D)."""
        with torch.autocast(frames.device.type, enabled=False):
            frames, equal, padding = _valid(frames, lengths)
            seen = frames
            if self.context:
                whole = torch.cat(_moments(frames, equal), dim=1).unsqueeze(1)
                seen = torch.cat([frames, whole.expand(-1, frames.shape[1], -1)], dim=2)
            scores = self.outer(self.inner(seen).tanh())  # (B, T, 1 or D)
            weights = scores.masked_fill(padding, -math.inf).softmax(1)
            return torch.cat(_moments(frames, weights), dim=1)


class Embedding(nn.Module):
    """One vector an utterance: pooled frames, normalised and projected.

    Args:
        pooling: the pooling layer.
        size: E; None for the pooled frames as they are, for a classifier on top of an encoder.
    """

    def __init__(self, pooling: Pooling, size: int | None = None) -> None:
        super().__init__()
        pooled: int = pooling.size
        self.pooling = pooling
        self.size = pooled if size is None else size
        self.project = (
            nn.Identity()
            if size is None
            else nn.Sequential(nn.LayerNorm(pooled), nn.Linear(pooled, size))
        )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) to (B, E)."""
        return self.project(self.pooling(frames, lengths))


class Head(nn.Module):
    """Scores of classes, whose number may be told later (`resize`), since it comes from the data.

    Args:
        features: E, or the module that gives the embeddings.
        classes: C; 0 until `resize`.
    """

    def __init__(self, features: int | Sized, classes: int = 0) -> None:
        super().__init__()
        self.features = _size(features)
        self.resize(classes)

    def resize(self, classes: int) -> None:
        """Make the weights anew, of so many classes.

        They are drawn by the seed of the run alone: the same before and after other draws.
        """
        self.weight = nn.Parameter(torch.empty(classes, self.features))
        if classes:
            generator = torch.Generator().manual_seed(derive(torch.initial_seed(), "head"))
            nn.init.xavier_uniform_(self.weight, generator=generator)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, E), and in training the labels (B,), to logits (B, C)."""
        raise NotImplementedError


class LinearHead(Head):
    """A linear layer."""

    def resize(self, classes: int) -> None:
        super().resize(classes)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        return linear(embeddings, self.weight, self.bias)


class CosineHead(Head):
    """Cosines to a direction for each class, scaled; for speakers.

    With labels, the angle to the own class is made larger by the margin: additive angular margin
    (Deng et al. 2019, "ArcFace", equation 3). An angle that the margin would carry beyond pi loses
    ``margin * sin(margin)`` of its cosine instead, so that the loss still falls with the angle.

    Args:
        features: E, or the module that gives the embeddings.
        classes: C; 0 until `resize`.
        margin: in radians, at least 0 and below pi / 2.
        scale: of the cosines.
    """

    def __init__(
        self,
        features: int | Sized,
        classes: int = 0,
        margin: float = 0.2,
        scale: float = 30.0,
    ) -> None:
        super().__init__(features, classes)
        if not 0 <= margin < math.pi / 2:
            raise ValueError(f"margin is {margin}; allowed: from 0 to below pi / 2, in radians")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; allowed: a number above 0")
        self.margin, self.scale = margin, scale

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = linear(normalize(embeddings.float()), normalize(self.weight.float()))
            if labels is None or not self.margin:
                return self.scale * cosines
            own = cosines.gather(1, labels.unsqueeze(1)).clamp(-1.0, 1.0)  # (B, 1)
            sine = (1 - own.square()).clamp(min=1e-7).sqrt()
            moved = own * math.cos(self.margin) - sine * math.sin(self.margin)
            beyond = own < -math.cos(self.margin)
            moved = torch.where(beyond, own - self.margin * math.sin(self.margin), moved)
            return self.scale * cosines.scatter(1, labels.unsqueeze(1), moved)
