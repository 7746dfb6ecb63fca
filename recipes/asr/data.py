"""Corpora of the recogniser as lhotse's cuts of train, valid and test, and datasets made of them.

Each corpus is a function that a YAML names with its arguments:

    corpus: !name:recipes.asr.data.digits {data_folder: !ref <data_folder>, …}

and that returns ``{"train": cuts, "valid": cuts, "test": cuts}``, each cut with a transcript.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.asr.text import Codec, check_texts
from recipes.common.audio import check_recordings
from recipes.common.cuts import CutSet, MixedCut, MixTrack, MonoCut, MultiCut, cut_of, sounds
from recipes.common.librispeech import LAYOUT, parts_there, read_parts
from recipes.common.loading import Speech, filter_by_duration, transcript
from recipes.common.paths import existing, inside
from recipes.common.speech import embedded_speech, to_cuts
from recipes.common.tables import TableError, named, read_rows
from trainer.seed import derive
from trainer.texts import first_names

logger = logging.getLogger(__name__)

Corpus = Mapping[str, CutSet]
SPLITS = ("train", "valid", "test")


# ------------------------------------------------------------------------------ embedded sentences


def embedded(train: int, valid: int, test: int, sample_rate: int = 16000) -> Corpus:
    """So many synthesised sentences each: numbers, dates and commands by unlike voices."""
    counts = {"train": train, "valid": valid, "test": test}
    return {
        split: to_cuts(embedded_speech(split, count, "commands", sample_rate))
        for split, count in counts.items()
    }


# -------------------------------------------------------------------------------- connected digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAKE = re.compile(r"(?P<digit>\d)_(?P<speaker>.+)_(?P<take>\d+)")


def digits(
    data_folder: str,
    sample_rate: int,
    strings: Mapping[str, int],
    takes: Mapping[str, Sequence[int]],
    longest: int = 7,
    pause: float = 0.2,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Corpus:
    """Connected digits: strings of 1 to ``longest``, joined from single takes of one speaker.

    Every string of a split is drawn at random, the same in every run: its speaker, its length, its
    digits, a take of each, and the silence before it, from 0 to ``pause`` seconds.

    Args:
        data_folder: the Free Spoken Digit Dataset, or a folder of files named as there,
            ``digit_speaker_take.wav`` (or another sound file), perhaps in a subfolder
            ``recordings``.
        sample_rate: Hz.
        strings: number of strings in each split.
        takes: the takes that a split is made of, as [first, last].
        longest: most digits in a string.
        pause: longest silence before a digit, in seconds.
        on_bad: handling of unusable files, as in the run options.
        max_bad: largest share of unusable files, as in the run options.

    Raises ValueError for a folder that is missing or has another layout, for a take that two splits
    would share, and for a split without any.
    """
    _check_splits("strings", strings)
    _check_splits("takes", takes)
    _check_disjoint(takes)
    recorded = _recorded_digits(data_folder, sample_rate, on_bad, max_bad)
    corpus = {}
    for split, count in strings.items():
        first, last = takes[split]
        choices: dict[str, dict[str, list[MonoCut]]] = {}  # by speaker and digit
        for speaker, digit, take, cut in recorded:
            if first <= take <= last:
                choices.setdefault(speaker, {}).setdefault(digit, []).append(cut)
        if not choices:
            raise ValueError(f"{split} is made of takes {first} to {last}; {data_folder} has none")
        rng = random.Random(derive(0, "digits", split))
        drawn = (_string(choices, longest, pause, rng) for _ in range(count))
        corpus[split] = CutSet.from_cuts(
            MixedCut(f"{split}-{number}-{name}", tracks)
            for number, (name, tracks) in enumerate(drawn)
        )
    return corpus


def _check_splits(name: str, given: Mapping[str, Any]) -> None:
    if set(given) != set(SPLITS):
        raise ValueError(f"{name} must be given for {', '.join(SPLITS)}; got {dict(given)}")


def _check_disjoint(takes: Mapping[str, Sequence[int]]) -> None:
    ordered = sorted((first, last, split) for split, (first, last) in takes.items())
    for (_, end, one), (start, _, other) in zip(ordered, ordered[1:], strict=False):
        if start <= end:
            raise ValueError(f"{one} and {other} share take {start}; their takes must not overlap")


def _recorded_digits(
    data_folder: str, sample_rate: int, on_bad: str, max_bad: float
) -> list[tuple[str, str, int, MonoCut]]:
    """A folder's recordings: speaker, digit, take, cut."""
    expected = "recordings named digit_speaker_take.wav, such as 7_theo_32.wav"
    folder = existing(data_folder, f"a folder of {expected}")
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    names = {path: TAKE.fullmatch(name) for name, path in sounds(folder).items() if "/" not in name}
    paths = [path for path, name in names.items() if name]
    if not paths:
        raise ValueError(f"{folder} has another layout: expected were {expected}")
    good = check_recordings(paths, sample_rate, on_bad=on_bad, max_bad=max_bad)
    found = []
    for path, header in good.items():
        name = names[path]
        assert name is not None  # `paths` has no others
        text = DIGITS[int(name["digit"])]
        cut = cut_of(path, header, name.string, text=text, speaker=name["speaker"])
        found.append((name["speaker"], name["digit"], int(name["take"]), cut))
    return found


