"""Samples of a run: rows of sounds, pictures, texts and numbers that `Brain.show` records.

    brain.show("test", [
        {"id": "a-1", "text": Aligned("the cat", "a cat"), "sound": Audio(wave, 16000), "WER": 50},
    ])

A cell is a text, a number, None, or one of the classes of this module.
"""

from __future__ import annotations

import array
import io
import math
import struct
import wave
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

MAX_SECONDS = 30.0  # of a sound
MAX_TOKENS = 1000  # of a text that is aligned
MAX_LABELS = 40  # A matrix with more is a picture.
MAX_PIXELS = (160, 480)  # rows and columns of a picture
BINS = 40  # of a histogram
# Black through violet and orange to pale yellow, of equal steps in lightness (after "inferno").
COLOURS = (
    (0, 0, 4), (49, 10, 93), (120, 28, 109), (188, 55, 84), (237, 105, 37), (251, 180, 26),
    (252, 255, 164),
)  # fmt: skip
LEVELS = 64  # Shades of a picture.

Write = Callable[[str, bytes], str]  # Takes suffix and content of a file, returns its name.


def _check_tensor(owner: str, name: str, value: object) -> None:
    """Raise ValueError for a value that is no tensor, such as a NumPy array."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{owner} has {name} of type {type(value).__name__}; allowed: a tensor, as from "
            "torch.as_tensor"
        )


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound.

    Args:
        samples: (T,) or (1, T), in [-1, 1]; values beyond are clipped.
        rate: sample rate in Hz.
        spectrogram: show the spectrogram, too.

    Raises:
        ValueError: for samples that are no tensor, another shape, and a rate that is not a whole
            number above 0.
    """

    samples: Tensor
    rate: int
    spectrogram: bool = False

    def __post_init__(self) -> None:
        _check_tensor("Audio", "samples", self.samples)
        shape = list(self.samples.shape)
        if shape[:-1] not in ([], [1]) or not shape or not shape[-1]:
            raise ValueError(f"Audio has samples of shape {shape}; allowed: (T,) or (1, T), T > 0")
        if int(self.rate) != self.rate or self.rate <= 0:
            raise ValueError(f"Audio has the rate {self.rate!r}; allowed: whole numbers above 0")

    def signal(self) -> Tensor:
        """Return the first `MAX_SECONDS` (T,) on the host; 0 where a sample is not finite."""
        first = self.samples.detach().reshape(-1)[: int(MAX_SECONDS * self.rate)]
        return first.float().cpu().nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1)

    def record(self, write: Write) -> dict[str, Any]:
        """Return the cell as JSON."""
        signal, length = self.signal(), self.samples.numel()
        lost = length - int(self.samples.detach().isfinite().sum())
        found: dict[str, Any] = {
            "kind": "audio",
            "file": write(*encode(signal, int(self.rate))),
            "seconds": round(length / self.rate, 3),
            "shown": round(len(signal) / self.rate, 3),
            "not_finite": lost,
        }
        if self.spectrogram:
            found["picture"] = write(".png", spectrogram(signal, int(self.rate)).png())
        return found


@dataclass(frozen=True, eq=False)
class Image:
    """Picture of a matrix, such as a spectrogram or an attention.

    Args:
        values: (rows, columns); the first row is the lowest.
        low: value of the darkest colour; None for the smallest one.
        high: value of the lightest colour; None for the largest one.

    Raises:
        ValueError: for values that are no tensor, and another shape.
    """

    values: Tensor
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        _check_tensor("Image", "values", self.values)
        if self.values.dim() != 2 or not self.values.numel():
            shape = list(self.values.shape)
            raise ValueError(
                f"Image has values of shape {shape}; allowed: (rows, columns), both above 0"
            )

    def png(self) -> bytes:
        """Return the picture as a PNG file of at most `MAX_PIXELS`; NaN is dark."""
        values = self.values.detach().float().cpu()
        known = values[values.isfinite()]
        ends = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        low = ends[0] if self.low is None else self.low
        high = ends[1] if self.high is None else self.high
        shares = ((values - low) / (high - low or 1.0)).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
        rows, columns = map(min, shares.shape, MAX_PIXELS)
        shares = adaptive_avg_pool2d(shares.flip(0)[None], (rows, columns))[0]
        return png((shares * (LEVELS - 1)).round().to(torch.uint8))

    def record(self, write: Write) -> dict[str, Any]:
        """Return the cell as JSON, its file written."""
        return {"kind": "image", "file": write(".png", self.png())}


