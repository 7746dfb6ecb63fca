"""Fingerprints differ by one bit of one element, in every dtype; ranks: test_two_processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.diagnostics.replica_check import ROW, find_differing, fingerprint

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_next_number_has_another_fingerprint(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = torch.randn(7, 5).to(dtype)
    before = fingerprint(weights)
    for index in range(weights.numel()):
        moved = weights.clone().reshape(-1)
        moved[index] = torch.nextafter(moved[index], moved.new_tensor(torch.inf))
        assert fingerprint(moved) != before
    assert fingerprint(weights.clone()) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j])),
        (torch.tensor([True, False]), torch.tensor([False, False])),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1])),
        (torch.zeros(2, 3).t(), torch.ones(2, 3).t()),  # Not contiguous.
    ],
)
def test_other_contents_have_another_fingerprint(one: torch.Tensor, other: torch.Tensor) -> None:
    assert fingerprint(one) != fingerprint(other)


def ulps(tensor: torch.Tensor, changes: dict[int, int]) -> torch.Tensor:
    """Return a copy in which the bits of some elements are larger by these numbers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    copy = tensor.clone()
    bits = copy.reshape(-1).view(kinds[tensor.itemsize])
    for index, change in changes.items():
        bits[index] += change
    return copy


SIZES = st.sampled_from([2, 3, 7, 8, 9, 1000, 2 * ROW, 2 * ROW + 1, 3 * ROW + 5, 40 * ROW + 3])


@given(data=st.data(), size=SIZES, dtype=st.sampled_from([*FLOATS, torch.int8, torch.int64]))
@settings(max_examples=300, deadline=None)
def test_changes_that_cancel_in_a_sum_are_seen(
    data: st.DataObject, size: int, dtype: torch.dtype
) -> None:
    weights = torch.arange(size).to(dtype)
    places = st.lists(st.integers(0, size - 1), min_size=2, max_size=4, unique=True)
    chosen = data.draw(places)
    changes = data.draw(st.permutations([1, -1] if len(chosen) < 4 else [1, -1, 1, -1]))
    moved = ulps(weights, dict(zip(chosen, changes, strict=False)))
    assert fingerprint(moved) != fingerprint(weights)


@pytest.mark.parametrize("words", [2, 3])
def test_changes_in_rows_and_columns_that_cancel_are_seen(words: int) -> None:
    """Positions are weighed by row and by column: neither the cross nor the transpose cancels."""
    weights = torch.zeros(4 * ROW, 1, dtype=torch.int64)
    for changes in (
        {1: 1, ROW + 1: -1}, {1: 1, words: -1, ROW + 1: -1, ROW + words: 1},
        {ROW + words: 1, words * ROW + 1: -1}, {1: 1, 2: -2, 3: 1}, {0: 1, ROW: -2, 2 * ROW: 1},
    ):  # fmt: skip
        assert fingerprint(ulps(weights, changes)) != fingerprint(weights)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype",
    [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
     torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn],
)  # fmt: skip
def test_layout_does_not_count_and_order_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(37, 41).abs().mul(10)
    large = numbers > 7 if dtype is torch.bool else numbers.to(dtype)
    for view in (large, large.t(), large[1:, 1:], large[::2, ::3], large[3], large[:0], large[1, 1],
                 large[5:6, 2:3].expand(4, 4)):  # fmt: skip
        same = view.contiguous().clone()
        assert fingerprint(view).shape == ()
        assert fingerprint(view) == fingerprint(same)
        assert fingerprint(view) == fingerprint(view)
    assert fingerprint(large) != fingerprint(large.t())
    assert fingerprint(large[:0]) == fingerprint(large[:, :0])
    assert fingerprint(large) != fingerprint(large.flip(0))


def test_of_what_is_not_finite_the_fingerprint_is_a_number_too() -> None:
    both = torch.tensor([torch.nan, torch.inf])
    assert fingerprint(both) == fingerprint(both.clone())


def test_one_process_has_nothing_to_compare() -> None:
    assert find_differing({"weight": torch.ones(2)}) == []
