"""A skipped step as a case: its facts, what a replay found, and the folder that keeps both."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.diagnostics.nonfinite.keepsake import described, packed
from trainer.diagnostics.nonfinite.probe import Finding
from trainer.loggers.run_log import as_json
from trainer.metrics import StepReport

FORMAT = 1
NAMED = 3


@dataclass
class Case:
    """What is known of a skipped step. `what` is "loss" or "gradients"; `step` the one skipped."""

    step: int
    name: str
    what: str
    facts: dict[str, Any]
    gradients: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    finding: Finding = field(default_factory=Finding)
    problem: str | None = None
    causes: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    exact_generators: bool = True

    @classmethod
    def of(cls, brain: Any, report: StepReport, name: str, folder: Path | None) -> Case:
        """Take down what a Brain knows of the step that was just skipped."""
        update = brain.updates[report.name]
        names: dict[int, str] = {}
        for each, p in brain.modules.named_parameters():
            names.setdefault(id(p), each)
        gradients = {
            names.get(id(p), f"{report.name}.{number}"): norm
            for number, (p, norm) in enumerate(zip(*update.seen, strict=True))
        }
        tally = brain.journal.tallies.get(report.name)
        facts = {
            "epoch": brain.epoch,
            "batch": brain.step,
            "optimizer": report.name,
            "rank": distributed.rank(),
            "processes": distributed.world_size(),
            "precision": brain.precision.name,
            "lr": report.lr,
            "scale": report.scale,
            "limit": report.limit,
            "last_norm": update.last_norm,
            "recent_norms": [] if tally is None else tally.recent(),
            "batches_in_window": update.size,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "torch": torch.__version__,
        }
        if folder is not None:
            rank = distributed.rank()
            folder = folder / name / f"rank{rank}" if rank else folder / name
            name = f"{name}/rank{rank}" if rank else name
        what = "loss" if report.loss is None else "gradients"
        return cls(brain.optimizer_step + 1, name, what, facts, gradients, folder)

    def command(self) -> str:
        """How to run the batch again."""
        assert self.folder is not None
        run = self.folder.parents[1 + self.name.count("/")]
        return f"python -m trainer replay {shlex.quote(str(run))} {self.name}"

    def hint(self) -> str:
        """Where to look, for an error message."""
        return f"What made it so is in {self.folder}; to run that batch again: {self.command()}"

    def lines(self) -> list[str]:
        """What the log says of it, beside the line of the skip itself."""
        why = f"; {self.causes[0]}" if self.causes else ""
        lines = [f"first not finite: {self.found()}{why}"]
        if self.folder is not None and self.folder.exists():
            lines.append(f"kept in {self.folder}; again: {self.command()}")
        return lines

    def found(self) -> str:
        """What was not finite first, in words."""
        finding = self.finding
        if finding.kind is None:
            told = f"the {self.what} of {self.facts['optimizer']!r}"
            if self.problem is not None:
                return f"{told}; the batch could not be replayed to the end ({self.problem})"
            moved = f", after a step of {' and '.join(self.moved)}" if self.moved else ""
            return f"{told}; a replay of the batch{moved} was finite"
        first = finding.first
        if finding.kind == "loss":
            told = f"the loss of {finding.optimizer!r}"
        else:
            bad = finding.parameters
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            told = f"the gradient of {', '.join(bad[:NAMED])}{more} ({finding.optimizer!r})"
            if finding.backward is not None and (first is None or first.phase == "forward"):
                line = finding.backward_line
                return f"{told}, by {finding.backward}" + (f" of {line}" if line else "")
        if first is None:
            return told
        module = f" in {first.module}" if first.module else ""
        return f"{told}, by {first.operation}{module}" + (f" at {first.line}" if first.line else "")

    def record(self, batch: Any) -> dict[str, Any]:
        """`report.json`."""
        return {
            "format": FORMAT, "step": self.step, "not_finite": self.what, "first": self.found(),
            "causes": self.causes, **self.facts, "ids": self.ids, "batch_fields": described(batch),
            "gradient_norms": {
                name: norm if math.isfinite(norm) else str(norm)
                for name, norm in self.gradients.items()
            },
            "stepped_in_the_same_batch": self.moved, "replay": self.finding.record(),
            "replay_problem": self.problem, "generators_known": self.exact_generators,
        }  # fmt: skip

    def text(self, record: Mapping[str, Any]) -> str:
        """`report.txt`: the same for people."""
        bad = [name for name, norm in self.gradients.items() if not math.isfinite(norm)]
        lines = [
            f"Step {self.step} (epoch {record['epoch']}, batch {record['batch']}) was skipped: "
            f"the {self.what} of {record['optimizer']!r} not finite. Nothing has moved.",
            f"First not finite: {self.found()}",
            f"First module with such an output: {self.finding.module or 'none'}",
            *(f"Cause: {cause}" for cause in self.causes or ["none of those that are known"]),
            f"Gradients that were not finite: {', '.join(bad) or 'none'}",
            f"Precision {record['precision']}, lr {record['lr']:.4g}, scale {record['scale']:g}, "
            f"limit {record['limit']:g}, last finite norm {record['last_norm']}",
            f"Norms before: {', '.join(f'{norm:.4g}' for norm in record['recent_norms']) or '-'}",
            f"Batch: {', '.join(self.ids) or 'without ids'}",
            *(f"  {name}: {facts}" for name, facts in record["batch_fields"].items()),
        ]
        if not self.exact_generators:
            lines.append(
                "Python's or NumPy's generator was in use and unwatched: a replay may draw others."
            )
        if self.folder is not None:
            lines.append(f"Again: {self.command()}")
        return "\n".join(lines) + "\n"


def keep(brain: Any, case: Case, entry: Any, generators: Mapping[str, Any]) -> None:
    """Write the case's folder, all or nothing. OSError where it does not fit."""
    assert case.folder is not None
    target = case.folder
    record = case.record(entry.batch)
    state = {
        "format": FORMAT, "batch": packed(entry.batch), "generators": dict(generators),
        "weight": entry.weight, "last": entry.last, "step": entry.step, "epoch": brain.epoch,
        "optimizer_step": case.step - 1, "fits": brain.keeper.fits, "what": case.what,
        "optimizer": case.facts["optimizer"],
    }  # fmt: skip
    data = io.BytesIO()
    torch.save(state, data)
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        (new / "report.json").write_text(json.dumps(as_json(record), indent=1), "utf-8")
        (new / "report.txt").write_text(case.text(record), "utf-8", "backslashreplace")
        (new / "batch.pt").write_bytes(data.getbuffer())
        try:
            os.replace(new, target)
        except OSError:
            if not target.is_dir():
                raise
            # A resumed run has come here again, or another process has its own part in there.
            for file in list(new.iterdir()):
                os.replace(file, target / file.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
