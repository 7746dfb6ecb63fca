"""The grammars: what is said is spelled as it sounds, and no split knows another's sentences."""

import re
from itertools import islice

import pytest

from recipes.common.sentences import GRAMMARS, SPLITS, ordinal, sentences, spelled, vocabulary

STYLES = sorted(GRAMMARS)


@pytest.mark.parametrize("style", STYLES)
def test_splits_share_no_sentence_and_repeat_none(style: str) -> None:
    drawn = {split: list(islice(sentences(split, style, seed=3), 300)) for split in SPLITS}
    every = [sentence for some in drawn.values() for sentence in some]
    assert len(every) == 900
    assert len(set(every)) == 900


@pytest.mark.parametrize("style", STYLES)
def test_another_seed_does_not_carry_a_sentence_into_another_split(style: str) -> None:
    test = {s for seed in range(4) for s in islice(sentences("test", style, seed), 200)}
    train = {s for seed in range(4) for s in islice(sentences("train", style, seed), 500)}
    assert len(test) > 700
    assert len(train) > 1800
    assert not test & train


@pytest.mark.parametrize("style", STYLES)
def test_a_longer_list_begins_with_the_shorter_one(style: str) -> None:
    assert list(islice(sentences("train", style), 50))[:20] == list(
        islice(sentences("train", style), 20)
    )


@pytest.mark.parametrize("style", STYLES)
def test_transcripts_are_lower_case_words_and_single_spaces(style: str) -> None:
    drawn = list(islice(sentences("train", style), 1000))
    assert len(drawn) == 1000
    assert all(re.fullmatch(r"[a-z']+( [a-z']+)*", sentence) for sentence in drawn)


@pytest.mark.parametrize(("style", "fewest", "most"), [("commands", 60, 110), ("prose", 300, 500)])
def test_the_words_of_training_are_all_there_are(style: str, fewest: int, most: int) -> None:
    drawn = {word for s in islice(sentences("train", style), 2000) for word in s.split()}
    assert drawn == vocabulary(style)  # so no test sentence has a word never heard in training
    assert fewest <= len(drawn) <= most


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (205, "two hundred and five"),
        (1000, "one thousand"),
        (1006, "one thousand and six"),
        (7642, "seven thousand six hundred and forty two"),
        (300_000, "three hundred thousand"),
    ],
)
def test_numbers_are_spelled_as_they_are_said(number: int, words: str) -> None:
    assert spelled(number) == words


def test_numbers_have_spellings_of_their_own() -> None:
    assert len({spelled(number) for number in range(10_000)}) == 10_000
    assert len({ordinal(day) for day in range(1, 32)}) == 31
    assert ordinal(31) == "thirty first"


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_a_number_out_of_range_is_named(number: int) -> None:
    with pytest.raises(ValueError, match=f"can spell 0 to 999999, not {number}"):
        spelled(number)


def test_an_unknown_split_or_style_is_named_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"split .* is 'dev', not one of \['train', 'valid', 'test'\]"
    ):
        next(sentences("dev", "prose"))
    with pytest.raises(
        ValueError, match=r"style .* is 'verse', not one of \['commands', 'prose'\]"
    ):
        next(sentences("train", "verse"))
