"""Loaders whose order depends on (seed, epoch), and not on the processes that load the batches.

`make_loader` wraps torch's `DataLoader` such that an epoch can be entered at any batch, ranks get
disjoint and equally many batches, bad items are named, skipped and counted, and workers survive the
signals that ask the main process to stop.
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
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import count
from multiprocessing import connection, queues
from multiprocessing.process import BaseProcess
from numbers import Integral, Real
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

logger = logging.getLogger("trainer.data")

POLL_SECONDS = 0.5  # Interval at which workers are checked.
CLOSING_SECONDS = 1.0  # Time in which workers end after SIGTERM, before they are killed.
TIMEOUT = 300.0  # Seconds after which a wait for a batch is an error.
UNSENT, NO_SHARED_MEMORY = 70, 74  # Exit codes of workers that cannot send a batch.
FULL = (
    "the shared memory in which loader workers hand over their batches is full (/dev/shm): use "
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
    logging interval and at the end of a stage, and a loader that no Brain reads as soon as it is
    known, where there is one process.

    The items of an `IterableDataset` are dealt among ranks and workers; see `DealtItems`.

    Args:
        dataset: a map-style dataset of any class, or an `IterableDataset`. Items that are mappings
            become a `Batch`, unless ``collate_fn`` is given; those of an `IterableDataset` are
            joined as by torch's `default_collate`. An item that is None is a bad item. Random
            numbers from `item_seed` and `item_generator` depend on (seed, epoch, item) alone.
            Global generators are seeded for each batch in workers; without workers they are those
            of the process. A method ``set_epoch(epoch)`` is called in every worker;
            ``name_of(index) -> str`` names items in error messages; ``count_files(indices) -> int``
            counts the different files of items, which are a file each otherwise.
            ``__getitems__(indices)`` is called if there is one, as by `DataLoader`; a batch with a
            bad item is loaded again, item by item.
        train: True for training: shuffle unless a sampler is given, another order and other random
            numbers in each epoch, equally many batches on every rank. False for evaluation: every
            item exactly once, in order, and every epoch alike.
        seed: random seed of the run.
        rank: rank of this process.
        world_size: number of processes.
        on_bad: "skip" to log bad items and leave them out, "raise" to end the run at the first.
        max_bad: share of the files, between 0 and 1, above which bad ones end the run.
        **options: options of `DataLoader`. ``batch_size`` is that of one process. Samplers of any
            kind get the epoch, and draw from random numbers of their own. ``timeout``, in seconds
            and 300 by default, ends a run whose workers give no batch for that long; a batch that
            takes as long without workers is warned of (0: never).

    Returns:
        An iterable of batches with ``set_epoch(epoch)`` and ``skip(batches)``.

    Raises:
        ValueError: the options are unknown or exclude each other, the dataset is empty, or the
            sampler is set up for another number of ranks.
    """
    _check_options(options)
    if options.get("num_workers", 0) == 0:  # Options of workers mean nothing without any.
        for name in ("persistent_workers", "prefetch_factor", "worker_init_fn"):
            options.pop(name, None)
    options["pin_memory"] = options.get("pin_memory", False) and torch.accelerator.is_available()
    timeout = options.pop("timeout", TIMEOUT)
    if isinstance(dataset, IterableDataset):
        if not isinstance(dataset, IterDataPipe):  # torch splits pipes by itself.
            dataset = DealtItems(dataset, train, rank, world_size, options.get("batch_size", 1))
        if options.get("batch_size", 1) is not None and options.get("collate_fn") is None:
            options["collate_fn"] = collate_plain
        policy = BadItemPolicy(on_bad, max_bad)
        return Stream(DataLoader(dataset, **options), seed, train, timeout, policy, world_size)
    if not len(dataset):
        raise ValueError(f"the dataset {type(dataset).__name__} has no items")
    sampler = _pop_sampler(
        dataset, options, train=train, seed=seed, rank=rank, world_size=world_size
    )
    single = sampler.batch_size is None and not sampler.batched
    join = options.pop("collate_fn", None) or (default_convert if single else _collate)
    workers = options.get("num_workers", 0)
    with _full_memory_explained():
        batches = BatchDataset(dataset, join, seed, train, single, workers)
        return Loader(batches, sampler, BadItemPolicy(on_bad, max_bad), timeout, options)


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for loader options that are unknown, or have values of another kind.

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
        value = options.get(name)
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
    seconds = isinstance(value, Real) and not isinstance(value, bool) and float(value) >= 0
    if value is not None and not seconds:
        raise ValueError(
            f"timeout must be a number of seconds, 0 or more (0: never); got {value!r}"
        )


