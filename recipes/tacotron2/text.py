"""Texts to the symbols that are synthesised: characters, or phonemes by espeak-ng.

`spell_out` turns a text as people write it into one as it is read aloud, by the rules of
`recipes.tacotron2.number_words`. What is not surely read in one way is refused with its place, and
so is a character that a front end does not know: a synthesiser that guesses says something else
than the text.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

from recipes.tacotron2 import phonemiser
from recipes.tacotron2.number_words import abbreviations_in_words, in_words
from trainer.texts import first_names

PAD, END = "<pad>", "<end>"
PUNCTUATION = "!'(),-.:;?"
LETTERS = f" {PUNCTUATION}abcdefghijklmnopqrstuvwxyz"
# What word processors make of quotation marks, apostrophes and dashes.
TYPOGRAPHY = str.maketrans(
    {"’": "'", "‘": "'", "“": "", "”": "", '"': "", "–": "-", "—": "-", "…": "..."}
)

# The sounds of English as espeak-ng writes them. A stressed or a long vowel is a symbol of its own:
# marks of stress and length have no sound that attention could look at.
VOWELS = "aæɐɑɒɔəɚɛɜeɪiᵻoʊuʌ"
CONSONANTS = "bdðfɡhjklmnŋpɹrɾsʃtθvwxzʒʔ"
SYLLABIC = "̩"  # a combining mark: the n of "button"
STRESSES, LENGTH = ("", "ˈ", "ˌ"), "ː"
VOICE = re.compile(r"[A-Za-z0-9]+([-+][A-Za-z0-9]+)*", re.ASCII)  # never a path of a voice file
SOUND = re.compile(rf"[ˈˌ]?.[{LENGTH}{SYLLABIC}]?")


class Front(Protocol):
    """A text front end: ``symbols`` are the names of its numbers, that of padding first."""

    symbols: list[str]

    def __len__(self) -> int: ...

    def unknown(self, text: str) -> list[tuple[int, str]]:
        """The places and characters of a text that cannot be read."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of the symbols of texts, each with that of the end last.

        Raises ValueError for a text that cannot be read.
        """


class Characters:
    """A symbol a letter or mark of ``alphabet``; capital letters are read as small ones."""

    def __init__(self, alphabet: str = LETTERS) -> None:
        if len(set(alphabet)) < len(alphabet):
            raise ValueError(f"the alphabet {alphabet!r} has a character twice")
        self.alphabet = alphabet
        self.symbols = [PAD, END, *alphabet]
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def unknown(self, text: str) -> list[tuple[int, str]]:
        return _strange(text, self.alphabet)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        check_texts({repr(text): text for text in texts}, self)
        end = self._numbers[END]
        return [[*(self._numbers[each.lower()] for each in text), end] for text in texts]


class Phonemes:
    """A symbol a sound, as espeak-ng pronounces English; spaces and punctuation stay.

    Needs espeak-ng, of the extra ``demo``, which is asked in a process of its own. ``voice`` is one
    of its languages, such as "en-us" or "en-gb-x-rp". ``silent`` are marks of punctuation that are
    read over: those that the texts to train on do not have, so that nothing was learned of them.
    """

    def __init__(self, voice: str = "en-us", silent: str = "") -> None:
        if strange := sorted(set(silent) - set(PUNCTUATION)):
            raise ValueError(f"silent has {strange[0]!r}; allowed: marks of {PUNCTUATION}")
        if not VOICE.fullmatch(voice):
            raise ValueError(f"voice is {voice!r}; allowed: names such as en-us and en-gb-x-rp")
        self.voice, self.silent = voice, silent
        vowels = ["".join(parts) for parts in product(STRESSES, VOWELS, ("", LENGTH))]
        syllabic = [f"{stress}{each}{SYLLABIC}" for stress in STRESSES for each in "lmn"]
        self.symbols = [PAD, END, " ", *PUNCTUATION, *CONSONANTS, *vowels, *syllabic]
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def unknown(self, text: str) -> list[tuple[int, str]]:
        return _strange(text, LETTERS)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        check_texts({repr(text): text for text in texts}, self)
        end = self._numbers[END]
        found = []
        for text, said in zip(texts, pronounced(texts, self.voice), strict=True):
            sounds = [each for each in SOUND.findall(said) if each not in set(self.silent)]
            strange = sorted(set(sounds) - self._numbers.keys())
            if strange or not sounds:
                raise ValueError(
                    f"espeak-ng pronounces {text!r} as {said!r}; "
                    f"not known as sounds of English: {', '.join(strange) or 'silence'}"
                )
            found.append([*(self._numbers[each] for each in sounds), end])
        return found


def pronounced(texts: Sequence[str], voice: str) -> list[str]:
    """Texts in the International Phonetic Alphabet, by espeak-ng in a process of its own.

    Raises ImportError where it is not installed, RuntimeError where it fails.
    """
    package = importlib.util.find_spec("espeakng_loader")  # found, but not imported
    if package is None or package.origin is None:
        raise ImportError(
            "phonemes need espeak-ng: pip install 'cortex-speech[demo]' (or use the front end "
            "recipes.tacotron2.text.Characters, which needs nothing)"
        )
    program = [sys.executable, "-I", phonemiser.__file__, str(Path(package.origin).parent)]
    lines = "".join(json.dumps({"voice": voice, "text": text}) + "\n" for text in texts)
    done = subprocess.run(program, input=lines.encode(), capture_output=True, check=False)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip() or "it gave no reason"
        raise RuntimeError(f"espeak-ng ended with status {done.returncode}: {told}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _strange(text: str, alphabet: str) -> list[tuple[int, str]]:
    return [(place, each) for place, each in enumerate(text) if each.lower() not in alphabet]


def check_texts(texts: Mapping[str, str], front: Front) -> None:
    """Check that texts can be read.

    Raises ValueError if texts, by the names of their utterances, are empty or have characters that
    the front end does not know.
    """
    if empty := [name for name, text in texts.items() if not text.strip()]:
        raise ValueError(f"there is no text to say in {first_names(empty, 1)}")
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        for place, character in front.unknown(text):
            found.setdefault(character, []).append(f"{name} at character {place + 1}")
    if found:
        told = "; ".join(f"{each!r} in {first_names(found[each], 1)}" for each in sorted(found))
        raise ValueError(f"the text front end does not know {told}")


def readable(name: str, text: str, front: Front) -> str:
    """A text as people write it, spelled out, of which the front end knows every character.

    Raises ValueError for an empty one and for unknown characters, with their places in ``text``.
    """
    spelled = spell_out(text, name) if text.strip() else ""
    strange = {each for _, each in front.unknown(spelled)}
    # What is spelled out is not strange, and nor is what came of it but is not in the text itself.
    as_written = "".join(each if each in strange else " " for each in text)
    check_texts({name: as_written if strange & set(text) else spelled}, front)
    return spelled


def plain(text: str) -> str:
    """A text with typewriter's apostrophes and dashes, no quotation marks, and single spaces."""
    return " ".join(text.translate(TYPOGRAPHY).split())


def spell_out(text: str, name: str = "the text") -> str:
    """A text with its numbers, units and abbreviations as words, and single spaces.

    Raises ValueError with ``name`` for a number of which it is not sure how it is read.
    """
    try:
        return plain(abbreviations_in_words(in_words(text)))
    except ValueError as error:
        raise ValueError(f"{name} has {error}") from None
