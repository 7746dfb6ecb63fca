"""Writing of sound files: their formats, checks before the work, and files that appear whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.common.audio import MP3_FORMATS, for_soundfile
from recipes.common.paths import LONGEST

try:
    import soundfile
except ImportError as error:
    raise ImportError(
        "writing audio needs soundfile: pip install 'cortex-speech[recipes]'"
    ) from error

logger = logging.getLogger(__name__)

# Formats that files of a suffix may have; the first is that of a file which resembles no other one.
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
CODECS = ("MPEG_LAYER_III", "VORBIS", "OPUS")  # Those with a level of compression.
TRIED = 10.0  # seconds of a file, on which its level is tried
BLOCK = 1 << 16  # samples to write at once: Ogg takes memory of the stack for them


class Kind(NamedTuple):
    """Kind of a sound file, in soundfile's names."""

    format: str = "WAV"
    subtype: str = "PCM_16"
    endian: str = "FILE"
    level: float | None = None  # of compression, 0 for the best quality to 1
    mode: str | None = None  # of an MP3

    @property
    def options(self) -> dict[str, Any]:
        """Options of soundfile with which such a file is written."""
        names = ("format", "subtype", "endian", "compression_level", "bitrate_mode")
        return {name: value for name, value in zip(names, self, strict=True) if value is not None}


def kind_of(path: str | Path) -> Kind | None:
    """Return the kind of a file; None where libsndfile writes none that is like it.

    Raises:
        SoundFileError: the file cannot be read.
    """
    with soundfile.SoundFile(for_soundfile(path)) as file:
        kind = Kind(file.format, file.subtype, file.endian)
        rate, channels = file.samplerate, file.channels
    try:
        made, _ = _tried(np.zeros((rate // 10, channels), np.float32), rate, kind)
    except (soundfile.SoundFileError, ValueError):
        return None
    found = made.format, made.subtype, made.samplerate, made.channels
    same = found == (kind.format, kind.subtype, rate, channels)
    return kind if same and kind.format != "SD2" else None  # SD2 is a pair of files.


def _tried(samples: np.ndarray[Any, Any], rate: int, kind: Kind) -> tuple[Any, int]:
    """Return kind and size of a file of such samples (T, C) as it is read; it is removed."""
    with TemporaryDirectory() as folder:
        path = f"{folder}/tried"
        with soundfile.SoundFile(path, "w", rate, samples.shape[1], **kind.options) as file:
            put(file, torch.from_numpy(samples.T))
        return soundfile.info(path), os.path.getsize(path)


def name_for(path: str | Path) -> str:
    """Return the name of what is made of a file: its own, with .wav where its kind is not written.

    A file that cannot be read is told of when it is used.
    """
    path = Path(path)
    same = path.suffix.lower() in FORMATS
    if path.is_file():
        with suppress(soundfile.SoundFileError, OSError, TypeError):
            same = kind_of(path) is not None
    return path.name if same else path.stem + ".wav"


def kind_for(target: Path, like: str | Path | None = None) -> Kind:
    """Return the kind of a file to write.

    Args:
        target: its path, whose suffix decides on the format, unless it is that of ``like``.
        like: a file that it resembles as far as possible: in format, depth and, where these are
            lossy, in bits per second. What cannot be like it, or is given none, has 16 bits.

    Raises:
        ValueError: no sound file has the suffix.
        SoundFileError: ``like`` cannot be read.
    """
    if like is None:
        return Kind(_usual(target))
    same, formats = kind_of(like), FORMATS.get(target.suffix.lower(), ())
    with soundfile.SoundFile(for_soundfile(like)) as file:
        form, subtype = file.format, file.subtype
    if same is None:
        logger.warning("%s is %s (%s), which is only read, not written", like, form, subtype)
    elif form in formats or target.suffix.lower() == Path(like).suffix.lower():
        return _as_good(same, like) if subtype in CODECS else same
    usual = _usual(target)
    kept = subtype.startswith(DEPTHS) and soundfile.check_format(usual, subtype)
    return Kind(usual, subtype) if kept else Kind(usual)


def _usual(target: Path) -> str:
    """The usual format of a suffix."""
    try:
        return FORMATS[target.suffix.lower()][0]
    except KeyError:
        raise ValueError(
            f"{target} cannot be written: the name of a sound file ends in {', '.join(FORMATS)}"
        ) from None


def _as_good(kind: Kind, path: str | Path) -> Kind:
    """The kind with the level at which the middle of a file takes about its share of the bytes."""
    with soundfile.SoundFile(for_soundfile(path)) as file:
        rate, count = file.samplerate, min(file.frames, round(TRIED * file.samplerate))
        file.seek((file.frames - count) // 2)
        part = file.read(count, dtype="float32", always_2d=True)
        share = count / file.frames
    _, head = _tried(part[: rate // 100], rate, kind)  # Vorbis has 4 kB before its data.
    wanted = head + share * (os.path.getsize(path) - head)
    for mode in ("VARIABLE", "AVERAGE") if kind.format in MP3_FORMATS else (None,):
        low, high = 0.0, 1.0
        for _ in range(6):
            level = (low + high) / 2
            _, size = _tried(part, rate, kind._replace(level=level, mode=mode))
            low, high = (level, high) if size > wanted else (low, level)
        if low > 0:  # A variable rate is better, and has no high one.
            break
    return kind._replace(level=low, mode=mode)


def put(file: soundfile.SoundFile, samples: Tensor) -> None:
    """Write samples (C, T) to a file; those above full scale are clipped, unless it has floats."""
    if file.subtype not in FLOATS:
        samples = samples.clamp(-1.0, 1.0)
    for block in samples.split(BLOCK, dim=1):
        file.write(block.mT.contiguous().numpy())


def check_outputs(paths: Iterable[Path]) -> None:
    """Raise ValueError for a file that cannot be written, to be called before the work."""
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
    try:
        with soundfile.SoundFile(for_soundfile(part), "w", rate, channels, **kind.options) as file:
            yield file
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