def _pop_sampler(dataset: Any, options: dict[str, Any], **run: Any) -> DistributedBatchSampler:
    """Make a batch sampler by the options about order, and remove these from ``options``."""
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


class Loader:
    """Loader of a dataset's batches, made by `make_loader`.

    Args:
        batches: the dataset, of batches.
        sampler: gives the items of each batch.
        policy: counts the bad items.
        timeout: seconds without a batch after which workers are given up, or, without workers, a
            warning is logged; 0 for never.
        options: further options of `DataLoader`.

    Attributes:
        policy: counts the bad items.
        alone: True if it judges bad items by itself, since nobody does so for all ranks.
    """

    def __init__(
        self,
        batches: BatchDataset,
        sampler: DistributedBatchSampler,
        policy: BadItemPolicy,
        timeout: float,
        options: dict[str, Any],
    ) -> None:
        self._batches, self._sampler, self.policy = batches, sampler, policy
        self.alone = sampler.world_size == 1
        self._total: tuple[int, str] | None = None  # Files of the epoch, once they are counted.
        self._idle: list[BaseProcess] = []  # Persistent workers between two epochs.
        self._closing = _closing_flag(self, self._idle)
        self._timeout, self._workers = timeout, options.get("num_workers", 0)
        self._number = 0  # Number of the batch that is waited for.
        self._before = DrawsUndone()
        worker_init_fn = options.pop("worker_init_fn", None)
        self._make = partial(
            DataLoader,
            batches,
            sampler=sampler,
            batch_size=None,
            collate_fn=_identity,
            # Without a generator of its own, DataLoader draws from the global one.
            generator=torch.Generator().manual_seed(derive(batches.seed, "workers")),
            worker_init_fn=partial(_init_worker, self._closing, None, worker_init_fn),
            **options,
        )
        self._loader: DataLoader[Any] = self._make()

    @property
    def bad(self) -> dict[str, str]:
        """Reasons by path, of the items skipped in the current epoch on this rank."""
        return dict(self.policy.skipped)

    def report_bad(self) -> dict[str, Any]:
        """Return the counts of this rank's bad items, for `BadItemPolicy.judge`."""
        if self._total is None:
            self._total = len(self._batches.dataset), "items"
            if (indices := self._sampler.epoch_items()) is not None:
                files, unit = self._batches.count_files(indices)
                self._total = files * self._sampler.ranks, unit
        return self.policy.report(*self._total)

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations; in evaluation all epochs are alike.

        Args:
            epoch: number of the epoch.
        """
        self._sampler.set_epoch(epoch if self._sampler.train else 0)

    def skip(self, batches: int) -> None:
        """Start the next iteration in the middle of the epoch.

        Args:
            batches: number of batches to leave out; none of them is loaded.
        """
        self._sampler.start = batches

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        return self._from_workers() if self._workers else self._from_process()

    def describe_wait(self) -> str:
        """Return what an iteration waits for, with the items that are being loaded."""
        loading = self._batches.describe_loading()
        part = f"epoch {self._sampler.epoch}" if self._sampler.train else "an evaluation"
        return f"waiting for batch {self._number} of {part}{loading}"

    def undo_draws(self) -> None:
        """Restore random generators to before the batch that is waited for drew from them."""
        self._before.undo()

    def _from_process(self) -> Iterator[Any]:
        """Yield the batches without workers."""
        self._start_epoch()
        self._number = self._sampler.start
        # Here DataLoader is needed for pinning memory only, and costs some 10 µs a batch.
        pinned = self._loader.pin_memory
        batches = iter(self._loader if pinned else map(self._batches.__getitem__, self._sampler))
        keeps = self._sampler.train and signals.installed()
        self._before = DrawsUndone()
        with closing(_HangWarning(self._timeout, self.describe_wait)) as watch:
            while True:
                if keeps:
                    self._before.remember()
                with watch:
                    loaded: Any = next(batches, _END)
                if loaded is _END:
                    return
                self._count(loaded)
                self._number += 1
                if loaded.batch is not None:
                    yield loaded.batch

    def _from_workers(self) -> Iterator[Any]:
        """Yield the batches that workers load."""
        self._start_epoch()
        self._idle.clear()
        self._closing.fill_(False)
        first = self._sampler.start
        with _full_memory_explained():
            watched = _WatchedIterator(
                iter(self._loader), self._timeout, self._closing, self.describe_wait
            )
        try:
            for self._number in count(first):
                loaded = watched.next()
                if loaded is _END:
                    self._idle[:] = watched.workers
                    return
                self._count(loaded)
                if loaded.batch is not None:
                    yield loaded.batch
        except BaseException:  # GeneratorExit too: the epoch was left early.
            watched.close()
            self._loader = self._make()
            raise

    def _start_epoch(self) -> None:
        self.policy.start_epoch()
        self._total = None

    def _count(self, loaded: LoadedBatch) -> None:
        self.policy.handle(loaded.reports, loaded.items)
        if self.alone and self.policy.unjudged:
            self.policy.judge([self.report_bad()])


class Stream:
    """Loader of any iterable of batches, with the interface of `Loader`; made by `resumable`.

    While the source makes a batch, the global random generators have states of its own, seeded by
    (seed, epoch). With those of the process, from which training draws too, a resumed run would get
    other batches. Switching the states takes about 0.2 ms a batch; a plain DataLoader with workers,
    which have generators of their own, needs none.

    In a resumed run, a source with ``state_dict`` and ``load_state_dict`` continues from its saved
    state; any other source loads the earlier batches again.

    Args:
        source: an iterable of batches.
        seed: random seed of the run.
        train: False for evaluation, in which every epoch is alike.
        timeout: seconds without a batch after which the workers of a DataLoader are given up, and
            any other source is warned of; 0 for never.
        policy: counts what the source reports by `report_bad`; None to skip up to 5 %.
        world_size: number of processes.

    Attributes:
        policy, alone: as those of `Loader`.
        dealt: the items of an `IterableDataset`, if it deals them among ranks and workers.
        equal: True if all ranks get equally many batches in training.
        stateful: object whose state resumes an epoch, or None.
    """

    def __init__(
        self,
        source: Iterable[Any],
        seed: int = 0,
        train: bool = True,
        timeout: float = TIMEOUT,
        policy: BadItemPolicy | None = None,
        world_size: int = 1,
    ) -> None:
        self._source, self._seed, self._train, self._timeout = source, seed, train, timeout
        self._epoch, self._start, self._number = 0, 0, 0
        self._idle: list[BaseProcess] = []
        self._closing = _closing_flag(self, self._idle)
        self._forked: fork_rng | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._waiting = self._ended = False
        self.policy = policy or BadItemPolicy("skip", 0.05)
        self.alone = world_size == 1
        dataset = getattr(source, "dataset", None)
        self.dealt = dataset if isinstance(dataset, DealtItems) else None
        self.equal = world_size == 1 or (self.dealt is not None and self.dealt.equal)
        self.stateful: Any = None
        workers = getattr(source, "num_workers", 0)
        if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
            self.stateful = source
        elif self.dealt is not None and self.dealt.resumable and not workers:
            self.stateful = self.dealt
        if _has_shuffle_buffer(source):
            self.stateful = None

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations, and tell sampler and dataset.

        Args:
            epoch: number of the epoch.
        """
        self._epoch = epoch if self._train else 0
        set_epoch(self._source, self._epoch)

    @property
    def sources(self) -> list[Any]:
        """The source and its datasets, where their states are places in an epoch."""
        if self.stateful is None and not _has_shuffle_buffer(self._source):
            return []
        nested = [part for part in components(self._source) if isinstance(part, IterableDataset)]
        return [self._source, *nested]

    def skip(self, batches: int, position: Mapping[str, Any] | None = None) -> None:
        """Start the next iteration at this batch.

        Args:
            batches: number of the batches before it, which are loaded and discarded.
            position: what `position` returned after them; nothing is loaded then.
        """
        self._start, self._resumed = batches, position

    def position(self, running: bool) -> dict[str, Any] | None:
        """Return the state of the source after the last batch; None if there is none to rely on.

        Args:
            running: False between two epochs, which have random numbers of their own.
        """
        if self.stateful is None or self._waiting or self._ended is running:
            return None
        if not running:
            return {"source": self.stateful.state_dict()}
        if self.dealt is not None and self.dealt.ended:  # The state may be that of a new epoch.
            return None
        with self._forked or nullcontext():
            random = rng_state()
        random.pop("cuda", None)
        return {"source": self.stateful.state_dict(), "random": random}

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: it is unknown.
        """
        if self.dealt is not None and self._source.num_workers > 1:  # type: ignore[attr-defined]
            raise TypeError("the number of batches is unknown where workers join their own items")
        return len(self._source)  # type: ignore[arg-type]  # Raises where there is no length.

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        resumed, self._resumed = self._resumed, None
        seed, epoch = self._seed, self._epoch  # Another iteration may begin before this one ends.
        self.policy.start_epoch()
        forked = fork_rng(derive(seed, "stream", epoch), generators(self._source))
        self._idle.clear()
        self._closing.fill_(False)
        with forked, _prepared(self._source, self._closing, seed, epoch):
            if resumed is not None:
                self.stateful.load_state_dict(resumed["source"])
            iterator = iter(self._source)
            if resumed is not None and "random" in resumed:
                set_rng_state(resumed["random"])
        self._number, loaded = (0 if resumed is None else start), 0
        self._waiting = self._ended = False
        plain = type(self._source) is DataLoader and self._source.num_workers > 0
        each = nullcontext() if plain else forked
        self._forked = None if plain else forked
        watched = _WatchedIterator(iterator, self._timeout, self._closing, self.describe_wait)
        limit = 0 if watched.workers else self._timeout
        with closing(_HangWarning(limit, self.describe_wait)) as watch:
            try:
                while True:
                    self._waiting = True
                    with each, loading(seed, epoch) as reports, watch:
                        batch = watched.next()
                    self._waiting = False
                    if not isinstance(batch, LoadedBatch):
                        items = 0 if batch is _END or batch is None else count_examples(batch)
                        batch = LoadedBatch(batch, items + len(reports), reports)
                    self.policy.handle(batch.reports, batch.items)
                    loaded += 1
                    if batch.batch is _END:
                        self._ended = True
                        if self.dealt is not None:  # The DataLoader is not the user's own.
                            self._idle[:] = watched.workers
                        break
                    if batch.batch is None:
                        self.policy.handle([(f"batch {loaded}", "it is None")], 1)
                        continue
                    self._number += 1
                    if self._number > start:
                        yield batch.batch
            except BaseException:
                if watched.workers:
                    watched.close()
                    # Persistent workers, which have just ended.
                    self._source._iterator = None  # type: ignore[attr-defined]
                raise
        if self.alone and self.policy.unjudged:
            self.policy.judge([self.report_bad()])

    @property
    def bad(self) -> dict[str, str]:
        """Reasons by path, of the items skipped in the current epoch on this rank."""
        return dict(self.policy.skipped)

    def report_bad(self) -> dict[str, Any]:
        """Return the counts of this rank's bad items, for `BadItemPolicy.judge`."""
        return self.policy.report()

    def describe_wait(self) -> str:
        """Return what an iteration waits for."""
        part = f"epoch {self._epoch}" if self._train else "an evaluation"
        return f"waiting for batch {self._number} of {part}"

    def undo_draws(self) -> None:
        """Restore random generators to before the batch that is waited for drew from them."""
        if self._forked is not None:
            self._forked.undo()


