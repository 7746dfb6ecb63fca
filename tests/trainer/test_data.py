"""The order of an epoch, its randomness, its ranks, its workers and its bad items."""

import gc
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from trainer.data import (
    BadItem,
    DistributedBatchSampler,
    in_epoch,
    item_generator,
    item_seed,
    make_loader,
    report_bad,
    resumable,
)
from trainer.seed import fork_rng, rng_state


def own_draw(item: str) -> float:
    """A number that depends on both of an item's own sources."""
    number = random.Random(item_seed(item)).random()
    return number + torch.rand(1, generator=item_generator(item)).item()


class Items(Dataset):
    """Items that draw from every generator a dataset may use."""

    def __init__(self, size: int = 13, bad: tuple[int, ...] = ()) -> None:
        self.size, self.bad, self.loaded = size, bad, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.loaded.append(index)
        if index in self.bad:
            raise BadItem(f"{index}.wav", "it is empty")
        return {
            "id": f"{index}",
            "signal": torch.randn(2 + index % 3),
            "draws": torch.tensor([random.random(), numpy.random.rand()]),
            "own": torch.tensor([own_draw(f"{index}")], dtype=torch.float64),
        }


def content(loader: Any) -> list[Any]:
    """Everything in the batches of an epoch, comparable."""
    fields = ("signal", "draws", "own")
    return [(b.id, *(b[name].data.tolist() for name in fields)) for b in loader]


def own(batches: list[Any]) -> list[Any]:
    """Return the part of `content` that follows from (seed, epoch, item)."""
    return [(names, draws) for names, _, _, draws in batches]


def ids(loader: Any) -> list[list[str]]:
    return [batch.id for batch in loader]


def epoch(number: int = 1, skip: int = 0, size: int = 13, **options: Any) -> list[Any]:
    loader = make_loader(Items(size), **{"train": True, "seed": 3, "batch_size": 3} | options)
    loader.set_epoch(number)
    loader.skip(skip)
    return content(loader)


def flat(batches: list[list[str]]) -> list[str]:
    return [each for batch in batches for each in batch]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# Order and randomness


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_from_any_batch_with_any_number_of_workers(workers: int) -> None:
    whole = epoch(num_workers=1)
    assert len(whole) == 5
    options = {"persistent_workers": True} if workers else {}
    loader = make_loader(Items(), train=True, seed=3, batch_size=3, num_workers=workers, **options)
    for start in (*range(6), 0):  # A skip holds for one iteration.
        loader.set_epoch(1)
        if start:
            loader.skip(start)
        found = content(loader)
        assert own(found) == own(whole)[start:]
        if workers:  # Global generators too.
            assert found == whole[start:]


def test_in_workers_global_generators_follow_from_seed_epoch_batch_and_rank() -> None:
    def numbers(**options: Any) -> list[Any]:
        return [draws for _, *draws, _ in epoch(size=12, num_workers=2, shuffle=False, **options)]

    first = numbers()
    assert first == numbers()
    for other in (numbers(number=2), numbers(seed=4), numbers()[::-1]):
        assert all(left != right for left, right in zip(first, other, strict=True))
    ranks = [numbers(rank=rank, world_size=2) for rank in range(2)]
    assert all(left != right for left, right in zip(*ranks, strict=True))


