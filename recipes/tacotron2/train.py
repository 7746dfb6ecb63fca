"""Train a synthesiser of speech: Tacotron2.

    python recipes/tacotron2/train.py hparams/tacotron2/demo.yaml

Ends with what the best checkpoint makes of the test set's texts: how sharp its attention is, how
often its gate stops at about the true length, and the error of its spectrograms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import trainer
from recipes.common.loading import DurationBatches
from recipes.common.training import fit_and_test
from recipes.tacotron2.data import Mels, datasets
from recipes.tacotron2.losses import usual_durations
from recipes.tacotron2.model import Predictions, Spoken
from recipes.tacotron2.pictures import Gallery, Picture, write_picture
from recipes.tacotron2.scoring import Reading, Scores, focus_rate, mel_error
from recipes.tacotron2.sound import make_sound, write_sound
from recipes.tacotron2.speaker import frame_limit
from trainer import Brain, Stage, distributed
from trainer.samples import Audio, Cell
from trainer.seed import derive


class Synthesiser(Brain):
    """Learns by teacher forcing; valid and test synthesise freely, too.

    Reads from the YAML ``objective``, ``mel``, ``longest`` (seconds that a text may take) and
    ``pictures`` (how many utterances are drawn at each validation); writes ``pictures/``,
    ``readings_valid.csv``, ``readings_test.csv`` and, at the test, ``audio/`` into the run folder.
    """

    best_checkpoint: ClassVar = {"min_key": "mel_l1"}

    def compute_forward(self, batch: Any, stage: Stage) -> Predictions:
        known = batch.on_host.tokens.lengths
        return self.modules.model(*batch.tokens, *batch.mel, known)

    def compute_objectives(self, predictions: Predictions, batch: Any, stage: Stage) -> Tensor:
        parts = self.hparams.objective(
            predictions, *batch.tokens, batch.mel.lengths, self.optimizer_step
        )
        return sum(parts.values(), 0.0)

    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        """The loss by teacher forcing; and how the texts of the batch are read freely."""
        # Where the dropout of the pre-net does not rest, a text is still read alike each time.
        torch.manual_seed(derive(self.options.seed, "reading", *batch.id))
        with self.autocast():
            predictions = self.compute_forward(batch, stage)
            loss = self.compute_objectives(predictions, batch, stage)
            limit = frame_limit(self.hparams.longest, self.hparams.mel)
            spoken = self.modules.model.synthesise(*batch.tokens, limit)
        self._score(batch, predictions, spoken)
        self._draw(batch, predictions, spoken)
        return loss.detach()

    def _score(self, batch: Any, predictions: Predictions, spoken: Spoken) -> None:
        model, frames = self.modules.model, batch.mel.lengths
        error = mel_error(predictions.refined, predictions.target, frames) * model.deviation
        focus = focus_rate(spoken.attention, model.steps(spoken.frames))
        columns = (focus, spoken.frames, frames, spoken.stopped, error)
        rows = zip(batch.id, batch.text, *(each.tolist() for each in columns), strict=True)
        self.scores.readings += (Reading(*row) for row in rows)

    def _draw(self, batch: Any, predictions: Predictions, spoken: Spoken) -> None:
        """Keep what the first few utterances look like."""
        model = self.modules.model
        for n in range(min(len(batch), self.gallery.room)):
            frames, symbols = int(batch.mel.lengths[n]), int(batch.tokens.lengths[n])
            made = int(spoken.frames[n])
            self.gallery.drawn.append(
                Picture(
                    batch.id[n],
                    batch.text[n],
                    true=batch.mel.data[n, :frames],
                    forced=predictions.refined[n, :frames] * model.deviation + model.mean,
                    free=spoken.mel[n, :made],
                    attention=spoken.attention[n, : made // model.reduction, :symbols],
                )
            )

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.scores, self.gallery = Scores(), Gallery(self.hparams.pictures)

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        scores = self.scores.gather()
        if distributed.is_main() and self.hparams.output_folder is not None:
            folder = Path(self.hparams.output_folder)
            scores.write(folder / f"readings_{stage.value}.csv")
            name = stage.value if epoch is None else f"{stage.value}-{epoch:04d}"
            write_picture(folder / "pictures" / f"{name}.png", self.gallery.drawn)
            rows = [each.cells() for each in self.gallery.drawn]
            if stage is Stage.TEST:
                self._sound(folder / "audio", rows)
            self.show(stage.value, rows)
        return scores.rates()

    def _sound(self, folder: Path, rows: list[dict[str, Cell]]) -> None:
        """Write what the drawn utterances sound like, and add it to their rows."""
        own = self.hparams
        sound, rate = make_sound(own.mel, own.vocoder, str(self.device)), own.mel.sample_rate
        for number, (each, row) in enumerate(zip(self.gallery.drawn, rows, strict=True)):
            for name, mel in (("true", each.true), ("free", each.free)):
                wave = sound(mel.T)
                write_sound(folder / f"{number:02d}-{name}.wav", wave, rate)
                row[f"sound, {name}"] = Audio(wave, rate)


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the best checkpoint."""
    hparams = run.hparams
    sets = datasets(
        hparams["corpus"](),
        hparams["front"],
        hparams["mel"],
        hparams["longest_text"],
        hparams["quiet"],
        hparams["cached"],
    )
    if hparams["paced"]:
        known = sets["train"]
        hparams["objective"].durations = usual_durations(
            known.tokens, known.durations, len(hparams["front"])
        )
    brain = Synthesiser(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    loading = {split: _loading(each, split, hparams) for split, each in sets.items()}
    return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


def _loading(dataset: Mels, split: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loader's options: batches of so many utterances, about equally long."""
    size = hparams["batch_size"]
    batches = DurationBatches(
        dataset.durations,
        size * max(dataset.durations),
        seed=hparams["seed"],
        shuffle=split == "train",
        max_items=size,
    )
    return {"batch_sampler": batches, "num_workers": hparams["num_workers"]}


if __name__ == "__main__":
    trainer.main(train)
