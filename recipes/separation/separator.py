"""Separation with a trained network.

    model = trainer.load("results/separation/demo/1234")
    for number, track in enumerate(model.separate("talk.wav"), 1):
        track.save(f"talk_{number}.wav")

A long sound is separated in pieces that overlap. Within an overlap the tracks of two pieces are put
into the order in which they fit best, and faded over. A person who says nothing in the whole of an
overlap may change tracks there.

Shapes: S tracks, C channels, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn

from recipes.common.audio import check_made
from recipes.common.hearing import Given, One, Several, Source, as_rate, given_sounds
from recipes.common.resampling import resample
from recipes.separation.objectives import best_order, pairwise_si_snr
from trainer.inference.model import Model
from trainer.inference.results import Sound
from trainer.options import RunOptions

if TYPE_CHECKING:
    from trainer.inference.graphs import Graph

PIECE = 12.0  # seconds to separate at once
OVERLAP = 4.0  # seconds of these that the next piece has, too

Separate = Callable[[Tensor, int], Tensor]  # samples (C, T) at a rate to tracks (S, C, T) at it


class SpeechSeparator(Model):
    """Speech separation: a track for each of several people who talk at once.

    Reads from the YAML ``sample_rate``.
    """

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"max_key": "si_snri"}
    uses: ClassVar[Sequence[str]] = ("separator",)

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        self.sample_rate = as_rate(self.hparams.sample_rate)
        self.num_sources: int = getattr(self.modules["separator"], "num_sources", 1)

    @overload
    def separate(self, sounds: One, rate: int | None = None) -> list[Sound]: ...

    @overload
    def separate(self, sounds: Several, rate: int | None = None) -> list[list[Sound]]: ...

    def separate(self, sounds: Given, rate: int | None = None) -> list[Sound] | list[list[Sound]]:
        """Separate the people who talk in a sound, or in each sound of a list.

        Sounds of any rate, length and number of channels. Channels are separated one by one, and a
        person is on the same track in all of them. The sounds of a list are separated one by one,
        too: the networks normalise over time, so that padding would change the tracks.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Returns:
            The tracks (C, T), as loud as they are in the sound, of its rate, length and channels,
            in no order that has a meaning; a list of these for a list.

        Raises:
            BadItem: a file cannot be used, or the network makes no finite numbers of a sound.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        headers = [source.header for source in sources]  # Read before the work.
        found = []
        for source, header in zip(sources, headers, strict=True):
            tracks = torch.cat(list(joined(self.tracks, source)), dim=-1)
            check_made(source.name, tracks)
            found.append([Sound(track, header.sample_rate) for track in tracks.unbind()])
        return found if several else found[0]

    def tracks(self, signal: Tensor, rate: int) -> Tensor:
        """Return the tracks of a sound, all of it separated at once.

        Args:
            signal: samples (C, T).
            rate: sample rate in Hz.

        Returns:
            Samples (S, C, T) of S tracks, at the same rate.
        """
        mixture = resample(signal, rate, self.sample_rate)
        channels = []
        for each in mixture:
            with torch.inference_mode(), self.autocast():
                tracks = self.modules.separator(each[None, None].to(self.device))
            channels.append(scaled(tracks[0].float().cpu(), each))
        made = resample(aligned(channels, mixture), self.sample_rate, rate)
        count = signal.shape[1]
        return nn.functional.pad(made[..., :count], (0, max(0, count - made.shape[-1])))

    def graph(self, modules: nn.ModuleDict) -> Graph:
        """Return the network that `trainer.export` writes for other programs."""
        from recipes.separation.graph import graph

        return graph(modules, self.hparams)


def aligned(channels: Sequence[Tensor], mixture: Tensor) -> Tensor:
    """Put the tracks of each channel, (S, T), into the order of the loudest channel's.

    Tracks of one speaker are those whose spectra are alike in magnitude: microphones some way apart
    hear the same sound at different times.

    Args:
        channels: the tracks of each channel.
        mixture: what they are of, (C, T).

    Returns:
        Tracks (S, C, T).
    """
    spectra = [spectrum(each) for each in channels]
    loudest = spectra[int(mixture.square().sum(1).argmax())]
    orders = [best_order((each @ loudest.T)[None]).order[0] for each in spectra]
    return torch.stack([each[order] for each, order in zip(channels, orders, strict=True)], 1)


def spectrum(tracks: Tensor) -> Tensor:
    """Return the magnitudes of the spectrograms of tracks (S, T), as unit vectors (S, D)."""
    window, padded = torch.hann_window(512), nn.functional.pad(tracks, (256, 256))
    found = torch.stft(padded, 512, 256, window=window, center=False, return_complex=True).abs()
    return torch.nn.functional.normalize(found.flatten(1))


def scaled(tracks: Tensor, mixture: Tensor) -> Tensor:
    """Return tracks (S, T) scaled so that their sum comes nearest to the mixture (T,).

    The networks do not learn loudness, which SI-SNR ignores, but the sources of a mixture add up.
    """
    own = torch.nn.functional.normalize(tracks.double(), eps=1e-9)
    # Regularised, since tracks may be silent or equal.
    power = own @ own.T + 1e-6 * torch.eye(len(own), dtype=own.dtype)
    factors = torch.linalg.solve(power, own @ mixture.double())
    return (factors[:, None] * own).to(tracks.dtype)


def joined(separate: Separate, source: Source) -> Iterator[Tensor]:
    """Yield the tracks of a sound from its beginning to its end, in parts (S, C, T)."""
    rate = source.header.sample_rate
    overlap = round(OVERLAP * rate)
    held: Tensor | None = None  # the end of the last piece, which the next one has too
    for piece, last in pieces(source):
        tracks = separate(piece, rate)
        if held is not None:
            tracks = follow(held, tracks)
        if not last:
            held = tracks[..., -overlap:]
            tracks = tracks[..., :-overlap]
        yield tracks


def pieces(source: Source) -> Iterator[tuple[Tensor, bool]]:
    """Yield a sound in pieces (C, T) of ``PIECE`` seconds, each with a flag: it is the last one.

    Each but the first begins ``OVERLAP`` before the end of the one before it.
    """
    total, rate = source.header.samples, source.header.sample_rate
    length, overlap, start = round(PIECE * rate), round(OVERLAP * rate), 0
    while True:
        # A rest that is no more than an overlap goes with the last piece.
        last = start + length + overlap >= total
        yield source.read(rate, "all", start, None if last else length), last
        if last:
            return
        start += length - overlap


def follow(before: Tensor, tracks: Tensor) -> Tensor:
    """Return tracks (S, C, T) in the order of those before, (S, C, overlap), faded in from them."""
    overlap = before.shape[-1]
    score = pairwise_si_snr(tracks[..., :overlap].transpose(0, 1), before.transpose(0, 1))
    # As shares of energy, from 0 to 1: in dB the one track that fits best would decide alone.
    share = (score * (math.log(10) / 10)).sigmoid().mean(0, keepdim=True)  # over the channels
    tracks = tracks[best_order(share).order[0]].clone()
    fade = torch.linspace(0.0, 1.0, overlap)
    tracks[..., :overlap] = fade * tracks[..., :overlap] + (1 - fade) * before
    return tracks
