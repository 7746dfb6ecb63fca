"""What a checkpoint is: a folder whose manifest lists every file with its size and hash.

The manifest is sealed by its own hash and must be, byte for byte, what `render` gives, so that a
changed bit in it is noticed as well. It is read before anything else, and nothing that it says is
believed before it is checked: file names stay inside the folder, sizes and hashes are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import Written

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST = 16 << 20  # bytes of a manifest; a real one has a few thousand
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=,-]{0,99}", re.ASCII)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.pt", re.ASCII)
RANK_FILE = re.compile(r"rank-(\d{1,6})\.pt", re.ASCII)
FIELDS: dict[str, tuple[type, ...]] = {
    "number": (int,),
    "time": (str,),
    "step": (int, type(None)),
    "label": (str, type(None)),
    "pinned": (bool,),
    "end_of_epoch": (bool,),
    "processes": (int,),
    "meta": (dict,),
}


class BrokenCheckpoint(ValueError):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of a run, as its manifest describes it.

    `number` counts the saves of a run: of two checkpoints the newer one has the higher number,
    whatever the clocks said. `step` is the optimizer step, where the caller gave it in `meta`.
    `label` is the name that the caller asked for. `pinned`: kept until deleted by hand.
    """

    path: Path
    number: int
    time: str  # UTC, ISO 8601
    step: int | None = None
    label: str | None = None
    pinned: bool = False
    end_of_epoch: bool = True
    processes: int = 1
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    files: dict[str, Written] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


def render(content: Mapping[str, Any]) -> bytes:
    """A manifest as the bytes of its file, sealed by a hash of its content."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    plain = json.dumps(body, sort_keys=True, allow_nan=False).encode()
    sealed = {**body, "sha256": hashlib.sha256(plain).hexdigest()}
    return (json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def content(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of a checkpoint's manifest: everything but its path."""
    fields = {key: value for key, value in vars(checkpoint).items() if key != "path"}
    files = {name: entry._asdict() for name, entry in sorted(checkpoint.files.items())}
    return {"format": FORMAT, **fields, "files": files}


def read_manifest(path: Path) -> Checkpoint:
    """The checkpoint in a folder, by its manifest alone; BrokenCheckpoint if that is not sound."""
    data = read_file(path, MANIFEST)
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"it is not a manifest of format {FORMAT}")
        if render(fields) != data:
            raise ValueError("its content does not match its own hash")
        files = {name: Written(**entry) for name, entry in fields.pop("files").items()}
        del fields["format"], fields["sha256"]
        checkpoint = Checkpoint(path=path, files=files, **fields)
        _check(checkpoint)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path / MANIFEST} is broken: {error}") from error
    return checkpoint


def holds_files(path: Path) -> bool:
    """Whether a folder without a sound manifest looks like a checkpoint all the same."""
    try:
        return any(name == MANIFEST or name.endswith(".pt") for name in os.listdir(path))
    except FileNotFoundError:  # Deleted since it was listed, by the process that trains.
        return False


def _check(checkpoint: Checkpoint) -> None:
    """ValueError where a manifest (which anybody can seal) holds what `content` never wrote."""
    for key, kinds in FIELDS.items():
        if type(getattr(checkpoint, key)) not in kinds:
            raise ValueError(f"its {key!r} is not of type {kinds[0].__name__}")
    for name, entry in checkpoint.files.items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"it lists {name[:80]!r}, which is not a plain name of a .pt file")
        if type(entry.size) is not int or type(entry.sha256) is not str:
            raise ValueError(f"the entry of {name!r} is not a size and a hash")


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a plain file directly in `folder`; BrokenCheckpoint names what is not one."""
    path = folder / name
    try:
        # Asked before opening: a pipe would never answer, a link would lead outside.
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BrokenCheckpoint(f"{path} is broken: it is not a regular file")
        if name == MANIFEST and info.st_size > LARGEST:
            raise BrokenCheckpoint(f"{path} is broken: it has {info.st_size} bytes")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} is missing") from error
    except OSError as error:
        raise BrokenCheckpoint(f"{path} cannot be read: {error.strerror}") from error


def read_verified(checkpoint: Checkpoint, name: str) -> bytes:
    """The bytes of a listed file, once their size and hash are those of the manifest."""
    data, expected = read_file(checkpoint.path, name), checkpoint.files[name]
    path = checkpoint.path / name
    if len(data) != expected.size:
        raise BrokenCheckpoint(
            f"{path} is broken: it has {len(data)} bytes, the manifest says {expected.size}"
        )
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise BrokenCheckpoint(f"{path} is broken: its SHA-256 is not the manifest's")
    return data
