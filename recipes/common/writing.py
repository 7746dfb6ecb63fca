"""Sound files to write: what can be, checked before the work, and appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import NamedTuple

from recipes.common.audio import for_soundfile
from recipes.common.paths import LONGEST

try:
    import soundfile
except ImportError as error:
    raise ImportError(
        "writing audio needs soundfile: pip install 'cortex-speech[recipes]'"
    ) from error

# Formats by suffix, the usual one first. None of them loses anything.
FORMATS = {
    ".wav": ("WAV", "WAVEX", "RF64", "NIST"),
    ".flac": ("FLAC",),
    ".aif": ("AIFF",),
    ".aifc": ("AIFF",),
    ".aiff": ("AIFF",),
    ".au": ("AU",),
    ".caf": ("CAF",),
    ".rf64": ("RF64",),
    ".snd": ("AU",),
    ".sph": ("NIST",),
    ".w64": ("W64",),
}
FLOATS = ("FLOAT", "DOUBLE")
DEPTHS = ("PCM_", "ALAC_", "ULAW", "ALAW", *FLOATS)  # What subtypes begin with that are no codecs.


class Kind(NamedTuple):
    """Kind of a sound file, in soundfile's names."""

    format: str = "WAV"
    subtype: str = "PCM_16"
    endian: str = "FILE"


def kind_for(target: Path, like: str | Path | None = None) -> Kind:
    """Return the kind of a file to write.

    Args:
        target: its path, whose suffix decides on the format.
        like: a file that it resembles as far as possible, in format and depth. What is lossy, or
            not given, becomes 16 bit.

    Raises:
        ValueError: no sound file has the suffix.
        SoundFileError: ``like`` cannot be read.
    """
    formats = FORMATS.get(target.suffix.lower(), ())
    if not formats:
        raise ValueError(
            f"{target} cannot be written: the name of a sound file ends in {', '.join(FORMATS)}"
        )
    if like is None:
        return Kind(formats[0])
    with soundfile.SoundFile(for_soundfile(like)) as file:
        own = Kind(file.format, file.subtype, file.endian)
    kind = own.format if own.format in formats else formats[0]
    if not own.subtype.startswith(DEPTHS) or not soundfile.check_format(kind, own.subtype):
        return Kind(kind)
    same = kind == own.format and soundfile.check_format(*own)
    return own if same else Kind(kind, own.subtype)


def check_outputs(paths: Iterable[Path]) -> None:
    """Raise ValueError for a file that cannot be written: before the work, not after it."""
    for path in paths:
        above = path.parent
        while not os.path.lexists(above):
            above = above.parent
        if len(os.fsencode(path.name)) > LONGEST:
            raise ValueError(
                f"{path.parent} cannot hold {path.name[:80]}…: its name has more than {LONGEST} "
                "bytes"
            )
        if path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder")
        if not above.is_dir():
            raise ValueError(f"{path} cannot be written: {above} is no folder")
        try:
            with TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written: no file can be made in {above} ({error.strerror})"
            ) from None


@contextmanager
def written(path: Path, rate: int, channels: int, kind: Kind) -> Iterator[soundfile.SoundFile]:
    """Context manager with a file to write to, which appears whole or not at all.

    Its folder is made.
    """
    # Whatever the length of its name, and if another process writes the same file.
    part = path.with_name(f".{token_hex(8)}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    form, subtype, endian = kind
    try:
        with soundfile.SoundFile(
            for_soundfile(part), "w", rate, channels, subtype, endian, form
        ) as file:
            yield file
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
