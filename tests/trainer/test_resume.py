"""A run that was stopped, wherever, ends as if it had never been: to the bit."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trainer import Brain, Callback, EpochCounter, Stage, seed, signals
from trainer.samples import Audio

from .resuming import (
    ITEMS,
    STEPS,
    Adversary,
    ByHand,
    Counting,
    Endless,
    Learner,
    Lines,
    Sentences,
    Setting,
    Undecided,
    assert_exact,
    batches,
    check,
    differences,
    final_state,
    log,
    resume,
    run,
    stopped,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
FEW = {"data": batches, "loader": None, "epochs": lambda: range(1, 3)}  # 22 batches, quickly


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of the time here would go into drawing the log, which is compared as it is."""
    monkeypatch.setattr("trainer.report.write_html", lambda folder: folder)


@pytest.fixture
def _signals() -> None:
    """Signals are noted while the test runs."""
    signals.install()


# ------------------------------------------------------------------------------ after each batch


def test_after_every_batch(tmp_path: Path) -> None:
    setting = Setting(window=4, data=batches, loader=None)
    straight = check(setting, tmp_path, range(1, STEPS + 1))
    assert len(straight.test.trace) == STEPS
    assert straight.optimizer_step == 9  # Windows of 4, 4 and 3 batches.
    assert len(log(straight)) == 4 + 2 * 3


@pytest.mark.parametrize(
    ("setting", "stops"),
    [
        (Setting(schedule="newbob"), (1, 11, 12, 33)),
        (Setting(window=4, precision="fp16", schedule="torch"), (6, 11, 20)),
        (Setting(dropout=0.0, precision="bf16"), (5, 22)),
        (Setting(window=4, workers=2), (14,)),
    ],
    ids=["fp32", "fp16-window", "bf16", "workers-window"],
)
def test_after_some_batches(tmp_path: Path, setting: Setting, stops: tuple[int, ...]) -> None:
    check(setting, tmp_path, stops)


MATRIX = list(itertools.product((0.0, 0.5), (1, 4), (0, 2), ("fp32", "bf16", "fp16")))


@pytest.mark.long
@pytest.mark.parametrize(("dropout", "window", "workers", "precision"), MATRIX)
def test_after_every_batch_of_every_combination(
    tmp_path: Path, dropout: float, window: int, workers: int, precision: str
) -> None:
    setting = Setting(
        dropout=dropout, window=window, workers=workers, precision=precision, schedule="newbob"
    )
    check(setting, tmp_path, range(1, STEPS + 1))


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    saved = run(Setting(**FEW), tmp_path / "saved", range(1, 23), Setting.fit)
    plain = run(Setting(**FEW), tmp_path / "plain", (), Setting.fit)
    assert not list(differences(final_state(saved), final_state(plain)))


@pytest.mark.parametrize(
    ("setting", "stops"),
    [
        (Setting(Adversary, window=2, **FEW), (1, 6, 11, 22)),
        (Setting(Adversary, window=4, precision="fp16", **FEW), (6, 11)),
        (Setting(Undecided, window=4, **FEW), (2, 5, 11)),
        (Setting(ByHand, valid=False, **FEW), (1, 10, 11)),
    ],
    ids=["two-players", "two-players-fp16", "who-trains-varies", "by-hand"],
)
@pytest.mark.filterwarnings("ignore:ByHand.fit_batch calls backward:UserWarning")
def test_with_other_steps(tmp_path: Path, setting: Setting, stops: tuple[int, ...]) -> None:
    check(setting, tmp_path, stops)


