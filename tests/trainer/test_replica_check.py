"""Fingerprints differ by one bit of one element, in every dtype; ranks: test_two_processes."""

import pytest
import torch

from trainer.distributed.replica_check import find_differing, fingerprint

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


def test_of_what_is_not_finite_the_fingerprint_is_a_number_too() -> None:
    both = torch.tensor([torch.nan, torch.inf])
    assert fingerprint(both) == fingerprint(both.clone())


def test_one_process_has_nothing_to_compare() -> None:
    assert find_differing({"weight": torch.ones(2)}) == []
