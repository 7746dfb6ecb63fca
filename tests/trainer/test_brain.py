"""The loop: hooks in their order, what a stage counts, and what an evaluation leaves as it was."""

import copy
import json
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tests.trainer.small import (
    Players,
    Regressor,
    batches,
    everything,
    in_window,
    make,
    same,
    spoilt,
    training_average,
)
from trainer import Brain, EpochCounter, Stage, StepReport, metrics, signals
from trainer.checkpoint import Checkpointer
from trainer.schedules import EarlyStopping, NewBob, Noam

KINDS = [Regressor, Players]
JOINED = {"collate_fn": default_collate}


# --- hooks ---------------------------------------------------------------------------------------


class Told(Regressor):
    """Writes down every call of a hook, with the modes and the names of its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)

    def on_fit_start(self) -> None:
        self.calls.append(("fit_start", sorted(self.updates)))

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.calls.append(("stage_start", stage, epoch, self.modules.training))

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.calls.append(("batch_start", batch["id"][0], should_step, self.step))

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        self.calls.append(("forward", batch["id"][0], stage, torch.is_grad_enabled()))
        return super().compute_forward(batch, stage)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        self.calls.append(("objectives", tuple(predictions.shape), batch["id"][0], stage))
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        assert not loss.requires_grad
        self.calls.append(("batch_end", batch["id"][0], tuple(outputs.shape), should_step))

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> Any:
        assert isinstance(stage_loss, float)
        self.calls.append(("stage_end", stage, epoch, self.modules.training))

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        self.calls.append(("evaluate_start", max_key, min_key))


def test_hooks_come_in_their_order_with_their_arguments() -> None:
    train, valid = batches(3), batches(1, seed=1)
    brain = make(Told, grad_accumulation_factor=2)
    brain.fit(epoch_counter=[4], train_set=train, valid_set=valid)
    brain.evaluate(valid)
    expected: list[tuple[Any, ...]] = [
        ("fit_start", ["main"]),
        ("stage_start", Stage.TRAIN, 4, True),
    ]
    for number, steps in enumerate([False, True, True]):  # The third closes a short window.
        name = f"utt{number}-0"
        expected += [
            ("batch_start", name, steps, number + 1),
            ("forward", name, Stage.TRAIN, True),
            ("objectives", (3, 2), name, Stage.TRAIN),
            ("batch_end", name, (3, 2), steps),
        ]
    expected += [("stage_end", Stage.TRAIN, 4, True)]
    for stage, epoch in ((Stage.VALID, 4), (Stage.TEST, None)):
        expected += [("evaluate_start", None, None)] if stage is Stage.TEST else []
        expected += [
            ("stage_start", stage, epoch, False),
            ("forward", "utt0-0", stage, False),
            ("objectives", (3, 2), "utt0-0", stage),
            ("stage_end", stage, epoch, False),
        ]
    assert brain.calls == expected


def test_stages_see_their_average_and_the_test_its_metrics() -> None:
    class Measured(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> Any:
            losses.append(stage_loss)
            return {"wer": torch.tensor(7.0)} if stage is Stage.TEST else None

    losses: list[float] = []
    brain = make(Measured)
    brain.fit([1], batches(2), batches(2))
    assert brain.evaluate(batches(2)) == losses[2] == losses[1]
    assert brain.test_metrics == {"wer": 7.0}
    assert len(losses) == 3


# --- what is counted -----------------------------------------------------------------------------


def recorded(kind: type[Brain]) -> type[Brain]:
    """The kind, which keeps the average of each stage."""

    class Recorded(kind):  # type: ignore[misc, valid-type]
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            self.losses = [*getattr(self, "losses", []), (stage, stage_loss)]

    return Recorded


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("endless", [False, True])
def test_averages_are_over_examples(factor: int, endless: bool) -> None:
    sizes = [1, 5, 2, 4, 3, 7]
    data = [batches(1, size, seed)[0] for seed, size in enumerate(sizes)]
    brain = make(
        recorded(Regressor),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        grad_accumulation_factor=factor,
    )
    per_example = torch.cat(
        [(brain.modules.net(batch["x"]) - batch["y"]).square().mean(1) for batch in data]
    )
    brain.fit([1], map(dict, data) if endless else data, data)
    for _, loss in brain.losses:
        assert loss == pytest.approx(float(per_example.detach().mean()), rel=1e-6)
    assert training_average(brain).weight() == sum(sizes)


@pytest.mark.parametrize("factor", [1, 4])
def test_averages_of_an_own_fit_batch_are_over_examples(factor: int) -> None:
    class Returning(Regressor):
        def fit_batch(self, batch: Any) -> StepReport:
            loss = self.compute_objectives(self.modules.net(batch["x"]), batch, Stage.TRAIN)
            return self.optimize(loss, "main")

    sizes = [1, 5, 2, 4, 3, 7]
    data = [batches(1, size, seed)[0] for seed, size in enumerate(sizes)]
    averages = []
    for kind in (Regressor, Returning):
        brain = make(
            recorded(kind),
            optimizer=partial(torch.optim.SGD, lr=0.0),
            grad_accumulation_factor=factor,
        )
        brain.fit([1], data)
        averages.append(brain.losses[0][1])
    assert averages[1] == pytest.approx(averages[0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["input", "nan", "inf", "gradient"])
def test_a_skipped_batch_is_not_in_the_average(kind: type[Brain], how: str) -> None:
    data = batches(4)
    bad = [data[0], spoilt(data[1], how), *data[2:]]
    still = partial(torch.optim.SGD, lr=0.0)
    beside, without = make(recorded(kind), optimizer=still), make(recorded(kind), optimizer=still)
    beside.fit([1], bad)
    without.fit([1], [data[0], *data[2:]])
    assert beside.losses == without.losses
    assert training_average(beside).weight() == 9


RETURNS: dict[str, Any] = {
    "report": lambda report, loss: report,
    "scalar": lambda report, loss: loss.detach(),
    "number": lambda report, loss: loss.item(),
    "dict": lambda report, loss: {"a": loss.detach(), "b": 2 * loss.item()},
}


def returning(what: str) -> type[Brain]:
    class Returning(recorded(Regressor)):  # type: ignore[misc]
        def fit_batch(self, batch: Any) -> Any:
            loss = self.compute_objectives(
                self.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN
            )
            report = self.optimize(loss, last=self.is_last_batch)
            return RETURNS[what](report, loss)

    return Returning


@pytest.mark.parametrize("what", RETURNS)
@pytest.mark.parametrize("bad", range(7))
def test_no_batch_of_a_skipped_window_is_in_the_average(what: str, bad: int) -> None:
    data = [batches(1, size, seed=size)[0] for size in (3, 1, 4, 2, 6, 5, 3)]
    still = partial(torch.optim.SGD, lr=0.0)
    beside, without = (
        make(returning(what), optimizer=still, grad_accumulation_factor=3) for _ in range(2)
    )
    beside.fit([1], [spoilt(each, "nan") if i == bad else each for i, each in enumerate(data)])
    # Windows are of batches 0 to 2, 3 to 5, and 6 alone.
    kept = [each for i, each in enumerate(data) if i // 3 != bad // 3]
    without.fit([1], kept)
    assert training_average(beside).weight() == sum(len(each["y"]) for each in kept)
    ((_, loss),) = beside.losses
    ((_, expected),) = without.losses
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stopped", range(1, 7))
def test_losses_that_wait_for_their_window_are_saved_with_it(tmp_path: Path, stopped: int) -> None:
    data = [spoilt(each, "nan") if i == 4 else each for i, each in enumerate(batches(7))]
    options = {"grad_accumulation_factor": 3}
    whole = make(returning("dict"), **options)
    whole.fit([1], data)

    class Stopping(returning("dict")):  # type: ignore[misc]
        def fit_batch(self, batch: Any) -> Any:
            result = super().fit_batch(batch)
            if self.step == stopped:
                patch.setattr(signals, "_received", signal.SIGTERM)
            return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Interrupted):
        make(Stopping, checkpointer=Checkpointer(tmp_path), **options).fit([1], data)
    resumed = make(returning("dict"), checkpointer=Checkpointer(tmp_path), **options)
    resumed.fit([1], data)
    assert resumed.losses == whole.losses


def test_losses_of_players_wait_for_their_own_windows() -> None:
    found = metrics.TrainingMetrics()

    def close(name: str, outcome: Any) -> None:
        found.add_report(StepReport(name, outcome))

    found.add_loss(1.0, 1.0, ["a", "b"])
    found.add_loss(2.0, 1.0, ["a"])
    close("a", "accumulated")
    close("a", "stepped")
    assert found.average.value() == 2.0  # The first waits for the other player.
    found.add_loss(8.0, 1.0, ["a"])
    again = metrics.TrainingMetrics()
    again.load_state_dict(json.loads(json.dumps(found.state_dict())))
    for each in (found, again):
        each.add_report(StepReport("b", "skipped"))
        each.add_report(StepReport("a", "overflowed"))
        assert each.average.value() == 5.0


def test_the_throughput_of_records_that_span_epochs_is_that_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now))
    found = metrics.TrainingMetrics()
    for _ in range(2):
        for _ in range(3):
            found.start_clock()
            now += 2.0
            found.examples += 20.0
            found.stop_clock()
            now += 50.0  # validation, a save
        found.start_clock()
        assert found.record(1, 1, now)["examples_per_second"] == 10.0
        found.stop_clock()


def test_a_stage_without_any_finite_loss_has_no_average_and_not_zero() -> None:
    brain = make(recorded(Regressor))
    brain.fit([1], [spoilt(batches(1)[0], "nan")], [spoilt(batches(1)[0], "input")])
    assert all(math.isnan(loss) for _, loss in brain.losses)
    assert len(brain.losses) == 2


def test_a_hook_that_saves_has_the_right_average_and_counts(tmp_path: Path) -> None:
    class Saving(recorded(Regressor)):  # type: ignore[misc]
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            super().on_stage_end(stage, stage_loss, epoch)
            self.checkpointer.save_checkpoint(meta={"stage": stage.value})

    plain = make(recorded(Regressor))
    plain.fit(range(1, 4), batches(5), batches(2))
    brain = make(Saving, checkpointer=Checkpointer(tmp_path))
    brain.fit(range(1, 4), batches(5), batches(2))
    assert brain.losses == plain.losses
    assert (brain.optimizer_step, brain.step) == (15, 5)
    assert same(everything(brain), everything(plain))


def test_whatever_is_given_weighs_what_it_counts() -> None:
    brain = make()
    item = torch.zeros(5, 2)
    for batch, size in (
        (item, 5),
        ((["a", "b"], item), 5),
        ([item, torch.zeros(5)], 5),
        ({"id": ["a", "b"]}, 2),
        ({"n": 3, "rate": torch.tensor(8000), "wav": item}, 5),
        ({"wav": (item, torch.ones(5))}, 5),
        ({"id": [], "wav": torch.zeros(0, 4)}, 0),
        ({"n": 3}, 1),
        ([{"wav": item}, {"wav": item}], 2),
        (["a", "b", "c"], 3),
        (torch.tensor(1.0), 1),
        (object(), 1),
    ):
        assert brain.count_examples(batch) == size


def test_a_weight_that_is_none_is_refused() -> None:
    class Odd(Regressor):
        def count_examples(self, batch: Any) -> float:
            return -1.0

    with pytest.raises(ValueError, match="count_examples returned -1.0; allowed: a finite number"):
        make(Odd).fit([1], batches(1))


# --- evaluation changes nothing ------------------------------------------------------------------


class Restless(Regressor):
    """Draws from every generator in evaluation, and has a dropout."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        random.random()
        return super().compute_forward(batch, stage) + torch.rand(())


