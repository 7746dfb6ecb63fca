"""Separate sound files into a track for each speaker, with a trained network.

    python recipes/separation/infer.py results/separation/demo/1234 FILE... -o FOLDER

Of ``talk.flac`` the tracks are ``talk_1.flac``, ``talk_2.flac`` … in the folder, of the rate,
length, channels, format and depth of the file (a WAV where its format is only read). Channels are
separated one by one, and a speaker is on the same track in all of them. All it needs is the run
folder. A file that cannot be read is named on stderr and the others are still separated; the exit
code is then 2.

A long file is separated in pieces that overlap. Within an overlap the tracks of two pieces are put
into the order in which they fit best, and faded over; memory holds two pieces at a time. A person
who says nothing in the whole of an overlap may change tracks there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import soundfile
import torch
from torch import Tensor

import trainer
from recipes.common.audio import check_made, read_channels, read_header
from recipes.common.command import each_of, file_path, local_path, told
from recipes.common.resampling import resample
from recipes.common.writing import check_outputs, kind_for, name_for, put, written
from recipes.separation.objectives import best_order, pairwise_si_snr
from recipes.separation.train import Separator
from trainer import Stage

PIECE = 12.0  # seconds to separate at once
OVERLAP = 4.0  # seconds of these that the next piece has, too

Separate = Callable[[Tensor, int], Tensor]  # samples (C, T) at a rate to tracks (S, C, T) at it


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run: results/separation/demo/1234")
    parser.add_argument(
        "files", nargs="+", type=file_path, metavar="FILE", help="sound files of any kind"
    )
    parser.add_argument(
        "-o", "--output", type=local_path, required=True, help="folder for the tracks"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    given = parser.parse_args(argv)

    def run() -> int:
        check_names(given.files, given.output)
        check_outputs(tracks_of(each, given.output, 1)[0] for each in given.files)
        brain = trainer.load(given.run, given.device, brain=Separator)
        number = getattr(brain.modules["separator"], "num_sources", 1)
        for each in given.files:
            check_outputs(tracks_of(each, given.output, number))
        return separate_all(Tracks(brain), given.files, given.output)

    return told(run)


def tracks_of(file: str | Path, folder: Path, number: int) -> list[Path]:
    """Return where so many tracks of a file are written."""
    name = Path(name_for(file))
    return [folder / f"{name.stem}_{n}{name.suffix}" for n in range(1, number + 1)]


def check_names(files: Sequence[str], folder: Path) -> None:
    """Check the names of the tracks.

    Raises ValueError where the tracks of two files would have the same names, and where a track
    would overwrite a file that is to be separated.
    """
    stem, number = Counter(Path(file).stem for file in files).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{number} of the files are called {stem}: their tracks would be the same")
    suffixes = {Path(file).stem: Path(name_for(file)).suffix for file in files}
    for file in map(Path, files):
        stem, gap, track = file.stem.rpartition("_")
        written_there = gap and track.isdecimal() and suffixes.get(stem) == file.suffix
        if written_there and file.parent.resolve() == folder.resolve():
            raise ValueError(
                f"a track of {stem} would overwrite {file}; choose another folder than {folder}"
            )


def separate_all(separate: Separate, files: Sequence[str], folder: Path) -> int:
    """Write the tracks of each file and print their names; gives the exit code."""

    def write(path: str) -> None:
        print(*separate_file(separate, path, folder), sep="\n", flush=True)

    return each_of(files, write)


class Tracks:
    """Separate samples with a trained network into tracks as loud as they are in the mixture."""

    def __init__(self, brain: Separator) -> None:
        self.brain, self.rate = brain, brain.hparams.sample_rate
        brain.modules.eval()

    @torch.inference_mode()
    def __call__(self, signal: Tensor, rate: int) -> Tensor:
        mixture = resample(signal, rate, self.rate)
        channels = []
        for each in mixture:
            with self.brain.autocast(Stage.TEST):
                tracks = self.brain.modules.separator(each[None, None].to(self.brain.device))
            channels.append(scaled(tracks[0].float().cpu(), each))
        made = resample(aligned(channels, mixture), self.rate, rate)
        count = signal.shape[1]
        return torch.nn.functional.pad(made[..., :count], (0, max(0, count - made.shape[-1])))


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
    """The magnitudes of short-time spectra of tracks (S, T), each as a vector of length 1."""
    window, padded = torch.hann_window(512), torch.nn.functional.pad(tracks, (256, 256))
    found = torch.stft(padded, 512, 256, window=window, center=False, return_complex=True).abs()
    return torch.nn.functional.normalize(found.flatten(1))


def scaled(tracks: Tensor, mixture: Tensor) -> Tensor:
    """Tracks (S, T) with the loudness at which their sum comes nearest to the mixture (T,).

    SI-SNR teaches no loudness, but the sources of a mixture add up to it.
    """
    own = torch.nn.functional.normalize(tracks.double(), eps=1e-9)
    # Somewhat regular, for tracks that are silent or alike.
    power = own @ own.T + 1e-6 * torch.eye(len(own), dtype=own.dtype)
    factors = torch.linalg.solve(power, own @ mixture.double())
    return (factors[:, None] * own).to(tracks.dtype)


def separate_file(separate: Separate, path: str | Path, folder: Path) -> list[Path]:
    """Write the tracks of one file; their names. Raises BadItem for a file that is not usable."""
    header = read_header(path)
    paths: list[Path] = []
    with ExitStack() as stack:  # Not half a track, which looks like a whole one.
        files: list[soundfile.SoundFile] = []
        for tracks in joined(separate, path):
            if not files:
                paths = tracks_of(path, folder, len(tracks))
                rate, channels, kind = header.sample_rate, header.channels, kind_for(paths[0], path)
                files = [stack.enter_context(written(each, rate, channels, kind)) for each in paths]
            check_made(path, tracks)
            for file, track in zip(files, tracks, strict=True):
                put(file, track)
    return paths


def joined(separate: Separate, path: str | Path) -> Iterator[Tensor]:
    """The tracks of a file from its beginning to its end: parts (S, C, T), piece by piece."""
    rate = read_header(path).sample_rate
    overlap = round(OVERLAP * rate)
    held: Tensor | None = None  # the end of the last piece, which the next one has too
    for piece, last in pieces(path):
        tracks = separate(piece, rate)
        if held is not None:
            tracks = follow(held, tracks)
        if not last:
            held = tracks[..., -overlap:]
            tracks = tracks[..., :-overlap]
        yield tracks


def pieces(path: str | Path) -> Iterator[tuple[Tensor, bool]]:
    """Yield a file in pieces (C, T) of ``PIECE`` seconds, each with a flag: it is the last one.

    Each but the first begins ``OVERLAP`` before the end of the one before it.
    """
    header = read_header(path)
    rate = header.sample_rate
    length, overlap, start = round(PIECE * rate), round(OVERLAP * rate), 0
    while True:
        # A rest that is no more than an overlap goes with the last piece.
        last = start + length + overlap >= header.samples
        count = header.samples - start if last else length
        piece, _ = read_channels(path, start / rate, count / rate)
        yield piece, last
        if last:
            return
        start += length - overlap


def follow(before: Tensor, tracks: Tensor) -> Tensor:
    """Tracks (S, C, T) in the order of those before, (S, C, overlap), and faded over from them."""
    overlap = before.shape[-1]
    score = pairwise_si_snr(tracks[..., :overlap].transpose(0, 1), before.transpose(0, 1))
    # As shares of energy, from 0 to 1: in dB the one track that fits best would decide alone.
    share = (score * (math.log(10) / 10)).sigmoid().mean(0, keepdim=True)  # over the channels
    tracks = tracks[best_order(share).order[0]].clone()
    fade = torch.linspace(0.0, 1.0, overlap)
    tracks[..., :overlap] = fade * tracks[..., :overlap] + (1 - fade) * before
    return tracks


if __name__ == "__main__":
    sys.exit(main())
