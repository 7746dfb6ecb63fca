"""A Brain-style trainer for speech: one loop, one place that moves weights, on every path.

from trainer import Brain, Stage, main
"""

import importlib
from typing import TYPE_CHECKING, Any

from trainer.brain import Brain
from trainer.checkpoint import Checkpointer
from trainer.epochs import EpochCounter
from trainer.hooks import Stage
from trainer.nonfinite import NonFiniteError
from trainer.options import RunOptions
from trainer.report import StageReport, StepReport

if TYPE_CHECKING:
    from trainer.cli import Run, main
    from trainer.hparams import load_hparams
    from trainer.speechbrain_names import create_experiment_directory, parse_arguments

__all__ = [
    "Brain",
    "Checkpointer",
    "EpochCounter",
    "NonFiniteError",
    "Run",
    "RunOptions",
    "Stage",
    "StageReport",
    "StepReport",
    "create_experiment_directory",
    "load_hparams",
    "main",
    "parse_arguments",
]

# YAML and command line are imported when they are asked for: whoever only subclasses Brain in a
# program of their own does not wait for them.
_LATER = {
    "Run": "trainer.cli",
    "main": "trainer.cli",
    "load_hparams": "trainer.hparams",
    "create_experiment_directory": "trainer.speechbrain_names",
    "parse_arguments": "trainer.speechbrain_names",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
