"""What a dataset and its loader say to each other: bad items, and randomness of an item's own."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import torch

from trainer.seed import derive

logger = logging.getLogger("trainer.data")


class BadItem(ValueError):
    """An item that cannot be used, raised by a dataset: the policy decides what follows."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


@dataclass
class Now:
    """What is being loaded in this process."""

    seed: int = 0
    epoch: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


now = Now()  # In each worker, and in the main process where that loads by itself.


def item_generator(item: str) -> torch.Generator:
    """A generator seeded by the run's seed, the epoch and ``item``, for use inside a dataset.

    The global generators are seeded for each index already; this serves datasets whose index is a
    whole batch. Outside a loader, seed and epoch are 0.
    """
    return torch.Generator().manual_seed(derive(now.seed, "item", now.epoch, item))


def report_bad(path: str | os.PathLike[str], reason: str) -> None:
    """Say that a dataset left an item out of the batch it is loading: logged and counted as bad."""
    now.bad.append((str(path), reason))


def note(error: BaseException, text: str) -> None:
    """Say more about an error without changing its type."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    elif error.args and isinstance(error.args[0], str):  # Python 3.10
        error.args = (f"{error.args[0]} ({text})", *error.args[1:])


@dataclass
class Policy:
    """What follows a bad item."""

    on_bad: str
    max_bad: float
    items: float  # this rank's share of the dataset

    def __post_init__(self) -> None:
        if self.on_bad not in ("skip", "raise"):
            raise ValueError(f"on_bad must be 'skip' or 'raise', got {self.on_bad!r}")
        self.logged: set[str] = set()
        self.new_epoch()

    def new_epoch(self) -> None:
        """Count from 0: what is judged is the share of an epoch's items."""
        self.count = 0
        self.skipped: dict[str, str] = {}  # path: reason

    def judge(self, reports: list[tuple[str, str]]) -> None:
        """Log what is new; raise when the policy says so, or when there are too many."""
        for path, reason in reports:
            if self.on_bad == "raise":
                raise BadItem(path, reason)
            if path not in self.logged:
                logger.warning("skipped %s: %s", path, reason)
            self.logged.add(path)
            self.skipped[path] = reason
            self.count += 1
        if self.count > self.max_bad * self.items:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in self.skipped.items())
            raise ValueError(
                f"{self.count} of {self.items:g} items are bad, more than the {self.max_bad:.1%} "
                f"that may be skipped:\n{listed}"
            )
