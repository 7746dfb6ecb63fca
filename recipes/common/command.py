"""Arguments, errors and exit codes of the command lines of all ``infer.py``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import soundfile

Item = TypeVar("Item")


def file_path(text: str) -> str:
    """Return a path of the command line with ``~`` expanded, which shells leave in ``-o=~/x``."""
    return os.path.expanduser(text)


def local_path(text: str) -> Path:
    """Return a path of the command line as `file_path` does, as a `Path`."""
    return Path(file_path(text))


def arguments(
    about: str, task: str, files: str = "sound files of any kind", output: str = ""
) -> argparse.ArgumentParser:
    """Return a parser of ``RUN FILE... -o OUTPUT --device DEVICE``.

    Args:
        about: text whose first line says what the command is for.
        task: name of the recipe.
        files: help of the files, whose names are texts; empty for none.
        output: help of the place of the results, a `Path`; empty for none.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("run", type=Path, help=f"folder of a run: results/{task}/demo/1234")
    if files:
        parser.add_argument("files", nargs="+", type=file_path, metavar="FILE", help=files)
    if output:
        parser.add_argument("-o", "--output", type=local_path, required=True, help=output)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    return parser


def told(work: Callable[[], int]) -> int:
    """Call a function, and print an error that the user can mend.

    Args:
        work: returns an exit code.

    Returns:
        The exit code of ``work``; 2 after a ValueError, OSError or ImportError.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        # Print names that are not UTF-8 unchanged; escape what another encoding lacks.
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        return work()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def each_of(items: Iterable[Item], work: Callable[[Item], None]) -> int:
    """Call a function with each item; an item that fails is named on stderr, and the next follows.

    Args:
        items: the items, such as names of files.
        work: raises ValueError, OSError or SoundFileError for an item that it cannot use, or whose
            result it cannot write.

    Returns:
        The exit code: 2 if any item failed, else 0.
    """
    failed = False
    for item in items:
        try:
            work(item)
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return 2 if failed else 0
