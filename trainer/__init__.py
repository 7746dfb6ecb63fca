"""A Brain-style trainer for speech: one loop, one place that moves weights, on every path.

from trainer import Brain, Stage
"""

from trainer.brain import Brain
from trainer.epochs import EpochCounter
from trainer.hooks import Stage
from trainer.nonfinite import NonFiniteError
from trainer.options import RunOptions
from trainer.report import StageReport, StepReport

__all__ = [
    "Brain",
    "EpochCounter",
    "NonFiniteError",
    "RunOptions",
    "Stage",
    "StageReport",
    "StepReport",
]
