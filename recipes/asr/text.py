"""Texts to token numbers and back. Token 0 is CTC's blank, which no text has."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from trainer import distributed

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
BLANK = "<blank>"


class Codec(Protocol):
    """Vocabulary of a recogniser. ``tokens`` are its names, the blank first."""

    tokens: list[str]

    def fit(self, texts: Iterable[str]) -> None:
        """Make ready for the training set, whose texts these are."""

    def unknown(self, text: str) -> str:
        """The characters of a text that cannot be encoded."""

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens. Raises ValueError for unknown characters."""

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of tokens, with single spaces between words."""


class Characters:
    """A token a character of ``alphabet``; a space is one of them."""

    def __init__(self, alphabet: str = LETTERS) -> None:
        if " " not in alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"the alphabet {alphabet!r} must have a space, and no character twice")
        self.tokens = [BLANK, *alphabet]
        self._numbers = {character: n for n, character in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def fit(self, texts: Iterable[str]) -> None:
        """Nothing: the alphabet is given."""

    def unknown(self, text: str) -> str:
        return "".join(sorted(set(text) - self._numbers.keys()))

    def encode(self, text: str) -> list[int]:
        if unknown := self.unknown(text):
            raise ValueError(f"{text!r} has characters that the alphabet lacks: {unknown!r}")
        return [self._numbers[character] for character in text]

    def decode(self, numbers: Sequence[int]) -> str:
        return " ".join("".join(self.tokens[n] for n in numbers).split())


class Pieces:
    """Byte-pair encoding by sentencepiece: ``size`` tokens, learned from the training texts.

    They are learned once and kept in ``file``, from where a resumed run and `infer` read them.
    """

    def __init__(self, file: str | Path, size: int) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                "tokens of several letters need sentencepiece: pip install sentencepiece (or use "
                "recipes.asr.text.Characters, which needs nothing)"
            ) from error
        self._library = sentencepiece
        self.file, self.size = Path(file), size
        self.tokens: list[str] = []
        if self.file.exists():
            self._load()

    def __len__(self) -> int:
        return self.size

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the tokens, unless the file was there. Every process calls it; one learns."""
        if not self.tokens:
            if distributed.is_main():
                self._learn(texts)
            distributed.barrier()
            self._load()

    def _learn(self, texts: Iterable[str]) -> None:
        model = io.BytesIO()
        settings = {"model_type": "bpe", "character_coverage": 1.0, "bos_id": -1, "eos_id": -1}
        try:
            self._library.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=self.size,
                unk_id=0,  # no text has it (see `unknown`), and so it can be the blank
                normalization_rule_name="identity",
                minloglevel=2,
                **settings,
            )
        except RuntimeError as error:  # too few different texts for so many tokens
            raise ValueError(f"no {self.size} tokens could be learned: {error}") from error
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(model.getvalue())

    def _load(self) -> None:
        model = self._model = self._library.SentencePieceProcessor(model_file=str(self.file))
        found = model.get_piece_size()
        if found != self.size:
            raise ValueError(f"{self.file} has {found} tokens, not {self.size}")
        self.tokens = [BLANK, *(model.id_to_piece(n) for n in range(1, found))]
        self._characters = {character for token in self.tokens[1:] for character in token}

    def unknown(self, text: str) -> str:
        return "".join(sorted(set(text) - self._characters - {" "}))

    def encode(self, text: str) -> list[int]:
        if unknown := self.unknown(text):
            raise ValueError(f"{text!r} has characters that no token has: {unknown!r}")
        return list(self._model.encode(text))

    def decode(self, numbers: Sequence[int]) -> str:
        return str(self._model.decode(list(numbers)))


def check_texts(texts: Mapping[str, str], codec: Codec) -> None:
    """Raise ValueError if texts, by the ids of their utterances, have unknown characters."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        for character in codec.unknown(text):
            found.setdefault(character, []).append(name)
    if found:
        listed = ", ".join(
            f"{character!r} in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
            for character, names in sorted(found.items())
        )
        raise ValueError(f"transcripts have characters that the vocabulary lacks: {listed}")
