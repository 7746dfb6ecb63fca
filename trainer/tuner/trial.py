"""Trials: short trainings on a recipe's own data, each from the same state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trainer import distributed, signals
from trainer.checkpoint.run_state import Snapshot
from trainer.clipping import Gradients, LayerClip, NormClip, ValueClip, joint
from trainer.evaluation import modes_kept
from trainer.metrics import StepReport
from trainer.optim.guard import NonFiniteError
from trainer.optim.step import Update

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.data import DataFeed

logger = logging.getLogger("trainer")

MIN_STEPS = 10  # Fewest steps of a meaningful trial.
MAX_PROBED = 100  # Batches within which every optimizer must step once.
# A trial ends once its loss exceeds that of the model at rest by this multiple of the latter.
DIVERGED = 3.0
# Measure that a clipper of each kind compares with its limit.
MEASURES = {
    "NormClip": "norm of the gradient",
    "LayerClip": "largest norm of a layer",
    "ValueClip": "largest element",
}


@dataclass
class TrialResult:
    """Steps of one optimizer in a trial."""

    limit: float = math.inf  # Clip limit of the trial.
    losses: list[float] = field(default_factory=list)  # Loss of each taken step.
    # Gradient size of each taken step before clipping, as the clipper measures it.
    norms: list[float] = field(default_factory=list)
    clipped: int = 0  # Number of clipped steps.
    skipped: int = 0  # Number of non-finite steps.
    failed: bool = False  # True if it ended early: too many skipped steps, or divergence.

    @property
    def steps(self) -> int:
        """Number of taken and skipped steps."""
        return len(self.losses) + self.skipped

    @property
    def start_loss(self) -> float:
        """Mean loss of the first tenth of the steps."""
        return mean(self.losses[: max(1, len(self.losses) // 10)])

    @property
    def end_loss(self) -> float:
        """Mean loss of the last quarter of the steps; infinity if the trial failed."""
        if self.failed or not self.losses:
            return math.inf
        return mean(self.losses[-max(1, len(self.losses) // 4) :])

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key, best first: fewest skipped steps, then lowest final loss."""
        return self.skipped, self.end_loss

    @property
    def clipped_share(self) -> float:
        """Share of clipped steps, from 0 to 1."""
        return self.clipped / max(1, len(self.losses))

    def record(self) -> dict[str, Any]:
        """Return the fields by their names in the JSON file."""
        return {
            "limit": self.limit, "start": self.start_loss, "end": self.end_loss,
            "clipped": self.clipped_share, "skipped": self.skipped, "ended_early": self.failed,
            "losses": self.losses, "norms": self.norms,
        }  # fmt: skip


class TrialRunner:
    """Runs trials, each from the first batch of a new run.

    The Brain is in a `Brain.sandbox`, which appends the report of every loss to ``reports``, and
    `Brain.start_training` has brought it to its first batch.
    """

    def __init__(self, brain: Brain, feed: DataFeed, reports: list[StepReport]) -> None:
        self.brain = brain
        self._feed, self._reports = feed, reports
        self._snapshot = Snapshot(brain.progress, brain.stateful)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Context manager around a trial that silences warnings, and restores the state on exit."""
        with replaced(logger, "disabled", True), modes_kept(self.brain.modules):
            try:
                yield
            finally:
                self._snapshot.restore()

    def optimizers(self) -> list[str]:
        """Return the names of the optimizers that the recipe passes to `Brain.optimize`."""
        names: set[str] = set()
        with self.trial():
            for _ in islice(self._train_batches(), MAX_PROBED):
                names |= {report.name for report in self._reports}
                if len(names) == len(self.brain.updates):
                    break
        if not names:
            raise ValueError(
                f"{type(self.brain).__name__}.fit_batch never called self.optimize(loss, name) "
                f"in up to {MAX_PROBED} batches: a search sees only steps through optimize"
            )
        return [name for name in self.brain.updates if name in names]

    def train(
        self,
        name: str,
        steps: int,
        before_batch: Callable[[int], None] = lambda step: None,
        reference: Sequence[float] = (),
    ) -> TrialResult:
        """Train for a number of steps of an optimizer, within a `trial`. Collective.

        ``before_batch`` is called with the number of steps so far. The trial ends early once its
        loss is far above ``reference``, the losses of the same steps without learning.
        """
        result, update = TrialResult(), self.brain.updates[name]

        def measure(update: Update, gradients: Gradients) -> None:
            result.norms.append(gradient_size(update.clip, gradients))

        def count() -> None:
            for report in self._reports:
                if report.name == name:
                    result.skipped += report.outcome == "skipped"
                    if report.stepped and report.loss is not None:
                        result.losses.append(report.loss)
                        result.clipped += report.clipped

        update.before_step.append(measure)
        try:
            for _ in self._train_batches(lambda: before_batch(result.steps)):
                count()
                result.failed = _diverged(result.losses, reference)
                if result.failed or result.steps >= steps:
                    break
        except NonFiniteError:
            count()
            result.failed = True
        finally:
            update.before_step.remove(measure)
        if result.steps < min(steps, MIN_STEPS) and not result.failed:
            raise ValueError(
                f"a search needs at least {MIN_STEPS} steps of {name!r} in an epoch, and this one "
                f"has {result.steps}: lower batch_size or grad_accumulation_factor, or give it "
                "more data"
            )
        # Figures may differ between ranks in the last bit; decisions must not.
        return TrialResult(**distributed.broadcast_json(asdict(result)))

    def _train_batches(self, before_batch: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Train on one batch after another; end the run if any rank was asked to stop."""
        progress = self.brain.progress
        for batch, is_last in self._feed.from_batch(progress.epoch, progress.step):
            before_batch()
            self._reports.clear()
            self.brain.train_batch(batch, is_last)
            (asked,) = distributed.any_rank(signals.requested() is not None)
            if asked:
                signals.raise_agreed()
            yield


def gradient_size(clip: Any, gradients: Gradients) -> float:
    """Return the gradient size that a clipper compares with its limit; see `MEASURES`."""
    if isinstance(clip, ValueClip):
        return max(gradients.extra[0])
    if isinstance(clip, LayerClip):
        return max(clip.p_norms(gradients))
    if isinstance(clip, NormClip):
        return joint(clip.p_norms(gradients), clip.p)
    return gradients.norm


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without values."""
    return fmean(values) if values else math.nan


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _diverged(losses: Sequence[float], reference: Sequence[float]) -> bool:
    """Return True if the last three losses are far above those of the model at rest."""
    last = [loss - rest for loss, rest in zip(losses, reference, strict=False)][-3:]
    size = mean([abs(rest) for rest in reference])
    return len(last) == 3 and mean(last) > DIVERGED * max(size, 1e-12)
