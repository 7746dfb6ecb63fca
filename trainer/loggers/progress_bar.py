"""Progress bar on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from trainer import distributed
from trainer.callbacks import Callback
from trainer.metrics import StageReport, StepReport
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain


class ProgressBar(Callback):
    """Show a progress bar for each stage, on rank 0.

    Args:
        shown: False hides the bars.

    Attributes:
        progressbar_shown: False hides the bars of stages that begin from now on; set by the
            argument ``progressbar`` of `Brain.fit` and `Brain.evaluate`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.progressbar_shown = shown
        self._bars: list[Any] = []  # A hook of one stage may run another stage.
        self._outer: list[int] = []  # Number of bars before each call that runs.

    def on_fit_start(self, brain: Brain) -> None:
        """Remember how many bars belong to outer calls of `fit` or `evaluate`."""
        self._outer.append(len(self._bars))

    def on_fit_end(self, brain: Brain) -> None:
        """Remove the bars of a call that failed."""
        self._keep(self._outer.pop() if self._outer else 0)

    on_evaluate_start = on_fit_start
    on_evaluate_end = on_fit_end

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        """Show the bar of a stage; a resumed training stage starts at the batches it has done."""
        description = stage.value if epoch is None else f"epoch {epoch} {stage.value}"
        # In a file every redrawn bar stays, so that it is drawn twice a minute only.
        pace = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 60.0}
        self._bars.append(
            tqdm(
                total=total,
                initial=brain.progress.step if stage is Stage.TRAIN else 0,
                desc=description,
                disable=not (self.progressbar_shown and distributed.is_main()),
                leave=False,
                dynamic_ncols=True,
                **pace,
            )
        )

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        """Advance the bar by a batch, with the loss behind it if that is known on the host."""
        if not self._bars or self._bars[-1].disable or not self._bars[-1].update():
            return
        if isinstance(loss, StepReport) and loss.loss is not None:
            self._bars[-1].set_postfix(loss=f"{loss.loss:.4g}", refresh=False)

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Remove the bar of the stage."""
        self._keep(len(self._bars) - 1)

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        """Remove all bars."""
        self._keep(0)
        self._outer.clear()

    def _keep(self, number: int) -> None:
        while len(self._bars) > number:
            self._bars.pop().close()
