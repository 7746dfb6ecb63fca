"""Corpora of mixtures that were made once and lie in files: LibriMix, WSJ0-mix, WHAM.

Each is a function that a YAML names, and that returns the files of each mixture by split. (lhotse's
own recipe for LibriMix does not read what LibriMix made: it mixes LibriSpeech and WHAM anew, at 16
kHz and to the length of the longest source alone.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from recipes.common.audio import Expected, Header, good_ones
from recipes.common.cuts import sounds
from recipes.common.paths import existing, inside
from recipes.common.tables import Row, TableError, check_unique, named, read_rows
from recipes.separation.recorded import Mixture
from trainer.data import BadItem

Corpus = Mapping[str, list[Mixture]]

# Columns of a table, as LibriMix calls them and as SpeechBrain's preparations do.
NAME = ("mixture_ID", "ID")
MIXED = ("mixture_path", "mix_wav")
SOURCE = (r"source_(\d)_path", r"s(\d)_wav")
NOISE = ("noise_path", "noise_wav")


def librimix(
    data_folder: str,
    sets: Mapping[str, str],
    speakers: int = 2,
    sample_rate: int = 8000,
    mode: str = "min",
    noisy: bool = False,
    follow_links: bool = False,
    **bad: Any,
) -> Corpus:
    """LibriMix (Cosentino et al. 2020, arXiv 2005.11262) as its scripts leave it.

    Args:
        data_folder: ``Libri2Mix``, or the folder that it is in.
        sets: the folder of each split, such as train-100, dev and test.
        speakers: 2 or 3.
        sample_rate: Hz.
        mode: "min", as long as the shortest source, or "max".
        noisy: ``mix_both``, with noise, in place of ``mix_clean``.
        follow_links: symbolic links may lead out of the folder.
        **bad: ``on_bad`` and ``max_bad``, as in the run options.

    The tables in ``metadata`` are read where they are there, the folders elsewhere. Raises
    ValueError for a missing folder, and for files that do not belong together.
    """
    expected = f"Libri{speakers}Mix with wav{sample_rate // 1000}k/{mode} in it"
    root = existing(data_folder, f"a folder of {expected}")
    root = _first(root, f"Libri{speakers}Mix", f"wav{sample_rate // 1000}k/{mode}", expected)
    kind = "mix_both" if noisy else "mix_clean"
    found = {}
    for split, name in sets.items():
        table = root / "metadata" / f"mixture_{name}_{kind}.csv"
        if table.is_file():
            mixtures = read_table(table, root, noisy, follow_links)
        else:
            mixtures = read_folders(root / name, kind, speakers, noisy)
        found[split] = checked(mixtures, speakers, sample_rate, **bad)
    return found


def wsj0mix(
    data_folder: str,
    sets: Mapping[str, str],
    speakers: int = 2,
    sample_rate: int = 8000,
    mode: str = "min",
    noisy: bool = False,
    follow_links: bool = False,
    **bad: Any,
) -> Corpus:
    """WSJ0-2mix and WSJ0-3mix, or WHAM, as their scripts leave them.

    The corpora are those of Hershey et al. 2016 (arXiv 1508.04306).

    Args:
        data_folder: with ``2speakers/wav8k/min/tr/mix`` and so on in it, or ``2speakers`` itself.
        sets: the folder of each split: tr, cv and tt; or a table ``something.csv`` in data_folder
            with the columns mix_wav, s1_wav, s2_wav …
        noisy: ``mix_both`` with ``noise``, as in WHAM, in place of ``mix``.
        speakers: 2 or 3.
        sample_rate: Hz.
        mode: "min", as long as the shortest source, or "max".
        follow_links: symbolic links may lead out of the folder.
        **bad: ``on_bad`` and ``max_bad``, as in the run options.

    Raises ValueError for a missing folder, and for files that do not belong together.
    """
    expected = f"{speakers}speakers with wav{sample_rate // 1000}k/{mode} in it"
    root = existing(data_folder, f"a folder of {expected}")
    found = {}
    for split, name in sets.items():
        if name.endswith(".csv"):
            mixtures = read_table(inside(root, name), root, noisy, follow_links)
        else:
            place = f"wav{sample_rate // 1000}k/{mode}"
            inner = _first(root, f"{speakers}speakers", place, expected) / name
            kind = "mix_both" if noisy else "mix" if (inner / "mix").is_dir() else "mix_clean"
            mixtures = read_folders(inner, kind, speakers, noisy)
        found[split] = checked(mixtures, speakers, sample_rate, **bad)
    return found


def _first(root: Path, name: str, place: str, expected: str) -> Path:
    for candidate in (root / place, root / name / place):
        if candidate.is_dir():
            return candidate
    inside_it = ", ".join(sorted(each.name for each in root.iterdir())[:8]) or "nothing"
    raise ValueError(f"{root} has another layout: expected was {expected}; in it is {inside_it}")


def read_folders(folder: Path, kind: str, speakers: int, noisy: bool) -> list[Mixture]:
    """The files of one name in the folders ``kind``, ``s1``, ``s2`` … and, if asked, ``noise``.

    A name, or path, that one of them has is expected in all.
    """
    names = [kind, *(f"s{n}" for n in range(1, speakers + 1)), *(["noise"] if noisy else [])]
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise ValueError(
            f"{folder} has no folder {', '.join(missing)}; expected: {', '.join(names)}"
        )
    sides = [sounds(folder / name) for name in names]
    if not sides[0]:
        raise ValueError(f"{folder / kind} has no *.wav, nor another sound file")
    found = []
    for id in sorted(set().union(*sides)):
        suffix = next(side[id].suffix for side in sides if id in side)
        path, *others = (
            side.get(id, folder / name / (id + suffix))
            for name, side in zip(names, sides, strict=True)
        )
        noise = others.pop() if noisy else None
        found.append(Mixture(id, path, tuple(others), noise))
    return found


def read_table(path: Path, root: Path, noisy: bool, follow_links: bool = False) -> list[Mixture]:
    """Read the mixtures of a csv.

    Its paths are those of the machine that made the files: each is looked for in ``root`` by as
    many of its last parts as lead to a file.

    Raises ValueError for a missing table or column, and for a row that does not fit.
    """
    rows = read_rows(path, "a table of mixtures")
    columns = list(rows[0].cells)
    name, mixed = (next((c for c in known if c in columns), None) for known in (NAME, MIXED))
    noise = next((c for c in NOISE if c in columns), None) if noisy else None
    matches = ((c, re.fullmatch(s, c)) for c in columns for s in SOURCE)
    sources = [c for _, c in sorted((int(m[1]), c) for c, m in matches if m)]
    if not (name and mixed and sources) or (noisy and not noise):
        wanted = "mixture_ID, mixture_path, source_1_path …" + (", noise_path" if noisy else "")
        raise TableError(path, f"has the columns {', '.join(columns)[:80]}; expected: {wanted}")
    check_unique(path, [(row.line, row.cells[name]) for row in rows])
    find = partial(_moved, root, follow_links=follow_links)

    def files(row: Row, columns: Sequence[str]) -> tuple[Path, ...]:
        return tuple(named(path, row.line, find, row.cells[column]) for column in columns)

    return [
        Mixture(
            row.cells[name],
            *files(row, [mixed]),
            files(row, sources),
            *files(row, [noise] if noise else []),
        )
        for row in rows
    ]


def _moved(root: Path, written: str, follow_links: bool) -> Path:
    parts = PurePosixPath(written).parts
    first = max((n for n, part in enumerate(parts, 1) if part in ("/", "..")), default=0)
    tails = ["/".join(parts[n:]) for n in range(first, len(parts))]
    found = next((tail for tail in tails if os.path.isfile(root / tail)), None)
    if found is None:  # Which is told with all that is not there, each by a name of its own.
        known = (tail for tail in tails[:-1] if os.path.isdir((root / tail).parent))
        found = next(known, tails[0])
    return inside(root, found, follow_links)


def checked(
    mixtures: list[Mixture],
    speakers: int,
    sample_rate: int,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> list[Mixture]:
    """Return the mixtures whose files, by their headers, have one length and the rate.

    Each other one is logged with its reason. Raises BadItem at the first with ``on_bad="raise"``,
    and ValueError when more than the share ``max_bad`` is bad, or has not so many speakers.
    """
    for each in mixtures:
        if len(each.sources) != speakers:
            raise ValueError(
                f"the mixture {each.id} has {len(each.sources)} sources; speakers is {speakers}"
            )
    rate = Expected(sample_rate)
    files = {each: [(str(path), rate) for path in each.files] for each in mixtures}

    def check(each: Mixture, headers: Sequence[Header]) -> None:
        for path, header in zip(each.files, headers, strict=True):
            if header.samples != headers[0].samples:
                raise BadItem(
                    path,
                    f"it has {header.samples} samples, its mixture {each.mixture} has "
                    f"{headers[0].samples}",
                )

    return list(good_ones(files, on_bad, max_bad, check))
