"""Corpora of one voice as lhotse's cuts of train, valid and test, and datasets of their mels.

Each corpus is a function that a YAML names with its arguments:

    corpus: !name:recipes.tacotron2.data.readings {data_folder: !ref <data_folder>, …}

and that returns ``{"train": cuts, "valid": cuts, "test": cuts}``, each cut with a text in which
numbers and abbreviations are spelled out.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import check_recordings
from recipes.common.cuts import CutSet, MonoCut, count_files, cut_of, sound_of, sounds
from recipes.common.loading import filter_by_duration, load, transcript
from recipes.common.mel import LogMel
from recipes.common.paths import existing
from recipes.common.speech import one_voice_reading, to_cuts
from recipes.common.tables import TableError, check_unique, named, read_lines
from recipes.tacotron2.text import Front, check_texts, plain, spell_out
from trainer.data import BadItemPolicy
from trainer.seed import derive
from trainer.texts import first_names

logger = logging.getLogger(__name__)

Corpus = Mapping[str, CutSet]
TABLE = "metadata.csv"
LAYOUT = "a metadata.csv of lines id|text or id|text|… and a folder wavs with a sound file for each"
MARGIN = 0.05  # seconds of quiet that trimming leaves


# ------------------------------------------------------------------------------ embedded sentences


def embedded(
    train: int, valid: int, test: int, sample_rate: int = 16000, longest: int | None = None
) -> Corpus:
    """So many synthesised sentences of prose each, by one voice; no sentence is in two splits.

    ``longest`` is how many characters they have at most.
    """
    counts = {"train": train, "valid": valid, "test": test}
    return {
        split: to_cuts(one_voice_reading(split, count, sample_rate, longest=longest))
        for split, count in counts.items()
    }


# -------------------------------------------------------------------------------- recorded readings


def readings(
    data_folder: str,
    valid: int,
    test: int,
    column: int = 1,
    spell: bool = True,
    lengths: tuple[float, float] = (0.0, float("inf")),
    sounds: str = "",
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """Recordings of one voice with their texts, in the layout of LJSpeech (K. Ito, 2017).

    Which texts are held out depends on the texts alone; those said twice are in one split,
    however they are written in capitals and punctuated.

    Args:
        data_folder: has a ``metadata.csv`` of lines ``id|text|…``, and ``wavs/id.wav`` (or .flac,
            .ogg, .mp3, .aiff and others).
        valid: number of different texts held out to validate.
        test: number of different texts held out to test.
        column: number of the column with the text (LJSpeech's column 2: numbers spelled out).
        spell: numbers and abbreviations are still to be spelled out.
        lengths: the shortest and the longest, in seconds; others are left out.
        sounds: texts with one of these characters tell of a sound, and are left out.
        on_bad: handling of unusable files, and of texts with a number that is not surely read in
            one way, as in the run options.
        max_bad: largest share of these, as in the run options.
        follow_links: symbolic links may lead out of ``wavs``.

    Raises ValueError for a folder that is missing or has another layout, for an empty text, and
    where too few texts are left.
    """
    folder = existing(data_folder, LAYOUT)
    files = _readings(folder, column, spell, follow_links)
    for path, each in list(files.items()):
        if set(each.text) & set(sounds):
            logger.info("%s is no speech, left out: %s", each.id, each.text)
            del files[path]
    headers = check_recordings(files, on_bad=on_bad, max_bad=max_bad)
    cuts = filter_by_duration(
        (
            cut_of(path, header, files[path].id, text=files[path].text)
            for path, header in headers.items()
        ),
        *lengths,
    )
    if spell:
        lines = {each.id: f"line {each.line} of {folder / TABLE}" for each in files.values()}
        cuts = _spelled(cuts, lines, BadItemPolicy(on_bad, max_bad))
    return _split(cuts, valid, test)


class _Reading(NamedTuple):
    id: str
    text: str
    line: int


def _readings(folder: Path, column: int, spell: bool, follow_links: bool) -> dict[Path, _Reading]:
    """Return the texts of a metadata.csv by file."""
    table = folder / TABLE
    if not table.exists():
        raise ValueError(
            f"{folder} has another layout: it has no metadata.csv; expected was {LAYOUT}"
        )
    rows = [
        (line, [field.strip() for field in line.text.split("|")])
        for line in read_lines(table, LAYOUT)
    ]
    check_unique(table, [(line.number, fields[0]) for line, fields in rows])
    place = folder / "wavs"
    find = partial(sound_of, sounds(place), place, follow_links=follow_links)
    found = []
    for line, fields in rows:
        if len(fields) <= column:
            raise TableError(
                table,
                f"has {len(fields)} columns: {line.text[:80]!r}; expected were an id and, in "
                f"column {column + 1}, a text, separated by |",
                line.number,
            )
        if not fields[column]:
            raise TableError(table, f"has no text: {line.text[:80]!r}", line.number)
        text = fields[column] if spell else plain(fields[column])
        reading = _Reading(fields[0], text, line.number)
        found.append((named(table, line.number, find, fields[0]), reading))
    check_unique(table, [(each.line, os.path.relpath(path, folder)) for path, each in found])
    return dict(found)


def _spelled(cuts: CutSet, lines: Mapping[str, str], policy: BadItemPolicy) -> CutSet:
    """Spell out the texts of cuts, whose lines are known by id; one that cannot be is bad."""
    good, bad = [], []
    for cut in cuts:
        said = cut.supervisions[0]
        try:
            said.text = spell_out(said.text, cut.id)
            good.append(cut)
        except ValueError as error:
            bad.append((lines[cut.id], str(error)))
    policy.handle(bad)
    policy.check(policy.skipped, len(cuts), "texts")
    return CutSet.from_cuts(good)


def _split(cuts: CutSet, valid: int, test: int) -> Corpus:
    """Hold out so many texts, chosen by what they say."""
    written: dict[str, set[str]] = {}
    for cut in cuts:
        written.setdefault(_said(cut), set()).add(_text(cut))
    texts = sorted(written, key=lambda said: derive(0, "split", min(written[said])))
    if len(texts) <= valid + test:
        raise ValueError(
            f"valid: {valid} and test: {test} leave nothing to train on: there are {len(texts)} "
            "different texts"
        )
    held = dict.fromkeys(texts[:test], "test") | dict.fromkeys(texts[test : test + valid], "valid")
    parts: dict[str, list[MonoCut]] = {"train": [], "valid": [], "test": []}
    for cut in cuts:
        parts[held.get(_said(cut), "train")].append(cut)
    return {split: CutSet.from_cuts(part) for split, part in parts.items()}


def _text(cut: Any) -> str:
    return str(transcript(cut)["text"])


def _said(cut: Any) -> str:
    """The words of a text, or the text where it has none."""
    text = _text(cut).casefold()
    return " ".join(re.findall(r"\w+", text)) or text


# --------------------------------------------------------------------------------- cuts to datasets


class Mels(Dataset[dict[str, Any]]):
    """Utterances as ``{"id", "text", "tokens", "mel"}``: symbols (L,) and log-mels (F, M).

    Args:
        cuts: of any sample rate, with a text each.
        tokens: the symbols of each.
        mel: makes spectrograms, at its own sample rate.
        quiet: before and after it is cut off what is so many dB below the loudest 10 ms; None
            leaves everything.
        cached: keep the spectrograms in memory.
    """

    def __init__(
        self,
        cuts: Sequence[Any],
        tokens: Sequence[Sequence[int]],
        mel: LogMel,
        quiet: float | None = None,
        cached: bool = False,
    ) -> None:
        self.cuts, self.tokens, self.mel = cuts, tokens, mel
        self.quiet, self.cached = quiet, cached
        self._known: dict[int, Tensor] = {}

    @property
    def durations(self) -> list[float]:
        """Seconds of each utterance."""
        return [cut.duration for cut in self.cuts]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cut = self.cuts[index]
        mel = self._known.get(index)
        if mel is None:
            mel = self._mel(index)
            if self.cached:
                self._known[index] = mel
        tokens = torch.tensor(self.tokens[index])
        return {"id": cut.id, "text": _text(cut), "tokens": tokens, "mel": mel}

    def _mel(self, index: int) -> Tensor:
        signal = self.signal(index)
        short = max(0, self.mel.edge + 1 - len(signal))
        return self.mel(torch.nn.functional.pad(signal, (0, short))).T.contiguous()

    def signal(self, index: int) -> Tensor:
        """The samples (S,) of an utterance, trimmed, at the rate of the spectrograms."""
        signal = load(self.cuts[index], self.mel.sample_rate, resample=True)
        return signal if self.quiet is None else trimmed(signal, self.mel.sample_rate, self.quiet)

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these utterances."""
        return count_files(self.cuts[index] for index in indices)

    def name_of(self, index: int) -> str:
        """An utterance in an error message."""
        return f"{index} ({self.cuts[index].id})"


def trimmed(signal: Tensor, sample_rate: int, quiet: float) -> Tensor:
    """Samples (S,) without what is before and after their sounds, but for ``MARGIN`` seconds."""
    size = sample_rate // 100
    if len(signal) < size:
        return signal
    power = signal.unfold(0, size, size).square().mean(-1)
    loud = (power >= power.max() * 10 ** (-quiet / 10)).nonzero()
    margin = round(MARGIN * sample_rate)
    first, last = int(loud[0]) * size - margin, (int(loud[-1]) + 1) * size + margin
    return signal[max(0, first) : last]


def datasets(
    corpus: Corpus,
    front: Front,
    mel: LogMel,
    longest_text: int,
    quiet: float | None = None,
    cached: bool = False,
) -> dict[str, Mels]:
    """Build the datasets of train, valid and test.

    Texts of more than ``longest_text`` symbols are not trained on; valid and test keep them.

    Raises ValueError for an empty text, for characters that the front end does not know, and when
    nothing is left to train on.
    """
    sets = {}
    for split, cuts in corpus.items():
        texts = {cut.id: _text(cut) for cut in cuts}
        check_texts(texts, front)
        pairs = list(zip(cuts, front.encode(list(texts.values())), strict=True))
        if split == "train":
            pairs = _alignable(pairs, longest_text)
        kept, tokens = zip(*pairs, strict=True)
        sets[split] = Mels(kept, tokens, mel, quiet, cached)
    return sets


def _alignable(
    pairs: list[tuple[Any, list[int]]], longest_text: int
) -> list[tuple[Any, list[int]]]:
    """The cuts with at most so many symbols."""
    good = [pair for pair in pairs if len(pair[1]) <= longest_text]
    long = [cut.id for cut, tokens in pairs if len(tokens) > longest_text]
    if not good:
        raise ValueError(
            f"all {len(long)} texts have more than longest_text={longest_text} symbols"
        )
    if long:
        logger.info(
            "%d texts have more than %d symbols, left out: %s",
            len(long), longest_text, first_names(long, 5),
        )  # fmt: skip
    return good