@dataclass(frozen=True)
class Aligned:
    """Text beside its reference, aligned word by word.

    Args:
        said: the reference; a text is split at blanks, a list is taken token by token.
        heard: the recognised text, likewise.
    """

    said: str | Sequence[str]
    heard: str | Sequence[str]

    def pairs(self) -> list[tuple[str | None, str | None]]:
        """Return the tokens side by side, with the fewest errors; None where one has none."""
        said, heard = (
            each.split() if isinstance(each, str) else [*each] for each in (self.said, self.heard)
        )
        if max(len(said), len(heard)) > MAX_TOKENS:
            return [(" ".join(said), " ".join(heard))]
        return align(said, heard)

    def record(self, write: Write) -> dict[str, Any]:
        """Return the cell as JSON."""
        return {"kind": "aligned", "pairs": self.pairs()}

    def __str__(self) -> str:
        texts = (e if isinstance(e, str) else " ".join(e) for e in (self.said, self.heard))
        return "\n".join(texts)


@dataclass(frozen=True, eq=False)
class Matrix:
    """Table of counts, such as a confusion matrix; a picture where it is large.

    Args:
        values: counts (N, N), as a tensor or lists.
        labels: names of the N rows, and of the N columns.
        rows: meaning of the rows.
        columns: meaning of the columns.

    Raises:
        ValueError: if there is not a label for each row and column.
    """

    values: Tensor | Sequence[Sequence[float]]
    labels: Sequence[str]
    rows: str = "true"
    columns: str = "predicted"

    def __post_init__(self) -> None:
        shape, count = list(torch.as_tensor(self.values).shape), len(self.labels)
        if shape != [count, count] or not count:
            raise ValueError(
                f"Matrix has values of shape {shape} and {count} labels; allowed: (N, N) and N "
                "labels, N > 0"
            )

    def image(self) -> Image:
        """Return the matrix as a picture of shares of its rows, the first row on top."""
        values = torch.as_tensor(self.values).double()
        return Image((values / values.sum(1, keepdim=True).clamp(min=1e-12)).flip(0), 0.0, 1.0)

    def record(self, write: Write) -> dict[str, Any]:
        """Return the cell as JSON."""
        if len(self.labels) > MAX_LABELS:
            note = f"{len(self.labels)} × {len(self.labels)}; {self.rows} ↓, {self.columns} →"
            return self.image().record(write) | {"note": note}
        return {
            "kind": "matrix",
            "values": torch.as_tensor(self.values).double().tolist(),
            "labels": [str(each) for each in self.labels],
            "rows": self.rows,
            "columns": self.columns,
        }


@dataclass(frozen=True, eq=False)
class Histogram:
    """Distributions over one axis, such as the scores of two classes.

    Args:
        groups: values (N,) of each group, by its name; non-finite values are left out.
        label: meaning of the values.
    """

    groups: Mapping[str, Tensor | Sequence[float]]
    label: str = "value"

    def record(self, write: Write) -> dict[str, Any]:
        """Return the cell as JSON: the share of each group in each of `BINS` bins."""
        values = {n: torch.as_tensor(each).double().cpu() for n, each in self.groups.items()}
        values = {name: each[each.isfinite()] for name, each in values.items()}
        every = torch.cat([*values.values(), torch.zeros(0)])
        low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
        high = high if high > low else low + 1.0
        shares = {
            name: (torch.histc(each, BINS, low, high) / max(1, len(each))).tolist()
            for name, each in values.items()
        }
        return {
            "kind": "histogram", "low": low, "high": high, "shares": shares, "label": self.label,
        }  # fmt: skip


CELLS = (Audio, Image, Aligned, Matrix, Histogram)
Cell = str | float | None | Audio | Image | Aligned | Matrix | Histogram


@dataclass
class Samples:
    """Rows that were shown together.

    Args:
        title: name of the set, such as "test"; a later set of that name replaces it.
        rows: for each row a mapping from names of columns to cells; the cell "id" is its heading.
        step: optimizer steps since the run began.
        epoch: current epoch; None in a test.
        note: a sentence above the rows.
    """

    title: str
    rows: Sequence[Mapping[str, Cell]]
    step: int = 0
    epoch: int | None = None
    note: str = field(default="", kw_only=True)


