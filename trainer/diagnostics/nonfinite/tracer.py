"""Tracer of non-finite steps: reruns the batch of a skipped step, and writes a report.

A skipped step leaves a folder ``nonfinite/<step>/`` in the run folder, with `report.txt` for
people, `report.json` for programs, and `batch.pt`, from which `cortex replay RUN STEP`
reruns the batch. The rerun watches every operation (`probe`) and recognises known causes
(`diagnoses`). It takes place within `Brain.sandbox`, which restores everything that has state;
other side effects of a hook, such as a line in a file, happen again. A failure never ends the run.
Each rank reruns its own batch, without communication.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer import distributed, seed
from trainer.config.registry import recipe_of
from trainer.diagnostics.nonfinite.diagnoses import diagnose
from trainer.diagnostics.nonfinite.probe import CollectiveCalled, Finding, NonFiniteFound, Probe
from trainer.diagnostics.nonfinite.serialize import describe_batch, serialize_batch
from trainer.loggers.callback import loggers_of
from trainer.loggers.files import as_json, run_folder, temporary
from trainer.metrics import StepReport
from trainer.optim.guard import NonFiniteError, Tracer
from trainer.run_files import HYPERPARAMS, LAUNCH_HEADER
from trainer.texts import first_names
from trainer.untrusted import read_text

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

FORMAT = 1
MAX_BATCHES = 16  # Batches kept of an accumulation window.


class KeptBatch(NamedTuple):
    """A batch, and the initial states of its rerun."""

    batch: Any  # On the device.
    is_last: bool  # True for the last batch of its epoch.
    step: int  # Number of the batch in its epoch.
    generators: dict[str, Any]  # From `seed.rng_state` at its start; some may be missing.


class Rerun(NamedTuple):
    """Result of a rerun."""

    kept: KeptBatch
    generators: dict[str, Any]  # States of all random generators at its start.
    finding: Finding
    problem: str | None  # Reason if it ended early, else None.
    exact: bool  # False if it used a generator whose state in training is unknown.


@dataclass
class NonFiniteReport:
    """Facts about a skipped step. `investigate` sets rerun, causes and ids."""

    step: int  # Number of the skipped optimizer step.
    name: str  # Name of the report's folder within ``nonfinite/``.
    what: str  # "loss" or "gradients".
    facts: dict[str, Any]  # Place, settings and norms.
    gradients: dict[str, float]  # Norms by parameter.
    folder: Path | None  # Folder to write.
    causes: list[str] = field(default_factory=list)  # Most certain first.
    ids: list[str] = field(default_factory=list)  # Ids of the examples.
    moved: list[str] = field(default_factory=list)  # Optimizers that stepped in the same batch.
    rerun: Rerun = field(init=False)

    @classmethod
    def of(
        cls, brain: Brain, step_report: StepReport, name: str, folder: Path | None
    ) -> NonFiniteReport:
        """Make a report of the step that a Brain has just skipped.

        Args:
            brain: the Brain, within the batch.
            step_report: the outcome.
            name: name of the report's folder, in which ranks other than 0 have a folder each.
            folder: the run's ``nonfinite/``, or None.
        """
        update = brain.updates[step_report.name]
        names = update.named()
        gradients = {names[p]: norm for p, norm in zip(*update.measured, strict=True)}
        tally = brain.stateful()["metrics"].part.tallies.get(update.name)
        facts = {
            "epoch": brain.progress.epoch,
            "batch": brain.progress.step,
            "optimizer": update.name,
            "rank": distributed.rank(),
            "processes": distributed.world_size(),
            "precision": brain.options.precision,
            "lr": step_report.lr,
            "scale": step_report.scale,
            "limit": step_report.limit,
            "last_norm": update.last_norm,
            "recent_norms": [] if tally is None else tally.norms[-20:],
            "batches_in_window": update.size,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "torch": torch.__version__,
        }
        if folder is not None:
            name = f"{name}/rank{distributed.rank()}" if distributed.rank() else name
            folder = folder / name
        what = "loss" if step_report.loss is None else "gradients"
        return cls(brain.progress.optimizer_step + 1, name, what, facts, gradients, folder)

    def command(self) -> str:
        """Return the command that replays the batch."""
        assert self.folder is not None
        run, program = self.folder.parents[1 + self.name.count("/")], Path(sys.argv[0])
        command = f"cortex replay {shlex.quote(str(run))} {self.name}"
        if not (run / HYPERPARAMS).is_file() or program.suffix != ".py":
            return command
        if read_text(run, HYPERPARAMS).startswith(LAUNCH_HEADER):
            return f"trainer.launch with the hyperparameter replay={str(self.folder)!r}"
        # A run folder never chooses a program: a user's own has to be named.
        own = recipe_of(program.resolve()) is None
        return f"{command} --script {shlex.quote(sys.argv[0])}" if own else command

    def lines(self) -> list[str]:
        """Return the lines of the log that follow the one about the skipped step."""
        cause = f"; {self.causes[0]}" if self.causes else ""
        head = "first not finite" if self.rerun.finding.kind else "not finite in training"
        lines = [f"{head}: {self.found()}{cause}"]
        if self.folder is not None and self.folder.exists():
            lines.append(f"kept in {self.folder}; to replay it: {self.command()}")
        return lines

    def found(self) -> str:
        """Describe the first non-finite value."""
        finding, first = self.rerun.finding, self.rerun.finding.first
        if finding.kind is None:
            subject = f"the {self.what} of {self.facts['optimizer']!r}"
            if problem := self.rerun.problem:
                return f"{subject} (the batch could not be replayed to the end: {problem})"
            moved = f", after a step of {' and '.join(self.moved)}" if self.moved else ""
            return f"{subject}, which {self._was} finite when the batch was replayed{moved}"
        subject = f"the loss of {finding.optimizer!r}"
        if finding.kind == "gradient":
            subject = f"the gradient of {first_names(finding.parameters)} ({finding.optimizer!r})"
        if first is None:
            return subject
        module = f" in {first.module}" if first.module else ""
        line = f" at {first.line}" if first.line else ""
        return f"{subject}, by {first.operation}{module}{line}"

    @property
    def _was(self) -> str:
        return "was" if self.what == "loss" else "were"

    def record(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        return {
            "format": FORMAT, "step": self.step, "not_finite": self.what, "first": self.found(),
            "causes": self.causes, **self.facts, "ids": self.ids,
            "batch_fields": describe_batch(self.rerun.kept.batch),
            "gradient_norms": {
                name: norm if math.isfinite(norm) else str(norm)
                for name, norm in self.gradients.items()
            },
            "stepped_in_the_same_batch": self.moved, "replay": asdict(self.rerun.finding),
            "replay_problem": self.rerun.problem, "generators_known": self.rerun.exact,
        }  # fmt: skip

    def text(self, record: Mapping[str, Any]) -> str:
        """Return the content of `report.txt` from that of `report.json`."""
        bad = [name for name, norm in self.gradients.items() if not math.isfinite(norm)]
        rate = "none" if record["lr"] is None else f"{record['lr']:.4g}"
        lines = [
            f"Step {self.step} (epoch {record['epoch']}, batch {record['batch']}) was skipped: "
            f"the {self.what} of {record['optimizer']!r} {self._was} not finite.",
            f"First not finite: {record['first']}",
            f"First module with such an output: {self.rerun.finding.module or 'none'}",
            *(f"Cause: {cause}" for cause in self.causes or ["none of those that are known"]),
            f"Gradients that were not finite: {', '.join(bad) or 'none'}",
            f"Precision {record['precision']}, lr {rate}, scale {record['scale']:g}, "
            f"limit {record['limit']:g}, last finite norm {record['last_norm']}",
            f"Norms before: {', '.join(f'{norm:.4g}' for norm in record['recent_norms']) or '-'}",
            f"Batch: {', '.join(self.ids) or 'without ids'}",
            *(f"  {name}: {facts}" for name, facts in record["batch_fields"].items()),
        ]
        if not self.rerun.exact:
            lines.append(
                "The batch drew from Python's or NumPy's random generator, whose "
                "state at its start is unknown: a replay may draw other numbers."
            )
        return "\n".join([*lines, f"To replay it: {self.command()}", ""])

    def write(self, brain: Brain) -> None:
        """Write the folder with `report.json`, `report.txt` and `batch.pt`.

        Raises:
            OSError: if it cannot be written.
        """
        assert self.folder is not None
        kept, record = self.rerun.kept, self.record()
        new = temporary(self.folder)
        shutil.rmtree(new, ignore_errors=True)  # Left by a killed process.
        try:
            new.mkdir(parents=True)
            torch.save({
                "format": FORMAT, "batch": serialize_batch(kept.batch),
                "generators": self.rerun.generators, "last": kept.is_last, "step": kept.step,
                "epoch": brain.progress.epoch, "optimizer_step": self.step - 1,
                "fits": brain.progress.fits, "what": self.what,
                "optimizer": self.facts["optimizer"],
            }, new / "batch.pt")  # fmt: skip
            (new / "report.txt").write_text(self.text(record), "utf-8", "backslashreplace")
            (new / "report.json").write_text(json.dumps(as_json(record), indent=1), "utf-8")
            # A resumed run may reach this step again, and other ranks may have folders in it.
            self.folder.mkdir(exist_ok=True)
            for name in ("batch.pt", "report.txt", "report.json"):
                os.replace(new / name, self.folder / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


class NonFiniteTracer(Tracer):
    """Report the first skipped steps of a run.

    Args:
        brain: the Brain that trains.
        limit: maximum number of reports in the run folder, including earlier starts.
    """

    def __init__(self, brain: Brain, limit: int) -> None:
        self._brain, self._left = brain, limit
        folder = run_folder(brain.options)
        self._folder = None if folder is None else folder / "nonfinite"
        self._window: deque[KeptBatch] = deque(maxlen=MAX_BATCHES)
        self._report: NonFiniteReport | None = None
        self._batch_reports: Sequence[StepReport] = ()
        self._numbers: Counter[int] = Counter()  # Reports by step.
        self._outer: list[tuple[deque[KeptBatch], NonFiniteReport | None]] = []

    def begin_batch(self, batch: Any, is_last: bool, opens_window: bool) -> None:
        if opens_window:
            self._window.clear()
        # The generators of Python and NumPy take longer to read than a small step, and few networks
        # use them.
        device = self._brain.device
        generators: dict[str, Any] = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(device)
        self._window.append(KeptBatch(batch, is_last, self._brain.progress.step, generators))

    def skipped(self, report: StepReport, reports: Sequence[StepReport]) -> str:
        if self._report is None and self._window and self._has_room():
            self._left -= 1
            step = self._brain.progress.optimizer_step + 1
            self._numbers[step] += 1
            number = self._numbers[step]
            name = str(step) if number == 1 else f"{step}-{number}"
            self._report = NonFiniteReport.of(self._brain, report, name, self._folder)
            self._batch_reports = reports
        noted = self._report
        if noted is None or noted.folder is None:
            return ""
        return f"The report is in {noted.folder}; to replay the batch: {noted.command()}"

    def _has_room(self) -> bool:
        """Return True if the run may have another report; reports of earlier starts count."""
        folder = self._folder
        if self._left > 0 and not self._numbers and folder is not None and folder.is_dir():
            self._left -= sum(not each.name.startswith(".") for each in folder.iterdir())
        return self._left > 0

    def end_batch(self) -> None:
        report, self._report = self._report, None
        if report is None:
            return
        try:
            report.moved = sorted({each.name for each in self._batch_reports if each.stepped})
            investigate(self._brain, report, list(self._window))
            if report.folder is not None and (distributed.is_main() or report.rerun.finding.kind):
                report.write(self._brain)
                loggers_of(self._brain).artifact(f"nonfinite/{report.name}", report.folder)
            for line in report.lines():
                logger.warning("%s", line)
        except Exception as error:  # A failed investigation must not end the run.
            self._left = 0
            warnings.warn(
                "the report of a step that was not finite could not be made "
                f"({type(error).__name__}: {error}); later steps get no report",
                stacklevel=2,
            )

    def __enter__(self) -> Tracer:
        self._outer.append((self._window, self._report))
        self._window, self._report = deque(maxlen=MAX_BATCHES), None
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, NonFiniteError):  # The error ended the batch.
            self.end_batch()
        self._window, self._report = self._outer.pop()


def make_nonfinite_tracer(brain: Brain) -> NonFiniteTracer | None:
    """Return the tracer of a Brain; None if it is off, in a search and in a replay."""
    options = brain.options
    if not options.nonfinite_reports or options.searching or options.replay:
        return None
    return NonFiniteTracer(brain, options.nonfinite_reports)


def investigate(brain: Brain, report: NonFiniteReport, window: Sequence[KeptBatch]) -> None:
    """Rerun the batches of a window, the newest first, until one is not finite.

    Args:
        brain: the Brain; its state is restored.
        report: gets ``rerun``, ``causes`` and ``ids`` from the non-finite rerun, else from that of
            the newest batch.
        window: batches of the accumulation window.
    """
    reruns = (rerun(brain, kept) for kept in reversed(window))
    newest = next(reruns)
    bad = newest if newest.finding.kind else next((r for r in reruns if r.finding.kind), None)
    report.rerun = found = bad or newest
    finite_in_fp32 = (
        bad is not None
        and brain.options.precision == "fp16"
        and rerun(brain, found.kept, "fp32").finding.kind is None
    )
    report.ids = brain.batch_ids(found.kept.batch)
    report.causes = diagnose(found.finding, found.kept.batch, report.ids, finite_in_fp32)


def rerun(brain: Brain, kept: KeptBatch, precision: str | None = None) -> Rerun:
    """Train on a batch again, without an optimizer step, until a value is not finite.

    Args:
        brain: the Brain; its state is restored.
        kept: the batch, and the random generators at its start.
        precision: precision of the rerun; None for that of the run.
    """
    probe, problem = Probe(brain), None
    # Generators without a kept state start from their present one.
    generators = {**seed.rng_state(), **kept.generators}
    if isinstance(kept.generators.get("cuda"), torch.Tensor):
        every = torch.cuda.get_rng_state_all()
        index = brain.device.index
        every[torch.cuda.current_device() if index is None else index] = kept.generators["cuda"]
        generators["cuda"] = every
    try:
        batch = copy.deepcopy(kept.batch)  # `fit_batch` may change it.
    except Exception:  # A batch that cannot be copied is rerun as it is.
        batch = kept.batch
    with (
        brain.sandbox(optimize=probe.optimize, precision=precision),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Training has shown them already.
        brain.progress.step = kept.step - 1
        seed.set_rng_state(generators)
        try:
            with probe.watching():
                brain.train_batch(batch, kept.is_last)
        except NonFiniteFound:
            pass
        except CollectiveCalled:
            problem = "its forward pass communicates between processes"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        drawn = seed.rng_state()
    exact = all(
        name in kept.generators or _plain(generators.get(name)) == _plain(drawn.get(name))
        for name in ("python", "numpy")
    )
    return Rerun(kept, generators, probe.finding, problem, exact)


def _plain(state: Sequence[Any] | None) -> list[Any]:
    return [x.tolist() if isinstance(x, torch.Tensor) else x for x in state or ()]
