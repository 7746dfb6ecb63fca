"""Loaders whose order depends only on (seed, epoch), not on the processes that load batches.

`make_loader` wraps torch's `DataLoader`: an epoch can start at any batch, ranks get disjoint and
equally many batches, bad items are named, skipped and counted, and workers survive the signals that
ask the main process to stop.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import connection, queues
from multiprocessing.process import BaseProcess
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    IterDataPipe,
    default_convert,
    get_worker_info,
)

from trainer import signals
from trainer.checks import as_number
from trainer.data.batch import collate, collate_plain, count_examples
from trainer.data.batch_sampler import (
    DistributedBatchSampler,
    ShuffledSampler,
    asks_for,
    components,
    generators,
    set_epoch,
)
from trainer.data.items import (
    BadItemPolicy,
    BatchDataset,
    DealtItems,
    LoadedBatch,
    ReportingCollate,
    begin_loading,
    loading,
)
from trainer.processes import serve
from trainer.seed import DrawsUndone, derive, fork_rng, rng_state, set_rng_state
from trainer.tree import plain_number

logger = logging.getLogger("trainer.data")

HUNG = "the loader's workers gave no batch"
ADVICE = "fewer num_workers need less memory, and with 0 the error shows where it happens"
POLL_SECONDS = 0.5  # Interval at which workers are checked.
CLOSING_SECONDS = 1.0  # Time for workers to end after SIGTERM, before they are killed.
TIMEOUT = 300.0  # Seconds after which a wait for a batch is an error.
UNSENT, NO_SHARED_MEMORY = 70, 74  # Exit codes of workers that cannot send a batch.
FULL = (
    "the shared memory through which loader workers pass their batches is full (/dev/shm): use "
    "fewer workers (num_workers), in Docker --ipc=host or a larger --shm-size, or call "
    "torch.multiprocessing.set_sharing_strategy('file_system')"
)
_END = object()  # Follows the last batch of an iterator.


def make_loader(
    dataset: Any,
    *,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    **options: Any,
) -> Loader | Stream:
    """Make a loader of this rank's batches from a dataset.

    A dataset raises `BadItem` for an item that cannot be used. In training a batch without a good
    item gets the next good item of the epoch instead; in evaluation it is left out. A run ends when
    more than a share of an epoch's files is bad, counted over all ranks: `Brain` judges at each
    logging interval and at the end of a stage; a loader used without a Brain, in one process,
    judges at once.

    The items of an `IterableDataset` are dealt among ranks and workers; see `DealtItems`.

    Args:
        dataset: a map-style dataset of any class, or an `IterableDataset`. Items that are mappings
            become a `Batch`, unless ``collate_fn`` is given; those of an `IterableDataset` are
            joined as by torch's `default_collate`. An item that is None is a bad item. Random
            numbers from `item_seed` and `item_generator` depend only on (seed, epoch, item).
            Workers seed the global generators for each batch; without workers items use those of
            the process. A method ``set_epoch(epoch)`` is called in every worker; ``name_of(index)
            -> str`` names items in error messages; ``count_files(indices) -> int`` counts the
            different files of items; without it each item counts as a file.
            ``__getitems__(indices)`` is called if there is one, as by `DataLoader`; a batch with a
            bad item is loaded again, item by item.
        train: True for training: shuffled unless a sampler is given, with another order and other
            random numbers in each epoch, and equally many batches on every rank. False for
            evaluation: every item exactly once, in order, and every epoch alike.
        seed: random seed of the run.
        rank: rank of this process.
        world_size: number of processes.
        on_bad: "skip" to log bad items and leave them out, "raise" to end the run at the first.
        max_bad: share of bad files, between 0 and 1, above which the run ends.
        **options: options of `DataLoader`. ``batch_size`` is that of one process. Samplers of any
            kind get the epoch and random numbers of their own. ``timeout``, in seconds and 300 by
            default, ends a run whose workers give no batch for that long; without workers it only
            warns (0: never).

    Returns:
        An iterable of batches with ``set_epoch(epoch)`` and ``skip(batches)``.

    Raises:
        ValueError: the options are unknown or exclude each other, the dataset is empty, or the
            sampler is set up for another number of ranks.
    """
    _check_options(options)
    if options.get("num_workers", 0) == 0:  # Options of workers have no meaning without workers.
        for name in ("persistent_workers", "prefetch_factor", "worker_init_fn"):
            options.pop(name, None)
    options["pin_memory"] = options.get("pin_memory", False) and torch.accelerator.is_available()
    timeout, policy = options.pop("timeout", TIMEOUT), BadItemPolicy(on_bad, max_bad)
    run = {"seed": seed, "train": train, "world_size": world_size}
    if isinstance(dataset, IterableDataset):
        if not isinstance(dataset, IterDataPipe):  # torch splits pipes itself.
            dataset = DealtItems(dataset, train, rank, world_size, options.get("batch_size", 1))
        if options.get("batch_size", 1) is not None and options.get("collate_fn") is None:
            options["collate_fn"] = collate_plain
        return Stream(DataLoader(dataset, **options), policy, timeout=timeout, **run)
    if not len(dataset):
        raise ValueError(f"the dataset {type(dataset).__name__} has no items")
    sampler = _pop_sampler(dataset, options, rank=rank, **run)
    single = sampler.batch_size is None and not sampler.batched
    join = options.pop("collate_fn", None) or (default_convert if single else _collate)
    with _full_memory_explained():
        source = DataLoader(
            BatchDataset(dataset, join, seed, train, single, options.get("num_workers", 0)),
            sampler=sampler,
            batch_size=None,
            collate_fn=_identity,
            # Without a generator of its own, DataLoader draws from the global one.
            generator=torch.Generator().manual_seed(derive(seed, "workers")),
            **options,
        )
        return Loader(source, policy, timeout=timeout, **run)


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for unknown loader options, and for values of another type.

    Whole numbers of NumPy become Python's.
    """
    known = set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset"}
    if unknown := set(options) - known:
        raise ValueError(f"unknown loader options {sorted(unknown)}; known are {sorted(known)}")
    for name, least in (("batch_size", 1), ("num_workers", 0), ("prefetch_factor", 1)):
        value = options.get(name)
        if value is None and (name != "num_workers" or name not in options):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            none = "" if name == "num_workers" else ", or None"
            raise ValueError(f"{name} must be a whole number, {least} or more{none}; got {value!r}")
        options[name] = int(value)
    for name in ("shuffle", "drop_last", "pin_memory", "persistent_workers"):
        value = plain_number(options.get(name))
        if not (value is None or isinstance(value, int) and value in (0, 1)):  # A text is true.
            raise ValueError(f"{name} must be true or false; got {value!r}")
    for name in ("collate_fn", "worker_init_fn"):
        if not (options.get(name) is None or callable(options[name])):
            raise ValueError(f"{name} must be a function; got {options[name]!r}")
    for name in ("sampler", "batch_sampler"):
        value = options.get(name)
        listed = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
        if value is not None and (not listed or isinstance(value, (str, bytes))):
            raise ValueError(f"{name} must be an iterable, such as a torch Sampler; got {value!r}")
    value = options.get("timeout")
    seconds = as_number(value)
    if value is not None and (seconds is None or not seconds >= 0):
        raise ValueError(
            f"timeout must be a number of seconds, 0 or more (0: never); got {value!r}"
        )


