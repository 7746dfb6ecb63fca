"""Resynthesise sound files, or turn mel files into sound, with a trained vocoder.

    python recipes/hifigan/infer.py results/hifigan/demo/1234 FILE... -o FOLDER

A sound file of any rate, length and number of channels becomes the sound that the vocoder makes of
its mels, of the same rate, length and channels. A mel file (`.npy` or `.pt`, see
`recipes.common.mel`) becomes a WAV. Files are read, made and written piece by piece: an hour needs
no more memory than a minute, and every piece is what it would be in the whole. All that is needed
is the run folder. Prints a line ``file<TAB>result`` for each; a file that cannot be used is named
on stderr and the others are still made; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from recipes.common.mel import read_mel
from recipes.common.streaming import convert_file, targets
from recipes.common.vocoder import CHUNK, Vocoder, load_vocoder

MELS = (".npy", ".pt")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, such as results/hifigan/demo/1234")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound files, or mels (.npy, .pt)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    given = parser.parse_args(argv)
    try:
        vocoder = load_vocoder(given.run, given.device)
        return vocode_all(vocoder, given.files, given.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def vocode_all(vocoder: Vocoder, files: Sequence[str], folder: Path) -> int:
    """Make the sound of each file in a folder; 2 if one could not be used."""
    failed = False
    for source, target in targets(files, folder).items():
        try:
            vocode(vocoder, source, target)
        except ValueError as bad:
            print(f"error: {bad}", file=sys.stderr)
            failed = True
        else:
            print(f"{source}\t{target}", flush=True)
    return 2 if failed else 0


def vocode(vocoder: Vocoder, source: str | Path, target: Path) -> None:
    """Write what the vocoder makes of a sound or of a mel file.

    Raises ValueError for a file that cannot be used.
    """
    if Path(source).suffix.lower() in MELS:
        _speak_mel(vocoder, source, target)
    else:
        with torch.inference_mode():
            convert_file(source, target, vocoder.resynthesise, vocoder.sample_rate)


def _speak_mel(vocoder: Vocoder, source: str | Path, target: Path) -> None:
    """A mel file as a 16-bit WAV, which appears whole or not at all."""
    mel, config = read_mel(source)
    vocoder.mel.check(source, config)
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with soundfile.SoundFile(
            part, "w", vocoder.sample_rate, channels=1, subtype="PCM_16", format="WAV"
        ) as file:
            for wave in vocoder.stream(_pieces(source, mel)):
                file.write(wave.numpy())
        os.replace(part, target)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def _pieces(source: str | Path, mel: Tensor) -> Iterator[Tensor]:
    """A mel (M, F) in pieces. Raises ValueError for one that holds something else than numbers."""
    for piece in mel.split(CHUNK, dim=1):
        if not torch.isfinite(piece).all():
            raise ValueError(f"{source}: its mel has values that are not finite numbers")
        yield piece.float()


if __name__ == "__main__":
    sys.exit(main())
