"""Order of the items of an epoch, and batches for each rank.

The order depends only on (seed, epoch): not on the number of workers, the point of resuming, or
other random draws. Samplers handle indices and load nothing, so that skipping to the middle of an
epoch costs next to nothing.
"""

from __future__ import annotations

import dis
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, IterDataPipe

from trainer.seed import derive, fork_rng, is_generator

logger = logging.getLogger("trainer.data")

# Names with which the code of a dataset reads its rank.
RANK_NAMES = frozenset({
    "rank", "world_size", "num_replicas", "get_rank", "get_world_size", "RANK", "WORLD_SIZE",
})  # fmt: skip
FALLBACKS = 16  # Items tried after a batch without a good one.


def components(source: Any) -> list[Any]:
    """Return a loader or sampler and its nested samplers, batch samplers and datasets."""
    found: list[Any] = []
    names = ("sampler", "batch_sampler", "dataset")
    waiting = [source]
    while waiting:
        part = waiting.pop(0)
        if part is not None and not any(part is other for other in found):
            found.append(part)
            waiting += [getattr(part, name, None) for name in names]
    return found


def knows_ranks(source: Any) -> bool:
    """Return True if a component of the data splits it among ranks.

    Its attribute ``splits_by_rank`` decides. Without one, a component splits if it, or an object in
    it, has a rank and a number of ranks, or if the code of an `IterableDataset`, or of one in it,
    reads them.
    """
    parts = components(source)
    for part in parts:  # The list grows in the loop.
        if isinstance(part, IterableDataset):
            for held in getattr(part, "__dict__", {}).values():
                if isinstance(held, IterableDataset) and not any(held is each for each in parts):
                    parts.append(held)
    declared = [bool(part.splits_by_rank) for part in parts if hasattr(part, "splits_by_rank")]
    return declared[0] if declared else any(_knows_ranks(part) for part in parts)


def _knows_ranks(part: Any) -> bool:
    if hasattr(part, "rank") or hasattr(part, "num_replicas") or isinstance(part, IterDataPipe):
        return True  # torch's DataLoader splits pipes.
    if any(
        hasattr(held, "rank") and (hasattr(held, "world_size") or hasattr(held, "num_replicas"))
        for held in getattr(part, "__dict__", {}).values()
    ):
        return True
    # Only attributes count in libraries: their code may read ranks and not use them.
    return isinstance(part, IterableDataset) and asks_for(part, RANK_NAMES, "-packages")


def asks_for(part: Any, names: frozenset[str], elsewhere: str = "") -> bool:
    """Return True if the code of an object's class, or a function that it calls, uses a name.

    Names are those of functions, attributes, variables of the environment, and arguments of the
    class. Files with ``elsewhere`` in their paths do not count.
    """

    def counts(function: Any) -> bool:
        if not isinstance(function, FunctionType) or str(function.__module__).startswith(
            "trainer."
        ):
            return False
        return not (elsewhere and elsewhere in function.__code__.co_filename)

    methods = [each for kind in type(part).__mro__ for each in vars(kind).values() if counts(each)]
    called = [
        method.__globals__.get(each.argval)
        for method in methods
        for each in dis.get_instructions(method)
        if each.opname == "LOAD_GLOBAL"
    ]
    codes = [function.__code__ for function in (*methods, *filter(counts, called))]
    found = {name for each in methods for name in inspect.signature(each).parameters}
    # The list grows in the loop: comprehensions and inner functions are constants.
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        found.update(code.co_names, (each for each in code.co_consts if isinstance(each, str)))
    return not names.isdisjoint(found)


def set_epoch(source: Any, epoch: int) -> None:
    """Call ``set_epoch`` of every component of a loader or sampler, if any."""
    for part in components(source):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def generators(source: Any) -> list[Any]:
    """Return the random generators of Python, NumPy and torch in components of the data."""
    held: list[Any] = []
    for part in components(source):
        held += [getattr(part, "generator", None), *getattr(part, "__dict__", {}).values()]
    return list({id(each): each for each in held if is_generator(each)}.values())


