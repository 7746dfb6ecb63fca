"""Train MetricGAN+: enhancement by a generator whose judge predicts PESQ or STOI.

    python recipes/metricgan/train.py hparams/metricgan/demo.yaml

Prints what each phase has come to and what it has added, and ends with the measures of the test set
by the best checkpoint of the last phase.
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
from recipes.common.scoreboard import NOISY, Scoreboard
from recipes.metricgan.history import Record, padded, quantised, waveform
from recipes.metricgan.model import enhance
from recipes.metricgan.parts import evaluate_phases, keep_outcomes
from recipes.metricgan.phases import Drawn, Passes, Phases, weighted_mean
from recipes.metricgan.targets import Targets, check_target
from recipes.metricgan.variations import exponents, losses, version_of
from trainer import Brain, EpochCounter, Stage, distributed
from trainer.seed import derive

COMPOSITES = ("csig", "cbak", "covl")  # predicted opinions of signal, background and all


class Enhancer(Brain):
    """The players of MetricGAN+, each batch of which says what it is for (`phases.PASSES`).

    Reads from the YAML ``opt_d`` and ``opt_g``, ``phases``, ``history``, ``spectrum`` (what the
    generator sees) and ``hearing`` (what the discriminator sees), ``target``, ``valid_measures``,
    ``extremes`` (best and worst clips that are kept to hear), ``adversarial_weight`` and
    ``spectral_weight`` (of the generator's losses), ``variations`` (of masks, that the
    discriminator learns from, too), ``within_weight`` (`variations.losses`), and ``opt_metric``:
    what moves the ``metric_layers`` by the discriminator's word; null: ``opt_g``, all of them.
    """

    targets: Targets  # both set by `judged_by`, before anything is trained or evaluated
    board: Scoreboard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = self.hparams
        self.phases, self.history = Phases(own.phases), own.history
        self.spectrum, self.hearing = own.spectrum.to(self.device), own.hearing.to(self.device)

    def judged_by(self, judges: Judges) -> None:
        """Have signals measured by these, in training as in evaluation."""
        self.targets = Targets(judges, self.hparams.target)
        self.board = Scoreboard(judges, self.hparams.output_folder)

    @property
    def bests(self) -> dict[str, str]:
        """Return the metric that chooses the checkpoint of each phase of the generator."""
        return self.phases.bests(self.hparams.target)

    @property
    def best(self) -> str:
        """Return the metric of the last phase, whose checkpoint is the one to use."""
        return list(self.bests.values())[-1]

    @property
    def best_checkpoint(self) -> dict[str, str]:
        """The metric that chooses the checkpoint to use."""
        return {"max_key": self.best}

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "discriminator": self.hparams.opt_d(self.modules.discriminator.parameters()),
            "generator": self.hparams.opt_g(self.modules.generator.parameters()),
        }
        if self.hparams.opt_metric is not None:
            weights = self.modules.generator.weights_of(self.hparams.metric_layers)
            self.optimizers_dict["metric"] = self.hparams.opt_metric(weights)

    def count_examples(self, batch: Any) -> float:
        return float(batch.on_host.weight.sum()) if "weight" in batch else float(len(batch))

    # ------------------------------------------------------------------------------ the passes

    def fit_batch(self, batch: Any) -> dict[str, Tensor] | None:
        passes = {
            "spectral": self.fit_spectral, "enhance": self.ask_for_scores,
            "current": self.fit_current, "history": self.fit_history,
            "generator": self.fit_generator,
        }  # fmt: skip
        return passes[batch.what[0]](batch)

    def fit_spectral(self, batch: Any) -> dict[str, Tensor]:
        """Generator: masked against clean spectrogram."""
        with self.autocast():
            loss = weighted_mean(self.spectral_losses(batch), batch.weight)
        self.step_generator(loss, batch)
        return {"spectral": loss.detach()}

    @torch.no_grad()
    def ask_for_scores(self, batch: Any) -> None:
        """Enhance, keep what came out, and have it scored while the discriminator trains."""
        known = batch.on_host
        columns = (known.index, known.epoch, known.noisy.lengths, known.weight)
        rows = list(zip(batch.id, *(each.tolist() for each in columns), strict=True))
        for version in self.versions:
            with self.autocast():
                waves = quantised(self.enhanced(batch, version))
            for wave, (name, index, epoch, length, weight) in zip(waves, rows, strict=True):
                if weight > 0:
                    found = Record(name, index, epoch, wave[:length].clone(), version)
                    self.history.current[index, version] = found
        self.ask(batch)

    def fit_current(self, batch: Any) -> dict[str, Tensor]:
        """Discriminator: what is clean, what was enhanced in this epoch, and what is noisy."""
        clean = self.features(batch.clean.data)
        signals, scores = self.scored(batch)
        sides = [batch.clean.data, *signals]
        measured = batch.on_host.weight * scores.isfinite().all(0)
        weights = measured.to(self.device, non_blocking=True)
        targets = scores.nan_to_num().to(self.device, non_blocking=True)
        with self.autocast():
            predicted = [
                self.modules.discriminator(self.features(judged), clean, self.frames(batch))
                for judged in sides
            ]
            found = losses(torch.stack(predicted) - targets, self.hparams.within_weight)
            loss = weighted_mean(found, weights)
        self.step_discriminator(loss, batch, measured)
        # NaN where nothing was measured: a loss of 0 would enter the average.
        return {"current": loss.detach() if measured.any() else torch.tensor(torch.nan)}

    def fit_history(self, batch: Any) -> dict[str, Tensor]:
        """Discriminator: what was enhanced in past epochs."""
        places = batch.on_host.record.tolist()
        records = [self.history[place] if place >= 0 else None for place in places]
        scores = torch.tensor([record.score if record else 0.0 for record in records])
        clean = self.features(batch.clean.data)
        with self.autocast():
            judged = self.features(padded(records, batch.clean.data))
            predicted = self.modules.discriminator(judged, clean, self.frames(batch))
            errors = predicted - scores.to(predicted, non_blocking=True)
            loss = weighted_mean(errors.square(), batch.weight)
        self.step_discriminator(loss, batch, batch.on_host.weight)
        return {"history": loss.detach()}

    def fit_generator(self, batch: Any) -> dict[str, Tensor]:
        """Generator: what the discriminator, as it is by now, says of its signals should be 1."""
        with self.frozen("discriminator"), self.autocast():
            judged = self.features(self.enhanced(batch))
            clean = self.features(batch.clean.data)
            predicted = self.modules.discriminator(judged, clean, self.frames(batch))
            adversarial = weighted_mean((predicted - 1.0).square(), batch.weight)
            loss = self.hparams.adversarial_weight * adversarial
            if self.hparams.spectral_weight:
                spectral = weighted_mean(self.spectral_losses(batch), batch.weight)
                loss = loss + self.hparams.spectral_weight * spectral
        self.step_generator(loss, batch, "metric" if "metric" in self.updates else "generator")
        predicted_mean = weighted_mean(predicted.detach(), batch.weight)
        return {"generator": adversarial.detach(), "predicted": predicted_mean}

    def step_discriminator(self, loss: Tensor, batch: Any, weights: Tensor) -> None:
        """Step by a loss that is the mean over utterances of these weights (B,), on the host."""
        self.optimize(loss, "discriminator", float(weights.sum()), last=self.closes(batch))

    def step_generator(self, loss: Tensor, batch: Any, name: str = "generator") -> None:
        self.optimize(loss, name, last=self.closes(batch))
        self.modules.generator.sigmoid.limit()

    def closes(self, batch: Any) -> bool:
        """Return True for the last batch of a pass."""
        return bool(batch.on_host.closes[0])

    # ----------------------------------------------------------------------- signals and scores

    @property
    def versions(self) -> range:
        """Of an enhanced utterance: 0 is the generator's own, the others are `variations`."""
        return range(1 + self.hparams.variations)

    def enhanced(self, batch: Any, version: int = 0) -> Tensor:
        """The noisy side of a batch through the generator, (B, S)."""
        power, known = None, batch.on_host
        if version:
            places = zip(known.epoch.tolist(), known.index.tolist(), strict=True)
            seeds = [derive(self.options.seed, "version", *each, version) for each in places]
            power = exponents(seeds, self.spectrum.bins).to(self.device, non_blocking=True)
        lengths = known.noisy.lengths
        return enhance(self.spectrum, self.modules.generator, batch.noisy.data, lengths, power)

    def features(self, wav: Tensor) -> Tensor:
        """Samples (B, S) as the discriminator sees them: log magnitudes (B, T, F)."""
        return self.hearing.features(self.hearing(wav))

    def frames(self, batch: Any) -> Tensor:
        return self.hearing.frames(batch.clean.lengths)

    def spectral_losses(self, batch: Any) -> Tensor:
        """The mean squared error of compressed magnitudes of each utterance, (B,)."""
        noisy, clean = self.spectrum(batch.noisy.data), self.spectrum(batch.clean.data)
        frames = self.spectrum.frames(batch.clean.lengths)
        seen = self.spectrum.features
        known = self.spectrum.frames(batch.on_host.clean.lengths)
        mask = self.modules.generator(seen(noisy), known).float()
        errors = (seen(noisy * mask) - seen(clean)).square().mean(-1)  # (B, T)
        valid = torch.arange(errors.shape[1], device=errors.device) < frames[:, None]
        return (errors * valid).sum(-1) / frames

    def ask(self, batch: Any) -> None:
        """Ask for the scores of a batch that are not known, enhanced and noisy."""
        known = batch.on_host
        sides = zip(known.noisy.data, known.clean.data, known.noisy.lengths.tolist(), strict=True)
        for name, index, (noisy, clean, length) in zip(
            known.id, known.index.tolist(), sides, strict=True
        ):
            for version in self.versions:
                record = self.history.current.get((index, version))
                if record is not None:
                    self.targets.ask(version_of(name, version), clean[:length], waveform(record))
            if (index, 0) in self.history.current:
                self.targets.ask(name + NOISY, clean[:length], noisy[:length])

    def scored(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Return the enhanced and noisy signals of a batch, and their normalised scores.

        Signals are (B, S). Scores are (1 + signals, B), on the host: those of the clean ones, 1,
        come first. A score is NaN where there is none.
        """
        self.ask(batch)  # Those of a resumed run were asked for in another process.
        signals, current = [], self.history.current
        places, found = batch.on_host.index.tolist(), [[1.0] * len(batch)]
        for version in self.versions:
            records = [current.get((index, version)) for index in places]
            scores = self.targets.get([version_of(name, version) for name in batch.id])
            for record, score in zip(records, scores, strict=True):
                if record is not None:
                    current[record.index, version] = record._replace(score=score)
            signals.append(padded(records, batch.clean.data))
            found.append(scores)
        found.append(self.targets.get([name + NOISY for name in batch.id]))
        return [*signals, batch.noisy.data], torch.tensor(found)

    # --------------------------------------------------------------------------- valid and test

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is Stage.TRAIN:
            self.targets.start()
        elif stage is Stage.VALID:
            # The target chooses the checkpoint of a phase.
            wanted = dict.fromkeys([self.hparams.target, *self.hparams.valid_measures])
            self.board.start("valid", list(wanted), extremes=1)
        else:
            self.board.start("test", extremes=self.hparams.extremes)

    @torch.no_grad()
    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        with self.autocast():
            enhanced = self.enhanced(batch)
            loss = self.spectral_losses(batch).mean()
        self.board.add(batch.id, *batch.clean, batch.noisy.data, enhanced)
        return loss

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            self.history.close()
            return None
        scores = self.board.finish()
        self.show(stage.value, self.board.samples, "The worst clips first.")
        scores.update((n, self.board.means[n]) for n in COMPOSITES if n in self.board.means)
        name = self.phases.outcome(epoch) if epoch is not None else None
        if stage is Stage.VALID and name is not None and self.hparams.target in scores:
            # Under a name of its own, too: checkpoints are chosen among those of a phase.
            scores[self.bests[name]] = scores[self.hparams.target]
        return scores


def train(run: trainer.Run) -> dict[str, float]:
    """Train phase after phase as the YAML says, and test what each has come to."""
    hparams, options = run.hparams, run.options
    rate = hparams["sample_rate"]
    check_target(hparams["target"], hparams["measures"])
    require(hparams["valid_measures"], rate)
    corpus = hparams["corpus"]()
    training = Drawn(Pairs(corpus["train"], rate, segment=hparams["segment"]))
    valid, test = (Pairs(corpus[split], rate, fixed=True) for split in ("valid", "test"))
    brain = Enhancer(
        hparams["modules"], hparams=hparams, run_opts=options, checkpointer=hparams["checkpointer"]
    )
    keep_outcomes(brain)
    batches = Passes(
        brain.phases, len(training), brain.history, options.seed,
        distributed.rank(), distributed.world_size(),
    )  # fmt: skip
    # Enough may wait that a whole pass is enhanced while the first of it are being measured.
    with Judges(hparams["measures"], rate, hparams["judges"], waiting=1000) as judges:
        brain.judged_by(judges)
        brain.fit(
            EpochCounter(brain.phases.epochs),
            training,
            valid,
            train_loader_kwargs={"batch_sampler": batches, "num_workers": hparams["num_workers"]},
        )
        return evaluate_phases(brain, test)


if __name__ == "__main__":
    trainer.main(train)
