"""Names from manifests, kept inside the folder that they belong to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

LONGEST = 255  # Bytes of one name, on every common file system.
LONGEST_PATH = 1024  # Bytes of several with their separators, on most systems.
SHOWN = 80  # Characters of a name that an error shows.


def existing(data_folder: str | Path, expected: str) -> Path:
    """Return a data folder; ValueError, which says what was expected there, for a missing one."""
    folder = Path(data_folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data_folder {folder} is not there; expected was {expected}")
    return folder


def inside(folder: str | Path, name: str, follow_links: bool = False) -> Path:
    """Return the path of the file that a manifest names relative to its data folder.

    Args:
        folder: the data folder.
        name: path of the file within it.
        follow_links: symbolic links may lead out of the folder.

    Raises:
        ValueError: the name is none (see `check_name`), or could lead out of the folder: an
            absolute path, ``..``, ``~``, or a symbolic link whose target is elsewhere.
    """
    check_name(name)
    if reason := _leads_out(name):
        raise ValueError(f"the name {name[:SHOWN]!r} in a manifest {reason}")
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # A loop of symbolic links.
        raise ValueError(
            f"the name {name[:SHOWN]!r} in a manifest cannot be followed ({error})"
        ) from None
    if path == root or not (follow_links or path.is_relative_to(root)):
        raise ValueError(
            f"the name {name[:SHOWN]!r} in a manifest leads out of {folder}, to {path}; the option "
            "--corpus.follow_links=true lets links do so"
        )
    return path


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name or path of a file, wherever it is.

    That is an empty one, one of dots alone, control characters, and more bytes than file systems
    allow.
    """
    if reason := _fault(name):
        raise ValueError(f"the name {name[:SHOWN]!r} in a manifest {reason}")


def _fault(name: str) -> str | None:
    if not name.strip():
        return "is empty"
    if "\0" in name:
        return "contains a NUL character"
    if any(ord(each) < 32 or ord(each) == 127 for each in name):
        return "contains a control character, such as a line break"
    if any("\ud800" <= each <= "\udfff" for each in name):
        return "contains half of a character"
    parts = PureWindowsPath(name).parts
    if not set(parts) - {".", ".."} or name.strip().endswith(("/", "/.", "/..")):
        return "names no file"
    if any(len(part.encode()) > LONGEST for part in parts):
        return f"has a part of more than {LONGEST} bytes"
    if len(name.encode()) > LONGEST_PATH:
        return f"has more than {LONGEST_PATH} bytes"
    return None


def _leads_out(name: str) -> str | None:
    # As Windows reads it too, so that a manifest is refused on every system or on none.
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "is an absolute path; it must be relative to the data folder"
    parts = PureWindowsPath(name).parts
    if ".." in parts:
        return "contains '..'; it must stay inside the data folder"
    if parts[0].startswith("~"):
        return "begins with '~'; it must be relative to the data folder"
    return None
