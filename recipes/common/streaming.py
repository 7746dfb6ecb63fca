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

from recipes.common.audio import check_made, read_blocks, read_header
from recipes.common.command import each_of
from recipes.common.resampling import resampled
from recipes.common.writing import check_outputs, kind_for, name_for, put, written

Network = Callable[[Tensor], Tensor]  # (N, T) to (N, T)
Convert = Callable[[Iterable[Tensor]], Iterator[Tensor]]  # blocks (C, ·) to as many samples


class Chunks(NamedTuple):
    """Lengths of the chunks of a signal, in samples at the rate of the network."""

    length: int
    overlap: int  # of two neighbours, at most half of the length
    at_once: int = 8  # chunks (of one channel) that the network gets together

    def check(self) -> None:
        """Raise ValueError for lengths that cannot be."""
        if any(type(each) is not int for each in self) or self.at_once < 1:
            raise ValueError(
                f"{self} is not of whole numbers; allowed: whole numbers, and at_once 1 or more"
            )
        if not 0 <= 2 * self.overlap <= self.length or self.length < 1:
            raise ValueError(
                f"chunks of {self.length} samples cannot overlap by {self.overlap}: allowed is up "
                "to half of their length"
            )


def enhance_signal(signal: Tensor, network: Network, chunks: Chunks) -> Tensor:
    """Return a whole signal (C, T) enhanced, (C, T)."""
    return torch.cat(list(enhanced_blocks([signal], network, chunks)), dim=1)


def enhance_signals(signals: Sequence[Tensor], network: Network, chunks: Chunks) -> list[Tensor]:
    """Return signals (C, T) of any lengths enhanced; the network gets all their chunks at once."""
    cut = [list(_cut([signal], chunks)) for signal in signals]
    parts = [pieces for groups in cut for pieces, _ in groups]
    rows = _checked(network, torch.cat([each.flatten(0, 1) for each in parts]))
    found = iter(rows.split([each.shape[0] * each.shape[1] for each in parts]))
    made = []
    for groups in cut:
        enhanced = [(next(found).view_as(pieces).unbind(1), left) for pieces, left in groups]
        made.append(torch.cat(list(_joined(enhanced, chunks.overlap)), dim=1))
    return made


def enhanced_blocks(blocks: Iterable[Tensor], network: Network, chunks: Chunks) -> Iterator[Tensor]:
    """Yield a signal that comes in blocks (C, ·) enhanced, in blocks of other lengths.

    Together they have as many samples as came in, whose values do not depend on the lengths of the
    blocks.
    """
    cut = _cut(blocks, chunks)
    return _joined(((_enhanced(pieces, network), left) for pieces, left in cut), chunks.overlap)


def _cut(blocks: Iterable[Tensor], chunks: Chunks) -> Iterator[tuple[Tensor, int | None]]:
    """Yield the chunks (C, n, length) that are complete, up to ``at_once`` of them.

    With the last group, of one padded chunk or none, comes the number of samples that are left from
    where it begins, or where the last overlap does.
    """
    chunks.check()
    length, overlap, _ = chunks
    step = length - overlap
    held: list[Tensor] = []  # blocks (C, ·) from the start of the next chunk on
    left = 0  # samples in them
    started = False
    for block in blocks:
        held.append(block)
        left += block.shape[1]
        if left < length:
            continue
        waiting = torch.cat(held, dim=1)
        while (count := (waiting.shape[1] - overlap) // step) > 0:
            count = min(count, chunks.at_once)
            used = waiting[:, : count * step + overlap]
            waiting = waiting[:, count * step :]
            started = True
            yield used.unfold(1, length, step), None
        held, left = [waiting], waiting.shape[1]
    if held:
        padded = torch.nn.functional.pad(torch.cat(held, dim=1), (0, length - left))[:, None]
        yield padded[:, : 0 if started and left <= overlap else 1], left


def _joined(
    groups: Iterable[tuple[Iterable[Tensor], int | None]], overlap: int
) -> Iterator[Tensor]:
    """Yield enhanced chunks (C, length), in groups as `_cut` gives them, faded into each other."""
    tail: Tensor | None = None  # (C, overlap), the end of the last chunk
    for group, left in groups:
        made = []
        for chunk in group:
            tail, start = _join(tail, chunk, overlap)
            made.append(start)
            if left is None:
                yield made.pop()
        if left is not None and tail is not None:
            yield torch.cat([*made, tail], dim=1)[:, :left]


def _enhanced(pieces: Tensor, network: Network) -> Iterator[Tensor]:
    """Chunks (C, n, T) of a signal, enhanced, one by one: (C, T)."""
    if pieces.shape[1]:
        yield from _checked(network, pieces.flatten(0, 1)).view_as(pieces).unbind(1)


def _checked(network: Network, chunks: Tensor) -> Tensor:
    """Chunks (N, T) through the network, on the CPU."""
    found = network(chunks).float().cpu()
    if found.shape != chunks.shape:
        raise ValueError(
            f"the network made {tuple(found.shape)} of chunks {tuple(chunks.shape)}; "
            "it must keep their shape"
        )
    return found


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
        blocks = read_blocks(source)
        for block in converted(blocks, header.sample_rate, convert, sample_rate):
            check_made(source, block)
            put(file, block)


def converted(
    blocks: Iterable[Tensor], rate: int, convert: Convert, own_rate: int
) -> Iterator[Tensor]:
    """Convert a signal at ``rate`` by what works at another one: as many samples come out."""
    given = made = 0

    def counted() -> Iterator[Tensor]:
        nonlocal given
        for block in blocks:
            given += block.shape[1]
            yield block

    heard = resampled(counted(), rate, own_rate)
    for block in resampled(convert(heard), own_rate, rate):
        block = block[:, : given - made]
        made += block.shape[1]
        yield block


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
