"""Processes that measure speech quality while others work.

    judges = Judges(("pesq", "stoi"), sample_rate=16000, workers=1)
    judges.submit("p232_001", clean, enhanced)  # (T,) each; returns at once
    ...                                         # the network goes on
    scores = judges.collect()                   # {"p232_001": {"pesq": 2.31, "stoi": 0.93}}

PESQ takes about a tenth of the speech's duration, on one core; measured beside the network it
costs nothing on a machine with a core to spare. What cannot be measured is missing in the scores,
is named in the log once, with its id and the reason, and stands in `Judges.failed`; it is not tried
again.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from recipes.common.quality import measure, require
from trainer.processes import serve

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Scores = dict[str, float]
Measured = tuple[Scores, dict[str, str]]

WAITING = 8  # clips a worker
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class _Task(NamedTuple):
    id: str
    work: tuple[Any, ...]  # the arguments of `_measured`
    future: Future[Measured] | None  # None: there is no pool, it is measured when asked for

    def is_done(self) -> bool:
        return self.future is None or self.future.done()


class Judges:
    """A pool of processes that measure clips, one thread each.

    Args:
        measures: names from `recipes.common.quality.MEASURES`.
        sample_rate: of the clips, in Hz.
        workers: processes; 0 measures in this one, when `collect` is called.
        timeout: seconds after which a clip is given up.
        waiting: clips a worker that may wait; who submits faster waits for the oldest.

    Attributes:
        failed: the reason by id for what could not be measured, until `forget` is called.

    Raises ImportError for a package that is missing, with what to install, and ValueError for an
    unknown measure.
    """

    def __init__(
        self,
        measures: Sequence[str] = ("pesq", "stoi", "si_snr"),
        sample_rate: int = 16000,
        workers: int = 1,
        timeout: float = 120.0,
        waiting: int = WAITING,
    ) -> None:
        require(measures, sample_rate)
        self.measures, self.sample_rate = tuple(measures), sample_rate
        self.workers, self.timeout, self.waiting = workers, timeout, waiting
        self.failed: dict[str, str] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: list[_Task] = []
        self._done: dict[str, Scores] = {}
        self._told: set[str] = set()

    def submit(
        self, id: str, clean: Tensor, heard: Tensor, measures: Sequence[str] | None = None
    ) -> None:
        """Have a clip measured.

        Returns at once, unless so many clips wait already that the oldest must be waited for.

        Args:
            id: name of the clip, for `collect`.
            clean: samples (T,) of the clean speech; copied.
            heard: samples (T,) of the enhanced speech; copied.
            measures: names of measures; None for all of these judges'.

        Raises:
            ValueError: the two have different lengths, or are no vectors.
        """
        if clean.shape != heard.shape or clean.dim() != 1:
            raise ValueError(
                f"{id}: clean {tuple(clean.shape)} and enhanced {tuple(heard.shape)} must have the "
                "same shape (T,)"
            )
        arrays = (side.detach().float().cpu().numpy().copy() for side in (clean, heard))
        work = (*arrays, tuple(measures or self.measures), self.sample_rate, self.timeout)
        if self.workers and len(self._waiting) >= self.waiting * self.workers:
            self._finish(self._waiting.pop(0))
        self._waiting.append(_Task(id, work, self._start(work) if self.workers else None))

    def collect(self, wait: bool = True, until: Collection[str] | None = None) -> dict[str, Scores]:
        """Return the scores of the clips that were submitted since the last call.

        Args:
            wait: wait for all of them; False for those that are measured by now.
            until: wait only until none of these ids is left to measure, whatever ``wait`` says.

        Returns:
            Scores by measure, by id, in the order of submission. A clip of which nothing could be
            measured is missing.
        """
        while self._waiting and (
            self._waiting[0].is_done()
            or (wait if until is None else any(task.id in until for task in self._waiting))
        ):
            self._finish(self._waiting.pop(0))
        done, self._done = self._done, {}
        return done

    def forget(self) -> None:
        """Drop what was submitted, measured or not, and the record of failures."""
        for task in self._waiting:
            if task.future is not None:
                task.future.cancel()
        self._waiting, self._done, self.failed = [], {}, {}

    def close(self) -> None:
        """End the processes. The next `submit` starts new ones."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: tuple[Any, ...]) -> Future[Measured]:
        try:
            with _single_threaded():  # Processes are started by the first submissions.
                return self._ready().submit(_measured, *work)
        except BrokenExecutor:
            self._restart()
            with _single_threaded():
                return self._ready().submit(_measured, *work)

    def _ready(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: threads of torch and of loaders may hold locks at that moment.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=serve)
        return self._pool

    def _restart(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _finish(self, task: _Task) -> None:
        try:
            result = _measured(*task.work) if task.future is None else task.future.result()
        except BrokenExecutor:
            result = self._alone(task)
        scores, reasons = result
        if scores:
            self._done[task.id] = scores
        for reason in reasons.values():
            self.failed[task.id] = reason
            if task.id not in self._told:
                logger.warning("%s could not be measured: %s", task.id, reason)
            self._told.add(task.id)

    def _alone(self, task: _Task) -> Measured:
        """Measure a clip by itself, after a process died and took all waiting clips with it."""
        self._restart()
        try:
            return self._start(task.work).result()
        except BrokenExecutor:
            self._restart()
            reason = f"the process that measured it died, or took more than {self.timeout:g} s"
            return {}, dict.fromkeys(self.measures, reason)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Context manager: processes that are started within it use one thread in their libraries."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measured(
    clean: Any, heard: Any, measures: Sequence[str], sample_rate: int, timeout: float
) -> Measured:
    if multiprocessing.parent_process() is None:
        return measure(clean, heard, measures, sample_rate)
    # C code cannot be interrupted: a process that takes too long ends itself, and the pool notices.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
        try:
            return measure(clean, heard, measures, sample_rate)
        finally:
            faulthandler.cancel_dump_traceback_later()
