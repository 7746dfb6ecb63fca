"""Vocabulary of characters: that of the training transcripts, or of the pretrained model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from recipes.asr.text import BLANK
from recipes.finetune.sources import tokenizer_of
from trainer import distributed, json_files
from trainer.loggers.files import replace_file


class Vocabulary:
    """A token a character, with CTC's blank as token 0.

    The characters are those of the training transcripts, or of the tokenizer of a model that was
    trained by CTC before. They are found once and kept in ``file``, from where a resumed run and
    `infer` read them. Where the model's letters are all capitals, texts are in small letters.

    Args:
        file: file of the run.
        source: the model, a folder or a name on the hub, whose own vocabulary is used; None for
            that of the transcripts.

    Attributes:
        tokens: characters by number, the blank first.
        ids: the number that the model has for each, or None.

    Raises:
        ValueError: the model has no vocabulary of characters.
    """

    def __init__(self, file: str | Path, source: str | None = None) -> None:
        self.file = Path(file)
        self.tokens: list[str] = []
        self.ids: list[int] | None = None
        if self.file.exists():
            self._read()
        elif source is not None:
            self._set(*_of_model(source))

    def __len__(self) -> int:
        return len(self.tokens)

    def _set(self, tokens: Sequence[str], ids: Sequence[int] | None) -> None:
        self.tokens, self.ids = list(tokens), None if ids is None else list(ids)
        letters = "".join(each for each in self.tokens if len(each) == 1)
        self.capitals = letters != letters.lower() and letters == letters.upper()
        known = [each.lower() if self.capitals else each for each in self.tokens]
        self._characters = known
        self._numbers = {character: n for n, character in enumerate(known) if len(character) == 1}

    def _read(self) -> None:
        kept = json_files.parse(self.file.read_bytes())
        tokens, ids = (kept.get("tokens"), kept.get("ids")) if isinstance(kept, dict) else (0, 0)
        texts = isinstance(tokens, list) and all(isinstance(each, str) for each in tokens)
        numbers = ids is None or (isinstance(ids, list) and all(type(n) is int for n in ids))
        if not (texts and numbers):
            raise ValueError(f"{self.file} is no list of tokens")
        self._set(tokens, ids)

    def fit(self, texts: Iterable[str]) -> None:
        """Take the characters of the texts, unless there are some, and keep them. A collective."""
        if not self.tokens:
            self._set([BLANK, *sorted({" "}.union(*texts))], None)
        if not self.file.exists() and distributed.is_main():
            kept = {"tokens": self.tokens, "ids": self.ids}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, [json.dumps(kept, indent=1).encode()], "vocabulary")
        distributed.barrier()

    def unknown(self, text: str) -> str:
        return "".join(sorted(set(text) - self._numbers.keys()))

    def encode(self, text: str) -> list[int]:
        if unknown := self.unknown(text):
            raise ValueError(f"{text!r} has characters that the vocabulary lacks: {unknown!r}")
        return [self._numbers[character] for character in text]

    def decode(self, numbers: Sequence[int]) -> str:
        known = (self._characters[n] for n in numbers)
        return " ".join("".join(each for each in known if len(each) == 1).split())


def _of_model(source: str) -> tuple[list[str], list[int]]:
    """Return the tokens of a model's tokenizer with a space for what divides words, and its ids."""
    tokenizer = tokenizer_of(source)
    divider, blank = getattr(tokenizer, "word_delimiter_token", None), tokenizer.pad_token_id
    if divider is None or blank is None:
        raise ValueError(
            f"source {source} has a {type(tokenizer).__name__}, which is no vocabulary of "
            "characters for CTC: leave out codec.source, and those of the transcripts are taken"
        )
    known = {number: token for token, number in tokenizer.get_vocab().items() if number != blank}
    tokens = [" " if token == divider else token for _, token in sorted(known.items())]
    return [BLANK, *tokens], [blank, *sorted(known)]
