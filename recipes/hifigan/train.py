"""Train a vocoder: HiFi-GAN, which turns log-mel spectrograms into waveforms.

    python recipes/hifigan/train.py hparams/hifigan/demo.yaml

Prints ``test: mel_l1=… mel_l1_griffinlim=… pesq=… pesq_griffinlim=… stoi=… stoi_griffinlim=…``: the
means over the test set by the newest checkpoint (`best` in the YAML may choose another), and those
of Griffin and Lim's algorithm from the same mels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, pad

import trainer
from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.common.training import fit_and_test
from recipes.common.vocoder import check_front_end
from recipes.hifigan.data import datasets
from recipes.hifigan.model import adversarial_loss, discriminator_loss, feature_loss
from recipes.hifigan.scoring import Scores
from trainer import Brain, Stage

GRID = 16384  # samples: clips to evaluate are padded to multiples, since new shapes are costly


class HiFiGAN(Brain):
    """Two players with an optimizer each (Kong et al. 2020, arXiv 2010.05646, section 2.4).

    Reads from the YAML ``opt_g``, ``opt_d``, ``mel_weight``, ``feature_weight`` and
    ``adversarial_from``, the optimizer step from which on there is a discriminator: before it the
    generator learns from mels alone, for which a step costs a fraction. The paper has 0.
    """

    scores: Scores  # set before anything is tested

    @property
    def best_checkpoint(self) -> dict[str, str | None]:
        """The metric that chooses the checkpoint to use; None: the newest."""
        return {"min_key": self.hparams.best}

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "discriminator": self.hparams.opt_d(self.modules.discriminator.parameters()),
            "generator": self.hparams.opt_g(self.modules.generator.parameters()),
        }

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        """The discriminator's step, then the generator's by what has just moved.

        The discriminator is asked again, about real and generated signals alike: what it said
        before its step is that of weights that are gone.
        """
        real = batch.wav.data  # (B, S)
        with self.autocast():
            fake = self.modules.generator(self.modules.mel(real))
        fake = fake.float()
        mel = l1_loss(self.modules.loss_mel(fake), self.modules.loss_mel(real))
        losses = {"mel": mel}
        if self.optimizer_step < self.hparams.adversarial_from:
            self.optimize(self.hparams.mel_weight * mel, "generator", last=self.is_last_batch)
            return losses
        judge = self.modules.discriminator
        with self.autocast():
            losses["discriminator"] = discriminator_loss(judge(real), judge(fake.detach()))
        self.optimize(losses["discriminator"], "discriminator", last=self.is_last_batch)
        with self.frozen("discriminator"), self.autocast():
            ours, theirs = judge(fake), judge(real)
            losses["adversarial"] = adversarial_loss(ours)
            losses["features"] = feature_loss(theirs, ours)
        weighted = (self.hparams.mel_weight * mel, self.hparams.feature_weight * losses["features"])
        losses["generator"] = losses["adversarial"] + sum(weighted)
        self.optimize(losses["generator"], "generator", last=self.is_last_batch)
        return losses

    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        """The mean distance of the log-mels of whole clips, one at a time."""
        distances = []
        mel = self.modules.mel
        for id, wav, length in zip(batch.id, *batch.wav, strict=True):
            whole = int(length) // mel.hop * mel.hop  # samples of the frames that are complete
            with self.autocast():
                made = self.modules.generator(mel(pad(wav[:whole], (0, -whole % GRID))[None]))
            made, wav = made[0, :whole].float(), wav[:whole]
            distances.append(l1_loss(mel(made), mel(wav)))
            if stage is Stage.TEST:
                self.scores.add(id, wav, made)
        return torch.stack(distances).mean()

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is Stage.TEST:
            self.scores.start()

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        if stage is Stage.VALID:
            return {"mel_l1": stage_loss}
        means = self.scores.finish()
        self.show("test", self.scores.samples())
        return means


def check_sizes(hparams: Mapping[str, Any]) -> None:
    """Raise ValueError where generator, front ends and segments do not fit each other."""
    mel, segment, rate = hparams["mel"], hparams["segment"], hparams["sample_rate"]
    check_front_end(hparams["generator"], mel)
    for name in ("mel", "loss_mel"):
        if (own := hparams[name].sample_rate) != rate:
            raise ValueError(f"{name} has sample_rate={own}; allowed: that of the run, {rate}")
    least = -(-(max(mel.edge, hparams["loss_mel"].edge) + 1) // mel.hop) * mel.hop
    if segment % mel.hop or segment < least:
        raise ValueError(
            f"segment is {segment} samples; allowed: multiples of the hop, {mel.hop}, of {least} "
            "or more"
        )


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the checkpoint that `best` chooses."""
    hparams, mel = run.hparams, run.hparams["mel"]
    check_sizes(hparams)
    if hparams["best"] not in (None, "mel_l1"):
        raise ValueError(f"best is {hparams['best']!r}; allowed: null, mel_l1")
    with Judges(hparams["measures"], 16000, hparams["judges"]) as judges:
        sets = datasets(
            hparams["corpus"](),
            hparams["sample_rate"],
            hparams["segment"],
            hparams["segments_of_a_clip"],
            shortest=mel.edge + mel.hop,
            resample=hparams["resample"],
        )
        brain = HiFiGAN(
            hparams["modules"],
            hparams=hparams,
            run_opts=run.options,
            checkpointer=hparams["checkpointer"],
        )
        brain.scores = Scores(
            judges, mel, GriffinLim(mel), hparams["output_folder"], hparams["shown"]
        )
        workers = {"num_workers": hparams["num_workers"]}
        training = {**workers, "batch_size": hparams["batch_size"], "drop_last": True}
        loading = {"train": training, "valid": workers, "test": workers}
        return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


if __name__ == "__main__":
    trainer.main(train)
