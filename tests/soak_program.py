"""Training program of the soak (`tests.soak`), run on each rank by torchrun.

    torchrun --nproc_per_node=2 -m tests.soak_program FOLDER SEED EPOCHS PACE

Some items of each epoch are faults: a loss that is not finite, memory that runs out in the forward
or the backward pass, a file that cannot be read. They depend on seed and epoch alone, so that every
run of one seed meets the same ones. Two faults come when the soak asks for them by a file: a loader
worker that hangs, and a disk that is full.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import trainer
from tests.soak import (
    BATCH,
    EPOCH_BATCHES,
    HANG_TIMEOUT,
    ITEM_TIMEOUT,
    ITEMS,
    SAVE_EVERY,
    WINDOW,
    data_faults,
)
from trainer import Brain, Stage, distributed
from trainer.data import BadItem

FOLDER = Path(sys.argv[1])
SEED, EPOCHS, PACE = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])


def note(what: str) -> None:
    """Note that a fault of the data has come."""
    with open(FOLDER / "met", "a") as file:
        file.write(f"{what}\n")


def asked(what: str) -> bool:
    """Return True in the one process that takes a request of the soak."""
    try:
        os.unlink(FOLDER / what)
    except FileNotFoundError:
        return False
    return True


class Points(Dataset[dict[str, Any]]):
    """Items of a regression, with faults in training."""

    def __init__(self, items: int, seed: int | None = None) -> None:
        self.items, self.seed = items, seed
        self.epoch, self.faults = 0, dict[int, str]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.faults = {} if self.seed is None else data_faults(self.seed, epoch)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, Any]:
        fault = self.faults.get(index, "")
        if fault == "bad file":
            note(f"{fault}, epoch {self.epoch}, item {index}")
            raise BadItem(f"item-{index}", "it is bad")
        if self.seed is not None and asked("hang"):
            (FOLDER / "hangs").touch()
            time.sleep(600)
        x = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return {
            "id": str(index),
            "x": x + 0.1 * torch.randn(16),
            "y": x.sum().sin(),
            "fault": fault,
        }


class Net(Brain):
    """A regression that meets the faults of its items, and notes where it is."""

    first: Any = None

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        if stage is Stage.TRAIN:
            self.mark()
            time.sleep(PACE)
            self.meet("OOM in forward", batch)
        y: Tensor = self.modules.net(batch["x"]).squeeze(-1)
        if stage is Stage.TRAIN and "OOM in backward" in batch["fault"]:
            y.register_hook(lambda _: self.meet("OOM in backward", batch))
        return y

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = (predictions.float() - batch["y"]).square().mean()
        if stage is Stage.TRAIN and "NaN" in batch["fault"]:
            note(f"NaN, epoch {self.progress.epoch}, batch {self.progress.step}")
            loss = loss * math.nan
        return loss

    def meet(self, fault: str, batch: Any) -> None:
        if fault in batch["fault"]:
            note(f"{fault}, epoch {self.progress.epoch}, batch {self.progress.step}")
            raise torch.OutOfMemoryError("out of memory, as the soak asked for")

    def mark(self) -> None:
        """Tell the soak which batch this process begins; batches are counted from the start."""
        progress, rank = self.progress, distributed.rank()
        batch = (progress.epoch - 1) * EPOCH_BATCHES + progress.step
        batch = max(batch, STATE.get("batch", 0))  # A skipped window is replayed for its report.
        STATE.setdefault("first", batch)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        STATE.update(batch=batch, pid=os.getpid(), memory=pages * os.sysconf("SC_PAGE_SIZE"))
        STATE["restarts"] = distributed.restarts()
        new = FOLDER / f"new-{rank}"
        new.write_text(json.dumps(STATE))
        os.replace(new, FOLDER / f"rank-{rank}")

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        return {"error": float(stage_loss)} if stage is Stage.VALID else None


STATE: dict[str, int] = {}  # Of this process, for the soak.


def fill_disk() -> None:
    """Make a write of a checkpoint fail where the soak asks for it."""
    write = os.write

    def write_or_fail(handle: int, data: Any) -> int:
        if "/checkpoints/" in os.readlink(f"/proc/self/fd/{handle}") and asked("full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    os.write = write_or_fail


def train(run: trainer.Run) -> None:
    net = nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)
    )
    run.checkpointer.keep_best({"loss": {"mode": "max", "n": 2, "weights_only": True}})
    brain = Net(
        {"net": net}, partial(torch.optim.AdamW, lr=1e-3), run.hparams, run.options,
        run.checkpointer,
    )  # fmt: skip
    loader = {"batch_size": BATCH, "collate_fn": default_collate}
    brain.fit(
        range(1, EPOCHS + 1), Points(ITEMS, SEED), Points(32),
        train_loader_kwargs={**loader, "num_workers": 1 + SEED % 2}, valid_loader_kwargs=loader,
    )  # fmt: skip
    state = {"modules": brain.modules.state_dict(), "optimizer": brain.optimizer.state_dict()}
    torch.save(state, FOLDER / f"end-{distributed.rank()}.pt")


def main() -> None:
    torch.set_num_threads(1)
    fill_disk()
    trainer.launch(
        train,
        {
            "seed": SEED, "device": "cpu", "grad_accumulation_factor": WINDOW, "ema_decay": 0.99,
            "precision": ("fp32", "bf16")[SEED // 2 % 2], "checkpoint_every_steps": SAVE_EVERY,
            "log_interval": 2, "monitor_every": 50, "drift_check_every": 20,
            "item_timeout": ITEM_TIMEOUT, "hang_timeout": HANG_TIMEOUT, "nonfinite_patience": 3,
            "progressbar": False,
        },
        output_folder=FOLDER / "run",
    )  # fmt: skip


if __name__ == "__main__":
    main()
