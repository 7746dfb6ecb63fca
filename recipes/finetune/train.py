"""Fine-tune a pretrained model: an encoder with CTC, or Whisper.

    python recipes/finetune/train.py hparams/finetune/ctc_wav2vec2.yaml \
        --source facebook/wav2vec2-base --data_folder LibriSpeech

Ends with the word and character error rate of the test set, by the best checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import trainer
from recipes.asr.data import datasets
from recipes.asr.train import Recogniser as CTCRecogniser
from recipes.common.loading import Speech
from recipes.finetune.ctc import CTC
from recipes.finetune.data import check_durations, check_rate, loader_options, padding_limit
from recipes.finetune.sources import begin
from trainer import Brain

logger = logging.getLogger(__name__)


class Recogniser(CTCRecogniser):
    """Recogniser of the recipe `recipes.asr`, whose model has a pretrained encoder."""


def train(run: trainer.Run) -> dict[str, float]:
    """Train what the YAML builds, and test the best checkpoint (or the mean of the best)."""
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


def fit(
    brain: Brain, sets: Mapping[str, Speech], hparams: Mapping[str, Any], max_padding: float
) -> dict[str, float]:
    """Fit and test."""
    loading = {
        name: loader_options(each, name, hparams, max_padding) for name, each in sets.items()
    }
    brain.fit(
        hparams["epoch_counter"],
        sets["train"],
        sets["valid"],
        train_loader_kwargs=loading["train"],
        valid_loader_kwargs=loading["valid"],
    )
    if not hparams["tested"]:
        return {}
    brain.evaluate(sets["test"], test_loader_kwargs=loading["test"], **brain.best_checkpoint)
    return brain.test_metrics


if __name__ == "__main__":
    trainer.main(train)
