"""Load a trained Brain from the folder of its run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from trainer import Brain
from trainer.config.hyperparameters import load_hparams

Trained = TypeVar("Trained", bound=Brain)


def load_brain(kind: type[Trained], run: Path, device: str = "auto", **changes: Any) -> Trained:
    """Build the Brain of a run folder, wherever that lies now.

    Its weights are still to be read, by `Brain.best_weights`.

    ``changes`` are keys of the run's YAML that are to be otherwise. Raises ValueError for a folder
    that is no run's.
    """
    file = run / "hyperparams.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is no run folder: it has no hyperparams.yaml")
    hparams = load_hparams(
        file, {"output_folder": str(run), "device": device, **changes}, run_folder=True
    )
    return kind(hparams["modules"], hparams=hparams, checkpointer=hparams["checkpointer"])
