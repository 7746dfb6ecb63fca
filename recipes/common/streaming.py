"""Enhancement of signals and files of any length, in overlapping chunks.

    enhanced = enhance_signal(noisy, network, Chunks(16384, 4096))   # (C, T), in memory
    enhance_file("in.flac", "out.flac", network, 16000, Chunks(16384, 4096))

A network sees chunks of one length, N of them at once: it takes and gives (N, T). Neighbours
overlap, and are faded into each other there, so that they join without clicks. A file is read,
resampled, enhanced, resampled back and written block by block: an hour needs no more memory than a
minute, and gets what it would get at once. Channels are enhanced one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.common.audio import (
    Forward,
    Header,
    check_count,
    check_finite,
    check_made,
    for_soundfile,
    read_header,
)
from recipes.common.command import each_of
from recipes.common.resampling import resampled
from recipes.common.writing import check_outputs, kind_for, name_for, put, written
from trainer.data import BadItem

try:
    import soundfile
except ImportError as error:
    raise ImportError(
        "reading audio needs soundfile: pip install 'cortex-speech[recipes]'"
    ) from error

Network = Callable[[Tensor], Tensor]  # (N, T) to (N, T)
Convert = Callable[[Iterable[Tensor]], Iterator[Tensor]]  # blocks (C, ·) to as many samples

BLOCK = 1 << 16  # samples of a file that are read at once


class Chunks(NamedTuple):
    """Lengths of the chunks of a signal, in samples at the rate of the network."""

    length: int
    overlap: int  # of two neighbours, at most half of the length
    at_once: int = 8  # chunks (of one channel) that the network gets together

    def check(self) -> None:
        """Raise ValueError for lengths that cannot be."""
        if not 0 <= 2 * self.overlap <= self.length or self.length < 1 or self.at_once < 1:
            raise ValueError(
                f"chunks of {self.length} samples cannot overlap by {self.overlap}: allowed is up "
                "to half of their length"
            )


def enhance_signal(signal: Tensor, network: Network, chunks: Chunks) -> Tensor:
    """A whole signal (C, T) enhanced, (C, T)."""
    return torch.cat(list(enhanced_blocks([signal], network, chunks)), dim=1)


def enhanced_blocks(blocks: Iterable[Tensor], network: Network, chunks: Chunks) -> Iterator[Tensor]:
    """A signal that comes in blocks (C, ·), enhanced; what is given is as long together.

    The result does not depend on how the signal is cut into blocks.
    """
    chunks.check()
    length, overlap, _ = chunks
    step = length - overlap
    waiting: Tensor | None = None  # (C, ·), from the start of the next chunk on
    tail: Tensor | None = None  # (C, overlap), the end of the last chunk
    for block in blocks:
        waiting = block if waiting is None else torch.cat([waiting, block], dim=1)
        while (count := (waiting.shape[1] - overlap) // step) > 0:
            count = min(count, chunks.at_once)
            used = waiting[:, : count * step + overlap]
            waiting = waiting[:, count * step :]
            for chunk in _enhanced(used.unfold(1, length, step), network):
                tail, done = _join(tail, chunk, overlap)
                yield done
    if waiting is None:
        return
    left = waiting.shape[1]
    if tail is not None and left <= overlap:
        yield tail[:, :left]
        return
    padded = torch.nn.functional.pad(waiting, (0, length - left))
    (chunk,) = _enhanced(padded[:, None], network)
    tail, done = _join(tail, chunk, overlap)
    yield torch.cat([done, tail], dim=1)[:, :left]


def _enhanced(pieces: Tensor, network: Network) -> Iterator[Tensor]:
    """Chunks (C, n, T) of a signal, enhanced, one by one: (C, T)."""
    channels, count, length = pieces.shape
    found = network(pieces.reshape(channels * count, length)).float().cpu()
    if found.shape != (channels * count, length):
        raise ValueError(
            f"the network made {tuple(found.shape)} of chunks {(channels * count, length)}; "
            "it must keep their shape"
        )
    yield from found.view(channels, count, length).unbind(1)


def _join(tail: Tensor | None, chunk: Tensor, overlap: int) -> tuple[Tensor, Tensor]:
    """Fade from the last chunk's end into this one; its end, and what comes before it."""
    if tail is not None and overlap:
        rise = (torch.arange(overlap) + 0.5) / overlap
        start = tail * (1 - rise) + chunk[:, :overlap] * rise
        chunk = torch.cat([start, chunk[:, overlap:]], dim=1)
    cut = chunk.shape[1] - overlap
    return chunk[:, cut:], chunk[:, :cut]


