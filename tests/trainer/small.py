"""Helpers of the loop's tests: states to compare, gradients to poison, small Brains."""

from __future__ import annotations

import copy
import math
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer import Brain, Stage, StepReport
from trainer.optim import step
from trainer.optim.step import Update


def snapshot(*parts: Any) -> list[Any]:
    return copy.deepcopy([part.state_dict() for part in parts])


def same(a: Any, b: Any) -> bool:
    """Return True if two states are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def poison(parameter: Tensor, value: float = math.nan) -> Tensor:
    """A finite number, 0, whose gradient is NaN (or infinite) in one element of the parameter."""
    element = parameter.reshape(-1)[0]
    if math.isnan(value):
        return (element * 0).sqrt()
    return (element - element.detach()).abs().sqrt()


def optimize(
    updates: list[Update], loss: Tensor, weight: Any = 1.0, retain_graph: bool = False,
    last: bool = False,
) -> list[StepReport]:  # fmt: skip
    """Give a loss to optimizers, as `Brain.optimize` does."""
    step.accumulate(updates, loss, weight, retain_graph, last)
    return step.finish(updates, weight, last)


def net(seed: int = 0, norm: bool = False) -> nn.Sequential:
    """4 → 6 → 2, the same for the same seed; with running statistics if ``norm``."""
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(6) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2))


def batches(number: int, size: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Named examples with inputs (size, 4) and targets (size, 2)."""
    torch.manual_seed(seed)
    return [
        {
            "id": [f"utt{number}-{item}" for item in range(size)],
            "x": torch.randn(size, 4),
            "y": torch.randn(size, 2),
        }
        for number in range(number)
    ]


def spoilt(batch: dict[str, Any], how: str) -> dict[str, Any]:
    """A batch with a NaN in its input, a loss that is not finite, or a gradient that is not."""
    if how == "input":
        x = batch["x"].clone()
        x[0, 0] = math.nan
        return {**batch, "x": x}
    return {
        **batch,
        **{"nan": {"factor": math.nan}, "inf": {"factor": math.inf}}.get(how, {how: True}),
    }


class Regressor(Brain):
    """One network, the default fit_batch."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = (predictions.float() - batch["y"]).square().mean() * batch.get("factor", 1.0)
        return loss + poison(self.modules.net[0].bias) if "gradient" in batch else loss


class Players(Brain):
    """Two networks that train against each other, each with an optimizer of its own."""

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            "discriminator": self.opt_class(self.modules.discriminator.parameters()),
            "generator": self.opt_class(self.modules.generator.parameters()),
        }

    def loss_d(self, batch: Any, fake: Tensor) -> Tensor:
        judge = self.modules.discriminator
        real, false = (
            judge(torch.cat([batch["y"], batch["y"]], 1)),
            judge(torch.cat([fake, fake], 1)),
        )
        return ((real.float() - 1).square().mean() + false.float().square().mean()) / 2

    def loss_g(self, batch: Any, fake: Tensor) -> Tensor:
        return (self.modules.discriminator(torch.cat([fake, fake], 1)).float() - 1).square().mean()

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        with self.autocast():
            fake = self.modules.generator(batch["x"])
            loss_d = self.loss_d(batch, fake.detach()) * batch.get("factor", 1.0)
        self.optimize(loss_d, "discriminator")
        with self.frozen("discriminator"), self.autocast():
            loss_g = self.loss_g(batch, fake) * batch.get("factor", 1.0)
        if "gradient" in batch:
            loss_g = loss_g + poison(self.modules.generator[0].bias)
        self.optimize(loss_g, "generator")
        return {"d": loss_d, "g": loss_g}

    def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
        with self.autocast():
            return self.loss_g(batch, self.modules.generator(batch["x"]))


def make(
    kind: type[Brain] = Regressor, norm: bool = False, hparams: dict[str, Any] | None = None,
    checkpointer: Any = None, optimizer: Any = None, **options: Any
) -> Any:  # fmt: skip
    """A Brain of this kind with its networks, on the CPU and without a bar."""
    names = ["net"] if issubclass(kind, Regressor) else ["discriminator", "generator"]
    modules = {name: net(seed, norm) for seed, name in enumerate(names)}
    opt_class = optimizer or partial(torch.optim.AdamW, lr=0.01)
    options = {"device": "cpu", "progressbar": False, **options}
    return kind(modules, opt_class, hparams, options, checkpointer)


def in_window(brain: Brain) -> bool:
    """True while any optimizer has an accumulation window open."""
    return any(update.window.count for update in brain.updates.values())


def ema_of(brain: Brain) -> Any:
    """The exponential average of the weights, None where there is none."""
    entry = brain.stateful().get("ema")
    return None if entry is None else entry.part


def training_average(brain: Brain) -> Any:
    """The average of the epoch's losses so far."""
    return brain.stateful()["metrics"].part.average


def everything(brain: Brain) -> list[Any]:
    """All that training moves: weights, statistics, optimizers, schedules, scalers, averages."""
    averages = [] if (average := ema_of(brain)) is None else [state_of(average)]
    return [*snapshot(brain.modules), *map(update_state, brain.updates.values()), *averages]


def update_state(update: Update) -> dict[str, Any]:
    """Copy the states of an optimizer, its schedule, scaler and clipper, and its last norm."""
    parts = ("optimizer", "schedule", "scaler", "clip")
    return {**{name: state_of(getattr(update, name)) for name in parts}, "norm": update.last_norm}


def state_of(part: Any) -> dict[str, Any]:
    """Copy what a part holds, as an oracle: its own `state_dict` might leave something out."""
    of_torch = type(part).__module__.startswith("torch.")
    found = part.state_dict() if of_torch else getattr(part, "__dict__", {})
    return copy.deepcopy({name: each for name, each in found.items() if of_torch or plain(each)})


def plain(value: Any) -> bool:
    """Return True for tensors, numbers, texts and containers of these."""
    if isinstance(value, dict):
        return all(isinstance(key, (int, str)) for key in value) and all(map(plain, value.values()))
    if isinstance(value, (list, tuple, deque)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))
