"""Base class of loggers: records the numbers, pictures and sounds of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.samples import Samples


class Logger:
    """Base class of what records a run; `trainer.loggers.LoggerCallback` drives it, on rank 0 only.

    A logger overrides the methods for what it records; the others do nothing. A method that raises
    is reported once as a warning; that logger is not called again, and the run goes on.
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
        """Record the distribution of values (N,) on the host."""

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Record a picture, as the bytes of a PNG file."""

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Record sound: samples (T,) in [-1, 1], rate in Hz."""

    def text(self, name: str, text: str, step: int) -> None:
        """Record a text."""

    def samples(self, samples: Samples) -> None:
        """Record rows of cells. The sounds and pictures of the first come one by one, too."""

    def artifact(self, name: str, path: Path) -> None:
        """Record a file of the run, such as the report or the best checkpoint."""

    def resume(self, step: int) -> None:
        """Discard what was recorded for later optimizer steps, since it will come again."""

    def close(self) -> None:
        """Write what is pending and release files."""
