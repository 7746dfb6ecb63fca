"""Trained models: `trainer.load` makes one from its run folder, `export` writes it."""

from trainer.inference.exporting import export
from trainer.inference.graphs import Graph, Port
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
    "Classification", "Embedding", "Graph", "Model", "OpenRun", "Port", "Sound", "Speech",
    "Transcript", "Word", "export", "load", "open_run",
]  # fmt: skip
