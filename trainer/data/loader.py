"""From a dataset to batches that do not depend on who loads them.

`make_loader` wraps torch's DataLoader such that the order comes from (seed, epoch) alone, the
randomness of each item from (seed, epoch, item), ranks get disjoint and equally many batches, an
epoch can be entered in its middle, and an item that cannot be read is named, skipped and counted.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from numbers import Integral
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from trainer.data import workers
from trainer.data.batch import collate
from trainer.data.items import BadItem, Policy, note, now, report_bad
from trainer.data.order import Plan, Shuffled, Stream, Task, set_epoch
from trainer.seed import derive, reseed, shielded


class _Items(Dataset[Any]):
    """A dataset of batches around the user's dataset of items; what workers hold."""

    def __init__(
        self, dataset: Any, join: Callable[[Any], Any], seed: int, train: bool, single: bool
    ) -> None:
        self.dataset, self.join = dataset, join
        self.seed, self.train, self.single = seed, train, single
        self.board = torch.empty(0)  # In shared memory: which item each worker is loading.
        self._epoch: int | None = None

    def __getitem__(self, task: Task) -> tuple[Any, list[tuple[str, str]]]:
        """The batch (None when nothing in it is good) and its bad items as (path, reason)."""
        if task.epoch != self._epoch:  # Here, since a worker may outlive the epoch.
            self._epoch = task.epoch
            set_epoch(self.dataset, task.epoch)
        now.seed, now.epoch, now.bad = self.seed, task.epoch, []
        # In the main process, what an item draws must not be missing from the training's own.
        with shielded() if get_worker_info() is None else nullcontext():
            items = self._load(task.indices, task) or (self._stand_in(task) if self.train else [])
            if not items:
                return None, now.bad
            reseed(derive(self.seed, "batch", task.epoch, task.number))
            self._announce(None)
            try:
                return self.join(items[0] if self.single else items), now.bad
            except Exception as error:
                note(error, f"while joining {self._names(task.indices)} to a batch")
                raise

    def _load(self, indices: Iterable[Any], task: Task) -> list[Any]:
        """The good ones of some items."""
        items = []
        for position, index in enumerate(indices):
            if isinstance(index, Integral | str):
                name: tuple[int | str, ...] = (index if isinstance(index, str) else int(index),)
            else:
                name = ("at", task.number, position)
            reseed(derive(self.seed, "item", task.epoch, *name))
            self._announce(index)
            try:
                items.append(self.dataset[index])
            except BadItem as bad:
                report_bad(bad.path, bad.reason)
            except Exception as error:
                note(error, f"while loading {self._names([index])}")
                raise
        return items

    def _stand_in(self, task: Task) -> list[Any]:
        """The next good item of the epoch: no rank may have fewer batches than the others."""
        reports = now.bad.copy()
        for index in task.spares:
            items = self._load([index], task)
            now.bad[:] = reports  # Bad spares are reported with the batch that they belong to.
            if items:
                return items
        listed = "; ".join(f"{path}: {reason}" for path, reason in reports)
        raise ValueError(
            f"epoch {task.epoch}: neither a batch nor the {len(task.spares)} items after it have "
            f"a good item ({listed})"
        )

    def _announce(self, index: Any) -> None:
        worker = get_worker_info()
        if worker is not None:
            self.board[worker.id] = int(index) if isinstance(index, Integral) else -1

    def being_loaded(self) -> str:
        """What the workers were busy with when one of them died or hung."""
        items = [index for index in self.board.tolist() if index >= 0]
        return f" while workers loaded {self._names(items)}" if items else ""

    def _names(self, indices: Iterable[Any]) -> str:
        """Items in words; a dataset may tell more by a method ``name_of(index) -> str``."""
        name_of = getattr(self.dataset, "name_of", repr)
        shown = [str(name_of(index))[:200] for index in islice(indices, 9)]
        word = "item " if len(shown) == 1 else "items "
        return word + ", ".join(shown[:8]) + (" …" if len(shown) > 8 else "")


class Loader:
    """Batches of a dataset, epoch by epoch; made by `make_loader`."""

    def __init__(self, items: _Items, plan: Plan, policy: Policy, options: dict[str, Any]) -> None:
        self._items, self._plan, self._policy = items, plan, policy
        self._closing = torch.zeros(1, dtype=torch.bool).share_memory_()
        weakref.finalize(self, self._closing.fill_, True)  # At the interpreter's exit too.
        items.board = torch.full((options.get("num_workers", 0),), -1).share_memory_()
        self._timeout = options.pop("timeout", 0)
        own_start = options.pop("worker_init_fn", None)
        self._make = partial(
            DataLoader,
            items,
            sampler=plan,
            batch_size=None,
            collate_fn=_as_it_is,
            # Without a generator of its own, DataLoader draws from the global one.
            generator=torch.Generator().manual_seed(derive(items.seed, "workers")),
            worker_init_fn=partial(workers.start, self._closing, own_start),
            **options,
        )
        self._loader: DataLoader[Any] = self._make()

    @property
    def bad(self) -> dict[str, str]:
        """The items skipped in this epoch on this rank: path → reason."""
        return dict(self._policy.skipped)

    def set_epoch(self, epoch: int) -> None:
        """Later iterations give this epoch. In evaluation all epochs are alike."""
        self._plan.set_epoch(epoch if self._plan.train else 0)

    def skip(self, batches: int) -> None:
        """The next iteration starts at this batch, and loads none of those before it."""
        self._plan.start = batches

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Any]:
        self._policy.new_epoch()
        self._closing.fill_(False)
        first = self._plan.start
        watched = workers.Watched(iter(self._loader), self._timeout)
        try:
            for number in count(first):
                loaded = watched.next(partial(self._doing, number))
                if loaded is None:
                    return
                batch, reports = loaded
                self._policy.judge(reports)
                if batch is not None:
                    yield batch
        except BaseException:  # GeneratorExit too: the epoch was left early.
            self._closing.fill_(True)
            watched.close()
            self._loader = self._make()
            raise

    def _doing(self, number: int) -> str:
        busy = self._items.being_loaded()
        return f"waiting for batch {number} of epoch {self._plan.epoch}{busy}"


