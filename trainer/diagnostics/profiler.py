"""A torch.profiler trace of a few training steps, which TensorBoard and chrome://tracing open."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.options import RunOptions

logger = logging.getLogger("trainer")


class Profiler:
    """Traces ``profile_steps`` steps after ``profile_warmup`` of the first epoch that it sees.

    The trace goes to ``profile/`` in the run folder (or in the current one without any), and the
    operations that took longest are logged. Without ``profile_training`` it does nothing.
    """

    def __init__(self, options: RunOptions) -> None:
        self._wanted = options.profile_training and distributed.is_main()
        self._options = options
        self._profile: Any = None

    def __enter__(self) -> Profiler:
        if not self._wanted:
            return self
        folder = Path(self._options.output_folder or ".") / "profile"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0,
                warmup=self._options.profile_warmup,
                active=self._options.profile_steps,
                repeat=1,
            ),
            on_trace_ready=lambda profile: self._finish(profile, folder),
            record_shapes=True,
        )
        self._profile.__enter__()
        return self

    def _finish(self, profile: Any, folder: Path) -> None:
        torch.profiler.tensorboard_trace_handler(str(folder))(profile)
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)
        logger.info("trace of %d steps in %s\n%s", self._options.profile_steps, folder, table)
        self._wanted = False

    def step(self) -> None:
        """A training step is over."""
        if self._profile is not None:
            self._profile.step()

    def __exit__(self, *error: object) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(*error)  # Writes what it has, if the trace has begun.
        self._profile = None
        if self._wanted and error[0] is None:
            options = self._options
            warnings.warn(
                f"profile_training: the epoch ended within the {options.profile_warmup} steps of "
                "warm-up and nothing was traced; lower profile_warmup, or wait for a longer epoch",
                stacklevel=2,
            )
