"""`cortex export RUN [OUT]`: a trained model of an installed recipe as a folder to share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.runs import beside, is_locked
from trainer.inference.exporting import FORMATS
from trainer.inference.exporting import export as write
from trainer.inference.initialise import is_export
from trainer.inference.loading import load
from trainer.untrusted import printable

USAGE = "RUN [OUT] [--to FORMAT] [--min_key METRIC | --max_key METRIC] [--seeds RUN…]"


def export(argv: Sequence[str]) -> int:
    """Write the model of a run's best checkpoint to a new folder; return the exit code.

    Args:
        argv: arguments as in `USAGE`.

    Raises:
        ValueError: an argument is wrong, or the run cannot be loaded or is still going on.
        OSError: the folder cannot be written.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--to", default=FORMATS[0])
    parser.add_argument("--seeds", nargs="+", default=[])
    for name in ("max_key", "min_key", "init_from", "source"):
        parser.add_argument(f"--{name}")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; usage: cortex export {USAGE}") from error
    if rest or given.run is None:
        raise ValueError(f"usage: cortex export {USAGE}")
    run = Path(os.path.expanduser(given.run))
    # Inside of a run by default, so that a pattern such as NAME/* matches runs alone.
    inside = run / "export" / given.to
    out = given.out or (beside(run, given.to) if is_export(run) else inside)
    if is_locked(run):
        raise ValueError(
            f"the run in {printable(str(run))} is still going on: export it when it has ended; "
            "Ctrl+C ends it, and saves"
        )
    overrides = {
        name: value
        for name in ("init_from", "source")
        if (value := getattr(given, name)) is not None
    }
    model = load(run, "cpu", overrides=overrides, max_key=given.max_key, min_key=given.min_key)
    print(f"written to {write(model, out, given.to, seeds=given.seeds)}", file=sys.stderr)
    return 0
