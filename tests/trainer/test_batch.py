"""Batches: padding and its lengths, fields by name, moves between devices and processes."""

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import Brain, Stage
from trainer.data import Batch, Padded, collate, pad, to_device
from trainer.data.batch import batch_ids, collate_plain, count_examples
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
    assert batch.keys() == ["id", "sig", "n", "x", "s", "ok"]
    assert "sig" in batch
    assert batch["x"].tolist() == [0.5, 1.5]


def test_a_field_that_is_not_there_is_named_beside_those_that_are() -> None:
    batch = collate(_items())
    with pytest.raises(AttributeError, match=r"no field 'wav', only \['id', 'n', 'ok', 's', 'sig'"):
        _ = batch.wav
    for name in ("wav", 0):
        with pytest.raises(KeyError, match=r"no field .*, only \['id', 'n', 'ok', 's', 'sig'"):
            batch[name]
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
        inner = [*leaf] if isinstance(leaf, Batch) else leaf
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
        ({"id": ["a", "b", "c"], "x": [torch.zeros(n) for n in (5, 7, 2)]}, 3),
        (((torch.zeros(5, 3), torch.zeros(7, 3)), ("a", "b")), 2),
        ({"x": [numpy.zeros(5), numpy.zeros(7), numpy.zeros(2)]}, 3),
        ([(torch.zeros(5), "a"), (torch.zeros(7), "b"), (torch.zeros(7), "c")], 3),
        ([(torch.zeros(5, 2), torch.zeros(5)), (torch.zeros(5, 3), torch.zeros(5))], 5),
        ({"x": [torch.zeros(4, 2), torch.zeros(4, 2)]}, 4),
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


# Items of any kind


def test_arrays_and_numbers_of_numpy_are_joined_as_tensors_are() -> None:
    big = numpy.arange(4, dtype=">f4")
    read_only = numpy.ones(2, numpy.float32)
    read_only.flags.writeable = False
    batch = collate([
        {"x": big[::-1], "n": numpy.int64(3), "ok": numpy.bool_(True), "c": numpy.ones((2, 3))},
        {"x": read_only, "n": numpy.int64(4), "ok": numpy.bool_(False), "c": numpy.ones((1, 3))},
    ])  # fmt: skip
    assert batch.x.data.tolist() == [[3, 2, 1, 0], [1, 1, 0, 0]]
    assert batch.x.lengths.tolist() == [4, 2]
    assert batch.n.tolist() == [3, 4]
    assert batch.ok.tolist() == [True, False]
    assert batch.c.data.shape == (2, 2, 3)
    assert batch.c.data.dtype == torch.float64
    texts = collate([{"t": numpy.array(["a", "b"]), "m": numpy.ma.masked_array([1], [1])}])
    assert isinstance(texts.t, list)
    assert isinstance(texts.m, list)


DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.complex64]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4), dims=st.integers(0, 2))
def test_no_number_changes_where_examples_differ_in_dtype(
    dtypes: list[torch.dtype], dims: int
) -> None:
    tensors = [(torch.rand((2,) * dims, dtype=torch.float64) * 3).to(dtype) for dtype in dtypes]
    joined = collate([{"x": tensor} for tensor in tensors]).x
    data = joined.data if dims else joined
    assert data.tolist() == [tensor.tolist() for tensor in tensors]
    orders = {collate([{"x": t} for t in order]).x[0].dtype for order in (tensors, tensors[::-1])}
    assert len(orders) == 1


