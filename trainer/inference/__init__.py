"""Using trained models: `trainer.load` makes one from its run folder, `export` writes it."""

from trainer.inference.exporting import export
from trainer.inference.loading import OpenRun, load, open_run

__all__ = ["OpenRun", "export", "load", "open_run"]