def _pop_sampler(dataset: Any, options: dict[str, Any], **run: Any) -> DistributedBatchSampler:
    """Make a batch sampler from the options about order, and remove these from ``options``."""
    options.pop("generator", None)  # The order comes from (seed, epoch).
    shuffle, sampler = options.pop("shuffle", None), options.pop("sampler", None)
    batch_sampler = options.pop("batch_sampler", None)
    size, drop_last = options.pop("batch_size", 1), options.pop("drop_last", False)
    if sampler is not None and (shuffle or batch_sampler is not None):
        raise ValueError("a sampler excludes shuffle and batch_sampler: it sets the order itself")
    if batch_sampler is not None:
        if shuffle or drop_last or size not in (1, None):
            raise ValueError("a batch_sampler excludes batch_size, shuffle and drop_last")
        return DistributedBatchSampler(batch_sampler, None, batched=True, **run)
    if sampler is None:
        shuffled = run["train"] if shuffle is None else shuffle
        sampler = ShuffledSampler(len(dataset), run["seed"]) if shuffled else range(len(dataset))
    return DistributedBatchSampler(sampler, size, drop_last=drop_last, **run)


def _collate(items: list[Any]) -> Any:
    return collate(items) if isinstance(items[0], Mapping) else collate_plain(items)


