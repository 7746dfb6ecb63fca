"""Recordings of single speakers, from which mixtures are drawn, and noise to put behind them.

Each corpus is a function that a YAML names with its arguments,

    corpus: !name:recipes.separation.speech.librispeech {data_folder: !ref <data_folder>, …}

and that returns ``{"train": cuts, "valid": cuts, "test": cuts}``: lhotse's cuts, each with its
speaker, and with the speaker's gender where that is known. No speaker is in two splits.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from recipes.common.audio import Header, check_recordings
from recipes.common.cuts import CutSet, MonoCut, cut_of, sound_of, sounds
from recipes.common.librispeech import LAYOUT, parts_there, read_parts
from recipes.common.loading import load
from recipes.common.noise import coloured_noise
from recipes.common.paths import existing, inside
from recipes.common.speech import embedded_speech, to_cuts
from recipes.common.tables import TableError, check_unique, named, read_lines, read_rows
from recipes.separation.mixing import fitted
from trainer.seed import derive

logger = logging.getLogger(__name__)

Corpus = Mapping[str, CutSet]
SPLITS = ("train", "valid", "test")
TABLE = "utterances.csv"
GENDERS = {"f": "female", "m": "male"}


def embedded(train: int, valid: int, test: int, sample_rate: int = 8000) -> Corpus:
    """So many synthesised sentences each, of prose, by unlike voices (28, 6 and 6 of them)."""
    counts = {"train": train, "valid": valid, "test": test}
    return {
        split: to_cuts(embedded_speech(split, count, "prose", sample_rate))
        for split, count in counts.items()
    }


def recorded(
    data_folder: str,
    parts: Mapping[str, Sequence[str]],
    manifests: str | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """Read a folder: by `listed` if it has a table ``utterances.csv``, else by `librispeech`.

    Recordings that cannot be used, by their headers, are left out as ``on_bad`` and ``max_bad``
    say, which are the run options' own; with ``follow_links`` symbolic links may lead out of the
    folder. ``manifests`` is no longer used; settings of earlier versions have it.
    """
    if (Path(data_folder).expanduser() / TABLE).is_file():
        return listed(data_folder, on_bad=on_bad, max_bad=max_bad, follow_links=follow_links)
    return librispeech(data_folder, parts, None, on_bad, max_bad, follow_links)


# ------------------------------------------------------------------------------------- LibriSpeech


def librispeech(
    data_folder: str,
    parts: Mapping[str, Sequence[str]],
    manifests: str | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """LibriSpeech, or any folder of its layout.

    Args:
        data_folder: where the folders ``train-clean-100``, ``dev-clean`` and so on are, and
            ``SPEAKERS.TXT``, which tells genders.
        parts: which of these make up each split; those that are not there are left out. A part
            that several splits name is dealt to them by its speakers: of ten, eight to train.
        manifests: no longer used; settings of earlier versions have it.
        on_bad: handling of missing and unusable files, as in the run options.
        max_bad: largest share of such files in a part, as in the run options.
        follow_links: symbolic links may lead out of the folder.

    Raises ValueError for a folder that is missing or has another layout, for a split of which no
    part is there, and for too few speakers to deal.
    """
    folder = existing(data_folder, LAYOUT)
    wanted = parts_there(folder, parts)
    read = read_parts(folder, wanted, on_bad, max_bad, follow_links)
    genders = _genders(folder)
    found: dict[str, list[MonoCut]] = {split: [] for split in parts}
    for part in sorted(wanted):
        cuts = [_with_gender(cut, genders) for cut in read[part]]
        users = [split for split, names in parts.items() if part in names]
        for split, dealt in by_speakers(cuts, users, part).items():
            found[split] += dealt
    return {split: CutSet.from_cuts(cuts) for split, cuts in found.items()}


def _genders(folder: Path) -> dict[str, str]:
    """By speaker, from lines such as ``19 | F | train-clean-100 | …``; empty without the file."""
    file = folder / "SPEAKERS.TXT"
    if not file.is_file():
        return {}
    lines = [line.text.split("|") for line in read_lines(file, "lines of a speaker and a sex")]
    told = [(one.strip(), sex.strip().lower()) for one, sex, *_ in (x for x in lines if x[1:])]
    return {speaker: GENDERS[sex] for speaker, sex in told if sex in GENDERS}


def _with_gender(cut: MonoCut, genders: Mapping[str, str]) -> MonoCut:
    cut.supervisions[0].gender = genders.get(cut.supervisions[0].speaker)
    return cut


def by_speakers(
    cuts: Sequence[MonoCut], splits: Sequence[str], what: str
) -> dict[str, list[MonoCut]]:
    """Deal recordings to splits such that none shares a speaker: a tenth of them to valid and test.

    At least two to each, so that there are mixtures. Raises ValueError for too few.
    """
    if len(splits) == 1:
        return {splits[0]: list(cuts)}
    names = sorted({cut.supervisions[0].speaker for cut in cuts})
    if len(names) < 2 * len(splits):
        raise ValueError(
            f"{what} has {len(names)} speakers; {', '.join(splits)} need two each that no other "
            f"has, {2 * len(splits)} in all"
        )
    random.Random(derive(0, "speakers", what)).shuffle(names)
    few = max(2, len(names) // 10)
    dealt: dict[str, set[str]] = {}
    for split in sorted(splits, key=SPLITS.index, reverse=True):  # train last, and what is left
        last = len(dealt) == len(splits) - 1
        dealt[split], names = (set(names), []) if last else (set(names[:few]), names[few:])
    return {
        split: [cut for cut in cuts if cut.supervisions[0].speaker in dealt[split]]
        for split in splits
    }


# ------------------------------------------------------------------------------ any table of files


def listed(
    data_folder: str,
    table: str = TABLE,
    audio: str = "audio",
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """Recordings that a table lists: ``id``, ``split``, ``speaker`` and, if known, ``gender``.

    Cells are separated by ``|``, ``,``, ``;`` or tabs; a recording is the file of that id (or path)
    in ``audio``, of any kind and rate. Where no row is of the split valid, a tenth of the speakers
    of train are.

    Recordings that are missing or cannot be used are left out, up to the share ``max_bad``. Raises
    ValueError for a missing folder, table or column, for a table that does not fit, and for a split
    without recordings.
    """
    layout = f"a folder of a table {table} and the recordings that it names in {audio}/"
    folder = existing(data_folder, layout)
    expected = "a table with id, split and speaker"
    path = inside(folder, table)
    rows = read_rows(path, expected, ("id", "split", "speaker"), key="id", gap="|,;\t")
    place = folder / audio
    find = partial(sound_of, sounds(place), place, follow_links=follow_links)

    for row in rows:
        if not row.cells["speaker"]:
            raise TableError(path, f"names no speaker of {row.cells['id'][:80]!r}", row.line)
    if others := sorted({row.cells["split"] for row in rows} - set(SPLITS)):
        logger.warning("%s has rows of other splits, left out: %s", path, ", ".join(others))
        rows = [row for row in rows if row.cells["split"] in SPLITS]
    wanted = [named(path, row.line, find, row.cells["id"]) for row in rows]
    check_unique(path, [(row.line, str(file)) for row, file in zip(rows, wanted, strict=True)])
    good = check_recordings(wanted, on_bad=on_bad, max_bad=max_bad)
    found: dict[str, list[MonoCut]] = {}
    for row, file in zip(rows, wanted, strict=True):
        if file in good:
            found.setdefault(row.cells["split"], []).append(_cut(row.cells, file, good[file]))
    if "valid" not in found and "train" in found:
        found |= by_speakers(found["train"], ["train", "valid"], "train")
    if lacking := set(SPLITS) - set(found):
        raise ValueError(f"{path} has no usable recording of {', '.join(sorted(lacking))}")
    return {split: CutSet.from_cuts(found[split]) for split in SPLITS}


def _cut(row: Mapping[str, str], path: Path, header: Header) -> MonoCut:
    gender = GENDERS.get((row.get("gender") or "")[:1].lower())
    return cut_of(path, header, row["id"], speaker=row["speaker"], gender=gender)


# ------------------------------------------------------------------------------------------- noise


class Coloured:
    """Noise whose power falls as 1/f^``exponent``, another one each time."""

    def __init__(self, exponent: float = 1.0) -> None:
        self.exponent = exponent

    def __call__(self, rng: random.Random, samples: int) -> Tensor:
        return coloured_noise(rng.getrandbits(63), samples, self.exponent)


class Ambient:
    """Parts of recorded noise."""

    def __init__(self, cuts: Sequence[MonoCut], sample_rate: int, seconds: float) -> None:
        self.cuts = [cut for cut in cuts if cut.duration >= seconds]
        self.sample_rate = sample_rate
        if not self.cuts:
            raise ValueError(f"none of the {len(cuts)} recordings of noise lasts {seconds:g} s")

    def __call__(self, rng: random.Random, samples: int) -> Tensor:
        cut = rng.choice(self.cuts)
        seconds = samples / self.sample_rate
        part = cut.truncate(offset=rng.uniform(0.0, cut.duration - seconds), duration=seconds)
        return fitted(load(part, self.sample_rate, resample=True), samples)


def coloured(exponent: float = 1.0) -> Mapping[str, Coloured]:
    """The same kind of noise for every split."""
    return {split: Coloured(exponent) for split in SPLITS}


def wham(
    data_folder: str,
    sample_rate: int,
    seconds: float,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Mapping[str, Ambient]:
    """The first channel of the noise of WHAM (``wham_noise`` with tr, cv and tt)."""
    root = existing(data_folder, "a folder of recordings of noise, in the folders tr, cv and tt")
    names = dict(zip(SPLITS, ("tr", "cv", "tt"), strict=True))
    if missing := [name for name in names.values() if not (root / name).is_dir()]:
        raise ValueError(f"{root} has no folder {', '.join(missing)}; expected: tr, cv, tt")
    found = {}
    for split, name in names.items():
        ids = {path: id for id, path in sounds(root / name).items()}
        good = check_recordings(ids, channels=None, on_bad=on_bad, max_bad=max_bad)
        cuts = [cut_of(path, header, ids[path]) for path, header in good.items()]
        found[split] = Ambient(cuts, sample_rate, seconds)
    return found
