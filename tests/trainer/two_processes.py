"""Two processes that go through many small runs together; each stores what came out on its side.

What a run on one process gives, the tests work out by the same functions.
"""

import copy
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trainer import Brain, NonFiniteError, Stage, distributed, signals, state
from trainer.checkpoint import Checkpointer
from trainer.distributed.replica_check import DriftError
from trainer.metrics import Mean
from trainer.schedules import EarlyStopping, WarmupDecay

from . import resuming
from .clipping_kinds import KINDS
from .small import poison

ROUNDS = 7  # Batches of each rank in an epoch: with windows of 3 the last is of 1.
SIZES = (3, 5, 1, 4, 2, 6, 3)


# ------------------------------------------------------------------------------------- what trains


class Points(Dataset):
    """Items for a regression; their number leaves a last batch that is not full."""

    def __init__(self, dtype: torch.dtype = torch.float64, items: int = 29) -> None:
        numbers = torch.Generator().manual_seed(1)
        self.x = torch.randn(items, 3, generator=numbers, dtype=torch.float64).to(dtype)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.x[index].sum().sin(), "id": str(index)}


def batches(dtype: torch.dtype = torch.float64, sizes: Sequence[int] = SIZES) -> list[Any]:
    """Ragged batches for two ranks, dealt in turn; every third one takes a branch."""
    numbers = torch.Generator().manual_seed(2)
    made = []
    for i in range(2 * ROUNDS):
        x = torch.randn(sizes[i % len(sizes)], 3, generator=numbers, dtype=torch.float64).to(dtype)
        made.append({"x": x, "y": x.sum(1).sin(), "branch": x.new_full((len(x),), i % 3 == 0)})
    return made


def joined(parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What one process sees where two see each of two batches."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs]


class Line(Brain):
    """The default `fit_batch`; part of the network is for some batches, part of it for none."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[Any] = []

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        x = batch["x"].data if isinstance(batch["x"], tuple) else batch["x"]
        y = self.modules.net(x).squeeze(-1)
        if "branch" in batch and bool(batch["branch"].any()):  # Else this rank does not use it.
            y = y + batch["branch"] * self.modules.branch(x).squeeze(-1)
        return y

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions - batch["y"]).square().mean()

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
        self.losses.append(stage_loss)


class Twice(Line):
    """Two forward passes of one network before the backward pass."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        once = super().compute_forward(batch, stage)
        return once + super().compute_forward({**batch, "x": batch["x"] ** 2}, stage)


class Tabular(Line):
    """With an embedding whose gradients are in sparse layout; some batches use none of it."""

    def __init__(self, modules: dict[str, nn.Module], *arguments: Any, **named: Any) -> None:
        dtype = next(modules["net"].parameters()).dtype
        table = nn.Embedding(5, 1, sparse=True).to(dtype)
        super().__init__({**modules, "table": table}, *arguments, **named)

    def init_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.modules.parameters(), lr=0.1)
        self.optimizer.register_step_pre_hook(lambda *_: self.check_layout())

    def check_layout(self) -> None:
        grad = self.modules.table.weight.grad
        assert grad is None or grad.is_sparse

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        y = super().compute_forward(batch, stage)
        if bool(batch["branch"].any()):
            rows = (batch["x"][:, 0] * 10).long() % 5
            y = y + batch["branch"] * self.modules.table(rows).squeeze(-1)
        return y


class Players(Line):
    """Two players; with ``frozen_judge`` the second one trains against constants."""

    frozen_judge = True

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "d": torch.optim.Adam(self.modules.branch.parameters(), lr=0.02),
            "g": torch.optim.Adam(self.modules.net.parameters(), lr=0.01),
        }

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        judge, x = self.modules.branch, batch["x"]
        fake = x + self.modules.net(x)
        loss_d = (judge(x) - 1).square().mean() + judge(fake.detach()).square().mean()
        self.optimize(loss_d, "d")
        if self.frozen_judge:
            with self.frozen("d"):
                loss_g = (judge(fake) - 1).square().mean()
        else:
            loss_g = (judge(fake) - 1).square().mean()
        self.optimize(loss_g, "g")
        return {"d": loss_d, "g": loss_g}


