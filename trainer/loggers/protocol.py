"""Base class of loggers, and the facts about a run that they get."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.samples import Samples


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run, for `Logger.open`.

    Attributes:
        folder: run folder.
        name: name of the run: the run option `run_name`, else from the folder.
        config: hyperparameters and run options by dotted key; numbers, texts, booleans and None.
        memory: path of a file in the run folder for this logger alone, for facts that it needs when
            the run resumes, such as the identifier of the run in its service.
        taken: number of records that this logger got since the run began.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    memory: Path
    taken: int = 0


class Logger:
    """Base class of loggers; `trainer.loggers.LoggerCallback` calls them, only on rank 0.

    A logger overrides the methods for its kinds of records; the others do nothing. A method that
    raises is reported in one warning; its logger is not called again, and the run goes on.

    A resumed run reports the records after its checkpoint again, with equal values. A logger that
    overrides `resume` discards the earlier ones; any other does not get them again.
    """

    def open(self, run: RunInfo) -> None:
        """Begin to record a run, or continue it; called before the first record.

        It may be called again after `close`, as by `evaluate` after `fit`.

        Args:
            run: folder, name and configuration of the run.
        """

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Record numbers.

        Args:
            kind: "step" (averages since the last record), "stage" (a finished stage) or
                "monitor" (layer norms).
            values: numbers by name, in nested mappings; NaN and infinities mean unknown.
            step: optimizer steps since the run began.
        """

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Record a distribution.

        Args:
            name: name of the series, such as the set of samples and its column.
            values: the values (N,), on the host.
            step: optimizer steps since the run began.
        """

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Record a picture.

        Args:
            name: name of the series.
            png: content of a PNG file.
            step: optimizer steps since the run began.
        """

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Record a sound.

        Args:
            name: name of the series.
            samples: float32 samples (T,) in [-1, 1], on the host.
            rate: sample rate in Hz.
            step: optimizer steps since the run began.
        """

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text.

        Args:
            name: name of the series.
            text: the text.
            step: optimizer steps since the run began.
        """

    def samples(self, samples: Samples) -> None:
        """Record rows of cells from `Brain.show`.

        Sounds, pictures and texts of the first rows are also passed to `audio`, `figure` and
        `text` one by one.

        Args:
            samples: title, rows and note, with optimizer step and epoch.
        """

    def artifact(self, name: str, path: Path) -> None:
        """Record a file or a folder of the run, such as the report or the best checkpoint.

        Args:
            name: name of the artifact.
            path: the file or folder, in the run folder.
        """

    def resume(self, step: int) -> None:
        """Discard the records of later optimizer steps, since a resumed run reports them again.

        Args:
            step: optimizer steps at the checkpoint that the run resumes from.
        """

    def recorded(self) -> Mapping[str, tuple[int, int]] | None:
        """Return the last step of each series in the backend.

        Override it for a backend that may lose records: a resumed run sends the numbers that the
        backend lacks.

        Returns:
            Last step, and number of records at this step, by series. Names are those of `series`,
            "figures/NAME", "audio/NAME", "text/NAME" and "histograms/NAME". None if the backend
            loses no records.
        """
        return None

    def close(self) -> None:
        """Write pending records and release files."""


def series(kind: str, values: Mapping[str, Any]) -> str:
    """Return the name of the series of a record of numbers.

    It is "train", "valid" or "test" for stages, "train_step" for steps, "monitor" for layer norms.

    Args:
        kind: "step", "stage" or "monitor".
        values: the record.
    """
    if kind == "stage":
        return str(values.get("stage", kind))
    return f"{values.get('stage', 'train')}_step" if kind == "step" else kind


def require(package: str, extra: str) -> None:
    """Check that a package for a logger is installed, without importing it.

    Args:
        package: name of the package.
        extra: extra of this project that installs it.

    Raises:
        ValueError: if it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise missing(package, extra)


def missing(package: str, extra: str) -> ValueError:
    """Return the error for a missing package, which an extra of this project installs."""
    return ValueError(
        f"{package} was asked for and is not installed; "
        f"pip install 'cortex-speech[{extra}]', or leave it out of logger"
    )
