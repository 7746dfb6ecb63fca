"""Recordings with labels: from folders, by the names of files, and from tables; dealt to splits.

A corpus is a function that a YAML names with its arguments, and that returns the recordings of
train, valid and test:

    corpus: !name:recipes.finetune.labelled.folders {data_folder: !ref <data_folder>}

No recording is in two splits, under whatever name, and no speaker where speakers are known. With
``unseen`` labels are those of speakers to be told apart who are not known beforehand: no label is
in two splits.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import check_length, check_recordings, read_audio
from recipes.common.cuts import sound_of, sounds
from recipes.common.paths import existing, inside
from recipes.common.tables import TableError, check_unique, named, read_lines, read_rows
from recipes.finetune.trials import check_names, read_trials
from trainer.data import item_seed
from trainer.seed import derive

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
SPELLINGS = {"train": "train", "valid": "valid", "test": "test", "training": "train",
             "validation": "valid", "dev": "valid", "testing": "test"}  # fmt: skip
# Lists of a folder that name the recordings of a split, as Speech Commands has them.
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
CLASS_FOLDERS = r"(?P<label>[^/_][^/]*)/.+"
SPLIT_FOLDERS = rf"(?P<split>{'|'.join(SPELLINGS)})/{CLASS_FOLDERS}"
SHOWN = 80  # characters of a name that an error shows


class Recording(NamedTuple):
    """One recording. ``id`` is its path within the data folder, without the suffix."""

    id: str
    path: Path
    label: str
    speaker: str | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The id with the suffix."""
        return self.id + self.path.suffix


Corpus = Mapping[str, list[Recording]]


class _Found(NamedTuple):
    """A recording, and the split that the corpus itself puts it into, if any."""

    recording: Recording
    split: str | None


# ----------------------------------------------------------------------------------------- corpora


