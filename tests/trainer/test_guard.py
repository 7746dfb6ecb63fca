"""Steps that are not finite never happened: in the default fit_batch, and with two optimizers."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.small import (
    Players,
    Regressor,
    batches,
    everything,
    make,
    poison,
    same,
    spoilt,
)
from trainer import Brain, Callback, NonFiniteError, Stage
from trainer.checkpoint import Checkpointer
from trainer.clipping import Gradients, NormClip

KINDS = [Regressor, Players]


class History(NormClip):
    """A clipper with a memory, as the adaptive ones have."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.norms: list[float] = []

    def __call__(self, gradients: Gradients) -> bool:
        self.norms.append(gradients.norm)
        return super().__call__(gradients)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])


def trained(kind: type[Brain], data: list[Any], factor: int, precision: str) -> Any:
    """A Brain with everything that has a state, after one epoch over the data."""
    names = ["main"] if kind is Regressor else ["discriminator", "generator"]
    brain = make(
        kind,
        norm=True,
        hparams={
            "schedule": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            "clip": {name: History() for name in names},
        },
        schedule_every="step",
        ema_decay=0.9,
        precision=precision,
        grad_accumulation_factor=factor,
    )
    brain.fit([1], data)
    return brain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("how", ["input", "nan", "inf"])
def test_a_bad_batch_never_happened(
    kind: type[Brain], factor: int, precision: str, how: str
) -> None:
    """To the bit, in weights, running statistics, optimizer, schedule, scaler, average, history."""
    first, *middle = batches(factor, seed=1)
    data, bad = batches(6 * factor), [*middle, spoilt(first, how)][::-1]
    without = trained(kind, data, factor, precision)
    beside = trained(kind, data[: 3 * factor] + bad + data[3 * factor :], factor, precision)
    assert same(everything(beside), everything(without))
    least = 3 if precision == "fp16" else 6  # There, the first scales overflow.
    assert 6 >= beside.optimizer_step == without.optimizer_step >= least
    for update in beside.updates.values():
        assert 6 >= len(update.clip.norms) >= least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 4])
def test_a_bad_gradient_under_a_finite_loss_never_happened(kind: type[Brain], factor: int) -> None:
    data = batches(2 * factor)
    data[factor] = spoilt(data[factor], "gradient")
    brain = trained(kind, data, factor, "fp32")
    name = "main" if kind is Regressor else "generator"
    first = trained(kind, data[:factor], factor, "fp32")
    assert same(brain.updates[name].state_dict(), first.updates[name].state_dict())
    own = brain.modules.net if kind is Regressor else brain.modules.generator
    before = first.modules.net if kind is Regressor else first.modules.generator
    assert same(dict(own.named_parameters()), dict(before.named_parameters()))


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_player_is_skipped_alone(factor: int, precision: str) -> None:
    class OneBad(Players):
        def loss_d(self, batch: Any, fake: torch.Tensor) -> torch.Tensor:
            return super().loss_d(batch, fake) * (math.nan if self.step == 1 else 1.0)

    brain = make(OneBad, precision=precision, grad_accumulation_factor=factor)
    start = copy.deepcopy(brain.modules.state_dict())
    brain.fit([1], batches(factor))
    moved = {
        name
        for name, value in brain.modules.state_dict().items()
        if not torch.equal(value, start[name])
    }
    assert {name.split(".")[0] for name in moved} == {"generator"}
    assert len(moved) == 4
    assert not brain.updates["discriminator"].optimizer.state
    assert brain.optimizer_step == 1


def test_a_run_stopped_inside_a_window_forgets_a_later_bad_batch_of_it(tmp_path: Path) -> None:
    """Back to the statistics of the window's start, which the checkpoint has to have."""

    class Saving(Regressor):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if self.step == self.stop_at:
                raise KeyboardInterrupt

        def on_fit_batch_end(self, *_: Any) -> None:
            if self.checkpointer is not None and self.step == 6:
                self.checkpointer.save_checkpoint()

    def prepared(checkpointer: Any, stop_at: int) -> Any:
        brain = make(Saving, norm=True, grad_accumulation_factor=4, checkpointer=checkpointer)
        brain.stop_at = stop_at
        return brain

    data = batches(12)
    data[7] = spoilt(data[7], "input")
    straight = prepared(None, 0)
    straight.fit([1], data)
    with pytest.raises(KeyboardInterrupt):
        prepared(Checkpointer(tmp_path), 8).fit([1], data)
    resumed = prepared(Checkpointer(tmp_path), 0)
    resumed.fit([1], data)
    assert resumed.optimizer_step == straight.optimizer_step == 2
    assert same(everything(resumed), everything(straight))


