"""What made a step not finite: found out at once, written down, and kept to be run again.

A skipped step leaves a folder ``nonfinite/<step>/`` in the run's folder, with `report.txt` for
people, `report.json` for programs, and `batch.pt`, from which `python -m trainer replay RUN STEP`
trains on that batch again. To find out, the batch is replayed on a double of the Brain (`twin`)
with every operation watched (`probe`), and known `causes` are recognised. Nothing of it changes
the run, and nothing of it can end the run. Each process looks at its own batch, without asking
the others.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer import distributed, seed
from trainer.diagnostics.nonfinite.case import Case, keep
from trainer.diagnostics.nonfinite.causes import causes
from trainer.diagnostics.nonfinite.dice import Dice
from trainer.diagnostics.nonfinite.probe import Finding, Found, NotAlone, Probe
from trainer.diagnostics.nonfinite.twin import Copier, double, untouched
from trainer.metrics import StepReport
from trainer.optim.guard import NonFiniteError
from trainer.optim.precision import Precision

logger = logging.getLogger("trainer")

WINDOW = 16  # batches of an accumulation window that are remembered


class Entry(NamedTuple):
    """A batch, and what is to be put back before it is trained on again."""

    batch: Any
    weight: float
    last: bool
    step: int
    dice: Any  # what `Dice.read` gave, or a saved state


class Off:
    """Forensics that do nothing."""

    def begin_batch(self) -> None:
        """A batch is about to be trained on."""

    def note(self, report: StepReport) -> str:
        """A step was skipped; what to say of where it is kept, if it is."""
        return ""

    def settle(self) -> None:
        """The batch is over: now there is time to look at what was noted."""

    def __enter__(self) -> None:
        """A `fit` begins."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """A `fit` ends, perhaps since patience has run out within a batch."""
        if isinstance(error, NonFiniteError):
            self.settle()


class Forensics(Off):
    """Looks into the first ``nonfinite_reports`` skipped steps of a run."""

    def __init__(self, brain: Any) -> None:
        self.brain = brain
        self.left: int = brain.options.nonfinite_reports
        self._dice = Dice(brain.device)
        self._window: deque[Entry] = deque(maxlen=WINDOW)
        self._case: Case | None = None
        self._names: Counter[int] = Counter()

    def begin_batch(self) -> None:
        """Remember the batch until the next window."""
        brain = self.brain
        if not brain.in_window():
            self._window.clear()
        dice = self._dice.read()
        self._window.append(Entry(brain._batch, brain._weight, brain._last, brain.step, dice))

    def note(self, report: StepReport) -> str:
        """Take down the facts while they are there; the replay comes when the batch is over."""
        if self._case is None and self._window and self._may():
            self.left -= 1
            step = self.brain.optimizer_step + 1
            self._names[step] += 1
            name = str(step) if self._names[step] == 1 else f"{step}-{self._names[step]}"
            self._case = Case.of(self.brain, report, name, self.folder())
        case = self._case
        return "" if case is None or case.folder is None else case.hint()

    def _may(self) -> bool:
        """Whether the run's number of cases leaves room for another; a resumed run counts on."""
        folder = self.folder()
        if self.left > 0 and not self._names and folder is not None and folder.is_dir():
            self.left -= sum(not each.name.startswith(".") for each in folder.iterdir())
        return self.left > 0

    def folder(self) -> Path | None:
        """Where cases are kept; None where nothing is."""
        folder = self.brain.journal.folder
        return None if folder is None else folder / "nonfinite"

    def settle(self) -> None:
        """Find out and write down what was noted; a failure of that is a warning, once."""
        case, self._case = self._case, None
        if case is None:
            return
        try:
            entries = list(self._window)
            saved = [self._dice.state(entry.dice) for entry in entries]
            case.moved = sorted(r.name for r in self.brain._reports if r.stepped)
            number = investigate(self.brain, case, entries, [s["generators"] for s in saved])
            case.exact_generators = saved[number]["exact"]
            alone = distributed.is_main() or case.finding.kind is not None
            if case.folder is not None and alone:
                keep(self.brain, case, entries[number], saved[number]["generators"])
                self.brain.journal.page.refresh()
            for line in case.lines():
                logger.warning("%s", line)
        except Exception as error:  # The run must not end because of what only explains it.
            self.left = 0
            warnings.warn(
                f"a step that was not finite could not be looked into ({type(error).__name__}: "
                f"{error}); later ones will not be",
                stacklevel=2,
            )


def investigate(
    brain: Any, case: Case, entries: list[Entry], generators: list[Mapping[str, Any]]
) -> int:
    """Replay batches until one is not finite, the newest first; the number of that one.

    The finding, its causes and what prevented a replay are left in the case.
    """
    for number in reversed(range(len(entries))):
        entry = entries[number]
        finding, problem = replayed(brain, entry, generators[number])
        case.finding, case.problem = finding, problem
        if finding.kind is None:
            continue
        full = False
        if brain.precision.name == "fp16":
            full = replayed(brain, entry, generators[number], full=True)[0].kind is None
        case.ids = brain.batch_ids(entry.batch)
        case.causes = causes(finding, entry.batch, case.ids, full)
        return number
    newest = entries[-1]
    case.ids = brain.batch_ids(newest.batch)
    case.causes = causes(Finding(), newest.batch, case.ids, full_is_finite=False)
    return len(entries) - 1


def replayed(
    brain: Any, entry: Entry, generators: Mapping[str, Any], full: bool = False
) -> tuple[Finding, str | None]:
    """What `fit_batch` finds with a batch, and the reason where it could not be run to its end."""
    probe, copier = Probe(brain), Copier()
    twin = double(brain, copier, probe.optimize)
    batch = twin._batch = copier(entry.batch)
    twin._weight, twin._last, twin.step = entry.weight, entry.last, entry.step
    if full:
        twin.precision = Precision("fp32", brain.device)
    with untouched(brain, copier), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What they say was said when it was no replay.
        seed.set_rng_state(dict(generators))
        try:
            with probe.watching():
                twin.fit_batch(batch)
        except Found:
            pass
        except NotAlone:
            return probe.finding, "its forward pass communicates between processes"
        except Exception as error:
            return probe.finding, f"{type(error).__name__}: {error}"
    return probe.finding, None


def make_forensics(brain: Any) -> Off:
    """The forensics of a Brain; a search for limits and rates fails on purpose."""
    wanted = brain.options.nonfinite_reports and not brain.options.searching
    return Forensics(brain) if wanted else Off()