class Squares(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int = 12) -> None:
        self.x = torch.arange(size).float()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index].expand(4), "y": torch.zeros(2)}


def test_evaluation_changes_nothing() -> None:
    brain = make(Restless, norm=True, ema_decay=0.9)
    brain.fit([1], batches(3))
    brain.modules.net[0].eval()  # A layer that the recipe has frozen.
    before = copy.deepcopy(everything(brain))
    modes = [module.training for module in brain.modules.modules()]
    counts = (brain.epoch, brain.step, brain.optimizer_step, training_average(brain).state_dict())
    generators = (torch.get_rng_state(), random.getstate())
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, **JOINED}
    kept = dict(options)
    first = brain.evaluate(Squares(), test_loader_kwargs=options)
    second = brain.evaluate(Squares(), test_loader_kwargs=options)
    assert first == second
    assert options == kept
    assert same(everything(brain), before)
    assert modes == [module.training for module in brain.modules.modules()]
    assert counts == (
        brain.epoch,
        brain.step,
        brain.optimizer_step,
        training_average(brain).state_dict(),
    )
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()


@pytest.mark.parametrize("kind", KINDS)
def test_validation_does_not_change_the_training(kind: type[Brain]) -> None:
    with_valid, without = make(kind, norm=True), make(kind, norm=True)
    for brain in (with_valid, without):
        torch.manual_seed(0)
        brain.fit(range(1, 4), batches(4), batches(3, seed=1) if brain is with_valid else None)
    assert same(everything(with_valid), everything(without))