def _identity(loaded: Any) -> Any:
    return loaded


class BatchSource:
    """Batches of a source by epoch; counts bad items and detects hangs.

    Attributes:
        policy: counts the bad items.
        alone: True if it judges bad items itself, since no Brain does so for all ranks.
        dealt: True if each rank has batches of its own, from its own workers.
        equal: True if all ranks get equally many batches in training.
        stateful: object whose state resumes an epoch, or None.
        sources: objects whose states are positions in an epoch.
    """

    def __init__(
        self,
        source: Any,
        policy: BadItemPolicy,
        *,
        seed: int,
        train: bool,
        timeout: float = TIMEOUT,
        world_size: int = 1,
    ) -> None:
        self._source, self.policy, self.alone = source, policy, world_size == 1
        self._seed, self._train, self._timeout = seed, train, timeout
        self._epoch = self._start = 0
        self._resumed: Mapping[str, Any] | None = None
        self._number = 0  # Number of the awaited batch.
        self._draws: DrawsUndone | fork_rng = DrawsUndone()
        self.dealt = self.equal = True
        self.stateful: Any = None
        self.sources: list[Any] = []
        # Persistent workers between two epochs. They end with this object: in a reference cycle
        # torch would wait 5 s for each, since its queues are closed by then.
        self._idle: list[BaseProcess] = []
        # In shared memory; True once workers must end.
        self._closing: Tensor = torch.zeros(1, dtype=torch.bool).share_memory_()
        weakref.finalize(self, _close, self._closing, self._idle, os.getpid())

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations; in evaluation all epochs are alike."""
        self._epoch = epoch if self._train else 0

    def skip(self, batches: int, position: Mapping[str, Any] | None = None) -> None:
        """Start the next iteration in the middle of the epoch.

        Args:
            batches: number of batches to leave out. A `Loader` does not load them; a `Stream` does.
            position: result of `Stream.position` after these batches; avoids loading them.
        """
        self._start, self._resumed = batches, position

    @property
    def bad(self) -> dict[str, str]:
        """Reasons by path of the items skipped in the current epoch on this rank."""
        return dict(self.policy.skipped)

    def report_bad(self) -> dict[str, Any]:
        """Return the counts of this rank's bad items, for `BadItemPolicy.judge`."""
        return self.policy.report()

    def describe_wait(self) -> str:
        """Describe the current wait."""
        part = f"epoch {self._epoch}" if self._train else "an evaluation"
        return f"waiting for batch {self._number} of {part}"

    def undo_draws(self) -> None:
        """Undo the random draws of the awaited batch."""
        self._draws.undo()

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        self.policy.start_epoch()
        self._idle.clear()
        self._closing.fill_(False)
        watched, load = self._begin(start)
        try:
            while (batch := load()) is not _END:
                if batch is not None:
                    yield batch
            self._idle[:] = watched.workers if self.dealt else []
        except BaseException:  # Also GeneratorExit, when the epoch is left early.
            if watched.workers:
                watched.end_workers()
                self._source._iterator = None  # Its persistent workers have just ended.
            raise
        finally:
            watched.close()

    def _begin(self, start: int) -> tuple[_WatchedIterator, Callable[[], Any]]:
        """Begin an epoch; return its iterator, and a function that loads its next batch.

        The function returns None for a batch that is left out, and `_END` at the end.
        """
        raise NotImplementedError

    @contextmanager
    def _prepared(self, **changed: Any) -> Iterator[None]:
        """Context manager in which a DataLoader has changed attributes and prepares workers."""
        source = self._source
        if getattr(source, "num_workers", 0) and hasattr(source, "worker_init_fn"):
            changed["worker_init_fn"] = partial(
                _init_worker, self._closing, self._seed, self._epoch, source.worker_init_fn
            )
        with ExitStack() as stack:
            for name, value in changed.items():
                stack.callback(setattr, source, name, getattr(source, name))
                setattr(source, name, value)
            yield

    def _watch(self, iterator: Any) -> _WatchedIterator:
        return _WatchedIterator(iterator, self._timeout, self._closing, self.describe_wait)

    def _judge(self) -> None:
        if self.alone and self.policy.unjudged:
            self.policy.judge([self.report_bad()])


