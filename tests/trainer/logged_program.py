"""A small run with loggers, which may kill itself: FOLDER, loggers, and where it is killed.

    python -m tests.trainer.logged_program runs/x wandb,mlflow step:14

It is killed after the optimizer step 14, or (`valid:20`) in a validation after step 20.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.small import Regressor, batches, make
from tests.trainer.test_log import png
from trainer import Checkpointer, EpochCounter, Stage
from trainer.loggers import loggers_of

PICTURE = png(8, 8)


class Recorder(Regressor):
    killed_at = ""

    def on_fit_batch_end(self, *_: Any) -> None:
        self._die(f"step:{self.optimizer_step}")

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        if stage is Stage.TRAIN:
            return None
        log, step = loggers_of(self), self.optimizer_step
        log.figure(f"attention/{stage.value}", PICTURE, step)
        log.audio(f"speech/{stage.value}", torch.linspace(-1, 1, 160), 16000, step)
        log.text(f"words/{stage.value}", "a < b", step)
        self._die(f"{stage.value}:{step}")
        return {"wer": 100.0 / (step + 1)}

    def _die(self, place: str) -> None:
        if place == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, loggers: Any, killed_at: str = "", epochs: int = 3, **options: Any) -> Any:
    """Train epochs of 10 steps and test; a checkpoint every 5 steps and at the end of each."""
    Recorder.killed_at = killed_at
    options = {"log_interval": 1, "monitor_every": 4, "checkpoint_every_steps": 5, **options}
    brain = make(
        Recorder, hparams={"lr": 0.01, "sizes": [4, 6, 2]}, logger=loggers,
        checkpointer=Checkpointer(folder / "checkpoints", keep_best={"wer": "min"}),
        output_folder=str(folder), **options,
    )  # fmt: skip
    brain.fit(EpochCounter(epochs), batches(10), batches(3))
    brain.evaluate(batches(3))
    return brain


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3] if len(sys.argv) > 3 else "")