def test_testing_the_best_checkpoint_leaves_the_training_where_it_was(tmp_path: Path) -> None:
    """Neither weights nor optimizer nor counters become those of that checkpoint."""

    class Worse(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
            return {"wer": float(epoch or 0)} if stage is not Stage.TRAIN else None

        def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
            self.tested = copy.deepcopy(self.modules.state_dict())

    keeping = Checkpointer(tmp_path, keep_best={"wer": "min"})
    brain = make(Worse, checkpointer=keeping, ema_decay=None)
    brain.fit([1], batches(3), batches(1))
    best = copy.deepcopy(brain.modules.state_dict())
    brain.fit([2, 3], batches(3), batches(1))
    before = copy.deepcopy(everything(brain))
    brain.evaluate(batches(1), min_key="wer")
    assert same(brain.tested, best)
    assert not same(brain.modules.state_dict(), best)
    assert same(everything(brain), before)
    assert (brain.epoch, brain.step, brain.optimizer_step) == (3, 3, 9)


def test_an_evaluation_that_fails_gives_the_modes_back() -> None:
    brain = make()
    brain.fit([1], batches(1))
    with pytest.raises(KeyError):
        brain.evaluate([{}])
    assert all(module.training for module in brain.modules.modules())
    assert torch.is_grad_enabled()
    brain.fit([2], batches(1))
    assert brain.optimizer_step == 2


def test_an_untrained_brain_evaluates_its_weights() -> None:
    brain = make(recorded(Regressor))
    loss = brain.evaluate(batches(2))
    assert loss == pytest.approx(brain.losses[0][1])
    assert not brain.updates


def test_validation_uses_the_average_of_the_weights_and_leaves_them() -> None:
    class Watching(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            self.seen = [
                *getattr(self, "seen", []),
                (stage, self.modules.net[0].bias.detach().clone()),
            ]
            return super().compute_forward(batch, stage)

    brain, plain = make(Watching, ema_decay=0.5), make(Watching)
    for each in (brain, plain):
        each.fit([1], batches(3), batches(1))
    assert same(brain.modules.state_dict(), plain.modules.state_dict())
    # The weights before each of the three batches, and after the last of them.
    weights = [bias for stage, bias in plain.seen]
    expected = weights[0]
    for bias in weights[1:]:
        expected = (expected + bias) / 2
    torch.testing.assert_close(brain.seen[-1][1], expected)
    brain.evaluate(batches(1))
    torch.testing.assert_close(brain.seen[-1][1], expected)
    assert torch.equal(brain.modules.net[0].bias, weights[-1])


# --- fitting twice, data of any kind -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_fit_goes_on(kind: type[Brain]) -> None:
    once, twice = make(kind), make(kind)
    once.fit(range(1, 5), batches(3))
    twice.fit(range(1, 3), batches(3))
    optimizers = [id(update.optimizer) for update in twice.updates.values()]
    twice.fit(range(3, 5), batches(3))
    assert optimizers == [id(update.optimizer) for update in twice.updates.values()]
    assert same(everything(once), everything(twice))
    assert once.optimizer_step == twice.optimizer_step == 12


def test_a_fit_after_early_stopping_is_a_new_one() -> None:
    stopping = EarlyStopping(patience=1)
    brain = make(hparams={"early_stopping": stopping}, optimizer=partial(torch.optim.SGD, lr=0.0))
    brain.fit(range(1, 9), batches(2))
    assert brain.epoch == 2
    brain.fit(range(9, 20), batches(2))
    assert brain.epoch == 9


def test_gradients_from_before_a_fit_and_after_an_error_are_not_in_it() -> None:
    clean, dirty = make(grad_accumulation_factor=2), make(grad_accumulation_factor=2)
    dirty.modules.net(torch.ones(1, 4)).sum().backward()
    for brain in (clean, dirty):
        brain.fit([1], batches(2))
    with pytest.raises(KeyError):
        dirty.fit([2], [*batches(1), {"x": torch.zeros(1, 4)}])  # With an open window.
    for brain in (clean, dirty):
        brain.fit([2], batches(2))
    assert same(clean.modules.state_dict(), dirty.modules.state_dict())


class Seen(Regressor):
    """Keeps the first element of each input, by stage and epoch."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.rows = getattr(self, "rows", [])
        self.rows.append([])

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        self.rows[-1] += batch["x"][:, 0].tolist()
        return super().compute_forward(batch, stage)


class Rotated(Sampler[list[int]]):
    """A batch sampler that wants to know the epoch, as DistributedSampler does."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = [(item + 5 * self.epoch) % 12 for item in range(12)]
        return iter([order[:6], order[6:]])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("source", ["dataset", "loader", "sampler", "dataset with a sampler"])
def test_each_epoch_sees_every_item_once_in_a_new_order(source: str) -> None:
    brain = make(Seen)
    if source == "dataset":
        brain.fit(range(1, 4), Squares(), train_loader_kwargs={"batch_size": 5, **JOINED})
    elif source == "loader":
        brain.fit(range(1, 4), DataLoader(Squares(), batch_size=5, shuffle=True))
    elif source == "sampler":
        brain.fit(range(1, 4), DataLoader(Squares(), batch_sampler=Rotated()))
    else:
        brain.fit(
            range(1, 4), Squares(), train_loader_kwargs={"batch_sampler": Rotated(), **JOINED}
        )
    assert [sorted(row) for row in brain.rows] == [list(range(12))] * 3
    assert len({tuple(row) for row in brain.rows}) == 3


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_window_of_an_epoch_steps_however_the_batches_come(
    kind: type[Brain], factor: int, number: int
) -> None:
    known, unknown = (make(kind, grad_accumulation_factor=factor) for _ in range(2))
    for epoch in (1, 2):
        known.fit([epoch], batches(number))
        unknown.fit([epoch], iter(batches(number)))
    assert same(everything(known), everything(unknown))
    steps = 2 * math.ceil(number / factor)
    assert known.optimizer_step == unknown.optimizer_step == steps
    assert not in_window(known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[3, 1, 4], [1, 5, 2, 6, 1], [2, 0, 3]])
def test_accumulating_ragged_batches_is_one_big_batch(kind: type[Brain], sizes: list[int]) -> None:
    """With gradient descent, so that what Adam makes of rounding errors stays out of it."""
    whole = batches(1, sum(sizes))[0]
    parts = [
        {"id": [], "x": x, "y": y}
        for x, y in zip(whole["x"].split(sizes), whole["y"].split(sizes), strict=True)
    ]
    descent = partial(torch.optim.SGD, lr=0.1)
    one = make(kind, optimizer=descent)
    parted = make(kind, optimizer=descent, grad_accumulation_factor=len(sizes))
    if kind is Players:  # The generator's gradients come before the discriminator's step.
        for brain in (one, parted):
            brain.init_optimizers()
            brain.optimizers_dict.pop("discriminator")
            brain.modules.discriminator.requires_grad_(False)
            brain.init_optimizers = lambda: None
            brain.fit_batch = lambda batch, brain=brain: {
                "g": brain.optimize(
                    brain.loss_g(batch, brain.modules.generator(batch["x"])), "generator"
                ).loss
                or 0.0
            }
    one.fit([1], [whole])
    parted.fit([1], parts)
    assert one.optimizer_step == parted.optimizer_step == 1
    for a, b in zip(one.modules.parameters(), parted.modules.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- options -------------------------------------------------------------------------------------


def test_debug_runs_a_few_batches_and_keeps_nothing(tmp_path: Path) -> None:
    brain = make(
        Seen, checkpointer=Checkpointer(tmp_path / "saved"), debug=True, output_folder=str(tmp_path)
    )
    brain.fit(range(1, 9), batches(7, 1), batches(7, 1))
    brain.evaluate(batches(7, 1))
    assert [len(row) for row in brain.rows] == [2] * 5
    assert brain.epoch == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_overfitting_trains_on_the_same_batches_and_validates_on_them() -> None:
    brain = make(Seen, overfit_batches=2)
    loader = DataLoader(Squares(), batch_size=3, shuffle=True)
    brain.fit(range(1, 4), loader, batches(9))
    assert len(brain.rows) == 6
    assert len({tuple(row) for row in brain.rows}) == 1
    assert len(brain.rows[0]) == 6


def test_test_only_trains_nothing() -> None:
    brain = make(test_only=True)
    before = copy.deepcopy(brain.modules.state_dict())
    brain.fit(range(1, 4), batches(2), batches(2))
    assert same(brain.modules.state_dict(), before)
    assert not brain.updates
    assert brain.evaluate(batches(2)) > 0


def test_test_only_works_where_losses_freeze_a_player() -> None:
    class Freezing(Players):
        def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
            with self.frozen("discriminator"):
                return super().evaluate_batch(batch, stage)

    assert make(Freezing, test_only=True).evaluate(batches(2)) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 3])
