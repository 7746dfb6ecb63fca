"""Batches: padding and its lengths, fields by name, moves between devices and processes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import Batch, collate, pad


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