def record_of(cell: Any, write: Write) -> dict[str, Any]:
    """Return any cell as JSON, its files written.

    Args:
        cell: a text, a number, None, or one of the classes of this module.
        write: function that writes a file; see `Write`.
    """
    if isinstance(cell, CELLS):
        return cell.record(write)
    if hasattr(cell, "item"):  # A tensor or a number of NumPy.
        cell = cell.item()
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return {"kind": "number", "value": cell if math.isfinite(cell) else None}
    return {"kind": "text", "text": "" if cell is None else str(cell)}


def align(said: Sequence[str], heard: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Return two sequences side by side with the fewest substitutions, deletions, insertions.

    Args:
        said: tokens of the reference.
        heard: recognised tokens.

    Returns:
        Pairs of tokens; None where one of the sequences has none.
    """
    costs = [list(range(len(heard) + 1))]
    for row, token in enumerate(said, 1):
        above, line = costs[-1], [row]
        for column, other in enumerate(heard, 1):
            change = above[column - 1] + (token != other)
            line.append(min(change, above[column] + 1, line[-1] + 1))
        costs.append(line)
    pairs: list[tuple[str | None, str | None]] = []
    row, column = len(said), len(heard)
    while row or column:
        here = costs[row][column]
        changed = row and column and said[row - 1] != heard[column - 1]
        if row and column and here == costs[row - 1][column - 1] + changed:
            row, column = row - 1, column - 1
            pairs.append((said[row], heard[column]))
        elif row and here == costs[row - 1][column] + 1:
            row -= 1
            pairs.append((said[row], None))
        else:
            column -= 1
            pairs.append((None, heard[column]))
    return pairs[::-1]


def encode(signal: Tensor, rate: int) -> tuple[str, bytes]:
    """Return suffix and content of a sound file: FLAC where soundfile is installed, else WAV.

    Args:
        signal: samples (T,) in [-1, 1].
        rate: sample rate in Hz, which is kept.
    """
    file = io.BytesIO()
    try:
        import soundfile

        soundfile.write(file, _pcm(signal).numpy(), rate, format="FLAC", subtype="PCM_16")
        return ".flac", file.getvalue()
    except (ImportError, OSError, RuntimeError):  # Not installed, or a rate that FLAC cannot have.
        return ".wav", wav_bytes(signal, rate)


def wav_bytes(signal: Tensor, rate: int) -> bytes:
    """Return a 16-bit WAV file.

    Args:
        signal: samples (T,); values beyond [-1, 1] are clipped.
        rate: sample rate in Hz.
    """
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(array.array("h", _pcm(signal).tolist()).tobytes())
    return file.getvalue()


def _pcm(signal: Tensor) -> Tensor:
    """Return 16-bit samples (T,); a signal read from a 16-bit file gets its exact samples back."""
    whole = (signal.detach().cpu().float() * 32768).round()
    return whole.clamp(-32768, 32767).to(torch.int16)


def spectrogram(signal: Tensor, rate: int) -> Image:
    """Return the levels of a signal from -95 to -20 dB of full scale, in windows of 32 ms.

    Args:
        signal: samples (T,) in [-1, 1].
        rate: sample rate in Hz.
    """
    size = 2 ** max(4, round(math.log2(0.032 * rate)))
    hop = max(size // 4, math.ceil(len(signal) / MAX_PIXELS[1]))
    window = torch.hann_window(size)
    padded = pad(signal, (0, max(0, size - len(signal))))
    bins = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
    level = 20 * (2 * bins.abs() / window.sum()).clamp(min=1e-9).log10()
    return Image(level, -95.0, -20.0)


def png(levels: Tensor) -> bytes:
    """Return a PNG file of levels (rows, columns) below `LEVELS`, the first row on top."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width = levels.shape
    lines = bytes(pad(levels, (1, 0)).flatten().tolist())  # Each begins with its filter: none.
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join((
        chunk(b"IHDR", header), chunk(b"PLTE", _palette()),
        chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b""),
    ))  # fmt: skip


def _palette() -> bytes:
    ends, per = list(pairwise(COLOURS)), (LEVELS - 1) / (len(COLOURS) - 1)
    found = []
    for level in range(LEVELS):
        below = min(int(level / per), len(ends) - 1)
        share = level / per - below
        found += [round(a + share * (b - a)) for a, b in zip(*ends[below], strict=True)]
    return bytes(found)
