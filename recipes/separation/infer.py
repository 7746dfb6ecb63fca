"""Separate sound files into a track for each speaker, with a trained network.

    python recipes/separation/infer.py results/separation/demo/1234 FILE... -o FOLDER

Of ``talk.flac`` the tracks are ``talk_1.wav``, ``talk_2.wav`` … in the folder: of the rate and the
length of the file (of several channels, their mean is separated), 32-bit. All it needs is the run
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
from torchaudio.functional import resample

import trainer
from recipes.common.audio import check_made, read_audio, read_header
from recipes.common.command import each_of, file_path, local_path, told
from recipes.common.writing import Kind, check_outputs, written
from recipes.separation.mixing import fitted
from recipes.separation.objectives import best_order, pairwise_si_snr
from recipes.separation.train import Separator
from trainer import Stage

PIECE = 12.0  # seconds to separate at once
OVERLAP = 4.0  # seconds of these that the next piece has, too

Separate = Callable[[Tensor, int], Tensor]  # samples (T,) at a rate to tracks (S, T) at that rate


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
    return [folder / f"{Path(file).stem}_{n}.wav" for n in range(1, number + 1)]


def check_names(files: Sequence[str], folder: Path) -> None:
    """Check the names of the tracks.

    Raises ValueError where the tracks of two files would have the same names, and where a track
    would overwrite a file that is to be separated.
    """
    stem, number = Counter(Path(file).stem for file in files).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{number} of the files are called {stem}: their tracks would be the same")
    stems = {Path(file).stem for file in files}
    for file in map(Path, files):
        stem, gap, track = file.name.removesuffix(".wav").rpartition("_")
        if (
            gap
            and track.isdecimal()
            and stem in stems
            and file.parent.resolve() == folder.resolve()
        ):
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
        with self.brain.autocast(Stage.TEST):
            tracks = self.brain.modules.separator(mixture[None, None].to(self.brain.device))
        tracks = scaled(tracks[0].float().cpu(), mixture)
        return torch.stack(
            [fitted(each, len(signal)) for each in resample(tracks, self.rate, rate)]
        )


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
    rate = read_header(path).sample_rate
    paths: list[Path] = []
    with ExitStack() as stack:  # Not half a track, which looks like a whole one.
        files: list[soundfile.SoundFile] = []
        for tracks in joined(separate, path):
            if not files:
                paths = tracks_of(path, folder, len(tracks))
                kind = Kind("WAV", "FLOAT")
                files = [stack.enter_context(written(each, rate, 1, kind)) for each in paths]
            check_made(path, tracks)
            for file, track in zip(files, tracks, strict=True):
                file.write(track.numpy())
    return paths


def joined(separate: Separate, path: str | Path) -> Iterator[Tensor]:
    """The tracks of a file from its beginning to its end: parts (S, T), piece by piece."""
    rate = read_header(path).sample_rate
    overlap = round(OVERLAP * rate)
    held: Tensor | None = None  # the end of the last piece, which the next one has too
    for piece, last in pieces(path):
        tracks = separate(piece, rate)
        if held is not None:
            tracks = follow(held, tracks)
        if not last:
            held = tracks[:, -overlap:]
            tracks = tracks[:, :-overlap]
        yield tracks


def pieces(path: str | Path) -> Iterator[tuple[Tensor, bool]]:
    """Yield a file in pieces (T,) of ``PIECE`` seconds, each with a flag: it is the last one.

    Each but the first begins ``OVERLAP`` before the end of the one before it.
    """
    header = read_header(path)
    rate = header.sample_rate
    length, overlap, start = round(PIECE * rate), round(OVERLAP * rate), 0
    while True:
        # A rest that is no more than an overlap goes with the last piece.
        last = start + length + overlap >= header.samples
        count = header.samples - start if last else length
        piece = read_audio(path, start=start / rate, duration=count / rate, channel="mean")
        yield piece, last
        if last:
            return
        start += length - overlap


def follow(before: Tensor, tracks: Tensor) -> Tensor:
    """Tracks (S, T) in the order of those before them, (S, overlap), faded over from these."""
    overlap = before.shape[1]
    score = pairwise_si_snr(tracks[None, :, :overlap], before[None])
    # As shares of energy, from 0 to 1: in dB the one track that fits best would decide alone.
    share = (score * (math.log(10) / 10)).sigmoid()
    tracks = tracks[best_order(share).order[0]].clone()
    fade = torch.linspace(0.0, 1.0, overlap)
    tracks[:, :overlap] = fade * tracks[:, :overlap] + (1 - fade) * before
    return tracks


if __name__ == "__main__":
    sys.exit(main())
