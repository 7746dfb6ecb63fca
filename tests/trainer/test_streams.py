"""Iterable datasets: each item once among ranks and workers, and resuming by their own state."""

import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer import Brain, Checkpointer, Stage, distributed
from trainer.callbacks import Callback
from trainer.data import make_loader, report_bad, resumable
from trainer.data.items import DealtItems

from ..processes import TwoRanks


class Numbers(IterableDataset):
    """The numbers below a size, in order; it gives every process all of them."""

    def __init__(self, size: int = 13) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        yield from range(self.size)


class Shuffled(Numbers):
    """Numbers in an order that is drawn from the global generators, as are its skips."""

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.size))
        random.shuffle(order)
        numpy.random.shuffle(order)
        for held in order:
            torch.rand(random.randrange(3))
            yield held


class ByWorker(Numbers):
    """It splits by `get_worker_info`, as PyTorch's documentation shows."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        yield from range(first, self.size, step)


class BySeed(Numbers):
    """It asks for the worker's seed alone, which is no split."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        random.Random(worker.seed if worker else 0).random()
        yield from range(self.size)


class ByInit(Numbers):
    """Each worker has a part of its own once `split` has been its ``worker_init_fn``."""

    first, step = 0, 1

    def __iter__(self) -> Iterator[Any]:
        yield from range(self.first, self.size, self.step)


def split(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.first, info.dataset.step = worker, info.num_workers


class ByAttribute(Numbers):
    """It says that it splits, without asking."""

    splits_by_worker = True

    def __iter__(self) -> Iterator[Any]:
        worker = int(torch.utils.data._utils.worker._worker_info.id) if get_worker_info() else 0
        yield from range(worker, self.size, 2 if get_worker_info() else 1)


class Asking(Numbers):
    """It asks for the number of workers, and says that it does not split."""

    splits_by_worker = False

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is None or worker.num_workers
        yield from range(self.size)


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Numbers, Shuffled, ByWorker, BySeed, ByInit, ByAttribute, Asking)
}


def read(kind: str, train: bool, rank: int, world: int, own: bool, **options: Any) -> list[Any]:
    """Return the batches of a rank: of a loader that is made, or of a DataLoader of one's own."""
    dataset = KINDS[kind]()
    if kind == "ByInit" and options["num_workers"]:
        options["worker_init_fn"] = split
    run = {"train": train, "seed": 3, "rank": rank, "world_size": world}
    if own:
        loader = resumable(DataLoader(dataset, batch_size=2, **options), **run)
    else:
        loader = make_loader(dataset, batch_size=2, **options, **run)
    loader.set_epoch(1)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "world"), [(0, 3), (2, 2)])
def test_each_item_is_in_one_batch_of_one_rank(kind: str, workers: int, world: int) -> None:
    for train in (True, False):
        own = train and workers == 2
        ranks = [read(kind, train, rank, world, own, num_workers=workers) for rank in range(world)]
        seen = Counter(item for rank in ranks for batch in rank for item in batch)
        assert set(seen.values()) == {1}
        if train:  # Too few items for all ranks are left out: at most that many in each worker.
            assert 13 - len(seen) < world * max(workers, 1)
            assert len({len(rank) for rank in ranks}) == 1
        else:
            assert len(seen) == 13


