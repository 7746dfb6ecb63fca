"""LibriSpeech, or any folder of its layout, as cuts with texts and speakers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from recipes.common.audio import check_recordings
from recipes.common.cuts import MonoCut, cut_of, files_below, sound_of, sounds
from recipes.common.tables import TableError, check_unique, named, read_lines

LAYOUT = "a folder of folders such as train-clean-100 with a *.trans.txt in each"

logger = logging.getLogger(__name__)


def parts_there(folder: Path, parts: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the parts, of those that make up each split, that are there; warn of the others.

    Raises:
        ValueError: no part of a split is there.
    """
    there = {each.name for each in folder.iterdir() if each.is_dir()}
    wanted = {part for names in parts.values() for part in names}
    for split, names in parts.items():
        if not there & set(names):
            raise ValueError(
                f"{split} is made of {', '.join(names)}; {folder} has none of these, but "
                f"{', '.join(sorted(there)[:10]) or 'no folders'}"
            )
    if missing := wanted - there:
        logger.warning("%s has no %s: going on without", folder, ", ".join(sorted(missing)))
    return wanted & there


def read_parts(
    folder: Path,
    parts: Iterable[str],
    on_bad: str = "skip",
    max_bad: float = 0.05,
    follow_links: bool = False,
) -> dict[str, list[MonoCut]]:
    """Read the utterances that the ``*.trans.txt`` of each part list, in the order of their names.

    Args:
        folder: where the parts are, such as train-clean-100.
        parts: names of parts.
        on_bad: handling of files that are missing or unusable by their headers, as in the run
            options.
        max_bad: share of such files in a part, as in the run options.
        follow_links: a symbolic link may lead out of the folder of its list.

    Returns:
        Cuts by part; their texts are in small letters.

    Raises:
        TableError: a list cannot be read.
        ValueError: a part has no list, or too many of its files are bad.
        BadItem: with ``on_bad="raise"``, for the first bad file.
    """
    found = {}
    for part in sorted(parts):
        listed: dict[Path, tuple[str, str]] = {}
        place = folder / part
        tables = [each for each in files_below(place) if each.name.endswith(".trans.txt")]
        # Where there is no list, a folder that has the name of one is refused as such.
        for table in tables or sorted(place.rglob("[!.]*.trans.txt")):
            for path, (id, text) in _listed(table, folder, follow_links).items():
                if path in listed:
                    raise TableError(table, f"has a text of {path}, as another list has")
                listed[path] = id, text
        if not listed:
            raise ValueError(
                f"{place} has another layout: expected were, as in LibriSpeech, folders "
                "speaker/chapter with a *.trans.txt and the *.flac that it names"
            )
        headers = check_recordings(listed, on_bad=on_bad, max_bad=max_bad)
        found[part] = [
            cut_of(path, header, id, text=text.lower(), speaker=_speaker(id))
            for path, header in headers.items()
            for id, text in [listed[path]]
        ]
    return found


def utterance_id(path: str) -> str:
    """Return the id of an utterance, which no other has, by its path in the corpus.

    It is the name where that holds speaker and chapter, as in LibriSpeech, else the path.
    """
    *_, speaker, chapter, name = ("", "", *path.split("/"))
    return name if name.startswith(f"{speaker}-{chapter}-") else path


def _speaker(id: str) -> str:
    return id.rpartition("/")[2].split("-")[0]


def _listed(table: Path, folder: Path, follow_links: bool) -> dict[Path, tuple[str, str]]:
    """The ids and texts of the utterances that a file lists, by path."""
    lines = read_lines(table, "lines of a name and a text")
    split = [(number, *(text.split(maxsplit=1) + [""])[:2]) for number, text in lines]
    check_unique(table, [(number, name) for number, name, _ in split])
    place = table.parent
    find = partial(sound_of, sounds(place), place, usual=".flac", follow_links=follow_links)
    found = {}
    for number, name, text in split:
        if not text:
            raise TableError(table, f"has no text behind {name[:80]!r}", number)
        id = utterance_id((place.relative_to(folder) / name).as_posix())
        found[named(table, number, find, name)] = id, " ".join(text.split())
    return found
