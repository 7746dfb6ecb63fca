"""Sound files as clips, and checks of settings, for the corpora of noisy speech."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.common.audio import Header
from recipes.common.cuts import MonoCut, cut_of
from recipes.common.pairs import Corpus, Source

SPLITS = ("train", "valid", "test")


def named_cut(path: Path, header: Header, name: str) -> MonoCut:
    """A file whose name (the last part of ``name``) begins with its speaker's."""
    return cut_of(path, header, name, speaker=re.split("[-_]", name.rpartition("/")[2])[0])


def existing(folder: Path) -> Path:
    """The folder; ValueError, which says what there is instead, where it is not there."""
    if folder.is_dir():
        return folder
    above = folder
    while not above.is_dir():
        above = above.parent
    there = ", ".join(sorted(each.name for each in above.iterdir())[:8]) or "nothing"
    raise ValueError(f"the folder {folder} is not there; {above} has {there}")


def snr_range(name: str, given: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of a setting in dB; ValueError for anything else."""
    if len(given) != 2 or not given[0] <= given[1]:
        raise ValueError(f"{name} must be [lowest, highest] in dB, not {list(given)}")
    return float(given[0]), float(given[1])


def filled(corpus: Mapping[str, Sequence[Source]], folder: str) -> Corpus:
    """The corpus; ValueError for a split without clips."""
    for split in SPLITS:
        if not corpus[split]:
            raise ValueError(f"{split} has no clips in {folder}")
    return corpus