def test_the_step_limit_is_exact_and_ends_the_run(kind: type[Brain], factor: int) -> None:
    brain = make(kind, optimizer_step_limit=3, grad_accumulation_factor=factor)
    brain.fit(range(1, 9), batches(5), batches(1))
    assert brain.optimizer_step == 3
    # Windows of 3 and 2 batches an epoch; or one batch each.
    assert (brain.epoch, brain.step) == ((1, 3) if factor == 1 else (2, 3))
    for update in brain.updates.values():
        state = next(iter(update.optimizer.state.values()))
        assert state["step"] == 3
    brain.fit(range(9, 12), batches(5))
    assert brain.optimizer_step == 3


def test_the_step_limit_leaves_no_window_to_step_later() -> None:
    class Uneven(Players):
        """The generator's windows are out of step with the discriminator's."""

        def fit_batch(self, batch: Any) -> Any:
            if self.step == 1:
                self.optimize(self.loss_g(batch, self.modules.generator(batch["x"])), "generator")
            return super().fit_batch(batch)

    brain = make(Uneven, optimizer_step_limit=1, grad_accumulation_factor=2)
    brain.fit([1], batches(5))
    steps = [len(update.optimizer.state) > 0 for update in brain.updates.values()]
    assert brain.optimizer_step == 1
    assert steps == [False, True]
    assert not in_window(brain)


