"""Enhance sound files with a trained MetricGAN+.

    python recipes/metricgan/infer.py results/metricgan/demo/1234 FILE... -o FOLDER

Writes each file enhanced into FOLDER, under its own name, of its own rate, length, channels, format
and depth (a WAV where its format is only read), and prints a line ``file<TAB>enhanced file`` for
each. Files may be of any length: they are read, enhanced and written in chunks that fade into each
other (``chunks`` in the YAML). The network looks both ways, so that a chunk's ends know less than
its middle: that is what the overlap is for. All it needs is the run folder, of whose checkpoints it
takes the one that the test took. A file that cannot be read is named on stderr and the others are
still enhanced; the exit code is then 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common import enhancing
from recipes.metricgan.enhancer import MetricGAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    return enhancing.main(argv, __doc__ or "", MetricGAN)


if __name__ == "__main__":
    sys.exit(main())
