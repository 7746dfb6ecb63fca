"""Stages, and the progress of a training."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Phase = Literal["train", "valid", "done"]


class Stage(enum.Enum):
    """Purpose of a pass over data.

    Members equal those of the same name in another enum called ``Stage``, such as SpeechBrain's.
    """

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, enum.Enum) and type(other).__name__ == "Stage":
            return self.name == other.name
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)  # As Enum does, so that equal members have equal hashes.


@dataclass
class Progress:
    """Position of a run: plain values that are saved with every checkpoint.

    Fields with the metadata ``of_run`` count over the whole run; a `fit` that a hook of another
    `fit` calls adds to them. The others belong to one `fit`, and are restored when such a nested
    `fit` ends.

    Args:
        epoch: current epoch, as the epoch counter numbers it.
        step: batches of the current epoch so far, on this rank.
        optimizer_step: optimizer steps since the run began.
        phase: next part of the epoch: "train" for the rest of its training, "valid" for a
            validation, "done" for none.
        stopped: True once early stopping has ended the current `fit`.
        fits: calls of `Brain.fit` so far, without nested ones.
        epoch_batches: batches of the current epoch on this rank; None where unknown.
        processes: number of processes that ``step`` and ``epoch_batches`` refer to.
        seconds: training time of the run, in seconds.
        joint: names of the optimizers that step together in the open accumulation window; None
            before the window has begun.
        averaged: name of the optimizer whose loss `Brain.fit_batch` returns.
        nonfinite_count: skipped steps of the current epoch.
        out_of_memory_count: batches in a row, up to the last one, for which memory ran out.
        outer_epoch: in a nested `fit`, the epoch of the outermost one; None otherwise.
        counted_by_hand: True if the recipe has set ``optimizer_step`` in this batch.
    """

    epoch: int = 0
    step: int = 0
    optimizer_step: int = field(default=0, metadata={"of_run": True})
    phase: Phase = "done"
    stopped: bool = False
    fits: int = field(default=0, metadata={"of_run": True})
    epoch_batches: int | None = None
    processes: int = 1
    seconds: float = field(default=0.0, metadata={"of_run": True})
    joint: list[str] | None = None
    averaged: str | None = None
    nonfinite_count: int = 0
    out_of_memory_count: int = 0
    outer_epoch: int | None = None
    counted_by_hand: bool = False

    def load_state_dict(self, state: Mapping[str, Any], of_run: bool = True) -> None:
        """Set the fields from a saved state.

        Args:
            state: values by field name. A field that it lacks keeps its value.
            of_run: set the fields that count over the whole run, too.
        """
        for each in fields(self):
            if each.name in state and (of_run or not each.metadata.get("of_run")):
                setattr(self, each.name, state[each.name])
