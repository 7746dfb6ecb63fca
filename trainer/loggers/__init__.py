"""Loggers, which write the numbers, pictures and sounds of a run.

`LoggerCallback` drives the loggers of a run: `JsonlLogger`, which every run has, and those of the
run option `logger`. A logger of your own derives from `Logger`; see docs/loggers.md. Recipes record
through `loggers_of`. `ProgressBar` shows the progress of a stage, and `TextLog` writes `train.log`.
"""

from trainer.loggers.callback import LoggerCallback, loggers_of
from trainer.loggers.files import JsonlLogger, SampleLogger, TextLog
from trainer.loggers.mlflow import MlflowLogger
from trainer.loggers.progress_bar import ProgressBar
from trainer.loggers.protocol import Logger, RunInfo
from trainer.loggers.tables import CsvLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.wandb import WandbLogger

__all__ = [
    "CsvLogger", "JsonlLogger", "Logger", "LoggerCallback", "MlflowLogger", "ProgressBar",
    "RunInfo", "SampleLogger", "TensorBoardLogger", "TextLog", "WandbLogger", "loggers_of",
]  # fmt: skip
