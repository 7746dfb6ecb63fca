"""The folder that the records of a run are written into."""

from __future__ import annotations

from pathlib import Path

from trainer.options import RunOptions


def run_folder(options: RunOptions) -> Path | None:
    """Return the output folder; None where there is none, under --debug and in a replay."""
    if not options.output_folder or options.debug or options.replay:
        return None
    return Path(options.output_folder)
