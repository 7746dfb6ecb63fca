"""LibriSpeech, or any folder of its layout, as cuts with texts and speakers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from recipes.common.audio import check_recordings
from recipes.common.cuts import cut_of, sound_of
from recipes.common.tables import TableError, check_unique, named, read_lines

try:
    from lhotse import MonoCut
except ImportError as error:
    raise ImportError("speech data need lhotse: pip install 'cortex-speech[recipes]'") from error


def read_parts(
    folder: Path, parts: Iterable[str], on_bad: str = "skip", max_bad: float = 0.05
) -> dict[str, list[MonoCut]]:
    """Read the utterances that the ``*.trans.txt`` of each part list, in the order of their names.

    Args:
        folder: where the parts are, such as train-clean-100.
        parts: names of parts.
        on_bad: handling of files that are missing or unusable by their headers, as in the run
            options.
        max_bad: share of such files in a part, as in the run options.

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
        for table in sorted((folder / part).rglob("*.trans.txt")):
            listed |= _listed(table)
        if not listed:
            raise ValueError(
                f"{folder / part} has another layout: expected were, as in LibriSpeech, folders "
                "speaker/chapter with a *.trans.txt and the *.flac that it names"
            )
        headers = check_recordings(listed, channels=None, on_bad=on_bad, max_bad=max_bad)
        found[part] = [
            cut_of(path, header, name, text=text.lower(), speaker=name.split("-")[0])
            for path, header in headers.items()
            for name, text in [listed[path]]
        ]
    return found


def _listed(table: Path) -> dict[Path, tuple[str, str]]:
    """The names and texts of the utterances that a file lists, by path."""
    lines = read_lines(table, "lines of a name and a text")
    split = [(number, *(text.split(maxsplit=1) + [""])[:2]) for number, text in lines]
    check_unique(table, [(number, name) for number, name, _ in split])
    find = partial(sound_of, table.parent, usual=".flac")
    found = {}
    for number, name, text in split:
        if not text:
            raise TableError(table, f"has no text behind {name[:80]!r}", number)
        found[named(table, number, find, name)] = name, text.strip()
    return found