def _has_shuffle_buffer(source: Any) -> bool:
    """Return True for data of Hugging Face with a shuffle buffer: no state has its content."""
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

    A plain DataLoader of a map-style dataset is made anew by `make_loader`. Other iterables run on
    random numbers seeded by (seed, epoch), so that those that draw from the global generators are
    resumed exactly too. Persistent workers of an `IterableDataset` keep the epoch in which they
    started.

    Args:
        source: a DataLoader or an iterable of batches. A result of this function is returned as it
            is.
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
    if type(source) is not DataLoader:
        _warn_of_repeated_items(source)
        policy = BadItemPolicy(run.get("on_bad", "skip"), run.get("max_bad", 0.05))
        return Stream(
            source, seed, run.get("train", True), run.get("timeout", TIMEOUT), policy,
            run.get("world_size", 1),
        )  # fmt: skip
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
    return make_loader(source.dataset, seed=seed, **{"train": True, **run, **options})


def _warn_of_repeated_items(source: Any) -> None:
    """Warn of a loader whose workers may all give the same items."""
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


def _closing_flag(owner: Any, idle: list[BaseProcess]) -> Tensor:
    """Return a flag in shared memory, True once the owner's workers are to end.

    Args:
        owner: a loader.
        idle: its workers that wait for the next epoch, which end with it. torch waits 5 s for each
            of them where the loader is in a reference cycle: by the time that it is collected, the
            queues through which torch would tell them are closed.
    """
    flag: Tensor = torch.zeros(1, dtype=torch.bool).share_memory_()
    weakref.finalize(owner, _close, flag, idle, os.getpid())  # At the interpreter's exit too.
    return flag


