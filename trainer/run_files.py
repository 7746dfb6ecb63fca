"""Files of a run folder that several packages read: the YAML and the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.checkpoint.storage import MANIFEST, TEMPORARY_NAME

HYPERPARAMS = "hyperparams.yaml"
CHECKPOINTS = "checkpoints"
HEADER = "# The resolved hyperparameters of a run; this file runs alone."
LAUNCH_HEADER = '# The hyperparameters of a run by trainer.launch; "repr: …" stands for an object.'
HEADERS = (HEADER, LAUNCH_HEADER)
MAX_LEVELS = 3  # of folders in a run folder, where links are followed


def is_run(folder: Path) -> bool:
    """Return True for a folder with the hyperparams.yaml of a run."""
    path = folder / HYPERPARAMS
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.readline(200).decode(errors="replace").strip() in HEADERS
    except OSError:
        return False


def checkpoint_folders(run: Path, links: bool = False) -> Iterator[Path]:
    """Yield the folders of a run that hold checkpoints, or remains of them.

    A program may keep checkpoints in any folder. Other runs below this one are left out.

    Args:
        run: the run folder.
        links: follow links to folders, at most `MAX_LEVELS` deep.
    """
    for place, folders, files in os.walk(run, followlinks=links):
        here = Path(place)
        below = len(here.relative_to(run).parts)
        if (below and HYPERPARAMS in files and is_run(here)) or (links and below >= MAX_LEVELS):
            folders.clear()
        holds = [
            each
            for each in folders
            if TEMPORARY_NAME.fullmatch(each) or os.path.isfile(here / each / MANIFEST)
        ]
        if holds:
            yield here
            folders[:] = [each for each in folders if each not in holds]


def manifests(run: Path, links: bool = False) -> list[Path]:
    """Return the manifests of the checkpoints in `checkpoint_folders`."""
    places = checkpoint_folders(run, links)
    return [each for place in places for each in place.glob(f"*/{MANIFEST}")]
