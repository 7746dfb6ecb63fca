"""Recognition by CTC: a pretrained encoder, and a layer over its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCTC

from recipes.asr.text import Codec
from recipes.finetune.model import PretrainedEncoder
from recipes.finetune.sources import loaded
from recipes.finetune.text import Vocabulary
from trainer.evaluation import rng_kept


class CTC(nn.Module):
    """Waveforms to log probabilities of CTC, token 0 being the blank.

    Args:
        encoder: the pretrained encoder.
        vocabulary: number of tokens; 0 where the training transcripts decide, for `set_vocabulary`.
        dropout: probability of leaving out a feature before the last layer, in training.
    """

    def __init__(self, encoder: PretrainedEncoder, vocabulary: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.classify: nn.Module = nn.Identity()
        self.vocabulary = 0
        if vocabulary:
            self.set_vocabulary(vocabulary)

    def set_vocabulary(self, size: int) -> None:
        """Make the last layer anew, for so many tokens."""
        self.vocabulary = size
        self.classify = nn.Linear(self.encoder.size, size)

    def load_head(self, codec: Codec) -> bool:
        """Take the last layer of a source that was trained by CTC; return True if it has one.

        Only a `Vocabulary` of the source says which of its tokens are which.
        """
        source = self.encoder.source
        if not isinstance(codec, Vocabulary) or codec.ids is None or not isinstance(source, str):
            return False
        with rng_kept():
            config = self.encoder.config
            model, missing = loaded(source, config, AutoModelForCTC, optional="lm_head.")
        if missing:
            return False
        ids = torch.tensor(codec.ids)
        head = model.lm_head.state_dict()
        self.classify.load_state_dict({name: each[ids] for name, each in head.items()})
        return True

    def frames(self, samples: Any) -> Any:
        """Return the number of frames of so many samples: of a number, or of a tensor."""
        return self.encoder.frames(samples)

    def frame_times(self) -> tuple[float, float]:
        """Return the middle of the first frame, and the time to the next, in seconds."""
        encoder = self.encoder
        return encoder.shortest / 2 / encoder.rate, encoder.hop / encoder.rate

    def forward(self, wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), zero-padded, and samples (B,) to log probabilities (B, T, V) and frames (B,)."""
        features, frames = self.encoder(wavs, lengths)
        return self.classify(self.dropout(features)).float().log_softmax(-1), frames