def _close(flag: Tensor, idle: list[BaseProcess], process: int) -> None:
    flag.fill_(True)
    for worker in idle if os.getpid() == process else ():
        worker.terminate()


@contextmanager
def _prepared(source: Any, closing: Tensor, seed: int, epoch: int) -> Iterator[None]:
    """Context manager in which a DataLoader begins an epoch.

    It prepares new workers by `_init_worker`, and its batches come with their bad items. A class of
    its own may change batches on their way, and gets them as they are.
    """
    changed: dict[str, Any] = {}
    if type(source) is DataLoader:
        changed["collate_fn"] = ReportingCollate(source.collate_fn)
    if getattr(source, "num_workers", 0) and hasattr(source, "worker_init_fn"):
        before = source.worker_init_fn
        changed["worker_init_fn"] = partial(_init_worker, closing, (seed, epoch), before)
    with ExitStack() as stack:
        for name, value in changed.items():
            stack.callback(setattr, source, name, getattr(source, name))
            setattr(source, name, value)
        yield


def _end_if_unsent() -> None:
    """End a worker that fails to send a batch, for which the main process would wait forever."""

    def end(error: Exception, batch: object) -> None:
        try:
            traceback.print_exception(error)
            sys.stderr.flush()
        finally:
            os._exit(NO_SHARED_MEMORY if _is_about_shared_memory(error) else UNSENT)

    # torch's worker sends from a thread of its queue, which only prints what fails.
    queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def _is_about_shared_memory(error: Exception) -> bool:
    """Return True for torch's errors about /dev/shm, and for locks that find no room there."""
    torchs = r"/torch_\d+|shared memory (object|limit|\(shm\)|file)|of shared memory|ancdata"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or bool(re.search(torchs, str(error)))


