"""Short trainings on a recipe's own data, each from one and the same state of its Brain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any

from trainer import distributed, signals, state
from trainer.data.feed import Feed
from trainer.diagnostics.nonfinite import Off as NoForensics
from trainer.hooks import Stage
from trainer.optim.guard import NonFiniteError
from trainer.resumption import PLACE
from trainer.tuner.course import Course, mean

logger = logging.getLogger("trainer")

FEWEST = 10  # steps: a trial of fewer says nothing
PLACES = (*PLACE, "optimizer_step", "_by_hand")


class Bench:
    """A Brain brought to its first batch, from where trials begin again and again.

    The state is that of a new run: a checkpoint is not gone on from. While it is entered nothing is
    saved or logged, whatever hooks ask for. Hooks up to the start of
    the first stage run once; after each trial and at the end weights, optimizers, schedules,
    scalers, clippers, generators, stateful objects and the position in the run are bit for bit
    what they were.
    """

    def __init__(self, brain: Any, feed: Feed, epochs: Iterable[int]) -> None:
        self.brain, self.feed, self._epochs = brain, feed, epochs
        self._stack = ExitStack()
        self._kept: dict[str, Any] = {}
        self._places: dict[str, Any] = {}

    def __enter__(self) -> Bench:
        brain = self.brain
        with ExitStack() as stack:
            stack.enter_context(signals.at_safe_points())
            stack.enter_context(_saving_nothing(brain))
            brain._start_fit(self._epochs, has_valid=False)
            if next(iter(brain.keeper.epochs(self._epochs)), None) is None:
                raise ValueError("there is nothing to search in: the epoch_counter has no epoch")
            brain.modules.train()
            brain.on_stage_start(Stage.TRAIN, brain.epoch)
            brain.keeper.begin_training()
            self._keep()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        self._stack.__exit__(kind, error, trace)

    def names(self) -> list[str]:
        """The optimizers that step through `optimize`, found by a trial of a few batches."""
        found = self._run(1, {})
        if not found:
            raise ValueError(
                f"{type(self.brain).__name__}.fit_batch never called self.optimize(loss, name): "
                "there is no step that a search could see"
            )
        return [name for name in self.brain.updates if name in found]

    def run(
        self,
        name: str,
        steps: int,
        before: Callable[[int], None],
        still: Sequence[float] | None = None,
    ) -> Course:
        """Train for so many steps of an optimizer; ``before`` gets the number of each.

        With the losses that the same batches had where nothing was learned, it ends early once the
        loss has run away from them.
        """
        course = Course()
        self._run(steps, {name: course}, before, still)
        if course.steps < min(steps, FEWEST) and not course.over:
            raise ValueError(
                f"a search needs at least {FEWEST} steps of {name!r} in an epoch, and this one has "
                f"{course.steps}: lower batch_size or grad_accumulation_factor, or give it "
                "more data"
            )
        # What ranks compute may differ in the last bit; what they decide may not.
        return Course(**distributed.broadcast_json(asdict(course)))

    def _run(
        self,
        steps: int,
        courses: dict[str, Course],
        before: Callable[[int], None] = lambda step: None,
        still: Sequence[float] | None = None,
    ) -> dict[str, Course]:
        """Batches until each course (or, if none was given, any optimizer) has its steps."""
        brain, watched = self.brain, list(courses)
        with self.restored(), _quiet(), brain.journal.stage("trial", None, steps, 0):
            self.feed.begin(brain.epoch)
            batches = self.feed.from_batch(brain.epoch, brain.step)
            number = -1
            with closing(batches):  # type: ignore[type-var]
                for batch, last in batches:
                    done = min((each.steps for each in courses.values()), default=0)
                    if done > number:  # Not within an accumulation window.
                        number = done
                        before(number)
                    over = self._batch(batch, last, courses, watched)
                    leave_if_asked()
                    done = min((each.steps for each in courses.values()), default=0)
                    if still is not None and _ran_away(courses[watched[0]], still):
                        over = courses[watched[0]].over = True
                    if over or done >= steps:
                        break
        return courses

    def _batch(
        self, batch: Any, last: bool, courses: dict[str, Course], watched: list[str]
    ) -> bool:
        """One batch as in a training; whether it was one too many that is not finite."""
        brain, over = self.brain, False
        brain._begin_batch(batch, last)
        try:
            brain._end_batch(brain.fit_batch(batch))
        except NonFiniteError:
            over = True
        for report in brain._reports:
            if report.outcome != "accumulated" and report.name in (watched or brain.updates):
                courses.setdefault(report.name, Course()).add(report)
        for course in courses.values():
            course.over |= over
        return over

    # ------------------------------------------------------------------- what trials differ in

    @contextmanager
    def clipping(self, name: str, clip: Any) -> Iterator[None]:
        """While it lasts an optimizer has another clipper."""
        update = self.brain.updates[name]
        own, update.clip = update.clip, clip
        try:
            yield
        finally:
            update.clip = own

    @contextmanager
    def constant_rates(self) -> Iterator[None]:
        """While it lasts no schedule changes a learning rate."""
        updates = self.brain.updates.values()
        schedules = [update.schedule for update in updates]
        for update in updates:
            update.schedule = None
        try:
            yield
        finally:
            for update, schedule in zip(updates, schedules, strict=True):
                update.schedule = schedule

    # ---------------------------------------------------------------------- the state they share

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block after which the Brain is where its first batch comes next."""
        try:
            yield
        finally:
            self._restore()

    def _keep(self) -> None:
        brain = self.brain
        self._places = {name: getattr(brain, name) for name in PLACES}
        self._kept = state.copied(
            {
                "weights": state.weights(brain),
                "buffers": dict(brain.modules.named_buffers()),
                "objects": {n: part.state_dict() for n, part in state.objects(brain).items()},
                "trainable": {n: p.requires_grad for n, p in brain.modules.named_parameters()},
                "patience": brain.patience.state_dict(),
                "own": state.own(brain),
            }
        )

    def _restore(self) -> None:
        """Everything as kept; copied once more, since optimizers take what they are given."""
        brain, kept = self.brain, state.copied(self._kept)
        for update in brain.updates.values():
            update.drop()
        state.load_weights(brain, kept["weights"])
        for name, buffer in brain.modules.named_buffers():
            buffer.copy_(kept["buffers"][name])
        state.load_objects(brain, kept["objects"])
        state.load_trainable(brain, kept["trainable"])
        brain.patience.load_state_dict(kept["patience"])
        brain.journal.tallies.clear()
        brain.journal.examples = 0.0
        brain._suspects.clear()
        vars(brain).update(self._places)
        state.load_own(brain, kept["own"])
        brain.statistics.begin()