class Thawed(Players):
    frozen_judge = False


class ByHand(Line):
    """Steps by itself, on batches of one size: nobody weighs them."""

    def fit_batch(self, batch: Any) -> Tensor:
        loss = self.compute_objectives(self.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def make(
    kind: type[Line] = Line,
    dtype: torch.dtype = torch.float64,
    folder: Path | None = None,
    hparams: Mapping[str, Any] | None = None,
    **options: Any,
) -> Line:
    """A Brain whose weights differ by rank until the framework makes them equal."""
    torch.manual_seed(10 + distributed.rank())
    modules = {
        "net": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        "branch": nn.Linear(3, 1),
        "never": nn.Linear(2, 2),  # Reached by no loss; weight decay must not move it.
    }
    options = {"device": "cpu", "progressbar": False, "max_grad_norm": 0.5, **options}
    return kind(
        {name: module.to(dtype) for name, module in modules.items()},
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        {"schedule": lambda opt: WarmupDecay(opt, 2, 40), **(hparams or {})}
        if not issubclass(kind, Players)
        else hparams,
        options,
        None if folder is None else Checkpointer(folder, keep_last=9),
    )


def weights(brain: Brain) -> Tensor:
    """All parameters and buffers in one vector."""
    return torch.cat([t.detach().double().reshape(-1) for t in brain.modules.state_dict().values()])


def train(
    kind: type[Line] = Line,
    dtype: torch.dtype = torch.float64,
    data: Any = None,
    loader: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Two epochs; what they end with."""
    brain = make(kind, dtype, **options)
    data = batches(dtype) if data is None else data
    if distributed.world_size() == 1 and isinstance(data, list):
        data = joined(data)
    brain.fit(range(1, 3), data, train_loader_kwargs=loader)
    losses = [loss if isinstance(loss, dict) else {"loss": loss} for loss in brain.losses]
    return {
        "weights": weights(brain), "losses": losses, "steps": brain.optimizer_step,
        "never": brain.modules.never.weight.detach().clone(),
        "clip": {n: getattr(u.clip, "state_dict", dict)() for n, u in brain.updates.items()},
    }  # fmt: skip


PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32}
SAME = {
    "default": {},
    "window": {"grad_accumulation_factor": 3},  # The last one of an epoch is of 1 batch,
    "window-of-4": {"grad_accumulation_factor": 4},  # 3 batches,
    "window-of-5": {"grad_accumulation_factor": 5},  # 2 batches.
    "value-clip": {"clip": "value", "max_grad_norm": 0.05},
    "forwards": {"kind": Twice},
    "sparse": {"kind": Tabular},
    "sparse-window": {"kind": Tabular, "grad_accumulation_factor": 3},
    "players": {"kind": Players},
    "players-window": {"kind": Players, "grad_accumulation_factor": 3},
    "players-thawed": {"kind": Thawed, "grad_accumulation_factor": 2},
}


# Those that learn, and those that are applied to units and elements.
CLIPS = ("pattern", "gradual-linear", "value-auto", "auto", "median", "z", "adagc", "agc", "spam")


def size_of_batch() -> int:
    """Of one process, such that two see together what one sees."""
    return 8 // distributed.world_size()


def by_hand() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ByHand.fit_batch calls backward", UserWarning)
        return train(ByHand, data=batches(sizes=(4,)))


def same_as_one() -> dict[str, Any]:
    """Runs that must end as one process does on the joined batches."""
    runs = {
        f"{name}-{precision}": train(dtype=dtype, **options)
        for name, options in SAME.items()
        for precision, dtype in PRECISIONS.items()
    }
    for name in CLIPS:  # Each made anew: a clipper with a history belongs to one run.
        options = {"clip": KINDS[name](), "max_grad_norm": None, "grad_accumulation_factor": 2}
        runs[f"{name}-fp64"] = train(**options)
    for name, window in (("dataset", 1), ("dataset-window", 3)):
        loader = {"batch_size": size_of_batch()}
        runs[f"{name}-fp64"] = train(data=Points(), loader=loader, grad_accumulation_factor=window)
    runs["by-hand-fp64"] = by_hand()
    return runs


# ------------------------------------------------------------------------- what is agreed by ranks


class Poisoned(Line):
    """On one rank a batch has a loss or a gradient that is not finite."""

    kind = "loss"
    value = float("nan")
    bad: tuple[int, ...] = (4,)

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        if self.step == self.first:
            self.seen = copy.deepcopy(picture(self))

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == self.last:
            self.left = copy.deepcopy(picture(self))

    @property
    def first(self) -> int:
        """The first batch of the window with the first bad one."""
        size = self.options.grad_accumulation_factor
        return (self.bad[0] - 1) // size * size + 1

    @property
    def last(self) -> int:
        return self.first + self.options.grad_accumulation_factor - 1

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        loss = loss * (1e-2 if self.options.precision == "fp16" else 1.0)  # For its first scale.
        if self.step in self.bad and distributed.rank() == 1:
            return loss + self.harm()
        return loss

    def harm(self) -> Any:
        return self.value if self.kind == "loss" else poison(self.modules.net[0].weight, self.value)

    def batch_ids(self, batch: Any) -> list[str]:
        return [f"rank {distributed.rank()} batch {self.step}"]


class PoisonedPlayers(Poisoned, Players):
    """The second of two players is poisoned; the first goes on."""

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        self.on_fit_batch_start(batch, True)
        result = Players.fit_batch(self, batch)
        self.on_fit_batch_end(batch, None, None, True)
        return result

    def optimize(self, loss: Tensor, name: str | None = None, **named: Any) -> Any:
        if name == "g" and self.step in self.bad and distributed.rank() == 1:
            loss = loss + self.harm()
        return super().optimize(loss, name, **named)


def picture(brain: Brain) -> dict[str, Any]:
    """What a skipped step must leave as it was."""
    whole = state.common(brain)
    del whole["position"]
    return {**whole, "mean": brain.average.state_dict(), "step": brain.optimizer_step}


SKIPS: dict[str, dict[str, Any]] = {
    "loss-nan": {},
    "loss-inf": {"value": float("inf")},
    "element-nan": {"kind": "gradient"},
    "element-inf": {"kind": "gradient", "value": float("inf")},
    "loss-in-window": {"grad_accumulation_factor": 3},
    "element-in-window": {"kind": "gradient", "grad_accumulation_factor": 3},
    "window-of-players": {"players": True, "grad_accumulation_factor": 3, "kind": "gradient"},
    "player-loss": {"players": True},
    "player-element": {"players": True, "kind": "gradient"},
}


def poisoned(bad: tuple[int, ...], players: bool = False, **settings: Any) -> Poisoned:
    """A Brain with those batches bad."""
    options = {key: value for key, value in settings.items() if key not in ("kind", "value")}
    brain = make(PoisonedPlayers if players else Poisoned, ema_decay=0.9, **options)
    assert isinstance(brain, Poisoned)
    brain.bad = bad
    brain.kind, brain.value = settings.get("kind", "loss"), settings.get("value", float("nan"))
    return brain


def skips() -> dict[str, Any]:
    results = {}
    for name, settings in SKIPS.items():
        brain = poisoned((5,), **settings)
        brain.fit(range(1, 2), batches())
        results[name] = {
            "before": brain.seen, "after": brain.left, "weights": weights(brain),
            "counts": dict(brain.journal.counts), "patience": brain.patience.count,
            "finite": bool(weights(brain).isfinite().all()),
        }  # fmt: skip
    return results


def patience() -> dict[str, Any]:
    """A rank that is never finite again ends the run of both."""
    brain = poisoned((3, 4, 5, 6, 7), nonfinite_patience=2)
    started = time.monotonic()
    try:
        brain.fit(range(1, 2), batches())
    except NonFiniteError as error:
        return {
            "message": str(error), "seconds": time.monotonic() - started, "step": brain.step,
            "weights": weights(brain),
        }  # fmt: skip
    return {}


def masked() -> dict[str, Any]:
    """With skip_nonfinite_grads both leave out the same parameter."""
    brain = poisoned((5,), kind="gradient", skip_nonfinite_grads=True)
    brain.fit(range(1, 2), batches())
    moved = {
        name: not torch.equal(tensor, brain.left["modules"][name])
        for name, tensor in brain.seen["modules"].items()
    }
    return {"moved": moved, "weights": weights(brain), "steps": brain.optimizer_step}


def half() -> dict[str, Any]:
    """One rank overflows: the scale of both goes down, once."""
    brain = poisoned((2,), kind="gradient", value=float("inf"), dtype=torch.float32,
                     precision="fp16")  # fmt: skip
    brain.fit(range(1, 2), batches(torch.float32))
    return {
        "scale": brain.updates["main"].scaler.get_scale(), "counts": dict(brain.journal.counts),
        "patience": brain.patience.count, "weights": weights(brain),
        "schedule": brain.updates["main"].schedule.last_epoch, "steps": brain.optimizer_step,
    }  # fmt: skip


class Drifting(Line):
    """On rank 1 one element becomes the next larger number, behind the framework's back."""

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == 3 and distributed.rank() == 1:
            element = self.modules.net[2].weight.data[0, 1]
            element.copy_(torch.nextafter(element, element.new_tensor(math.inf)))


def drifting() -> dict[str, Any]:
    """The smallest difference between ranks ends the run of both, at the next check."""
    results: dict[str, Any] = {}
    for every in (1, 3, 5, 0):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            brain = make(Drifting, dtype, drift_check_every=every)
            key = f"{every}-{str(dtype)[6:]}"
            try:
                brain.fit(range(1, 2), batches(dtype))
                results[key] = {"message": "", "step": brain.step}
            except DriftError as error:
                results[key] = {"message": str(error), "step": brain.step}
    return results


# --------------------------------------------------------------------------- what decides a run


class Judged(Line):
    """Returns a metric that each rank has worked out from its own part alone."""

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        rank = distributed.rank()
        return {"own": float(epoch or 0) * (1 - 2 * rank), "fair": Mean_of(rank)}


def Mean_of(rank: int) -> float:
    """A metric that is gathered before it is returned."""
    mean = Mean()
    mean.update(float(rank), weight=1.0 + rank)
    value = mean.reduce().value()
    assert isinstance(value, float)
    return value


def stopping() -> dict[str, Any]:
    """Ranks whose metrics disagree stop together all the same."""
    stop = EarlyStopping("own", mode="max", patience=2)  # On rank 1 it falls with each epoch.
    brain = make(Judged, hparams={"early_stopping": stop})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        brain.fit(range(1, 6), batches())
    return {
        "epoch": brain.epoch, "weights": weights(brain), "best": stop.best,
        "warnings": [str(each.message) for each in caught],
    }  # fmt: skip


def limits(folder: Path) -> dict[str, Any]:
    """A limit of steps, saves by steps, and saves by a clock that only one rank finds late."""
    brain = make(folder=folder / "steps", optimizer_step_limit=10, checkpoint_every_steps=3)
    brain.fit(range(1, 9), batches())
    names = sorted(each.name for each in brain.checkpointer.list_checkpoints())
    late = make(folder=folder / "clock", checkpoint_every_minutes=60)
    late.keeper._saved_at -= 7200 * distributed.rank()
    late.fit(range(1, 2), batches())
    return {
        "steps": brain.optimizer_step, "names": names, "weights": weights(brain),
        "clock": sorted(each.name for each in late.checkpointer.list_checkpoints()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------- evaluation


class Reader(Line):
    """Notes what it evaluates."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.ids: list[str] = []

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        self.ids += batch["id"]
        return super().evaluate_batch(batch, stage)

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        everyone = distributed.gather(self.ids)
        return {"items": sum(map(len, everyone)), "distinct": len(set(sum(everyone, [])))}


def evaluations() -> dict[str, Any]:
    """Loss and metrics over data that does not divide by ranks."""
    results = {}
    few = [{**b, "id": [f"{i}-{k}" for k in range(len(b["x"]))]} for i, b in enumerate(batches())]
    for name, data, loader in (
        ("dataset", Points(items=11), {"batch_size": 2}),
        ("one-batch", Points(items=3), {"batch_size": 8}),
        ("list", few[:5], None),
    ):
        brain = make(Reader)
        torch.manual_seed(4)
        brain.modules.load_state_dict(make(Reader).modules.state_dict())
        for p in brain.modules.parameters():
            nn.init.constant_(p, 0.3)
        before = torch.get_rng_state()
        loss = brain.evaluate(data, test_loader_kwargs=loader)
        results[name] = {
            "loss": loss, "ids": brain.ids, **brain.test_metrics,
            "same_rng": torch.equal(before, torch.get_rng_state()),
            "training": brain.modules.training,
        }  # fmt: skip
    return results


class Normed(Line):
    """Batch statistics are each rank's own; in the end rank 0's count."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return super().compute_forward({**batch, "x": self.modules.norm(batch["x"])}, stage)


def statistics() -> dict[str, Any]:
    torch.manual_seed(distributed.rank())
    brain = make(Normed, ema_decay=0.9)
    brain.modules["norm"] = nn.BatchNorm1d(3).double()
    brain.fit(range(1, 2), batches(sizes=(4,)), batches(sizes=(3,)))
    average = brain.weight_average.state_dict()["average"]
    return {
        "mean": brain.modules.norm.running_mean.clone(), "average": average["norm.running_mean"],
        "losses": brain.losses, "weights": weights(brain),
    }  # fmt: skip


# --------------------------------------------------------------------------------- going on later


def even() -> resuming.Sentences:
    """Items enough for every rank to have several in each batch, as batch statistics need."""
    return resuming.Sentences(44)


RESUMED = {
    "default": (resuming.Setting(window=4, data=even, epochs=lambda: range(1, 3)), (3, 6, 8)),
    "players": (
        resuming.Setting(
            resuming.Adversary, window=2, precision="bf16", data=even, epochs=lambda: range(1, 3)
        ),
        (3, 6),
    ),
    "workers": (resuming.Setting(workers=1, data=even, epochs=lambda: range(1, 2)), (2,)),
    "list": (
        resuming.Setting(
            precision="fp16", schedule="newbob", data=resuming.batches, loader=None,
            epochs=lambda: range(1, 3),
        ),
        (2, 7),
    ),
}  # fmt: skip


def resumptions(folder: Path) -> dict[str, Any]:
    """Each rank compares its own side of a resumed run with that of the one that never stopped."""
    results = {}
    for name, (setting, stops) in RESUMED.items():
        straight = resuming.run(setting, folder / name, stops, resuming.Setting.fit)
        found = {}
        for stop in stops:
            into = folder / f"{name}-{stop}"
            if distributed.is_main():
                resuming.stopped(folder / name, f"stop-{stop}", into)
            distributed.barrier()
            resumed = setting.fit(setting.make(into, seed=50 + distributed.rank()))
            found[stop] = list(resuming.differences(straight.test.trace[stop:], resumed.test.trace))
            found[stop] += resuming.differences(resuming.whole(straight), resuming.whole(resumed))
        results[name] = {
            "found": found, "weights": weights(straight), "trace": straight.test.trace,
        }  # fmt: skip
    return results


ONE = resuming.Setting(data=lambda: resuming.Sentences(48), epochs=lambda: range(1, 2))


def widened(folder: Path) -> dict[str, Any]:
    """Two go on where one was stopped, after five batches."""
    if distributed.is_main():
        resuming.stopped(folder.parent / "one", "stop-5", folder)
    distributed.barrier()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        brain = ONE.fit(ONE.make(folder, seed=distributed.rank()))
    return {
        "ids": [id for entry in brain.test.trace for id in entry[2]],
        "steps": [entry[1] for entry in brain.test.trace],
        "weights": weights(brain),
    }


def tests_of_the_best(folder: Path) -> dict[str, Any]:
    """Both test with the weights of the same checkpoint, and have their own again."""
    brain = make(Reader, folder=folder)
    parts = [{**b, "id": [f"{i}"] * len(b["x"])} for i, b in enumerate(batches())]
    brain.fit(range(1, 4), parts, parts[:5])
    before = weights(brain)
    tested: list[Tensor] = []
    brain.on_evaluate_start = lambda **_: tested.append(weights(brain))
    loss = brain.evaluate(parts[:5], max_key="loss")
    losses = [each.meta["loss"] for each in brain.checkpointer.list_checkpoints()]
    return {
        "weights": weights(brain), "unchanged": torch.equal(before, weights(brain)),
        "tested": tested[0], "loss": loss, "losses": losses,
    }  # fmt: skip


def interruptions(folder: Path) -> dict[str, Any]:
    """One rank is told to stop, and both leave; in training and in validation."""
    results = {}
    signals.install()
    setting = resuming.Setting(data=even, epochs=lambda: range(1, 3))
    straight = resuming.run(setting, folder / "straight", (), resuming.Setting.fit)
    for moment in ("training", "validation"):
        brain = setting.make(folder / moment)
        calls = iter(range(1000))

        def tell(brain: Any, calls: Any = calls, moment: str = moment) -> None:
            if next(calls) == (moment == "training") and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(brain.test, {"training": "after", "validation": "valid"}[moment], tell)
        try:
            setting.fit(brain)
            code = 0
        except SystemExit as stop:
            code = int(str(stop.code))
        batches_seen = len(brain.test.trace)
        signals.reset()
        saved = brain.checkpointer.list_checkpoints()
        resumed = setting.fit(setting.make(folder / moment, seed=50 + distributed.rank()))
        found = list(resuming.differences(straight.test.trace[batches_seen:], resumed.test.trace))
        found += resuming.differences(resuming.whole(straight), resuming.whole(resumed))
        results[moment] = {"code": code, "found": found, "saved": len(saved), "seen": batches_seen}
    return results


# ------------------------------------------------------------------------------------- the verbs


def verbs() -> dict[str, Any]:
    rank = distributed.rank()
    tensors = [torch.full((2,), float(rank)), torch.tensor([rank], dtype=torch.int64)]
    distributed.broadcast_(tensors)
    long = {"rank": rank, "text": "ä" * (1 + 5000 * rank), "none": None, "list": [1.5, rank]}
    distributed.barrier()
    return {
        "rank": (rank, distributed.world_size(), distributed.local_rank(), distributed.is_main()),
        "agree": distributed.agree(rank == 0, rank == 1, False, True),
        "gather": [len(each["text"]) for each in distributed.gather(long)],
        "gather_exact": distributed.gather(0.1 + rank),
        "gather_nan": str(distributed.gather(float("nan"))[1 - rank]),
        "broadcast_object": distributed.broadcast_object({"from": rank}),
        "broadcast": tensors,
        "sum": distributed.sum_(torch.tensor([1.0 + rank, 2.0])),
        "smallest": distributed.smallest(7 - 3 * rank),
    }


def disagreements(folder: Path) -> dict[str, Any]:
    """What fails on one rank fails on both: a checkpoint that only rank 1 cannot use."""
    setting = resuming.Setting(epochs=lambda: range(1, 2), data=resuming.batches, loader=None)
    resuming.run(setting, folder, (), resuming.Setting.fit)
    if distributed.is_main():
        (found,) = folder.glob("saved/*/rank-1.pt")
        shutil.copy(found.with_name("rank-0.pt"), found)
    distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            setting.fit(setting.make(folder))
        except ValueError as error:
            return {"error": str(error), "warnings": [str(each.message) for each in caught]}
    return {}


PROPERTIES: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each
    for each in (
        verbs, same_as_one, skips, patience, masked, half, drifting, stopping, limits, evaluations,
        statistics, resumptions, widened, tests_of_the_best, interruptions, disagreements,
    )
}  # fmt: skip
WITH_FOLDER = (limits, resumptions, widened, tests_of_the_best, interruptions, disagreements)


def main(folder: Path) -> None:
    """Go through all of it; an error ends both processes, since nothing after it is in step.

    A run of one process, which they widen, must lie in its folder "one".
    """
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.start("cpu", timeout=timedelta(seconds=60))
    rank = distributed.rank()
    for name, work in PROPERTIES.items():
        random.seed(rank)
        started = time.monotonic()
        try:
            result = work(folder / name) if work in WITH_FOLDER else work()
        except BaseException:
            (folder / f"error-{rank}.txt").write_text(f"{name}: {traceback.format_exc()}")
            os._exit(1)
        result["took"] = time.monotonic() - started
        torch.save(result, folder / f"{name}-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