# --- patience ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patience", [0, 2])
def test_patience_ends_at_one_more_than_its_limit_and_says_what_is_known(
    kind: type[Brain], patience: int
) -> None:
    data = batches(8)
    for number in (1, 3, 4):
        data[number] = spoilt(data[number], "input")
    brain = make(kind, nonfinite_patience=patience)
    failed = 2 if patience == 0 else 5
    name = "main" if kind is Regressor else "discriminator"
    with pytest.raises(NonFiniteError) as error:
        brain.fit([7], data)
    message = str(error.value)
    assert message.startswith(f"Loss or gradients were not finite {patience + 1} times in epoch 7 ")
    for part in (
        f"nonfinite_patience is {patience}",
        f"in batch {failed}, optimizer {name!r} (utt{failed - 1}-0, utt{failed - 1}-1, ",
        f"last finite gradient norm was {brain.updates[name].last_norm:.4g}",
        "torch.autograd.detect_anomaly()",
    ):
        assert part in message
    assert brain.updates[name].last_norm > 0
    assert all(p.isfinite().all() for p in brain.modules.parameters())
    assert brain.optimizer_step == failed - 1 - patience


@pytest.mark.parametrize("kind", KINDS)
def test_patience_is_per_epoch(kind: type[Brain]) -> None:
    data = batches(4)
    data[1], data[2] = spoilt(data[1], "nan"), spoilt(data[2], "input")
    brain = make(kind, nonfinite_patience=2)
    brain.fit(range(1, 5), data)
    assert brain.optimizer_step == 2 * 4
    assert brain.nonfinite_count == 2


def test_a_batch_that_several_losses_of_one_fit_batch_find_bad_is_one_of_them() -> None:
    class Eager(Players):
        def fit_batch(self, batch: Any) -> Any:
            super().fit_batch(batch)
            return super().fit_batch(batch)

    data = batches(3)
    data[1] = spoilt(data[1], "input")
    brain = make(Eager, nonfinite_patience=1)
    brain.fit([1, 2], data)
    assert brain.nonfinite_count == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("endless", [False, True])
def test_a_skipped_window_names_the_batch_that_spoilt_it(
    kind: type[Brain], endless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = batches(7)
    data[1] = spoilt(data[1], "input")  # Of the first window,
    data[5] = spoilt(data[5], "gradient")  # and of the second, which is short.
    brain = make(kind, grad_accumulation_factor=4, nonfinite_patience=1)
    with (
        caplog.at_level("WARNING", "trainer"),
        pytest.raises(NonFiniteError, match=r"the last time in batch 7, .* \(utt4-0, .*utt6-2\);"),
    ):
        brain.fit([1], iter(data) if endless else data)
    told = [record.getMessage() for record in caplog.records]
    told = [message for message in told if "(batch " in message]
    named = [message.split("(batch ")[1].split(")")[0].split(", ")[::3] for message in told]
    assert named[0] == ["utt1-0"]
    assert named[-1] == ["utt4-0", "utt5-0", "utt6-0"]  # A loss that is finite tells of none.


def test_an_own_batch_ids_is_asked_for_batches_only(caplog: pytest.LogCaptureFixture) -> None:
    """The epoch's end closes a window when there is no batch any more."""

    class Named(Regressor):
        def batch_ids(self, batch: Any) -> list[str]:
            return [f"my-{name}" for name in batch["id"]]

    data = batches(5)
    data[4] = spoilt(data[4], "nan")
    options = {"grad_accumulation_factor": 4, "nonfinite_reports": 0}
    brain = make(Named, **options)
    with caplog.at_level("WARNING", "trainer"):
        brain.fit([1], iter(data))
    assert brain.nonfinite_count == 1
    assert "(batch my-utt4-0, my-utt4-1, my-utt4-2)" in caplog.text


def test_a_fit_after_too_many_bad_batches_keeps_its_statistics() -> None:
    again, new = make(norm=True, nonfinite_patience=0), make(norm=True)
    with pytest.raises(NonFiniteError):
        again.fit([1], [spoilt(batches(1)[0], "input")])
    for brain in (again, new):
        brain.fit([1], batches(2))
    assert same(everything(again), everything(new))


def test_without_ids_and_before_any_norm_the_message_says_so() -> None:
    data = [{"x": torch.full((2, 4), math.nan), "y": torch.zeros(2, 2)}]
    with pytest.raises(
        NonFiniteError, match=r"\(without ids\); no gradient norm was finite before"
    ):
        make(nonfinite_patience=0).fit([1], data)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("place", ["recipe", "callback"])
def test_an_exception_in_a_bad_batch_leaves_no_nan_in_buffers(place: str, window: int) -> None:
    class Raising(Regressor):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
            if place == "recipe" and not predictions.isfinite().all():
                raise RuntimeError("bad")
            return super().compute_objectives(predictions, batch, stage)

    class Watching(Callback):
        def on_loss(self, brain: Any, report: Any) -> None:
            if report.outcome == "skipped":
                raise RuntimeError("bad")

    data = batches(4)
    brain = make(Raising, norm=True, grad_accumulation_factor=window, nonfinite_reports=0)
    brain.callbacks.append(Watching())
    with pytest.raises(RuntimeError, match="bad"):
        brain.fit([1], [*data, spoilt(data[0], "input")])
    assert brain.optimizer_step == 4 // window
    statistics = brain.modules.net[1].running_mean
    assert statistics.isfinite().all()
    assert statistics.any()  # Those of the steps that were taken are kept.
    brain.fit([2], data)
    assert statistics.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 4])
