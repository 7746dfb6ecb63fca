"""Stop and resume runs of Brains that have every kind of state, and compare how they end.

A run saves a checkpoint after each batch and goes on. To stop it after batch k, that checkpoint
alone is copied into a new folder, beside a log that is already further, as after a kill.
"""

import copy
import json
import random
import shutil
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from tests.trainer.small import ema_of, state_of, update_state
from trainer import Brain, Stage, distributed, signals
from trainer.checkpoint import Checkpointer
from trainer.schedules import EarlyStopping, NewBob, WarmupDecay

ITEMS, SIZE, EPOCHS = 43, 4, 3  # 11 batches an epoch, the last of 3 items
STEPS = 33
TIMES = ("seconds", "examples_per_second", "times", "memory", "padding")


class Sentences(Dataset):
    """Items that are augmented with random numbers of every kind."""

    def __init__(self, items: int = ITEMS) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(3, generator=torch.Generator().manual_seed(index))
        noise = torch.rand(()) + random.random() + np.random.rand()
        return {"id": f"s{index}", "x": x + 0.1 * noise, "y": x.sum()}


def batches() -> list[dict[str, Any]]:
    """Return as many items in a plain list of batches."""
    numbers = torch.Generator().manual_seed(0)
    sizes = [min(SIZE, ITEMS - start) for start in range(0, ITEMS, SIZE)]
    xs = [torch.randn(size, 3, generator=numbers) for size in sizes]
    return [
        {"id": [f"b{i}-{k}" for k in range(len(x))], "x": x, "y": x.sum(1)}
        for i, x in enumerate(xs)
    ]


class Endless:
    """An iterable without a length, which draws from the global generators."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in batches():
            yield {**batch, "x": batch["x"] + 0.1 * torch.rand(()) + random.random()}


class Lines(IterableDataset):
    """A dataset that can only be read from its beginning."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(ITEMS):
            yield Sentences()[index]


class Counting:
    """A stateful object that is registered nowhere."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.total = saved["total"]


class Learner(Brain):
    """Keeps state in all the ways that recipes do."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.early = 0  # Before the framework's own.
        super().__init__(*arguments, **named)
        # The test's own, in what is no state: what happened, batch by batch.
        self.test = SimpleNamespace(trace=[], after=lambda brain: None, valid=lambda brain: None)
        self.counting, self.dice = Counting(), random.Random(1)
        self.longest, self.best, self.validations = 0.0, "", 0
        self.recent, self.kinds = deque([0.0], maxlen=4), defaultdict(int)
        self.distinct: set[str] = set()
        self.flag = False
        self.metrics = {"a": Counting(), "b": [Counting()]}

    def on_fit_start(self) -> None:
        torch.rand(3), random.random(), np.random.rand()  # A resumed run must not notice.
        self.made_late, self.history = Counting(), []

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        x = batch["x"] if isinstance(batch["x"], Tensor) else batch["x"].data
        if stage is Stage.TRAIN:  # What a step draws comes from the run's own generators.
            x = x + 0.01 * (torch.randn(()) + random.random() + float(np.random.rand()))
            x = x + 0.01 * (self.dice.random() + self.hparams.numbers.random())
            x = x + 0.01 * torch.rand((), generator=self.hparams.generator)
        return self.modules.net(x).squeeze(-1)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return ((predictions.float() - batch["y"]) ** 2).mean()

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if stage is Stage.TRAIN:
            self.train_stats = {"batches": 0, "sum": torch.zeros(())}
            self.stage_total = Counting()
            self.flag = True
        if stage is Stage.VALID:
            self.validations += 1
            self.hparams.shared.total += 1000

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.count(float(loss), list(batch["id"]))

    def count(self, loss: float, ids: list[str]) -> None:
        """Keep numbers of the batch in every kind of state; call the hook of the test."""
        self.train_stats["batches"] += 1
        self.train_stats["sum"] += loss
        self.longest, self.best = max((self.longest, self.best), (np.float64(loss), ids[0]))
        self.recent.append(loss)
        self.history.append((self.step, torch.tensor(loss)))
        self.kinds[ids[0][-1]] += 1
        self.distinct.add(ids[0])
        self.flag, self.early = False, self.early + 1
        self.hparams.level *= 0.99
        several = [self.metrics["a"], *self.metrics["b"], self.stage_total, self.counting]
        for each in (*several, self.made_late, self.hparams.shared):
            each.total += loss
        self.test.trace.append((self.epoch, self.step, ids, loss, torch.rand(()).item()))
        self.test.after(self)

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        self.counting.total += 1
        self.test.valid(self)
        return super().evaluate_batch(batch, stage)

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        if stage is Stage.TRAIN:
            totals = distributed.all_gather_json([self.longest, self.stage_total.total])
            return {"largest": max(each[0] for each in totals), "total": totals[0][1]}
        numbers = distributed.all_gather_json(torch.rand(()).item())
        return {"validations": self.validations, "rand": numbers[-1]}


