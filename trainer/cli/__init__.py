"""The command line: arguments, run folder, messages, signals."""

from trainer.cli.run import Run, configure, main

__all__ = ["Run", "configure", "main"]
