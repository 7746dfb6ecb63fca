"""Masked prediction: an encoder learns from speech without transcripts (HuBERT, Hsu et al., 2021).

The encoder hears speech with spans of frames masked, and predicts for each frame the cluster of its
log-mel features, found by k-means before the training. As in HuBERT's first iteration, but with
log-mel energies of three frames, normalised over the utterance, where HuBERT has 39 MFCC features.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from recipes.asr.model import LogMel, padding_mask
from recipes.finetune.model import PretrainedEncoder, drawn_spans
from trainer.seed import derive

if TYPE_CHECKING:
    from recipes.common.loading import Speech

ROUNDS = 20  # of k-means
HEARD = 400  # utterances that the clusters are found on
MOST = 40_000  # frames of these


class Prediction(NamedTuple):
    """Scores (B, T, K) and clusters (B, T) of frames, and which are masked and which valid."""

    scores: Tensor
    clusters: Tensor
    masked: Tensor
    valid: Tensor


class MaskedPrediction(nn.Module):
    """An encoder, a layer over it, and the clusters that it predicts.

    Args:
        encoder: the encoder; its front end learns, too (``freeze_front: false``).
        clusters: number of clusters K.
        bands: mel bands.
        share: share of the frames that begin a masked span.
        span: frames of a span.
    """

    def __init__(
        self,
        encoder: PretrainedEncoder,
        clusters: int = 128,
        bands: int = 40,
        share: float = 0.08,
        span: int = 10,
    ) -> None:
        super().__init__()
        self.encoder, self.share, self.span = encoder, share, span
        self.mel = LogMel(encoder.rate, bands, hop_ms=1000 * encoder.hop / encoder.rate)
        self.predict = nn.Linear(encoder.size, clusters)
        self.centres: Tensor
        self.register_buffer("centres", torch.zeros(clusters, 3 * bands))

    def features(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Return log-mel energies (B, T, 3 M) around the middle of each frame of the encoder."""
        energies, _ = self.mel(wavs, lengths)
        first = round(self.encoder.shortest / 2 / self.encoder.hop)
        frames = self.encoder.frames(wavs.shape[1])
        around = nn.functional.pad(energies, (0, 0, 1, self.encoder.shortest))
        return torch.cat([around[:, first + n : first + n + frames] for n in range(3)], dim=2)

    def assign(self, features: Tensor) -> Tensor:
        """Return the nearest cluster of features (…, 3 M)."""
        return torch.cdist(features.float(), self.centres).argmin(-1)

    @torch.no_grad()
    def find_clusters(self, dataset: Speech, seed: int) -> None:
        """Find the clusters by k-means (Lloyd, 1982) on the first utterances of a dataset."""
        drawing = torch.Generator().manual_seed(derive(seed, "clusters"))
        found = []
        for index in range(min(HEARD, len(dataset))):
            signal = dataset[index]["sig"][None]
            found.append(self.features(signal, torch.tensor([signal.shape[1]]))[0])
        frames = torch.cat(found)
        frames = frames[torch.randperm(len(frames), generator=drawing)[:MOST]]
        clusters = len(self.centres)
        if len(frames) < clusters:
            raise ValueError(f"{len(frames)} frames of speech are too few for {clusters} clusters")
        centres = frames[:clusters].clone()
        for _ in range(ROUNDS):
            nearest = torch.cdist(frames, centres).argmin(1)
            count = torch.bincount(nearest, minlength=clusters).unsqueeze(1)
            total = torch.zeros_like(centres).index_add_(0, nearest, frames)
            centres = torch.where(count > 0, total / count.clamp(min=1), centres)
        self.centres.copy_(centres)

    def forward(self, wavs: Tensor, lengths: Tensor) -> Prediction:
        """(B, S), zero-padded, and samples (B,) to what is predicted of each frame."""
        frames = self.encoder.frames(lengths)
        beyond = padding_mask(frames, self.encoder.frames(wavs.shape[1]))
        masked = drawn_spans(frames, beyond, self.share, self.span)
        clusters = self.assign(self.features(wavs, lengths))
        features, _ = self.encoder(wavs, lengths, masked)
        return Prediction(self.predict(features).float(), clusters, masked, beyond.logical_not())


def export(encoder: PretrainedEncoder, folder: Path) -> None:
    """Write an encoder as the hub has it, whole or not at all, for ``source`` of a fine-tuning."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    encoder.model.save_pretrained(new)
    encoder.extractor.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
