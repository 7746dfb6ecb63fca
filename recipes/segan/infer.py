"""Enhance sound files with a trained SEGAN.

    python recipes/segan/infer.py results/segan/demo/1234 FILE... -o FOLDER

Writes each file enhanced into FOLDER, under its own name, of its own rate, length, channels, format
and depth (a WAV where its format is only read), and prints a line ``file<TAB>enhanced file`` for
each. Files may be of any length: they are read and written in blocks. All it needs is the run
folder, of whose checkpoints it takes the one that the test took. A file that cannot be read is
named on stderr and the others are still enhanced; the exit code is then 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common import enhancing
from recipes.segan.enhancer import SEGAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    return enhancing.main(argv, __doc__ or "", SEGAN)


if __name__ == "__main__":
    sys.exit(main())