@pytest.mark.parametrize("train", [True, False])
def test_the_batches_of_a_rank_do_not_depend_on_the_workers(train: bool) -> None:
    for rank in range(2):
        alone, shared = (
            read("Shuffled", train, rank, 2, False, num_workers=workers) for workers in (0, 2)
        )
        assert alone == shared
        assert [len(batch) for batch in alone] == ([2, 2, 2] if train or rank else [2, 2, 2, 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_items_of_a_dealt_stream_are_reported_once(workers: int) -> None:
    class Bad(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for index in range(20):
                if index == 7:
                    report_bad("7.wav", "it is cut")
                else:
                    yield None if index == 11 else index

    found, loaded = [], 0
    for rank in range(2):
        loader = make_loader(
            Bad(),
            train=False,
            batch_size=3,
            num_workers=workers,
            rank=rank,
            world_size=2,
            max_bad=1,
        )
        list(loader)
        found += list(loader.policy.skipped)
        loaded += loader.policy.loaded
    assert sorted(found) == ["7.wav", "item 10 of Bad"]
    assert loaded == 20


@pytest.mark.parametrize(
    ("kind", "workers", "warns"),
    [(Numbers, 2, True), (Numbers, 1, False), (ByWorker, 2, False), (ByAttribute, 2, False)],
)
def test_a_loader_of_its_own_class_that_repeats_items_is_warned_of(
    kind: Any, workers: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = type("Other", (DataLoader,), {})
    loader = resumable(other(kind(), batch_size=4, num_workers=workers), train=True)
    assert ("each of the 2 workers of a Other gives all items of Numbers" in caplog.text) == warns
    seen = Counter(item for batch in loader for item in batch.tolist())
    assert set(seen.values()) == {2 if warns else 1}


def _place() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Sharded(Numbers):
    """It is told its part by arguments, and keeps neither of them."""

    def __init__(self, rank: int, world: int) -> None:
        self.items = list(range(13))[rank::world]

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


class Private(Sharded):
    def __init__(self, rank: int, world: int) -> None:
        self._part = rank, world

    def __iter__(self) -> Iterator[Any]:
        yield from range(self._part[0], 13, self._part[1])


class Helped(Numbers):
    """It asks for its rank in a function beside the class."""

    def __iter__(self) -> Iterator[Any]:
        rank, world = _place()
        yield from range(rank, self.size, world)


class Within(Numbers):
    """It asks within an expression."""

    def __iter__(self) -> Iterator[Any]:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return (i for i in range(self.size) if i % world == int(os.environ.get("RANK", 0)))


class Wrapping(Numbers):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


@pytest.mark.parametrize(
    "make",
    [
        Sharded, Private, lambda *_: Helped(), lambda *_: Within(),
        lambda *place: Wrapping(Sharded(*place)), lambda *_: Wrapping(Wrapping(Helped())),
    ],
)  # fmt: skip
def test_no_item_is_lost_where_a_dataset_gives_each_rank_its_own(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    caplog.set_level(logging.INFO)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run = {"train": False, "rank": rank, "world_size": 2}
        seen += [i for batch in make_loader(make(rank, 2), **run) for i in batch.tolist()]
    assert sorted(seen) == list(range(13))
    assert [each for each in caplog.messages if "splits_by_rank = False" in each]


class ById(Numbers):
    """It knows the number of workers by itself."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        yield from range(worker.id if worker else 0, self.size, 2 if worker else 1)


@pytest.mark.parametrize("told", [False, True])
def test_a_dataset_that_asks_for_the_id_of_its_worker_alone_is_told_of(
    told: bool, tmp_path: Path
) -> None:
    """A worker logs to a file, which the main process has opened."""
    handler, logger = logging.FileHandler(tmp_path / "log"), logging.getLogger("trainer.data")
    logger.addHandler(handler)
    try:
        dataset = ById()
        if told:
            dataset.splits_by_worker = True  # type: ignore[attr-defined]
        items = [i for each in make_loader(dataset, train=False, num_workers=2) for i in each]
    finally:
        logger.removeHandler(handler)
        handler.close()
    text = (tmp_path / "log").read_text()
    assert ("ById asks for the id of its worker, and not for the number" in text) != told
    assert not told or sorted(map(int, items)) == list(range(13))


def test_a_dataset_that_knows_its_rank_is_not_dealt_again() -> None:
    class Held:
        rank, world_size = 1, 2

    class Has(Numbers):
        rank = 1

    class Holds(Numbers):
        def __init__(self) -> None:
            super().__init__()
            self.state = Held()

    class Asks(Numbers):
        def __iter__(self) -> Iterator[Any]:
            yield from range(distributed.rank(), self.size, distributed.world_size())

    class Environment(Numbers):
        def __iter__(self) -> Iterator[Any]:
            yield from range(int(os.environ.get("RANK", 0)), self.size)

    class Says(Asks):
        splits_by_rank = False

    def items(dataset: Any) -> int:
        loader = make_loader(dataset, train=False, batch_size=1, rank=1, world_size=2)
        return len(list(loader))

    assert [items(kind()) for kind in (Has, Holds, Asks, Environment)] == [13] * 4
    assert items(Says()) == items(Numbers()) == 6


class Small(Brain):
    """Notes the items of each batch."""

    def on_fit_start(self) -> None:
        self.seen: Any = []

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch.float()[:, None])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        self.seen = [*self.seen, batch.tolist()]
        return predictions.square().mean()


def small(folder: Path | None = None, **options: Any) -> Small:
    torch.manual_seed(0)
    return Small(
        {"net": nn.Linear(1, 1)},
        lambda params: torch.optim.SGD(params, lr=1e-3),
        run_opts={"device": "cpu", "progressbar": False, **options},
        checkpointer=None if folder is None else Checkpointer(folder),
    )


class Uneven(IterableDataset):
    """Rank 0 has 9 items, rank 1 has 4."""

    splits_by_rank = True

    def __iter__(self) -> Iterator[Any]:
        rank = distributed.rank()
        yield from range(rank, 5 if rank else 9)


def train_on(kind: str) -> dict[str, Any]:
    dataset = {"Uneven": Uneven, **KINDS}[kind]()
    brain = small()
    brain.fit(range(1, 3), dataset, train_loader_kwargs={"batch_size": 2})
    trained, steps = brain.seen, brain.optimizer_step
    brain.seen = []
    brain.evaluate(dataset, test_loader_kwargs={"batch_size": 2})
    return {"trained": trained, "steps": steps, "tested": brain.seen}


def test_two_ranks_share_a_stream(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(train_on, "Numbers")
    assert [rank["trained"][:3] for rank in ranks] == [
        [[0, 2], [4, 6], [8, 10]],
        [[1, 3], [5, 7], [9, 11]],
    ]
    assert [rank["steps"] for rank in ranks] == [6, 6]
    tested = [item for rank in ranks for batch in rank["tested"] for item in batch]
    assert sorted(tested) == list(range(13))


def test_ranks_of_unequal_length_end_together(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(train_on, "Uneven")
    assert [rank["steps"] for rank in ranks] == [4, 4]
    assert [len(rank["tested"]) for rank in ranks] == [5, 2]
    assert "the epoch ends on all ranks after 2 batches" in two_ranks.output(0)


# Resuming by the state of a loader


class Place:
    """Counts what is read of it, and goes on where its state says."""

    def __init__(self) -> None:
        self.size, self.place, self.read = 5, 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < self.size:
            self.read += 1
            self.place += 1
            yield self.place - 1 + random.random()  # It is exact only with its random numbers.
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Placed(Place, IterableDataset):
    """It is a dataset."""


class PlacedLoader(Place):
    """It is a loader of its own: no dataset, but an iterable of batches."""

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield torch.tensor([item, item])


class Stop(Exception):
    """The end of a run that is killed."""


class Stopping(Callback):
    def __init__(self, step: int, at: str) -> None:
        self.step, self.at = step, at

    def on_batch_start(self, brain: Any, batch: Any) -> None:
        if self.at == "batch" and brain.optimizer_step == self.step:
            raise Stop

    def on_stage_end(self, brain: Any, report: Any) -> None:
        if self.at == "end" and brain.optimizer_step == self.step:
            raise Stop


class BufferShuffledExamplesIterable:
    """Hugging Face's buffer, of which no state is whole."""

    ex_iterable = None


class Buffered(Placed):
    """It holds such a buffer, so that it has to be read again."""

    _ex_iterable = BufferShuffledExamplesIterable()


@pytest.mark.parametrize("kind", [Placed, PlacedLoader, Buffered])
def test_a_stream_goes_on_by_its_own_state(kind: Any, tmp_path: Path) -> None:
    def run(folder: Path, stop: int = 0, at: str = "") -> tuple[Any, int]:
        data: Any = kind()
        source = DataLoader(data, batch_size=2) if kind is Placed else data
        brain = small(folder, checkpoint_every_steps=1)
        brain.hparams.data = source  # A stateful object, too.
        brain.callbacks.append(Stopping(stop, at))
        with suppress(Stop):
            brain.fit(range(1, 3), source)
        return brain.seen, data.read

    whole, read = run(tmp_path / "whole")
    epoch, reads = 3 if kind is Placed else 5, []
    # In an epoch; after the save of its last batch; after that of its end.
    for stop, at in ((2, "batch"), (epoch, "end"), (epoch, "batch")):
        _, first = run(tmp_path / f"{stop} {at}", stop, at)
        rest, second = run(tmp_path / f"{stop} {at}")
        assert rest == whole
        reads.append(first + second)
    again = {Placed: 1, PlacedLoader: 1, Buffered: 3}[kind]  # The batch in which it stopped.
    assert (read, reads[0]) == (10, 10 + again)


def test_dealt_items_begin_anew_after_their_end_and_go_on_before_it() -> None:
    items = DealtItems(Placed(), True, 0, 2, 2)
    whole = list(items)
    assert len(whole) == 2
    items.load_state_dict(items.state_dict())
    iterator = iter(items)
    assert next(iterator) == whole[0]
    other = DealtItems(Placed(), True, 0, 2, 2)
    other.load_state_dict(items.state_dict())
    assert list(other) == whole[1:]


def test_a_batch_that_is_none_is_left_out_and_counted() -> None:
    class Holey:
        def __iter__(self) -> Iterator[Any]:
            yield from (torch.ones(1), None, 2 * torch.ones(1), 3 * torch.ones(1))

    loader = resumable(Holey(), train=False, max_bad=0.5)
    assert [batch.item() for batch in loader] == [1, 2, 3]
    assert loader.bad == {"batch 2": "it is None"}
    loader.skip(1)
    assert [batch.item() for batch in loader] == [2, 3]