def shuffled() -> DataLoader:
    return DataLoader(
        Sentences(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize(
    "setting",
    [
        Setting(data=shuffled, loader=None),
        Setting(data=Endless, loader=None, window=4),
        Setting(Adversary, data=Endless, loader=None, window=4),
        Setting(data=Lines, window=4),
        Setting(loader={"batch_size": 4, "sampler": range(0, ITEMS, 2)}, window=4),
        Setting(options={"overfit_batches": 3}),
    ],
    ids=["loader", "endless", "endless-players", "lines", "sampler", "overfit"],
)
def test_with_other_data(tmp_path: Path, setting: Setting) -> None:
    setting = replace(setting, epochs=lambda: range(1, 3))
    batches_an_epoch = {Sentences: 6 if setting.loader and "sampler" in setting.loader else 3}
    last = batches_an_epoch.get(setting.data, 11)
    straight = check(setting, tmp_path, (2, last, last + 2))
    assert len(straight.test.trace) == 2 * last


class Mixed(IterableDataset):
    """Draws as it goes along which of the items that it holds comes next."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        held: list[dict[str, Any]] = []
        for index in range(ITEMS):
            held.append(Sentences()[index])
            if len(held) > 7:
                yield held.pop(random.randrange(len(held)))
        yield from held


class Rolled:
    """A sampler without a length that draws each index from the generators of the process."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(ITEMS):
            yield int(torch.randint(ITEMS, ())) if random.random() < 0.5 else np.random.choice(9)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(data=Mixed, window=4),
        Setting(loader={"batch_size": 4, "sampler": Rolled()}),
        Setting(data=shuffled, loader=None, options={"overfit_batches": 3}),
    ],
    ids=["mixed-stream", "rolled", "overfit"],
)
def test_with_data_that_draw_as_they_are_read(
    tmp_path: Path, setting: Setting, workers: int
) -> None:
    setting = replace(setting, epochs=lambda: range(1, 3), workers=workers)
    check(setting, tmp_path, (2, 5))


def test_every_epoch_has_another_order_and_other_noise(tmp_path: Path) -> None:
    brain = run(Setting(epochs=lambda: range(1, 3)), tmp_path, (), Setting.fit)
    epochs = [[t for t in brain.test.trace if t[0] == epoch] for epoch in (1, 2)]
    orders = [[each for t in epoch for each in t[2]] for epoch in epochs]
    assert orders[0] != orders[1]
    assert all(sorted(order) == sorted(f"s{i}" for i in range(ITEMS)) for order in orders)


# --------------------------------------------------------------------------------- between batches


class SavesAtEnds(Learner):
    """Saves in the hook at the end of each stage, as recipes do."""

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        metrics = super().on_stage_end(stage, stage_loss, epoch)
        self.checkpointer.save_and_keep_only(
            {"loss": stage_loss}, name=f"{stage.value}-{epoch}", num_to_keep=9, min_keys=["loss"]
        )
        return metrics


@pytest.mark.parametrize(("name", "seen"), [("train-1", 11), ("valid-1", 11), ("valid-2", 22)])
def test_at_the_end_of_a_stage(tmp_path: Path, name: str, seen: int) -> None:
    setting = Setting(SavesAtEnds, window=4, schedule="torch", **FEW)
    straight = run(setting, tmp_path / "straight", (), Setting.fit)
    resumed = resume(setting, tmp_path / "straight", name, tmp_path / "resumed", Setting.fit)
    assert_exact(straight, resumed, seen)


def test_an_object_that_a_validation_makes_is_made_again(tmp_path: Path) -> None:
    class Making(SavesAtEnds):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            super().on_stage_start(stage, epoch)
            if stage is Stage.VALID:
                self.errors = Counting()

    setting = Setting(Making, **FEW)
    straight = run(setting, tmp_path / "straight", (), Setting.fit)
    resumed = resume(setting, tmp_path / "straight", "valid-1", tmp_path / "resumed", Setting.fit)
    assert_exact(straight, resumed, 11)


def test_at_the_end_of_training_for_good(tmp_path: Path) -> None:
    setting = Setting(SavesAtEnds, valid=False, **FEW)
    straight = run(setting, tmp_path / "straight", (), Setting.fit)
    resumed = resume(setting, tmp_path / "straight", "train-1", tmp_path / "resumed", Setting.fit)
    assert_exact(straight, resumed, 11)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("stops", [1, 2])
def test_within_validation(tmp_path: Path, stops: int) -> None:
    straight = run(Setting(**FEW), tmp_path / "straight", (), Setting.fit)
    for stop in range(stops):  # Also where the validation of a resumed run is stopped again.
        brain = Setting(**FEW).make(tmp_path / "stopped", seed=stop)

        calls = itertools.count()
        brain.test.valid = lambda _, calls=calls: (
            os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 1 else None
        )
        with pytest.raises(SystemExit) as caught:
            Setting(**FEW).fit(brain)
        assert caught.value.code == 143
        signals.reset()
    resumed = Setting(**FEW).fit(Setting(**FEW).make(tmp_path / "stopped", seed=99))
    assert_exact(straight, resumed, 11)


