"""Names of SpeechBrain's `Brain` and of earlier versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.options import RunOptions
from trainer.progress import Progress


class SpeechBrainNames:
    """Mixin of `Brain`: counters and options under the names that recipes use.

    The former names `last_batch` and `precision` can be read until a recipe sets attributes of
    these names, which are then its own.
    """

    options: RunOptions
    progress: Progress

    if not TYPE_CHECKING:  # mypy is to refuse former names

        def __getattr__(self, name: str) -> Any:
            """Return what a former name stands for; called for attributes that are not set."""
            if name == "last_batch":
                return self.is_last_batch
            if name == "precision" and "options" in vars(self):
                return self.options.precision
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=self)

    @property
    def epoch(self) -> Any:
        """Current epoch, as the epoch counter numbers it, until a recipe sets its own."""
        return vars(self).get("epoch", self.progress.epoch)

    @epoch.setter
    def epoch(self, value: Any) -> None:
        vars(self)["epoch"] = value  # The loop goes by `progress`.

    @epoch.deleter
    def epoch(self) -> None:
        del vars(self)["epoch"]

    @property
    def step(self) -> int:
        """Batches of the current epoch so far, and what a recipe has added to them in the epoch."""
        epoch, added = vars(self).get("_added_steps", (0, 0))
        return self.progress.step + (added if epoch == self.progress.epoch else 0)

    @step.setter
    def step(self, value: int) -> None:
        self._added_steps = self.progress.epoch, value - self.progress.step

    @property
    def optimizer_step(self) -> int:
        """Optimizer steps since the run began."""
        return self.progress.optimizer_step

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        self.progress.optimizer_step, self.progress.counted_by_hand = value, True

    @property
    def nonfinite_count(self) -> int:
        """Skipped steps of the current epoch."""
        return self.progress.nonfinite_count

    @nonfinite_count.setter
    def nonfinite_count(self, value: int) -> None:
        self.progress.nonfinite_count = value
