"""Callback that drives the loggers of a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import distributed, json_files
from trainer.callbacks import Callback
from trainer.checkpoint.storage import MANIFEST
from trainer.loggers.description import best_checkpoint, configuration, name_of
from trainer.loggers.files import METRICS, JsonlLogger, run_folder
from trainer.loggers.marks import Places, StepMarks
from trainer.loggers.protocol import Logger, RunInfo, series
from trainer.metrics import RESERVED, SHOWN, StageReport
from trainer.options import RunOptions
from trainer.samples import Aligned, Audio, Histogram, Image, Matrix, Samples

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

# Rows of samples whose cells are given to every logger one by one; services keep them for ever.
MAX_LOGGED_ROWS = 4
FOLDER = "loggers"  # Folder in the run folder with the progress of its loggers.
LoggerFactory = Callable[[Path], Logger]


class LoggerCallback(Callback):
    """Pass what a run reports to its loggers, on rank 0.

    Loggers are opened when `fit` or `evaluate` begins, or something is recorded, and closed when
    the outermost of these calls ends. They write into the run folder; without one, under
    ``--debug``, in a replay and in a search for settings nothing is recorded.

    A logger that raises is named in one warning and not used again; the run goes on. Other
    callbacks record through this one: it has the methods of a `Logger`, and calls them on each.
    A callback that records within its `state_dict` must stand before this one, whose state is the
    number of records.

    Args:
        options: run options, of which ``output_folder``, ``debug``, ``replay``, ``run_name`` and
            the searches count.
        factories: classes or functions that make the loggers of every run, given the run folder.
        chosen: likewise, of the loggers that the user has chosen. Their progress is noted in the
            run folder, so that a resumed run gives them each step once. When a call ends they are
            given the hyperparameters, the report and the best checkpoint.
        hparams: hyperparameters by name, for the loggers that record them.
    """

    _complete: ClassVar[set[Path]] = set()  # Run folders of calls of this process that ended well.

    def __init__(
        self,
        options: RunOptions,
        factories: Iterable[LoggerFactory],
        chosen: Iterable[LoggerFactory] = (),
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if options.searching else run_folder(options)
        self._options, self._hparams = options, hparams or {}
        self._prints = options.progressbar
        self._chosen = list(chosen)
        if self._chosen and not options.output_folder and distributed.is_main():
            logger.warning("logger has no effect: there is no run folder; give an output_folder")
        self._factories = [*factories, *self._chosen]
        self._loggers: dict[LoggerFactory, Logger] = {}
        self._marks: dict[LoggerFactory, StepMarks] = {}
        self._slots: dict[LoggerFactory, str] = {}  # Names of the files of chosen loggers.
        self._skipped: dict[LoggerFactory, Places] = {}  # Records that they have already.
        self._places = Places()  # Records of this run, for chosen loggers.
        self._saved_places = Places()  # Those at the checkpoint.
        self._sent: dict[str, Any] = {}  # Path and time of the files that chosen loggers have.
        self._depth = 0  # Number of nested calls: a hook of a `fit` may call `fit` or `evaluate`.
        # Exception that a program was handling already when it called `fit`: no error of this run.
        self._handled: BaseException | None = None
        self._saved_lines: int | None = None
        self._has_recorded = False

    # ------------------------------------------------------------------------------------- events

    def on_fit_start(self, brain: Brain) -> None:
        """Open the loggers.

        Raises:
            ValueError: if a logger cannot work as it was asked to, such as for a missing package.
        """
        if not self._depth:
            self._handled = sys.exception()
        self._depth += 1
        self._opened()
        progress = brain.progress
        begins = progress.fits == 1 and not progress.epoch and not brain.progress.optimizer_step
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
        """Close the loggers, also those of a call that failed while it began."""
        self.close()

    def on_resume(self, brain: Brain) -> None:
        """Remove what was recorded after the checkpoint, since it will come again."""
        self._places = self._saved_places
        self._resume(brain.progress.optimizer_step, self._saved_lines)

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        """Record the averages of the last steps."""
        self.scalars("step", record, record["step"])

    def on_stage_end(self, brain: Brain, report: StageReport) -> None:
        """Record a finished stage, and log it in one line.

        In a program that has not set up logging the line is printed, if the progress bar is wanted.

        Raises:
            ValueError: if a metric has a name that every record uses.
        """
        self.scalars("stage", report.record(), report.step)
        if distributed.is_main():
            rates = [update.lr for update in brain.updates.values()]
            line = describe(report, rates)
            if logger.isEnabledFor(logging.INFO):
                logger.info("%s", line)
            elif self._prints:
                tqdm.write(line, file=sys.stderr)

    def on_samples(self, brain: Brain, samples: Samples) -> None:
        """Record what a recipe shows."""
        if self._opened():
            self.samples(samples)

    # ---------------------------------------------------------------------------------- recording

    @property
    def wants_histograms(self) -> bool:
        """True if a logger records histograms, so that values are worth sampling."""
        return any(type(each).histogram is not Logger.histogram for each in self._opened().values())

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
        """Record rows of cells, and each sound, picture and text of the first rows by itself."""
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
        for factory in list(self._opened()):
            self._call(factory, "artifact", name, path)

    def close(self) -> None:
        """Close the loggers; what is recorded later opens them again."""
        for factory in list(self._loggers):
            self._call(factory, "close")
        for marks in self._marks.values():
            marks.close()
        self._loggers.clear()
        self._marks.clear()
        self._depth = 0

    def _send_files(self, brain: Brain) -> None:
        """Give the chosen loggers the files of the run that they do not have yet."""
        using = [factory for factory in self._chosen if factory in self._loggers]
        if not using or self.folder is None:
            return
        for factory in [each for each in self._loggers if each not in using]:
            self._call(factory, "close")  # The report is written.
        best = best_checkpoint(brain.checkpointer)
        names = ("hyperparams.yaml", "report.html")
        files = {name: self.folder / name for name in names}
        files |= {"checkpoint": best} if best else {}
        for name, path in files.items():
            if not path.exists() or self._sent.get(name) == (path, path.stat().st_mtime_ns):
                continue
            self._sent[name] = (path, path.stat().st_mtime_ns)
            for factory in using:
                if factory in self._loggers:
                    self._call(factory, "artifact", name, path)

    # ----------------------------------------------------------------------------------- resuming

    def _follows_a_killed_start(self, brain: Brain) -> bool:
        """Return True if the records are of a start that was killed before its first checkpoint.

        Records of another Brain of the same folder, which has a checkpoint there or ended well, are
        to be kept.
        """
        folder = self.folder
        if folder is None or brain.checkpointer is None or self._has_recorded:
            return False
        return folder.absolute() not in self._complete and not any(folder.rglob(MANIFEST))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of records in `metrics.jsonl`, None where there is no such file.

        With chosen loggers it has the numbers of records of the last step, by series.
        """
        files = [each for each in self._opened().values() if isinstance(each, JsonlLogger)]
        places = {"places": self._places.newest()} if self._chosen else {}
        return {"jsonl_lines": files[0].lines if files else None, **places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; nothing is removed before `on_resume`."""
        self._saved_lines = state["jsonl_lines"]
        self._saved_places = Places(state.get("places"))

    def _resume(self, step: int, lines: int | None) -> None:
        """Remove the records of later steps from every logger, or skip them when they come again.

        Args:
            step: optimizer steps at the checkpoint.
            lines: number of records in `metrics.jsonl` at the checkpoint; None where unknown.
        """
        for factory, each in list(self._opened().items()):
            if isinstance(each, JsonlLogger):
                self._call(factory, "resume", step, lines)
                continue
            try:
                found, marks = each.recorded(), self._marks.get(factory)
                each.resume(step)
                if marks is not None:
                    if type(each).resume is not Logger.resume:
                        marks.cut(step)
                    held = Places(marks.places.last if found is None else found)
                    self._skipped[factory] = held
                    if marks.taken and self.folder is not None:
                        catch_up(each, held, marks, self.folder)
            except Exception as error:
                self._give_up(factory, type(each).__name__, error)

    # ------------------------------------------------------------------------------------ loggers

    def _opened(self) -> dict[LoggerFactory, Logger]:
        """Return the loggers in use, opening those that are not open yet."""
        if self.folder is None or not distributed.is_main():
            return {}
        for factory in list(self._factories):
            if factory not in self._loggers:
                name = getattr(factory, "__name__", repr(factory))
                try:
                    made = factory(self.folder)
                except ValueError:  # A wrong setting ends the run before its first batch.
                    raise
                except Exception as error:
                    self._give_up(factory, name, error)
                    continue
                try:
                    if factory in self._chosen:
                        self._open(factory, made, self.folder)
                    self._loggers[factory] = made
                except Exception as error:
                    self._give_up(factory, type(made).__name__, error)
        return self._loggers

    def _open(self, factory: LoggerFactory, made: Logger, folder: Path) -> None:
        """Open a chosen logger, with its own files in the run folder."""
        kind = type(made).__name__
        before = [each for each in self._slots.values() if each.partition("-")[0] == kind]
        slot = f"{kind}-{len(before) + 1}" if before else kind
        slot = self._slots.setdefault(factory, slot)
        marks = StepMarks(folder / FOLDER / f"{slot}.jsonl")
        self._marks[factory] = marks
        if type(made).open is not Logger.open:
            name = self._options.run_name or name_of(folder)
            config = configuration(folder, self._hparams, self._options)
            made.open(RunInfo(folder, name, config, folder / FOLDER / slot, marks.taken))

    def _record(self, name: str, step: int, method: str, *arguments: Any) -> None:
        """Call a method of every logger that has it and lacks this record."""
        self._has_recorded = True
        place = self._places.add(name, step) if self._chosen else (step, 1)
        for factory, each in list(self._opened().items()):
            if factory in self._skipped and self._skipped[factory].has(name, place):
                continue
            if getattr(type(each), method) is getattr(Logger, method):
                continue
            self._call(factory, method, *arguments, mark=(name, step))

    def _call(
        self, factory: LoggerFactory, method: str, *arguments: Any,
        mark: tuple[str, int] | None = None,
    ) -> None:  # fmt: skip
        each = self._loggers[factory]
        try:
            getattr(each, method)(*arguments)
            if mark is not None and factory in self._marks:
                self._marks[factory].note(*mark)
        except Exception as error:
            self._give_up(factory, type(each).__name__, error)

    def _give_up(self, factory: LoggerFactory, name: str, error: Exception) -> None:
        """Stop using a logger, and warn."""
        self._factories.remove(factory)
        self._loggers.pop(factory, None)
        if factory in self._marks:
            self._marks.pop(factory).close()
        text = shorten(str(error), 300, placeholder=" …")  # Database errors quote whole commands.
        logger.warning(
            "%s failed and is not used any more; the run goes on without it (%s: %s)",
            name, type(error).__name__, text,
        )  # fmt: skip


def _utf8(text: str) -> str:
    """Return a text with escapes for what UTF-8 cannot hold, such as file names in Latin-1."""
    return text.encode(errors="backslashreplace").decode()


def loggers_of(brain: Brain) -> LoggerCallback | Logger:
    """Return the recorder of a Brain, which has the methods of a `Logger`.

        loggers_of(brain).figure("attention", png, brain.progress.optimizer_step)

    A recipe may call it on rank 0 or on all ranks: only rank 0 records. Without a run folder
    nothing is recorded.

    Args:
        brain: the Brain.
    """
    found = (each for each in brain.callbacks if isinstance(each, LoggerCallback))
    return next(found, Logger())


def catch_up(each: Logger, held: Places, marks: StepMarks, folder: Path) -> None:
    """Give a logger the numbers of `metrics.jsonl` that it lacks, and note them.

    A backend may have lost them when the process was killed, or failed for a while.

    Args:
        each: the logger.
        held: last record of each series that the backend holds.
        marks: progress of the logger, which is updated.
        folder: run folder.
    """
    found = Places()
    with (folder / METRICS).open("rb") as file:
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
        learning_rates: current rate of each optimizer, which the line of a training stage ends
            with; None for an optimizer that has none.
    """
    facts = {
        name: value
        for name, value in report.record().items()
        if name not in RESERVED or (name in SHOWN and value)
    }
    if not report.examples and facts["loss"] != facts["loss"]:  # NaN: no batch gave a loss.
        del facts["loss"]
    where = report.stage if report.epoch is None else f"epoch {report.epoch} {report.stage}"
    text = f"{where}: {_join(facts)}, {report.seconds:.0f} s"
    if report.stage == "train":
        rates = ("none" if rate is None else f"{rate:.3g}" for rate in learning_rates)
        text += f", lr {' '.join(rates)}"
    return text


def _join(value: Any) -> str:
    """Return nested values with their names as text, floats with four digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_join(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
