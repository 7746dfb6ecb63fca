"""Using trained models: `trainer.load` makes one from its run folder, `export` writes it."""

from trainer.inference.exporting import export
from trainer.inference.loading import OpenRun, load, open_run
from trainer.inference.model import Model
from trainer.inference.results import (
    Classification,
    Embedding,
    Sound,
    Speech,
    Transcript,
    Word,
)

__all__ = [
    "Classification",
    "Embedding",
    "Model",
    "OpenRun",
    "Sound",
    "Speech",
    "Transcript",
    "Word",
    "export",
    "load",
    "open_run",
]