@contextmanager
def _full_memory_explained() -> Iterator[None]:
    """Context manager that raises an OSError that says what to do where shared memory is full."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _is_about_shared_memory(error):
            raise
        raise OSError(errno.ENOSPC, FULL) from error


def _init_worker(
    closing: Tensor,
    seed_and_epoch: tuple[int, int] | None,
    worker_init_fn: Callable[[int], None] | None,
    worker: int,
) -> None:
    """Prepare a worker for signals and the end of its main process; see `serve`.

    A worker that died of Ctrl-C, or of torchrun's SIGTERM, would break the main process in the
    middle of the step after which it saves.
    """
    serve(lambda: bool(closing.item()))
    _end_if_unsent()
    if seed_and_epoch is not None:
        begin_loading(*seed_and_epoch)
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, DealtItems):
        info.dataset.watch_worker()
    if worker_init_fn is not None:
        worker_init_fn(worker)


class _HangWarning:
    """Context manager around a wait for a batch, of which it warns once if it takes too long.

    Args:
        timeout: seconds after which a thread warns; 0 for never.
        describe: returns what is waited for.
    """

    def __init__(self, timeout: float, describe: Callable[[], str]) -> None:
        self._timeout, self._describe = timeout, describe
        self._since: float | None = None
        self._closed = threading.Event()
        if timeout:
            threading.Thread(target=self._watch, daemon=True, name="loader").start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        warned: float | None = None
        while not self._closed.wait(min(self._timeout, 1.0)):
            since = self._since
            if since is None or since == warned or time.monotonic() - since < self._timeout:
                continue
            warned = since
            logger.warning(
                "no batch for %g s, %s (the loader option timeout and the run option item_timeout "
                "set this limit)", self._timeout, self._describe(),
            )  # fmt: skip


class _WatchedIterator:
    """Iterator of batches that notices at once when workers of a DataLoader die or hang.

    torch notices a death at once, or after 5 s when the signal comes just before it starts to wait.

    Args:
        iterator: an iterator of batches; if it is a DataLoader's, its workers are watched.
        timeout: seconds without a batch after which workers are given up; 0 for never.
        closing_flag: flag in shared memory, set before workers are ended.
        describe_wait: returns what is waited for.
    """

    def __init__(
        self, iterator: Any, timeout: float, closing_flag: Tensor, describe_wait: Callable[[], str]
    ) -> None:
        self._iterator, self._timeout, self._closing = iterator, timeout, closing_flag
        self._describe_wait = describe_wait
        self.workers: list[BaseProcess] = list(getattr(iterator, "_workers", []))
        self._poll_after(POLL_SECONDS)

    def _poll_after(self, seconds: float) -> None:
        """Set for how long torch waits for a batch before it checks its workers and gives up."""
        if self.workers:  # Set here: DataLoader's own option would limit its start of an epoch too.
            self._iterator._timeout = seconds

    def next(self) -> Any:
        """Return the next batch; `_END` at the end of the epoch.

        Raises:
            OSError: there is no shared memory left for batches.
            RuntimeError: a worker died, or gave nothing within the timeout; the message names what
                was waited for. Errors of the dataset are raised as they are.
        """
        if not self.workers:
            return next(self._iterator, _END)
        since = time.monotonic()
        while True:
            try:
                result = next(self._iterator, _END)
                if result is _END:
                    self._poll_after(0)  # Persistent workers are about to be restarted.
                return result
            except Exception as error:
                if isinstance(error, RuntimeError) and _is_about_shared_memory(error):
                    cause: str | None = FULL
                else:
                    cause = self._explain(str(error), time.monotonic() - since)
                if cause is None:
                    raise
            if cause:  # Raised outside of except: chained, it would keep what torch's frames hold.
                time.sleep(0.2)  # A request of the same moment may be noticed a little later.
                if (number := signals.requested()) is not None:
                    raise signals.Interrupted(number)  # It may have met a worker that just began.
                if cause.endswith(FULL):
                    raise OSError(errno.ENOSPC, f"{self._describe_wait()}: {cause}")
                raise RuntimeError(f"{cause}, {self._describe_wait()}")

    def _explain(self, error: str, waited: float) -> str | None:
        """Return the cause of torch's error; None if it is not about workers, "" to wait on."""
        if error.startswith("DataLoader timed out"):
            if not self._timeout or waited < self._timeout:
                return ""
            return (
                f"the loader's workers gave no batch within {self._timeout:g} s (one hangs, or the "
                "loader option timeout, by default the run option item_timeout, is too small)"
            )
        # torch begins the errors of a dataset in a worker by "Caught".
        return None if error.startswith("Caught ") else _describe_exit(self.workers)

    def close(self) -> None:
        """End the workers at once; torch would wait for what they are loading."""
        self._closing.fill_(True)
        try:
            self._end_workers()
        except RuntimeError:
            # torch's handler of SIGCHLD raises once, for a worker that SIGTERM has ended before it
            # could handle it.
            self._end_workers()
        if self.workers:
            # A worker may have ended while it held the lock of torch's event, and torch, which sets
            # that event before it drops the iterator, would wait forever. No worker reads it now.
            self._iterator._workers_done_event = threading.Event()
        self._iterator = None  # A traceback may keep this object, and must not keep the workers.

    def _end_workers(self) -> None:
        for worker in self.workers:
            worker.terminate()
        end = time.monotonic() + CLOSING_SECONDS
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
            if worker.exitcode is None:  # It is in a call that handles no signal.
                worker.kill()


def _describe_exit(workers: list[BaseProcess]) -> str | None:
    """Return a sentence about a worker that died; None if none did."""
    # A broken connection to a worker may be noticed just before its end; and torch's own handler
    # may notice that end, and raise, while we wait for it.
    with suppress(RuntimeError):
        ended = connection.wait([worker.sentinel for worker in workers], timeout=POLL_SECONDS)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(timeout=POLL_SECONDS)
    for worker in workers:
        if (code := worker.exitcode) in (-signal.SIGBUS, NO_SHARED_MEMORY):
            return f"a worker of the loader (pid {worker.pid}) died: {FULL}"
        if code == UNSENT:
            return f"a worker of the loader (pid {worker.pid}) could not send a batch (see above)"
        if code:
            how = (
                f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            )
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"a worker of the loader (pid {worker.pid}) {how}{hint}"
    return None
