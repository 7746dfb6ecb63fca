"""Logger that writes event files for TensorBoard."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.loggers.files import finite, readable_errors
from trainer.loggers.protocol import Logger, missing

# Colour channels by the colour type in the header of a PNG file.
CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}


class TensorBoardLogger(Logger):
    """Write the records of a run to the folder `tensorboard` of the run.

    The event file is opened at the first record, when the first step of a resumed run is known.
    Each record is flushed before the next one, so that a killed run has all records from before its
    checkpoint.

    Args:
        folder: run folder.

    Raises:
        ValueError: if the package tensorboard is not installed.
        OSError: if the event file cannot be opened (recording methods).
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._package: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise missing("tensorboard", "log") from error
        self.folder = folder / "tensorboard"
        self._writer: Any = None
        self._purge_step: int | None = None

    @contextmanager
    def _recording(self) -> Iterator[Any]:
        """Context manager that yields the writer of the event file, and flushes it on exit."""
        if self._writer is None:
            with readable_errors(self.folder):
                self._writer = self._package.SummaryWriter(
                    str(self.folder), purge_step=self._purge_step
                )
        yield self._writer
        self._writer.flush()

    def scalars(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        """Write the finite numbers, under names such as "train_step/optimizers.main.lr"."""
        group = f"{values.get('stage', 'train')}_{kind}"
        with self._recording() as writer:
            for name, value in finite(kind, values):
                writer.add_scalar(f"{group}/{name}", value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of the finite values."""
        known = values[values.isfinite()].float()
        if len(known):
            with self._recording() as writer:
                writer.add_histogram(name, known, step)

    def figure(self, name: str, png: bytes, step: int) -> None:
        """Write a picture."""
        # SummaryWriter.add_image takes pixels, and needs pillow to make them a PNG file again.
        Summary = self._package.summary.Summary
        width, height, _, kind = struct.unpack(">IIBB", png[16:26])
        image = Summary.Image(
            height=height, width=width, colorspace=CHANNELS[kind], encoded_image_string=png
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        with self._recording() as writer:
            writer.file_writer.add_summary(summary, step)

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        """Write a sound; samples beyond [-1, 1] are clipped."""
        if samples.numel():
            with self._recording() as writer:
                writer.add_audio(name, samples.detach().float().clamp(-1, 1), step, rate)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        with self._recording() as writer:
            writer.add_text(name, text, step)

    def resume(self, step: int) -> None:
        """Make TensorBoard ignore the records of later steps."""
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the event file; closing twice is harmless."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