def _string(
    choices: Mapping[str, Mapping[str, Sequence[MonoCut]]],
    longest: int,
    pause: float,
    rng: random.Random,
) -> tuple[str, list[MixTrack]]:
    """A string of digits by one speaker: its name, and its takes one after the other."""
    speaker = rng.choice(list(choices))
    said = [rng.choice(list(choices[speaker])) for _ in range(rng.randint(1, longest))]
    end, tracks = 0.0, []
    for digit in said:
        take = rng.choice(choices[speaker][digit])
        tracks.append(MixTrack(take, offset=end + rng.uniform(0.0, pause)))
        end = tracks[-1].offset + take.duration
    return f"{speaker}-{''.join(said)}", tracks


# ------------------------------------------------------------------------------------- LibriSpeech


def librispeech(
    data_folder: str,
    parts: Mapping[str, Sequence[str]],
    manifests: str | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """LibriSpeech, or any parts of it; the texts in small letters.

    Args:
        data_folder: where the folders ``train-clean-100``, ``dev-clean`` and so on are.
        parts: which of these make up each split; those that are not there are left out.
        manifests: no longer used; settings of earlier versions have it.
        on_bad: handling of missing and unusable files, as in the run options.
        max_bad: largest share of such files in a part, as in the run options.
        follow_links: symbolic links may lead out of the folder.

    Raises ValueError for a folder that is missing or has another layout, and for a split of which
    no part is there.
    """
    _check_splits("parts", parts)
    folder = existing(data_folder, LAYOUT)
    found = read_parts(folder, parts_there(folder, parts), on_bad, max_bad, follow_links)
    return {
        split: CutSet.from_cuts(cut for part in names for cut in found.get(part, ()))
        for split, names in parts.items()
    }


# ------------------------------------------------------------------------------ tables of one's own


def table(
    data_folder: str,
    tables: Mapping[str, str],
    lower: bool = True,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """Recordings and transcripts that tables list, one for each of train, valid and test.

    A table has the columns ``path`` and ``text``, and may have ``speaker`` and others. Paths are
    relative to ``data_folder``. Of several channels the mean is taken, as `infer` does.

    Args:
        data_folder: folder of the tables and the recordings.
        tables: names of the tables by split.
        lower: put the texts in small letters.
        on_bad: handling of missing and unusable files, as in the run options.
        max_bad: largest share of such files in a table, as in the run options.
        follow_links: symbolic links may lead out of the folder.

    Raises:
        TableError: a table cannot be used, or two of them list one recording.
        ValueError: a split has no table, or too many files are bad.
    """
    _check_splits("tables", tables)
    folder = existing(data_folder, "a folder of recordings with tables")
    seen: dict[Path, str] = {}
    corpus = {}
    for split in SPLITS:
        path = inside(folder, tables[split], follow_links)
        listed: dict[Path, tuple[str, str, str | None]] = {}
        for line, cells in read_rows(path, "a table with path and text", ("path", "text"), "path"):
            find = partial(inside, folder, follow_links=follow_links)
            file = named(path, line, find, cells["path"])
            text = " ".join(cells["text"].split())
            if not text:
                raise TableError(path, f"has no text for {cells['path'][:80]!r}", line)
            if file in seen:
                raise TableError(path, f"has {cells['path'][:80]!r}, as {seen[file]} has", line)
            seen[file] = split
            text = text.lower() if lower else text
            listed[file] = cells["path"], text, cells.get("speaker") or None
        headers = check_recordings(listed, channels=None, on_bad=on_bad, max_bad=max_bad)
        corpus[split] = CutSet.from_cuts(
            _whole(cut_of(file, header, id, text=text, speaker=speaker), header.channels)
            for file, header in headers.items()
            for id, text, speaker in [listed[file]]
        )
    return corpus


def _whole(cut: MonoCut, channels: int) -> MonoCut | MultiCut:
    """Return a cut of all channels of a file, for that of the first."""
    if channels == 1:
        return cut
    every = list(range(channels))
    return MultiCut(cut.id, 0.0, cut.duration, every, cut.supervisions, recording=cut.recording)


# --------------------------------------------------------------------------------- cuts to datasets


def datasets(
    corpus: Corpus,
    codec: Codec,
    sample_rate: int,
    frames: Callable[[int], int],
    lengths: Sequence[float] = (0.0, float("inf")),
    speeds: Sequence[float] = (1.0,),
    resample: bool = False,
) -> dict[str, Speech]:
    """The datasets of train, valid and test; their items are id, sig, text and tokens.

    To train are left out what does not last ``lengths`` = [shortest, longest] seconds, and what is
    spoken too fast for CTC at the highest of ``speeds``: ``frames`` tells how many tokens so many
    samples can be at most. Nothing is left out of valid and test. With ``resample`` recordings of
    other rates are converted.

    Raises ValueError for characters that the codec does not know, when no recording has the sample
    rate, and when nothing is left.
    """
    rates = Counter(cut.sampling_rate for each in corpus.values() for cut in each)
    if rates and sample_rate not in rates and not resample:
        found = ", ".join(f"{count} at {rate} Hz" for rate, count in rates.most_common(5))
        raise ValueError(
            f"no recording has the sample rate of the recipe, {sample_rate} Hz ({found}): "
            "convert the files, or set sample_rate"
        )
    shortest, longest = lengths
    cuts = {**corpus, "train": filter_by_duration(corpus["train"], shortest, longest)}
    codec.fit(_text(cut) for cut in cuts["train"])
    for each in cuts.values():
        check_texts({cut.id: _text(cut) for cut in each}, codec)
    cuts["train"] = _possible(cuts["train"], codec, frames, sample_rate, max(speeds))
    return {
        split: Speech(
            each,
            sample_rate,
            partial(_labels, codec),
            speeds if split == "train" else (1.0,),
            resample,
        )
        for split, each in cuts.items()
    }


def _text(cut: Any) -> str:
    return str(transcript(cut)["text"])


def _labels(codec: Codec, cut: Any) -> dict[str, Any]:
    text = _text(cut)
    return {"text": text, "tokens": torch.tensor(codec.encode(text), dtype=torch.long)}


def _possible(
    cuts: CutSet, codec: Codec, frames: Callable[[int], int], sample_rate: int, speed: float
) -> CutSet:
    """The cuts that have a CTC path: a frame for each token, and a blank between equal ones."""
    good, bad = [], []
    for cut in cuts:
        tokens = codec.encode(_text(cut))
        needed = len(tokens) + sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
        samples = int(round(cut.duration * sample_rate) / speed)
        (good if frames(samples) >= max(needed, 1) else bad).append(cut)
    if not good:
        raise ValueError(
            f"all {len(bad)} utterances are spoken too fast: at speed {speed:g} they have fewer "
            "frames than tokens; use a smaller hop or fewer halvings of the frames"
        )
    if bad:
        names = first_names([cut.id for cut in bad], 5)
        logger.info("%d utterances have more tokens than frames, left out: %s", len(bad), names)
    return CutSet.from_cuts(good)
