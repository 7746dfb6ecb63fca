"""Items of a dataset, loaded in a worker: their random numbers, bad items, and joining a batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from trainer.data.batch_sampler import BatchIndex, set_epoch
from trainer.seed import derive, fork_rng, reseed

logger = logging.getLogger("trainer.data")


class BadItem(ValueError):
    """Error that a dataset raises for an item that cannot be used; see `make_loader`.

    Args:
        path: file, or other name, of the item.
        reason: cause, for the log.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


@dataclass
class _Loading:
    """State of loading in this process: a worker, or the main process without workers."""

    seed: int = 0
    epoch: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) in this batch


_loading = _Loading()


def item_generator(item: str) -> torch.Generator:
    """Return a random generator for one item, for use inside a dataset.

    The global generators are seeded for each index already. This serves datasets whose index is a
    whole batch.

    Args:
        item: name of the item.

    Returns:
        A generator on the CPU, seeded by the run's seed, the epoch and ``item``. Outside of a
        loader, seed and epoch are 0.
    """
    return torch.Generator().manual_seed(derive(_loading.seed, "item", _loading.epoch, item))


def report_bad(path: str | os.PathLike[str], reason: str) -> None:
    """Report an item that a dataset left out of the batch it is loading.

    It is logged and counted as a `BadItem` is.

    Args:
        path: file, or other name, of the item.
        reason: cause, for the log.
    """
    _loading.bad.append((str(path), reason))


@dataclass
class BadItemPolicy:
    """Policy for bad items: log, count and skip them, or end the run.

    Args:
        on_bad: "skip", or "raise" to end the run at the first bad item.
        max_bad: share of the items that may be bad, between 0 and 1.
        items: number of items of an epoch on this rank.

    Attributes:
        skipped: reasons by path, of the bad items in the current epoch.

    Raises:
        ValueError: ``on_bad`` is neither "skip" nor "raise".
    """

    on_bad: str
    max_bad: float
    items: float

    def __post_init__(self) -> None:
        if self.on_bad not in ("skip", "raise"):
            raise ValueError(f"on_bad must be 'skip' or 'raise', got {self.on_bad!r}")
        self._logged: set[str] = set()
        self.start_epoch()

    def start_epoch(self) -> None:
        """Reset the count of bad items."""
        self._count = 0
        self.skipped: dict[str, str] = {}

    def handle(self, reports: Iterable[tuple[str, str]]) -> None:
        """Log and count bad items; each path is logged once.

        Args:
            reports: paths and reasons.

        Raises:
            BadItem: for the first of them, where ``on_bad`` is "raise".
            ValueError: more than the share ``max_bad`` of the epoch's items is bad.
        """
        for path, reason in reports:
            if self.on_bad == "raise":
                raise BadItem(path, reason)
            if path not in self._logged:
                logger.warning("skipped %s: %s", path, reason)
            self._logged.add(path)
            self.skipped[path] = reason
            self._count += 1
        if self._count > self.max_bad * self.items:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in self.skipped.items())
            raise ValueError(
                f"{self._count} of {self.items:g} items are bad, more than the {self.max_bad:.1%} "
                f"that may be skipped:\n{listed}"
            )


class BatchDataset(Dataset[Any]):
    """Dataset of batches over a dataset of items; copied to every worker.

    Args:
        dataset: dataset of items.
        collate_fn: joins a list of items to a batch; with ``single``, converts one item.
        seed: random seed of the run.
        train: True to replace a batch without a good item by its first good fallback item.
        single: True where an index stands for a whole batch.
        workers: number of worker processes.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        seed: int,
        train: bool,
        single: bool,
        workers: int,
    ) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn
        self.seed, self.train, self.single = seed, train, single
        # The index that each worker is loading, or -1.
        self._current = torch.full((workers,), -1).share_memory_()
        self._epoch: int | None = None

    def __getitem__(self, index: BatchIndex) -> tuple[Any, list[tuple[str, str]]]:
        """Load a batch.

        Returns:
            The batch, None if it has no good item; and its bad items as (path, reason).
        """
        if index.epoch != self._epoch:  # Set here, since a worker may outlive the epoch.
            self._epoch = index.epoch
            set_epoch(self.dataset, index.epoch)
        _loading.seed, _loading.epoch, _loading.bad = self.seed, index.epoch, []
        # The main process keeps its random numbers for training.
        with fork_rng() if get_worker_info() is None else nullcontext():
            items = self._load(index.indices, index)
            if not items and self.train:
                items = self._load_fallback(index)
            if not items:
                return None, _loading.bad
            reseed(derive(self.seed, "batch", index.epoch, index.number))
            self._publish(None)
            try:
                return self.collate_fn(items[0] if self.single else items), _loading.bad
            except Exception as error:
                error.add_note(f"while joining {self._names(index.indices)} to a batch")
                raise

    def _load(self, indices: Iterable[Any], batch: BatchIndex) -> list[Any]:
        """Load items, and report the bad ones."""
        items = []
        for position, index in enumerate(indices):
            if isinstance(index, Integral | str):
                name: tuple[int | str, ...] = (index if isinstance(index, str) else int(index),)
            else:
                name = ("at", batch.number, position)
            reseed(derive(self.seed, "item", batch.epoch, *name))
            self._publish(index)
            try:
                items.append(self.dataset[index])
            except BadItem as bad:
                report_bad(bad.path, bad.reason)
            except Exception as error:
                error.add_note(f"while loading {self._names([index])}")
                raise
        return items

    def _load_fallback(self, batch: BatchIndex) -> list[Any]:
        """Load the first good fallback item, so that ranks keep equally many batches."""
        reports = _loading.bad.copy()
        for index in batch.fallback_indices:
            items = self._load([index], batch)
            _loading.bad[:] = reports  # Bad fallback items are reported with their own batch.
            if items:
                return items
        listed = "; ".join(f"{path}: {reason}" for path, reason in reports)
        raise ValueError(
            f"epoch {batch.epoch}: neither a batch nor the {len(batch.fallback_indices)} items "
            f"after it have a good item ({listed})"
        )

    def _publish(self, index: Any) -> None:
        worker = get_worker_info()
        if worker is not None:
            self._current[worker.id] = int(index) if isinstance(index, Integral) else -1

    def describe_loading(self) -> str:
        """Return the items that workers are loading, as the end of an error message."""
        items = [index for index in self._current.tolist() if index >= 0]
        return f" while workers loaded {self._names(items)}" if items else ""

    def _names(self, indices: Iterable[Any]) -> str:
        """Return the names of up to 8 items, by the dataset's method ``name_of(index)`` if any."""
        name_of = getattr(self.dataset, "name_of", repr)
        shown = [str(name_of(index))[:200] for index in islice(indices, 9)]
        word = "item " if len(shown) == 1 else "items "
        return word + ", ".join(shown[:8]) + (" …" if len(shown) > 8 else "")
