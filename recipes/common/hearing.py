"""Inputs of models: sound files, arrays, tensors and `Sound` objects, one or several.

    sounds, several = given_sounds(["a.wav", "b.flac"])
    sounds, several = given_sounds(array, rate=44100)
    signal = sounds[0].read(16000, channel="mean")  # (T,)

Shapes: C channels, T samples. Rates are in Hz.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from recipes.common.audio import (
    BLOCK,
    Header,
    check_finite,
    read_blocks,
    read_channels,
    read_header,
)
from recipes.common.resampling import resample
from trainer.inference.results import Sound

Samples: TypeAlias = "Tensor | np.ndarray[Any, Any]"
One: TypeAlias = "str | os.PathLike[str] | Sound | Samples"
Several: TypeAlias = "list[Any] | tuple[Any, ...]"  # of One
Given: TypeAlias = "One | Several"  # as the methods of models take it

LONGEST = 20.0  # seconds to recognise at once, about the longest that were trained on
SEARCHED = 4.0  # seconds at the end of these, in which a longer file is cut where it is quiet


@dataclass(frozen=True)
class Source:
    """Sound that was given to a model: a file, read only when its samples are needed, or samples.

    Attributes:
        name: the path, or "the sound" or "sound 3", for messages.
        held: samples (C, T) and their rate in Hz; None for a file.
    """

    name: str
    held: Sound | None = None

    @cached_property
    def header(self) -> Header:
        """Length, rate and channels. Raises BadItem for a file that cannot be used."""
        if self.held is None:
            return read_header(self.name)
        channels, length = self.held.samples.shape
        return Header(length, self.held.rate, channels)

    def read(
        self, rate: int, channel: str = "mean", start: int = 0, count: int | None = None
    ) -> Tensor:
        """Read the samples of the sound, or a part of them, at a rate.

        Args:
            rate: wanted rate, in Hz.
            channel: "mean" for the mean of the channels, (T,); "all" for all of them, (C, T).
            start: first sample to read, at the rate of the sound itself.
            count: number of samples to read, at that rate; None for all that follow.

        Returns:
            Samples (T,) or (C, T), float32, by ``channel``.

        Raises:
            BadItem: a file cannot be used.
        """
        header = self.header
        count = header.samples - start if count is None else count
        if self.held is None:
            seconds = start / header.sample_rate, count / header.sample_rate
            samples, _ = read_channels(self.name, *seconds)
        else:
            samples = self.held.samples[:, start : start + count]
        if channel == "mean":
            samples = samples.mean(0)
        return (
            resample(samples, header.sample_rate, rate) if header.sample_rate != rate else samples
        )

    def blocks(self, size: int = BLOCK) -> Iterator[Tensor]:
        """Yield all samples at their own rate in blocks (C, ·). Raises BadItem."""
        if self.held is None:
            yield from read_blocks(self.name, size)
        else:
            yield from self.held.samples.split(size, dim=1)


def given_sounds(given: Given, rate: int | None = None) -> tuple[list[Source], bool]:
    """Return the sounds that a method of a model was called with.

    Args:
        given: a path, a `Sound`, samples (T,) or (C, T) as a tensor or an array of NumPy; or a
            list or tuple of these. Integers are taken as fractions of their type's range.
        rate: rate of all samples, in Hz; files and `Sound` objects have their own.

    Returns:
        The sounds, and True if a list or tuple was given.

    Raises:
        ValueError: samples without a rate, of another shape, empty, or not finite.
        TypeError: something else was given.
    """
    several = isinstance(given, list | tuple)
    each: Sequence[One] = given if several else [given]  # type: ignore[list-item, assignment]
    if rate is not None:
        rate = as_rate(rate)
    sounds = [
        _source(sound, rate, f"sound {number}" if several else "the sound")
        for number, sound in enumerate(each, 1)
    ]
    return sounds, several


def read_sound(sound: One, rate: int | None = None, *, at: int) -> Tensor:
    """Return the samples (T,) of one sound, the mean of its channels.

    Args:
        sound: as in `given_sounds`, but not several.
        rate: rate of samples that are given, in Hz.
        at: wanted rate, in Hz.

    Raises:
        BadItem: a file cannot be used.
        ValueError: samples without a rate, of another shape, empty, or not finite.
        TypeError: something else was given.
    """
    if isinstance(sound, list | tuple):
        given = f"a {type(sound).__name__} of {len(sound)}"
        raise TypeError(f"this method takes one sound, not {given}: call it for each")
    return _source(sound, rate, "the sound").read(at)


def _source(sound: One, rate: int | None, name: str) -> Source:
    if isinstance(sound, str | os.PathLike):
        path = os.path.expanduser(os.fsdecode(sound))
        if not path:
            raise ValueError(f"{name} is an empty path; allowed: the path of a sound file")
        return Source(path)
    told = isinstance(sound, Sound)  # which of its dimensions are channels
    if isinstance(sound, Sound):
        rate, sound = sound.rate, sound.samples
    if rate is not None:
        rate = as_rate(rate)
    if not isinstance(sound, Tensor | np.ndarray):
        several = "" if isinstance(sound, list | tuple) else ", or a list of these"
        raise TypeError(
            f"{name} is a {type(sound).__name__}; allowed: a path, a tensor or array of samples "
            f"with their rate, a Sound{several}"
        )
    if rate is None:
        raise ValueError(f"{name} has samples without a rate: give rate=… in Hz, such as 16000")
    samples = as_samples(sound, name)
    if not samples.numel():
        raise ValueError(f"{name} has the shape {tuple(sound.shape)}; allowed: at least one sample")
    if not told and samples.shape[0] > max(1, samples.shape[1]):
        raise ValueError(
            f"{name} has {samples.shape[0]} channels of {samples.shape[1]} samples; allowed: "
            "(C, T), channels first: transpose what soundfile reads"
        )
    return Source(name, Sound(samples, rate))


def as_rate(rate: float) -> int:
    """Return a sample rate in Hz. Raises ValueError for what is no whole number above 0."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 1 <= rate < 1 << 31 or rate % 1:
        raise ValueError(f"rate is {rate!r}; allowed: a whole number of samples a second, in Hz")
    return int(rate)


