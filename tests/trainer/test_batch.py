"""Batches: padding and its lengths, fields by name, moves between devices and processes."""

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import Batch, Padded, collate, pad, to_device
from trainer.data.batch import batch_ids, count_examples
from trainer.tree import leaves


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), width=st.integers(0, 3))
def test_padding_keeps_every_value_and_the_absolute_lengths(lengths: list[int], width: int) -> None:
    shape = (width,) if width else ()
    tensors = [torch.rand(length, *shape) for length in lengths]
    data, counts = pad(tensors, value=-1.0)
    assert data.shape == (len(lengths), max(lengths), *shape)
    assert counts.dtype == torch.int64
    assert counts.tolist() == lengths
    for row, tensor in zip(data, tensors, strict=True):
        assert torch.equal(row[: len(tensor)], tensor)
        assert bool((row[len(tensor) :] == -1).all())


def test_relative_lengths_are_fractions_of_the_longest() -> None:
    assert pad([torch.zeros(2), torch.zeros(4)]).relative().tolist() == [0.5, 1.0]


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 4)], [(2,), ()], [(2,), (2, 1)]])
def test_examples_that_differ_elsewhere_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"only the first dimension may differ .* got \[\(2,"):
        pad([torch.zeros(shape) for shape in shapes])


def _items() -> list[dict[str, object]]:
    return [
        {"id": f"a{n}", "sig": torch.ones(n), "n": n, "x": n / 2, "s": torch.tensor(n), "ok": n > 1}
        for n in (1, 3)
    ]


def test_items_become_named_fields() -> None:
    batch = collate(_items())
    signals, lengths = batch.sig
    assert signals.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert lengths.tolist() == [1, 3]
    assert batch.id == ["a1", "a3"]
    assert batch.n.tolist() == batch.s.tolist() == [1, 3]
    assert (batch.n.dtype, batch.x.dtype, batch.ok.dtype) == (
        torch.int64,
        torch.float32,
        torch.bool,
    )
    assert len(batch) == 2
    assert list(batch) == ["id", "sig", "n", "x", "s", "ok"]
    assert "sig" in batch
    assert batch["x"].tolist() == [0.5, 1.5]


def test_a_field_that_is_not_there_is_named_beside_those_that_are() -> None:
    batch = collate(_items())
    with pytest.raises(AttributeError, match=r"no field 'wav', only \['id', 'n', 'ok', 's', 'sig'"):
        _ = batch.wav
    with pytest.raises(ValueError, match=r"differ in their fields: \['a'\] and \['b'\]"):
        collate([{"a": 1}, {"b": 1}])


def test_moving_a_batch_moves_its_tensors_and_nothing_else() -> None:
    batch = collate(_items()).to("meta")
    assert {batch.sig.data.device.type, batch.sig.lengths.device.type, batch.n.device.type} == {
        "meta"
    }
    assert batch.id == ["a1", "a3"]
    assert len(batch) == 2


def test_a_batch_can_be_copied_and_given_new_fields() -> None:
    batch = collate(_items())
    twin = copy.deepcopy(batch)
    twin.feats = torch.zeros(2)
    twin.sig.data[0, 0] = 5
    assert "feats" in twin
    assert "feats" not in batch
    assert batch.sig.data[0, 0] == 1
    assert repr(Batch({"x": 1}, 4)) == "Batch(x; 4 examples)"


# Batches of any type

META = torch.device("meta")


class Row(NamedTuple):
    x: Any
    y: Any


@dataclass
class Pair:
    x: Any
    y: Any


class Processed(UserDict):
    """A batch as transformers' processors make it: a mapping that moves itself in place."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]

    def to(self, device: torch.device) -> "Processed":
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


KINDS = {
    "tensor": lambda x: x,
    "dict": lambda x: {"x": x},
    "OrderedDict": lambda x: OrderedDict(x=x),
    "UserDict": lambda x: UserDict(x=x),
    "moves in place": lambda x: Processed(x=x),
    "list": lambda x: [x],
    "tuple": lambda x: (x, "text"),
    "named tuple": lambda x: Row(x, 1),
    "dataclass": lambda x: Pair(x, None),
    "Padded": lambda x: Padded(x, torch.tensor([3, 3])),
    "Batch": lambda x: Batch({"x": x, "parts": [x]}, 2),
    "nested": lambda x: [{"x": (Row(x, [x]), Pair(x, {"z": Batch({"x": x}, 2)}))}, 3],
}


def devices(batch: Any) -> set[str]:
    """The devices of all tensors in a batch."""
    found = set()
    for _, leaf in leaves(batch):
        inner = [leaf[name] for name in leaf] if isinstance(leaf, Batch) else leaf
        if isinstance(leaf, torch.Tensor):
            found.add(leaf.device.type)
        elif inner is not leaf:
            found |= devices(inner)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_type_moves_and_keeps_its_type(kind: str) -> None:
    batch = KINDS[kind](torch.ones(2, 3))
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert devices(moved) == {"meta"}
    assert devices(batch) == {"cpu"}


def test_packed_sequences_are_moved_by_themselves() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    moved = to_device({"x": packed}, META)["x"]
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


def test_what_does_not_move_is_left_as_it_is() -> None:
    thing = object()
    assert to_device([thing, "text", 3, None, b"", {1}], META) == [thing, "text", 3, None, b"", {1}]


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ([torch.zeros(3), torch.zeros(4)], 3),
        ((torch.tensor(1.0), [torch.zeros(5)]), 5),
        ({"id": ["a", "b"], "x": torch.zeros(4)}, 4),
        ({"scale": 2, "id": ["a", "b"]}, 2),
        ({"scale": 2}, 1),
        ({"raw": [{"x": torch.zeros(9)}], "x": torch.zeros(4)}, 4),
        ([{"x": torch.zeros(9)}, {"x": torch.zeros(9)}], 2),
        (Padded(torch.zeros(2, 5), torch.tensor([5, 3])), 2),
        (Batch({"x": torch.zeros(9)}, 6), 6),
        (["a", "b", "c"], 3),
        ("text", 1),
        (object(), 1),
    ],
)
def test_the_examples_of_a_batch_are_counted(batch: Any, count: int) -> None:
    assert count_examples(batch) == count


def test_a_moved_batch_keeps_the_one_that_was_loaded() -> None:
    loaded = collate([{"x": torch.ones(3), "n": 1}, {"x": torch.ones(2), "n": 2}])
    assert loaded.on_host is loaded
    assert loaded.to("cpu").on_host is not loaded  # It is on the host itself.
    moved = to_device(loaded, META)
    assert moved.x.lengths.device == META
    assert moved.on_host is moved.to(META).on_host is loaded
    assert moved.on_host.x.lengths.tolist() == [3, 2]
    moved.n = torch.zeros(2)
    assert moved.on_host.n.tolist() == [1, 2]
    for again in (copy.deepcopy(moved), copy.copy(moved)):
        assert again.on_host.n.tolist() == [1, 2]
    empty = Batch({}, 0)
    assert empty.to(META).on_host is empty


def test_the_examples_of_a_batch_have_names() -> None:
    assert batch_ids({"id": ["a", 2]}) == batch_ids(Batch({"id": ("a", 2)}, 2)) == ["a", "2"]
    assert batch_ids({"id": "a"}) == ["a"]
    assert batch_ids({"x": 1}) == batch_ids(Batch({}, 0)) == batch_ids(torch.zeros(2)) == []