def _as_it_is(loaded: Any) -> Any:
    return loaded


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
    """Turn a dataset and DataLoader's options into a loader of this rank's batches.

    ``batch_size`` is that of one process. ``shuffle`` is on in training unless a sampler is given.
    Samplers of any kind are wrapped: they get the epoch, and draw from a stream of their own. Items
    that are mappings become a `Batch`, unless ``collate_fn`` says otherwise.

    A dataset raises `BadItem` for an item that cannot be used: with ``on_bad="skip"`` it is left
    out and logged, until more than the share ``max_bad`` of the items is bad; with ``"raise"`` it
    ends the run. In training a batch without a good item gets the next good one instead.

    An ``IterableDataset`` gives less: it deals among ranks and workers by itself. See `resumable`.
    """
    known = set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset"}
    if unknown := set(options) - known:
        raise ValueError(f"unknown loader options {sorted(unknown)}; known are {sorted(known)}")
    if options.get("num_workers", 0) == 0:  # Options about workers mean nothing without any.
        for name in ("timeout", "persistent_workers", "prefetch_factor", "worker_init_fn"):
            options.pop(name, None)
    options["pin_memory"] = options.get("pin_memory", False) and torch.accelerator.is_available()
    if isinstance(dataset, IterableDataset):
        return Stream(DataLoader(dataset, **options), seed)
    if not len(dataset):
        raise ValueError(f"the dataset {type(dataset).__name__} has no items")
    plan = _plan(dataset, options, train=train, seed=seed, rank=rank, world_size=world_size)
    single = plan.batch_size is None and not plan.batched
    join = options.pop("collate_fn", None) or (default_convert if single else _join)
    items = _Items(dataset, join, seed, train, single)
    return Loader(items, plan, Policy(on_bad, max_bad, len(dataset) / world_size), options)


def _plan(dataset: Any, options: dict[str, Any], **run: Any) -> Plan:
    """Take the options about order out of ``options``."""
    options.pop("generator", None)  # The order comes from (seed, epoch).
    shuffle, sampler = options.pop("shuffle", None), options.pop("sampler", None)
    batch_sampler = options.pop("batch_sampler", None)
    size, drop_last = options.pop("batch_size", 1), options.pop("drop_last", False)
    if sampler is not None and (shuffle or batch_sampler is not None):
        raise ValueError("a sampler excludes shuffle and batch_sampler: it says the order itself")
    if batch_sampler is not None:
        if shuffle or drop_last or size not in (1, None):
            raise ValueError("a batch_sampler excludes batch_size, shuffle and drop_last")
        return Plan(batch_sampler, None, batched=True, **run)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"batch_size must be a whole number, 1 or more, or None; got {size!r}")
    if sampler is None:
        shuffled = run["train"] if shuffle is None else shuffle
        sampler = Shuffled(len(dataset), run["seed"]) if shuffled else range(len(dataset))
    return Plan(sampler, size, drop_last=drop_last, **run)


def _join(items: list[Any]) -> Any:
    return collate(items) if isinstance(items[0], Mapping) else default_collate(items)


def resumable(source: Iterable[Any], seed: int = 0, **run: Any) -> Loader | Stream:
    """Give a DataLoader, or any iterable of batches, the manners of `make_loader`'s result.

    A plain DataLoader of a map-style dataset is taken apart and made anew by `make_loader`, which
    gets ``run`` (train, rank, world_size …). Other iterables run on random streams of their own,
    seeded by (seed, epoch), so that those that draw from the global generators are resumed exactly
    too; dealing among ranks is up to them.
    """
    if isinstance(source, Loader | Stream):
        return source
    if type(source) is not DataLoader or isinstance(source.dataset, IterableDataset):
        return Stream(source, seed)
    same = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
    options = {name: getattr(source, name) for name in (*same, "persistent_workers")}
    if source.num_workers:
        options["prefetch_factor"] = source.prefetch_factor
        options["multiprocessing_context"] = source.multiprocessing_context
    if source.batch_sampler is not None:
        options["batch_sampler"] = source.batch_sampler
    else:
        options |= {"sampler": source.sampler, "batch_size": None}
    return make_loader(source.dataset, seed=seed, **run, **options)
