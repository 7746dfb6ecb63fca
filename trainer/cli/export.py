"""`python -m trainer export RUN OUT`: the merged weights of a run of an installed recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trainer.inference.exporting import export as write
from trainer.inference.loading import load

USAGE = (
    "usage: python -m trainer export RUN OUT [--max_key METRIC | --min_key METRIC] "
    "[--init_from SOURCE]"
)


def export(argv: Sequence[str]) -> int:
    """Write the weights of a run's best checkpoint, adapters merged; return the exit code.

    Raises:
        ValueError: the run cannot be loaded, or the folder not be made.
    """
    parser = argparse.ArgumentParser(
        usage=USAGE.removeprefix("usage: "), add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("run", nargs="?")
    parser.add_argument("out", nargs="?")
    for name in ("--max_key", "--min_key", "--init_from"):
        parser.add_argument(name)
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; {USAGE}") from error
    if rest or given.out is None:
        raise ValueError(USAGE)
    overrides = {} if given.init_from is None else {"init_from": given.init_from}
    model = load(
        given.run, "cpu", overrides=overrides, max_key=given.max_key, min_key=given.min_key
    )
    print(f"written to {write(model, given.out)}", file=sys.stderr)
    return 0