class ShuffledSampler:
    """Sampler of every index once an epoch, in an order that depends on (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch in later iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        return iter(torch.randperm(self.size, generator=generator).tolist())


class BatchIndex(NamedTuple):
    """Items of one batch, as a worker receives them."""

    epoch: int
    number: int  # Number of the batch in the epoch, over all ranks.
    indices: Sequence[Any]
    fallback_indices: Sequence[Any]  # Items to try in order if none of the batch is good.


class DistributedBatchSampler:
    """Batches of each epoch for one rank.

    Each rank gets one of every ``world_size`` batches. In training the items of the last,
    incomplete round are divided equally, or left out if there are fewer of them than ranks, so that
    all ranks get equally many batches, which together are those of one process with ``world_size``
    times the batch size. In evaluation every item is seen exactly once, and ranks may differ by one
    batch. A sampler that knows its rank (`DistributedSampler`, lhotse's) is used as it is.

    Args:
        sampler: yields indices of items; with ``batch_size=None``, indices that the dataset takes
            for a batch; with ``batched``, lists of indices.
        batch_size: items of a batch on one rank.
        batched: True for a sampler of whole batches.
        drop_last: leave out an incomplete batch.
        train, seed, rank, world_size: as those of `make_loader`.

    Attributes:
        start: batch at which the next iteration starts, which resets it to 0.
        ranks: number of ranks that the sampler itself splits its items among.

    Raises:
        ValueError: the sampler is set up for other ranks; on iteration, an epoch of training
            without a batch, or a ``start`` beyond the epoch's end.
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
        self.ranks = _ranks_of(sampler, world_size)
        self._ranks = 1 if self.ranks == world_size else world_size
        self.epoch, self.start = 0, 0
        self._cached: tuple[list[Any], list[Sequence[Any]]] = [], []
        self._cached_epoch: int | None = None
        self._warned = False

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations."""
        self.epoch = epoch
        set_epoch(self.sampler, epoch)

    def __len__(self) -> int:
        """Return this rank's batches in the current epoch.

        Raises:
            TypeError: the sampler has no length.
        """
        len(self.sampler)  # type: ignore[arg-type]  # Raises if the sampler has no length.
        return len(self._order_and_batches()[1])

    def __iter__(self) -> Iterator[BatchIndex]:
        start, self.start = self.start, 0
        batches: Iterable[Sequence[Any]] = self._rounds()
        ahead: list[Any] = []  # All items in order, then the first ones again, for fallbacks.
        if hasattr(self.sampler, "__len__"):
            _, batches = self._order_and_batches()
            if start > len(batches):
                raise ValueError(
                    f"epoch {self.epoch} has {len(batches)} batches, so that it cannot start at "
                    f"batch {start}: have the data changed?"
                )
            if self.train:
                items = list(chain.from_iterable(batches))
                ahead = list(islice(cycle(items), len(items) + FALLBACKS))
        passed = 0
        for number, batch in enumerate(batches):
            passed += len(batch)
            if number >= start:
                fallbacks = ahead[passed : passed + FALLBACKS]
                yield BatchIndex(self.epoch, number * self.world_size + self.rank, batch, fallbacks)

    def epoch_items(self) -> list[Any] | None:
        """Return the items of the current epoch on all ranks; None if they are not known yet.

        A sampler that knows its rank returns only those of this rank; see `ranks`.
        """
        if not hasattr(self.sampler, "__len__"):
            return None
        order, _ = self._order_and_batches()
        return list(chain.from_iterable(order)) if self.batched else order

    def _order_and_batches(self) -> tuple[list[Any], list[Sequence[Any]]]:
        """Return the epoch's items of all ranks, and this rank's batches."""
        if self._cached_epoch != self.epoch:
            with self._fork_rng():
                order = list(self.sampler)
            self._cached, self._cached_epoch = (order, self._split(order)), self.epoch
        order, batches = self._cached
        if self.train and not batches:
            raise ValueError(
                f"{len(order)} {'batches' if self.batch_size is None else 'items'} are too few "
                f"to train {self.world_size} processes (batch_size={self.batch_size}, "
                f"drop_last={self.drop_last})"
            )
        return order, batches

    def _rounds(self) -> Iterator[Sequence[Any]]:
        """Yield this rank's batches from a sampler without a length, which may be endless."""
        forked = self._fork_rng()
        with forked:
            # A generator, since lhotse's samplers start over at each call of `iter`, as by `islice`
            # below.
            iterator = (each for each in self.sampler)
        size = self._ranks * (self.batch_size or 1)
        while True:
            with forked:
                order = list(islice(iterator, size))
            if not order:
                return
            yield from self._split(order)

    def _fork_rng(self) -> fork_rng:
        return fork_rng(derive(self.seed, "sampler", self.epoch), generators(self.sampler))

    def _split(self, order: list[Any]) -> list[Sequence[Any]]:
        """Return this rank's batches out of all ranks' items."""
        world, size = self._ranks, self.batch_size or 1
        rank = self.rank if world > 1 else 0
        batches = order
        if not self.batched:
            batches = [order[i : i + size] for i in range(0, len(order), size)]
        full = len(order) // size  # Number of complete batches.
        if self.drop_last:
            batches = batches[:full]
        if not self.train:
            return batches[rank::world]
        whole = full // world * world
        own, rest = batches[rank:whole:world], list(chain(*batches[whole:]))
        divisible = self.batched or self.batch_size is not None
        if divisible and not self.drop_last and len(rest) >= world:
            own.append(rest[rank * len(rest) // world : (rank + 1) * len(rest) // world])
        elif rest and not self._warned:
            self._warned = True
            what = "items" if divisible else "batches"
            logger.info(
                "each epoch leaves out its last %d %s: too few for all ranks", len(rest), what
            )
        return own


def _ranks_of(sampler: Any, world_size: int) -> int:
    """Return the number of ranks that the sampler itself splits its items among."""
    for part in components(sampler):
        ranks = getattr(part, "num_replicas", None) or getattr(part, "world_size", None)
        if ranks is not None and hasattr(part, "rank"):
            if ranks not in (1, world_size):
                raise ValueError(
                    f"the sampler {type(part).__name__} is set up for {ranks} ranks; "
                    f"the run has {world_size}"
                )
            return int(ranks)
    return 1
