"""Corpora of mixtures that were made once and lie in files: LibriMix, WSJ0-mix, WHAM.

Each is a function that a YAML names, and that returns the files of each mixture by split. (lhotse's
own recipe for LibriMix does not read what LibriMix made: it mixes LibriSpeech and WHAM anew, at 16
kHz and to the length of the longest source alone.)
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from recipes.common.audio import good_ones, read_header
from recipes.common.paths import inside
from recipes.separation.recorded import Mixture
from recipes.separation.speech import existing
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
        **bad: ``on_bad`` and ``max_bad``, as in the run options.

    The tables in ``metadata`` are read where they are there, the folders elsewhere. Raises
    ValueError for a missing folder, and for files that do not belong together.
    """
    expected = f"Libri{speakers}Mix with wav{sample_rate // 1000}k/{mode} in it"
    root = existing(data_folder, expected)
    root = _first(root, f"Libri{speakers}Mix", f"wav{sample_rate // 1000}k/{mode}", expected)
    kind = "mix_both" if noisy else "mix_clean"
    found = {}
    for split, name in sets.items():
        table = root / "metadata" / f"mixture_{name}_{kind}.csv"
        if table.is_file():
            mixtures = read_table(table, root, noisy)
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
        **bad: ``on_bad`` and ``max_bad``, as in the run options.

    Raises ValueError for a missing folder, and for files that do not belong together.
    """
    expected = f"{speakers}speakers with wav{sample_rate // 1000}k/{mode} in it"
    root = existing(data_folder, expected)
    found = {}
    for split, name in sets.items():
        if name.endswith(".csv"):
            mixtures = read_table(inside(root, name), root, noisy)
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
    """The files of one name in the folders ``kind``, ``s1``, ``s2`` … and, if asked, ``noise``."""
    names = [kind, *(f"s{n}" for n in range(1, speakers + 1)), *(["noise"] if noisy else [])]
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise ValueError(
            f"{folder} has no folder {', '.join(missing)}; expected: {', '.join(names)}"
        )
    found = []
    for path in sorted((folder / kind).glob("*.wav")):
        others = [folder / name / path.name for name in names[1:]]
        noise = others.pop() if noisy else None
        found.append(Mixture(path.stem, path, tuple(others), noise))
    if not found:
        raise ValueError(f"{folder / kind} has no *.wav")
    return found


def read_table(path: Path, root: Path, noisy: bool) -> list[Mixture]:
    """Read the mixtures of a csv.

    Its paths are those of the machine that made the files: each is looked for in ``root`` by as
    many of its last parts as lead to a file.

    Raises ValueError for a missing table or column.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; expected was a table of mixtures")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    name, mixed = (next((c for c in known if c in columns), None) for known in (NAME, MIXED))
    noise = next((c for c in NOISE if c in columns), None) if noisy else None
    matches = ((c, re.fullmatch(s, c)) for c in columns for s in SOURCE)
    sources = [c for _, c in sorted((int(m[1]), c) for c, m in matches if m)]
    if not (name and mixed and sources) or (noisy and not noise):
        wanted = "mixture_ID, mixture_path, source_1_path …" + (", noise_path" if noisy else "")
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or 'of no rows'}; expected: {wanted}"
        )
    return [
        Mixture(
            row[name],
            _moved(row[mixed], root),
            tuple(_moved(row[column], root) for column in sources),
            _moved(row[noise], root) if noise else None,
        )
        for row in rows
    ]


def _moved(written: str, root: Path) -> Path:
    parts = PurePosixPath(written).parts
    tails = ["/".join(parts[n:]) for n in range(len(parts)) if parts[n] not in ("/", "..")]
    for tail in tails:
        if (root / tail).is_file():
            return inside(root, tail)
    return inside(root, tails[-1])  # Not there, which is told with all that is not.


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

    def probe(each: Mixture) -> None:
        paths = [each.mixture, *each.sources, *([each.noise] if each.noise else [])]
        headers = {path: read_header(path) for path in paths}
        for path, header in headers.items():
            if header.sample_rate != sample_rate:
                raise BadItem(
                    path, f"it is sampled at {header.sample_rate} Hz, not at {sample_rate} Hz"
                )
            if header.samples != headers[each.mixture].samples:
                raise BadItem(
                    path,
                    f"it has {header.samples} samples, its mixture {each.mixture} has "
                    f"{headers[each.mixture].samples}",
                )

    for each in mixtures:
        if len(each.sources) != speakers:
            raise ValueError(
                f"the mixture {each.id} has {len(each.sources)} sources; speakers is {speakers}"
            )
    return list(good_ones(mixtures, probe, on_bad, max_bad))