def test_overflow_uses_no_patience_and_moves_no_schedule(kind: type[Brain], factor: int) -> None:
    """The first scale of a loss this large overflows; it is lowered until it does not."""

    class Large(kind):  # type: ignore[misc, valid-type]
        def optimize(self, loss: Any, *names: Any, **options: Any) -> Any:
            report = super().optimize(loss * 1e36, *names, **options)
            reports.append(report)
            return report

    reports: list[Any] = []
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    brain = make(
        Large, nonfinite_patience=0, hparams={"schedule": schedule}, schedule_every="step",
        precision="fp16", grad_accumulation_factor=factor, ema_decay=0.5,
    )  # fmt: skip
    start = copy.deepcopy(brain.modules.state_dict())
    brain.fit([1], batches(2 * factor))
    closed = [report for report in reports if report.outcome != "accumulated"]
    assert {report.outcome for report in closed} == {"overflowed"}
    assert len(closed) == 2 * len(brain.updates)
    assert all(report.loss is not None and report.norm is None for report in closed)
    assert (
        brain.stateful()["metrics"].part.average.weight() == 3 * 2 * factor
    )  # Their losses are known, and were of the data.
    assert same(brain.modules.state_dict(), start)
    assert brain.nonfinite_count == brain.optimizer_step == brain.stateful()["ema"].part.count == 0
    for update in brain.updates.values():
        assert update.lr == 0.01
        assert update.scaler.get_scale() == 65536.0 / 4


def test_an_evaluation_says_how_much_its_average_leaves_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = batches(4)
    data[2] = spoilt(data[2], "input")
    brain = make()
    with caplog.at_level("WARNING", "trainer"):
        loss = brain.evaluate(data)
    assert loss == brain.evaluate([data[0], data[1], data[3]])
    assert [record.getMessage() for record in caplog.records] == [
        "test: the loss of 3 of 12 examples was not finite; the average leaves them out"
    ]


# --- skipping gradients alone --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 4])
def test_skipping_bad_gradients_moves_the_rest(kind: type[Brain], factor: int) -> None:
    data = batches(factor)
    data[0] = spoilt(data[0], "gradient")
    brain = make(kind, skip_nonfinite_grads=True, grad_accumulation_factor=factor)
    name = "net" if kind is Regressor else "generator"
    start = copy.deepcopy(brain.modules[name].state_dict())
    brain.fit([1], data)
    moved = [
        key
        for key, value in brain.modules[name].state_dict().items()
        if not torch.equal(value, start[key])
    ]
    assert moved == ["0.weight", "2.weight", "2.bias"]
    assert brain.nonfinite_count == 0


def test_with_two_optimizers_fp16_says_that_it_ignores_skip_nonfinite_grads() -> None:
    brain = make(Players, precision="fp16", skip_nonfinite_grads=True)
    with pytest.warns(UserWarning, match="skip_nonfinite_grads is ignored under precision fp16"):
        brain.fit([1], batches(1))


def test_poison_needs_a_guard() -> None:
    """The poison that the other tests throw at the loop would break a loop without a guard."""
    model = make().modules.net
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.ones(2, 4)).mean() + poison(model[0].bias)).backward()
    optimizer.step()
    assert not model[0].bias.isfinite().all()