GENERATORS: dict[str, Any] = {
    "python": lambda: random.Random(0),
    "numpy": lambda: numpy.random.default_rng(0),
    "numpy's older one": lambda: numpy.random.RandomState(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


def _drawn(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand(1, generator=generator).item()
    return float(generator.random())


class Holding(Dataset[Any]):
    """Items with a number from a generator that the dataset, or its sampler, holds."""

    def __init__(self, generator: Any) -> None:
        self.own = generator

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> float:
        return _drawn(self.own)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(11), key=lambda _: _drawn(self.own)))


class HoldingStream(IterableDataset[Any]):
    def __init__(self, generator: Any) -> None:
        self.own = generator

    def __iter__(self) -> Iterator[float]:
        return iter([_drawn(self.own) for _ in range(11)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("holder", ["dataset", "sampler", "stream"])
def test_generators_that_the_data_hold_follow_seed_and_epoch(
    holder: str, kind: str, workers: int
) -> None:
    def loader() -> Any:
        held = Holding(GENERATORS[kind]())
        more = {"sampler": held} if holder == "sampler" else {}
        data: Any = {"dataset": held, "sampler": list(range(11))}.get(holder)
        data = HoldingStream(held.own) if data is None else data
        return make_loader(data, train=True, batch_size=2, num_workers=workers, **more)

    def batches(loader: Any, epoch: int, start: int = 0) -> list[Any]:
        loader.set_epoch(epoch)
        loader.skip(start)
        return [batch.tolist() for batch in loader]

    one = loader()
    epochs = [batches(one, epoch) for epoch in (1, 2)]
    assert epochs[0] != epochs[1]
    assert batches(loader(), 2, 3) == epochs[1][3:]
    assert len({x for batch in epochs[0] for x in batch}) == 11


def test_without_workers_items_draw_from_the_generators_of_the_process() -> None:
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    found = epoch(batch_size=1, shuffle=False)
    after = rng_state()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    items = [Items()[index] for index in range(13)]
    assert same(rng_state(), after)
    for batch, item in zip(found, items, strict=True):
        assert batch[:3] == ([item["id"]], [item["signal"].tolist()], [item["draws"].tolist()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_loading_itself_draws_nothing(workers: int, sampled: bool) -> None:
    own = torch.Generator().manual_seed(7)
    options: dict[str, Any] = {"generator": own}
    if sampled:
        options["sampler"] = RandomSampler(range(13), generator=own)
    numpy.random.randn()  # Leaves a second normal number in NumPy's generator.
    torch.rand(3)
    before, mine = rng_state(), own.get_state()
    data = TensorDataset(torch.arange(13.0))
    list(make_loader(data, train=True, batch_size=2, num_workers=workers, **options))
    assert same(rng_state(), before)
    assert torch.equal(own.get_state(), mine)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_that_take_turns_keep_their_own_seeds_and_epochs(workers: int) -> None:
    options = {"batch_size": 3, "num_workers": workers}
    train = make_loader(Items(), train=True, seed=3, **options)
    train.set_epoch(2)
    valid = make_loader(Items(), train=False, seed=4, **options)
    valid.set_epoch(2)
    found = [content([left, right]) for left, right in zip(train, valid, strict=True)]
    assert own([left for left, _ in found]) == own(epoch(2))
    assert own([right for _, right in found]) == own(epoch(2, seed=4, train=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_its_seed_and_epoch_too(workers: int) -> None:
    class Own(IterableDataset):
        def __iter__(self) -> Any:
            yield from (own_draw(f"{index}") for index in range(4))

    def numbers(number: int, train: bool = True) -> list[float]:
        source = DataLoader(Own(), batch_size=4, num_workers=workers)
        loader = resumable(source, seed=3, train=train)
        loader.set_epoch(number)
        (batch, *_) = loader
        assert source.worker_init_fn is None
        return batch.tolist()

    for number, train in ((2, True), (0, False)):
        with in_epoch(number, seed=3):
            expected = [own_draw(f"{index}") for index in range(4)]
        assert numbers(2, train) == expected


def test_the_numbers_of_an_item_may_be_those_of_another_epoch() -> None:
    outside = own_draw("a")
    with in_epoch(5, seed=3):
        fifth = own_draw("a")
        with in_epoch(6):
            assert own_draw("a") != fifth
        assert own_draw("a") == fifth != own_draw("b")
        assert item_seed(7) == item_seed(numpy.int64(7))
    assert own_draw("a") == outside


def test_what_is_skipped_is_not_loaded() -> None:
    items = Items()
    loader = make_loader(items, train=True, seed=3, batch_size=3)
    loader.skip(4)
    assert sum(map(len, ids(loader))) == len(items.loaded) == 1


def test_persistent_workers_learn_each_epoch() -> None:
    loader = make_loader(
        Items(), train=True, seed=3, batch_size=3, num_workers=2, persistent_workers=True
    )
    for number in (1, 2, 1):
        loader.set_epoch(number)
        assert content(loader) == epoch(number, num_workers=1)


class Shards(IterableDataset):
    """Four numbers."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(4))


@pytest.mark.parametrize("data", [range(4), Shards()])
def test_persistent_workers_end_with_a_loader_in_a_reference_cycle(data: Any) -> None:
    before = set(multiprocessing.active_children())
    loader: Any = make_loader(data, train=True, num_workers=2, persistent_workers=True)
    assert len(list(loader)) == 4
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    loader.own = loader  # As a Brain refers to itself.
    started = time.monotonic()
    del loader
    gc.collect()
    assert time.monotonic() - started < 5  # torch waits for each worker for 5 s.
    assert not workers & set(multiprocessing.active_children())


def test_each_epoch_sees_every_item_once_in_a_new_order() -> None:
    orders = [[batch[0] for batch in epoch(number)] for number in range(1, 6)]
    assert all(sorted(map(int, flat(order))) == list(range(13)) for order in orders)
    assert len({tuple(flat(order)) for order in orders}) == 5
    assert epoch(1) != epoch(1, seed=4)


def test_augmentation_changes_with_the_epoch_and_not_with_the_order() -> None:
    def draws(number: int, **options: Any) -> dict[str, Any]:
        return {
            name: value
            for names, values in own(epoch(number, **options))
            for name, value in zip(names, values, strict=True)
        }

    assert draws(1) == draws(1, batch_size=5) == draws(1, shuffle=False, num_workers=2)
    assert all(draws(1)[name] != draws(2)[name] for name in draws(1))
    assert len({str(value) for value in draws(1).values()}) == 13


def test_evaluation_keeps_the_order_and_sees_the_same_randomness_in_every_epoch() -> None:
    first, second = (epoch(number, train=False, num_workers=2) for number in (1, 2))
    assert first == second
    assert own(first) == own(epoch(3, train=False))
    assert flat([batch[0] for batch in first]) == [f"{index}" for index in range(13)]


def test_a_forked_block_leaves_no_trace_and_continues_when_it_is_entered_again() -> None:
    def draw() -> list[float]:
        return [random.random(), numpy.random.rand(), float(torch.rand(())), own.initial_seed()]

    own = torch.Generator().manual_seed(7)
    forked, whole = fork_rng(5, [own]), fork_rng(5, [own])
    before, mine = rng_state(), own.get_state()
    with whole:
        expected = [draw(), draw()]
    found = []
    for _ in range(2):
        with forked:
            found.append(draw())
        assert same(rng_state(), before)
        assert torch.equal(own.get_state(), mine)
    assert found == expected
    assert found[0] != found[1]


def test_the_random_numbers_of_the_main_process_do_not_reach_the_order() -> None:
    def order(number: int = 1) -> list[Any]:
        return own(epoch(number, sampler=RandomSampler(range(13))))

    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first
    assert order(2) != first


def test_loader_options_stay_as_the_caller_wrote_them() -> None:
    options = {"batch_size": 3, "num_workers": 0, "timeout": 5, "pin_memory": True, "shuffle": True}
    before = dict(options)
    list(make_loader(Items(), train=True, **options))
    assert options == before


# Ranks


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    batch=st.integers(1, 7),
    world=st.integers(1, 4),
    given_batches=st.booleans(),
    number=st.integers(0, 3),
)
def test_ranks_train_on_disjoint_and_equally_many_batches(
    size: int, batch: int, world: int, given_batches: bool, number: int
) -> None:
    order = [int(index) for index in torch.randperm(size)]
    sampler: Any = BatchSampler(order, batch, drop_last=False) if given_batches else order
    rows = []
    for rank in range(world):
        batches = DistributedBatchSampler(
            sampler,
            None if given_batches else batch,
            given_batches,
            train=True,
            seed=0,
            rank=rank,
            world_size=world,
        )
        batches.set_epoch(number)
        if size < world:
            with pytest.raises(ValueError, match=f"too few to train {world} processes"):
                list(batches)
            return
        rows.append([list(index.indices) for index in batches])
        assert len(batches) == len(rows[-1])
    assert len({len(row) for row in rows}) == 1
    seen = Counter(index for row in rows for each in row for index in each)
    assert set(seen.values()) == {1}
    assert size - len(seen) < world
    assert all(each for row in rows for each in row)
    if not given_batches:  # Together as one process with `world` times the batch.
        together = [sorted(sum(round_, [])) for round_ in zip(*rows, strict=True)]
        one = [order[i : i + batch * world] for i in range(0, size, batch * world)]
        one = one if len(one[-1]) >= world else one[:-1]
        assert together == [sorted(each) for each in one]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_ranks_evaluate_each_item_exactly_once(size: int, batch: int, world: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world):
        batches = DistributedBatchSampler(
            range(size), batch, train=False, seed=0, rank=rank, world_size=world
        )
        found = list(batches)
        assert len(found) == len(batches)
        seen.update(index for each in found for index in each.indices)
    assert seen == Counter(range(size))


def test_ranks_augment_an_item_as_one_process_does() -> None:
    ranks = [epoch(size=16, world_size=2, rank=rank) for rank in range(2)]
    alone = epoch(size=16, batch_size=6)
    assert len(alone) == 3
    for left, right, both in zip(*map(own, ranks), own(alone), strict=True):
        assert left[0] + right[0] == both[0]
        assert left[1] + right[1] == both[1]


def test_items_too_few_for_each_rank_are_left_out_and_said_once(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "trainer.data"):
        loader = make_loader(Items(7), train=True, batch_size=3, world_size=2)
        for number in range(3):
            loader.set_epoch(number)
            assert sum(map(len, ids(loader))) == 3
    assert caplog.messages == ["each epoch leaves out its last 1 items: too few for all ranks"]


def test_a_sampler_that_knows_its_rank_deals_by_itself() -> None:
    rows = []
    for rank in range(2):
        sampler = DistributedSampler(range(12), num_replicas=2, rank=rank, seed=5)
        loader = make_loader(
            Items(12), train=True, batch_size=2, sampler=sampler, rank=rank, world_size=2
        )
        orders = []
        for number in range(2):
            loader.set_epoch(number)
            orders.append(flat(ids(loader)))
        assert orders[0] != orders[1]
        rows.append(orders[0])
    assert sorted(map(int, rows[0] + rows[1])) == list(range(12))
    wrong = DistributedSampler(range(12), num_replicas=3, rank=0)
    with pytest.raises(ValueError, match="DistributedSampler is set up for 3 ranks; the run"):
        make_loader(Items(12), train=True, sampler=wrong, world_size=2)


# Samplers


class Batches:
    """As lhotse's samplers are: no length, an epoch, a whole batch an index, its own iterator."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> "Batches":
        self.index = -1
        return self

    def __next__(self) -> tuple[int, int]:
        self.index += 1
        if self.index == 5:
            raise StopIteration
        return self.epoch, self.index


class Whole(Dataset):
    """A dataset whose index is a whole batch, and which leaves one item out."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: tuple[int, int]) -> Any:
        if index[1] == 2:
            report_bad("two.wav", "it is cut")
        return *index, own_draw(f"{index}")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_index_may_be_a_whole_batch_from_a_sampler_without_length(workers: int) -> None:
    def loader(**options: Any) -> Any:
        return make_loader(
            Whole(), train=True, sampler=Batches(), batch_size=None, num_workers=workers, **options
        )

    one = loader()
    one.set_epoch(4)
    whole = list(one)
    assert [batch[:2] for batch in whole] == [[4, index] for index in range(5)]
    assert len({batch[2] for batch in whole}) == 5
    assert one.bad == {"two.wav": "it is cut"}
    one.skip(3)
    assert list(one) == whole[3:]
    with pytest.raises(TypeError):
        len(one)
    ranks = [[batch[1] for batch in loader(rank=rank, world_size=2)] for rank in range(2)]
    assert ranks == [[0, 2], [1, 3]]


def test_a_batch_sampler_says_the_batches() -> None:
    loader = make_loader(Items(), train=True, batch_sampler=[[3, 1], [4], [0, 2, 5]])
    assert ids(loader) == [["3", "1"], ["4"], ["0", "2", "5"]]
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": [1], "shuffle": True}, "a sampler excludes shuffle and batch_sampler"),
        ({"batch_sampler": [[1]], "drop_last": True}, "a batch_sampler excludes batch_size"),
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, or None; got 0"),
        ({"batch_size": True}, "batch_size must be a whole number, 1 or more, or None; got True"),
        ({"num_workers": -1}, "num_workers must be a whole number, 0 or more; got -1"),
        ({"num_workers": "2"}, "num_workers must be a whole number, 0 or more; got '2'"),
        ({"num_workers": None}, "num_workers must be a whole number, 0 or more; got None"),
        ({"shuffle": "False"}, "shuffle must be true or false; got 'False'"),
        ({"drop_last": "no"}, "drop_last must be true or false; got 'no'"),
        ({"collate_fn": "pad"}, "collate_fn must be a function; got 'pad'"),
        ({"batchsize": 3}, r"unknown loader options \['batchsize'\]; known are \['batch_sampler'"),
        ({"sampler": 5}, "sampler must be an iterable, such as a torch Sampler; got 5"),
        ({"batch_sampler": "random"}, "batch_sampler must be an iterable, .*; got 'random'"),
        ({"timeout": -1}, r"timeout must be a number of seconds, 0 or more \(0: never\); got -1"),
        ({"timeout": "5"}, "timeout must be a number of seconds, .*; got '5'"),
        ({"max_bad": 5}, r"max_bad must be a number in \[0, 1\]; got 5"),
        ({"on_bad": "ignore"}, "on_bad must be 'skip' or 'raise', got 'ignore'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_loader(Items(), train=True, **options)


def test_sizes_may_be_numbers_of_numpy() -> None:
    size, none = numpy.int64(4), numpy.int32(0)
    loader = make_loader(Items(8), train=False, batch_size=size, num_workers=none)
    assert [len(batch) for batch in loader] == [4, 4]


def test_data_that_give_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="the dataset Items has no items"):
        make_loader(Items(0), train=False)
    with pytest.raises(ValueError, match=r"13 items are too few to train 1 processes .*batch_si"):
        epoch(batch_size=20, drop_last=True)


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch 1 has 5 batches, so that it cannot start at batch"):
        epoch(skip=6)


# Bad items


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_items_are_left_out_logged_once_and_counted(workers: int, caplog: Any) -> None:
    loader = make_loader(
        Items(40, bad=(3, 5)), train=True, seed=3, batch_size=4, num_workers=workers
    )
    for number in range(2):
        loader.set_epoch(number)
        assert sorted(map(int, flat(ids(loader)))) == [i for i in range(40) if i not in (3, 5)]
        assert loader.bad == {"3.wav": "it is empty", "5.wav": "it is empty"}
    logged = [f"skipped {index}.wav: it is empty" for index in (3, 5)]
    assert sorted(caplog.messages) == logged


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_gives_whole_batches_is_asked_for_them(workers: int, caplog: Any) -> None:
    class Several(Items):
        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            return [{**Items.__getitem__(self, index), "all": len(indices)} for index in indices]

    items = Several(12, bad=(5,))
    loader = make_loader(items, train=False, batch_size=3, num_workers=workers, max_bad=0.1)
    batches = list(loader)
    assert flat([batch.id for batch in batches]) == [f"{i}" for i in range(12) if i != 5]
    assert ["all" in batch for batch in batches] == [True, False, True, True]  # One has a bad item.
    assert loader.bad == {"5.wav": "it is empty"}


class Nothing(Items):
    """Returns None for some items."""

    def __getitem__(self, index: int) -> Any:
        return None if index in (3, 5) else super().__getitem__(index)

    def name_of(self, index: int) -> str:
        return f"take{index}"


class NothingInSeveral(Nothing):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Nothing, NothingInSeveral])
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": None}, {"collate_fn": list}])
def test_an_item_that_is_none_is_a_bad_item(kind: Any, options: dict[str, Any]) -> None:
    loader = make_loader(kind(40), train=False, **options)
    found = [each["id"] for batch in loader for each in ([batch] if "own" in batch else batch)]
    assert flat([[each] if isinstance(each, str) else each for each in found]) == [
        f"{index}" for index in range(40) if index not in (3, 5)
    ]
    reason = "the dataset returned None"
    assert loader.bad == {"item take3": reason, "item take5": reason}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_batch_of_bad_items_gets_the_next_good_item(workers: int) -> None:
    options = {"seed": 3, "max_bad": 0.9, "num_workers": workers}
    plain = flat(ids(make_loader(Items(), train=True, seed=3)))
    bad = (int(plain[0]), int(plain[1]), int(plain[12]))
    loader = make_loader(Items(bad=bad), train=True, **options)
    assert flat(ids(loader)) == [plain[2], plain[2], *plain[2:12], plain[2]]
    assert len(loader.bad) == 3
    for start in (
        (0, 1, 6, 12) if workers else range(13)
    ):  # The stand-in does not depend on where the epoch was entered.
        loader.skip(start)
        assert next(iter(loader)).id[0] == [plain[2], plain[2], *plain[2:12], plain[2]][start]
    assert sorted(ids(make_loader(Items(bad=bad), train=False, **options))) == sorted(
        [each] for each in plain if int(each) not in bad
    )


def test_an_epoch_may_be_left_though_a_worker_died_with_a_lock_in_its_hands() -> None:
    iterator: Any = iter(make_loader(Items(), train=True, seed=3, num_workers=2))
    next(iterator)
    watched = iterator.gi_frame.f_locals["watched"]
    lock = watched.iterator._workers_done_event._cond
    lock.acquire()  # As a killed one may have.
    rescue = threading.Timer(60, lock.release)
    rescue.start()
    iterator.close()
    assert rescue.is_alive()
    rescue.cancel()


def test_ranks_keep_equally_many_batches_around_bad_items() -> None:
    for world in (1, 2, 3):
        lengths = set()
        for rank in range(world):
            bad = tuple(range(0, 30, 4))
            loader = make_loader(
                Items(30, bad), train=True, batch_size=2, rank=rank, world_size=world, max_bad=0.5
            )
            lengths.add(len(ids(loader)))
            assert lengths == {len(loader)}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_items_end_the_run_with_their_list(workers: int) -> None:
    items = Items(40, bad=(3, 5, 7))
    loader = make_loader(items, train=False, batch_size=4, num_workers=workers)
    listed = "  3.wav: it is empty\n  5.wav: it is empty\n  7.wav: it is empty"
    with pytest.raises(
        ValueError, match="3 of 40 items are bad, more than the 5.0% that"
    ) as caught:
        list(loader)
    assert str(caught.value).endswith(listed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_item_ends_the_run_when_that_is_asked_for(workers: int) -> None:
    loader = make_loader(
        Items(40, bad=(3,)), train=False, batch_size=4, num_workers=workers, on_bad="raise"
    )
    with pytest.raises(BadItem, match="3.wav: it is empty") as caught:
        list(loader)
    assert caught.value.path == "3.wav"


def test_an_epoch_of_bad_items_alone_is_an_error() -> None:
    loader = make_loader(Items(4, bad=(0, 1, 2, 3)), train=True, batch_size=2, max_bad=1.0)
    with pytest.raises(ValueError, match="neither a batch nor the 16 items after it have a good"):
        list(loader)


# Workers


class Trouble(Items):
    """Item 5 does what it is told."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.do = do

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            self.do()
        return super().__getitem__(index)

    def name_of(self, index: int) -> str:
        return f"{index} (take{index}.wav)"


def _missing() -> None:
    raise FileNotFoundError(2, "No such file", "gone.wav")


def _timed(loader: Any) -> tuple[BaseException, float]:
    """The error that ends an epoch, and how long it came after the last batch."""
    last = time.monotonic()
    try:
        for _ in loader:
            last = time.monotonic()
    except (RuntimeError, OSError) as error:
        return error, time.monotonic() - last
    raise AssertionError("the epoch ended well")


class TroubleInSeveral(Trouble):
    """The same, for whole batches."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Trouble, TroubleInSeveral])
def test_an_error_in_a_dataset_keeps_its_type_and_names_the_item(kind: Any, workers: int) -> None:
    loader = make_loader(kind(_missing), train=True, batch_size=3, num_workers=workers)
    error, _ = _timed(loader)
    assert type(error) is FileNotFoundError
    told = "\n".join([str(error), *getattr(error, "__notes__", [])])
    assert "gone.wav" in told
    assert "while loading item 5 (take5.wav)" in told


def test_a_killed_worker_is_an_error_within_a_second_that_names_its_item() -> None:
    loader = make_loader(
        Trouble(lambda: os.kill(os.getpid(), signal.SIGKILL)), train=True, num_workers=2
    )
    error, seconds = _timed(loader)
    assert seconds < 1
    assert "died of SIGKILL (out of memory?), waiting for batch" in str(error)
    assert "5 (take5.wav)" in str(error)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, 3])
def test_a_worker_that_dies_while_a_batch_is_trained_on_raises_at_the_next_wait(how: int) -> None:
    def die() -> None:
        if isinstance(how, signal.Signals):
            signal.signal(how, signal.SIG_DFL) if how != signal.SIGKILL else None
            os.kill(os.getpid(), how)
        os._exit(how)

    loader = make_loader(Trouble(die), train=False, batch_size=1, num_workers=1, prefetch_factor=5)
    batches = iter(loader)
    next(batches)
    time.sleep(1.0)  # Where torch's handler of SIGCHLD would raise.
    with pytest.raises(RuntimeError) as caught:
        list(batches)
    said = f"died of {how.name}" if isinstance(how, signal.Signals) else f"exited with code {how}"
    assert said in str(caught.value)
    assert "waiting for batch" in str(caught.value)
    assert "5 (take5.wav); fewer num_workers" in str(caught.value)


def test_a_worker_that_leaves_is_an_error() -> None:
    loader = make_loader(Trouble(lambda: os._exit(3)), train=True, num_workers=2)
    error, seconds = _timed(loader)
    assert seconds < 1
    assert "exited with code 3, waiting for batch" in str(error)


def test_a_slow_worker_is_waited_for() -> None:
    loader = make_loader(
        Trouble(lambda: time.sleep(1.2)), train=False, batch_size=13, num_workers=1, timeout=5
    )
    assert [len(batch) for batch in loader] == [13]


def _full_shared_memory(worker: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # What a full /dev/shm looks like.


class Large(Items):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": str(index), "x": torch.zeros(1000)}


@pytest.mark.parametrize("options", [{}, {"collate_fn": torch.utils.data.default_collate}])
def test_full_shared_memory_is_a_sentence_that_says_what_to_do(options: dict[str, Any]) -> None:
    init = {"worker_init_fn": _full_shared_memory, "num_workers": 1, "timeout": 60}
    error, waited = _timed(make_loader(Large(), train=True, batch_size=2, **init, **options))
    assert isinstance(error, OSError)
    for remedy in ("/dev/shm", "num_workers", "--ipc=host", "--shm-size", "set_sharing_strategy"):
        assert remedy in str(error)
    assert waited < 10


def test_a_worker_that_dies_of_a_bus_error_is_told_as_full_shared_memory() -> None:
    loader = make_loader(
        Trouble(lambda: os.kill(os.getpid(), signal.SIGBUS)), train=True, num_workers=1
    )
    error, _ = _timed(loader)
    assert isinstance(error, OSError)
    assert "/dev/shm" in str(error)


class Unsendable(Items):
    def __getitem__(self, index: int) -> Any:
        return threading.Lock()


def test_a_batch_that_cannot_be_sent_is_an_error_and_no_hang() -> None:
    loader = make_loader(Unsendable(), train=True, collate_fn=list, num_workers=1, timeout=60)
    error, waited = _timed(loader)
    assert "could not send a batch" in str(error)
    assert waited < 10


def test_a_hanging_worker_is_an_error_at_the_timeout_that_names_its_item() -> None:
    loader = make_loader(
        Trouble(lambda: time.sleep(60)), train=True, num_workers=2, timeout=1, batch_size=3
    )
    error, seconds = _timed(loader)
    assert 0.9 < seconds < 2
    assert "the loader's workers gave no batch within 1 s (one hangs" in str(error)
    assert "5 (take5.wav)" in str(error)


def test_a_hang_in_several_items_names_their_batch() -> None:
    loader = make_loader(
        TroubleInSeveral(lambda: time.sleep(60)),
        train=False, num_workers=1, timeout=1, batch_size=3,
    )  # fmt: skip
    error, _ = _timed(loader)
    assert "while worker 0 loaded a batch with item 3 (take3.wav)" in str(error)


def test_workers_live_through_the_signals_that_ask_the_main_process_to_stop() -> None:
    def signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    loader = make_loader(Trouble(signals), train=True, seed=3, batch_size=3, num_workers=2)
    assert ids(loader) == [batch[0] for batch in epoch(0)]


def test_leaving_an_epoch_early_leaves_no_worker_behind() -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())
    for _ in make_loader(Items(), train=True, num_workers=2):
        assert len(set(multiprocessing.active_children()) - before) == 2
        break
    assert set(multiprocessing.active_children()) == before


def test_an_error_while_joining_a_batch_names_its_items() -> None:
    class Ragged(Items):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": torch.zeros(2, 1 + index)}

    with pytest.raises(ValueError, match="only the first dimension may differ") as caught:
        list(make_loader(Ragged(), train=False, batch_size=3))
    assert "while joining items 0, 1, 2 to a batch" in getattr(caught.value, "__notes__", [""])[0]


# Everything else that gives batches


class Endless(IterableDataset):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for index in range(6):
            yield torch.rand(1) + 10 * self.epoch + index


def _sources() -> dict[str, Any]:
    drawn = TensorDataset(torch.arange(12.0))
    return {
        "list": [torch.rand(2) for _ in range(4)],
        "loader": DataLoader(drawn, batch_size=2, shuffle=True),
        "own generator": DataLoader(
            drawn, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3)
        ),
        "no batches": DataLoader(drawn, batch_size=None, sampler=RandomSampler(drawn)),
        "subset": DataLoader(drawn, batch_size=2, sampler=SubsetRandomSampler([1, 5, 6, 7])),
        "stream": DataLoader(Endless(), batch_size=2),
        "made": make_loader(Endless(), train=True, batch_size=2),
        "other loader": type("Other", (DataLoader,), {})(drawn, batch_size=2, shuffle=True),
    }


@pytest.mark.parametrize("name", list(_sources()))
def test_any_iterable_of_batches_goes_on_exactly(name: str) -> None:
    loader = resumable(_sources()[name], seed=1, train=True)

    def run(number: int, start: int = 0) -> list[Any]:
        torch.rand(1)  # What else is drawn does not matter.
        loader.set_epoch(number)
        loader.skip(start)
        return [[tensor.tolist() for tensor in batch] for batch in loader]

    before = rng_state()["torch"]
    whole = [run(0), run(1)]
    assert run(0) == whole[0]
    assert run(1, 2) == whole[1][2:]
    assert (whole[0] == whole[1]) == (name == "list")
    torch.set_rng_state(before)
    loader.set_epoch(1)
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_dataloader_is_dealt_to_ranks() -> None:
    source = DataLoader(TensorDataset(torch.arange(12.0)), batch_size=2, shuffle=True)
    rows = [resumable(source, train=True, rank=rank, world_size=2) for rank in range(2)]
    seen = [value for row in rows for (batch,) in row for value in batch.tolist()]
    assert sorted(seen) == list(range(12))


def test_a_subset_never_gets_a_stand_in_from_outside() -> None:
    source = DataLoader(Items(20, bad=(2, 3)), sampler=SubsetRandomSampler([1, 2, 3, 4]))
    source.collate_fn = None
    loader = resumable(source, train=True, max_bad=1.0)
    assert set(flat(ids(loader))) == {"1", "4"}


class Told(Dataset):
    """Items that show the epoch that the dataset was told, and their own random seed."""

    def __init__(self) -> None:
        self.epoch, self.inner = -1, False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int]:
        first = item_seed(index)
        if self.inner:  # Loads batches of another loader.
            list(make_loader(Told(), train=False, seed=9))
        assert item_seed(index) == first
        return self.epoch, first % 10**9


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_that_share_a_dataset_tell_it_their_own_epochs(workers: int) -> None:
    data = Told()
    train = make_loader(Subset(data, [0, 1, 2]), train=True, num_workers=workers)
    valid = make_loader(Subset(data, [3]), train=False, num_workers=workers)
    for epoch in (1, 2):
        train.set_epoch(epoch)
        for told, _ in train:
            assert int(told) == epoch
            assert [int(told) for told, _ in valid] == [0]


@pytest.mark.parametrize("source", ["loader", "stream"])
def test_a_loader_leaves_no_epoch_behind(source: str) -> None:
    data = Told()
    outside = data[0]
    loader = make_loader(data, train=True, seed=3)
    if source == "stream":
        loader = resumable((data[index] for index in range(4)), seed=3)
    loader.set_epoch(5)
    plain = sorted(int(number) for _, number in loader)
    assert data[0][1] == outside[1]
    data.inner = True
    loader = make_loader(data, train=True, seed=3)
    loader.set_epoch(5)
    assert sorted(int(number) for _, number in loader) == plain


@pytest.mark.parametrize(
    "text",
    [
        "unable to resize file </torch_20117_1560127402_2> to the right size: No space left (28)",
        "unable to open shared memory object </torch_1_2> in read-write mode: No space left (28)",
        "unable to allocate shared memory(shm) for file </torch_1_2>: Success (0)",
        "unable to write to file </torch_3>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your limit.",
        "received 0 items of ancdata",
    ],
)
def test_each_of_torchs_messages_on_shared_memory_says_what_to_do(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError(text)

    loader = make_loader(Items(), train=True, batch_size=2, num_workers=1)
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__next__", full
    )
    with pytest.raises(OSError, match="--shm-size"):
        list(loader)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(OSError, match="--shm-size"):
        make_loader(Items(), train=True, batch_size=2, num_workers=1)
