"""Which items make which batch of an epoch, on which rank, and with what randomness.

The order of an epoch is a function of (seed, epoch) alone: not of the number of workers, of where a
run was resumed, or of what else has drawn random numbers. Only indices are handled here; nothing is
loaded, so that skipping to the middle of an epoch costs next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch

from trainer.seed import Private, derive

logger = logging.getLogger("trainer.data")

SPARES = 16  # Among so many items that follow a batch, at least one can be expected to be good.


def parts(source: Any) -> list[Any]:
    """A loader or sampler and what it is made of: its sampler, batch sampler, dataset."""
    found: list[Any] = []
    names = ("sampler", "batch_sampler", "dataset")
    waiting = [source]
    while waiting:
        part = waiting.pop(0)
        if part is not None and not any(part is other for other in found):
            found.append(part)
            waiting += [getattr(part, name, None) for name in names]
    return found


def set_epoch(source: Any, epoch: int) -> None:
    """Tell the epoch to every part of ``source`` that wants to know it."""
    for part in parts(source):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def generators(source: Any) -> list[torch.Generator]:
    """The generators that the parts of ``source`` hold."""
    held = [getattr(part, "generator", None) for part in parts(source)]
    return list({id(each): each for each in held if isinstance(each, torch.Generator)}.values())


class Shuffled:
    """Every index once an epoch, in an order from (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        return iter(torch.randperm(self.size, generator=generator).tolist())


class Task(NamedTuple):
    """What a worker gets: the items of one batch."""

    epoch: int
    number: int  # of the batch in the epoch, counted over all ranks
    indices: Sequence[Any]
    spares: Sequence[Any]  # what may stand in if none of them is good


class Plan:
    """The batches of each epoch for one rank.

    ``sampler`` yields indices, which are joined to batches of ``batch_size``; or, with
    ``batch_size=None``, whatever a dataset understands as one batch; or, with ``batched``, lists of
    indices.

    In training all ranks get equally many batches: of every ``world_size`` batches one each, and
    the items of the last, incomplete round are dealt evenly (those too few to give each rank one
    are dropped). So ranks see together what one process sees with ``world_size`` times the batch.
    In evaluation every item is dealt exactly once, and ranks may differ by one batch.
    A sampler that knows its rank (``DistributedSampler``, lhotse's) is taken at its word.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        batch_size: int | None,
        batched: bool = False,
        drop_last: bool = False,
        *,
        train: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.sampler, self.batch_size, self.batched = sampler, batch_size, batched
        self.drop_last, self.train, self.seed = drop_last, train, seed
        self.rank, self.world_size = rank, world_size
        self.ranks_dealt = 1 if _deals_to(sampler, world_size) == world_size else world_size
        self.epoch, self.start = 0, 0
        self._known: tuple[int, list[Sequence[Any]]] | None = None
        self._told = False

    def set_epoch(self, epoch: int) -> None:
        """Later iterations give this epoch's batches."""
        self.epoch = epoch
        set_epoch(self.sampler, epoch)

    def __len__(self) -> int:
        """Batches of this rank in the current epoch. TypeError when the sampler has no length."""
        len(self.sampler)  # type: ignore[arg-type]  # the TypeError is the answer
        return len(self._all())

    def __iter__(self) -> Iterator[Task]:
        """The batches of the epoch from batch ``start`` on; ``start`` is then 0 again."""
        start, self.start = self.start, 0
        sized = hasattr(self.sampler, "__len__")
        batches: Iterable[Sequence[Any]] = self._all() if sized else self._rounds()
        if sized and start > len(self._all()):
            raise ValueError(
                f"epoch {self.epoch} has {len(self._all())} batches, so that it cannot start at "
                f"batch {start}: have the data changed?"
            )
        items = list(chain.from_iterable(self._all())) if sized and self.train else []
        passed = 0
        for number, batch in enumerate(batches):
            passed += len(batch)
            if number >= start:
                ahead = [items[(passed + k) % len(items)] for k in range(SPARES)] if items else []
                yield Task(self.epoch, number * self.world_size + self.rank, batch, ahead)

    def _all(self) -> list[Sequence[Any]]:
        """This rank's whole epoch, worked out once."""
        if self._known is None or self._known[0] != self.epoch:
            with self._private():
                order = list(self.sampler)
            self._known = self.epoch, list(self._deal(order))
            if self.train and not self._known[1]:
                raise ValueError(
                    f"{len(order)} {'batches' if self.batch_size is None else 'items'} are too few "
                    f"to train {self.world_size} processes (batch_size={self.batch_size}, "
                    f"drop_last={self.drop_last})"
                )
        return self._known[1]

    def _rounds(self) -> Iterator[Sequence[Any]]:
        """The same, a round of all ranks at a time, for samplers that may never end."""
        private = self._private()
        with private:
            # Not `iter` alone: lhotse's samplers are their own iterators, and start over each time
            # that somebody (islice below) asks them for one.
            iterator = (each for each in self.sampler)
        size = self.ranks_dealt * (self.batch_size or 1)
        while True:
            with private:
                order = list(islice(iterator, size))
            if not order:
                return
            yield from self._deal(order)

    def _private(self) -> Private:
        return Private(derive(self.seed, "sampler", self.epoch), generators(self.sampler))

    def _deal(self, order: list[Any]) -> Iterator[Sequence[Any]]:
        """This rank's batches out of all."""
        world, size = self.ranks_dealt, self.batch_size
        rank = self.rank if world > 1 else 0
        if size is not None:
            full = len(order) // size * size
            batches = [order[i : i + size] for i in range(0, full, size)]
            rest = [] if self.drop_last else order[full:]
        else:
            batches, rest = order if self.batched else [[index] for index in order], []
        if not self.train:
            yield from [*batches, rest][rank::world] if rest else batches[rank::world]
            return
        whole = len(batches) // world * world
        yield from batches[rank:whole:world]
        yield from self._share(list(chain(*batches[whole:], rest)), rank, world)

    def _share(self, rest: list[Any], rank: int, world: int) -> Iterator[Sequence[Any]]:
        """This rank's share of the last, incomplete round."""
        splits = self.batched or self.batch_size is not None
        if splits and not self.drop_last and len(rest) >= world:
            yield rest[rank * len(rest) // world : (rank + 1) * len(rest) // world]
        elif rest and not self._told:
            self._told = True
            what = "items" if splits else "batches"
            logger.info(
                "each epoch leaves out its last %d %s: too few for all ranks", len(rest), what
            )


def _deals_to(sampler: Any, world_size: int) -> int:
    """Among how many ranks the sampler itself deals; ValueError when those are not the run's."""
    for part in parts(sampler):
        dealt = getattr(part, "num_replicas", None) or getattr(part, "world_size", None)
        if dealt is not None and hasattr(part, "rank"):
            if dealt not in (1, world_size):
                raise ValueError(
                    f"the sampler {type(part).__name__} deals to {dealt} ranks; "
                    f"the run has {world_size}"
                )
            return int(dealt)
    return 1


class Stream:
    """Any iterable of batches with the manners of a `Loader`: made by `resumable`."""

    def __init__(self, source: Iterable[Any], seed: int = 0) -> None:
        self._source, self._seed = source, seed
        self._epoch, self._start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Later iterations give this epoch; sampler and dataset are told if they ask to be."""
        self._epoch = epoch
        set_epoch(self._source, epoch)

    def skip(self, batches: int) -> None:
        """The next iteration starts at this batch; those before it are made and thrown away."""
        self._start = batches

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]  # TypeError where there is no length

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        if isinstance(self._source, list | tuple):
            yield from self._source[start:]
            return
        private = Private(derive(self._seed, "stream", self._epoch), generators(self._source))
        with private:
            iterator = iter(self._source)
        for number in count():
            with private:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            if number >= start:
                yield batch
