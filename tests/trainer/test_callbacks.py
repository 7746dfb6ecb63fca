"""Callbacks watch a run: which are called, in which order, and what they may not do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import TwoRanks
from tests.trainer.small import Players, Regressor, batches, everything, make, same, spoilt
from trainer import Brain, Stage, distributed, signals
from trainer.callbacks import EVENTS, Callback, CallbackList
from trainer.checkpoint import Checkpointer


class Recorder(Callback):
    """Keeps the names of the events that it sees."""

    def __init__(self, name: str = "a") -> None:
        self.name, self.seen = name, list[str]()


def recording(event: str) -> Any:
    def method(self: Recorder, *arguments: Any) -> None:
        self.seen.append(event)

    return method


for each in EVENTS:
    setattr(Recorder, each, recording(each))


def with_callbacks(kind: type[Brain], *callbacks: Callback, **options: Any) -> Any:
    brain = make(kind, **options)
    for callback in callbacks:
        brain.callbacks.append(callback)
    return brain


def test_the_moments_of_a_fit_come_in_their_order() -> None:
    recorder = Recorder()
    brain = with_callbacks(Regressor, recorder, log_interval=2)
    brain.fit([1], batches(2), batches(1))
    step = ["on_loss", "before_optimizer_step"]
    assert [event for event in recorder.seen if event in step] == step[::-1] * 2
    trained = ["on_batch_start", "before_optimizer_step", "after_optimizer_step", "on_loss"]
    assert recorder.seen == [
        "on_fit_start", "on_stage_start",
        *trained, "on_batch_end",
        *trained, "on_log", "on_batch_end",
        "on_stage_end", "on_stage_start", "on_batch_end", "on_stage_end", "on_fit_end",
    ]  # fmt: skip
    recorder.seen.clear()
    brain.evaluate(batches(1))
    assert recorder.seen == [
        "on_evaluate_start", "on_stage_start", "on_batch_end", "on_stage_end", "on_evaluate_end",
    ]  # fmt: skip


def test_a_checkpoint_and_a_resume_are_told(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    brain = with_callbacks(Regressor, first, checkpointer=Checkpointer(tmp_path))
    brain.fit([1], batches(2))
    assert first.seen.count("on_checkpoint") == 1
    assert "on_resume" not in first.seen
    resumed = with_callbacks(Regressor, second, checkpointer=Checkpointer(tmp_path))
    resumed.fit([1, 2], batches(2))
    assert second.seen[:2] == ["on_fit_start", "on_resume"]


@pytest.mark.parametrize("stage", ["fit", "evaluate"])
def test_an_exception_of_the_data_is_told(stage: str) -> None:
    recorder = Recorder()
    brain = with_callbacks(Regressor, recorder)
    with pytest.raises(ValueError, match="set"):
        brain.fit([1], 3) if stage == "fit" else brain.evaluate(3)
    assert recorder.seen == ["on_exception"]


def test_an_exception_is_told_and_goes_on() -> None:
    recorder = Recorder()
    brain = with_callbacks(Regressor, recorder, nonfinite_patience=0)
    with pytest.raises(RuntimeError, match="not finite"):
        brain.fit([1], [spoilt(batches(1)[0], "nan")])
    assert recorder.seen[-2:] == ["on_fit_end", "on_exception"]


def test_callbacks_are_called_in_list_order_and_only_where_they_override() -> None:
    order: list[str] = []

    class First(Callback):
        def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
            order.append("first")

    class Second(Callback):
        def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
            order.append("second")

    class Configured(Regressor):
        def configure_callbacks(self) -> list[Callback]:
            return [Second()]

    brain = with_callbacks(Configured, First())
    brain.fit([1], batches(2))
    assert order == ["first", "second"] * 2
    callbacks = CallbackList([First()])
    for event in set(EVENTS) - {"on_batch_end"}:
        callbacks.call(event, "more arguments than", "any method takes", 1, 2, 3, 4)


def test_a_callback_that_comes_late_sees_every_moment_that_follows() -> None:
    class Late(Regressor):
        def on_fit_start(self) -> None:
            self.callbacks.append(recorder)

    recorder = Recorder()
    make(Late, monitor_every=0, nonfinite_reports=0).fit([1], batches(1))
    assert recorder.seen[:4] == [
        "on_stage_start", "on_batch_start", "before_optimizer_step", "after_optimizer_step",
    ]  # fmt: skip


def test_callbacks_come_by_constructor_and_by_hparams() -> None:
    given, named = Recorder(), Recorder()
    parts = make().modules
    brain = Regressor(
        parts, torch.optim.SGD, {"callbacks": [named]},
        {"device": "cpu", "progressbar": False}, callbacks=[given],
    )  # fmt: skip
    found = [each for each in brain.callbacks if isinstance(each, Recorder)]
    assert found == [named, given]


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(ValueError, match="callbacks holds a int; allowed: objects of a class"):
        make(hparams={"callbacks": [3]})


@pytest.mark.parametrize("given", [Recorder(), {"a": Recorder()}, 3])
def test_what_is_no_list_of_callbacks_is_refused(given: Any) -> None:
    class Configured(Regressor):
        def configure_callbacks(self) -> Any:
            return given

    with pytest.raises(ValueError, match=f"callbacks is a {type(given).__name__}; allowed: a list"):
        make(hparams={"callbacks": given})
    with pytest.raises(ValueError, match=f"callbacks is a {type(given).__name__}; allowed: a list"):
        make(Configured).fit([1], batches(1))


def test_a_callback_keeps_its_attributes() -> None:
    recorder = Recorder()
    recorder.shown = 7  # type: ignore[attr-defined]
    with_callbacks(Regressor, recorder).fit([1], batches(1), progressbar=False)
    assert recorder.shown == 7  # type: ignore[attr-defined]


def test_an_error_in_a_callback_names_it() -> None:
    class Broken(Callback):
        def on_loss(self, brain: Brain, report: Any) -> None:
            raise KeyError("nothing")

    with pytest.raises(KeyError) as caught:
        with_callbacks(Regressor, Broken()).fit([1], batches(1))
    assert "Broken.on_loss" in "".join(caught.value.__notes__)


class Failing(Callback):
    """Fails at the end of a run."""

    def on_fit_end(self, brain: Brain) -> None:
        raise OSError("no space")

    def on_exception(self, brain: Brain, error: BaseException) -> None:
        raise OSError("no space")


class Stopping(Regressor):
    """Is told to stop."""

    def on_fit_batch_end(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_callback_that_fails_at_the_end_keeps_no_other_from_it() -> None:
    recorder = Recorder()
    with pytest.raises(OSError, match="no space") as caught:
        with_callbacks(Regressor, Failing(), recorder).fit([1], batches(1))
    assert "Failing.on_fit_end" in "".join(caught.value.__notes__)
    assert recorder.seen[-2:] == ["on_fit_end", "on_exception"]


def test_a_callback_that_fails_at_the_end_hides_no_error_and_no_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    signals.install()
    saver = Checkpointer(tmp_path)
    with pytest.raises(signals.Interrupted):
        with_callbacks(Stopping, Failing(), recorder, checkpointer=saver).fit([1], batches(2))
    assert len(saver.list_checkpoints()) == 1
    assert recorder.seen[-3:] == ["on_fit_end", "on_checkpoint", "on_exception"]
    assert "Failing.on_fit_end failed (OSError: no space)" in caplog.text
    assert "Failing.on_exception failed (OSError: no space)" in caplog.text


def test_starts_and_ends_are_balanced_where_a_start_fails() -> None:
    class Refusing(Callback):
        def on_fit_start(self, brain: Brain) -> None:
            raise KeyError

        def on_evaluate_start(self, brain: Brain) -> None:
            raise KeyError

    recorder = Recorder()
    brain = with_callbacks(Regressor, recorder, Refusing())
    with pytest.raises(KeyError):
        brain.fit([1], batches(1))
    with pytest.raises(KeyError):
        brain.evaluate(batches(1))
    assert recorder.seen == [
        "on_fit_start", "on_fit_end", "on_exception",
        "on_evaluate_start", "on_evaluate_end", "on_exception",
    ]  # fmt: skip


def test_a_callback_that_comes_late_sees_every_event() -> None:
    recorder = Recorder()
    brain = make(monitor_every=0)  # No other callback asks for steps.
    brain.fit([1], batches(1))
    brain.callbacks.append(recorder)
    brain.fit([2], batches(1))
    assert "before_optimizer_step" in recorder.seen
    assert "after_optimizer_step" in recorder.seen


@pytest.mark.parametrize("nested", [False, True])
def test_a_run_goes_on_after_a_callback_failed_in_a_step(nested: bool) -> None:
    class Broken(Callback):
        def before_optimizer_step(self, brain: Brain, update: Any, gradients: Any) -> None:
            if brain.epoch == 9:
                raise KeyError

    class Nesting(Regressor):
        def on_fit_batch_end(self, *args: Any) -> None:
            if nested and self.step == 2 and self.epoch == 1:
                with pytest.raises(KeyError):
                    self.fit([9], batches(9))

    brain = with_callbacks(Nesting, Broken(), precision="fp16")
    if not nested:
        with pytest.raises(KeyError):
            brain.fit([9], batches(9))
    brain.fit([1, 2], batches(6))
    assert brain.optimizer_step > 6


@pytest.mark.parametrize("kind", [Regressor, Players])
def test_gradients_are_measured_and_not_clipped_before_a_step(kind: type[Brain]) -> None:
    class Norms(Callback):
        def before_optimizer_step(self, brain: Brain, update: Any, gradients: Any) -> None:
            found = torch.cat([g.reshape(-1) for g in gradients.tensors]).norm()
            before.append((gradients.norm, float(found)))

        def after_optimizer_step(self, brain: Brain, update: Any, gradients: Any) -> None:
            after.append(gradients.norm_after)

    before: list[tuple[float, float]] = []
    after: list[float] = []
    brain = with_callbacks(kind, Norms(), max_grad_norm=1e-3)
    brain.fit([1], batches(3))
    assert len(before) == len(after) == 3 * len(brain.updates)
    for measured, found in before:
        assert measured == pytest.approx(found, rel=1e-5)
        assert measured > 1e-3
    assert after == pytest.approx([1e-3] * len(after), rel=1e-4)


def test_a_callback_with_state_is_saved_and_restored(tmp_path: Path) -> None:
    class Counting(Callback):
        def __init__(self) -> None:
            self.batches = 0

        def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.batches = state["batches"]

    with_callbacks(Regressor, Counting(), checkpointer=Checkpointer(tmp_path)).fit([1], batches(4))
    one, two = Counting(), Counting()
    brain = with_callbacks(Regressor, one, two, checkpointer=Checkpointer(tmp_path))
    brain.fit([1, 2], batches(4))
    assert one.batches == 8
    assert two.batches == 4  # The second of its class is new.


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_an_error_in_the_state_of_a_callback_names_it(method: str, tmp_path: Path) -> None:
    class Kept(Callback):
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    def fail(*_: Any) -> None:
        raise KeyError("best")

    with_callbacks(Regressor, Kept(), checkpointer=Checkpointer(tmp_path)).fit([1], batches(1))
    failing = type("Failing", (Kept,), {method: fail})
    failing.__name__ = "Kept"
    brain = with_callbacks(Regressor, failing(), checkpointer=Checkpointer(tmp_path))
    with pytest.raises(KeyError) as caught:
        brain.fit([1, 2], batches(1))
    assert "raised by the state 'callbacks.Kept'" in caught.value.__notes__


def test_a_callback_that_can_only_save_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Half(Callback):
        def state_dict(self) -> dict[str, int]:
            return {}

    make(hparams={"callbacks": [Half()]})
    (warning,) = caplog.messages
    assert warning.startswith("the callback Half has state_dict alone, so that it is not saved")


def test_watching_changes_nothing() -> None:
    plain, watched = make(Players), with_callbacks(Players, Recorder())
    for brain in (plain, watched):
        brain.fit([1, 2], batches(4), batches(2))
    assert same(everything(plain), everything(watched))


# --- Brain.log -----------------------------------------------------------------------------------


class Reports(Callback):
    def __init__(self) -> None:
        self.metrics: list[tuple[str, dict[str, Any]]] = []

    def on_stage_end(self, brain: Brain, report: Any) -> None:
        self.metrics.append((report.stage, report.metrics))


class Logging(Regressor):
    """Logs in every hook."""

    def on_fit_start(self) -> None:
        self.log("started", 1)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        size = len(batch["x"])
        self.log("size", float(size), weight=size)
        self.log("tensor", torch.tensor(float(size)))
        return super().compute_objectives(predictions, batch, stage)

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        self.log("end", 2.0)
        return {"own": 3.0}


def test_logged_values_are_averaged_by_weight_over_their_stage() -> None:
    reports = Reports()
    brain = with_callbacks(Logging, reports)
    data = [*batches(1, size=3), *batches(1, size=1)]
    brain.fit([1], data, data[:1])
    brain.evaluate(data[1:])
    (train, first), (valid, second), (test, third) = reports.metrics
    assert (train, valid, test) == ("train", "valid", "test")
    assert first == {"started": 1, "size": (9 + 1) / 4, "tensor": 2.0, "end": 2.0, "own": 3.0}
    assert second == {"size": 3.0, "tensor": 3.0, "end": 2.0, "own": 3.0}
    assert third == {"size": 1.0, "tensor": 1.0, "end": 2.0, "own": 3.0}
    assert brain.test_metrics == third


def test_checkpoints_are_kept_by_a_logged_metric(tmp_path: Path) -> None:
    class Scored(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            self.log("wer", abs(2 - (epoch or 0)))

    saver = Checkpointer(tmp_path, keep_best={"wer": "min"})
    make(Scored, checkpointer=saver).fit([1, 2, 3], batches(2), batches(1))
    best = saver.find_checkpoint(min_key="wer")
    assert best is not None
    assert best.meta["epoch"] == 2


class Nesting(Regressor):
    """Trains on other data in the middle of an epoch, or fails there."""

    depth, fails = 0, False

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        self.log("depth", self.depth)
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, *args: Any) -> None:
        if self.step == 3 and self.depth == 0:
            self.depth = 1
            self.fit([7], batches(4, seed=5), batches(1))
            self.depth = 0
        elif self.step == 2 and self.depth == 1 and self.fails:
            raise KeyError


class Records(Reports):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []

    def on_log(self, brain: Brain, record: dict[str, Any]) -> None:
        self.steps.append((record["step"], record["optimizers"]["main"]["stepped"]))


def test_a_nested_fit_reports_what_it_trained_and_the_outer_one_the_rest() -> None:
    records = Records()
    with_callbacks(Nesting, records, log_interval=2).fit([1], batches(6), batches(2))
    assert records.metrics == [
        ("train", {"depth": 1.0}), ("valid", {"depth": 1.0}),
        ("train", {"depth": 0.0}), ("valid", {"depth": 0.0}),
    ]  # fmt: skip
    # Steps 3 to 6 are those of the nested fit, and step 7 that of the batch around it.
    assert records.steps == [(2, 2), (4, 2), (6, 2), (8, 2), (10, 2)]


def test_what_a_hook_logs_before_a_stage_is_in_that_stage() -> None:
    class Starting(Regressor):
        depth = 0

        def on_fit_start(self) -> None:
            self.log("fit", self.depth)

        def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
            self.log("evaluate", self.depth)

        def on_fit_batch_end(self, *args: Any) -> None:
            if self.depth == 0:
                self.depth = 1
                self.evaluate(batches(1))
                self.fit([7], batches(1))

    reports = Reports()
    brain = with_callbacks(Starting, reports)
    brain.fit([1], batches(2))
    brain.evaluate(batches(1))
    assert reports.metrics == [
        ("test", {"evaluate": 1.0}), ("train", {"fit": 1.0}),
        ("train", {"fit": 0.0}), ("test", {"evaluate": 1.0}),
    ]  # fmt: skip


def test_what_a_failed_stage_logged_is_in_no_later_one() -> None:
    records = Records()
    brain = with_callbacks(Nesting, records)
    brain.fails, brain.depth = True, 1
    with pytest.raises(KeyError):
        brain.fit([1], batches(4))
    brain.depth = -1
    brain.fit([1], batches(2))
    assert records.metrics == [("train", {"depth": -1.0})]


@pytest.mark.parametrize("name", ["", 3, "seconds", "stage", "skipped"])
def test_a_name_that_no_metric_may_have_is_refused_where_it_is_logged(name: Any) -> None:
    with pytest.raises(ValueError, match=f"log got the name {name!r}; allowed: any text but kind"):
        make().log(name, 1.0)


def test_numbers_of_numpy_are_numbers() -> None:
    class Scored(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            for kind in (np.float32, np.int64, np.float64):
                self.log("value", kind(3))

    reports = Reports()
    with_callbacks(Scored, reports).fit([1], batches(1))
    assert reports.metrics == [("train", {"value": 3.0})]


def test_what_is_no_scalar_cannot_be_logged() -> None:
    brain = make()
    for value in (torch.ones(2), torch.tensor(1j), {"a": 1.0}):
        with pytest.raises(
            ValueError, match=r"self.log\('x', …\): an average is of scalars; got a"
        ):
            brain.log("x", value)
    for weight in (torch.ones(2), "a", None, -1):
        with pytest.raises(
            ValueError, match="got the weight .*; allowed: a finite number, 0 or mo"
        ):
            brain.log("x", 1.0, weight)


def test_what_a_callback_logs_at_the_end_of_a_stage_is_of_the_next_one() -> None:
    class Late(Callback):
        def on_stage_end(self, brain: Brain, report: Any) -> None:
            brain.log("late", ["train", "valid", "test"].index(report.stage))

    reports = Reports()
    brain = with_callbacks(Regressor, Late(), reports)
    brain.fit([1, 2], batches(2), batches(1))
    brain.evaluate(batches(1))
    assert reports.metrics == [
        ("train", {}), ("valid", {"late": 0.0}), ("train", {"late": 1.0}),
        ("valid", {"late": 0.0}), ("test", {"late": 1.0}),
    ]  # fmt: skip


def test_an_evaluation_within_another_one_keeps_what_that_has_logged() -> None:
    class Twice(Regressor):
        inner = False

        def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
            self.log("inner", self.inner)
            if not self.inner:
                self.inner = True
                self.evaluate(batches(1))
                self.inner = False
            return super().evaluate_batch(batch, stage)

    reports = Reports()
    with_callbacks(Twice, reports).evaluate(batches(2))
    test = [("test", {"inner": 1.0})]
    assert reports.metrics == [*test, *test, ("test", {"inner": 0.0})]


def logged_on_a_rank() -> list[Any]:
    rank = distributed.rank()

    class Uneven(Regressor):
        def count_examples(self, batch: Any) -> Any:
            return torch.tensor(len(batch["x"]))  # A tensor, as a sum of lengths is.

        def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
            self.log("size", len(batch["x"]), weight=self.count_examples(batch))
            self.log(f"rank {rank}", np.float32(rank), weight=np.float32(2))
            return super().compute_objectives(predictions, batch, stage)

    reports = Reports()
    brain = with_callbacks(Uneven, reports)
    data = [batches(1, size=1 + rank)[0]] * 4  # Each rank takes every second one.
    brain.fit([1], data, data)
    loss = brain.evaluate(data)
    return [reports.metrics, loss, type(loss).__name__]


def test_names_and_weights_may_differ_between_ranks(two_ranks: TwoRanks) -> None:
    first, second = two_ranks(logged_on_a_rank)
    assert first == second
    stages, _, kind = first
    assert kind == "float"
    expected = {"size": (2 * 1 + 4 * 2) / 6, "rank 0": 0.0, "rank 1": 1.0}
    assert stages == [("train", expected), ("valid", expected), ("test", expected)]
