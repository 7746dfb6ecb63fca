"""Count the files of `trainer` that a reader enters on four walks through it.

    python -m tests.benchmarks.walks

Prints a line for each walk: its name, the number of distinct files whose functions were called, and
the files. Files that are only imported do not count.

- step: within one call of `Brain.optimize`, in a usual batch.
- fit: from the call of `Brain.fit` until the first batch is trained on.
- save: within the function of the loop that has a checkpoint saved at the end of an epoch, from its
  request on.
- command: from a command line with one override to the objects of a YAML.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import trainer
from tests.trainer.small import Regressor, batches, make
from trainer import Checkpointer, load_hparams, parse_arguments

PACKAGE = Path(trainer.__file__).parent
YAML = """
seed: 1
width: 4
layer: !new:torch.nn.Linear
    in_features: !ref <width>
    out_features: 2
"""


class Walk:
    """The files of `trainer` that are entered while it is recorded."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def start(self, within: FrameType | None = None) -> None:
        """Record until `stop`, or until the function of the frame ``within`` returns."""
        self.files.clear()
        self._within = within
        if within is not None:
            self._add(within)
        sys.setprofile(self._look)

    def stop(self) -> None:
        """End the recording."""
        self._within = None
        sys.setprofile(None)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record within a block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._add(frame)
        elif event == "return" and frame is self._within:
            self.stop()

    def _add(self, frame: FrameType) -> None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents and frame.f_code.co_name != "<module>":
            self.files.add(path.relative_to(PACKAGE).as_posix())


class Walked(Regressor):
    """Records the first three walks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.to_batch, self.to_step = Walk(), Walk()

    def fit_batch(self, batch: Any) -> Any:
        self.to_batch.stop()
        return super().fit_batch(batch)

    def optimize(self, *arguments: Any, **named: Any) -> Any:
        if self.step != 2:
            return super().optimize(*arguments, **named)
        with self.to_step.recorded():
            return super().optimize(*arguments, **named)


class WalkedCheckpointer(Checkpointer):
    """Records from the request for a checkpoint until the function that requests it returns."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.to_save = Walk()

    def save_and_keep_only(self, *arguments: Any, **named: Any) -> Any:
        self.to_save.start(within=sys._getframe(1))
        return super().save_and_keep_only(*arguments, **named)


def train(folder: Path) -> dict[str, Walk]:
    """Train for an epoch of four batches, with an output folder and checkpoints."""
    checkpointer = WalkedCheckpointer(folder / "saved")
    brain = make(Walked, checkpointer=checkpointer, output_folder=str(folder))
    data = batches(4)
    brain.to_batch.start()
    brain.fit(range(1, 2), data, data[:1])
    return {"step": brain.to_step, "fit": brain.to_batch, "save": checkpointer.to_save}


def build(folder: Path) -> Walk:
    """Build a YAML with one override."""
    yaml = folder / "small.yaml"
    yaml.write_text(YAML)
    walk = Walk()
    with walk.recorded():
        path, _, overrides = parse_arguments([str(yaml), "--width=3"])
        layer = load_hparams(path, overrides)["layer"]
    assert layer.in_features == 3
    return walk


def main() -> None:
    """Walk twice, since the first time imports, and print the second."""
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            walks = {**train(Path(folder)), "command": build(Path(folder))}
    for name, walk in walks.items():
        print(f"{name:8} {len(walk.files):3}  {' '.join(sorted(walk.files))}")


if __name__ == "__main__":
    main()
