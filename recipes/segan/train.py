"""Train a speech enhancer: SEGAN, a generator of waveforms against a discriminator.

    python recipes/segan/train.py hparams/segan/demo.yaml

Prints ``test: pesq=… pesq_noisy=… stoi=… stoi_noisy=… si_snr=… si_snr_noisy=…``: the means over the
test set, enhanced and as it was, by the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import trainer
from recipes.common.judges import Judges
from recipes.common.pairs import Pairs
from recipes.common.quality import require
from recipes.common.scoreboard import Scoreboard
from recipes.common.streaming import enhance_signal
from recipes.common.training import fit_and_test
from recipes.segan.model import (
    adversarial_loss,
    discriminator_loss,
    emphasise,
    enhance,
    gains,
)
from trainer import Brain, Stage
from trainer.data import BadItem
from trainer.seed import derive


class Enhancer(Brain):
    """Two players with an optimizer each; valid and test enhance whole clips.

    Reads from the YAML ``opt_g``, ``opt_d``, ``pre_emphasis``, ``level``, ``l1_weight``,
    ``chunks``, ``valid_measures`` and ``extremes``.
    """

    board: Scoreboard  # set before anything is evaluated

    @property
    def best_checkpoint(self) -> dict[str, str | None]:
        """The metric that chooses the checkpoint to use; None: the newest."""
        return {"max_key": self.hparams.best}

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "discriminator": self.hparams.opt_d(self.modules.discriminator.parameters()),
            "generator": self.hparams.opt_g(self.modules.generator.parameters()),
        }

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        """D on the real pairs, D on the fake ones, then G by the scores of the D that has moved.

        The generator runs once. The discriminator's loss stops at its output: it would go back
        through the generator for nothing. The discriminator runs again after its step, since its
        first scores are those of weights that are gone.
        """
        generator, discriminator = self.modules.generator, self.modules.discriminator
        own = self.hparams
        clean, noisy = prepared(batch.clean.data, batch.noisy.data, own.pre_emphasis, own.level)
        with self.autocast():
            fake = generator(noisy, self.latents(batch.id))  # (B, T)
            real_score = discriminator(torch.stack([clean, noisy], 1))
            fake_score = discriminator(torch.stack([fake.detach().float(), noisy], 1))
            loss_d = discriminator_loss(real_score, fake_score)
        self.optimize(loss_d, "discriminator", last=self.is_last_batch)
        with self.frozen("discriminator"), self.autocast():
            score = discriminator(torch.stack([fake.float(), noisy], 1))
            distance = (fake.float() - clean).abs().mean()
            loss_g = adversarial_loss(score) + own.l1_weight * distance
        self.optimize(loss_g, "generator", last=self.is_last_batch)
        return {"discriminator": loss_d, "generator": loss_g, "l1": distance}

    def latents(self, ids: list[str]) -> Tensor:
        """Draw a z for each clip (B, C, L) from (seed, epoch, clip).

        So it depends neither on the process nor on the other clips of the batch.
        """
        shape, drawn = self.modules.generator.latent, torch.Generator()
        seeds = (derive(self.options.seed, "z", self.epoch, each) for each in ids)
        z = [torch.randn(shape, generator=drawn.manual_seed(seed)) for seed in seeds]
        return torch.stack(z).to(self.device)

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is Stage.VALID:
            self.board.start("valid", self.hparams.valid_measures, extremes=1)
        elif stage is Stage.TEST:
            self.board.start("test", extremes=self.hparams.extremes)

    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        """The mean absolute difference to the clean clips; their scores go to the board."""
        own, generator = self.hparams, self.modules.generator

        def network(chunks: Tensor) -> Tensor:
            with torch.inference_mode(), self.autocast():
                return enhance(generator, chunks.to(self.device), own.pre_emphasis, own.level)

        (clean, lengths), (noisy, _) = batch.clean, batch.noisy
        found = torch.zeros(noisy.shape)
        for row, signal, length in zip(found, noisy.cpu(), lengths.tolist(), strict=True):
            whole = enhance_signal(signal[None, :length], network, own.chunks)
            row[:length] = whole[0]
        self.board.add(batch.id, clean, lengths, noisy, found)
        different = (found - clean.cpu()).abs().sum(1) / lengths.cpu()
        return different.mean()

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        metrics = self.board.finish()
        self.show(stage.value, self.board.samples, "The worst clips first.")
        return metrics


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the best checkpoint."""
    hparams = run.hparams
    require(hparams["valid_measures"], hparams["sample_rate"])
    if hparams["best"] not in hparams["valid_measures"]:
        known = ", ".join(hparams["valid_measures"])
        raise ValueError(
            f"best is {hparams['best']!r}; allowed: one of the valid_measures, {known}"
        )
    judges = Judges(hparams["measures"], hparams["sample_rate"], hparams["judges"])
    with judges:
        corpus, modules = hparams["corpus"](), hparams["modules"]
        sets = datasets(
            corpus, hparams["sample_rate"], modules["generator"].samples, hparams["times"]
        )
        references = len(modules["discriminator"].reference)
        modules["discriminator"].remember(
            reference_pairs(sets["train"], references, hparams["pre_emphasis"], hparams["level"])
        )
        brain = Enhancer(
            modules, hparams=hparams, run_opts=run.options, checkpointer=hparams["checkpointer"]
        )
        brain.board = Scoreboard(judges, hparams["output_folder"])
        whole = {"batch_size": 1, "num_workers": hparams["num_workers"]}
        training = {**whole, "batch_size": hparams["batch_size"], "drop_last": True}
        loading = {"train": training, "valid": whole, "test": whole}
        return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


def datasets(
    corpus: Mapping[str, Any], sample_rate: int, segment: int, times: int = 1
) -> dict[str, Pairs]:
    """Build the datasets: chunks to train on, whole clips to validate and test.

    Chunks have the length that the generator takes, with ``times`` of each clip an epoch.
    """
    return {
        "train": Pairs(corpus["train"], sample_rate, segment, times=times),
        "valid": Pairs(corpus["valid"], sample_rate, fixed=True),
        "test": Pairs(corpus["test"], sample_rate, fixed=True),
    }


def prepared(
    clean: Tensor, noisy: Tensor, pre_emphasis: float, level: float | None
) -> tuple[Tensor, Tensor]:
    """Pairs of chunks (B, T) as both players take them: pre-emphasised, noisy ones at one level."""
    clean, noisy = emphasise(clean, pre_emphasis), emphasise(noisy, pre_emphasis)
    gain = gains(noisy, level)
    return clean * gain, noisy * gain


def reference_pairs(
    dataset: Pairs, number: int, pre_emphasis: float, level: float | None = None
) -> Tensor:
    """The reference batch (R, 2, T) of the discriminator: the first good clips of a training set.

    The same in every run and process. Raises ValueError for a set that has too few.
    """
    fixed = Pairs(dataset.sources, dataset.sample_rate, dataset.segment, fixed=True)
    found = []
    for index in range(len(fixed)):
        if len(found) == number:
            break
        try:
            item = fixed[index]
        except BadItem:  # Training comes to it, and says so.
            continue
        sides = prepared(item["clean"][None], item["noisy"][None], pre_emphasis, level)
        found.append(torch.cat(sides))
    if len(found) < number:
        raise ValueError(
            f"the reference batch takes {number} clips, and there are {len(found)} to train on; "
            "set references to fewer"
        )
    return torch.stack(found)


if __name__ == "__main__":
    trainer.main(train)
