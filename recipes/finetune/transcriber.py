"""Transcribing with a fine-tuned model: an encoder with CTC, or Whisper.

    model = trainer.load("results/finetune/ctc_wav2vec2/1234")
    print(model.transcribe("x.flac"))

Neither the training nor its data are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from recipes.asr.transcriber import Heard, PieceTranscriber, Transcriber
from recipes.common.audio import check_length, check_made
from recipes.common.hearing import LONGEST, Piece, Source, batched, pieces

AT_ONCE = 8  # utterances that Whisper hears at once, each padded to what it takes


class CTCTranscriber(Transcriber):
    """Recogniser of the recipe `recipes.asr`, whose model has a pretrained encoder.

    Reads from the YAML ``best``: the rate that chooses the checkpoint, "wer" or "cer".
    """

    @property
    def best_checkpoint(self) -> dict[str, str]:  # type: ignore[override]
        """The rate that chooses the checkpoint to use."""
        return {"min_key": getattr(self.hparams, "best", "wer")}  # Earlier runs have none.

    def batches(self, sources: list[Source]) -> Iterator[list[Piece]]:
        encoder = self.modules.model.encoder
        for batch in super().batches(sources):
            # Each piece alone, where its features would depend on the padding.
            yield from ([piece] for piece in batch) if encoder.reads_padding else [batch]

    def recognise(self, batch: list[Piece], names: list[str]) -> list[Heard]:
        encoder = self.modules.model.encoder
        for piece, name in zip(batch, names, strict=True):
            check_length(name, len(piece.signal), encoder.rate, encoder.shortest)
        return super().recognise(batch, names)


class WhisperTranscriber(PieceTranscriber):
    """Fine-tuned Whisper; it tells no times, since it was trained without.

    Reads from the YAML ``sample_rate``.
    """

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"min_key": "wer"}

    def batches(self, sources: list[Source]) -> Iterator[list[Piece]]:
        model, rate = self.modules.model, self.hparams.sample_rate
        longest = min(LONGEST, 0.99 * model.samples / model.rate)  # Resampled pieces are rounded.
        parts = pieces(sources, rate, longest)
        yield from batched(parts, AT_ONCE * model.samples, shortest=model.samples)

    def recognise(self, batch: list[Piece], names: list[str]) -> list[Heard]:
        model = self.modules.model
        features = torch.stack([model.features(piece.signal) for piece in batch])
        with torch.inference_mode(), self.autocast():
            found = model.recognise(features.to(self.device))
        for name, (_, scores) in zip(names, found, strict=True):
            check_made(name, torch.tensor(scores))
        return [Heard(model.decode(tokens), [], scores) for tokens, scores in found]