# -------------------------------------------------------------------------------------------- files


def enhance_file(
    source: str | Path, target: str | Path, network: Network, sample_rate: int, chunks: Chunks
) -> None:
    """Write a file enhanced, in blocks; see `convert_file`."""

    def convert(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        return enhanced_blocks(blocks, network, chunks)

    convert_file(source, target, convert, sample_rate)


def convert_file(
    source: str | Path, target: str | Path, convert: Convert, sample_rate: int
) -> None:
    """Convert a file at ``sample_rate`` (Hz), block by block; rate, length and channels stay.

    Format and depth stay as far as the suffix of ``target`` allows, see `kind_for`.
    ``target`` appears whole or not at all. Raises BadItem for a file that cannot be used.
    """
    header = read_header(source)
    kind = kind_for(Path(target), source)
    with written(Path(target), header.sample_rate, header.channels, kind) as file:
        left = header.samples
        for block in _converted(source, header, convert, sample_rate):
            block = block[:, :left]
            check_made(source, block)
            put(file, block)
            left -= block.shape[1]


def _converted(
    source: str | Path, header: Header, convert: Convert, sample_rate: int
) -> Iterator[Tensor]:
    """The file converted, at its own rate."""
    rate = header.sample_rate
    heard = resampled(_read(source, header), rate, sample_rate)
    yield from resampled(convert(heard), sample_rate, rate)


def _read(source: str | Path, header: Header) -> Iterator[Tensor]:
    """The file in blocks (C, ·). Raises BadItem for data that are cut or not finite."""
    read = 0
    with Forward(for_soundfile(source)) as file:
        while True:
            try:
                data = torch.from_numpy(file.read(BLOCK, dtype="float32", always_2d=True))
            except soundfile.SoundFileError as error:
                raise BadItem(source, f"its data are cut or broken ({error})") from error
            if not len(data):
                break
            check_finite(source, data)
            read += len(data)
            yield data.mT
        check_count(source, file, read, header.samples)


def targets(files: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """Return the target of each file that is enhanced into a folder, by its name.

    Raises ValueError where two would become one, a file would overwrite itself, or one cannot be
    written.
    """
    found: dict[str, Path] = {}
    for name in files:
        path = Path(name)
        target = Path(folder) / name_for(path)
        if target in found.values():
            other = next(each for each, its in found.items() if its == target)
            raise ValueError(f"{other} and {name} would both become {target}; give them one by one")
        if target.resolve() == path.resolve():
            raise ValueError(f"{name} would overwrite itself; choose another folder than {folder}")
        found[name] = target
    check_outputs(found.values())
    return found


def enhance_files(
    files: Sequence[str], folder: str | Path, network: Network, sample_rate: int, chunks: Chunks
) -> int:
    """Enhance files into a folder, and print where each went; 2 if one could not be used, else 0.

    A file that cannot be used is named on stderr, and the others are still enhanced. Raises
    ValueError as `targets`.
    """
    found = targets(files, folder)

    def enhance(source: str) -> None:
        with torch.inference_mode():
            enhance_file(source, found[source], network, sample_rate, chunks)
        print(f"{source}\t{found[source]}", flush=True)

    return each_of(found, enhance)
