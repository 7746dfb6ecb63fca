"""The command line of recipes that enhance sound files: what their ``infer.py`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import trainer
from recipes.common.command import file_path, told
from recipes.common.streaming import Network, enhance_files, targets
from trainer import Brain

Trained = TypeVar("Trained", bound=Brain)


def enhance(
    argv: Sequence[str] | None,
    about: str,
    kind: type[Trained],
    network: Callable[[Trained], Network],
) -> int:
    """Enhance the files that a command line names, ``RUN FILE... -o FOLDER``; the exit code.

    ``about`` says what the command is for, ``kind`` is what was trained, and ``network`` gives what
    enhances of it. Reads ``sample_rate`` and ``chunks`` from the run's YAML.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run: results/<task>/demo/1234")
    parser.add_argument(
        "files", nargs="+", type=file_path, metavar="FILE", help="sound files of any kind"
    )
    parser.add_argument(
        "-o", "--output", type=file_path, required=True, metavar="FOLDER", help="for what comes out"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    given = parser.parse_args(argv)

    def run() -> int:
        targets(given.files, given.output)  # Which refuses what cannot be written, before the work.
        brain = trainer.load(given.run, given.device, brain=kind)
        rate, chunks = brain.hparams.sample_rate, brain.hparams.chunks
        return enhance_files(given.files, given.output, network(brain), rate, chunks)

    return told(run)
