"""Time of a checkpoint of 200 MB, as a multiple of `torch.save` and `fsync` of the same tensors.

    python tests/benchmarks/save_cost.py [FOLDER]

The checkpoint hashes every byte, syncs every file, renames the folder, and deletes the checkpoint
before. Both kinds of saves take turns, so that a busy disk slows both.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import Checkpointer

MEGABYTES = 200
PARTS = 20  # tensors
ROUNDS = 15


class Weights:
    """A recoverable of weights and two moments of each, as Adam's."""

    def __init__(self) -> None:
        numbers = MEGABYTES * 1_000_000 // 4 // 3 // PARTS
        made = [{str(n): torch.randn(numbers) for n in range(PARTS)} for _ in range(3)]
        self.state = {"modules": made[0], "optimizers": made[1:]}

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def seconds(work: Callable[[], object]) -> float:
    """Return the duration of a call, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def save_plainly(state: dict[str, Any], path: Path) -> None:
    """Write a state to one file, and sync it."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main(folder: Path) -> None:
    """Print the ratio of a save to a plain one."""
    torch.set_num_threads(1)
    weights = Weights()
    checkpointer = Checkpointer(folder / "checkpoints", recoverables={"brain": weights})
    plain = folder / "plain.pt"
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(seconds(lambda: save_plainly(weights.state, plain)))
        ours.append(seconds(checkpointer.save_and_keep_only))
    size = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*.pt"))
    print(f"{size / 1e6:.0f} MB, median of {ROUNDS} rounds")
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    print(
        f"a save takes x{statistics.median(ours) / statistics.median(theirs):.2f} of torch.save "
        f"and fsync (single rounds x{ratios[0]:.2f} to x{ratios[-1]:.2f}), "
        f"{statistics.median(ours):.2f} s"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        main(Path(temporary))
