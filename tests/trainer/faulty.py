"""A small training program that meets a fault at a named moment, for tests on real processes.

python faulty.py toy.yaml --moment "item 13" --fault hang
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainer
from trainer import Brain, Stage

YAML = """
seed: 5
items: 48
workers: 0
slow: 0.0
moment: none
fault: none
rank: null
net: !new:torch.nn.Sequential
  - !new:torch.nn.Linear [6, 8]
  - !new:torch.nn.Dropout [0.2]
  - !new:torch.nn.Linear [8, 2]
epoch_counter: !new:trainer.EpochCounter
  limit: 2
checkpoint_every_steps: 4
neutral_keys: [slow, moment, fault, rank]
progressbar: false
"""
RANK = os.environ.get("RANK", "0")


class Faults:
    """Causes the fault of the hyperparameters at their moment, once in all starts of a run."""

    def __init__(self, run: trainer.Run) -> None:
        h = run.hparams
        self.moment, self.fault, self.rank = h["moment"], h["fault"], h["rank"]
        self.folder = Path.cwd()
        self.saves = self.loads = 0

    def at(self, moment: str) -> None:
        if moment != self.moment or self.rank not in (None, int(RANK)):
            return
        mark = self.folder / f"met-{RANK}"
        if mark.exists():
            return
        mark.write_text(str(os.getpid()))
        for fault in self.fault.split():
            if fault.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, fault))
                time.sleep(0.01)
            else:
                getattr(self, fault)()

    def hang(self) -> None:
        time.sleep(600)

    def hang_deaf(self) -> None:
        """Hang in a loop that swallows every exception."""
        end = time.monotonic() + 600
        while time.monotonic() < end:
            try:
                time.sleep(600)
            except BaseException:
                continue

    def hang_in_c(self) -> None:
        """Hang in a read that begins again after each signal, with no code of Python between."""
        libc = ctypes.CDLL(None)
        path = self.folder / f"pipe-{RANK}"
        os.mkfifo(path)
        file, buffer = os.open(path, os.O_RDWR), ctypes.create_string_buffer(1)
        libc.read(file, buffer, 1)  # SA_RESTART is off: the first signal ends it.
        lock = ctypes.create_string_buffer(64)
        libc.pthread_mutex_init(lock, None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)

    def state_dict(self) -> dict[str, int]:
        self.saves += 1
        self.at(f"save {self.saves}")
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass

    def raise_value_error(self) -> None:
        raise ValueError("the number of speakers is odd")

    def divide(self) -> None:
        _ = 1 / 0

    def multiply(self) -> None:
        _ = torch.zeros(2, 3) @ torch.zeros(2, 3)


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: int, faults: Faults) -> None:
        self.items, self.faults = items, faults

    def __len__(self) -> int:
        return self.items

    def name_of(self, index: int) -> str:
        return f"take{index}.wav"

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        x += 0.01 * torch.rand(6)  # Of the global generator.
        self.faults.loads += 1
        self.faults.at(f"item {index}")
        self.faults.at(f"load {self.faults.loads}")
        return {"id": str(index), "x": x, "y": int(x.sum() > 0)}


class Net(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        time.sleep(self.hparams.slow)
        self.faults.at(f"{stage.value} {self.step} of {self.epoch}")
        Path(f"pid-{RANK}").write_text(str(os.getpid()))
        output: Tensor = self.modules.net(batch.x.data)
        return output

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return nn.functional.cross_entropy(predictions, batch.y)

    def on_fit_start(self) -> None:
        self.faults.at("fit start")


def train(run: trainer.Run) -> dict[str, float]:
    h, faults, none = run.hparams, Faults(run), Faults(run)
    none.moment = "none"
    faults.at("start")
    adam = lambda params: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
    brain = Net({"net": h["net"]}, adam, h, run.options, run.checkpointer)
    brain.faults = faults
    load = {"batch_size": 4, "num_workers": h["workers"]}
    brain.fit(
        h["epoch_counter"], Items(h["items"], faults), Items(8, none),
        train_loader_kwargs=load, valid_loader_kwargs={"batch_size": 4},
    )  # fmt: skip
    faults.at("between")
    loss = brain.evaluate(Items(8, none), test_loader_kwargs={"batch_size": 4})
    torch.save(brain.modules.state_dict(), f"final-{RANK}.pt")
    return {"loss": loss}


def main(folder: str, argv: list[str], hangup: Any) -> None:
    """Be a run: a forked process with a session, a folder and an output of its own."""
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGHUP, hangup)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    trainer.main(train, argv)


if __name__ == "__main__":
    trainer.main(train)
