"""The command line: arguments, run folder, messages, signals."""

from trainer.cli.arguments import configure
from trainer.cli.run import Run, launch, main

__all__ = ["Run", "configure", "launch", "main"]
