"""Batches for the loop: from whatever `fit` was given, on the run's device, from any batch on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer import distributed
from trainer.data import Stream, parts, resumable


def move(batch: Any, device: torch.device) -> Any:
    """The batch on ``device``: tensors, lists, tuples, mappings of them, and whatever has ``to``.

    Copies from page-locked memory do not wait.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


class Feed:
    """A stage's batches, epoch by epoch.

    Args:
        loader: a `trainer.data` Loader, or its Stream around some other iterable.
        device: where batches go.
        train: whether ranks must get equally many batches.
        limit: at most so many batches an epoch; 0 for all.
        repeat: give the first so many batches again and again; 0 for a usual epoch.
        deals: whether batches are dealt to ranks here, the loader knowing nothing of ranks.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        train: bool,
        limit: int = 0,
        repeat: int = 0,
        deals: bool = False,
    ) -> None:
        self.loader, self.device, self.train = loader, device, train
        self.limit, self.repeat, self._deals = limit, repeat, deals
        self._fixed: list[Any] | None = None

    def length(self) -> int | None:
        """Batches of an epoch on this rank, where that is known."""
        try:
            size = len(self._fixed if self._fixed is not None else self.loader)
        except TypeError:
            return None
        if self._deals and self._fixed is None:
            rank, world = distributed.rank(), distributed.world_size()
            size = size // world if self.train else len(range(rank, size, world))
        for most in (self.limit, self.repeat):
            size = min(size, most) if most else size
        return size

    def begin(self, epoch: int) -> int | None:
        """Be ready for an epoch; its number of batches, where that is known."""
        self.loader.set_epoch(epoch)
        return self.length()

    def from_batch(self, epoch: int, start: int) -> Iterator[tuple[Any, bool]]:
        """The epoch's batches from ``start`` on; with each, whether it is known to be the last."""
        if self.repeat and self._fixed is None:
            self.loader.set_epoch(1)
            self._fixed = list(islice(self._batches(0), self.repeat))
        self.loader.set_epoch(epoch)
        size, number = self.length(), start
        batches = islice(self._fixed, start, None) if self._fixed else self._batches(start)
        on_host = self.device.type == "cpu"
        for batch in batches:
            number += 1
            yield (batch if on_host else move(batch, self.device)), number == size
            if number == self.limit:
                return

    def _batches(self, start: int) -> Iterator[Any]:
        """This rank's batches."""
        world = distributed.world_size() if self._deals else 1
        self.loader.skip(start * world)
        if world == 1:
            yield from self.loader
            return
        iterator = iter(self.loader)
        while batches := list(islice(iterator, world)):
            if len(batches) == world or (not self.train and distributed.rank() < len(batches)):
                yield batches[distributed.rank()]


def feed(brain: Any, source: Any, train: bool, stage: Any, options: Mapping[str, Any]) -> Feed:
    """A `Feed` for what was given to ``fit`` or ``evaluate``: a Dataset, a DataLoader, an iterable.

    Raises ValueError for anything else, and for loader options beside something that is no Dataset.
    """
    run = brain.options
    if isinstance(source, Dataset) and not isinstance(source, DataLoader):
        loader: Any = brain.make_dataloader(source, stage, **options)
    elif options:
        raise ValueError(
            f"loader options {sorted(options)} were given for the {stage.value} set, but a "
            f"{type(source).__name__} is no Dataset: they would be ignored"
        )
    elif isinstance(source, Iterable):
        loader = source
    else:
        raise ValueError(
            f"the {stage.value} set is a {type(source).__name__}; allowed: a Dataset, a DataLoader "
            "or any iterable of batches"
        )
    loader = resumable(
        loader,
        seed=run.seed,
        train=train,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    limit = run.debug_batches if run.debug else 0
    repeat = run.overfit_batches if train else 0
    deals = isinstance(loader, Stream) and not _knows_ranks(source)
    return Feed(loader, brain.device, train, limit, repeat, deals)


def _knows_ranks(source: Any) -> bool:
    """Whether a loader, or what it is made of, gives each rank a part of its own."""
    names = ("rank", "num_replicas")
    return any(
        isinstance(part, IterableDataset) or any(hasattr(part, name) for name in names)
        for part in parts(source)
    )