class Loader(BatchSource):
    """Loader of a dataset's batches, made by `make_loader`."""

    def __init__(self, source: DataLoader[Any], policy: BadItemPolicy, **run: Any) -> None:
        super().__init__(source, policy, **run)
        self._batches: Any = source.dataset
        self._sampler: Any = source.sampler
        self._total: tuple[int, str] | None = None  # Files of the epoch, once counted.

    def report_bad(self) -> dict[str, Any]:
        """Return the counts of this rank's bad items, for `BadItemPolicy.judge`."""
        if self._total is None:
            self._total = len(self._batches.dataset), "items"
            if (indices := self._sampler.epoch_items()) is not None:
                files, unit = self._batches.count_files(indices)
                self._total = files * self._sampler.ranks, unit
        return self.policy.report(*self._total)

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations; in evaluation all epochs are alike."""
        super().set_epoch(epoch)
        self._sampler.set_epoch(self._epoch)

    def __len__(self) -> int:
        return len(self._sampler)

    def describe_wait(self) -> str:
        """Describe the current wait, with the items that are being loaded."""
        return f"{super().describe_wait()}{self._batches.describe_loading()}"

    def _begin(self, start: int) -> tuple[_WatchedIterator, Callable[[], Any]]:
        self._total = None
        self._sampler.start = self._number = start
        workers = self._source.num_workers
        # DataLoader costs some 10 µs, and is needed here only for workers and pinned memory.
        plain = not (workers or self._source.pin_memory)
        with _full_memory_explained(), self._prepared():
            iterator = map(self._batches.__getitem__, self._sampler) if plain else self._source
            watched = self._watch(iter(iterator))
        self._draws = draws = DrawsUndone()
        keeps = self._train and not workers and signals.installed()

        def load() -> Any:
            if keeps:
                draws.remember()
            loaded = watched.next()
            if loaded is _END:
                return _END
            self.policy.handle(loaded.reports, loaded.items)
            self._judge()
            self._number += 1
            return loaded.batch

        return watched, load


class Stream(BatchSource):
    """Loader of any iterable of batches, with the interface of `Loader`; made by `resumable`.

    While the source makes a batch, the global random generators have separate states, seeded by
    (seed, epoch): if the source shared them with training, a resumed run would get other batches.
    Switching the states takes about 0.2 ms a batch; a plain DataLoader with workers, which have
    their own generators, does not need it.

    In a resumed run, a source with ``state_dict`` and ``load_state_dict`` continues from its saved
    state; any other source loads the earlier batches again.
    """

    def __init__(self, source: Any, policy: BadItemPolicy, **run: Any) -> None:
        super().__init__(source, policy, **run)
        self._waiting = self._ended = False
        dataset = getattr(source, "dataset", None)
        self._items = dataset if isinstance(dataset, DealtItems) else None
        self.dealt = self._items is not None
        self.equal = self.alone or (self._items is not None and self._items.equal)
        buffered = _has_shuffle_buffer(source)
        if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
            self.stateful = source
        elif self._items is not None and self._items.resumable and not source.num_workers:
            self.stateful = self._items
        if buffered or self.stateful is not None:
            parts = components(source)
            self.sources = [source, *(each for each in parts if isinstance(each, IterableDataset))]
        if buffered:
            self.stateful = None

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations, and tell sampler and dataset."""
        super().set_epoch(epoch)
        set_epoch(self._source, self._epoch)

    def position(self, running: bool) -> dict[str, Any] | None:
        """Return the state of the source after the last batch; None if it has no reliable one.

        Args:
            running: False between two epochs, each of which has its own random numbers.
        """
        if self.stateful is None or self._waiting or self._ended is running:
            return None
        if not running:
            return {"source": self.stateful.state_dict()}
        if self._items is not None and self._items.ended:  # The state may be that of a new epoch.
            return None
        with self._draws if isinstance(self._draws, fork_rng) else nullcontext():
            random = rng_state()
        random.pop("cuda", None)
        return {"source": self.stateful.state_dict(), "random": random}

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: it is unknown.
        """
        if self.dealt and self._source.num_workers > 1:
            raise TypeError("the number of batches is unknown where workers join their own items")
        return len(self._source)

    def _begin(self, start: int) -> tuple[_WatchedIterator, Callable[[], Any]]:
        resumed, self._resumed = self._resumed, None
        seed, epoch = self._seed, self._epoch  # Another iteration may begin before this one ends.
        forked = fork_rng(derive(seed, "stream", epoch), generators(self._source))
        changed = {}
        if type(self._source) is DataLoader:  # A subclass may change batches.
            changed["collate_fn"] = ReportingCollate(self._source.collate_fn)
        with forked, self._prepared(**changed):
            if resumed is not None:
                self.stateful.load_state_dict(resumed["source"])
            watched = self._watch(iter(self._source))
            if resumed is not None and "random" in resumed:
                set_rng_state(resumed["random"])
        self._number, numbers = (0 if resumed is None else start), count(1)
        self._waiting = self._ended = False
        plain = type(self._source) is DataLoader and self._source.num_workers > 0
        each = nullcontext() if plain else forked
        self._draws = DrawsUndone() if plain else forked

        def load() -> Any:
            self._waiting = True
            with each, loading(seed, epoch) as reports:
                batch = watched.next()
            self._waiting = False
            if not isinstance(batch, LoadedBatch):
                items = 0 if batch is _END or batch is None else count_examples(batch)
                batch = LoadedBatch(batch, items + len(reports), reports)
            self.policy.handle(batch.reports, batch.items)
            number = next(numbers)
            if batch.batch is _END:
                self._ended = True
                self._judge()
            elif batch.batch is None:
                self.policy.handle([(f"batch {number}", "it is None")], 1)
            else:
                self._number += 1
                return batch.batch if self._number > start else None
            return batch.batch

        return watched, load


def _has_shuffle_buffer(source: Any) -> bool:
    """Return True for Hugging Face data with a shuffle buffer, whose content no state has."""
    waiting = components(source)
    while waiting:
        part = waiting.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        waiting += [getattr(part, n) for n in ("_ex_iterable", "ex_iterable") if hasattr(part, n)]
        waiting += getattr(part, "ex_iterables", ())
    return False


def resumable(source: Iterable[Any], seed: int = 0, **run: Any) -> Loader | Stream:
    """Give a DataLoader, or any iterable of batches, the interface of `make_loader`'s result.

    A plain DataLoader of a map-style dataset is rebuilt by `make_loader`. Other iterables get
    random numbers seeded by (seed, epoch), so that those that use the global generators are resumed
    exactly, too. Persistent workers of an `IterableDataset` keep the epoch in which they started.

    Args:
        source: a DataLoader or an iterable of batches. Results of this function are returned as
            they are.
        seed: random seed of the run.
        **run: further arguments of `make_loader`: train, rank, world_size, on_bad, max_bad,
            timeout.

    Returns:
        A loader with ``set_epoch(epoch)`` and ``skip(batches)``.

    Raises:
        ValueError: as in `make_loader`.
    """
    if isinstance(source, Loader | Stream):
        return source
    run = {"seed": seed, "train": True, **run}
    if type(source) is not DataLoader:
        _warn_of_repeated_items(source)
        policy = BadItemPolicy(run.pop("on_bad", "skip"), run.pop("max_bad", 0.05))
        run.pop("rank", None)
        return Stream(source, policy, **run)
    same = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn")
    options = {name: getattr(source, name) for name in (*same, "persistent_workers")}
    if source.timeout:  # 0 is DataLoader's default.
        options["timeout"] = source.timeout
    if source.num_workers:
        options["prefetch_factor"] = source.prefetch_factor
        options["multiprocessing_context"] = source.multiprocessing_context
    if isinstance(source.dataset, IterableDataset):
        options |= {"batch_size": source.batch_size, "drop_last": source.drop_last}
        options["generator"] = source.generator
    elif source.batch_sampler is not None:
        options["batch_sampler"] = source.batch_sampler
    else:
        options |= {"sampler": source.sampler, "batch_size": None}
    return make_loader(source.dataset, **{**run, **options})


def _warn_of_repeated_items(source: Any) -> None:
    """Warn of a loader whose workers may all yield the same items."""
    dataset, workers = getattr(source, "dataset", None), getattr(source, "num_workers", 0)
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, IterDataPipe):
        return
    splits = getattr(dataset, "splits_by_worker", asks_for(dataset, frozenset({"get_worker_info"})))
    if workers > 1 and not splits and getattr(source, "worker_init_fn", None) is None:
        logger.warning(
            "each of the %d workers of a %s gives all items of %s, which does not ask for "
            "get_worker_info: use torch's DataLoader, or num_workers=1, or set its attribute "
            "splits_by_worker = True if it gives each worker items of its own",
            workers, type(source).__name__, type(dataset).__name__,
        )  # fmt: skip


def _close(flag: Tensor, idle: list[BaseProcess], process: int) -> None:
    flag.fill_(True)
    for worker in idle if os.getpid() == process else ():
        worker.terminate()


def _end_if_unsent() -> None:
    """End a worker that fails to send a batch; the main process would wait forever."""

    def end(error: Exception, batch: object) -> None:
        try:
            traceback.print_exception(error)
            sys.stderr.flush()
        finally:
            os._exit(NO_SHARED_MEMORY if _is_about_shared_memory(error) else UNSENT)

    # torch's worker sends from a thread of its queue, which only prints errors.
    queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def _is_about_shared_memory(error: Exception) -> bool:
    """Return True for errors of torch, and of locks, about a full /dev/shm."""
    torchs = r"/torch_\d+|shared memory (object|limit|\(shm\)|file)|of shared memory|ancdata"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or bool(re.search(torchs, str(error)))


@contextmanager
def _full_memory_explained() -> Iterator[None]:
    """Context manager that turns errors about full shared memory into an OSError with advice."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _is_about_shared_memory(error):
            raise
        raise OSError(errno.ENOSPC, FULL) from error


