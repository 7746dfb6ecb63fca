"""Profiler: a torch.profiler trace of a few training steps, for TensorBoard or chrome://tracing."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import distributed
from trainer.callbacks import Callback
from trainer.metrics import StageReport
from trainer.options import RunOptions
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")


class Profiler(Callback):
    """Trace ``profile_steps`` batches after the first ``profile_warmup`` of a training stage.

    The trace is written once, to ``profile/`` in the run folder (or in the current folder), and the
    slowest operations are logged. If the stage ends within the traced batches, the trace has fewer
    of them. If it ends within the warm-up, there is a warning, and the next stage is traced.

    Args:
        options: run options; uses ``profile_warmup``, ``profile_steps`` and ``output_folder``.
    """

    def __init__(self, options: RunOptions) -> None:
        self._options, self._done = options, False
        self._profile: Any = None

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        if stage is not Stage.TRAIN or self._done or self._profile is not None:
            return
        kinds, options = torch.profiler.ProfilerActivity, self._options
        self._profile = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])],
            schedule=torch.profiler.schedule(
                wait=0, warmup=options.profile_warmup, active=options.profile_steps, repeat=1
            ),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        if self._profile is not None and stage is Stage.TRAIN:
            self._profile.step()

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        if self._profile is None or report.stage != Stage.TRAIN.value:
            return
        self._stop()
        if not self._done:
            warnings.warn(
                f"profile_training: the epoch ended within the {self._options.profile_warmup} "
                "steps of warm-up and nothing was traced; lower profile_warmup, or wait for a "
                "longer epoch",
                stacklevel=2,
            )

    def on_fit_end(self, brain: Brain) -> None:
        self._stop()  # After an exception.

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()  # Writes the trace, if the warm-up is over.

    def _write(self, profile: Any) -> None:
        folder = Path(self._options.output_folder or ".") / "profile"
        try:
            torch.profiler.tensorboard_trace_handler(str(folder))(profile)
        except (OSError, RuntimeError) as error:  # A full disk; torch raises either.
            logger.warning("the trace could not be written to %s: %s", folder, error)
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
        logger.info("trace of %d steps in %s\n%s", self._options.profile_steps, folder, table)
        self._done = True


def make_profiler(brain: Brain) -> Profiler | None:
    """Return the profiler of a Brain, on the main rank with ``profile_training``; else None."""
    wanted = brain.options.profile_training and distributed.is_main()
    return Profiler(brain.options) if wanted else None
