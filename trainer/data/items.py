"""Items of a dataset: random numbers, loading, bad items, and joining batches."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.utils.data import Dataset, IterableDataset, Subset, get_worker_info

from trainer import checks
from trainer.data.batch import count_examples
from trainer.data.batch_sampler import BatchIndex, components, generators, knows_ranks
from trainer.seed import derive, reseed, seed_generator
from trainer.untrusted import printable

logger = logging.getLogger("trainer.data")

MIN_ITEMS = 100  # Items loaded before the share of bad files is judged.


class BadItem(ValueError):
    """Error that a dataset raises for an item that cannot be used; see `make_loader`.

    Args:
        path: file, or other name, of the item.
        reason: cause, for the log.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(printable(f"{path}: {reason}"))
        self.path, self.reason = str(path), reason


class _Loading(NamedTuple):
    """The batch that this process, a worker or the main process, is loading."""

    seed: int  # Seed of the run.
    epoch: int
    bad: list[tuple[str, str]]  # Path and reason of each bad item so far.


_loading = _Loading(0, 0, [])
_END = object()  # Follows the last item.
# Last caller of ``set_epoch``, by id of the dataset, which several loaders may share.
_epoch_set_by: WeakValueDictionary[int, BatchDataset] = WeakValueDictionary()


def begin_loading(seed: int, epoch: int) -> None:
    """Set the seed and epoch of the batches that this worker loads."""
    global _loading
    _loading = _Loading(seed, epoch, [])


@contextmanager
def loading(
    seed: int, epoch: int, bad: list[tuple[str, str]] | None = None
) -> Iterator[list[tuple[str, str]]]:
    """Context manager around the loading of a batch; may be nested, by items that load batches.

    Yields the list to which bad files are added, as (path, reason): ``bad``, or a new one.
    """
    global _loading
    outer, _loading = _loading, _Loading(seed, epoch, [] if bad is None else bad)
    try:
        yield _loading.bad
    finally:
        _loading = outer


def item_seed(item: int | str) -> int:
    """Return a random seed for one item, for use inside a dataset.

    Use it as ``random.Random(item_seed(index))`` or ``numpy.random.default_rng(item_seed(index))``;
    for torch there is `item_generator`.

    Args:
        item: name or index of the item.

    Returns:
        A seed of 63 bits that depends only on the loader's seed, the epoch and ``item``: not on the
        rank, the number of workers, the batch, or the point of resuming. In evaluation the epoch is
        always 0. Outside of a loader, seed and epoch are 0; see `in_epoch`.
    """
    return derive(_loading.seed, "item", _loading.epoch, str(item))


def item_generator(item: int | str) -> torch.Generator:
    """Return a random generator for one item, for use inside a dataset.

    Args:
        item: name or index of the item.

    Returns:
        A generator on the CPU with the seed ``item_seed(item)``.
    """
    return torch.Generator().manual_seed(item_seed(item))


@contextmanager
def in_epoch(epoch: int, seed: int | None = None) -> Iterator[None]:
    """Context manager that sets the epoch of `item_seed` and `item_generator`.

    For tests, and for datasets that load items as in an earlier epoch.

    Args:
        epoch: number of the epoch.
        seed: random seed of the run; None keeps that of the loader.
    """
    with loading(_loading.seed if seed is None else seed, epoch, _loading.bad):
        yield


def report_bad(path: str | os.PathLike[str], reason: str) -> None:
    """Report an item that a dataset left out of the current batch.

    It is logged and counted like a `BadItem`.

    Args:
        path: file, or other name, of the item.
        reason: cause, for the log.
    """
    _loading.bad.append((str(path), reason))


