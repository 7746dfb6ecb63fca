"""State has two sources, `Progress` and `Brain.stateful`; what is in them is carried everywhere."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import UserDict, defaultdict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import trainer.brain
from tests.trainer.small import Players, Regressor, batches, everything, make, same, spoilt
from trainer import Brain, Callback, Stage
from trainer.brain import FitArguments
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.run_state import Snapshot, StateEntry
from trainer.clipping import AutoClip
from trainer.progress import Progress
from trainer.schedules import EarlyStopping, WarmupDecay

FIELDS = 15  # At most so many fields.


class Counter:
    """A stateful object that only `stateful` lists."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


@dataclasses.dataclass
class Extended(Progress):
    """Progress with one more field."""

    marks: int = 0


class Marked(Regressor):
    """Counts its batches in a field of progress and in an object, both of one `fit`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counter = Counter()
        super().__init__(*args, **kwargs)

    def stateful(self) -> dict[str, StateEntry]:
        return {**super().stateful(), "mine": StateEntry(self._counter, of_fit=True)}

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        if stage is Stage.TRAIN:
            self.progress.marks += 1
            self._counter.value += 1
        return super().compute_forward(batch, stage)

    @property
    def counted(self) -> tuple[int, int]:
        return self.progress.marks, self._counter.value


@pytest.fixture(autouse=True)
def _extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.brain, "Progress", Extended)


def test_progress_is_plain_and_small() -> None:
    assert len(dataclasses.fields(Progress)) <= FIELDS
    brain = make()
    brain.fit([1], batches(2))
    plain = (int, float, str, bool, list, type(None))
    assert all(type(value) in plain for value in vars(brain.progress).values())


def test_a_checkpoint_carries_a_new_field_and_a_new_object(tmp_path: Path) -> None:
    brain = make(Marked, checkpointer=Checkpointer(tmp_path))
    brain.fit([1], batches(3))
    assert brain.counted == (3, 3)
    resumed = make(Marked, checkpointer=Checkpointer(tmp_path))
    resumed.fit([1, 2], batches(3))
    assert resumed.counted == (6, 6)


def test_a_nested_fit_leaves_a_new_field_and_a_new_object_as_they_were() -> None:
    class Nesting(Marked):
        def on_fit_batch_end(self, *args: Any) -> None:
            if self.step == 2 and not inner:
                inner.append(self.counted)
                self.fit([7], batches(4, seed=3))
                inner.append(self.counted)

    inner: list[tuple[int, int]] = []
    brain = make(Nesting)
    brain.fit([1], batches(3))
    assert inner == [(2, 2), (2, 2)]
    assert brain.counted == (3, 3)


def test_a_sandbox_leaves_a_new_field_and_a_new_object_as_they_were() -> None:
    brain = make(Marked)
    brain.fit([1], batches(3))
    with brain.sandbox():
        brain.train_batch(batches(1)[0])
        assert brain.counted == (4, 4)
    assert brain.counted == (3, 3)


def test_a_snapshot_restores_a_new_field_and_a_new_object_each_time() -> None:
    brain = make(Marked)
    brain.fit([1], batches(3))
    snapshot = Snapshot(brain.progress, brain.stateful)
    for _ in range(2):
        brain.fit([2], batches(5))
        assert brain.counted == (8, 8)
        snapshot.restore()
        assert brain.counted == (3, 3)


@pytest.mark.parametrize("kind", [Regressor, Players])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_sandbox_leaves_everything_as_it_was(kind: type[Brain], precision: str) -> None:
    brain = make(
        kind, norm=True, precision=precision, ema_decay=0.9, grad_accumulation_factor=2,
        checkpointer=None,
    )  # fmt: skip
    brain.fit([1], batches(5))
    for batch in batches(1):  # Into an open window.
        brain.train_batch(batch)
    grads = [None if p.grad is None else p.grad.clone() for p in brain.modules.parameters()]
    before, progress = everything(brain), dict(vars(brain.progress))
    generator = torch.get_rng_state()
    with brain.sandbox():
        for batch in batches(5, seed=4):
            brain.train_batch(batch)
        torch.rand(3)
        brain.modules.eval()
        assert not same(everything(brain), before)
    assert same(everything(brain), before)
    assert vars(brain.progress) == progress
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in brain.modules.modules())
    for p, grad in zip(brain.modules.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)


def test_a_sandbox_before_the_first_fit_leaves_nothing() -> None:
    class Marking(Regressor):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            self.mine = self.optimizer

        def on_fit_batch_end(self, *args: Any) -> None:
            self.late = self.step

    def ends(sandboxed: bool) -> list[Any]:
        hparams = {
            "clip": AutoClip(),
            "schedule": partial(WarmupDecay, warmup_steps=2, total_steps=9),
        }
        brain = make(Marking, norm=True, ema_decay=0.9, hparams=hparams)
        torch.manual_seed(1)
        before = dir(brain)
        if sandboxed:
            with brain.sandbox():
                brain.fit([1, 2], batches(4, seed=9), batches(1))
        assert dir(brain) == before
        brain.fit([1, 2], batches(3), batches(1))
        return everything(brain)

    assert same(ends(sandboxed=True), ends(sandboxed=False))


def test_a_brain_that_trained_in_a_sandbox_alone_has_not_trained(tmp_path: Path) -> None:
    brain = make(checkpointer=Checkpointer(tmp_path))
    with brain.sandbox():
        brain.start_training(FitArguments([1], batches(2)))
    with pytest.raises(ValueError, match="this Brain has not trained"):
        brain.evaluate(batches(1))


def test_a_sandbox_leaves_gradients_that_are_in_no_optimizer() -> None:
    class Half(Regressor):
        def init_optimizers(self) -> None:
            self.optimizer = torch.optim.SGD(self.modules.net[0].parameters(), lr=0.1)

    brain = make(Half)
    with pytest.warns(UserWarning, match="reaches 2 parameters that no optimizer has"):
        brain.fit([1], batches(1))
    grad = brain.modules.net[2].weight.grad = torch.ones(2, 6)
    with brain.sandbox():
        brain.train_batch(batches(1)[0])
    assert brain.modules.net[2].weight.grad is grad


class Weighing(Regressor):
    """Trains a parameter that is in no module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(2))
        self.first = self.modules.net[0].weight

    def init_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD([*self.modules.parameters(), self.scale], lr=0.1)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions * self.scale, batch, stage)
        return loss + self.first.square().sum()