# --- schedules and stopping ----------------------------------------------------------------------


class Scored(Regressor):
    """Returns the scores that it is given as the metric of the validation."""

    scores: list[float]

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        self.rates = [*getattr(self, "rates", []), self.updates["main"].lr]
        return {"score": self.scores[(epoch or 1) - 1]} if stage is Stage.VALID else None


def scored(scores: list[float], **options: Any) -> Any:
    brain = make(Scored, **options)
    brain.scores = scores
    brain.fit(range(1, len(scores) + 1), batches(2), batches(1))
    return brain


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_schedules_move_as_the_options_say(kind: type[Brain], every: str) -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    brain = make(
        kind, hparams={"schedule": schedule}, schedule_every=every, grad_accumulation_factor=2
    )
    brain.fit([1, 2], batches(5))
    moves = 2 * 3 if every == "step" else 2
    assert [update.lr for update in brain.updates.values()] == [0.01 * 0.5**moves] * len(
        brain.updates
    )


def test_a_mapping_gives_each_optimizer_its_own_schedule() -> None:
    schedule = {"generator": partial(Noam, warmup_steps=4)}
    brain = make(Players, hparams={"schedule": schedule}, schedule_every="epoch")
    brain.fit([1], batches(2))
    assert brain.updates["generator"].lr == pytest.approx(0.01 * 3 / 4)  # Knows its "every" itself.
    assert brain.updates["discriminator"].lr == 0.01


