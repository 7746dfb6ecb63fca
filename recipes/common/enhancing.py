"""The command line of recipes that enhance sound files: what their ``infer.py`` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.common.run_folder import Trained, load_brain
from recipes.common.streaming import Network, enhance_files


def enhance(
    argv: Sequence[str] | None,
    about: str,
    kind: type[Trained],
    parts: Callable[[Trained], tuple[Network, str | None]],
) -> int:
    """Enhance the files that a command line names, ``RUN FILE... -o FOLDER``; the exit code.

    ``about`` says what the command is for, ``kind`` is what was trained, and ``parts`` gives its
    network and the metric that chooses its weights. Reads ``sample_rate`` and ``chunks`` from the
    run's YAML.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run: results/<task>/demo/1234")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound files of any kind")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="for what comes out"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    given = parser.parse_args(argv)
    try:
        brain = load_brain(kind, given.run, given.device)
        own = brain.hparams
        network, best = parts(brain)
        with brain.best_weights(max_key=best):
            return enhance_files(given.files, given.output, network, own.sample_rate, own.chunks)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
