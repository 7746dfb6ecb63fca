"""Parts of messages are one line, whatever they are made of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.texts import cause, first_line, first_names, number, spread


@given(text=st.text(max_size=400))
def test_an_error_is_one_printable_line_that_is_never_empty(text: str) -> None:
    for line in (first_line(ValueError(text)), cause(ValueError(text))):
        assert line
        assert line.isprintable()
        assert len(line) < 400


def test_an_error_without_a_message_is_its_kind() -> None:
    assert (first_line(KeyError()), cause(AssertionError("\n"))) == ("KeyError", "AssertionError")
    assert cause(ValueError("one\ntwo")) == "ValueError: one"


@given(names=st.lists(st.sampled_from("abc"), max_size=9), most=st.integers(1, 9))
def test_names_that_are_left_out_are_counted(names: list[str], most: int) -> None:
    shown = first_names(names, most)
    known, _, more = shown.partition(" and ")
    assert [each for each in known.split(", ") if each] == names[:most]
    assert (int(more.split()[0]) if more else 0) == max(0, len(names) - most)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""), ([None, math.nan], ""), ([3], "3"), ([3.0, 5.0, math.inf], "4 ± 1.414"),
        ([1.7e308, 1.7e308], "too large"),
    ],
)  # fmt: skip
def test_the_spread_is_of_the_known_values(values: list[float | None], text: str) -> None:
    assert spread(values) == text
    assert number(12345678) == "12345678"
