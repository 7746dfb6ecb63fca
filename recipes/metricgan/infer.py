"""Enhance sound files with a trained MetricGAN+.

    python recipes/metricgan/infer.py results/metricgan/demo/1234 FILE... -o FOLDER

Writes each file enhanced into FOLDER, under its own name, of its own rate, length and channels, and
prints a line ``file<TAB>enhanced file`` for each. Files may be of any length: they are read,
enhanced and written in chunks that fade into each other (``chunks`` in the YAML). The network looks
both ways, so that a chunk's ends know less than its middle: that is what the overlap is for. All it
needs is the run folder, of whose checkpoints it takes the one that the test took. A file that
cannot be read is named on stderr and the others are still enhanced; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.common.streaming import enhance_files
from recipes.metricgan.train import Enhancer
from trainer.hparams import load_hparams
from trainer.testing import best_weights


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, as results/metricgan/demo/1234")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound files of any kind")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="for what comes out"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    given = parser.parse_args(argv)
    try:
        brain = load(given.run, given.device)
        own = brain.hparams
        with best_weights(brain, brain.best, None):
            return enhance_files(
                given.files, given.output, brain.network, own.sample_rate, own.chunks
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load(run: Path, device: str = "auto") -> Enhancer:
    """The enhancer of a run folder, wherever that lies now; its weights are still to be read.

    Raises ValueError for a folder that is no run's.
    """
    file = run / "hyperparams.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is no run folder: it has no hyperparams.yaml")
    hparams = load_hparams(file, {"output_folder": str(run), "device": device})
    return Enhancer(hparams["modules"], hparams=hparams, checkpointer=hparams["checkpointer"])


if __name__ == "__main__":
    sys.exit(main())