class Adversary(Learner):
    """Two players, each with an optimizer, and a `fit_batch` of its own."""

    def init_optimizers(self) -> None:
        opt = torch.optim.Adam
        self.optimizer_d = opt(self.modules.judge.parameters(), lr=0.02)
        self.optimizer_g = opt(self.modules.net.parameters(), lr=0.05)
        self.optimizers_dict = {"d": self.optimizer_d, "g": self.optimizer_g}

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        judge = self.modules.judge
        with self.autocast():
            fake = self.compute_forward(batch, Stage.TRAIN).float()
            both = torch.stack([judge(batch["y"][:, None]), judge(fake.detach()[:, None])])
            loss_d = (both[0] - 1).square().mean() + both[1].square().mean()
        self.optimize(loss_d, "d")
        with self.frozen("d"), self.autocast():
            loss_g = (judge(fake[:, None]) - 1).square().mean()
        self.optimize(loss_g, "g")
        self.count(loss_g.item(), list(batch["id"]))
        return {"d": loss_d, "g": loss_g}


class Undecided(Adversary):
    """The players that train depend on the batch with which a window opens."""

    fit_batch = Brain.fit_batch

    def freeze_optimizers(self, optimizers: dict[str, Any]) -> dict[str, Any]:
        return optimizers if self.step % 2 else {"g": optimizers["g"]}

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss + self.modules.judge(predictions.float()[:, None]).square().mean()


class ByHand(Learner):
    """Calls backward and step itself, and accumulates by a counter."""

    def fit_batch(self, batch: Any) -> Tensor:
        loss = self.compute_objectives(self.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN)
        (loss / 3).backward()
        if self.early % 3 == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.count(loss.item(), list(batch["id"]))
        return loss.detach()


SCHEDULES = {
    "step": lambda opt: WarmupDecay(opt, warmup_steps=3, total_steps=40),
    "newbob": lambda opt: NewBob(opt, threshold=0.5),
    "torch": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.7),
}


@dataclass
class Setting:
    """One combination of Brain, options, data and epochs."""

    brain: type[Learner] = Learner
    dropout: float = 0.5
    precision: str = "fp32"
    window: int = 1
    workers: int = 0
    schedule: str = "step"
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = Sentences
    loader: dict[str, Any] | None = field(default_factory=lambda: {"batch_size": SIZE})
    epochs: Callable[[], Any] = lambda: range(1, EPOCHS + 1)
    valid: bool = True
    patience: int = 3
    keep: int = 1
    width: int = 6
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    groups: dict[str, Any] | None = None

    def make(self, folder: Path, seed: int = 0) -> Learner:
        """Return a new Brain, with weights and generators that depend on ``seed``."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        net = nn.Sequential(
            nn.Linear(3, self.width),
            nn.BatchNorm1d(self.width),
            nn.Tanh(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, 1),
        )
        judge = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        several = issubclass(self.brain, Adversary)
        schedule = SCHEDULES[self.schedule]
        hparams = {
            "schedule": {"d": schedule, "g": SCHEDULES["step"]} if several else schedule,
            "early_stopping": EarlyStopping("loss", patience=self.patience, min_delta=0.01),
            "shared": Counting(),
            "level": 1.0,
            "generator": torch.Generator().manual_seed(seed),
            "numbers": np.random.default_rng(seed),
            "epoch_counter": self.epochs(),
            "param_groups": self.groups,
        }
        options = {
            "device": "cpu", "precision": self.precision, "progressbar": False, "seed": 5,
            "grad_accumulation_factor": self.window, "ema_decay": 0.8, "log_interval": 2,
            "max_grad_norm": 0.5, "output_folder": str(folder), **self.options,
        }  # fmt: skip
        return self.brain(
            {"net": net, **({"judge": judge} if several else {})},
            lambda params: self.optimizer(params, lr=0.05, weight_decay=0.01),
            hparams,
            options,
            Checkpointer(folder / "saved", keep_last=self.keep),
        )

    def fit(self, brain: Learner) -> Learner:
        """Train to the end of the run."""
        loader = None if self.loader is None else {**self.loader, "num_workers": self.workers}
        brain.fit(
            brain.hparams.epoch_counter,
            self.data(),
            Sentences(9) if self.valid else None,
            train_loader_kwargs=loader,
            valid_loader_kwargs={"batch_size": 3},
        )
        return brain


def saving(*stops: int) -> Callable[[Learner], None]:
    """Return a hook that saves after these batches, counted over the run."""

    def save(brain: Learner) -> None:
        batch = len(brain.test.trace)
        if batch in stops:
            brain.checkpointer.save_checkpoint(name=f"stop-{batch}")

    return save


Program = Callable[[Setting, Learner], Learner]


def run(setting: Setting, folder: Path, stops: Iterable[int], program: Program) -> Learner:
    """Run without a stop, saving after these batches."""
    brain = setting.make(folder)
    brain.test.after = saving(*stops)
    return program(setting, brain)


def resume(setting: Setting, folder: Path, name: str, into: Path, program: Program) -> Learner:
    """Resume from a checkpoint of a run, with a new Brain."""
    stopped(folder, name, into)
    return program(setting, setting.make(into, seed=99))


def check(
    setting: Setting, folder: Path, stops: Iterable[int], program: Program = Setting.fit
) -> Learner:
    """Check that runs resumed after each of these batches end as the one without a stop."""
    straight = run(setting, folder / "straight", stops, program)
    for stop in stops:
        resumed = resume(
            setting, folder / "straight", f"stop-{stop}", folder / f"after-{stop}", program
        )
        assert_exact(straight, resumed, stop)
    return straight


def stopped(folder: Path, name: str, into: Path) -> None:
    """Make a folder as a kill leaves it: one checkpoint, and a log that is already further."""
    shutil.copytree(folder / "saved" / name, into / "saved" / name)
    shutil.copy(folder / "metrics.jsonl", into)


# The attributes of a `Learner` that hooks change, by how they are compared: as plain values,
# by their state_dict, and random generators.
VALUES = (
    "early", "longest", "best", "validations", "recent", "kinds", "distinct", "flag", "history",
    "train_stats",
)  # fmt: skip
COUNTERS = ("counting", "made_late", "stage_total")


def final_state(brain: Learner) -> dict[str, Any]:
    """Return a copy of everything that a run ends with, collected without `trainer`'s help."""
    hparams, own = brain.hparams, vars(brain)
    user = {name: own[name] for name in VALUES if name in own}
    user |= {name: own[name].total for name in COUNTERS if name in own}
    user |= {
        "metrics": [brain.metrics["a"].total, brain.metrics["b"][0].total],
        "dice": brain.dice.getstate(),
        "shared": hparams.shared.total,
        "level": hparams.level,
        "generator": hparams.generator.get_state(),
        "numbers": hparams.numbers.bit_generator.state,
        "early_stopping": vars(hparams.early_stopping),
        "epoch_counter": getattr(hparams.epoch_counter, "current", None),
    }
    return {**brain_state(brain), "user": copy.deepcopy(user), "log": log(brain)}


