"""Text front ends: what they read, and what they refuse."""

import importlib.util
import re
from itertools import islice

import pytest

from recipes.common.sentences import sentences
from recipes.tacotron2.text import END, PAD, Characters, Phonemes, check_texts, readable, spell_out

speaking = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo"
)


def test_characters_are_numbered_behind_padding_and_end() -> None:
    front = Characters(" abc.")
    assert front.symbols == [PAD, END, " ", "a", "b", "c", "."]
    assert front.encode(["A cab.", "b"]) == [[3, 2, 5, 3, 4, 6, 1], [4, 1]]


def test_an_alphabet_has_no_character_twice() -> None:
    with pytest.raises(ValueError, match="the alphabet 'abca' has a character twice"):
        Characters("abca")


def test_unknown_characters_are_told_with_their_places() -> None:
    texts = {"one": "ja, señor", "two": "¿qué?", "three": "ñandú", "four": "plain"}
    sentence = (
        "the text front end does not know '¿' in two at character 1; 'é' in two at character 4; "
        "'ñ' in one at character 7 and 1 more; 'ú' in three at character 5"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_texts(texts, Characters())
    for front in (Characters(), Phonemes()):
        with pytest.raises(ValueError, match="does not know 'ñ' in 'señor' at character 3"):
            front.encode(["fine", "señor"])


@pytest.mark.parametrize("empty", ["", "  ", "\t"])
def test_an_empty_text_is_told(empty: str) -> None:
    with pytest.raises(ValueError, match="there is no text to say in line 2 and 1 more"):
        check_texts({"line 1": "yes", "line 2": empty, "line 5": ""}, Characters())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Dr. Smith has 3 cats.", "doctor Smith has three cats."),
        ("It costs $5.20.", "It costs five dollars and twenty cents."),
        ("45% of 12 km", "forty five percent of twelve kilometers"),
        ("Don’t go — “now”", "Don't go - now"),
        ("  two   spaces ", "two spaces"),
        ("Mrs. No said No. R&B!", "missus No said No. R and B!"),
        ("The Sun rose; he Sat in the U.S.", "The Sun rose; he Sat in the U.S."),
    ],
)
def test_numbers_and_abbreviations_are_spelled_out(written: str, said: str) -> None:
    assert spell_out(written) == said


def test_what_is_not_known_after_spelling_is_told_by_its_place_in_the_text() -> None:
    front = Characters()
    assert readable("line 1", "Room 12 & 13", front) == "Room twelve and thirteen"
    with pytest.raises(ValueError, match="does not know 'ß' in line 7 at character 13"):
        readable("line 7", "12 dollars, ßt", front)
    with pytest.raises(ValueError, match="there is no text to say in line 7"):
        readable("line 7", "   ", front)


def test_a_number_that_is_not_surely_read_in_one_way_is_told() -> None:
    with pytest.raises(ValueError, match="line 3 has '5€', which cannot be spelled out"):
        readable("line 3", "it costs 5€ now", Characters())


def test_without_espeak_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="phonemes need espeak-ng: pip install .*or use the front"
    ):
        Phonemes().encode(["yes"])


@speaking
class TestPhonemes:
    def test_stressed_and_long_vowels_are_symbols(self) -> None:
        front = Phonemes()
        numbers = front.encode(["The farmer, sold it!"])[0]
        said = [front.symbols[number] for number in numbers]
        assert "".join(said) == "ðə fˈɑːɹmɚ, sˈoʊld ɪt!<end>"
        assert "ˈɑː" in said
        assert said[-1] == END

    def test_marks_that_nothing_was_learned_of_are_read_over(self) -> None:
        deaf = Phonemes(silent="!,")
        assert deaf.encode(["The farmer, sold it!"]) == Phonemes().encode(["The farmer sold it"])
        assert deaf.encode(["Sold. It?"]) == Phonemes().encode(["Sold. It?"])
        with pytest.raises(ValueError, match="pronounces '!!' as '!!'.*: silence"):
            deaf.encode(["!!"])
        with pytest.raises(ValueError, match="silent has 'x'; allowed: marks of !"):
            Phonemes(silent="!x")

    def test_all_that_the_embedded_speech_says_is_known(self) -> None:
        front = Phonemes()
        texts = list(islice(sentences("train", "prose"), 300))
        numbers = front.encode(texts)
        assert len(numbers) == 300
        assert {0} not in map(set, numbers)
        assert max(map(max, numbers)) < len(front)
        assert front.encode(texts[7:9]) == numbers[7:9]

    def test_a_voice_that_is_not_there_is_told(self) -> None:
        with pytest.raises(RuntimeError, match="status 1: espeak-ng has no voice 'martian'"):
            Phonemes("martian").encode(["yes"])