def test_a_parameter_that_an_attribute_holds_is_trained_after_a_sandbox_and_a_resume(
    tmp_path: Path,
) -> None:
    ends = []
    for stops in (False, True):
        saver = Checkpointer(tmp_path / str(stops))
        brain = make(Weighing, checkpointer=saver)
        brain.fit([1], batches(3))
        if stops:
            with brain.sandbox():
                brain.train_batch(batches(1)[0])
            brain.fit([2], batches(3))
            brain = make(Weighing, checkpointer=saver)
            brain.fit([], batches(3))
            brain.fit([2, 3], batches(3))
        else:
            brain.fit([2], batches(3))
            brain.fit([3], batches(3))
        assert brain.first is brain.modules.net[0].weight
        ends.append([brain.scale.data, brain.modules.state_dict()])
    assert same(*ends)


class Centred(nn.Module):
    """Subtracts a running mean, and adds a table of positions that grows; neither is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        if len(x) > len(self.table):
            self.table = torch.zeros(len(x))
        return self.layer(x - self.mean) + self.table[: len(x), None]


def centred(**options: Any) -> Any:
    torch.manual_seed(0)
    return Regressor({"net": Centred()}, torch.optim.Adam, None, {"device": "cpu", **options})


def test_a_sandbox_leaves_buffers_that_no_checkpoint_holds() -> None:
    brain = centred(progressbar=False)
    brain.fit([1], batches(2))
    mean = brain.modules.net.mean.clone()
    with brain.sandbox():
        brain.train_batch(batches(1, size=5)[0])
    assert torch.equal(brain.modules.net.mean, mean)
    assert len(brain.modules.net.table) == 3


def test_looking_into_a_bad_batch_leaves_no_nan_in_any_buffer(tmp_path: Path) -> None:
    data = batches(3)
    data[1] = spoilt(data[1], "input")
    looked, plain = (
        centred(progressbar=False, nonfinite_reports=n, output_folder=str(tmp_path)) for n in (3, 0)
    )
    for brain in (looked, plain):
        brain.fit([1], data)
    assert (tmp_path / "nonfinite").is_dir()
    assert looked.modules.net.mean.isfinite().all()
    assert torch.equal(looked.modules.net.mean, plain.modules.net.mean)


class Metric(Counter):
    """A user's object with a method of a name that the framework knows, too."""

    def snapshot(self, path: str) -> None:
        raise AssertionError(path)


