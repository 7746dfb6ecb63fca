"""Callback that drives the loggers of a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trainer import distributed, json_files
from trainer.callbacks import Callback
from trainer.loggers.choice import LoggerFactory, best_checkpoint, configuration, name_of
from trainer.loggers.files import JsonlLogger, run_folder
from trainer.loggers.marks import Places, StepMarks
from trainer.loggers.progress_bar import announce
from trainer.loggers.protocol import Logger, RunInfo, series
from trainer.metrics import RESERVED, SHOWN, StageReport
from trainer.options import RunOptions
from trainer.run_files import HYPERPARAMS, manifests
from trainer.samples import Aligned, Audio, Histogram, Image, Matrix, Samples

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

# Rows of samples whose cells every logger gets one by one; services keep them for ever.
MAX_LOGGED_ROWS = 4
FOLDER = "loggers"  # Folder in the run folder for the progress of loggers.


@dataclass(eq=False)
class _Slot:
    """A logger of a run, open or not."""

    make: LoggerFactory
    chosen: bool = False
    name: str = ""  # of the files of a chosen logger
    logger: Logger | None = None  # None while it is closed.
    marks: StepMarks | None = None  # of a chosen logger that is open
    held: Places = field(default_factory=Places)  # Records that it already has when a run resumes.

    def end(self) -> None:
        """Drop a logger that is closed or has failed."""
        if self.marks is not None:
            self.marks.close()
        self.logger = self.marks = None


class LoggerCallback(Callback):
    """Pass the records of a run to its loggers, on rank 0.

    Loggers are opened by the first `fit`, `evaluate` or record, and closed when the outermost call
    ends. They write into the run folder; without one, under ``--debug``, in a replay and in a
    search for settings nothing is recorded.

    A logger that raises is named in one warning and not used again; the run goes on. Other
    callbacks record through this one, which has the methods of a `Logger` and calls them on each. A
    callback that records within its `state_dict` must come before this one, whose state is the
    number of records.

    Args:
        options: run options; uses ``output_folder``, ``debug``, ``replay``, ``run_name`` and the
            searches.
        factories: classes or functions that make the loggers of every run from the run folder.
        chosen: the same for the loggers that the user has chosen. Their progress is saved in the
            run folder, so that a resumed run gives them each step once. When a call ends they get
            the hyperparameters, the report and the best checkpoint.
        hparams: hyperparameters by name, for the loggers that record them.
    """

    _complete: ClassVar[set[Path]] = set()  # Run folders of calls in this process that succeeded.

    def __init__(
        self,
        options: RunOptions,
        factories: Iterable[LoggerFactory],
        chosen: Iterable[LoggerFactory] = (),
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if options.searching else run_folder(options)
        self._options, self._hparams = options, hparams or {}
        self._slots = [_Slot(each) for each in factories]
        self._slots += (own := [_Slot(each, chosen=True) for each in chosen])
        self._has_chosen = bool(own)
        if own and not options.output_folder and distributed.is_main():
            logger.warning("logger has no effect: there is no run folder; give an output_folder")
        self._kinds: list[str] = []  # Classes of the opened chosen loggers.
        self._places = Places()  # Records of this run.
        self._saved: Mapping[str, Any] = {}  # State at the checkpoint.
        self._sent: dict[str, Any] = {}  # Paths and times of files sent to chosen loggers.
        self._depth = 0  # Number of nested calls: a hook of a `fit` may call `fit` or `evaluate`.
        # Exception that was being handled when `fit` was called: no error of this run.
        self._handled: BaseException | None = None

    # ------------------------------------------------------------------------------------- events

    def on_fit_start(self, brain: Brain) -> None:
        """Open the loggers.

        Raises:
            ValueError: if a logger cannot be set up, for example without its package.
        """
        if not self._depth:
            self._handled = sys.exception()
        self._depth += 1
        self._opened()
        progress = brain.progress
        begins = progress.fits == 1 and not progress.epoch and not progress.optimizer_step
        if begins and (distributed.restarts() or self._follows_a_killed_start(brain)):
            self._resume(0, 0)

    def on_fit_end(self, brain: Brain) -> None:
        """Close the loggers when the outermost call ends."""
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            if sys.exception() is self._handled:
                self._send_files(brain)
                if self.folder is not None:
                    self._complete.add(self.folder.absolute())
            self.close()

    on_evaluate_start = on_fit_start
    on_evaluate_end = on_fit_end

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        """Close the loggers, also after a failure at the start of a call."""
        self.close()

    def on_resume(self, brain: Brain) -> None:
        """Remove the records after the checkpoint, since they will come again."""
        self._places = Places(self._saved.get("places"))
        self._resume(brain.progress.optimizer_step, self._saved.get("jsonl_lines"))

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        """Record the averages of the last steps."""
        self.scalars("step", record, record["step"])

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Record a finished stage, and log it in one line.

        In a program without logging the line is printed, if the progress bar is shown.

        Raises:
            ValueError: if a metric has a reserved name.
        """
        self.scalars("stage", report.record(), report.step)
        if distributed.is_main():
            rates = [update.lr for update in brain.updates.values()]
            announce(describe(report, rates), self._options.progressbar)

    def on_samples(self, brain: Brain, samples: Samples) -> None:
        """Record samples that a recipe shows."""
        if self._opened():
            self.samples(samples)

    # ---------------------------------------------------------------------------------- recording

    @property
    def wants_histograms(self) -> bool:
        """True if a logger records histograms."""
        return any(_overrides(slot.logger, "histogram") for slot in self._opened())

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Record numbers; see `Logger.scalars`."""
        self._record(series(kind, values), step, "scalars", kind, values, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record the distribution of values (N,) on the host."""
        self._record(f"histograms/{name}", step, "histogram", name, values, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Record a picture, as the bytes of a PNG file."""
        self._record(f"figures/{name}", step, "figure", _utf8(name), png, step)

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Record sound: samples (T,) in [-1, 1], rate in Hz."""
        self._record(f"audio/{name}", step, "audio", _utf8(name), samples, rate, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text."""
        self._record(f"text/{name}", step, "text", _utf8(name), _utf8(text), step)

    def samples(self, samples: Samples) -> None:
        """Record rows of cells, and separately each sound, picture and text of the first rows."""
        self._record(f"samples/{samples.title}", samples.step, "samples", samples)
        for number, row in enumerate(samples.rows[:MAX_LOGGED_ROWS]):
            for column, cell in row.items():
                name = f"{samples.title}/{row.get('id', number)}/{column}"
                if isinstance(cell, Audio):
                    self.audio(name, cell.signal(), int(cell.rate), samples.step)
                elif isinstance(cell, (Image, Matrix)):
                    image = cell.image() if isinstance(cell, Matrix) else cell
                    self.figure(name, image.png(), samples.step)
                elif isinstance(cell, Histogram):
                    for group, values in cell.groups.items():
                        self.histogram(f"{name}/{group}", torch.as_tensor(values), samples.step)
                elif isinstance(cell, Aligned) or (isinstance(cell, str) and column != "id"):
                    self.text(name, str(cell), samples.step)

    def artifact(self, name: str, path: Path) -> None:
        """Record a file of the run, such as the report or the best checkpoint."""
        for slot in self._opened():
            self._call(slot, "artifact", name, path)

    def close(self) -> None:
        """Close the loggers; a later record opens them again."""
        for slot in list(self._slots):
            self._close(slot)
        self._depth = 0

    def _send_files(self, brain: Brain) -> None:
        """Send new files of the run to the chosen loggers."""
        using = [slot for slot in self._slots if slot.chosen and slot.logger is not None]
        if not using or self.folder is None:
            return
        for slot in [each for each in self._slots if not each.chosen]:
            self._close(slot)  # Writes the report.
        files = {name: self.folder / name for name in (HYPERPARAMS, "report.html")}
        best = best_checkpoint(brain.checkpointer)
        files |= {"checkpoint": best} if best else {}
        for name, path in files.items():
            if not path.exists() or self._sent.get(name) == (path, path.stat().st_mtime_ns):
                continue
            self._sent[name] = (path, path.stat().st_mtime_ns)
            for slot in using:
                if slot in self._slots:
                    self._call(slot, "artifact", name, path)

    # ----------------------------------------------------------------------------------- resuming

    def _follows_a_killed_start(self, brain: Brain) -> bool:
        """Return True if the records come from a start that was killed before its first checkpoint.

        Records of another Brain with this folder, which has a checkpoint or succeeded, are kept.
        """
        folder = self.folder
        if folder is None or brain.checkpointer is None or self._places.last:
            return False
        return folder.absolute() not in self._complete and not manifests(folder)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of records in `metrics.jsonl`, or None without that file.

        With chosen loggers, also the numbers of records at the last step, by series.
        """
        files = (slot.logger for slot in self._opened())
        lines = next((each.lines for each in files if isinstance(each, JsonlLogger)), None)
        places = {"places": self._places.newest()} if self._has_chosen else {}
        return {"jsonl_lines": lines, **places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; nothing is removed before `on_resume`."""
        self._saved = state

    def _resume(self, step: int, lines: int | None) -> None:
        """Remove the records of later steps from every logger, or skip them when they come again.

        ``lines`` is the number of lines of `metrics.jsonl` at the checkpoint; None if unknown.
        """
        numbers: Path | None = None
        for slot in self._opened():
            with self._guarded(slot):
                each, marks = slot.logger, slot.marks
                if isinstance(each, JsonlLogger):
                    each.resume(step, lines)
                    numbers = each.path
                elif each is not None and marks is None and _overrides(each, "resume"):
                    each.resume(step)
                elif each is not None and marks is not None:
                    found = each.recorded()
                    each.resume(step)
                    if _overrides(each, "resume"):
                        marks.cut(step)
                    slot.held = Places(marks.places.last if found is None else found)
                    if marks.taken and numbers is not None:
                        _catch_up(each, slot.held, marks, numbers)

    # ------------------------------------------------------------------------------------ loggers

    def _opened(self) -> list[_Slot]:
        """Open the loggers that are not open yet, and return all in use."""
        if self.folder is None or not distributed.is_main():
            return []
        for slot in list(self._slots):
            if slot.logger is None:
                with self._guarded(slot):
                    slot.logger = slot.make(self.folder)
                    if slot.chosen:
                        self._open(slot, slot.logger, self.folder)
        return list(self._slots)

    def _open(self, slot: _Slot, made: Logger, folder: Path) -> None:
        """Open a chosen logger with its own files in the run folder."""
        if not slot.name:
            kind = type(made).__name__
            self._kinds.append(kind)
            number = self._kinds.count(kind)
            slot.name = f"{kind}-{number}" if number > 1 else kind
        slot.marks = StepMarks(folder / FOLDER / f"{slot.name}.jsonl")
        if _overrides(made, "open"):
            name = self._options.run_name or name_of(folder)
            config = configuration(folder, self._hparams, self._options)
            memory = folder / FOLDER / slot.name
            made.open(RunInfo(folder, name, config, memory, slot.marks.taken))

    def _close(self, slot: _Slot) -> None:
        if slot.logger is not None:
            self._call(slot, "close")
        slot.end()

    def _record(self, name: str, step: int, method: str, *arguments: Any) -> None:
        """Call a method of every logger that overrides it and lacks this record."""
        place = self._places.add(name, step)
        for slot in self._opened():
            if _overrides(slot.logger, method) and not slot.held.has(name, place):
                self._call(slot, method, *arguments, mark=(name, step))

    def _call(
        self, slot: _Slot, method: str, *arguments: Any, mark: tuple[str, int] | None = None
    ) -> None:
        with self._guarded(slot):
            getattr(slot.logger, method)(*arguments)
            if mark is not None and slot.marks is not None:
                slot.marks.note(*mark)

    @contextmanager
    def _guarded(self, slot: _Slot) -> Iterator[None]:
        """Context manager that stops using a logger that fails, and warns.

        Raises:
            ValueError: when the logger is made: a wrong setting ends the run at its start.
        """
        try:
            yield
        except Exception as error:
            made = slot.make if slot.logger is None else type(slot.logger)
            if slot.logger is None and isinstance(error, ValueError):
                raise
            self._slots.remove(slot)
            slot.end()
            text = shorten(str(error), 300, placeholder=" …")  # Database errors quote commands.
            logger.warning(
                "%s failed and is not used any more; the run goes on without it (%s: %s)",
                getattr(made, "__name__", repr(made)), type(error).__name__, text,
            )  # fmt: skip


def _overrides(each: Logger | None, method: str) -> bool:
    """Return True if a logger overrides a method."""
    return getattr(type(each), method) is not getattr(Logger, method)


def _utf8(text: str) -> str:
    """Return a text with escapes for characters that UTF-8 lacks, as in Latin-1 file names."""
    return text.encode(errors="backslashreplace").decode()


def loggers_of(brain: Brain) -> LoggerCallback | Logger:
    """Return the recorder of a Brain, which has the methods of a `Logger`.

        loggers_of(brain).figure("attention", png, brain.progress.optimizer_step)

    Recipes may call it on rank 0 or on all ranks; only rank 0 records. Without a run folder
    nothing is recorded.

    Args:
        brain: the Brain.
    """
    found = (each for each in brain.callbacks if isinstance(each, LoggerCallback))
    return next(found, Logger())


def _catch_up(each: Logger, held: Places, marks: StepMarks, numbers: Path) -> None:
    """Send a logger the ``numbers`` of `metrics.jsonl` that it lacks, and record its progress.

    A backend may have lost them when the process was killed, or failed for a while.
    """
    found = Places()
    with numbers.open("rb") as file:
        for line in json_files.lines(file):
            record = json_files.parse(line)
            kind, step = record.pop("kind", None), record.get("step")
            if not (isinstance(kind, str) and isinstance(step, int)):
                continue
            name = series(kind, record)
            if not held.has(name, found.add(name, step)):
                each.scalars(kind, record, step)
                marks.note(name, step)


def describe(report: StageReport, learning_rates: Sequence[float | None] = ()) -> str:
    """Return the log line of a stage, such as "epoch 2 valid: loss 1.234, wer 3.21, 12 s".

    Args:
        report: result of the stage.
        learning_rates: current rate of each optimizer, for the end of a training line; None for an
            optimizer that has none.
    """
    facts = {
        name: value
        for name, value in report.record().items()
        if name not in RESERVED or (name in SHOWN and value)
    }
    if not report.examples and facts["loss"] != facts["loss"]:  # NaN without a loss.
        del facts["loss"]
    where = report.stage if report.epoch is None else f"epoch {report.epoch} {report.stage}"
    text = f"{where}: {_join(facts)}, {report.seconds:.0f} s"
    if report.stage == "train":
        rates = ("none" if rate is None else f"{rate:.3g}" for rate in learning_rates)
        text += f", lr {' '.join(rates)}"
    return text


def _join(value: Any) -> str:
    """Format nested values with their names, floats with four digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_join(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
