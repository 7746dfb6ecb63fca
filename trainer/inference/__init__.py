"""Using trained models: `trainer.load` makes one from its run folder, `export` writes it."""

from trainer.inference.exporting import export
from trainer.inference.loading import OpenRun, load, open_run
from trainer.inference.model import Model

__all__ = ["Model", "OpenRun", "export", "load", "open_run"]