def _init_worker(
    closing: Tensor,
    seed: int,
    epoch: int,
    worker_init_fn: Callable[[int], None] | None,
    worker: int,
) -> None:
    """Prepare a worker for signals and the end of its main process; see `serve`."""
    serve(lambda: bool(closing.item()))
    _end_if_unsent()
    begin_loading(seed, epoch)
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, DealtItems):
        info.dataset.watch_worker()
    if worker_init_fn is not None:
        worker_init_fn(worker)


@dataclass(eq=False)
class _WatchedIterator:
    """Iterator of batches that detects dead and hanging workers of a DataLoader.

    Without workers, a thread warns once of each batch that takes too long.
    """

    iterator: Any  # The workers of a DataLoader's iterator are watched.
    timeout: float  # Seconds without a batch before an error (a warning without workers); 0: never.
    closing: Tensor  # Flag in shared memory, set before workers are ended.
    describe_wait: Callable[[], str]

    def __post_init__(self) -> None:
        self._since: float | None = None  # Start of the wait for a batch.
        self._closed = threading.Event()
        self.workers: list[BaseProcess] = list(getattr(self.iterator, "_workers", []))
        if self.workers:  # DataLoader's own option would limit the start of an epoch, too.
            self.iterator._timeout = POLL_SECONDS
            # torch's handler of SIGCHLD raises anywhere, such as in a forward pass or a finalizer.
            # The next wait for a batch detects a death.
            if getattr(self.iterator, "_worker_pids_set", False):
                torch._C._remove_worker_pids(id(self.iterator))
                self.iterator._worker_pids_set = False
        elif self.timeout:
            threading.Thread(target=self._warn, daemon=True, name="loader").start()

    def next(self) -> Any:
        """Return the next batch; `_END` at the end of the epoch.

        Raises:
            OSError: there is no shared memory left for batches.
            RuntimeError: a worker died, or gave nothing within the timeout; the message describes
                the wait. Errors of the dataset are raised unchanged.
        """
        self._since = time.monotonic()
        try:
            return self._from_workers() if self.workers else next(self.iterator, _END)
        finally:
            self._since = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _warn(self) -> None:
        warned: float | None = None
        while not self._closed.wait(min(self.timeout, 1.0)):
            since = self._since
            if since is None or since == warned or time.monotonic() - since < self.timeout:
                continue
            warned = since
            logger.warning(
                "no batch for %g s, %s (the loader option timeout and the run option item_timeout "
                "set this limit)", self.timeout, self.describe_wait(),
            )  # fmt: skip

    def _from_workers(self) -> Any:
        cause: str | None = ""
        while not cause:
            try:
                result = next(self.iterator, _END)
                if result is _END:
                    self.iterator._timeout = 0  # Persistent workers are about to be restarted.
                return result
            except Exception as error:
                cause = self._explain(error)
                if cause is None:
                    raise
        # Raised outside of except: a chained error would keep the objects of torch's frames.
        time.sleep(0.2)  # A simultaneous request to stop may arrive a little later.
        if (number := signals.requested()) is not None:
            raise signals.Interrupted(number)  # The signal may have hit a worker that was starting.
        if cause.endswith(FULL):
            raise OSError(errno.ENOSPC, f"{self.describe_wait()}: {cause}")
        advice = "" if cause.startswith(HUNG) else f"; {ADVICE}"
        raise RuntimeError(f"{cause}, {self.describe_wait()}{advice}")

    def _explain(self, error: Exception) -> str | None:
        """Return the cause of torch's error; None if not about workers, "" to go on waiting."""
        if isinstance(error, RuntimeError) and _is_about_shared_memory(error):
            return FULL
        if str(error).startswith("DataLoader timed out"):
            waited = time.monotonic() - (self._since or 0.0)
            if not self.timeout or waited < self.timeout:
                return ""
            return (
                f"{HUNG} within {self.timeout:g} s (one hangs, or the "
                "loader option timeout, by default the run option item_timeout, is too small)"
            )
        # torch begins the errors of a dataset in a worker by "Caught".
        return None if str(error).startswith("Caught ") else _describe_exit(self.workers)

    def end_workers(self) -> None:
        """End the workers at once; torch would wait for what they are loading."""
        self.closing.fill_(True)
        for worker in self.workers:
            worker.terminate()
        end = time.monotonic() + CLOSING_SECONDS
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
            if worker.exitcode is None:  # In a call that handles no signals.
                worker.kill()
        # A worker may have ended while it held the lock of torch's event, and torch, which sets
        # that event before it drops the iterator, would wait forever. No worker reads it now.
        self.iterator._workers_done_event = threading.Event()
        self.iterator = None  # A traceback may keep this object, and must not keep the workers.


def _describe_exit(workers: list[BaseProcess]) -> str | None:
    """Return a sentence about a worker that died; None if none did."""
    # A connection may break just before its worker ends.
    ended = connection.wait([worker.sentinel for worker in workers], timeout=POLL_SECONDS)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(timeout=POLL_SECONDS)
    for worker in workers:
        if not (code := worker.exitcode):
            continue
        if code in (-signal.SIGBUS, NO_SHARED_MEMORY):
            how = f"died: {FULL}"
        elif code == UNSENT:
            how = "could not send a batch (see above)"
        elif code > 0:
            how = f"exited with code {code}"
        else:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            how = f"died of {signal.Signals(-code).name}{hint}"
        return f"a worker of the loader (pid {worker.pid}) {how}"
    return None
