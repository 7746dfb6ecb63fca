"""Description of a run for loggers: its name, its configuration and its best checkpoint."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer, ranked
from trainer.options import RunOptions

MAX_ITEMS = 100  # of a list, and of a mapping within another
MAX_TEXT = 1000  # characters
Plain = bool | int | float | str | None


def name_of(folder: Path) -> str:
    """Return the name of the run of a folder: that of the folder.

    If the folder is named by its seed, the name of its parent comes first: results/asr/demo/1234
    is "demo-1234".
    """
    folder = folder.resolve()
    seed = re.fullmatch(r"\d+(-.*)?", folder.name)
    return f"{folder.parent.name}-{folder.name}" if seed else folder.name


def configuration(
    folder: Path, hparams: Mapping[str, Any], options: RunOptions
) -> dict[str, Plain]:
    """Return the configuration of a run by dotted key.

    It is that of hyperparams.yaml with its references resolved and the defaults of run options;
    objects are given by their tags and arguments. Without such a file, and where it cannot be
    resolved here, it is the plain values among `hparams`, and the options. Environment variables
    are not read.

    Args:
        folder: run folder.
        hparams: hyperparameters by name.
        options: run options.
    """
    from trainer.config.changes import Settings
    from trainer.config.reading import read
    from trainer.config.registry import Registry

    values: Mapping[str, Any] = {**hparams, **vars(options)}
    if (path := folder / "hyperparams.yaml").exists():
        with contextlib.suppress(ValueError):  # It calls functions that only its program allows.
            values = Settings(read(path, alone=True)[0], Registry()).values
    return dict(_flat(values))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield plain values by dotted key; objects are left out."""
    if isinstance(values, Mapping):
        most = MAX_ITEMS if prefix else None  # A longer one is data, such as a vocabulary.
        for key, value in islice(values.items(), most):
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values[:MAX_ITEMS]):
            yield from _flat(value, f"{prefix}.{number}")
    elif values is None or isinstance(values, (bool, int, float, str)):
        yield prefix, values[:MAX_TEXT] if isinstance(values, str) else values
    elif isinstance(values, Path):
        yield prefix, str(values)


def best_checkpoint(checkpointer: Any) -> Path | None:
    """Return the folder of the best checkpoint, by the first metric it keeps the best by.

    Without such a metric it is the newest; None without a checkpoint.
    """
    if not isinstance(checkpointer, Checkpointer):
        return None
    rules = checkpointer.retention.best
    found = checkpointer.find(n=None)
    best = ranked(found, rules[0].metric, rules[0].mode) if rules else []
    return next((each.path for each in [*best, *found]), None)
