"""Loggers: write the numbers, pictures and sounds of a run.

`LoggerCallback` drives the loggers of a run, `JsonlLogger` and `TensorBoardLogger` among them;
`ProgressBar` shows how far a stage is, and `TextLog` writes `train.log`.
"""

from trainer.loggers.callback import LoggerCallback
from trainer.loggers.files import JsonlLogger, TextLog
from trainer.loggers.progress_bar import ProgressBar
from trainer.loggers.protocol import Logger
from trainer.loggers.samples import SampleLogger
from trainer.loggers.tensorboard import TensorBoardLogger

__all__ = [
    "JsonlLogger",
    "Logger",
    "LoggerCallback",
    "ProgressBar",
    "SampleLogger",
    "TensorBoardLogger",
    "TextLog",
]