def test_numbers_that_no_dtype_holds_are_refused_by_the_name_of_their_field() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (torch.tensor([2**24 + 1]), torch.tensor([0.5]), "holds whole numbers up to 16777216"),
        (2**24 + 1, 0.5, "holds whole numbers up to 16777216"),
        (torch.tensor(5000), torch.tensor(0.5).half(), "holds whole numbers up to 2048"),
        (
            numpy.uint16(1),
            numpy.int64(1),
            "no dtype holds the numbers of torch.int64",
        ),
        (2**70, 1, "does not fit 64 bits"),
        (torch.ones(2), torch.tensor(1.0), "only the first dimension may differ"),
    ]
    for first, second, sentence in cases:
        with pytest.raises(ValueError, match=f"^field 'f0': .*{sentence}"):
            collate([{"f0": first}, {"f0": second}])
    assert collate([{"n": 2**53}, {"n": torch.tensor(0.1).double()}]).n.tolist()[0] == 2**53
    assert collate([{"n": 0.1}, {"n": numpy.float64(0.2)}]).n.tolist() == [0.1, 0.2]
    for tensor, value in ((torch.ones(1, dtype=torch.uint8), -100), (torch.ones(1).long(), 0.5)):
        with pytest.raises(ValueError, match=f"cannot hold the padding {value}"):
            pad([tensor, tensor], value)
    assert pad([torch.ones(1).long(), torch.ones(2).long()], -100).data[0].tolist() == [1, -100]


def test_numbers_may_be_complex() -> None:
    batch = collate([{"z": 1j, "w": torch.ones(2) + 1j}, {"z": 2j, "w": torch.ones(1) * 1j}])
    assert batch.z.tolist() == [1j, 2j]
    assert batch.w.data.tolist() == [[1 + 1j, 1 + 1j], [1j, 0]]


def test_nested_fields_are_joined_and_keep_their_type() -> None:
    def item(n: int) -> dict[str, Any]:
        audio = {"array": numpy.ones(n), "rate": 16000, "path": f"{n}.wav"}
        return {
            "audio": audio, "user": UserDict(x=torch.ones(n)), "row": Row(torch.ones(n), n),
            "pair": Pair(torch.ones(n), None), "text": None, "span": (n, n), "ids": [1] * n,
            "deep": {"a": {"b": n}}, "maybe": torch.ones(n) if n == 2 else None,
        }  # fmt: skip

    batch = collate([item(2), item(3)])
    assert batch.audio["array"].lengths.tolist() == [2, 3]
    assert batch.audio["rate"].tolist() == [16000, 16000]
    assert batch.audio["path"] == ["2.wav", "3.wav"]
    assert type(batch.audio) is dict
    assert type(batch.user) is UserDict
    assert batch.user["x"].data.shape == batch.row.x.data.shape == batch.pair.x.data.shape == (2, 3)
    assert type(batch.row) is Row
    assert batch.row.y.tolist() == [2, 3]
    assert type(batch.pair) is Pair
    assert batch.pair.y == batch.text == [None, None]
    assert batch.span == [(2, 2), (3, 3)]
    assert batch.ids == [[1, 1], [1, 1, 1]]
    assert batch.deep["a"]["b"].tolist() == [2, 3]
    assert batch.maybe[1] is None
    assert devices(batch.to("meta")) == {"meta"}
    with pytest.raises(ValueError, match=r"^field 'm': examples of a batch differ in their fields"):
        collate([{"m": {"a": 1}}, {"m": {"b": 1}}])


def test_items_may_be_dataclasses_and_fields_in_any_order() -> None:
    pairs = collate([Pair(torch.ones(2), "a"), Pair(torch.ones(3), "b")])
    assert type(pairs) is Pair
    assert pairs.x.lengths.tolist() == [2, 3]
    assert pairs.y == ["a", "b"]
    assert count_examples(pairs) == 2
    batch = collate([{"a": 1, "b": 2}, {"b": 4, "a": 3}])
    assert (batch.a.tolist(), batch.b.tolist()) == ([1, 3], [2, 4])