class Nesting(Learner):
    """Evaluates and trains in its hooks, and gets a signal in one of these calls."""

    nested, stop = False, ""

    def run_nested(self, place: str, *, train: bool) -> None:
        if not self.nested:
            self.nested, self.place = True, f"{place} {self.epoch}"
            if train:
                self.fit(range(8, 9), batches()[:3], batches()[3:5])
            else:
                self.evaluate(batches()[:3])
            self.nested, self.place = False, ""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        if self.nested and self.place == type(self).stop:
            type(self).stop = ""
            os.kill(os.getpid(), signal.SIGTERM)
        return super().compute_forward(batch, stage)

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        if not self.nested:
            super().on_stage_start(stage, epoch)
        self.run_nested(f"{stage.value} starts", train=True)

    def count(self, loss: float, ids: list[str]) -> None:
        if not self.nested:
            super().count(loss, ids)
        if self.step == 4:
            self.run_nested("fit in batch", train=True)
            self.run_nested("evaluate in batch", train=False)

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        found = None if self.nested else super().on_stage_end(stage, stage_loss, epoch)
        self.run_nested(f"{stage.value} ends", train=False)
        return found


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    "stop",
    [
        f"{place} {epoch}"
        for place in (
            "train starts", "fit in batch", "evaluate in batch", "train ends", "valid starts",
            "valid ends",
        )
        for epoch in (1, 2)
    ],
)  # fmt: skip
def test_within_a_fit_or_an_evaluation_by_a_hook(tmp_path: Path, stop: str) -> None:
    """The run goes on to where it can resume."""
    setting = Setting(Nesting, window=3, options={"ema_decay": None}, **FEW)
    straight = run(setting, tmp_path / "straight", (), Setting.fit)
    Nesting.stop = stop
    stopped = setting.make(tmp_path / "stopped")
    with pytest.raises(signals.Interrupted):  # At the end of the fit, if not before.
        setting.fit(stopped)
    assert not Nesting.stop
    signals.reset()
    resumed = setting.fit(setting.make(tmp_path / "stopped", seed=99))
    assert_exact(straight, resumed, len(straight.test.trace) - len(resumed.test.trace))


class Watching(Callback):
    """Counts events, and sends a signal after some batches of a stage."""

    def __init__(self, stop: tuple[Stage, int] | None = None) -> None:
        self.events: dict[str, int] = defaultdict(int)
        self.stop = stop

    def on_stage_start(self, brain: Any, stage: Stage, epoch: Any, total: Any) -> None:
        self.events[f"{stage.value} starts"] += 1

    def on_batch_end(self, brain: Any, stage: Stage, loss: Any) -> None:
        self.events[stage.value] += 1
        if self.stop == (stage, self.events[stage.value]):
            os.kill(os.getpid(), signal.SIGTERM)

    def state_dict(self) -> dict[str, int]:
        return dict(self.events)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.events = defaultdict(int, state)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("stop", [(Stage.TRAIN, 3), (Stage.TRAIN, 14), (Stage.VALID, 5)])
def test_what_a_callback_counts(tmp_path: Path, stop: tuple[Stage, int]) -> None:
    """An event that comes again, since a run resumes, counts once."""
    counts = []
    for each in (stop, None, None):
        brain = Setting(**FEW).make(tmp_path / ("whole" if len(counts) == 1 else "stopped"))
        watching = Watching(each)
        brain.callbacks.append(watching)
        with contextlib.suppress(signals.Interrupted):
            Setting(**FEW).fit(brain)
        signals.reset()
        counts.append(dict(watching.events))
    assert counts[0] != counts[1] == counts[2]
    assert counts[1] == {"train starts": 2, "train": 22, "valid starts": 2, "valid": 6}