def leave_if_asked() -> None:
    """Leave the search where any rank was asked to stop; there is nothing to save."""
    signal = signals.requested()
    (asked,) = distributed.any_rank(signal is not None)
    if asked:
        raise signals.Interrupted(signal or signals.DEFAULT)


def _ran_away(course: Course, still: Sequence[float]) -> bool:
    """Whether the last losses are worse than those of an untrained model by a multiple."""
    recent = range(max(0, len(course.losses) - 3), len(course.losses))
    if len(recent) < 3:
        return False
    worse = mean([course.losses[i] - still[i] for i in recent])
    return worse > 3 * max(mean([abs(loss) for loss in still]), 1e-12)


@contextmanager
def _quiet() -> Iterator[None]:
    """Trials fail; a line for each of their skipped steps would hide what is said of them."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _saving_nothing(brain: Any) -> Iterator[None]:
    """While it lasts nothing is saved, whoever asks, and no checkpoint is gone on from.

    Nor is a step that is not finite looked into: that some trials fail is what they are for.
    """
    keeper, checkpointer = brain.keeper, brain.checkpointer
    forensics, brain.forensics = brain.forensics, NoForensics()
    before = {name: getattr(keeper, name) for name in ("phase", "stopped", "trained", "fits")}
    enabled = checkpointer is not None and checkpointer.enabled
    keeper._depth += 1
    if enabled:
        checkpointer.enabled = False
    try:
        yield
    finally:
        keeper._depth -= 1
        vars(keeper).update(before)
        brain.forensics = forensics
        if enabled:
            checkpointer.enabled = True