def test_an_object_of_a_user_may_have_any_further_method() -> None:
    brain = make(hparams={"metric": Metric()})
    brain.fit([1], batches(2), batches(1))
    with brain.sandbox():
        brain.hparams.metric.value = 7
    assert brain.hparams.metric.value == 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([[]], [[], []]),  # Without any number in it.
        ({"a": []}, {"a": {}}),
        ([{}], []),
        ({1: 2}, {"1": 2}),  # With keys that are written alike.
        ([1], [True]),
        ({"a": {"b": 1}}, {"a.b": 1}),
    ],
)
def test_an_attribute_that_changed_in_any_way_is_saved(
    first: Any, then: Any, tmp_path: Path
) -> None:
    class Changing(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            self.kept = then

    runs = []
    for _ in range(2):
        brain = make(Changing, checkpointer=Checkpointer(tmp_path))
        brain.kept = first
        brain.fit([1], batches(2))  # The second time there is nothing left to do.
        runs.append(brain)
    assert repr(runs[1].kept) == repr(then)


def test_attributes_without_a_state_are_left_out_and_a_run_is_saved(tmp_path: Path) -> None:
    class Dated(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            self.day = numpy.datetime64(f"2020-01-{self.step:02d}")

    brain = make(Dated, checkpointer=Checkpointer(tmp_path))
    brain.dice, brain.day = random.SystemRandom(), numpy.datetime64("2020-02-01")
    brain.fit([1], batches(2))
    assert brain.checkpointer.list_checkpoints()


@pytest.mark.parametrize("then", [{1}, deque([1]), UserDict({1: 2})], ids=repr)
def test_a_container_that_came_in_a_sandbox_is_gone_after_it(then: Any) -> None:
    brain = make()
    brain.kept = None
    brain.fit([1], batches(2))
    with brain.sandbox():
        brain.kept = then
    assert brain.kept is None


@pytest.mark.parametrize("first", [{1}, deque([[1]], maxlen=2), defaultdict(int, {1: 2})], ids=repr)
def test_a_container_that_is_replaced_in_a_sandbox_is_back_after_it(first: Any) -> None:
    brain = make()
    brain.kept, before = first, repr(first)
    brain.fit([1], batches(2))
    for _ in range(2):
        with brain.sandbox():
            if isinstance(first, deque):
                first[0].append(2)
            first.clear()
            brain.kept = None
        assert brain.kept is first
        assert repr(first) == before


# --- nested fits ---------------------------------------------------------------------------------


def nesting(kind: type[Brain], at: int) -> type[Brain]:
    """The kind, which at a batch of epoch 1 trains on data of weight 0, so that nothing moves."""

    class Nesting(kind):  # type: ignore[misc, valid-type]
        nested = False

        def count_examples(self, batch: Any) -> float:
            return 0.0 if self.nested else super().count_examples(batch)

        def fit_batch(self, batch: Any) -> Any:
            found = super().fit_batch(batch)
            if not self.nested and self.epoch == 1 and self.step == at:
                self.nested = True
                self.fit([5, 6], batches(3, seed=8), batches(2))
                self.nested = False
            return found

    return Nesting


@pytest.mark.parametrize("kind", [Regressor, Players])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_nested_fit_is_exact_within_an_accumulation_window(
    kind: type[Brain], at: int, precision: str
) -> None:
    options = {"grad_accumulation_factor": 4, "precision": precision}
    plain, nested = make(kind, **options), make(nesting(kind, at), **options)
    losses = []
    for brain in (plain, nested):
        brain.fit([1, 2], batches(6))
        losses.append(brain.stateful()["metrics"].part.average.state_dict())
    assert same(everything(plain), everything(nested))
    assert losses[0] == losses[1]
    assert plain.progress.epoch == nested.progress.epoch == 2
    assert plain.progress.optimizer_step == nested.progress.optimizer_step


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize(
    "hook",
    [
        "on_fit_start", "on_stage_start", "on_stage_end", "freeze_optimizers", "count_examples",
        "on_fit_batch_start", "on_fit_batch_end", "on_batch_start", "on_loss", "on_batch_end",
        "on_log",
    ],
)  # fmt: skip
def test_a_nested_fit_of_any_hook_leaves_the_outer_one_as_it_was(
    hook: str, ema_decay: float | None
) -> None:
    of_brain = hasattr(Brain, hook)

    def call(owner: Any, *arguments: Any) -> Any:
        brain = owner if of_brain else arguments[0]
        calls[0] += 1
        if calls[0] == at and not brain.nested:
            brain.nested = 1
            brain.fit([5, 6], batches(3, seed=8), batches(2))
            brain.fit([7], batches(2, seed=9))
            brain.nested = 0
        kind: Any = Weightless if of_brain else Callback
        return getattr(kind, hook)(owner, *arguments)

    class Weightless(Regressor):
        nested = 0

        def count_examples(self, batch: Any) -> float:
            return 0.0 if self.nested else super().count_examples(batch)

    def ends() -> list[Any]:
        kind = type("Nesting", (Weightless,), {hook: call} if of_brain else {})
        options = {"grad_accumulation_factor": 3, "max_grad_norm": 0.01, "log_interval": 1}
        brain = make(kind, ema_decay=ema_decay, **options)
        if not of_brain:
            brain.callbacks.append(type("Calling", (Callback,), {hook: call})())
        brain.fit([1, 2], batches(5))
        progress = {name: v for name, v in vars(brain.progress).items() if name != "seconds"}
        return [everything(brain), progress]

    calls, at = [0], -1
    plain = ends()
    for at in range(1, min(calls[0], 4) + 1):
        calls[0] = 0
        assert same(ends(), plain), at


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("hook", ["optimizers_step", "before_optimizer_step"])
def test_a_fit_within_a_step_is_refused(hook: str, precision: str) -> None:
    def call(owner: Any, *arguments: Any) -> None:
        brain = arguments[0] if arguments else owner
        brain.fit([9], batches(2))

    of_brain = hasattr(Brain, hook)
    kind = type("Nesting", (Regressor,), {hook: call} if of_brain else {})
    brain = make(kind, precision=precision, grad_accumulation_factor=2)
    if not of_brain:
        brain.callbacks.append(type("Calling", (Callback,), {hook: call})())
    # A full window after any overflow, and one that the epoch's end closes.
    for data in (batches(20), batches(1)):
        with pytest.raises(ValueError, match="fit was called within the step of an optimizer"):
            brain.fit([1], data)


def test_a_fit_before_the_first_epoch_is_not_done_again_by_a_resumed_run(tmp_path: Path) -> None:
    class Pretrained(Regressor):
        nested = False

        def on_fit_start(self) -> None:
            if not self.nested:
                self.nested = True
                self.fit([1], batches(4, seed=8))
                self.nested = False

        def on_fit_batch_end(self, *args: Any) -> None:
            if saver.folder == tmp_path and not self.nested:
                saver.save_checkpoint(name=f"{self.epoch}-{self.step}")

    saver = Checkpointer(tmp_path, keep_last=9)
    whole = make(Pretrained, checkpointer=saver)
    whole.fit([1, 2], batches(2))
    for name in ("1-1", "1-2", "2-1"):
        saver = Checkpointer(tmp_path / "resumed" / name)
        shutil.copytree(tmp_path / name, saver.folder / name)
        resumed = make(Pretrained, checkpointer=saver)
        resumed.fit([1, 2], batches(2))
        assert same(everything(resumed), everything(whole))
        assert resumed.optimizer_step == whole.optimizer_step == 8


def test_the_window_that_surrounds_a_nested_fit_steps_with_all_of_its_weight() -> None:
    weights: list[float] = []

    class Nesting(Regressor):
        def fit_batch(self, batch: Any) -> Any:
            if self.epoch == 1 and self.step == 3:
                self.fit([9], batches(5, seed=2))
            found = super().fit_batch(batch)
            if self.epoch == 1 and found.stepped:
                weights.append(found.weight)
            return found

    brain = make(Nesting, grad_accumulation_factor=4)
    brain.fit([1], batches(4, size=4))
    assert weights == [16.0]


def test_a_nested_fit_within_a_validation_trains_and_leaves_evaluation_mode() -> None:
    modes: list[bool] = []

    class Nesting(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage is Stage.VALID and epoch == 1:
                self.fit([9], batches(2))
                modes.append(self.modules.training)

    brain = make(Nesting)
    brain.fit([1], batches(2), batches(1))
    assert modes == [False]
    assert brain.optimizer_step == 4


@pytest.mark.parametrize("window", [1, 3])
def test_a_nested_fit_after_a_bad_batch_keeps_none_of_its_statistics(window: int) -> None:
    class Nesting(Regressor):
        def on_fit_batch_end(self, *args: Any) -> None:
            if self.step == 2 and self.epoch == 1:
                self.fit([9], batches(1, seed=5))

    data = batches(4)
    data[1] = spoilt(data[1], "input")
    brain = make(Nesting, norm=True, grad_accumulation_factor=window, nonfinite_reports=0)
    brain.fit([1], data)
    assert brain.modules.net[1].running_mean.isfinite().all()


@pytest.mark.parametrize("place", ["validation", "test"])
def test_a_fit_whose_weights_would_be_lost_is_refused(place: str, tmp_path: Path) -> None:
    class Nesting(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage.value == place[: len(stage.value)]:
                self.fit([9], batches(2))

    averages = place == "validation"
    saver = Checkpointer(tmp_path, keep_best={"loss": "min"})
    brain = make(Nesting, checkpointer=saver, ema_decay=0.9 if averages else None)
    if averages:
        run = partial(brain.fit, [1], batches(2), batches(1))
    else:
        brain.fit([1], batches(2))
        run = partial(brain.evaluate, batches(1), min_key="loss")
    with pytest.raises(ValueError, match="fit was called while .*: what it trained would be lost"):
        run()


def test_a_fit_within_a_test_of_the_present_weights_trains_them() -> None:
    modes: list[bool] = []

    class Adapting(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage is Stage.TEST:
                self.fit([9], batches(2))
                modes.append(self.modules.training)

    brain = make(Adapting)
    brain.fit([1], batches(2))
    brain.evaluate(batches(1))
    assert modes == [False]
    assert brain.optimizer_step == 4


def test_a_nested_fit_does_not_stop_the_outer_one_early() -> None:
    class Nesting(Regressor):
        scale = 1.0

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            return super().compute_objectives(predictions, batch, stage) * self.scale

        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage is Stage.TRAIN and epoch == 2:
                self.scale = 1e-6  # A loss that the outer fit never reaches.
                self.fit([9], batches(2), batches(1))
                self.scale = 1.0

    stopping = EarlyStopping("loss", patience=1)
    brain = make(Nesting, hparams={"early_stopping": stopping})
    brain.fit(range(1, 5), batches(4), batches(4))
    assert brain.epoch == 4


def test_a_nested_fit_at_the_limit_of_steps_does_nothing() -> None:
    class Nesting(Regressor):
        def on_stage_end(self, *args: Any) -> None:
            if self.epoch == 1:
                self.fit([9], batches(2), batches(1))
                assert self.epoch == 1

    brain = make(Nesting, optimizer_step_limit=3)
    brain.fit([1, 2], batches(5), batches(1))
    assert brain.optimizer_step == 3


# --- what each rank saves ------------------------------------------------------------------------


def test_every_entry_says_where_it_is_saved(tmp_path: Path) -> None:
    brain = make(
        Players, norm=True, checkpointer=Checkpointer(tmp_path), ema_decay=0.9,
        hparams={"counter": Counter()},
    )  # fmt: skip
    brain.fit([1], batches(2))
    entries = brain.stateful()
    shared = {name for name, entry in entries.items() if entry.scope in ("shared", "both")}
    assert shared >= {
        "modules", "optimizers.discriminator", "optimizers.generator", "ema", "trainable",
        "objects.hparams.counter",
    }  # fmt: skip
    own = set(entries) - shared
    assert own >= {"windows.generator", "guard", "metrics", "attributes", "rng"}
    saved = Checkpointer(tmp_path).read(Checkpointer(tmp_path).list_checkpoints()[0])["brain"]
    assert shared | {"progress"} == set(saved)


def leaf_types(value: Any) -> Iterator[type]:
    if isinstance(value, dict):
        for part in value.values():
            yield from leaf_types(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from leaf_types(part)
    else:
        yield type(value)


def test_snapshots_share_no_memory_with_the_run() -> None:
    brain = make(grad_accumulation_factor=2)
    brain.fit([1], batches(2))
    brain.train_batch(batches(1)[0])
    snapshot = Snapshot(brain.progress, brain.stateful)
    before = everything(brain)
    with torch.no_grad():
        for p in brain.modules.parameters():
            p.zero_()
            if p.grad is not None:
                p.grad.zero_()
    snapshot.restore()
    assert same(everything(brain), before)
    assert any(p.grad is not None and p.grad.any() for p in brain.modules.parameters())
