"""Fine-tune a pretrained model: an encoder with CTC, or Whisper.

    python recipes/finetune/train.py hparams/finetune/ctc_wav2vec2.yaml \
        --source facebook/wav2vec2-base --data_folder LibriSpeech

Ends with the word and character error rate of the test set, by the best checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import trainer
from recipes.asr.data import datasets
from recipes.asr.model import padding_mask
from recipes.asr.train import Recogniser as CTCRecogniser
from recipes.asr.train import TextBrain
from recipes.common.loading import Speech, filter_by_duration, loader_options
from recipes.common.training import fit_and_test
from recipes.finetune import demo, train_classifier
from recipes.finetune.ctc import CTC
from recipes.finetune.data import (
    check_durations,
    check_rate,
    padding_limit,
    whisper_datasets,
)
from recipes.finetune.pretrain import MaskedPrediction, Prediction, export
from recipes.finetune.sources import begin
from recipes.finetune.whisper import Whisper
from trainer import Brain, Stage, distributed
from trainer.processes import call_when_orphaned

logger = logging.getLogger(__name__)


class Transcriber(TextBrain):
    """Fine-tunes Whisper by teacher forcing; valid and test are scored on what it generates.

    Reads from the YAML ``normalise``: texts are compared without capitals and punctuation.
    """

    def compute_forward(self, batch: Any, stage: Stage) -> tuple[Tensor, list[list[int]]]:
        model, (features, _), (tokens, _) = self.modules.model, batch.features, batch.tokens
        heard = [] if stage is Stage.TRAIN else model.generate(features)
        return model(features, tokens), heard

    def compute_objectives(
        self, predictions: tuple[Tensor, list[list[int]]], batch: Any, stage: Stage
    ) -> Tensor:
        logits, heard = predictions
        if stage is not Stage.TRAIN:
            said, found = map(self.compared, batch.text), map(self.compared, self.texts(heard))
            self.scores.add(batch.id, list(said), list(found))
        tokens, lengths = batch.tokens
        losses = nn.functional.cross_entropy(logits.float().mT, tokens, reduction="none")
        padding = padding_mask(lengths, tokens.shape[1])
        return losses.masked_fill(padding, 0.0).sum() / lengths.sum()

    def count_examples(self, batch: Any) -> float:
        return float(batch.on_host.tokens.lengths.sum())  # The loss is the mean over tokens.

    def texts(self, heard: Sequence[Sequence[int]]) -> list[str]:
        """Decode the text of each utterance."""
        return [self.modules.model.decode(tokens) for tokens in heard]

    def compared(self, text: str) -> str:
        """Return a text as it is compared."""
        if not self.hparams.normalise:
            return text
        return " ".join(self.modules.model.tokenizer.basic_normalize(text).split())


class Recogniser(CTCRecogniser):
    """Recogniser of the recipe `recipes.asr`, whose model has a pretrained encoder.

    Reads from the YAML ``best``: the rate that chooses the checkpoint, "wer" or "cer".
    """

    @property
    def best_checkpoint(self) -> dict[str, str]:  # type: ignore[override]
        """The rate that chooses the checkpoint to test and to use."""
        return {"min_key": getattr(self.hparams, "best", "wer")}  # Earlier runs have none.


class Pretrainer(Brain):
    """Learns the clusters of masked frames, and with ``heard_weight`` those of the others.

    Reports the share of masked frames whose cluster is right.
    """

    best_checkpoint: ClassVar = {"max_key": "accuracy"}

    def compute_forward(self, batch: Any, stage: Stage) -> Prediction:
        found: Prediction = self.modules.model(*batch.sig)
        return found

    def compute_objectives(self, predictions: Prediction, batch: Any, stage: Stage) -> Tensor:
        scores, clusters, masked, valid = predictions
        losses = nn.functional.cross_entropy(scores.mT, clusters, reduction="none")
        heard = valid & masked.logical_not()
        if stage is not Stage.TRAIN:
            right = (scores.argmax(-1) == clusters)[masked]
            self.right += int(right.sum())
            self.asked += len(right)
        return _mean(losses, masked) + self.hparams.heard_weight * _mean(losses, heard)

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.right = self.asked = 0

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        counts = torch.tensor([self.right, self.asked], dtype=torch.float64)
        distributed.all_reduce_sum_(counts)
        return {"accuracy": float(counts[0] / counts[1].clamp(min=1))}


def _mean(losses: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the losses that are chosen; 0 where none is."""
    return losses.masked_fill(chosen.logical_not(), 0.0).sum() / chosen.sum().clamp(min=1)


