"""Checkpoints that survive kills, full disks and flipped bits, and run no code when read.

    checkpoints/
        step-00000123/
            brain.pt            plain values of the recoverable "brain"
            brain.modules.pt    and what is large, a file for each of its keys
            brain.updates.pt
            rank-0.pt           what differs per process: random generators, an open gradient window
            manifest.json       step, time and metrics to read, size and hash of each file

`files` writes beside, hashes, syncs and renames; `manifest` says what a checkpoint is and refuses a
broken one; `state` turns state dicts into files and back; `retention` says which ones stay;
`saving` and `restoring` do one of either on all ranks `together`; the `Checkpointer` is what a
recipe uses.
"""

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.manifest import BrokenCheckpoint, Checkpoint

__all__ = ["BrokenCheckpoint", "Checkpoint", "Checkpointer"]