class BadItemPolicy:
    """Policy for bad items: log, count and skip them, or end the run.

    Each bad file counts once an epoch, however many items it has. One process judges by `check`;
    several exchange the results of `report` and all call `judge`.

    Args:
        on_bad: "skip", or "raise" to end the run at the first bad item.
        max_bad: share of the files that may be bad, between 0 and 1.

    Attributes:
        skipped: reasons by path of the files that this process found bad in the current epoch.
        all_skipped: the same for all processes, at the last `judge`.
        loaded: items that this process loaded, or skipped, in the current epoch.

    Raises:
        ValueError: ``on_bad`` is neither "skip" nor "raise", or ``max_bad`` is out of range.
    """

    def __init__(self, on_bad: str, max_bad: float) -> None:
        if on_bad not in ("skip", "raise"):
            raise ValueError(f"on_bad must be 'skip' or 'raise', got {on_bad!r}")
        self.on_bad = on_bad
        self.max_bad = checks.within("bad items", "max_bad", max_bad, 0.0, 1.0)
        self._logged: set[str] = set()
        self.start_epoch()

    def start_epoch(self) -> None:
        """Reset the counts. In a resumed run they begin with the first loaded batch."""
        self.skipped: dict[str, str] = {}
        self.all_skipped: dict[str, str] = {}
        self.loaded = 0
        self._unreported: dict[str, str] = {}
        self.unjudged = False

    def handle(self, reports: Iterable[tuple[str, str]], items: int = 0) -> None:
        """Log and count bad items, by path and reason, among ``items``; log each path once.

        Raises:
            BadItem: for the first bad item, if ``on_bad`` is "raise".
        """
        self.loaded += items
        for path, reason in reports:
            if self.on_bad == "raise":
                raise BadItem(path, reason)
            if path not in self._logged:
                logger.warning("skipped %s: %s", path, reason)
            self._logged.add(path)
            if path not in self.skipped:
                self.skipped[path] = self._unreported[path] = reason
                self.unjudged = True

    def report(self, total: int | None = None, unit: str = "items") -> dict[str, Any]:
        """Return the items and new bad files of this process, for `judge`, as plain values.

        Args:
            total: number of files, or else of items, in the epoch on all processes; None if
                unknown, which counts the items loaded so far.
            unit: "files" or "items".
        """
        new, self._unreported = self._unreported, {}
        return {"loaded": self.loaded, "bad": list(new.items()), "total": total, "unit": unit}

    def judge(
        self, reports: Sequence[Mapping[str, Any]], *, shared: bool = False, at_end: bool = True
    ) -> None:
        """Judge the bad files of all processes; equal reports give equal results everywhere.

        Args:
            reports: results of `report` on each process.
            shared: True if all processes load, and count, the same items.
            at_end: False to wait until `MIN_ITEMS` items were loaded.

        Raises:
            ValueError: more than the share ``max_bad`` of the files is bad.
        """
        join = max if shared else sum
        loaded = join(report["loaded"] for report in reports)
        totals = [report["total"] for report in reports if report["total"] is not None]
        for report in reports:
            for path, reason in report["bad"]:
                self.all_skipped.setdefault(path, reason)
        if not at_end and loaded < MIN_ITEMS:
            return
        if not at_end and not totals:
            # The items so far are a sample of the epoch: allow three standard deviations.
            margin = 3 * math.sqrt(loaded * self.max_bad * (1 - self.max_bad))
            if len(self.all_skipped) <= self.max_bad * loaded + margin:
                return
        self.unjudged = False
        self.check(self.all_skipped, max(totals, default=loaded), reports[0]["unit"])

    def check(self, bad: Mapping[str, str], total: int, unit: str = "files") -> None:
        """Check the share of the bad files.

        Args:
            bad: reasons by path.
            total: number of good and bad ones.
            unit: "files" or "items".

        Raises:
            ValueError: the share is above ``max_bad``; the message lists the files.
        """
        if bad and len(bad) / max(total, len(bad)) > self.max_bad:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in sorted(bad.items()))
            raise ValueError(
                f"{len(bad)} of {total} {unit} are bad, more than the {self.max_bad:.1%} that may "
                f"be skipped:\n{listed}"
            )


class LoadedBatch(NamedTuple):
    """A batch, as the process that loaded it returns it."""

    batch: Any  # None without a good item.
    items: int  # Number of requested items.
    reports: list[tuple[str, str]]  # Paths and reasons of bad files.