def train(run: trainer.Run) -> dict[str, float]:
    """Train what the YAML builds, and test the best checkpoint (or the mean of the best)."""
    if run.hparams.get("ends_with_parent"):
        call_when_orphaned(lambda: os._exit(1))  # Started again, the run goes on.
    if "study" in run.hparams:
        return demo.run(run)
    model = run.hparams["modules"].get("model")
    if model is None:
        return train_classifier.train(run)
    if isinstance(model, Whisper):
        return train_whisper(run)
    if isinstance(model, MaskedPrediction):
        return pretrain(run)
    return train_ctc(run)


def train_ctc(run: trainer.Run) -> dict[str, float]:
    """Train an encoder with CTC."""
    hparams = run.hparams
    model: CTC = hparams["modules"]["model"]
    encoder, codec = model.encoder, hparams["codec"]
    check_rate(hparams["sample_rate"], encoder.rate)
    sets = datasets(
        hparams["corpus"](),
        codec,
        hparams["sample_rate"],
        frames=model.frames,
        lengths=hparams["lengths"],
        speeds=hparams["speeds"],
        resample=hparams["resample"],
    )
    for split, each in sets.items():
        check_durations(each, split, encoder.shortest)
    fresh = begin(encoder, run)
    if model.vocabulary != len(codec):
        model.set_vocabulary(len(codec))
    if fresh and model.load_head(codec):
        logger.info("the last layer is that of %s", encoder.source)
    brain = Recogniser(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    return fit(brain, sets, hparams, padding_limit(hparams["max_padding"], encoder))


def train_whisper(run: trainer.Run) -> dict[str, float]:
    """Train Whisper."""
    hparams = run.hparams
    model: Whisper = hparams["modules"]["model"]
    check_rate(hparams["sample_rate"], model.rate)
    sets = whisper_datasets(
        hparams["corpus"](), model, hparams["lengths"], hparams["speeds"], hparams["resample"]
    )
    begin(model, run)
    brain = Transcriber(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    return fit(brain, sets, hparams, 1.0)


def pretrain(run: trainer.Run) -> dict[str, float]:
    """Train an encoder by masked prediction, and write it into the run folder."""
    hparams = run.hparams
    model: MaskedPrediction = hparams["modules"]["model"]
    check_rate(hparams["sample_rate"], model.encoder.rate)
    corpus = hparams["corpus"]()
    cuts = {**corpus, "train": filter_by_duration(corpus["train"], *hparams["lengths"])}
    sets = {split: Speech(each, hparams["sample_rate"]) for split, each in cuts.items()}
    for split, each in sets.items():
        check_durations(each, split, model.encoder.shortest)
    if not run.checkpointer.find():
        model.find_clusters(sets["train"], run.options.seed)
    brain = Pretrainer(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    result = fit(brain, sets, hparams, 1.0)
    if distributed.is_main():
        with brain.best_weights(**brain.best_checkpoint):
            export(brain.modules.model.encoder, run.folder / "encoder")
    distributed.barrier()
    return result


def fit(
    brain: TextBrain | Pretrainer,
    sets: Mapping[str, Speech],
    hparams: Mapping[str, Any],
    max_padding: float,
) -> dict[str, float]:
    """Fit, and test where ``tested`` says so."""
    sets = {name: each for name, each in sets.items() if name != "test" or hparams["tested"]}
    loading = {
        name: loader_options(each, name, hparams, max_padding) for name, each in sets.items()
    }
    return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


if __name__ == "__main__":
    trainer.main(train)
