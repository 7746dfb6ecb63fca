"""Names of SpeechBrain's `Brain` that read and set the progress of a run."""

from __future__ import annotations

from trainer.progress import Progress


class SpeechBrainNames:
    """Mixin of `Brain`: counters under the names that SpeechBrain's recipes use."""

    progress: Progress

    @property
    def epoch(self) -> int:
        """Current epoch, as the epoch counter numbers it."""
        return self.progress.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.progress.epoch = value

    @property
    def step(self) -> int:
        """Batches of the current epoch so far."""
        return self.progress.step

    @step.setter
    def step(self, value: int) -> None:
        self.progress.step = value

    @property
    def optimizer_step(self) -> int:
        """Optimizer steps since the run began."""
        return self.progress.optimizer_step

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        self.progress.optimizer_step = value

    @property
    def nonfinite_count(self) -> int:
        """Skipped steps of the current epoch."""
        return self.progress.nonfinite_count

    @nonfinite_count.setter
    def nonfinite_count(self, value: int) -> None:
        self.progress.nonfinite_count = value
