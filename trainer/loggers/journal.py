"""The records, progress bars and report of the Brain that has no callbacks yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer import distributed
from trainer.loggers.callback import describe
from trainer.loggers.folder import run_folder
from trainer.loggers.progress_bar import make_bar
from trainer.loggers.run_log import RunLog
from trainer.metrics import Mean, StageReport, StepReport, Tally
from trainer.options import RunOptions
from trainer.report import ReportCallback

logger = logging.getLogger("trainer")


class Journal:
    """Gathers reports between two lines of the log, and shows progress.

    A line is written every ``log_interval`` optimizer steps. Between lines nothing waits for the
    device.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.shown = options.progressbar
        self.folder = run_folder(options)
        self.log = RunLog()
        self.page = ReportCallback(options)
        self.tallies: dict[str, Tally] = {}
        self.mean = Mean()
        self.seconds = 0.0  # of the whole run, before this process or stage
        self.examples = 0.0  # since the last line
        self.counts = {"skipped": 0, "overflowed": 0}  # of this stage
        self._started = self._line_started = self._stage_started = time.perf_counter()
        self._bar: Any = None
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts the log is open; may be entered again inside."""
        self._depth += 1
        if self._depth == 1:
            self.log = RunLog(self.folder, self.options.tensorboard, distributed.is_main())
            self._started = self._line_started = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds = self.elapsed()
                self.log.close()
                self.log = RunLog()
                self.page.finish()

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        running = time.perf_counter() - self._started if self._depth else 0.0
        return self.seconds + running

    @contextmanager
    def stage(self, name: str, epoch: int | None, total: int | None, done: int) -> Iterator[None]:
        """A bar for a stage, and its counts from zero unless it goes on in its middle."""
        if not done:
            self.counts = {"skipped": 0, "overflowed": 0}
        self._line_started = self._stage_started = time.perf_counter()
        where = name if epoch is None else f"epoch {epoch} {name}"
        with make_bar(where, total, done, self.shown) as self._bar:
            yield

    def stage_seconds(self) -> float:
        """Since the stage began in this process."""
        return round(time.perf_counter() - self._stage_started, 3)

    def note(self, report: StepReport) -> None:
        """Take in what became of a loss."""
        tally = self.tallies.get(report.name)
        if tally is None:
            tally = self.tallies[report.name] = Tally()
        tally.add(report)
        if report.outcome in self.counts:
            self.counts[report.outcome] += 1

    def tick(self, loss: Any = None) -> None:
        """A batch is over."""
        bar = self._bar
        if not bar.disable and bar.update() and isinstance(loss, float):
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

    def line(self, epoch: int, step: int) -> None:
        """Write the step line of what came since the last one."""
        now = time.perf_counter()
        rate = self.examples / max(now - self._line_started, 1e-9)
        self.log.step(
            {
                "step": step,
                "epoch": epoch,
                "stage": "train",
                "loss": self.mean.reduce().value(),
                "seconds": round(self.elapsed(), 3),
                "examples_per_second": round(rate * distributed.world_size(), 3),
                "optimizers": {name: tally.record() for name, tally in self.tallies.items()},
            }
        )
        self.mean, self.examples, self._line_started = Mean(), 0.0, now

    def finish(self, report: StageReport, rates: list[float]) -> None:
        """Write the line of a stage, for programs and for people."""
        record = report.record()
        self.log.stage(record)
        if not distributed.is_main():
            return
        logger.info("%s", describe(report, rates))
        self.page.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Everything since the last line, so that a resumed run writes the same ones."""
        return {
            "seconds": self.elapsed(),
            "mean": self.mean.state_dict(),
            "counts": dict(self.counts),
            "tallies": {name: tally.state_dict() for name, tally in self.tallies.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.seconds = state["seconds"]
        self._started = time.perf_counter()
        self.mean.load_state_dict(state["mean"])
        self.counts = dict(state["counts"])
        for name, saved in state["tallies"].items():
            self.tallies[name] = Tally()
            self.tallies[name].load_state_dict(saved)
