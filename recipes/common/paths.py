"""Names from manifests, kept inside the folder that they belong to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

LONGEST = 255  # Bytes of one name, on every common file system.


def inside(folder: str | Path, name: str) -> Path:
    """The file that a manifest names relative to its data folder.

    Raises ValueError when the name could lead out of the folder: an absolute path, ``..``, a NUL
    character, a name longer than file systems allow, a symbolic link whose target is elsewhere.
    """
    if reason := _fault(name):
        raise ValueError(f"the name {name[:80]!r} in a manifest {reason}")
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if path == root or not path.is_relative_to(root):
        raise ValueError(f"the name {name!r} in a manifest leads out of {folder}, to {path}")
    return path


def _fault(name: str) -> str | None:
    if not name.strip():
        return "is empty"
    if "\0" in name:
        return "contains a NUL character"
    # As Windows reads it too, so that a manifest is refused on every system or on none.
    parts = PureWindowsPath(name).parts
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "is an absolute path; it must be relative to the data folder"
    if ".." in parts:
        return "contains '..'; it must stay inside the data folder"
    if any(len(part.encode(errors="replace")) > LONGEST for part in parts):
        return f"has a part of more than {LONGEST} bytes"
    return None