def test_schedules_by_metric_are_fed_what_the_stage_returned() -> None:
    scores = [5.0, 4.0, 4.0, 3.0, 3.0]
    brain = scored(scores, hparams={"schedule": partial(NewBob, metric="score")})
    assert brain.updates["main"].lr == 0.01 / 4
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)
    for every in ("step", "epoch"):  # It has none but epochs.
        still = make(
            hparams={"schedule": plateau},
            schedule_every=every,
            optimizer=partial(torch.optim.SGD, lr=0.0),
        )
        still.fit(range(1, 4), batches(2), batches(1))
        assert still.updates["main"].schedule.num_bad_epochs == 0
        assert still.updates["main"].schedule.last_epoch == 3


def test_a_schedule_that_watches_what_no_stage_gives_says_so() -> None:
    with pytest.raises(
        ValueError, match="schedule watches the metric 'wer', which the stage did no"
    ):
        scored([1.0], hparams={"schedule": partial(NewBob, metric="wer")})
    with pytest.raises(
        ValueError, match="early_stopping watches the metric 'wer'.*it gave loss, sc"
    ):
        scored([1.0], hparams={"early_stopping": EarlyStopping("wer")})


@pytest.mark.parametrize(
    ("mode", "scores", "epochs", "best"),
    [
        ("max", [1.0, 2.0, 2.0, 1.5, 3.0], 4, "the best is 2, of epoch 2"),
        ("min", [-1.0, -2.0, -2.0, -1.5, -3.0], 4, "the best is -2, of epoch 2"),
        ("max", [-3.0, -2.0, -1.0, -0.5, -0.1], 5, None),
        ("min", [3.0, 2.0, math.nan, math.nan, 1.0], 4, "the best is 2, of epoch 2"),
        ("min", [math.nan, math.nan, 1.0], 2, "it has never been finite"),
    ],
)
def test_training_stops_when_the_metric_no_longer_improves(
    mode: Any, scores: list[float], epochs: int, best: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStopping("score", mode, patience=2)
    with caplog.at_level(logging.INFO, "trainer"):
        brain = scored(scores, hparams={"early_stopping": stopping})
    assert brain.epoch == epochs
    told = [text for r in caplog.records if "stopping early" in (text := r.getMessage())]
    said = f"stopping early: score has not improved for 2 epochs: {best}"
    assert told == ([] if best is None else [said])


def test_the_epoch_of_the_best_value_is_left_out_where_another_fit_had_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    brain = make(hparams={"early_stopping": EarlyStopping("loss", patience=2, min_delta=1e6)})
    brain.fit([1, 2], batches(2), batches(1))
    with caplog.at_level(logging.INFO, "trainer"):
        brain.fit([1], batches(2), batches(1))
    (told,) = [text for r in caplog.records if "stopping early" in (text := r.getMessage())]
    assert "for 2 epochs: the best is " in told
    assert "of epoch" not in told


# --- what is said --------------------------------------------------------------------------------


def test_a_skipped_batch_is_told_with_its_names(caplog: pytest.LogCaptureFixture) -> None:
    data = batches(3)
    data[1], data[2] = spoilt(data[1], "nan"), spoilt(data[2], "gradient")
    with caplog.at_level(logging.WARNING, "trainer"):
        make().fit([3], data)
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if not text.startswith("first not finite: ")] == [
        "epoch 3, batch 2: loss of 'main' not finite, step skipped (batch utt1-0, utt1-1, utt1-2)",
        "epoch 3, batch 3: gradients of 'main' not finite, step skipped "
        "(batch utt2-0, utt2-1, utt2-2)",
    ]


def test_an_epoch_counter_counts_on() -> None:
    counter = EpochCounter(3)
    brain = make()
    brain.fit(counter, batches(1))
    assert brain.epoch == counter.current == 3
    brain.fit(counter, batches(1))
    assert brain.optimizer_step == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_often_on_a_terminal_and_never_in_a_file(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def slowly() -> Iterator[Any]:
        for batch in batches(8):
            time.sleep(0.15)
            yield batch

    make(progressbar=True).fit([1], slowly())
    drawn = capsys.readouterr().err.count("it [")
    assert drawn >= 8 if terminal else drawn == 0


def test_an_optimizer_that_several_attributes_hold_is_one() -> None:
    class Alias(Regressor):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            self.mine = self.optimizer

    plain, alias = make(), make(Alias, hparams={})
    for brain in (plain, alias):
        brain.fit([1], batches(2))
    assert list(alias.updates) == ["main"]
    assert same(everything(plain), everything(alias))


def test_an_optimizer_of_two_names_is_refused() -> None:
    class Twice(Regressor):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            self.optimizers_dict = {"a": self.optimizer, "b": self.optimizer}

    with pytest.raises(ValueError, match="has the same optimizer twice among a, b; allowed: one"):
        make(Twice).fit([1], batches(1))
