"""The loggers that a user has chosen by the run option `logger`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.loggers.mlflow import MlflowLogger
from trainer.loggers.protocol import Logger, require
from trainer.loggers.tables import CsvLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.wandb import WandbLogger
from trainer.options import RunOptions, nearest

LoggerFactory = Callable[[Path], Logger]
NAMES = ("tensorboard", "wandb", "mlflow", "csv")
ALLOWED = (
    f"{', '.join(NAMES)}, objects of a class that derives from trainer.loggers.Logger, and a list "
    "of these"
)


def chosen_loggers(options: RunOptions) -> list[LoggerFactory]:
    """Return the factories of the loggers that the options `logger` and `tensorboard` choose.

    Nothing is imported or written before a run begins.

    Raises:
        ValueError: if a name is unknown or given twice, a value is no logger, or a package is
            missing.
    """
    given = options.logger
    given = [*given] if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if options.tensorboard and "tensorboard" not in given:
        given.append("tensorboard")
    for number, each in enumerate(given):
        if isinstance(each, str) and each in given[:number]:
            raise ValueError(f"logger names {each!r} twice; allowed: each name once")
    return [_by_name(each) if isinstance(each, str) else _constant(each) for each in given]


def _by_name(name: str) -> LoggerFactory:
    """Return the factory of the logger of a name."""
    if name == "tensorboard":
        require("tensorboard", "log")
        return TensorBoardLogger
    if name == "csv":
        return CsvLogger
    if name == "wandb":
        return _constant(WandbLogger())
    if name == "mlflow":
        return _constant(MlflowLogger())
    raise ValueError(f"there is no logger {name!r}{nearest(name, NAMES)}; allowed: {ALLOWED}")


def _constant(made: object) -> LoggerFactory:
    """Return a factory of a logger that exists already."""
    if not isinstance(made, Logger):
        raise ValueError(f"logger holds {repr(made)[:80]}, which is no logger; allowed: {ALLOWED}")
    logger = made
    return lambda folder: logger