class ReportingCollate:
    """Collate function that also returns a worker's reports of an `IterableDataset`."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: Any) -> LoadedBatch:
        batch = self.collate_fn(items)
        reports = _loading.bad.copy()
        _loading.bad.clear()
        return LoadedBatch(batch, count_examples(batch) + len(reports), reports)


@dataclass(eq=False)
class BatchDataset(Dataset[Any]):
    """Dataset of batches from a dataset of items; copied to every worker."""

    dataset: Any
    collate_fn: Callable[[Any], Any]  # Joins a list of items; with ``single``, converts one item.
    seed: int  # Random seed of the run.
    train: bool  # True to replace a batch without a good item by its first good fallback item.
    single: bool  # True if an index stands for a whole batch.
    workers: int  # Number of worker processes.

    def __post_init__(self) -> None:
        # Index that each worker is loading, or -1; and that of the process without workers.
        self._current = torch.full((self.workers,), -1).share_memory_()
        self._own: Any = None
        self._epoch: int | None = None
        self._setters: list[Any] = []  # Parts of the dataset that have ``set_epoch``.
        self._held: list[Any] = []  # Random generators that the dataset holds.
        dataset = self.dataset
        while isinstance(dataset, Subset):  # A Subset always has `__getitems__`.
            dataset = dataset.dataset
        self._together = not self.single and getattr(dataset, "__getitems__", None) is not None

    def __getitem__(self, index: BatchIndex) -> LoadedBatch:
        """Load a batch."""
        self._set_epoch(index.epoch)
        with loading(self.seed, index.epoch) as reports:
            batch = self._load_batch(index)
        return LoadedBatch(batch, len(index.indices), reports)

    def count_files(self, indices: Sequence[Any]) -> tuple[int, str]:
        """Return the number of different files of items, and "files".

        For a dataset without a method ``count_files``, return that of different items, and "items".
        """
        dataset = self.dataset
        while isinstance(dataset, Subset) and not self.single:
            indices = [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        if (count_files := getattr(dataset, "count_files", None)) is not None:
            return int(count_files(indices)), "files"
        hashable = all(isinstance(index, Hashable) for index in indices)
        items = len(set(indices) if hashable else indices)
        # With ``single`` an index may stand for many items.
        return max(items, len(dataset)) if self.single else items, "items"

    def _set_epoch(self, epoch: int) -> None:
        """Set the epoch of the dataset; at each batch, since a worker may outlive an epoch."""
        begins, self._epoch = epoch != self._epoch, epoch
        if begins:
            parts = components(self.dataset)
            self._setters = [part for part in parts if hasattr(part, "set_epoch")]
            self._held = generators(self.dataset)
        for part in self._setters:
            if begins or _epoch_set_by.get(id(part)) is not self:
                part.set_epoch(epoch)
                _epoch_set_by[id(part)] = self

    def _load_batch(self, index: BatchIndex) -> Any:
        if get_worker_info() is not None:  # The main process uses its own generators, as in torch.
            reseed(derive(self.seed, "batch", index.epoch, index.number))
        for generator in self._held:
            seed_generator(generator, derive(self.seed, "held", index.epoch, index.number))
        items = self._load_together(index.indices) if self._together else None
        if items is None:
            items = self._load(index.indices)
        if not items and self.train:
            items = self._load_fallback(index)
        if not items:
            return None
        self._note(None)
        try:
            return self.collate_fn(items[0] if self.single else items)
        except Exception as error:
            error.add_note(f"while joining {self._names(index.indices)} to a batch")
            raise

    def _load_together(self, indices: Sequence[Any]) -> Any:
        """Load all items by the dataset's ``__getitems__``; return None if one of them is bad."""
        if len(indices):
            self._note(indices[0])
        try:
            items = self.dataset.__getitems__(indices)
            bad = isinstance(items, list) and any(item is None for item in items)
            return None if bad else items  # Loading one by one reports each bad item.
        except BadItem:
            _loading.bad.clear()
            return None
        except Exception as error:
            self._load(indices)  # Usually raises the same error, with the name of the item.
            error.add_note(f"while loading {self._names(indices)}")
            raise

    def _load(self, indices: Iterable[Any]) -> list[Any]:
        """Load items one by one, and report the bad ones."""
        dataset, items = self.dataset, []
        for index in indices:
            self._note(index)
            try:
                item = dataset[index]
            except BadItem as bad:
                report_bad(bad.path, bad.reason)
                continue
            except Exception as error:
                error.add_note(f"while loading {self._names([index])}")
                raise
            if item is None:
                report_bad(self._names([index]), "the dataset returned None")
            else:
                items.append(item)
        return items

    def _note(self, index: Any) -> None:
        """Record the index that this process loads, for messages about a hang."""
        worker = get_worker_info()
        if worker is None:
            self._own = index
        else:
            self._current[worker.id] = int(index) if isinstance(index, Integral) else -1

    def _load_fallback(self, batch: BatchIndex) -> list[Any]:
        """Load the first good fallback item, so that ranks keep equally many batches."""
        reports = _loading.bad.copy()
        for index in batch.fallback_indices:
            items = self._load([index])
            _loading.bad[:] = reports  # Bad fallback items are reported with their own batches.
            if items:
                return items
        listed = "; ".join(f"{path}: {reason}" for path, reason in reports)
        raise ValueError(
            f"epoch {batch.epoch}: neither a batch nor the {len(batch.fallback_indices)} items "
            f"after it have a good item ({listed})"
        )

    def describe_loading(self) -> str:
        """Describe the items that are being loaded, as the end of an error message."""
        what = "loaded a batch with" if self._together else "loaded"
        busy = [(worker, item) for worker, item in enumerate(self._current.tolist()) if item >= 0]
        named = [f"worker {worker} {what} {self._names([item])}" for worker, item in busy[:8]]
        if not len(self._current) and self._own is not None:
            named = [f"this process {what} {self._names([self._own])}"]
        return f" while {', '.join(named)}" if named else ""

    def _names(self, indices: Iterable[Any]) -> str:
        """Return the names of up to 8 items, from the dataset's ``name_of(index)`` if any."""
        name_of = getattr(self.dataset, "name_of", repr)
        shown = [str(name_of(index))[:200] for index in islice(indices, 9)]
        word = "item " if len(shown) == 1 else "items "
        return word + ", ".join(shown[:8]) + (" …" if len(shown) > 8 else "")


