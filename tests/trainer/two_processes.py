"""Brains and data for the tests of two processes; the same run on one process, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from trainer import Brain, Stage, distributed
from trainer.checkpoint import Checkpointer
from trainer.distributed import buckets
from trainer.schedules import WarmupDecay

ROUNDS = 7  # Batches of each rank in an epoch: with windows of 3 the last is of 1.
SIZES = (3, 5, 1, 4, 2, 6, 3)


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
    """Return ragged batches for two ranks, dealt in turn; every third one takes a branch."""
    numbers = torch.Generator().manual_seed(2)
    made = []
    for i in range(2 * ROUNDS):
        x = torch.randn(sizes[i % len(sizes)], 3, generator=numbers, dtype=torch.float64).to(dtype)
        made.append({"x": x, "y": x.sum(1).sin(), "branch": x.new_full((len(x),), i % 3 == 0)})
    return made


def join(parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Concatenate each pair of batches: one process sees in one batch what two ranks see."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs]


class Line(Brain):
    """A regression with the default `fit_batch`.

    ``branch`` is used by some batches, ``never`` by none.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.losses: list[Any] = []  # Of each stage.

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        x = batch["x"].data if isinstance(batch["x"], tuple) else batch["x"]
        y = self.modules.net(x).squeeze(-1)
        if "branch" in batch and bool(batch["branch"].any()):  # Else this rank does not use it.
            y = y + batch["branch"] * self.modules.branch(x).squeeze(-1)
        return y

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions - batch["y"]).square().mean()

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        self.losses.append(stage_loss)


class TwoForwards(Line):
    """Two forward passes of one network before the backward pass."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        once = super().compute_forward(batch, stage)
        return once + super().compute_forward({**batch, "x": batch["x"] ** 2}, stage)


class SparseEmbedding(Line):
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


class Thawing(Line):
    """Freezes a layer in the middle of each window, and another in its other half."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        first = not should_step
        self.modules.net[0].requires_grad_(first)
        self.modules.branch.requires_grad_(not first)


class Waves(Line):
    """With complex weights, and a loss of one element."""

    def __init__(self, modules: dict[str, nn.Module], *arguments: Any, **named: Any) -> None:
        wave = nn.Linear(3, 1, dtype=torch.complex128)
        super().__init__({**modules, "wave": wave}, *arguments, **named)

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        wave = self.modules.wave(batch["x"].to(torch.complex128)).abs().squeeze(-1)
        return super().compute_forward(batch, stage) + wave.to(batch["x"].dtype)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return super().compute_objectives(predictions, batch, stage).reshape(1)


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


class PlayersNotFrozen(Players):
    """The second player's loss reaches the first one's parameters, too."""

    frozen_judge = False


class Together(Players):
    """Both losses go backward before either player steps."""

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        judge, x = self.modules.branch, batch["x"]
        fake = x + self.modules.net(x)
        loss_d = (judge(x) - 1).square().mean() + judge(fake.detach()).square().mean()
        loss_g = (judge(fake) - 1).square().mean()
        self.optimize({"d": loss_d, "g": loss_g})
        return {"d": loss_d, "g": loss_g}


class Resting(Players):
    """The first player rests in every second batch."""

    def optimize(self, loss: Any, name: str | None = None, **named: Any) -> Any:
        if name == "d" and self.step % 2 == 0:
            return None
        return super().optimize(loss, name, **named)


class TwoLosses(Players):
    """Two losses of one graph go backward in one window of two."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        arguments[3]["grad_accumulation_factor"] = 2
        super().__init__(*arguments, **named)

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        judge, x = self.modules.branch, batch["x"]
        fake = x + self.modules.net(x)
        features = (fake - x).square().mean()
        with self.frozen("d"):
            judged = (judge(fake) - 1).square().mean()
        self.optimize(judged, "g", retain_graph=True)
        self.optimize(features, "g")
        loss_d = (judge(x) - 1).square().mean() + judge(fake.detach()).square().mean()
        self.optimize(loss_d, "d", last=True)
        return {"d": loss_d, "g": judged}


class Reentrant(Line):
    """Uses a checkpointed network twice: its gradients come in two parts."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        x = batch["x"].clone().requires_grad_(stage is Stage.TRAIN)
        once = checkpoint(self.modules.net, x, use_reentrant=True).squeeze(-1)
        again = checkpoint(self.modules.net, x.square(), use_reentrant=True).squeeze(-1)
        return once + again + batch["branch"] * self.modules.branch(x).squeeze(-1)


class Joint(Players):
    """Both optimizers step together with one loss."""

    def fit_batch(self, batch: Any) -> Any:
        return Brain.fit_batch(self, batch)


class UnfrozenLater(Line):
    """A layer is frozen in the first four steps."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.modules.net[0].requires_grad_(self.optimizer_step >= 4)


class SmallBuckets(TwoForwards):
    """Each parameter has a bucket of its own."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        buckets.BUCKET_BYTES = buckets.FIRST_BUCKET_BYTES = 1
        super().__init__(*arguments, **named)