def folders(
    data_folder: str,
    pattern: str | None = None,
    classes: Sequence[str] | None = None,
    valid: float = 0.1,
    test: float = 0.1,
    unseen: bool = False,
    trials: str | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Corpus:
    r"""Recordings whose labels are in their paths: a folder for each class, or names of files.

    Splits are those of the folder where it has them: folders train, valid and test with those of
    the classes in them, a group ``split`` of the pattern, or the files ``validation_list.txt`` and
    ``testing_list.txt`` of Speech Commands (Warden 2018). Otherwise recordings are dealt, each
    class in the shares given.

    Args:
        data_folder: folder of the recordings, of any format and rate.
        pattern: regular expression for the whole path of a recording in the folder, without its
            suffix, with a group ``label`` and, if known, ``speaker`` and ``split``. By default the
            label is the first folder (or the second, where all first ones are splits), unless that
            begins with "_". Speech Commands has speakers as well:
            ``(?P<label>[^/_]+)/(?P<speaker>[^_]+)_nohash_\d+``.
        classes: labels to use; None for all.
        valid: share of the recordings to deal to valid.
        test: share to deal to test.
        unseen: labels are those of speakers, and no label is in two splits.
        trials: with ``unseen``, list of trials: all recordings of the speakers that it names, and
            no others, are those of test.
        on_bad: handling of unusable files, as in the run options.
        max_bad: largest share of unusable files, as in the run options.

    Raises:
        ValueError: the folder is missing, holds no recordings that fit, or has splits that share
            what they must not.
    """
    folder = existing(data_folder, "a folder of recordings")
    found = sounds(folder)
    if not found:
        raise ValueError(f"{folder} holds no recordings; expected was a folder for each class")
    if pattern is None:
        first = {name.split("/")[0] for name in found}
        pattern = SPLIT_FOLDERS if first <= set(SPELLINGS) else CLASS_FOLDERS
    expression = _compiled(pattern)
    matches = {name: expression.fullmatch(name) for name in found}
    fitting = {name: match.groupdict() for name, match in matches.items() if match}
    if not fitting:
        raise ValueError(
            f"none of the {len(found)} recordings in {folder} fits the pattern {pattern!r}; the "
            f"first is {next(iter(found))!r}"
        )
    if others := len(found) - len(fitting):
        name = next(name for name, match in matches.items() if not match)
        logger.warning("%d recordings do not fit %r, left out: %r …", others, pattern, name)
    lists = _lists(folder, found)
    rows = [
        _Found(
            Recording(name, found[name], said["label"], said.get("speaker")),
            lists.get(name, "train") if lists else _split(said.get("split"), name),
        )
        for name, said in fitting.items()
    ]
    return _corpus(
        rows, folder, classes, {"valid": valid, "test": test}, unseen, trials, on_bad, max_bad
    )


def table(
    data_folder: str,
    table: str = "utterances.csv",
    audio: str = ".",
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    valid: float = 0.1,
    test: float = 0.1,
    unseen: bool = False,
    trials: str | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> Corpus:
    """Recordings that a table lists: ``path``, ``label`` and, if known, ``split`` and ``speaker``.

    Cells are separated by ``|``, ``,``, ``;`` or tabs. Where the table has no split, recordings are
    dealt; where it has no valid, a part of train is.

    Args:
        data_folder: folder of the table and the recordings.
        table: name of the table.
        audio: folder of the recordings in data_folder.
        columns: names of the columns where they differ, such as ``{path: id, label: emotion}``.
        classes: labels to use; None for all.
        valid: share of the recordings to deal to valid.
        test: share to deal to test.
        unseen: as in `folders`.
        trials: as in `folders`.
        on_bad: handling of unusable files, as in the run options.
        max_bad: largest share of unusable files, as in the run options.
        follow_links: symbolic links may lead out of the folder.

    Raises:
        ValueError: the folder or table is missing, a row does not fit, or splits share what they
            must not.
    """
    folder = existing(data_folder, "a folder of recordings")
    names = {name: name for name in ("path", "label", "split", "speaker")}
    if unknown := sorted(set(columns or {}) - set(names)):
        raise ValueError(f"columns names {', '.join(unknown)}; allowed: {', '.join(names)}")
    names |= columns or {}
    path = inside(folder, table)
    asked = {names[name] for name in ("path", "label", *(columns or {}))}
    rows = read_rows(path, f"a table with {', '.join(sorted(asked))}", asked, gap="|,;\t")
    place = folder / audio
    find = partial(sound_of, sounds(place), place, follow_links=follow_links)
    found = []
    for row in rows:
        cells = row.cells
        if not cells[names["label"]]:
            raise TableError(path, f"has no {names['label']}", row.line)
        file = named(path, row.line, find, cells[names["path"]])
        split = cells.get(names["split"]) or None
        if split is not None and split.lower() not in SPELLINGS:
            raise TableError(
                path, f"has the split {split[:SHOWN]!r}; allowed: {', '.join(SPLITS)}", row.line
            )
        id = Path(cells[names["path"]]).with_suffix("").as_posix()
        speaker = cells.get(names["speaker"]) or None
        said = Recording(id, file, cells[names["label"]], speaker)
        found.append(_Found(said, SPELLINGS[split.lower()] if split else None))
    check_unique(
        path, [(row.line, str(each.recording.path)) for row, each in zip(rows, found, strict=True)]
    )
    shares = {"valid": valid, "test": test}
    return _corpus(found, folder, classes, shares, unseen, trials, on_bad, max_bad)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    if "label" not in expression.groupindex:
        raise ValueError(f"the pattern {pattern!r} has no group (?P<label>…)")
    return expression


def _split(name: str | None, id: str) -> str | None:
    if name is not None and name.lower() not in SPELLINGS:
        raise ValueError(f"{id} has the split {name[:SHOWN]!r}; allowed: {', '.join(SPLITS)}")
    return name and SPELLINGS[name.lower()]


def _lists(folder: Path, found: Mapping[str, Path]) -> dict[str, str]:
    """The split of each recording that one of the `LISTS` names, by id."""
    splits: dict[str, str] = {}
    for split, name in LISTS.items():
        if not (folder / name).is_file():
            continue
        for line, text in read_lines(folder / name, "paths of recordings"):
            id = Path(text.strip()).with_suffix("").as_posix()
            if id not in found:
                raise TableError(folder / name, f"names {text[:SHOWN]!r}, which is not there", line)
            if splits.setdefault(id, split) != split:
                raise TableError(folder / name, f"names {id!r}, as another list does", line)
    return splits


# ------------------------------------------------------------------------------------------ splits


def _corpus(
    found: Sequence[_Found],
    folder: Path,
    classes: Sequence[str] | None,
    shares: Mapping[str, float],
    unseen: bool,
    trials: str | None,
    on_bad: str,
    max_bad: float,
) -> Corpus:
    """The recordings that can be used, in their splits, which share nothing.

    All are dealt, and then those left out that cannot be used: none changes its split for another.
    """
    if not all(0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"valid and test are {shares}; allowed: shares from 0, together below 1")
    found = _of_classes(found, classes)
    if trials is not None:
        found = _of_trials(found, trials, unseen)
    every = [each.recording for each in found]
    contents = _contents(every)
    keys = _groups(every, contents, unseen)
    least = 2 if unseen else 1  # groups of a split: pairs are of two speakers
    splits = {each.split for each in found}
    if splits == {None}:
        corpus = deal(every, keys, {"train": 1 - sum(shares.values()), **shares}, least)
    elif None in splits:
        lacking = next(each.recording.id for each in found if each.split is None)
        raise ValueError(
            f"some recordings have a split and others none, such as {lacking!r}: name all or none"
        )
    else:
        corpus = {split: [e.recording for e in found if e.split == split] for split in SPLITS}
        if not corpus["valid"] and shares["valid"]:
            share = {"train": 1 - shares["valid"], "valid": shares["valid"]}
            corpus |= deal(corpus["train"], keys, share, least)
    _check_disjoint(corpus, unseen)
    paths = [each.path for each in every]
    good = check_recordings(paths, channels=None, on_bad=on_bad, max_bad=max_bad)
    corpus = {
        split: [
            each._replace(seconds=good[each.path].duration)
            for each in recordings
            if each.path in good
        ]
        for split, recordings in corpus.items()
    }
    if without := [split for split in SPLITS if not corpus.get(split)]:
        raise ValueError(
            f"{folder} has no usable recording for {', '.join(without)}: "
            f"{len(every)} recordings in {len(set(keys.values()))} groups that must stay together "
            "(of one speaker, or one recording under several names), dealt by the shares valid "
            f"{shares['valid']:g} and test {shares['test']:g}: needed are shares above 0 "
            f"and {3 * least} groups or more"
        )
    return _without_copies(corpus, contents)


def _of_classes(found: Sequence[_Found], classes: Sequence[str] | None) -> list[_Found]:
    if classes is None:
        return list(found)
    known = {each.recording.label for each in found}
    wanted = [str(each) for each in classes]
    if absent := [each for each in wanted if each not in known]:
        raise ValueError(
            f"classes has {', '.join(absent)}; the recordings have {', '.join(sorted(known))}"
        )
    return [each for each in found if each.recording.label in wanted]


def _of_trials(found: Sequence[_Found], trials: str, unseen: bool) -> list[_Found]:
    """The speakers of a list of trials in test, where splits are not given."""
    if not unseen:
        raise ValueError("trials has an effect only with unseen: true, for speakers")
    if any(each.split is not None for each in found):
        return list(found)
    by_name = {
        name: each.recording.label
        for each in found
        for name in (each.recording.id, each.recording.name)
    }
    every = read_trials(trials)
    check_names(every, by_name, f"the list of trials {trials}")
    speakers = {by_name[name] for trial in every for name in (trial.enrol, trial.test)}
    return [
        _Found(each.recording, "test" if each.recording.label in speakers else "train")
        for each in found
    ]


def _groups(
    recordings: Sequence[Recording], contents: Mapping[str, str], unseen: bool
) -> dict[str, Hashable]:
    """A key for each id; recordings with one key must be in one split.

    With ``unseen`` it is the label, else the speaker if known and not the label itself; else
    recordings of the same bytes have one key.
    """
    if unseen:
        return {each.id: each.label for each in recordings}
    by_speaker = not _speakers_are_classes(recordings)
    return {each.id: (by_speaker and each.speaker) or contents[each.id] for each in recordings}


def _speakers_are_classes(recordings: Iterable[Recording]) -> bool:
    return all(each.speaker == each.label for each in recordings)


def _contents(recordings: Sequence[Recording]) -> dict[str, str]:
    """Return what tells recordings apart, by id: their bytes, where several files have one size."""
    sizes = {each.id: _bytes(each.path) for each in recordings}
    often = Counter(sizes.values())
    alike = [each for each in recordings if sizes[each.id] and often[sizes[each.id]] > 1]
    with ThreadPoolExecutor(8) as pool:  # Mostly waiting for disks.
        digests = pool.map(_digest, [each.path for each in alike])
        found = dict(zip((each.id for each in alike), digests, strict=True))
    return {each.id: found.get(each.id, each.id) for each in recordings}


def _bytes(path: Path) -> int:
    """The size of a file; 0 for one that is missing, or no file."""
    return path.stat().st_size if path.is_file() else 0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def deal(
    recordings: Iterable[Recording],
    keys: Mapping[str, Hashable],
    shares: Mapping[str, float],
    least: int = 1,
) -> dict[str, list[Recording]]:
    """Deal recordings to splits, the same in every run: each group to where its labels lack most.

    Args:
        recordings: what to deal.
        keys: group of each recording, by its id; groups stay whole.
        shares: share of each split, of every label. Where each label is a group, as speakers are
            whose recordings stay together, of all recordings.
        least: number of groups that each split gets in spite of its share, if there are as many.
    """
    groups: dict[Hashable, list[Recording]] = {}
    for each in sorted(recordings, key=lambda each: each.id):
        groups.setdefault(keys[each.id], []).append(each)
    labels = [{each.label for each in group} for group in groups.values()]
    whole = len(set().union(*labels)) == sum(map(len, labels))

    def counted(group: Sequence[Recording]) -> Counter[str]:
        return Counter("" if whole else each.label for each in group)

    totals = sum(map(counted, groups.values()), Counter())
    held: dict[str, Counter[str]] = {split: Counter() for split in shares if shares[split]}
    dealt: dict[str, list[list[Recording]]] = {split: [] for split in shares}
    order = list(groups.values())
    random.Random(derive(0, "splits")).shuffle(order)
    for group in order:
        counts = counted(group)
        lacking = {
            split: sum(
                n * (shares[split] - have[name] / totals[name]) for name, n in counts.items()
            )
            for split, have in held.items()
        }
        split = max(lacking, key=lambda split: lacking[split])
        dealt[split].append(group)
        held[split] += counts
    while True:
        few, many = (pick(held, key=lambda split: len(dealt[split])) for pick in (min, max))
        if len(dealt[few]) >= least or len(dealt[many]) < len(dealt[few]) + 2:
            break

        def cost(group: Sequence[Recording], giver: str = many) -> tuple[int, int]:
            """Return how many labels the giver would have no more, and the size."""
            lost = [name for name, n in counted(group).items() if held[giver][name] == n]
            return len(lost), len(group)

        group = min(dealt[many], key=cost)
        dealt[many].remove(group)
        held[many] -= counted(group)
        dealt[few].append(group)
        held[few] += counted(group)
    return {split: sorted(chain(*given)) for split, given in dealt.items()}


def _check_disjoint(corpus: Corpus, unseen: bool) -> None:
    """Raise ValueError where splits share a recording, a speaker or, with ``unseen``, a label."""
    every = [each for recordings in corpus.values() for each in recordings]
    if unseen:
        _check_apart(corpus, lambda each: each.label, "the speakers of test must be new")
    elif not _speakers_are_classes(every):
        _check_apart(
            corpus,
            lambda each: each.speaker,
            "leave the speakers unnamed where those of train may be in test",
        )


def _check_apart(corpus: Corpus, key: Callable[[Recording], str | None], advice: str) -> None:
    seen: dict[str, tuple[str, Recording]] = {}
    shared: dict[str, str] = {}
    for split, recordings in corpus.items():
        for each in recordings:
            if (value := key(each)) is None:
                continue
            other, first = seen.setdefault(value, (split, each))
            if other != split and value not in shared:
                shared[value] = (
                    f"the speaker {value[:SHOWN]!r} is in {other} ({first.id}) and {split} "
                    f"({each.id})"
                )
    if shared:
        more = f", and {len(shared) - 1} more are in two splits" if len(shared) > 1 else ""
        raise ValueError(f"{next(iter(shared.values()))}{more}: {advice}")


def _without_copies(corpus: Corpus, contents: Mapping[str, str]) -> Corpus:
    """Leave out of train what valid or test has too, and of valid what test has."""
    kept: dict[str, list[Recording]] = {}
    homes: dict[str, str] = {}
    for split in reversed(SPLITS):
        copies = [each for each in corpus[split] if homes.get(contents[each.id], split) != split]
        left_out = {each.id for each in copies}
        kept[split] = [each for each in corpus[split] if each.id not in left_out]
        homes |= {contents[each.id]: split for each in kept[split]}
        if copies:
            logger.warning(
                "%d recordings of %s are in %s under other names, left out: %s …",
                len(copies), split, homes[contents[copies[0].id]], copies[0].id,
            )  # fmt: skip
        if not kept[split]:
            raise ValueError(f"every recording of {split} is in another split under another name")
    return {split: kept[split] for split in SPLITS}


# ----------------------------------------------------------------------------------------- dataset


class Labelled(Dataset[dict[str, Any]]):
    """Recordings with their classes: items are id, sig (S,), label and name.

    Args:
        recordings: the recordings.
        classes: labels by number.
        sample_rate: Hz; recordings of other rates are resampled, of several channels their mean.
        seconds: length of the part that is taken: to train from anywhere, else from the middle.
        shortest: fewest samples; a shorter recording is a bad item.
        train: parts are drawn by (seed, epoch, item).
    """

    def __init__(
        self,
        recordings: Iterable[Recording],
        classes: Sequence[str],
        sample_rate: int,
        seconds: float,
        shortest: int = 1,
        train: bool = False,
    ) -> None:
        if not seconds * sample_rate >= shortest:
            raise ValueError(
                f"parts of {seconds:g} s are taken; the encoder needs {shortest} samples, "
                f"{shortest / sample_rate:g} s"
            )
        self.recordings, self.sample_rate, self.seconds = list(recordings), sample_rate, seconds
        self.shortest, self.train = shortest, train
        self.numbers = {name: number for number, name in enumerate(classes)}

    @property
    def durations(self) -> list[float]:
        """Seconds of each item."""
        return [min(each.seconds, self.seconds) for each in self.recordings]

    def __len__(self) -> int:
        return len(self.recordings)

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these items."""
        return len({self.recordings[index].path for index in indices})

    def name_of(self, index: int) -> str:
        """Return the name of an item for error messages."""
        return f"{index} ({self.recordings[index].id})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        each = self.recordings[index]
        free = max(0.0, each.seconds - self.seconds)
        start = random.Random(item_seed(each.id)).uniform(0, free) if self.train else free / 2
        signal = read_part(each.path, self.sample_rate, start, self.seconds if free else None)
        check_length(each.path, len(signal), self.sample_rate, self.shortest)
        number = self.numbers.get(each.label, -1)  # -1: of a speaker that is to be new
        return {"id": each.id, "sig": signal, "label": number, "name": each.label}


def read_part(
    path: Path, sample_rate: int, start: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Read the mean of the channels of a file, or of a part of it, at this rate: (S,)."""
    return read_audio(
        path, sample_rate, start=start, duration=seconds, channel="mean", resample=True
    )
