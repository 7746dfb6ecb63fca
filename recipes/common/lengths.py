"""The length of MP3 and Ogg files, which libsndfile guesses where they do not tell it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# By the bits of a frame's header, for layer III: kbit/s of MPEG 1 and of MPEG 2 and 2.5, and Hz.
KBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
TOLD = (b"Xing", b"Info", b"VBRI")  # tags of a first frame that states the number of frames


class _Frame(NamedTuple):
    start: int
    size: int  # bytes
    kbits: int


def length_is_told(path: str | Path) -> bool:
    """Return whether the length of an MP3 or Ogg file follows from its first frame or stream.

    It does not where frames differ in bit rate and no header tells their number, nor where a header
    tells of the first of several files that were joined.
    """
    data = Path(path).read_bytes()
    if data.startswith(b"OggS"):  # Pages that begin streams are all in front, unless it was joined.
        return data.find(b"OggS\0\0", 0, max(0, data.rfind(b"OggS\0\2"))) < 0
    frames = _frames(data)
    first = next(frames, None)
    if first is None:
        return True
    if any(told in data[first.start : first.start + first.size] for told in TOLD):
        return not any(
            data[each.start + place : each.start + place + 4] in TOLD
            for each in frames
            for place in (13, 21, 36)  # Behind the side information, by version and channels.
        )
    return all(each.kbits == first.kbits for each in frames)


def _frames(data: bytes) -> Iterator[_Frame]:
    """Frames of layer III, one right behind the other; what is between them is passed over."""
    place = 0
    while (place := data.find(b"\xff", place)) >= 0:
        if (frame := _frame(data, place)) is None:
            place += 1
            continue
        after = place + frame.size
        if after == len(data) or _frame(data, after) is not None:
            yield frame
            place = after
        else:
            place += 1


def _frame(data: bytes, start: int) -> _Frame | None:
    if start + 4 > len(data) or data[start] != 0xFF or data[start + 1] & 0xE6 != 0xE2:
        return None
    version, bits = data[start + 1] >> 3 & 3, data[start + 2]
    if version == 1 or bits >> 4 in (0, 15) or bits >> 2 & 3 == 3:
        return None
    kbits = KBITS[version != 3][bits >> 4]
    samples = 144 if version == 3 else 72
    return _Frame(
        start, samples * 1000 * kbits // HZ[version][bits >> 2 & 3] + (bits >> 1 & 1), kbits
    )
