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

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import soundfile

import trainer
from recipes.common.audio import check_made, read_header
from recipes.common.command import arguments, each_of, told
from recipes.common.hearing import Source
from recipes.common.writing import check_outputs, kind_for, name_for, put, written
from recipes.separation.separator import Separate, SpeechSeparator, joined


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = arguments(__doc__ or "", "separation", output="folder for the tracks")
    given = parser.parse_args(argv)

    def run() -> int:
        check_names(given.files, given.output)
        check_outputs(tracks_of(each, given.output, 1)[0] for each in given.files)
        model = trainer.load(given.run, given.device, model=SpeechSeparator)
        for each in given.files:
            check_outputs(tracks_of(each, given.output, model.num_sources))
        return separate_all(model.tracks, given.files, given.output)

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
    """Write the tracks of each file, print their names, and return the exit code."""

    def write(path: str) -> None:
        print(*separate_file(separate, path, folder), sep="\n", flush=True)

    return each_of(files, write)


def separate_file(separate: Separate, path: str | Path, folder: Path) -> list[Path]:
    """Write the tracks of one file, and return their paths. Raises BadItem for an unusable file."""
    header = read_header(path)
    paths: list[Path] = []
    with ExitStack() as stack:  # Not half a track, which looks like a whole one.
        files: list[soundfile.SoundFile] = []
        for tracks in joined(separate, Source(str(path))):
            if not files:
                paths = tracks_of(path, folder, len(tracks))
                rate, channels, kind = header.sample_rate, header.channels, kind_for(paths[0], path)
                files = [stack.enter_context(written(each, rate, channels, kind)) for each in paths]
            check_made(path, tracks)
            for file, track in zip(files, tracks, strict=True):
                put(file, track)
    return paths


if __name__ == "__main__":
    sys.exit(main())
