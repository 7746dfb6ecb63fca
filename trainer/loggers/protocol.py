"""Base class of loggers: records the numbers, pictures and sounds of a run."""

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
    """Facts about a run that a logger is opened with.

    Attributes:
        folder: run folder.
        name: name of the run: the run option `run_name`, else from the folder.
        config: hyperparameters and run options by dotted key; numbers, texts, booleans and None.
        memory: path of a file in the run folder for this logger alone. It may write there what it
            needs when the run resumes, such as the identifier of the run in its service.
        taken: number of records that this logger was given since the run began.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    memory: Path
    taken: int = 0


class Logger:
    """Base class of what records a run; `trainer.loggers.LoggerCallback` drives it, on rank 0 only.

    A logger overrides the methods for what it records; the others do nothing. A method that raises
    is reported once as a warning; that logger is not called again, and the run goes on.

    A resumed run reports again what came after its checkpoint, and exact resuming makes it equal.
    A logger that overrides `resume` discards those records; any other is not given them again.
    """

    def open(self, run: RunInfo) -> None:
        """Begin to record a run, or continue it; called before the first record.

        After `close` it may be called again, as by `evaluate` after `fit`.

        Args:
            run: folder, name and configuration of the run.
        """

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Record numbers.

        Args:
            kind: "step" (averages since the last record), "stage" (a finished stage) or
                "monitor" (layer norms).
            values: numbers by name, nested by mappings; NaN and infinities stand for unknown.
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
        """Record rows of cells, as they were given to `Brain.show`.

        The sounds, pictures and texts of the first rows are also given one by one to `audio`,
        `figure` and `text`.

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
        """Return the last step of each series that the backend holds.

        A backend that may lose records overrides this: when the run resumes it is given the numbers
        that it lacks.

        Returns:
            By the name of a series, its last step and the number of its records at this step. The
            names are those of `series`, and "figures/NAME", "audio/NAME", "text/NAME" and
            "histograms/NAME". None if the backend holds all that it was given.
        """
        return None

    def close(self) -> None:
        """Write what is pending and release files."""


def series(kind: str, values: Mapping[str, Any]) -> str:
    """Return the name of the series that a record of numbers belongs to.

    It is "train", "valid" or "test" for stages, "train_step" for steps, "monitor" for layer norms.

    Args:
        kind: "step", "stage" or "monitor".
        values: the record.
    """
    if kind == "stage":
        return str(values.get("stage", kind))
    return f"{values.get('stage', 'train')}_step" if kind == "step" else kind


def require(package: str, extra: str) -> None:
    """Check that a package that a logger needs is installed, without importing it.

    Args:
        package: name of the package.
        extra: extra of this project that installs it.

    Raises:
        ValueError: if it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise missing(package, extra)


def missing(package: str, extra: str) -> ValueError:
    """Return the error for a package that is not installed, and is in an extra of this project."""
    return ValueError(
        f"{package} was asked for and is not installed; "
        f"pip install 'cortex-speech[{extra}]', or leave it out of logger"
    )
