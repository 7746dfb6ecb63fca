"""Report of a skipped step: its facts, what a rerun found, and the folder that keeps both."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer import distributed
from trainer.config.registry import recipe_of
from trainer.config.run_folder import LAUNCH_HEADER
from trainer.diagnostics.layer_monitor import first_names
from trainer.diagnostics.nonfinite.probe import Finding
from trainer.diagnostics.nonfinite.serialize import describe_batch, serialize_batch
from trainer.loggers.files import as_json, temporary
from trainer.metrics import StepReport
from trainer.untrusted import read_text

if TYPE_CHECKING:
    from trainer.brain import Brain

FORMAT = 1


class KeptBatch(NamedTuple):
    """A batch, and the states that its rerun starts from."""

    batch: Any  # On the device.
    is_last: bool  # In its epoch.
    step: int  # Its number in the epoch.
    generators: dict[str, Any]  # As of `seed.rng_state` at its start; some may be unknown.


class Rerun(NamedTuple):
    """Result of a rerun."""

    kept: KeptBatch
    generators: dict[str, Any]  # States of all random generators at its start.
    finding: Finding
    problem: str | None  # Why it ended before its last operation; None if it did not.
    exact: bool  # False if it drew from a generator whose state in training is unknown.


@dataclass
class NonFiniteReport:
    """Everything known about a skipped step. Rerun, causes and ids are set by `investigate`."""

    step: int  # Number of the optimizer step that was skipped.
    name: str  # Of the report's folder within ``nonfinite/``.
    what: str  # "loss" or "gradients".
    facts: dict[str, Any]  # Place, settings and norms.
    gradients: dict[str, float]  # Norms by parameter.
    folder: Path | None  # To be written into.
    causes: list[str] = field(default_factory=list)  # The most certain first.
    ids: list[str] = field(default_factory=list)  # Of the examples.
    moved: list[str] = field(default_factory=list)  # Optimizers that stepped in the same batch.
    rerun: Rerun = field(init=False)

    @classmethod
    def of(
        cls, brain: Brain, step_report: StepReport, name: str, folder: Path | None
    ) -> NonFiniteReport:
        """Note what a Brain knows of the step that it has just skipped.

        Args:
            brain: the Brain, within the batch.
            step_report: the outcome.
            name: name of the report's folder; other ranks than 0 have a folder of their own in it.
            folder: the run's ``nonfinite/``, or None.
        """
        update = brain.updates[step_report.name]
        names = {id(p): name for name, p in brain.modules.named_parameters()}
        gradients = {
            names.get(id(p), f"{update.name}.{number}"): norm
            for number, (p, norm) in enumerate(zip(*update.measured, strict=True))
        }
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

    @property
    def finding(self) -> Finding:
        """The result of the rerun."""
        return self.rerun.finding

    def command(self) -> str:
        """Return the command that replays the batch."""
        assert self.folder is not None
        run, program = self.folder.parents[1 + self.name.count("/")], Path(sys.argv[0])
        command = f"cortex replay {shlex.quote(str(run))} {self.name}"
        if not (run / "hyperparams.yaml").is_file() or program.suffix != ".py":
            return command
        if read_text(run, "hyperparams.yaml").startswith(LAUNCH_HEADER):
            return f"trainer.launch with the hyperparameter replay={str(self.folder)!r}"
        # A run folder chooses no program, so that a program of one's own has to be named.
        own = recipe_of(program.resolve()) is None
        return f"{command} --script {shlex.quote(sys.argv[0])}" if own else command

    def hint(self) -> str:
        """Return where to look, for an error message."""
        return f"The report is in {self.folder}; to replay the batch: {self.command()}"

    def lines(self) -> list[str]:
        """Return the lines of the log that follow the one about the skip itself."""
        cause = f"; {self.causes[0]}" if self.causes else ""
        head = "first not finite" if self.finding.kind else "not finite in training"
        lines = [f"{head}: {self.found()}{cause}"]
        if self.folder is not None and self.folder.exists():
            lines.append(f"kept in {self.folder}; to replay it: {self.command()}")
        return lines

    def found(self) -> str:
        """Return in words what was not finite first."""
        finding, first = self.finding, self.finding.first
        if finding.kind is None:
            subject = f"the {self.what} of {self.facts['optimizer']!r}"
            if problem := self.rerun.problem:
                return f"{subject} (the batch could not be replayed to the end: {problem})"
            moved = f", after a step of {' and '.join(self.moved)}" if self.moved else ""
            return f"{subject}, which {self._was} finite when the batch was replayed{moved}"
        subject = f"the loss of {finding.optimizer!r}"
        if finding.kind == "gradient":
            subject = f"the gradient of {first_names(finding.parameters)} ({finding.optimizer!r})"
            if finding.backward is not None and (first is None or first.phase == "forward"):
                line = finding.backward_line
                return f"{subject}, by {finding.backward}" + (f" of {line}" if line else "")
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
            "stepped_in_the_same_batch": self.moved, "replay": asdict(self.finding),
            "replay_problem": self.rerun.problem, "generators_known": self.rerun.exact,
        }  # fmt: skip

    def text(self, record: Mapping[str, Any]) -> str:
        """Return the content of `report.txt`, for people, from that of `report.json`."""
        bad = [name for name, norm in self.gradients.items() if not math.isfinite(norm)]
        rate = "none" if record["lr"] is None else f"{record['lr']:.4g}"
        lines = [
            f"Step {self.step} (epoch {record['epoch']}, batch {record['batch']}) was skipped: "
            f"the {self.what} of {record['optimizer']!r} {self._was} not finite.",
            f"First not finite: {record['first']}",
            f"First module with such an output: {self.finding.module or 'none'}",
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
        shutil.rmtree(new, ignore_errors=True)  # Of a killed process.
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
            # A resumed run may be at this step again, or another rank have its folder in there.
            self.folder.mkdir(exist_ok=True)
            for name in ("batch.pt", "report.txt", "report.json"):
                os.replace(new / name, self.folder / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