def as_samples(sound: Samples, name: str) -> Tensor:
    """Return samples (T,) or (C, T) as (C, T), float32 on the CPU; there may be none of them.

    Args:
        sound: the samples. Integers are taken as fractions of their type's range.
        name: what to call them in messages.

    Raises:
        ValueError: they have another shape, or are no finite real numbers.
        TypeError: it is no tensor or array.
    """
    samples = as_tensor(sound, name)
    if samples.ndim not in (1, 2) or samples.shape[0] < samples.ndim - 1:
        raise ValueError(
            f"{name} has the shape {tuple(samples.shape)}; allowed: samples (T,), or channels and "
            "samples (C, T)"
        )
    if samples.is_complex() or samples.dtype is torch.bool:
        raise ValueError(f"{name} has values of {samples.dtype}; allowed: real numbers")
    if not samples.is_floating_point():
        limits = torch.iinfo(samples.dtype)
        middle = (limits.max + limits.min + 1) / 2  # 128 of unsigned bytes, else 0
        samples = (samples.double() - middle) / ((limits.max - limits.min + 1) / 2)
    samples = samples.float() if samples.ndim == 2 else samples.float()[None]
    check_finite(name, samples)
    return samples


def as_tensor(given: Samples, name: str) -> Tensor:
    """Return a tensor or an array as a dense tensor on the CPU, without its gradient.

    Args:
        given: the tensor or array.
        name: what to call it in messages.

    Raises:
        ValueError: it has no numbers, or not all of them.
        TypeError: it is no tensor or array.
    """
    if not isinstance(given, Tensor | np.ndarray):
        kind = type(given).__name__
        raise TypeError(f"{name} is a {kind}; allowed: a tensor or array of numbers")
    if isinstance(given, np.ndarray):
        if np.ma.is_masked(given):
            raise ValueError(f"{name} has masked values; allowed: an array without a mask")
        try:  # Copied: of any byte order and strides, and read-only.
            given = torch.from_numpy(given.astype(given.dtype.newbyteorder("=")))
        except TypeError:
            raise ValueError(f"{name} has values of {given.dtype}; allowed: real numbers") from None
    special = given.is_nested or given.is_quantized or given.layout != torch.strided
    if given.is_meta or special:
        kind = "without content" if given.is_meta else "nested, quantized or sparse"
        raise ValueError(f"{name} is a tensor that is {kind}; allowed: a dense one")
    return given.detach().cpu()


# ------------------------------------------------------------------------------------------ pieces


class Piece(NamedTuple):
    """A part of a sound.

    Attributes:
        source: number of the sound among those given, from 0.
        start: its first sample in seconds from the start of the sound.
        signal: samples (S,) at the rate of the model.
    """

    source: int
    start: float
    signal: Tensor


def pieces(sounds: Iterable[Source], rate: int, longest: float = LONGEST) -> Iterator[Piece]:
    """Yield the mean of the channels of sounds in order, in pieces that are cut in quiet places.

    Args:
        sounds: the sounds; each is read piece by piece.
        rate: wanted rate, in Hz.
        longest: seconds of a piece, at most.

    Raises:
        BadItem: a file cannot be used.
    """
    for number, sound in enumerate(sounds):
        length, own, first = sound.header.samples, sound.header.sample_rate, 0
        while first < length:
            count = min(round(longest * own), length - first)
            piece = sound.read(own, "mean", first, count)
            if first + count < length:
                piece = piece[: quietest(piece, own)]
            signal = resample(piece, own, rate) if own != rate else piece
            yield Piece(number, first / own, signal)
            first += len(piece)


def quietest(signal: Tensor, rate: int) -> int:
    """Return where to cut samples: in the middle of the quietest tenth of a second near their end.

    Args:
        signal: samples (T,), at least 0.2 s of them.
        rate: sample rate, in Hz.

    Returns:
        Number of the sample, within the last ``SEARCHED`` seconds, or the last half if that is
        shorter.
    """
    window = round(0.1 * rate)
    start = max(len(signal) // 2, len(signal) - round(SEARCHED * rate))
    power = signal[start:].unfold(0, window, 1 + window // 4).square().mean(-1)
    return start + int(power.argmin()) * (1 + window // 4) + window // 2


def batched(
    parts: Iterable[Piece], most: int, shortest: int = 0, padded: bool = True
) -> Iterator[list[Piece]]:
    """Yield pieces in batches, in order, of at most so many samples with their padding.

    A piece that is longer makes a batch of its own.

    Args:
        parts: the pieces.
        most: samples of a batch.
        shortest: samples that each piece is padded to, at least.
        padded: False for batches of pieces of one length.
    """
    batch: list[Piece] = []
    for part in parts:
        lengths = {len(each.signal) for each in [*batch, part]}
        full = max(shortest, *lengths) * (len(batch) + 1) > most
        if batch and (full or (len(lengths) > 1 and not padded)):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch
