"""Data feeds: any source of batches, from any batch on, limited, repeated and dealt to ranks."""

from collections import UserList, deque
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer import distributed
from trainer.data.feed import DataFeed, make_feed
from trainer.data.loader import make_loader
from trainer.options import RunOptions

CPU = torch.device("cpu")


def feed(source: Any, train: bool = True, kwargs: Any = None, **options: Any) -> DataFeed:
    return make_feed(
        source,
        train=train,
        name="train" if train else "valid",
        device=CPU,
        options=RunOptions(**options),
        make_loader=lambda dataset, **given: make_loader(dataset, train=train, **given),
        loader_kwargs=kwargs or {},
    )


def content(feed: DataFeed, epoch: int = 1, start: int = 0) -> list[tuple[list[float], bool]]:
    """The numbers of each batch, and whether it is said to be the last."""
    found = []
    for batch, last in feed.from_batch(epoch, start):
        part = batch[0] if isinstance(batch, (list, tuple)) else batch
        found.append((part.tolist(), last))
    return found


SOURCES = {
    "dataset": lambda: TensorDataset(torch.arange(11.0)),
    "loader": lambda: DataLoader(TensorDataset(torch.arange(11.0)), batch_size=2, shuffle=True),
    "list": lambda: [torch.arange(2.0) + 2 * n for n in range(6)],
}


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_gives_the_same_epoch_from_any_batch_on(name: str) -> None:
    kwargs = {"batch_size": 2} if name == "dataset" else {}
    source = feed(SOURCES[name](), kwargs=kwargs)
    assert source.begin(3) == source.length() == 6
    whole = content(source, 3)
    assert [last for _, last in whole] == [False] * 5 + [True]
    for start in range(7):
        assert content(source, 3, start) == whole[start:]


def test_an_epoch_may_be_limited_and_training_repeated() -> None:
    data = SOURCES["list"]()
    short = feed(data, debug=True, debug_batches=2)
    assert short.length() == 2
    assert [last for _, last in content(short)] == [False, True]
    fixed = feed(SOURCES["loader"](), overfit_batches=2)
    assert fixed.length() == 2
    assert len(content(fixed, 1)) == 2
    assert content(fixed, 1) == content(fixed, 2)
    assert len(content(feed(data, train=False, overfit_batches=2))) == 6


def test_batches_of_a_source_that_knows_no_ranks_are_dealt(monkeypatch: Any) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    seen: dict[bool, list[float]] = {True: [], False: []}
    for train in lengths:
        for rank in range(4):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            source = feed(SOURCES["list"](), train=train)
            batches = content(source)
            assert len(batches) == source.length()
            lengths[train].append(len(batches))
            seen[train] += [batch[0] for batch, _ in batches]
    assert lengths == {True: [1, 1, 1, 1], False: [2, 2, 1, 1]}
    assert sorted(seen[True]) == [0, 2, 4, 6]
    assert sorted(seen[False]) == [0, 2, 4, 6, 8, 10]


def test_what_gives_no_batches_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the valid set is a int; allowed: a Dataset, a DataLoader"
    ):
        feed(3, train=False)
    with pytest.raises(ValueError, match="the train set is a str; allowed: a Dataset"):
        feed("train.csv")
    with pytest.raises(ValueError, match="loader options of the train set name a dataset, which"):
        feed([], kwargs={"dataset": []})
    with pytest.raises(
        ValueError, match=r"loader options \['batch_size'\] were given for the train"
    ):
        feed([], kwargs={"batch_size": 2})


def test_a_loader_that_is_no_iterable_is_refused() -> None:
    with pytest.raises(ValueError, match="made for the train set is a NoneType; allowed"):
        make_feed(
            TensorDataset(torch.arange(3.0)), train=True, name="train", device=CPU,
            options=RunOptions(), make_loader=lambda dataset: None, loader_kwargs={},
        )  # fmt: skip


class Rows:
    """A dataset of another library: it has items and a length, and a sequence it is not."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor(float(range(5)[index]))}


class Table(Rows):
    """One that can be iterated over, row by row, and gives several items at once."""

    def __iter__(self) -> Any:
        return (self[index] for index in range(5))

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Rows, Table])
@pytest.mark.parametrize("size", [None, 2])
def test_a_dataset_may_be_of_any_class(kind: Any, size: int | None) -> None:
    source = feed(kind(), train=False, kwargs=size and {"batch_size": size})
    batches = [batch.x.tolist() for batch, _ in source.from_batch(1, 0)]
    assert batches == ([[0, 1], [2, 3], [4]] if size else [[0], [1], [2], [3], [4]])


def test_sequences_and_tensors_are_batches_and_mappings_are_refused() -> None:
    for source in (deque([torch.ones(2)] * 3), UserList([torch.ones(2)] * 3), torch.ones(3, 2)):
        assert content(feed(source)) == [([1, 1], False)] * 2 + [([1, 1], True)]
    with pytest.raises(ValueError, match="train set is a mapping, a dict; .*: 'train', 'test'"):
        feed({"train": Rows(), "test": Rows()})


def test_a_source_without_a_length_has_none() -> None:
    source = feed(iter([torch.zeros(2), torch.ones(2)]))
    assert source.begin(1) is None
    assert [last for _, last in content(source)] == [False, False]