class DealtItems(IterableDataset[Any]):
    """Items of an `IterableDataset`, each given to one process; copied to every worker.

    Every rank and worker reads all items and keeps its share, unless the dataset splits its items
    itself: among workers if it reads ``num_workers`` of torch's `get_worker_info`, among ranks if
    `knows_ranks` says so. Its attributes ``splits_by_worker`` and ``splits_by_rank``, True or
    False, override this. The global generators are seeded for each dealt item, so that a dataset
    that shuffles with them has the same order in all processes. In training the last items are left
    out if there are fewer of them than ranks. One worker loads all items of a batch, so that the
    batches are those of a process without workers; ``batch_size`` is None if an item is a batch.
    """

    def __init__(
        self, dataset: Any, train: bool, rank: int, world_size: int, batch_size: int | None
    ) -> None:
        self.dataset, self.train = dataset, train
        self._batch_size = batch_size or 1
        # True if all ranks get equally many items in training.
        self.equal = world_size == 1 or not knows_ranks(dataset)
        self._rank, self._world = (rank, world_size) if self.equal else (0, 1)
        self._by_worker: bool | None = getattr(dataset, "splits_by_worker", None)
        self._workers = 1
        self._asked: set[str] = set()  # Attributes of `get_worker_info` that the dataset has read.
        self._position = 0  # Number of items read.
        self._start = 0  # Position at which the next iteration starts.
        self.ended = False  # All items are read, even if the last ones wait for their batch.
        self.resumable = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        if rank or world_size == 1 or hasattr(dataset, "splits_by_rank"):
            return
        if self.equal:
            logger.warning(
                "each of %d ranks reads all items of %s and keeps its share; a dataset with the "
                "attribute splits_by_rank = True gives each rank items of its own",
                world_size, type(dataset).__name__,
            )  # fmt: skip
        else:
            logger.info(
                "%s gives each of %d ranks items of its own, since it asks for its rank; with the "
                "attribute splits_by_rank = False its items are dealt among them",
                type(dataset).__name__, world_size,
            )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of this rank's items.

        Raises:
            TypeError: the dataset has no length.
        """
        size = len(self.dataset)
        return size // self._world if self.train else len(range(self._rank, size, self._world))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        position, self._start, self.ended = self._start, 0, False
        last = self._world - 1 if self.train else self._rank  # Yield once its item is read.
        self._seed(position, number)
        self._asked.discard("id")
        items, own = iter(self.dataset), None
        while True:
            self._seed(position, number)
            reports = len(_loading.bad)
            item = next(items, _END)
            round_, place = divmod(position, self._world)
            turn = round_ // self._batch_size % self._workers
            keeps = self._splits_by_worker or turn == number
            if not (keeps and place == self._rank):
                del _loading.bad[reports:]  # Another process reports them.
            elif item is None:
                report_bad(f"item {position} of {type(self.dataset).__name__}", "it is None")
            if item is _END:
                break
            if item is None:
                continue
            position = self._position = position + 1
            own = item if place == self._rank else own
            if keeps and place == last:
                yield own
        self._position, self.ended = 0, True
        asked_id = "id" in self._asked and "num_workers" not in self._asked
        if number == 0 and asked_id and self._by_worker is None:
            logger.warning(
                "%s asks for the id of its worker, and not for the number of workers: its items "
                "are dealt among the workers, as with the attribute splits_by_worker = False. If "
                "each worker reads items of its own, most are lost so: set it to True",
                type(self.dataset).__name__,
            )
        if self.train and (left := position % self._world) and self._rank == 0 == number:
            logger.info("the epoch leaves out its last %d items: too few for all ranks", left)

    @property
    def _splits_by_worker(self) -> bool:
        return "num_workers" in self._asked if self._by_worker is None else self._by_worker

    def _seed(self, position: int, worker: int) -> None:
        """Seed the global generators for an item, equally in all processes that read it."""
        if self._world > 1 or (self._workers > 1 and not self._by_worker):
            own = worker if self._splits_by_worker else 0
            reseed(derive(_loading.seed, "stream", _loading.epoch, position, own))

    def watch_worker(self) -> None:
        """Record in this worker the attributes of `get_worker_info` that the dataset reads."""
        info = get_worker_info()
        assert info is not None
        dealt, self._workers = self, info.num_workers

        class Watched(type(info)):  # type: ignore[misc]
            __slots__ = ()

            def __getattribute__(self, name: str) -> Any:
                dealt._asked.add(name)
                return dealt.dataset if name == "dataset" else super().__getattribute__(name)

        object.__setattr__(info, "__class__", Watched)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the dataset, in a process without workers."""
        return {"position": self._position, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at a saved position."""
        self._start = self._position = state["position"]
        self.dataset.load_state_dict(state["dataset"])
