"""Data feed: a stage's batches on the run's device, from any batch of an epoch on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer import distributed
from trainer.data.batch import to_device
from trainer.data.batch_sampler import components
from trainer.data.loader import Loader, Stream, resumable

if TYPE_CHECKING:
    from trainer.options import RunOptions


class DataFeed:
    """Batches of a stage, epoch by epoch.

    Args:
        loader: loader of the batches.
        device: device that the batches are moved to.
        train: True if ranks must get equally many batches.
        limit: maximum number of batches in an epoch; 0 for all.
        repeat: number of batches, the first of epoch 1, that make up every epoch; 0 for all.
        deal: True to give each rank its share of the batches here, for a loader that gives every
            rank the same.
    """

    def __init__(
        self,
        loader: Loader | Stream,
        device: torch.device,
        train: bool,
        limit: int = 0,
        repeat: int = 0,
        deal: bool = False,
    ) -> None:
        self.loader, self.device, self.train = loader, device, train
        self.limit, self.repeat = limit, repeat
        self._deal = deal
        self._fixed: list[Any] | None = None  # The batches that are repeated.

    def length(self) -> int | None:
        """Return the number of batches in an epoch on this rank; None where it is unknown."""
        try:
            size = len(self._fixed if self._fixed is not None else self.loader)
        except TypeError:
            return None
        if self._deal and self._fixed is None:
            rank, world = distributed.rank(), distributed.world_size()
            size = size // world if self.train else len(range(rank, size, world))
        for most in (self.limit, self.repeat):
            size = min(size, most) if most else size
        return size

    def begin(self, epoch: int) -> int | None:
        """Prepare an epoch, and return its number of batches; None where it is unknown."""
        self.loader.set_epoch(epoch)
        return self.length()

    def from_batch(self, epoch: int, start: int) -> Iterator[tuple[Any, bool]]:
        """Yield the batches of an epoch on the feed's device.

        Args:
            epoch: number of the epoch.
            start: number of batches to skip.

        Yields:
            A batch, and True if it is known to be the last of the epoch.
        """
        if self.repeat and self._fixed is None:
            self.loader.set_epoch(1)
            self._fixed = list(islice(self._batches(0), self.repeat))
        self.loader.set_epoch(epoch)
        size, number = self.length(), start
        batches = islice(self._fixed, start, None) if self._fixed else self._batches(start)
        on_host = self.device.type == "cpu"
        for batch in batches:
            number += 1
            yield (batch if on_host else to_device(batch, self.device)), number == size
            if number == self.limit:
                return

    def _batches(self, start: int) -> Iterator[Any]:
        """Yield this rank's batches."""
        world = distributed.world_size() if self._deal else 1
        self.loader.skip(start * world)
        if world == 1:
            yield from self.loader
            return
        iterator = iter(self.loader)
        while batches := list(islice(iterator, world)):
            if len(batches) == world or (not self.train and distributed.rank() < len(batches)):
                yield batches[distributed.rank()]


def make_feed(
    source: Any,
    *,
    train: bool,
    name: str,
    device: torch.device,
    options: RunOptions,
    make_loader: Callable[..., Any],
    loader_kwargs: Mapping[str, Any],
) -> DataFeed:
    """Make a data feed from a dataset, a DataLoader or any iterable of batches.

    Args:
        source: the data.
        train: True for training, False for evaluation.
        name: name of the stage in error messages, such as "valid".
        device: device that the batches are moved to.
        options: run options, of which seed, debug, debug_batches and overfit_batches are used.
        make_loader: called as ``make_loader(dataset, **loader_kwargs)`` for a dataset; returns a
            DataLoader or an iterable of batches.
        loader_kwargs: loader options, allowed for a dataset only.

    Raises:
        ValueError: ``source`` is nothing of the above, or is no dataset and there are loader
            options.
    """
    loader: Any
    if isinstance(source, Dataset) and not isinstance(source, DataLoader):
        loader = make_loader(source, **loader_kwargs)
    elif loader_kwargs:
        raise ValueError(
            f"loader options {sorted(loader_kwargs)} were given for the {name} set, but a "
            f"{type(source).__name__} is no Dataset: they would be ignored"
        )
    elif isinstance(source, Iterable):
        loader = source
    else:
        raise ValueError(
            f"the {name} set is a {type(source).__name__}; allowed: a Dataset, a DataLoader "
            "or any iterable of batches"
        )
    loader = resumable(
        loader,
        seed=options.seed,
        train=train,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    limit = options.debug_batches if options.debug else 0
    repeat = options.overfit_batches if train else 0
    deal = isinstance(loader, Stream) and not _knows_ranks(source)
    return DataFeed(loader, device, train, limit, repeat, deal)


def _knows_ranks(source: Any) -> bool:
    """Return True if a component of the data gives each rank its own part."""
    return any(
        isinstance(part, IterableDataset) or hasattr(part, "rank") or hasattr(part, "num_replicas")
        for part in components(source)
    )