def brain_state(brain: Brain) -> dict[str, Any]:
    """Return a copy of what every Brain ends with: weights, optimizers, counters, generators."""
    average = ema_of(brain)
    name, keys, *rest = np.random.get_state()
    state = {
        "modules": dict(brain.modules.state_dict()),
        "gradients": {name: p.grad for name, p in brain.modules.named_parameters()},
        "trainable": {name: p.requires_grad for name, p in brain.modules.named_parameters()},
        "updates": {name: update_state(update) for name, update in brain.updates.items()},
        "weight_average": None if average is None else state_of(average),
        "counters": (brain.epoch, brain.step, brain.optimizer_step),
        "generators": (torch.get_rng_state(), random.getstate(), (name, keys.tolist(), rest)),
    }
    return copy.deepcopy(state)


def log(brain: Learner) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without their times."""
    path = Path(brain.options.output_folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Yield where two states differ, to the bit."""
    if isinstance(a, np.float64):  # A checkpoint makes a float of it.
        a, b = float(a), float(b)
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{where}: {a} and {b}"
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield f"{where}: keys {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple, deque)):
        if len(a) != len(b):
            yield f"{where}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}[{i}]")
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"


def differing(straight: Learner, resumed: Learner, stop: int) -> list[str]:
    """Return where a run resumed after ``stop`` batches saw or ended otherwise, to the bit."""
    ends = [final_state(straight), final_state(resumed)]
    if not resumed.test.trace:  # No stage began that would have made it.
        for end in ends:
            end["user"].pop("stage_total", None)
    seen = differences(straight.test.trace[stop:], resumed.test.trace, "trace")
    return [*seen, *differences(*ends)]


def assert_exact(straight: Learner, resumed: Learner, stop: int) -> None:
    """Check that a run resumed after ``stop`` batches saw and ended the same, to the bit."""
    found = differing(straight, resumed, stop)
    assert not found, f"stopped after batch {stop}: " + "\n".join(found[:20])


def on_all_ranks(
    setting: Setting, folder: Path, stops: Iterable[int]
) -> tuple[Learner, dict[int, list[str]]]:
    """Run on all ranks; return the run, and for each stop where a resumed run differs."""
    straight, found = run(setting, folder, stops, Setting.fit), {}
    for stop in stops:
        into = folder / f"after-{stop}"
        if distributed.is_main():
            stopped(folder, f"stop-{stop}", into)
        distributed.barrier()
        resumed = setting.fit(setting.make(into, seed=50 + distributed.rank()))
        found[stop] = differing(straight, resumed, stop)
    return straight, found


def main(folder: str) -> None:
    """Train up to the seventh batch, print a line, and wait for a signal to stop."""
    signals.install()
    brain = Setting().make(Path(folder))

    def wait(brain: Learner) -> None:
        if len(brain.test.trace) == 7:
            print("seven", flush=True)
            while signals.requested() is None:
                time.sleep(0.01)

    brain.test.after = wait
    Setting().fit(brain)


if __name__ == "__main__":
    main(*sys.argv[1:])
