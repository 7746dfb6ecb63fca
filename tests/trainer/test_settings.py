"""A resumed Brain that is built with other settings: they are in force."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from tests.trainer.small import Regressor, batches, net, same
from trainer import Checkpointer
from trainer.schedules import EarlyStopping, NewBob, Noam, WarmupDecay

Make = Callable[..., Any]


class Noting(Regressor):
    """Notes the settings before each step; not in an attribute, which would be resumed."""

    seen: ClassVar[list[tuple[float, float]]] = []

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        group = self.optimizer.param_groups[0]
        Noting.seen.append((group["lr"], group["weight_decay"]))


def start(
    folder: Path | None,
    steps: int,
    opt: Any,
    schedule: Any = None,
    every: str = "step",
    **options: Any,
) -> Noting:
    """Train up to so many optimizer steps, four an epoch, resuming what the folder holds."""
    hparams = {"schedule": schedule} if schedule else {}
    given = {"progressbar": False, "schedule_every": every, "device": "cpu", **options}
    given["optimizer_step_limit"] = steps
    checkpointer = Checkpointer(folder) if folder else None
    brain = Noting({"net": net()}, opt, hparams, given, checkpointer)
    Noting.seen.clear()
    brain.fit(range(1, 100), batches(4), batches(1))
    return brain


sgd = partial(torch.optim.SGD, momentum=0.9)


def sequence(optimizer: torch.optim.Optimizer) -> torch_schedules.SequentialLR:
    first = torch_schedules.ConstantLR(optimizer, 0.5, 4)
    second = torch_schedules.ExponentialLR(optimizer, 0.9)
    return torch_schedules.SequentialLR(optimizer, [first, second], [4])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, None),
        (partial(torch_schedules.OneCycleLR, max_lr=0.1, total_steps=20),
         partial(torch_schedules.OneCycleLR, max_lr=0.3, total_steps=40)),
        (partial(torch_schedules.StepLR, step_size=3),
         partial(torch_schedules.StepLR, step_size=5)),
        (partial(torch_schedules.MultiStepLR, milestones=[2, 4]),
         partial(torch_schedules.MultiStepLR, milestones=[4, 9])),
        (partial(torch_schedules.ExponentialLR, gamma=0.9),
         partial(torch_schedules.ExponentialLR, gamma=0.8)),
        (partial(torch_schedules.CosineAnnealingLR, T_max=10),
         partial(torch_schedules.CosineAnnealingLR, T_max=30)),
        (partial(torch_schedules.LinearLR, total_iters=10),
         partial(torch_schedules.LinearLR, total_iters=20)),
        (partial(torch_schedules.PolynomialLR, total_iters=10),
         partial(torch_schedules.PolynomialLR, total_iters=20)),
        (partial(torch_schedules.ConstantLR, total_iters=4),
         partial(torch_schedules.ConstantLR, total_iters=20)),
        (partial(torch_schedules.LambdaLR, lr_lambda=lambda n: 1 / (n + 1)),
         partial(torch_schedules.LambdaLR, lr_lambda=lambda n: 1 / (n + 1))),
        (partial(torch_schedules.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=4),
         partial(torch_schedules.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=9)),
        (partial(torch_schedules.CosineAnnealingWarmRestarts, T_0=4),
         partial(torch_schedules.CosineAnnealingWarmRestarts, T_0=5)),
        (sequence, sequence),
        (partial(Noam, warmup_steps=4), partial(Noam, warmup_steps=9)),
        (partial(WarmupDecay, warmup_steps=2, total_steps=12),
         partial(WarmupDecay, warmup_steps=2, total_steps=24)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_the_rates_are_those_of_a_run_with_the_new_settings(
    tmp_path: Path, before: Any, now: Any, rate: float
) -> None:
    """Each closed schedule goes on as if it had always had its new settings."""
    start(tmp_path, 6, partial(sgd, lr=0.1), before)
    resumed = start(tmp_path, 12, partial(sgd, lr=rate, weight_decay=0.01), now)
    seen = list(Noting.seen)
    start(None, 12, partial(sgd, lr=rate, weight_decay=0.01), now)
    assert len(seen) == 6
    assert [each[1] for each in seen] == [0.01] * 6
    expected = [each[0] for each in Noting.seen[6:]]
    assert [each[0] for each in seen] == pytest.approx(expected, rel=1e-9)
    schedule = resumed.updates["main"].schedule
    if schedule is not None:
        assert schedule.get_last_lr() == [resumed.optimizer.param_groups[0]["lr"]]


def test_a_rate_that_training_has_lowered_keeps_its_ratio(tmp_path: Path) -> None:
    lower = partial(NewBob, threshold=1e6, factor=0.5)  # halves in every epoch but the first
    first = start(tmp_path, 12, partial(sgd, lr=0.1), lower)
    assert first.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    second = start(tmp_path, 13, partial(sgd, lr=0.4), lower)
    assert second.seen[0][0] == pytest.approx(0.1)


def test_a_schedule_by_metric_goes_on_with_its_new_factor(tmp_path: Path) -> None:
    plateau = partial(torch_schedules.ReduceLROnPlateau, patience=0, threshold=1e6)
    first = start(tmp_path, 8, partial(sgd, lr=0.1), partial(plateau, factor=0.5))
    before = first.optimizer.param_groups[0]["lr"]
    assert before < 0.1
    second = start(tmp_path, 12, partial(sgd, lr=0.1), partial(plateau, factor=0.1))
    assert Noting.seen[0][0] == before
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(before / 10)


def test_the_same_settings_leave_what_training_has_made_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(tmp_path, 5, partial(sgd, lr=0.1))
    first.optimizer.param_groups[0]["lr"] = 0.07  # as a recipe's hook may
    first.checkpointer.save_checkpoint()
    second = start(tmp_path, 6, partial(sgd, lr=0.1))
    assert second.seen == [(0.07, 0)]
    assert "other settings" not in caplog.text


def test_it_is_said_and_the_next_checkpoint_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adam = partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.99))
    start(tmp_path, 4, adam)
    start(tmp_path, 8, partial(adam, lr=0.2, betas=(0.8, 0.99)))
    said = [each for each in caplog.messages if "other settings" in each]
    assert len(said) == 1
    assert "lr: 0.1 -> 0.2; betas: (0.9, 0.99) -> (0.8, 0.99)" in said[0]
    third = start(tmp_path, 9, partial(adam, lr=0.2, betas=(0.8, 0.99)))
    assert third.seen[0][0] == 0.2
    assert len([each for each in caplog.messages if "other settings" in each]) == 1


def test_each_group_takes_its_own(tmp_path: Path) -> None:
    def groups(rates: tuple[float, float]) -> Make:
        def make(params: Any) -> torch.optim.Optimizer:
            first, *others = params
            both = [{"params": [first], "lr": rates[0]}, {"params": others, "lr": rates[1]}]
            return torch.optim.SGD(both)

        return make

    start(tmp_path, 4, groups((0.1, 0.2)))
    brain = start(tmp_path, 5, groups((0.1, 0.3)))
    assert [each["lr"] for each in brain.optimizer.param_groups] == [0.1, 0.3]


def test_a_checkpoint_of_an_earlier_version_tells_which_settings_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brain = start(None, 4, partial(sgd, lr=0.1))
    update = brain.updates["main"]
    state = update.state_dict()
    del state["built"]
    other = start(None, 1, partial(sgd, lr=0.2, weight_decay=0.1)).updates["main"]
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert "goes on with the lr 0.1 of its checkpoint" in caplog.text
    assert "goes on with the weight_decay 0 of its checkpoint" in caplog.text
    assert same(other.optimizer.state_dict(), update.optimizer.state_dict())


def stopping(folder: Path, patience: int | None, epochs: int = 9) -> Noting:
    """Train until the loss has not halved for some epochs."""
    hparams: dict[str, Any] = {}
    if patience is not None:
        hparams["early_stopping"] = EarlyStopping(patience=patience, min_delta=1e6)
    options = {"progressbar": False, "device": "cpu"}
    brain = Noting({"net": net()}, partial(sgd, lr=0.01), hparams, options, Checkpointer(folder))
    Noting.seen.clear()
    brain.fit(range(1, epochs + 1), batches(2), batches(1))
    return brain


@pytest.mark.parametrize(("patience", "epochs"), [(2, 0), (3, 1), (5, 3), (None, 6)])
def test_more_patience_goes_on_after_an_early_stop(
    tmp_path: Path, patience: int | None, epochs: int
) -> None:
    assert stopping(tmp_path, 2).progress.epoch == 3
    again = stopping(tmp_path, patience)
    assert len(again.seen) == 2 * epochs
    assert again.progress.epoch == 3 + epochs


def test_averages_that_a_run_did_not_keep_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = start(tmp_path, 4, partial(sgd, lr=0.1))
    given = {"progressbar": False, "device": "cpu"}
    loss = saved.evaluate(batches(2))
    for number in (1, 2):
        options = {**given, "ema_decay": 0.9, "average_checkpoints": number}
        brain = Noting({"net": net(1)}, sgd, {}, options, Checkpointer(tmp_path))
        caplog.clear()
        assert brain.evaluate(batches(2)) == pytest.approx(loss)
        assert "ema_decay is 0.9, but the run had none" in caplog.text