class Growing(Line):
    """Gives its optimizer a further layer, the ``head``, in the middle of a window of three."""

    exchange = False

    def __init__(self, modules: dict[str, nn.Module], *arguments: Any, **named: Any) -> None:
        head = nn.Linear(3, 1, dtype=next(modules["net"].parameters()).dtype)
        super().__init__({**modules, "head": head.requires_grad_(False)}, *arguments, **named)

    def init_optimizers(self) -> None:
        given = [*self.modules.net.parameters(), *self.modules.branch.parameters()]
        self.optimizer = torch.optim.SGD(given, lr=0.1)
        self.start = self.modules.head.weight.detach().clone()

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        if (self.step, self.progress.epoch) == (5, 1):
            new = list(self.modules.head.requires_grad_(True).parameters())
            if self.exchange:
                self.modules.branch.requires_grad_(False)
                self.optimizer.param_groups[0]["params"][-2:] = new
            else:
                self.optimizer.add_param_group({"params": new})

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        super().on_stage_end(stage, stage_loss, epoch)
        assert not torch.equal(self.start, self.modules.head.weight)

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return super().compute_forward(batch, stage) + self.modules.head(batch["x"]).squeeze(-1)


class Exchanging(Growing):
    """Exchanges parameters of its optimizer for as many others."""

    exchange = True


class Editing(SmallBuckets):
    """Has hooks that edit gradients, registered after the framework's own."""

    def on_fit_start(self) -> None:
        for i, p in enumerate(self.modules.parameters()):
            p.register_post_accumulate_grad_hook(self.edit if i % 2 else self.edit_in_place)

    @staticmethod
    def edit(p: Tensor) -> None:
        p.grad = 3 * p.grad

    @staticmethod
    def edit_in_place(p: Tensor) -> None:
        p.grad.mul_(3)


class Catching(SmallBuckets):
    """Goes on after an error in a backward pass, when some buckets have been sent."""

    def fit_batch(self, batch: Any) -> Any:
        def fail(p: Tensor) -> None:
            if self.step in (4, 6):
                raise OverflowError

        handle = self.modules.net[0].bias.register_post_accumulate_grad_hook(fail)
        try:
            return super().fit_batch(batch)
        except OverflowError:
            return None
        finally:
            handle.remove()


class OddLayouts(Line):
    """With weights in channels_last layout, and weights that are a part of a larger tensor."""

    def __init__(self, modules: dict[str, nn.Module], *arguments: Any, **named: Any) -> None:
        dtype = next(modules["net"].parameters()).dtype
        conv = nn.Conv2d(3, 4, (2, 1), dtype=dtype).to(memory_format=torch.channels_last)
        gaps = nn.Linear(4, 1, dtype=dtype)
        gaps.weight = nn.Parameter(torch.randn(8, 1, dtype=dtype)[::2].t())
        super().__init__({**modules, "conv": conv, "gaps": gaps}, *arguments, **named)

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        image = torch.stack([batch["x"], batch["x"] ** 2], 2)[..., None]  # (N, 3, 2, 1)
        extra = self.modules.gaps(self.modules.conv(image).flatten(1)).squeeze(-1)
        return super().compute_forward(batch, stage) + extra


class ByHand(Line):
    """Steps by itself. Its batches are of one size, since nothing weighs them."""

    def fit_batch(self, batch: Any) -> Tensor:
        loss = self.compute_objectives(self.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class OwnStep(Line):
    """Steps in place of the framework where a window closes."""

    def optimizers_step(self) -> None:
        self.optimizer.step()


class Choosy(Line):
    """Leaves every third step out, and steps by itself in every fifth."""

    calls = 0

    def optimizers_step(self) -> None:
        self.calls += 1
        if self.calls % 5 == 0:
            self.optimizer.step()
        elif self.calls % 3:
            super().optimizers_step()


def make(
    kind: type[Line] = Line,
    dtype: torch.dtype = torch.float64,
    folder: Path | None = None,
    hparams: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return a Brain whose weights differ by rank until the framework makes them equal.

    Args:
        kind: class of the Brain.
        dtype: dtype of its weights.
        folder: where checkpoints are kept; None keeps none.
        hparams: hyperparameters beside the schedule.
        options: run options.
    """
    torch.manual_seed(10 + distributed.rank())
    modules = {
        "net": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        "branch": nn.Linear(3, 1),
        "never": nn.Linear(2, 2),  # Reached by no loss; weight decay must not move it.
    }
    schedule = (
        {}
        if issubclass(kind, (Players, Growing))
        else {"schedule": lambda opt: WarmupDecay(opt, 2, 40)}
    )
    return kind(
        {name: module.to(dtype) for name, module in modules.items()},
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        {**schedule, **(hparams or {})},
        {"device": "cpu", "progressbar": False, "max_grad_norm": 0.5, **options},
        None if folder is None else Checkpointer(folder, keep_last=9),
    )


def weights(brain: Brain) -> Tensor:
    """Return all parameters and buffers in one vector."""
    return torch.cat(
        [
            (torch.view_as_real(t) if t.is_complex() else t).detach().double().reshape(-1)
            for t in brain.modules.state_dict().values()
        ]
    )


def train(
    kind: type[Line] = Line,
    dtype: torch.dtype = torch.float64,
    data: Any = None,
    loader: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train for two epochs and return the weights, losses, steps and clipper states.

    One process trains on the joined batches of two ranks.
    """
    brain = make(kind, dtype, **options)
    data = batches(dtype) if data is None else data
    if distributed.world_size() == 1 and isinstance(data, list):
        data = join(data)
    brain.fit(range(1, 3), data, train_loader_kwargs=loader)
    losses = [loss if isinstance(loss, dict) else {"loss": loss} for loss in brain.losses]
    return {
        "weights": weights(brain), "losses": losses, "steps": brain.optimizer_step,
        "never": brain.modules.never.weight.detach().clone(),
        "clip": {n: getattr(u.clip, "state_dict", dict)() for n, u in brain.updates.items()},
    }  # fmt: skip
