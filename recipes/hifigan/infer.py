"""Resynthesise sound files, or turn mel files into sound, with a trained vocoder.

    python recipes/hifigan/infer.py results/hifigan/demo/1234 FILE... -o FOLDER

A sound file of any rate, length and number of channels becomes the sound that the vocoder makes of
its mels, of the same rate, length, channels, format and depth. A mel file (`.npy` or `.pt`, see
`recipes.common.mel`) becomes a WAV. Files are read, made and written piece by piece: an hour needs
no more memory than a minute, and every piece is what it would be in the whole. All that is needed
is the run folder. Prints a line ``file<TAB>result`` for each. A file that cannot be used is named
on stderr and the others are still made; the exit code is then 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import trainer
from recipes.common.audio import check_made
from recipes.common.command import arguments, each_of, told
from recipes.common.streaming import convert_file, targets
from recipes.common.writing import kind_for, written
from recipes.hifigan.vocoder import MELS, Vocoder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    files = "sound files, or mels (.npy, .pt)"
    parser = arguments(__doc__ or "", "hifigan", files, output="folder for the results")
    given = parser.parse_args(argv)

    def run() -> int:
        found = targets(given.files, given.output)
        model = trainer.load(given.run, given.device, model=Vocoder)

        def make(source: str) -> None:
            vocode(model, source, found[source])
            print(f"{source}\t{found[source]}", flush=True)

        return each_of(found, make)

    return told(run)


def vocode(model: Vocoder, source: str, target: Path) -> None:
    """Write what a vocoder makes of a sound, or of a mel file as a 16-bit file.

    Raises ValueError for a file that cannot be used.
    """
    if Path(source).suffix.lower() in MELS:
        mel = model.read_mel(source)
        with written(target, model.sample_rate, 1, kind_for(target)) as file:
            for wave in model.vocode_stream(mel):
                check_made(source, wave)
                file.write(wave.numpy())
    else:
        with torch.inference_mode():
            convert_file(source, target, model.resynthesise_stream, model.sample_rate)


if __name__ == "__main__":
    sys.exit(main())
