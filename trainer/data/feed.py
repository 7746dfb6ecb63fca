"""Data feed: batches of a stage on the run's device, starting at any batch of an epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer import distributed
from trainer.data.batch import to_device
from trainer.data.batch_sampler import knows_ranks
from trainer.data.loader import Loader, Stream, resumable
from trainer.seed import derive, fork_rng

if TYPE_CHECKING:
    from trainer.options import RunOptions

logger = logging.getLogger("trainer.data")


@dataclass(eq=False)
class DataFeed:
    """Batches of a stage, epoch by epoch.

    Attributes:
        stateful: loader whose own state resumes an epoch; None if batches are skipped instead.
        sources: objects whose position in an epoch is saved by the feed.
    """

    source: Loader | Stream | list[Any] | tuple[Any, ...]  # The batches, or their loader.
    device: torch.device  # Device that the batches are moved to.
    train: bool  # True if ranks must get equally many batches.
    limit: int = 0  # Maximum number of batches in an epoch; 0 for all.
    repeat: int = 0  # Number of batches, the first of epoch 1, repeated in every epoch; 0 for all.
    split: bool = False  # True if every rank reads the same batches, to be dealt here.
    seed: int = 0  # Random seed of the run.

    def __post_init__(self) -> None:
        self._repeated: list[Any] | None = None
        self._at: dict[str, Any] | None = (
            None  # The last epoch, and the last batch of an unfinished one.
        )
        self._saved: Mapping[str, Any] = {}
        # A list is the same in every epoch, and needs no loader.
        self._loader = None if isinstance(self.source, (list, tuple)) else self.source
        self.stateful: Any = None
        self.sources: list[Any] = []
        if self._loader is not None:
            self._loader.alone = False  # Bad items are judged in `judge_bad`, for all ranks.
            self.stateful = None if self.repeat else self._loader.stateful
            self.sources = self._loader.sources

    def length(self) -> int | None:
        """Return the number of batches in an epoch on this rank; None if unknown."""
        try:
            size = len(self.source if self._repeated is None else self._repeated)
        except TypeError:
            return None
        if self.split and self._repeated is None:
            rank, world = distributed.rank(), distributed.world_size()
            size = size // world if self.train else len(range(rank, size, world))
        for limit in (self.limit, self.repeat):
            size = min(size, limit) if limit else size
        return size

    @property
    def may_hang(self) -> bool:
        """True if the batches are not all in memory."""
        return self._loader is not None and self._repeated is None

    def describe_wait(self) -> str:
        """Describe the current wait, such as "waiting for batch 3 of epoch 1"."""
        assert self._loader is not None
        return self._loader.describe_wait()

    def undo_draws(self) -> None:
        """Undo the random draws of the batch that is being loaded."""
        assert self._loader is not None
        self._loader.undo_draws()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the source; empty if a resumed run cannot use it."""
        if self._at is None or self.stateful is None:
            return {}
        assert isinstance(self._loader, Stream)
        position = self._loader.position(running=self._at["batch"] is not None)
        return {} if position is None else {**self._at, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved position; the next `from_batch` uses it if it starts at the same batch."""
        self._saved = state

    def begin(self, epoch: int) -> int | None:
        """Prepare an epoch, and return its number of batches; None if unknown."""
        if self._loader is not None:
            self._loader.set_epoch(epoch)
        return self.length()

    def from_batch(self, epoch: int, start: int) -> Iterator[tuple[Any, bool]]:
        """Yield the batches of an epoch on the feed's device.

        Args:
            epoch: number of the epoch.
            start: number of batches to skip.

        Yields:
            A batch, and True if it is known to be the last of the epoch.
        """
        if self.repeat and self._repeated is None:
            self.begin(1)
            with fork_rng(derive(self.seed, "repeated")):  # A resumed run draws the same ones.
                self._repeated = list(islice(self._batches(0), self.repeat))
        size, number = self.begin(epoch), start
        saved, self._saved = self._saved, {}
        at = saved.get("batch")  # None between two epochs.
        fits = (saved.get("epoch"), at) == (epoch, start) or (at is None and start == 0)
        batches: Iterable[Any]
        if self._repeated:
            batches = islice(self._repeated, start, None)
        else:
            batches = self._batches(start, saved.get("position") if fits else None)
        on_host = self.device.type == "cpu"
        try:
            for batch in batches:
                number += 1
                self._at = {"epoch": epoch, "batch": number}
                yield (batch if on_host else to_device(batch, self.device)), number == size
                if number == self.limit:
                    return
        finally:
            self._at = {"epoch": epoch, "batch": None}

    def judge_bad(self, at_end: bool = True) -> int:
        """Judge the bad files of the current epoch, over all ranks. Collective.

        Args:
            at_end: False within an epoch, where too few items are not judged yet.

        Returns:
            The number of bad files so far.

        Raises:
            ValueError: too large a share is bad; raised on all ranks alike.
        """
        if self._loader is None:
            return 0
        policy = self._loader.policy
        (unjudged,) = distributed.any_rank(policy.unjudged)
        if unjudged:
            reports = distributed.all_gather_json(self._loader.report_bad())
            policy.judge(reports, shared=self.split, at_end=at_end)
        return len(policy.all_skipped)

    def _batches(self, start: int, position: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """Yield this rank's batches of the source."""
        world = distributed.world_size() if self.split else 1
        if self._loader is None:
            iterator: Iterator[Any] = islice(self.source, start * world, None)
        else:
            self._loader.skip(start * world, position)
            iterator = iter(self._loader)
            if self.train and not (self.split or self._loader.equal):
                iterator = _end_together(iterator)
        if world == 1:
            yield from iterator
            return
        while batches := list(islice(iterator, world)):
            if len(batches) == world or (not self.train and distributed.rank() < len(batches)):
                yield batches[distributed.rank()]


def make_feed(
    source: Any,
    *,
    train: bool,
    name: str,  # Stage in error messages, such as "valid".
    device: torch.device,
    options: RunOptions,
    make_loader: Callable[..., Any],  # Makes a DataLoader, or an iterable of batches, of a dataset.
    loader_kwargs: Mapping[str, Any],  # Allowed only for a dataset.
    makes_datasets: bool = False,  # `make_loader` may make a dataset of a mapping.
    whole: bool = False,  # Every rank gets all batches.
) -> DataFeed:
    """Make a data feed from a dataset, a DataLoader or any iterable of batches.

    Raises:
        ValueError: ``source`` is none of the above, or is no dataset and there are loader options;
            ``make_loader`` returned something that is no iterable.
    """
    loader = source
    listing = isinstance(source, Mapping)  # Perhaps items for a dataset.
    if listing and not makes_datasets:
        raise ValueError(
            f"the {name} set is a mapping, a {type(source).__name__}; give one of its parts: "
            f"{', '.join(map(repr, list(source)[:8]))}"
        )
    if "dataset" in loader_kwargs:
        raise ValueError(f"the loader options of the {name} set name a dataset, which is given")
    if listing or _is_dataset(source):
        loader = make_loader(source, **loader_kwargs)
        if not isinstance(loader, Iterable):
            raise ValueError(
                f"the loader that was made for the {name} set is a {type(loader).__name__}; "
                "allowed: a DataLoader or any iterable of batches"
            )
    elif loader_kwargs:
        raise ValueError(
            f"loader options {sorted(loader_kwargs)} were given for the {name} set, but a "
            f"{type(source).__name__} is no Dataset: they would be ignored"
        )
    elif not isinstance(source, Iterable) or isinstance(source, (str, bytes)):
        raise ValueError(
            f"the {name} set is a {type(source).__name__}; allowed: a Dataset, a DataLoader "
            "or any iterable of batches"
        )
    listed = isinstance(loader, (list, tuple))
    if not listed:
        loader = resumable(
            loader,
            seed=options.seed,
            train=train,
            rank=0 if whole else distributed.rank(),
            world_size=1 if whole else distributed.world_size(),
            on_bad=options.on_bad_item,
            max_bad=options.max_bad_item,
            timeout=options.item_timeout,
        )
    split = not whole and (listed or not (loader.dealt or knows_ranks(source)))
    limit = options.debug_batches if options.debug else 0
    repeat = options.overfit_batches if train else 0
    return DataFeed(loader, device, train, limit, repeat, split, options.seed)


def _is_dataset(source: Any) -> bool:
    """Return True for a dataset, also of another library: it has items and a length."""
    if isinstance(source, Dataset):
        return not isinstance(source, DataLoader)
    if isinstance(source, (Loader, Stream, DataLoader, Sequence)) or hasattr(source, "__array__"):
        return False
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _end_together(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches until one rank has no more. Collective, for each batch."""
    end, number = object(), 0
    while True:
        batch = next(batches, end)
        ended, going = distributed.any_rank(batch is end, batch is not end)
        if ended:
            if going and distributed.is_main():
                logger.warning(
                    "the epoch ends on all ranks after %d batches, where the first rank had no "
                    "more: the data give ranks unequal numbers of batches", number,
                )  # fmt: skip
            return
        number += 1
        yield batch
