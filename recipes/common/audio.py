"""Audio files, read by soundfile, with every way to be unusable told apart.

A file that cannot be used raises `trainer.data.BadItem` with its path and the reason, so that the
loader can skip, log and count it. `check_recordings` finds most of them before training starts,
from the headers alone; samples that are not finite, and cut FLAC or MP3 data, show when read.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from recipes.common.lengths import length_is_told
from recipes.common.resampling import resample as to_rate
from trainer.data import BadItem, BadItemPolicy

try:
    import soundfile
except ImportError as error:
    raise ImportError(
        "reading audio needs soundfile: pip install 'cortex-speech[recipes]'"
    ) from error

Item = TypeVar("Item", bound=Hashable)

_MP3 = (b"ID3", b"\xff\xfb", b"\xff\xf3")
_MAGIC = (
    *_MP3, b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"NIST", b"riff", b"caff",
)  # fmt: skip
# First bytes of the formats that libsndfile does not read.
_OTHERS = {
    "MPEG-4 (AAC or ALAC)": re.compile(rb"....ftyp", re.DOTALL),
    "AAC": re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"),
    "Matroska or WebM": re.compile(rb"\x1aE\xdf\xa3"),
    "Windows Media": re.compile(rb"0&\xb2u"),
    "AMR": re.compile(rb"#!AMR"),
}
# What libsndfile logs when the header promises more than the file has, by WAV, AIFF, AU, W64, RF64.
_CUT = re.compile(
    r"^ *(?:data|SSND|Data Size|riff) *: (?P<bytes>\d+) \(should be (\d+)\)"
    r"|frame count (\d+) does not match value from 'ds64' chunk of (?P<samples>\d+)",
    re.MULTILINE,
)
# The sizes that a header has, more or less, where its writer did not know the end: that of a pipe.
_ENDLESS = (0x7F000000, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
BLOCK = 1 << 16  # samples to read at once of a file that is read block by block
_LARGEST_HEADER = 4096  # bytes, of a file without samples
MP3_FORMATS = ("MP3", "MPEG")  # in versions of soundfile
_MP3_FRAME = 1152  # samples, at most; where no header tells the length, it is known to a frame
_MP3_BACK = 20 * _MP3_FRAME  # samples before a place that its frames may need, at low bit rates


class Expected(NamedTuple):
    """Expected properties of a file, where known."""

    sample_rate: int | None = None  # Hz
    channels: int | None = None
    samples: int | None = None  # per channel


class Header(NamedTuple):
    """Properties of an audio file according to its header."""

    samples: int  # per channel
    sample_rate: int  # Hz
    channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.sample_rate


def read_audio(
    path: str | Path,
    sample_rate: int | None = None,
    *,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | str | None = None,
    resample: bool = False,
) -> Tensor:
    """Read a file, or ``duration`` seconds of it from ``start`` on, as float32 samples (T,).

    Args:
        path: of the file.
        sample_rate: expected rate in Hz. Another one is bad, or resampled with ``resample``.
        start: seconds to leave out at the beginning.
        duration: seconds to read; None: up to the end.
        channel: the one to take of several, or ``"mean"`` of all. None: one channel is expected.
        resample: resample a file of another rate instead of refusing it.

    Raises:
        BadItem: the file cannot be used, or has no such part or channel.
    """
    expected = Expected(None if resample else sample_rate, 1 if channel is None else None)
    data, rate = read_channels(path, start, duration, expected)
    if channel == "mean":
        signal = data.mean(dim=0)
    elif isinstance(channel, str) or not 0 <= (channel or 0) < len(data):
        allowed = f"allowed: 0 to {len(data) - 1}, or 'mean'"
        raise BadItem(path, f"it has {len(data)} channels, asked for was {channel!r}; {allowed}")
    else:
        signal = data[channel or 0].clone()
    if resample and sample_rate not in (None, rate):
        signal = to_rate(signal, rate, sample_rate)
    return signal


def read_channels(
    path: str | Path,
    start: float = 0.0,
    duration: float | None = None,
    expected: Expected | None = None,
) -> tuple[Tensor, int]:
    """Read all channels of a file, or of a part of it.

    Args:
        path: of the file.
        start: seconds to leave out at the beginning.
        duration: seconds to read; None: up to the end.
        expected: properties that the file must have.

    Returns:
        Float32 samples (C, T) and their rate in Hz.

    Raises:
        BadItem: the file cannot be used, is not as expected, or has no such part.
    """
    with _opened(path) as file:
        header = Header(file.frames, file.samplerate, file.channels)
        _compare(path, header, expected or Expected())
        first = round(start * header.sample_rate)
        count = header.samples - first
        if duration is not None:
            count = round(duration * header.sample_rate)
            if 0 < first + count - header.samples <= header.sample_rate // 1000:
                count = header.samples - first  # Manifests round their seconds.
        if count <= 0 or first + count > header.samples:
            wanted = f"{start:.3f} s to {start + (duration or 0):.3f} s"
            raise BadItem(path, f"it lasts {header.duration:.3f} s, asked for was {wanted}")
        try:
            back = min(first, _MP3_BACK) if file.format in MP3_FORMATS else 0
            if file.seekable():
                file.seek(first - back)
            else:  # Some encodings cannot be sought in, such as GSM in a WAV.
                file.read(first)
            read = file.read(back + count, dtype="float32", always_2d=True)
            data = torch.from_numpy(read)[back:]  # (T, C)
        except soundfile.SoundFileError as error:
            raise BadItem(path, f"its data are cut or broken ({error})") from error
        check_count(path, file, len(data), count)
    check_finite(path, data)
    return data.T, header.sample_rate


class Forward(soundfile.SoundFile):
    """A file that is read block by block from its beginning to its end.

    soundfile seeks to where it is after each block, and a seek in an MP3 loses what the next frames
    need of the last ones.
    """

    def seekable(self) -> bool:
        """Return False."""
        return False


def read_blocks(path: str | Path, size: int | None = None) -> Iterator[Tensor]:
    """Yield a file in blocks of samples, from its beginning to its end.

    Args:
        path: of the file.
        size: samples per channel of a block; None: ``BLOCK``.

    Yields:
        Float32 samples (C, T), T up to ``size``.

    Raises:
        BadItem: the file cannot be used, or its data are cut or not finite.
    """
    header = read_header(path)
    read = 0
    with Forward(for_soundfile(path)) as file:
        while True:
            try:
                data = torch.from_numpy(file.read(size or BLOCK, dtype="float32", always_2d=True))
            except soundfile.SoundFileError as error:
                raise BadItem(path, f"its data are cut or broken ({error})") from error
            if not len(data):
                break
            check_finite(path, data)
            read += len(data)
            yield data.mT
        check_count(path, file, read, header.samples)


def check_count(path: str | Path, file: soundfile.SoundFile, read: int, count: int) -> None:
    """Raise BadItem for fewer samples than a header promised; an MP3 may lack up to a frame."""
    if read < count - (_MP3_FRAME if file.format in MP3_FORMATS else 0):
        raise BadItem(path, f"its data are cut: {read} of {count} samples")


def check_finite(path: str | Path, samples: Tensor) -> None:
    """Raise BadItem for samples that are NaN or infinite."""
    if math.isfinite(samples.sum()):  # Many times faster than looking at each of them.
        return
    wrong = samples.numel() - int(torch.isfinite(samples).sum())
    if wrong:
        raise BadItem(path, f"{wrong} of its samples are not finite numbers")


def check_length(path: str | Path, samples: int, sample_rate: int, shortest: int) -> None:
    """Raise BadItem for a file, or other source, of fewer samples than an encoder needs."""
    if samples < shortest:
        raise BadItem(
            path, f"it has {samples} samples at {sample_rate} Hz; the encoder needs {shortest}"
        )


def check_made(path: str | Path, made: Tensor) -> None:
    """Raise BadItem where what a network made of a file is NaN or infinite."""
    if not torch.isfinite(made).all():
        raise BadItem(path, "the network makes numbers of it that are not finite")


def read_header(path: str | Path, expected: Expected | None = None) -> Header:
    """Read a header. Raises BadItem for a file that is no audio, cut, or not as expected."""
    with _opened(path) as file:
        header = Header(file.frames, file.samplerate, file.channels)
    _compare(path, header, expected or Expected())
    return header


def check_recordings(
    paths: Iterable[str | Path],
    sample_rate: int | None = None,
    channels: int | None = 1,
    *,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> dict[Path, Header]:
    """Read the headers of files, in several threads, and leave out the bad ones.

    Each bad file is logged with its reason.

    Args:
        paths: of the files.
        sample_rate: expected rate in Hz; None: any.
        channels: expected number of channels; None: any.
        on_bad: "skip", or "raise" at the first bad file.
        max_bad: share of the files that may be bad, from 0 to 1.

    Returns:
        The headers of the good files by path, in the order given.

    Raises:
        BadItem: with ``on_bad="raise"``, for the first bad file.
        ValueError: more than ``max_bad`` of the files are bad; it lists them.
    """
    files = {Path(path): [(str(path), Expected(sample_rate, channels))] for path in paths}
    good = good_ones(files, on_bad, max_bad)
    return {path: header for path, (header,) in good.items()}


def good_ones(
    items: Mapping[Item, Sequence[tuple[str, Expected]]],
    on_bad: str,
    max_bad: float,
    check: Callable[[Item, Sequence[Header]], object] = lambda item, headers: None,
) -> dict[Item, list[Header]]:
    """Read the headers of the files of items, in several threads, and select the good items.

    Args:
        items: the files of each, and how they are expected to be. Items may share files.
        on_bad: "skip", or "raise" at the first bad file.
        max_bad: share of the files that may be bad.
        check: called with an item and its headers; raises BadItem where they do not fit.

    Returns:
        The headers of the items all of whose files are good.

    Raises:
        BadItem: with ``on_bad="raise"``, for the first bad file.
        ValueError: too many files are bad.
    """

    def ask(file: tuple[str, Expected]) -> Header | BadItem:
        try:
            return read_header(*file)
        except BadItem as bad:
            return bad

    files = list(dict.fromkeys(chain.from_iterable(items.values())))
    with ThreadPoolExecutor(8) as pool:  # Mostly waiting for disks.
        found = dict(zip(files, pool.map(ask, files), strict=True))
    bad: list[BadItem] = []
    good: dict[Item, list[Header]] = {}
    for item, names in items.items():
        headers = [each for name in names if isinstance(each := found[name], Header)]
        bad += [each for name in names if isinstance(each := found[name], BadItem)]
        if len(headers) == len(names):
            try:
                check(item, headers)
                good[item] = headers
            except BadItem as error:
                bad.append(error)
    policy = BadItemPolicy(on_bad, max_bad)
    policy.handle([(each.path, each.reason) for each in bad])
    policy.check(policy.skipped, len({path for path, _ in files}))
    return good


def _compare(path: str | Path, header: Header, expected: Expected) -> None:
    rate, channels, samples = expected
    if rate is not None and header.sample_rate != rate:
        raise BadItem(path, f"it is sampled at {header.sample_rate} Hz, not at {rate} Hz")
    if channels is not None and header.channels != channels:
        raise BadItem(path, f"it has {header.channels} channels, expected: {channels}")
    # Decoders of lossy formats may differ by some samples.
    if samples is not None and abs(header.samples - samples) > header.sample_rate // 100:
        raise BadItem(path, f"it holds {header.samples} samples, its manifest says {samples}")


@contextmanager
def _opened(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open a file. Raises BadItem where that fails, or where its header promises more data."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BadItem(path, "it does not exist") from None
    except (OSError, ValueError) as error:
        raise BadItem(path, f"it cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadItem(path, "it is no regular file")
    if status.st_size == 0:
        raise BadItem(path, "it is empty (0 bytes)")
    try:
        file = soundfile.SoundFile(for_soundfile(path))
    except soundfile.SoundFileError as error:
        raise BadItem(path, _unreadable(path, error)) from error
    with file:
        for found in _CUT.finditer(file.extra_info):
            unit = "bytes" if found["bytes"] else "samples"
            promised, present = int(found[unit]), int(found[2] or found[3])
            endless = any(abs(promised - size) < 1 << 16 for size in _ENDLESS)
            if present < promised and not endless:
                raise BadItem(path, f"its data are cut: {present} of {promised} {unit}")
        if file.format == "NIST":  # Of which libsndfile logs nothing.
            with open(path, "rb") as raw:
                told = re.search(rb"sample_count -i (\d+)", raw.read(1024))
            if told and int(told[1]) > file.frames:
                raise BadItem(path, f"its data are cut: {file.frames} of {int(told[1])} samples")
        rewrite = "write it anew, as by ffmpeg -i FILE FILE.wav"
        if file.frames == 0:
            known = f" by its header, which was not finished: {rewrite}"
            raise BadItem(path, "it holds no samples" + known * (status.st_size > _LARGEST_HEADER))
        told_of = (os.fspath(path), status.st_size, status.st_mtime_ns)
        # A FLAC from a pipe, in which libsndfile cannot seek, has no end.
        compressed = file.format in (*MP3_FORMATS, "OGG")
        if file.frames >= 1 << 62 or (compressed and not _told(*told_of)):
            raise BadItem(path, f"its header does not say how long it is: {rewrite}")
        _check_end(path, file, status.st_size)
        yield file


@lru_cache(1 << 16)  # A file is looked through once, not each time that it is read.
def _told(path: str, size: int, changed: int) -> bool:
    return length_is_told(path)


def _check_end(path: str | Path, file: soundfile.SoundFile, whole: int) -> None:
    """Raise BadItem for a WAV with more behind its data than in them, and no chunk there."""
    told = re.search(r"^ *data : (\d+)$", file.extra_info, re.MULTILINE)
    size = int(told[1]) if told else whole
    if file.format not in ("WAV", "WAVEX") or whole <= 2 * size + _LARGEST_HEADER:
        return
    with open(path, "rb") as raw:
        start = raw.read(1 << 16).find(b"data" + size.to_bytes(4, "little"))
        raw.seek(start + 8 + size)
        rest = raw.read(1 << 16)
    left = whole - start - 8 - size
    chunk = any(_is_chunk(rest[place:], left) for place in range(1 + size % 2))
    if start >= 0 and not chunk and any(rest):
        raise BadItem(
            path,
            f"it goes on behind the {size} bytes of its header, which was not finished: write it "
            "anew, as by ffmpeg -ignore_length 1 -i FILE FILE.wav",
        )


def _is_chunk(start: bytes, left: int) -> bool:
    """Bytes begin a chunk of a WAV, of at most so many bytes, or a tag of an MP3."""
    name, size = start[:4], int.from_bytes(start[4:8], "little")
    tag = name.startswith((b"TAG", b"APE", b"ID3"))
    return all(32 <= each < 127 for each in name) and (tag or size <= left)


def for_soundfile(path: str | Path) -> str | bytes:
    """Return a path as soundfile takes it: one whose name is not UTF-8 as bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def _unreadable(path: str | Path, error: soundfile.SoundFileError) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError as cause:
        return f"it cannot be read ({cause})"
    told = str(error).rpartition(": ")[2].rstrip(".")
    convert = "convert it, as by ffmpeg -i FILE FILE.flac"
    if "unsupported encoding" in told or "unimplemented format" in told:
        return f"its encoding is not read ({told}): {convert}"
    if start.startswith(_MAGIC):
        return f"its header is cut or broken ({told})"
    for name, pattern in _OTHERS.items():
        if pattern.match(start):
            return f"it is {name}, which is not read: {convert}"
    return f"it is not an audio file ({told}; it begins with {start[:4]!r})"