@pytest.mark.faults
def test_a_process_that_is_told_to_stop(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.resuming", str(tmp_path / "stopped")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "seven\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143
    finally:
        child.kill()
        child.communicate()
    straight = run(Setting(), tmp_path / "straight", (), Setting.fit)
    resumed = Setting().fit(Setting().make(tmp_path / "stopped", seed=99))
    assert_exact(straight, resumed, 7)


# ------------------------------------------------------------------------------ the ends of a run


@pytest.mark.parametrize(
    "setting",
    [
        Setting(**{**FEW, "epochs": lambda: EpochCounter(2)}),
        Setting(**{**FEW, "epochs": lambda: range(1, 9)}, patience=1),
        Setting(**FEW, options={"optimizer_step_limit": 16}),
    ],
    ids=["epoch-counter", "early-stopping", "step-limit"],
)
def test_ends_where_it_would_have(tmp_path: Path, setting: Setting) -> None:
    steps = 44 if setting.patience == 1 else setting.options.get("optimizer_step_limit", 22)
    straight = run(setting, tmp_path / "straight", (3, 11, steps), Setting.fit)
    assert len(straight.test.trace) == steps
    for stop in (3, 11, steps):
        resumed = resume(
            setting, tmp_path / "straight", f"stop-{stop}", tmp_path / str(stop), Setting.fit
        )
        assert_exact(straight, resumed, stop)
    again = setting.fit(setting.make(tmp_path / "straight", seed=99))
    assert_exact(straight, again, steps)


def twice(setting: Setting, brain: Learner) -> Learner:
    """A program that trains on one set and then on another."""
    setting.fit(brain)
    brain.options.max_grad_norm = 1.0
    brain.fit(range(1, 3), Endless(), batches())
    return brain


def test_a_second_fit(tmp_path: Path) -> None:
    setting = Setting(**{**FEW, "epochs": lambda: range(1, 9)}, patience=1)
    straight = check(setting, tmp_path, (4, 44, 47, 55), twice)
    # It begins although the first one was stopped early, after epoch 4.
    assert [t[0] for t in straight.test.trace[::11]] == [1, 2, 3, 4, 1]


def test_saves_come_at_the_same_steps(tmp_path: Path) -> None:
    setting = Setting(**FEW, options={"checkpoint_every_steps": 4}, keep=99)
    straight = run(setting, tmp_path / "straight", (6,), Setting.fit)
    resumed = resume(setting, tmp_path / "straight", "stop-6", tmp_path / "resumed", Setting.fit)
    names = [{each.name for each in brain.checkpointer.list_checkpoints()}
             for brain in (straight, resumed)]  # fmt: skip
    # Every save counts: after the hook's at step 6 the next one is due at 10.
    assert names[0] == {f"step-{step:08d}" for step in (4, 10, 11, 15, 19, 22)} | {"stop-6"}
    assert names[1] == names[0] - {"step-00000004"}


# -------------------------------------------------------------------- what may and may not differ


def test_a_setting_that_changed_is_not_undone(tmp_path: Path) -> None:
    class Weighted(Learner):
        weight = 1.0

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.names, self.share = ["a", "b"], type(self).weight

    setting = Setting(Weighted, **FEW)
    run(setting, tmp_path / "straight", (5,), Setting.fit)
    Weighted.weight = 2.0
    resumed = resume(setting, tmp_path / "straight", "stop-5", tmp_path / "resumed", Setting.fit)
    assert resumed.share == 2.0
    assert resumed.early == 22


def test_what_hooks_freeze_stays_frozen(tmp_path: Path) -> None:
    class Freezing(Learner):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
            if epoch == 1:
                self.modules.net[0].requires_grad_(False)
            return super().on_stage_end(stage, stage_loss, epoch)

    straight = check(Setting(Freezing, **FEW), tmp_path, (3, 14, 22))
    assert not straight.modules.net[0].weight.requires_grad
    assert straight.modules.net[4].weight.requires_grad


def test_what_a_hook_does_once_is_done_once(tmp_path: Path) -> None:
    """The hook of a stage runs again in a resumed run, and must not act a second time."""

    class Decaying(Learner):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            super().on_stage_start(stage, epoch)
            if stage is Stage.TRAIN:
                self.optimizer.param_groups[0]["lr"] *= 0.5
                with torch.no_grad():
                    self.modules.net[0].weight.mul_(0.9)
                self.counting.total += 100

    straight = check(Setting(Decaying, schedule="newbob", window=4, **FEW), tmp_path, (3, 11, 14))
    assert straight.optimizer.param_groups[0]["lr"] == 0.05 / 8  # Twice here, once by NewBob.


def test_a_fit_within_a_fit(tmp_path: Path) -> None:
    """As recipes do that train one player on a set of its own before each epoch."""

    class Nested(Learner):
        inside = False

        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if not Nested.inside:
                super().on_stage_start(stage, epoch)
            if stage is Stage.TRAIN and not Nested.inside:
                Nested.inside = True
                self.fit(range(1), batches()[:3])
                Nested.inside = False

        def count(self, loss: float, ids: list[str]) -> None:
            if not Nested.inside:
                super().count(loss, ids)

    straight = check(Setting(Nested, **FEW), tmp_path, (1, 5, 11, 14, 22))
    assert [t[:2] for t in straight.test.trace] == [(e, s) for e in (1, 2) for s in range(1, 12)]
    assert straight.optimizer_step == 2 * (3 + 11)
    names = {each.name for each in straight.checkpointer.list_checkpoints()}
    assert names == {f"stop-{stop}" for stop in (1, 5, 11, 14, 22)} | {"step-00000028"}


def test_a_test_changes_nothing_and_saves_the_weights_of_the_run(tmp_path: Path) -> None:
    class Testing(Learner):
        evaluate_batch = Brain.evaluate_batch  # The other one counts.

        def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
            torch.rand(3), random.random(), np.random.rand()

        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
            if stage is Stage.TEST:
                self.checkpointer.save_checkpoint(name="within")
            return super().on_stage_end(stage, stage_loss, epoch)

    brain = run(Setting(Testing, **FEW), tmp_path, (), Setting.fit)
    (end,) = brain.checkpointer.list_checkpoints()
    before, generators = final_state(brain), seed.rng_state()
    brain.evaluate(batches(), min_key="loss")
    assert not list(differences(generators, seed.rng_state()))
    after = final_state(brain)
    del before["log"], after["log"]
    assert not list(differences(before, after))
    within = brain.checkpointer.find_checkpoint()
    assert within.name == "within"
    states = [brain.checkpointer.read(each)["brain"]["modules"] for each in (end, within)]
    assert not list(differences(*states))


def test_what_cannot_be_saved_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Collecting(Learner):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.paths, self.found = [Path("a")], []  # The first is a setting.
            self.rows: list[Any] = []  # Those of `show`, which each stage gathers anew.

        def on_fit_batch_end(self, batch: Any, *rest: Any) -> None:
            self.found.append(Path("b"))
            self.rows.append({"id": "a", "sound": Audio(torch.zeros(10), 8000)})
            super().on_fit_batch_end(batch, *rest)

    run(Setting(Collecting, **FEW), tmp_path, (5, 6), Setting.fit)
    told = [each.message for each in caplog.records if "a checkpoint cannot" in each.message]
    assert told == [
        "Collecting.found changes in training and holds what a checkpoint cannot: a resumed run "
        "will not have it (numbers, texts, tensors, and containers of these are saved). "
        "What one stage alone needs is best dropped in on_stage_end"
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is saved in its middle, within a window."""
    folder = tmp_path_factory.mktemp("saved")
    run(Setting(window=4, **FEW), folder, (6,), Setting.fit)
    return folder


class Forgetful(Learner):
    def on_fit_start(self) -> None:
        super().on_fit_start()
        del self.made_late
        self.made_late_too = Counting()


class Talkative(Learner):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.another = Counting()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"width": 7},
            r"the saved parameter 'net.0.weight' has shape \(6, 3\), this Brain's has \(7, 3\)",
        ),
        (
            {"optimizer": torch.optim.AdamW},
            "the saved optimizer of the optimizer 'main' is Adam, this Brain's is AdamW",
        ),
        (
            {"schedule": "newbob"},
            "the saved schedule of the optimizer 'main' is WarmupDecay, this Brain's is NewBob",
        ),
        (
            {"brain": Adversary},
            r"does not fit the modules of this Brain: missing \['judge.0.bias', .*\], unexpected "
            "nothing",
        ),
        (
            {"brain": Talkative},
            r"does not fit the stateful objects of this Brain: missing \['another'\], unexpected "
            "nothing",
        ),
    ],
    ids=["shape", "optimizer", "schedule", "modules", "objects"],
)
def test_what_does_not_fit_is_named_before_anything_changes(
    tmp_path: Path, saved: Path, change: dict[str, Any], sentence: str
) -> None:
    setting = replace(Setting(window=4, **FEW), **change)
    stopped(saved, "stop-6", tmp_path)
    brain = setting.make(tmp_path, seed=99)
    before = {name: tensor.clone() for name, tensor in brain.modules.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        setting.fit(brain)
    assert brain.test.trace == []
    assert brain.optimizer_step == 0
    assert all(torch.equal(before[name], now) for name, now in brain.modules.state_dict().items())


def test_an_object_that_no_hook_makes_any_more_is_named(tmp_path: Path, saved: Path) -> None:
    stopped(saved, "stop-6", tmp_path)
    setting = Setting(Forgetful, window=4, **FEW)
    with pytest.raises(ValueError, match=r"missing nothing, unexpected \['made_late'\]"):
        setting.fit(setting.make(tmp_path, seed=99))


class Quiet(Learner):
    """Its loss is small enough for the first scale of fp16."""

    def compute_objectives(self, *arguments: Any) -> torch.Tensor:
        return super().compute_objectives(*arguments) * 1e-3


@pytest.mark.parametrize(
    ("old", "new"), [("fp32", "fp16"), ("fp16", "fp32"), ("fp32", "bf16"), ("fp16", "fp16")]
)
def test_precision_may_change_within_a_window(tmp_path: Path, old: str, new: str) -> None:
    """The gradients of an open window mean the same under another loss scale."""
    setting = Setting(Quiet, window=4, **FEW)
    norms = []
    for before, after in ((old, new), ("fp32", "fp32")):
        options = {"max_grad_norm": None, "log_interval": 1}
        setting = replace(setting, precision=before, options=options)
        run(setting, tmp_path / before / after, (6,), Setting.fit)
        setting = replace(setting, precision=after, options={**options, "optimizer_step_limit": 2})
        into = tmp_path / f"{before}-{after}-resumed"
        resumed = resume(setting, tmp_path / before / after, "stop-6", into, Setting.fit)
        assert resumed.optimizer_step == 2
        assert resumed.test.trace[-1][1] == 8
        norms += [line["optimizers"]["main"]["norm"] for line in log(resumed)[1:2]]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize(("size", "step"), [(2, 13), (8, 4), (4, 7)])
def test_the_size_of_batches_may_change_within_an_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, step: int
) -> None:
    """The same share of the epoch is left out; what rounding leaves over is seen twice."""
    setting = Setting(data=lambda: Sentences(44), epochs=lambda: range(1, 3))
    straight = run(setting, tmp_path / "straight", (6,), Setting.fit)
    other = replace(setting, loader={"batch_size": size})
    resumed = resume(other, tmp_path / "straight", "stop-6", tmp_path / "resumed", Setting.fit)
    assert resumed.test.trace[0][:2] == (1, step)
    seen = [id for entry in straight.test.trace[:6] for id in entry[2]]
    rest = [id for entry in resumed.test.trace if entry[0] == 1 for id in entry[2]]
    assert set(seen + rest) == {f"s{i}" for i in range(44)}
    assert len(seen + rest) - 44 < size
    assert ("when it was left after 6" in caplog.text) == (size != 4)


def test_an_average_of_weights_may_begin_later(tmp_path: Path) -> None:
    without = Setting(options={"ema_decay": None}, **FEW)
    run(without, tmp_path / "straight", (22,), Setting.fit)
    stopped(tmp_path / "straight", "stop-22", tmp_path / "resumed")
    brain = replace(without, options={"ema_decay": 0.5}).make(tmp_path / "resumed", seed=99)
    brain = without.fit(brain)
    average = brain.stateful()["ema"].part.state_dict()["average"]
    assert all(torch.equal(average[name], p) for name, p in brain.modules.named_parameters())


def test_the_state_of_a_run_has_every_part(tmp_path: Path) -> None:
    """Everything that the comparisons above compare is there to be compared."""
    brain = run(Setting(Quiet, window=4, precision="fp16", **FEW), tmp_path, (6,), Setting.fit)
    checkpoint = next(
        each for each in brain.checkpointer.list_checkpoints() if each.name == "stop-6"
    )
    saved = brain.checkpointer.read(checkpoint)["brain"]
    assert {name for name in saved if name.startswith("objects.")} == {
        f"objects.{name}"
        for name in (
            "hparams.early_stopping", "hparams.shared", "hparams.generator", "hparams.numbers",
            "counting", "dice", "made_late", "stage_total", "metrics.a", "metrics.b.0",
        )
    }  # fmt: skip
    assert saved["progress"]["optimizer_step"] == 1
    assert saved["ema"]["count"] == 1
    assert saved["optimizers.main"]["schedule"]["last_epoch"] == 1
    assert len(saved["optimizers.main"]["optimizer"]["state"]) == 6
    assert saved["optimizers.main"]["scaler"]["scale"] == 65536.0
    own = torch.load(checkpoint.path / "rank-0.pt", weights_only=True)["brain"]
    assert own["windows.main"]["count"] == 2
    assert set(own["rng"]) >= {"torch", "python", "numpy"}
    # The examples of the first window.
    assert own["metrics"]["average"]["sums"][""][1] == 16.0
    assert set(own["attributes"]["values"]) == {
        "train_stats", "longest", "best", "recent", "history", "kinds", "distinct", "early",
        "hparams.level",
    }  # fmt: skip
    assert brain.updates["main"].window.count == 0
