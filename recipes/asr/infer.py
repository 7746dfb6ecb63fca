"""Transcribe sound files with a trained recogniser.

    python recipes/asr/infer.py results/asr/demo/1234 FILE...

Prints a line ``path<TAB>text`` for each file, of any rate, length and number of channels. All it
needs is the run folder: its hyperparams.yaml and its checkpoints, of which it takes those that the
test took. A file that cannot be read is named on stderr and the others are still transcribed; the
exit code is then 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import trainer
from recipes.asr.transcriber import Transcriber
from recipes.common.command import arguments, each_of, told


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    parser = arguments(__doc__ or "", "asr")
    parser.add_argument("--decoder", choices=("greedy", "beam"), help="default: the run's")
    given = parser.parse_args(argv)
    return told(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    """Print the transcript of each file, and return the exit code."""
    decoder = {"decoder": given.decoder} if given.decoder else {}
    model = trainer.load(given.run, given.device, model=Transcriber, overrides=decoder)
    return each_of(given.files, lambda path: print(f"{path}\t{model.transcribe(path)}", flush=True))


if __name__ == "__main__":
    sys.exit(main())
