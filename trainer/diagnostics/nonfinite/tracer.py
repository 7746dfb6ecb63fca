"""Tracer of non-finite steps: reruns the batch of a skipped step, and writes a report.

A skipped step leaves a folder ``nonfinite/<step>/`` in the run folder, with `report.txt` for
people, `report.json` for programs, and `batch.pt`, from which `cortex replay RUN STEP`
reruns the batch. The rerun watches every operation (`probe`) and recognises known causes
(`diagnoses`). It takes place within `Brain.sandbox`, which restores everything that has state;
other side effects of a hook, such as a line in a file, happen once more. A failure in it never ends
the run. Each rank reruns its own batch, without communication.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer import distributed, seed
from trainer.diagnostics.nonfinite.diagnoses import diagnose
from trainer.diagnostics.nonfinite.probe import CollectiveCalled, NonFiniteFound, Probe
from trainer.diagnostics.nonfinite.report import KeptBatch, NonFiniteReport, Rerun
from trainer.loggers.callback import loggers_of
from trainer.loggers.files import run_folder
from trainer.metrics import StepReport
from trainer.optim.guard import NonFiniteError, Tracer

if TYPE_CHECKING:
    from trainer.brain import Brain

logger = logging.getLogger("trainer")

MAX_BATCHES = 16  # Batches of an accumulation window that are remembered.


class NonFiniteTracer(Tracer):
    """Report the first skipped steps of a run.

    Args:
        brain: the Brain that trains.
        limit: number of reports in the run folder, with those of earlier starts.
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

    def begin_window(self) -> None:
        self._window.clear()

    def begin_batch(self, batch: Any, is_last: bool) -> None:
        # The generators of Python and NumPy take longer to read than a small step, and few networks
        # draw from them.
        device = self._brain.device
        generators: dict[str, Any] = {"torch": torch.get_rng_state()}
        if device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(device)
        self._window.append(KeptBatch(batch, is_last, self._brain.progress.step, generators))

    def skipped(self, report: StepReport, reports: Sequence[StepReport]) -> str:
        if self._report is None and self._window and self._has_room():
            self._left -= 1
            step = self._brain.optimizer_step + 1
            self._numbers[step] += 1
            number = self._numbers[step]
            name = str(step) if number == 1 else f"{step}-{number}"
            self._report = NonFiniteReport.of(self._brain, report, name, self._folder)
            self._batch_reports = reports
        noted = self._report
        return "" if noted is None or noted.folder is None else noted.hint()

    def _has_room(self) -> bool:
        """Return True if the run may have another report; those of earlier starts count."""
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
            if report.folder is not None and (distributed.is_main() or report.finding.kind):
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
        if isinstance(error, NonFiniteError):  # It ended the batch.
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
        brain: the Brain, which is as before afterwards.
        report: its ``rerun``, ``causes`` and ``ids`` are set, from the rerun that was not finite,
            or else from that of the newest batch.
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
    """Train on a batch once more, without an optimizer step, until something is not finite.

    Args:
        brain: the Brain, which is as before afterwards.
        kept: the batch, and the random generators at its start.
        precision: precision of the rerun; None for that of the run.
    """
    probe, problem = Probe(brain), None
    # Generators whose states at the start are unknown begin as they are now.
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
        warnings.simplefilter("ignore")  # Training has given them already.
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
