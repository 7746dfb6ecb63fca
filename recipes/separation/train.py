"""Train a network that separates people who talk at once.

    python recipes/separation/train.py hparams/separation/demo.yaml

Ends with the improvements in SI-SNR and SDR over the mixtures of the test set, in dB.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

import trainer
from recipes.common.training import fit_and_test
from recipes.separation.objectives import best_order, keep, pairwise_si_snr
from recipes.separation.scoring import Scores
from trainer import Brain, Stage, StepReport, distributed

logger = logging.getLogger(__name__)


class Separator(Brain):
    """Learns the negative SI-SNR of its estimates, in whatever order they come.

    Reads from the YAML ``threshold_byloss`` and ``threshold`` (losses below so many dB are left out
    of a batch), ``loss_upper_lim`` (a batch above it is skipped) and ``sample_rate``; writes
    ``scores_valid.csv``, ``scores_test.csv`` and ``examples`` into the run folder.
    """

    best_checkpoint: ClassVar = {"max_key": "si_snri"}

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        mixtures, _ = batch.mixture
        return self.modules.separator(mixtures[:, None])  # (B, S, T)

    def losses(self, estimates: Tensor, batch: Any) -> Tensor:
        """The loss of each mixture in dB: (B,).

        Raises ValueError where the network gives another number of tracks than a mixture has
        sources.
        """
        sources, lengths = batch.sources
        sources = sources.transpose(1, 2)  # (B, S, T)
        if estimates.shape[1] != sources.shape[1]:
            raise ValueError(
                f"the network gives {estimates.shape[1]} tracks, the mixtures have "
                f"{sources.shape[1]} sources: num_sources and speakers must be the same number"
            )
        return -best_order(pairwise_si_snr(estimates, sources, lengths)).score

    def fit_batch(self, batch: Any) -> StepReport:
        with self.autocast():
            estimates = self.compute_forward(batch, Stage.TRAIN)
        losses = self.losses(estimates, batch)
        own = self.hparams
        kept = keep(losses, own.threshold if own.threshold_byloss else None, own.loss_upper_lim)
        report = self.optimize(kept.loss, weight=kept.weight)
        if report.outcome == "skipped" and (mean := losses.mean().item()) > own.loss_upper_lim:
            logger.warning("a loss of %.4g is above loss_upper_lim, %g", mean, own.loss_upper_lim)
        return report

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        mixtures, lengths = batch.mixture
        sources = batch.sources.data.transpose(1, 2)
        self.scores.add(batch.id, mixtures, sources, predictions, lengths)
        return self.losses(predictions, batch).mean()

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is not Stage.TRAIN:
            self.scores = Scores(self.hparams.sample_rate, sdr=stage is Stage.TEST)

    def on_stage_end(
        self, stage: Stage, stage_loss: Any, epoch: int | None = None
    ) -> Mapping[str, float] | None:
        if stage is Stage.TRAIN:
            return None
        scores = self.scores.gather()
        if self.hparams.output_folder is not None:
            folder = Path(self.hparams.output_folder)
            if distributed.is_main():
                scores.write_table(folder / f"scores_{stage.value}.csv")
            if stage is Stage.TEST:
                scores.write_audio(folder / "examples")
        self.show(stage.value, scores.samples(), "The worst mixtures first.")
        return scores.means()


def train(run: trainer.Run) -> dict[str, float]:
    """Train as the YAML says, and test the best checkpoint."""
    hparams = run.hparams
    sets = hparams["data"]()
    brain = Separator(
        hparams["modules"], hparams["opt_class"], hparams, run.options, hparams["checkpointer"]
    )
    workers = {"num_workers": hparams["num_workers"]}
    # Mixtures of unlike lengths are separated one by one: padding reaches the layers that
    # normalise over time, and would change what they find.
    testing = {**workers, "batch_size": hparams["test_batch_size"]}
    training = {**workers, "batch_size": hparams["batch_size"], "drop_last": True}
    loading = {"train": training, "valid": testing, "test": testing}
    return fit_and_test(brain, hparams["epoch_counter"], sets, loading)


if __name__ == "__main__":
    trainer.main(train)
