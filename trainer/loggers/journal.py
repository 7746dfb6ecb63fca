"""What the loop reports, brought to where people and programs look: log, bar, console, page."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer import distributed
from trainer.loggers.run_log import RunLog
from trainer.metrics import Mean, StageReport, StepReport, Tally
from trainer.options import RunOptions
from trainer.report import Page

logger = logging.getLogger("trainer")


def _pace() -> dict[str, float]:
    """How often a bar is drawn: a file keeps every one, and is given two a minute."""
    if sys.stderr.isatty():
        return {}
    return {"mininterval": 30.0, "maxinterval": 60.0}


class Journal:
    """Gathers reports between two lines of the log, and shows progress.

    A line is written every ``log_interval`` optimizer steps. Between lines nothing waits for the
    device.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.shown = options.progressbar
        self.folder = Path(options.output_folder) if options.output_folder else None
        if options.debug or options.replay:
            self.folder = None
        self.log = RunLog()
        self.page = Page(None)
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
            self.page = Page(self.log.folder)
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
        hidden = not (self.shown and distributed.is_main())
        with tqdm(
            total=total,
            initial=done,
            desc=where,
            disable=hidden,
            leave=False,
            dynamic_ncols=True,
            **_pace(),
        ) as self._bar:
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
        text = _describe(record)
        if report.stage == "train":
            text += ", lr " + " ".join(f"{rate:.3g}" for rate in rates)
        logger.info(text)
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


def _describe(record: Mapping[str, Any]) -> str:
    """A stage's line for people: "epoch 2 valid: loss 1.234, wer 3.21, 12 s"."""
    hidden = ("stage", "epoch", "step", "steps", "examples", "seconds", "kind")
    counts = ("skipped", "overflowed")
    stage, epoch = record["stage"], record["epoch"]
    where = stage if epoch is None else f"epoch {epoch} {stage}"
    facts = {
        name: value
        for name, value in record.items()
        if name not in hidden and not (name in counts and not value)
    }
    return f"{where}: {_words(facts)}, {record['seconds']:.0f} s"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
