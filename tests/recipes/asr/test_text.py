"""Texts to tokens and back."""

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.asr.text import LETTERS, Characters, Pieces, check_texts

words = st.lists(st.text(LETTERS[1:], min_size=1), max_size=8).map(" ".join)


@given(words)
def test_characters_there_and_back(text: str) -> None:
    codec = Characters()
    numbers = codec.encode(text)
    assert len(numbers) == len(text)
    assert all(0 < number < len(codec) for number in numbers)  # 0 is the blank
    assert codec.decode(numbers) == text


def test_decoded_words_have_single_spaces() -> None:
    codec = Characters(" ab")
    assert codec.decode([1, 2, 1, 1, 3, 1]) == "a b"
    assert codec.decode([]) == ""


def test_an_unknown_character_is_named() -> None:
    message = "'naïve café' has characters that the alphabet lacks: 'éï'"
    with pytest.raises(ValueError, match=message):
        Characters().encode("naïve café")


@pytest.mark.parametrize("alphabet", ["abc", "ab ca"])
def test_an_alphabet_without_a_space_or_with_a_letter_twice_is_refused(alphabet: str) -> None:
    with pytest.raises(ValueError, match=f"the alphabet '{alphabet}' must have a space"):
        Characters(alphabet)


def test_unknown_characters_are_told_with_the_utterances_they_are_in() -> None:
    texts = {"one": "fine", "two": "né", "three": "é1", "four": "é"}
    check_texts({"one": "fine"}, Characters())
    with pytest.raises(ValueError, match="transcripts have") as told:
        check_texts(texts, Characters())
    assert str(told.value) == (
        "transcripts have characters that the vocabulary lacks: '1' in three, 'é' in two and 2 more"
    )


def test_without_sentencepiece_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="need sentencepiece: pip install sentencepiece"):
        Pieces("pieces.model", 40)


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="sentencepiece is not installed"
)
class TestPieces:
    texts = ("the cat sat on the mat", "turn the light on", "that hat is on the light")

    def test_there_and_back_in_fewer_tokens_than_letters(self, tmp_path: Path) -> None:
        codec = Pieces(tmp_path / "prepared" / "pieces.model", 40)
        codec.fit(self.texts)
        assert len(codec) == len(codec.tokens) == 40
        for text in self.texts:
            numbers = codec.encode(text)
            assert codec.decode(numbers) == text
            assert len(numbers) < len(text)
            assert 0 not in numbers

    def test_what_was_learned_is_read_again(self, tmp_path: Path) -> None:
        first = Pieces(tmp_path / "pieces.model", 40)
        first.fit(self.texts)
        second = Pieces(tmp_path / "pieces.model", 40)
        second.fit(["entirely other words"])
        assert second.tokens == first.tokens
        with pytest.raises(ValueError, match="has 40 tokens, not 41"):
            Pieces(tmp_path / "pieces.model", 41)

    def test_too_few_texts_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no 400 tokens could be learned"):
            Pieces(tmp_path / "pieces.model", 400).fit(["hello"])

    def test_unknown_characters_are_told(self, tmp_path: Path) -> None:
        codec = Pieces(tmp_path / "pieces.model", 40)
        codec.fit(self.texts)
        assert codec.unknown("the zebra") == "bz"
        with pytest.raises(ValueError, match="has characters that no token has: 'bz'"):
            codec.encode("the zebra")
