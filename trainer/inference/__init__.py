"""Using trained models: `trainer.load` makes one from its run folder."""

from trainer.inference.loading import OpenRun, load, open_run

__all__ = ["OpenRun", "load", "open_run"]
