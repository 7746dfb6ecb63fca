"""Train a recogniser: Conformer with CTC.

    python recipes/asr/train.py hparams/asr/demo.yaml

Ends with the word and character error rate of the test set, by the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

import trainer
from recipes.asr.data import datasets
from recipes.asr.decoding import known_words, make_decoder
from recipes.asr.model import ctc_loss
from recipes.asr.scoring import Scores
from recipes.common.loading import loader_options
from recipes.common.training import fit_and_test
from trainer import Brain, Stage, distributed


class TextBrain(Brain):
    """Base of recognisers: valid and test are scored in words and characters.

    A subclass adds to ``scores`` in its hooks. Writes ``wer_valid.txt`` and ``wer_test.txt`` into
    the run folder.
    """

    best_checkpoint: ClassVar = {"min_key": "wer"}

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.scores = Scores()

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        scores = self.scores.gather()
        folder = self.hparams.output_folder  # None for a model that `trainer.load` made
        if distributed.is_main() and folder is not None:
            scores.write(Path(folder) / f"wer_{stage.value}.txt")
        note = "The worst utterances, then some chosen at random."
        self.show(stage.value, self.scores.samples(), note)
        return scores.rates()


class Recogniser(TextBrain):
    """Learns by CTC.

    Reads from the YAML ``codec``, ``decoder``, ``beam_size`` and ``lexicon`` (the words that can be
    said; null or empty for any).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = self.hparams
        self.decode = make_decoder(own.decoder, own.codec.tokens, own.beam_size)

    def compute_forward(self, batch: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        return self.modules.model(*batch.sig)  # log probabilities (B, T, V), frames (B,)

    def compute_objectives(
        self, predictions: tuple[Tensor, Tensor], batch: Any, stage: Stage
    ) -> Tensor:
        if stage is not Stage.TRAIN:
            rate = self.hparams.sample_rate
            self.scores.add(batch.id, batch.text, self.texts(predictions), batch.on_host.sig, rate)
        (_, samples), tokens = batch.on_host.sig, batch.on_host.tokens
        return ctc_loss(predictions[0], self.modules.model.frames(samples), *tokens)

    def texts(self, predictions: tuple[Tensor, Tensor]) -> list[str]:
        """Decode the text of each utterance."""
        heard = [self.hparams.codec.decode(tokens) for tokens in self.decode(*predictions)]
        return [known_words(text, self.hparams.lexicon) for text in heard]


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the best checkpoint (or the mean of the best)."""
    hparams = run.hparams
    sets = datasets(
        hparams["corpus"](),
        hparams["codec"],
        hparams["sample_rate"],
        frames=hparams["modules"]["model"].frames,
        lengths=hparams["lengths"],
        speeds=hparams["speeds"],
    )
    brain = Recogniser(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    loading = {split: loader_options(each, split, hparams) for split, each in sets.items()}
    return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


if __name__ == "__main__":
    trainer.main(train)