def test_what_torch_refuses_in_tuples_becomes_a_list() -> None:
    x, y, z = collate_plain([(torch.ones(2), None, Pair(1, 2)), (torch.ones(2), 3, Pair(3, 4))])
    assert x.shape == (2, 2)
    assert y == [None, 3]
    assert z.x.tolist() == [1, 3]
    row = collate_plain([Row(1, None), Row(2, None)])
    assert type(row) is Row
    assert row.x.tolist() == [1, 2]
    for values in ([None, 1], [1, None], [None, torch.ones(2)], [(1, 2), None], [(1, 2), 5]):
        assert collate_plain([(each, 1) for each in values])[0] == values
    for rows in ([{"x": 1}, {"x": 1, "y": 2}], [{"x": 1, "y": 2}, {"x": 1}]):
        for items in (rows, [(row, 0) for row in rows]):
            with pytest.raises(ValueError, match="differ in their fields: .*'y'"):
                collate_plain(items)
    with pytest.raises(RuntimeError) as caught:
        collate_plain([(torch.ones(2),), (torch.ones(3),)])
    assert "collate_fn=trainer.data.collate pads" in caught.value.__notes__[0]
    assert collate_plain([{"x": 1, "y": None}, {"y": 2, "x": 3}])["y"] == [None, 2]
    for items in ([{"x": 1}, 1], [1, 2]):
        with pytest.raises(ValueError, match="example of a batch is of type int; allowed: a map"):
            collate(items)


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="collate got no examples"):
        collate([])
    with pytest.raises(ValueError, match="pad got no tensors"):
        pad([])


def test_a_batch_unpacks_to_its_values() -> None:
    ids, (signals, lengths) = collate([{"id": "a", "sig": torch.ones(2)}] * 2)
    assert ids == ["a", "a"]
    assert (signals.shape, lengths.tolist()) == ((2, 2), [2, 2])
    batch = collate(_items())
    assert dict(batch).keys() == {*batch.keys()}


class Mover:
    """An object with a method ``to``, which returns nothing."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)


def test_objects_with_a_method_to_are_moved_and_counted() -> None:
    moved = to_device({"m": Mover(torch.ones(3, 2)), "kind": Mover}, META)
    assert moved["m"].x.device == META
    assert moved["kind"] is Mover
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    for batch in (Batch({"p": packed}, 2).to(META).p, to_device(Row(packed, 1), META).x):
        assert batch.data.device == META
        assert batch.batch_sizes.device.type == "cpu"
    counts = [
        (packed, 2), ({"p": packed}, 2), (Mover(torch.ones(3, 2)), 3), (numpy.ones((4, 2)), 4),
        (Pair(numpy.ones((4, 2)), 1), 4), (Pair(["a", "b"], 1), 2),
        (UserDict(x=torch.ones(5)), 5), (numpy.int64(3), 1),
        ([Pair(torch.ones(9), 1)] * 3, 3), (({"x": torch.ones(6)}, {"y": torch.ones(6)}), 6),
        ({"scale": numpy.float32(3), "x": torch.ones(2)}, 2), ([Batch({}, 6)], 6),
    ]  # fmt: skip
    for batch, count in counts:
        assert count_examples(batch) == count, batch


# Advice


@pytest.mark.parametrize(
    "use",
    [
        lambda wav: torch.nn.Linear(3, 1)(wav),
        lambda wav: torch.nn.Conv1d(3, 1, 1)(wav),
        lambda wav: torch.nn.GRU(3, 1)(wav),
        lambda wav: torch.nn.Embedding(3, 1)(wav),
        lambda wav: wav.mean(),
        lambda wav: torch.ones(2, 3) - wav,
        lambda wav: torch.ones(2, 3) * wav,
        lambda wav: torch.stft(wav, 4),
    ],
)
def test_a_padded_handed_to_a_layer_is_told_how_to_unpack_it(use: Any) -> None:
    batch = collate([{"id": "a", "text": torch.ones(2), "wav": torch.ones(3)}] * 2)

    class Small(Brain):
        def compute_forward(self, batch: Any, stage: Stage) -> Any:
            wav = batch.wav if isinstance(batch, Batch) else batch["wav"]
            return use(wav)

    brain = Small({"net": torch.nn.Linear(1, 1)}, torch.optim.SGD, run_opts={"device": "cpu"})
    for fields, shown in ((batch, "batch.wav"), (dict(batch), "batch['wav']")):
        with pytest.raises((TypeError, AttributeError)) as caught:
            brain.evaluate([fields], progressbar=False)
        assert f"`wav, lengths = {shown}`" in caught.value.__notes__[0]
        assert len(caught.value.__notes__) == 1
