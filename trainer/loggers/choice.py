"""Loggers of the run option `logger`, and the facts about a run that they get."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer, ranked
from trainer.loggers.mlflow import MlflowLogger
from trainer.loggers.protocol import Logger, require
from trainer.loggers.tables import CsvLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.wandb import WandbLogger
from trainer.options import RunOptions, nearest
from trainer.run_files import HYPERPARAMS

LoggerFactory = Callable[[Path], Logger]
NAMES = ("tensorboard", "wandb", "mlflow", "csv")
ALLOWED = (
    f"{', '.join(NAMES)}, objects of a class that derives from trainer.loggers.Logger, and a list "
    "of these"
)
MAX_ITEMS = 100  # of a list, and of a mapping within another
MAX_TEXT = 1000  # characters
Plain = bool | int | float | str | None


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
    """Return the factory of a logger by its name."""
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
    """Return a factory that returns an existing logger."""
    if not isinstance(made, Logger):
        raise ValueError(f"logger holds {repr(made)[:80]}, which is no logger; allowed: {ALLOWED}")
    logger = made
    return lambda folder: logger


def name_of(folder: Path) -> str:
    """Return the name of a run, from its folder.

    If the folder is named by its seed, the name of its parent comes first: results/kws/demo/1234
    is "demo-1234".
    """
    folder = folder.resolve()
    seed = re.fullmatch(r"\d+(-.*)?", folder.name)
    return f"{folder.parent.name}-{folder.name}" if seed else folder.name


def configuration(
    folder: Path, hparams: Mapping[str, Any], options: RunOptions
) -> dict[str, Plain]:
    """Return the configuration of a run by dotted key.

    It has the values of hyperparams.yaml with references resolved, objects as their tags and
    arguments, and the defaults of run options. If there is no such file, or it cannot be resolved
    here, it has the plain values among `hparams`, and the options. Environment variables are not
    read.
    """
    from trainer.config.changes import Settings
    from trainer.config.reading import read
    from trainer.config.registry import Registry

    values: Mapping[str, Any] = {**hparams, **vars(options)}
    if (path := folder / HYPERPARAMS).exists():
        with contextlib.suppress(ValueError):  # Only its program allows its functions.
            values = Settings(read(path, alone=True)[0], Registry()).values
    return dict(_flat(values))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield plain values by dotted key; objects are left out."""
    if isinstance(values, Mapping):
        most = MAX_ITEMS if prefix else None  # Longer ones are data, such as a vocabulary.
        for key, value in islice(values.items(), most):
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values[:MAX_ITEMS]):
            yield from _flat(value, f"{prefix}.{number}")
    elif values is None or isinstance(values, (bool, int, float, str)):
        yield prefix, values[:MAX_TEXT] if isinstance(values, str) else values
    elif isinstance(values, Path):
        yield prefix, str(values)


def best_checkpoint(checkpointer: Checkpointer | None) -> Path | None:
    """Return the folder of the best checkpoint by the first metric of ``keep_best``.

    Without such a metric it is the newest; None without a checkpoint.
    """
    if checkpointer is None:
        return None
    rules = checkpointer.retention.best
    found = checkpointer.find(n=None)
    best = ranked(found, rules[0].metric, rules[0].mode) if rules else []
    return next((each.path for each in [*best, *found]), None)
