"""Time of the parts of a step, padding and memory, measured once per log record.

Nothing waits for a device, and only the measured step costs extra work. On a GPU the times are
those of the device, from CUDA events that are read with the next record.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.callbacks import Callback
from trainer.data.batch import Batch, Padded
from trainer.optim import step
from trainer.progress import Stage

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.checkpoint import Checkpoint


class StepTimes(Callback):
    """Add the seconds of a step to log records, as ``times``, ``padding`` and ``memory``.

    Measures the batches up to the first step after a record, starting with the second batch of a
    training stage. ``times`` has, in seconds, the wait for data ("data"), forward pass and loss
    ("forward"), backward pass ("backward"), the step itself ("step"), and checkpoints since the
    last record ("save"). ``padding`` is the share of padding, from 0 to 1, in the largest padded
    field of the batch. ``memory`` is the peak memory in bytes: of tensors on a GPU, of the process
    on a CPU.
    """

    def __init__(self) -> None:
        self._watch = step.Stopwatch(on_gpu=False)
        self._padding: float | None = None
        self._saving = 0.0
        self._listens = False  # True while batches are watched.
        self._counts = False  # True once a measured batch has begun.

    def on_stage_start(
        self, brain: Brain, stage: Stage, epoch: int | None, total: int | None
    ) -> None:
        if stage is Stage.TRAIN:
            self._begin(brain)

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        times = self._times() if self._stepped() else {}
        if self._saving:
            times["save"] = round(self._saving, 6)
        if times:
            record["times"] = times
        if self._padding is not None:
            record["padding"] = round(self._padding, 4)
        record["memory"] = _memory(brain.device)
        self._saving = 0.0
        self._begin(brain)

    def on_checkpoint(self, brain: Brain, checkpoint: Checkpoint) -> None:
        begun = datetime.fromisoformat(checkpoint.time)
        self._saving += (datetime.now(UTC) - begun).total_seconds()
        if self._watch.marks and self._listens:
            self._watch.mark("save")  # The wait for data begins after a save.

    def on_fit_end(self, brain: Brain) -> None:
        self._end(brain)

    def _begin(self, brain: Brain) -> None:
        self._end(brain)
        self._watch = step.Stopwatch(brain.device.type == "cuda")
        self._padding, self._counts, self._listens = None, False, True
        brain.callbacks.listen("on_batch_start", self._batch_start)
        brain.callbacks.listen("on_batch_end", self._batch_end)

    def _end(self, brain: Brain) -> None:
        if self._listens:
            brain.callbacks.unlisten("on_batch_start", self._batch_start)
            brain.callbacks.unlisten("on_batch_end", self._batch_end)
            step.stopwatch = None
            self._listens = False

    def _batch_start(self, brain: Brain, batch: Any) -> None:
        if self._counts:
            self._watch.mark("data")
            self._padding = _padding(batch)
            step.stopwatch = self._watch

    def _batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        if stage is not Stage.TRAIN:
            return
        self._watch.mark("rest")
        step.stopwatch = None
        if self._stepped():
            self._end(brain)
        elif not self._counts:  # A measurement begins with a window.
            del self._watch.marks[:-1]
            self._counts = not any(update.window.count for update in brain.updates.values())

    def _stepped(self) -> bool:
        return any(part == "step" for part, _ in self._watch.marks)

    def _times(self) -> dict[str, float]:
        """Return the seconds of each part of the measured step; empty if not known."""
        times: dict[str, float] = {}
        for part, seconds in self._watch.read():
            known = {"rest": "step", "save": ""}.get(part, part)
            if known:
                times[known] = round(times.get(known, 0.0) + seconds, 6)
        return times


def make_step_times(brain: Brain) -> StepTimes | None:
    """Return the measurement for a Brain that records, on rank 0; else None."""
    return StepTimes() if brain.options.output_folder and distributed.is_main() else None


def _memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # In KiB, except on macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


def _padding(batch: Any) -> float | None:
    """Return the share of padding in the largest padded field whose lengths are on the host."""
    batch = dict(batch.on_host) if isinstance(batch, Batch) else batch
    fields = [
        each
        for each in (batch.values() if isinstance(batch, Mapping) else ())
        if isinstance(each, Padded)
        and isinstance(each.lengths, Tensor)
        and each.lengths.device.type == "cpu"
        and each.data.numel()
    ]
    if not fields:
        return None
    data, lengths = max(fields, key=lambda each: each.data.numel())
    return 1 - float(lengths.sum()) / (data.shape[0] * data.shape[1])
