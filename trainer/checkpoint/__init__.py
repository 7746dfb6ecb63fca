"""Checkpoints that survive kills, full disks and flipped bits, and run no code when loaded.

    checkpoints/
        step-00000123/
            brain.pt            plain values of the recoverable "brain"
            brain.modules.pt    and for each of its keys with tensors, a file
            brain.updates.pt
            rank-0.pt           state that differs per rank: random generators, an open window
            manifest.json       step, time and metrics, size and hash of each file

A checkpoint that is cut to its weights has `brain.pt`, `brain.modules.pt` and, with averages,
`brain.ema.pt`, and its manifest says so.

`checkpointer` has the class that recipes use and the rules for which checkpoints stay, `storage`
writes states into folders and verifies them, `migrate` reads the layouts of earlier formats,
`run_state` gathers the state of a run, `user_state` that of users' own objects, and `frozen` leaves
out frozen weights.
"""

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.storage import BrokenCheckpoint, Checkpoint

__all__ = ["BrokenCheckpoint", "Checkpoint", "Checkpointer"]
