"""Users' networks, optimizers, schedules and metrics: the right result, or a sentence."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from tests.trainer.small import Players, Regressor, batches, make, net, same
from trainer import Brain, Callback, Checkpointer, EpochCounter, Stage, distributed
from trainer.devices import pick_device
from trainer.schedules import NewBob, Noam, Plateau

OPTIONS = {"device": "cpu", "progressbar": False}


def build(kind: type[Brain], modules: dict[str, nn.Module], opt: Any = None, **more: Any) -> Any:
    """A Brain of these networks; what is no argument of Brain is a run option."""
    given = {key: more.pop(key) for key in ("hparams", "checkpointer") if key in more}
    opt = opt or partial(torch.optim.SGD, lr=0.1)
    return kind(modules, opt, run_opts={**OPTIONS, **more}, **given)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# --- networks ------------------------------------------------------------------------------------


class Pair(Regressor):
    """An encoder and a head, with an optimizer each unless ``joint``."""

    way: bool | None = None  # use_reentrant, or None for no checkpointing
    joint, named = False, False

    def init_optimizers(self) -> None:
        if self.joint:
            return super().init_optimizers()
        parts = self.modules.items()
        self.optimizers_dict = {name: self.opt_class(part.parameters()) for name, part in parts}
        return None

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        x = batch["x"]
        if self.way is None:
            return self.modules.head(self.modules.enc(x))
        x = x.clone().requires_grad_()
        return self.modules.head(checkpoint(self.modules.enc, x, use_reentrant=self.way))

    def fit_batch(self, batch: Any) -> Any:
        if not self.named:
            return super().fit_batch(batch)
        for name, other in (("head", "enc"), ("enc", "head")):
            with self.frozen(other):
                out = self.compute_forward(batch, Stage.TRAIN)
                report = self.optimize(self.compute_objectives(out, batch, Stage.TRAIN), name)
        return report


def pair(norm: bool = False) -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {"enc": net(norm=norm), "head": nn.Linear(2, 2)}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("form", ["one optimizer", "together", "named"])
def test_activation_checkpointing_trains_as_without(form: str, window: int) -> None:
    ends = []
    for way in (None, True, False):
        brain = build(Pair, pair(), grad_accumulation_factor=window)
        brain.way, brain.joint, brain.named = way, form == "one optimizer", form == "named"
        brain.fit([1], batches(4))
        ends.append(flat(brain.modules))
    assert not torch.equal(ends[0], torch.cat([flat(part) for part in pair().values()]))
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_reentrant_checkpointing_that_gives_no_gradient_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unready(Pair):
        dummy = False

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            dummy = (torch.zeros((), requires_grad=True),) if self.dummy else ()
            part = lambda x, *_: self.modules.enc(x)  # noqa: E731
            return self.modules.head(checkpoint(part, batch["x"], *dummy, use_reentrant=True))

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        build(Unready, pair()).fit([1], batches(3))
    assert sum("gives 'enc' no gradient" in each for each in caplog.messages) == 1
    brain = build(Unready, pair())
    brain.dummy = True
    brain.fit([1], batches(3))
    assert not torch.equal(flat(brain.modules.enc), flat(pair()["enc"]))
    brain.fit_batch = lambda batch: brain.optimize(
        brain.compute_objectives(brain.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN),
        "head",
    )
    with pytest.raises(ValueError, match="part under reentrant checkpointing.*use_reentrant=False"):
        brain.fit([1], batches(1))


class Sharing(Pair):
    """Two optimizers, both of which have the encoder."""

    def init_optimizers(self) -> None:
        enc = [*self.modules.enc.parameters()]
        self.optimizers_dict = {
            name: self.opt_class([*enc, *self.modules[name].parameters()]) for name in "ab"
        }

    def loss(self, name: str, batch: Any) -> Tensor:
        return (self.modules[name](self.modules.enc(batch["x"])) - batch["y"]).square().mean()

    def fit_batch(self, batch: Any) -> Any:
        if self.form == "mapping":
            return self.optimize({name: self.loss(name, batch) for name in "ab"})
        if self.form == "joint":
            return self.optimize(self.loss("a", batch) + self.loss("b", batch))
        return [self.optimize(self.loss(name, batch), name) for name in "ab"][-1]


def sharing(form: str, **options: Any) -> Any:
    torch.manual_seed(0)
    modules = {"enc": nn.Linear(4, 4), "a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
    brain = build(Sharing, modules, max_grad_norm=None, **options)
    brain.form = form
    return brain


@pytest.mark.parametrize(("form", "window"), [("mapping", 1), ("joint", 1), ("apart", 2)])
def test_a_shared_parameter_whose_gradients_would_mix_is_named_before_a_step(
    form: str, window: int
) -> None:
    brain = sharing(form, grad_accumulation_factor=window)
    before = flat(brain.modules)
    with pytest.raises(ValueError, match=r"'(a|b)' and '(a|b)'.* share the parameters enc\.weight"):
        brain.fit([1], batches(2))
    assert torch.equal(flat(brain.modules), before)


def test_optimizers_that_share_a_parameter_and_step_in_turns_move_it_twice() -> None:
    brain, plain = sharing("apart"), sharing("apart")
    plain.init_optimizers()
    for batch in batches(3):
        for name in "ab":
            plain.optimizers_dict[name].zero_grad()
            plain.loss(name, batch).backward()
            plain.optimizers_dict[name].step()
    brain.fit([1], batches(3))
    torch.testing.assert_close(flat(brain.modules), flat(plain.modules))


@pytest.mark.parametrize("nested", [False, True])
def test_a_frozen_part_in_evaluation_mode_stays_in_it(nested: bool) -> None:
    modules = pair(norm=True)
    modules["enc"].requires_grad_(False).eval()
    if nested:
        modules = {"both": nn.ModuleDict(modules)}
    enc = modules["both"]["enc"] if nested else modules["enc"]

    class Frozen(Pair):
        joint = True

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            assert self.modules.training == (stage is Stage.TRAIN)
            assert not enc.training
            parts = self.modules.both if nested else self.modules
            return parts["head"](parts["enc"](batch["x"]))

    brain = build(Frozen, modules, partial(torch.optim.SGD, lr=0.1))
    brain.fit([1, 2], batches(2), batches(1))
    assert torch.equal(enc[1].running_mean, torch.zeros(6))
    assert enc[1].num_batches_tracked == 0


def test_other_parts_in_evaluation_mode_are_put_into_training_mode() -> None:
    """A network that comes in evaluation mode, as pretrained ones do, still trains."""
    modules = {"net": nn.Sequential(net(norm=True), nn.Dropout(0.5))}
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).requires_grad_(False)
    modules["net"].append(frozen)
    modules["net"].eval()
    seen = []

    class Noting(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            seen.append([part.training for part in (*self.modules.net, frozen[1])])

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            return (predictions - batch["y"]).square().mean()

    build(Noting, modules).fit([1], batches(2))
    assert seen == [[True, True, False, False]]


def test_a_part_that_no_optimizer_has_stays_in_evaluation_mode() -> None:
    class HeadOnly(Pair):
        def init_optimizers(self) -> None:
            self.optimizer = self.opt_class(self.modules.head.parameters())

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            with torch.no_grad():
                x = self.modules.enc(batch["x"])
            return self.modules.head(x)

    modules = pair(norm=True)
    modules["enc"].eval()
    build(HeadOnly, modules).fit([1], batches(2))
    assert torch.equal(modules["enc"][1].running_mean, torch.zeros(6))


def test_a_trained_layer_that_was_put_into_evaluation_mode_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Hooked(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            self.modules.net[1].eval()

    for kind, trains in ((Regressor, True), (Hooked, False)):
        caplog.clear()
        brain = make(kind, norm=True)
        brain.modules.net[1].eval()
        brain.fit([1, 2], batches(2))
        assert brain.modules.net[1].training == trains
        lines = [each for each in caplog.messages if "puts net.1 into training mode" in each]
        assert len(lines) == 1


def test_a_train_method_of_the_users_own_is_called() -> None:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            super().train(mode)
            self[1].eval()
            return self

    modules = {"net": Own(*net(norm=True))}
    brain = build(Regressor, modules)
    brain.fit([1], batches(2))
    assert brain.modules.net[1].num_batches_tracked == 0


class Tied(nn.Module):
    """Two layers with one weight, a table that is not saved, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.ones(4), persistent=False)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return self.out(self.b(torch.tanh(self.a(x * self.table))))

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Plain(Regressor):
    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions - batch["y"]).square().mean()


@pytest.mark.parametrize("number", [1, 2])
def test_averages_of_tied_weights_and_extra_state_are_tested(tmp_path: Path, number: int) -> None:
    def brain() -> Any:
        torch.manual_seed(0)
        keep = Checkpointer(tmp_path, keep_last=3)
        more = {"ema_decay": 0.5, "average_checkpoints": number}
        return build(Plain, {"net": Tied()}, checkpointer=keep, **more)

    trained = brain()
    trained.fit(range(1, 4), batches(3), batches(1))
    weights, seen = flat(trained.modules), trained.modules.net.seen
    losses = [each.evaluate(batches(1), min_key="loss") for each in (trained, brain())]
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0])
    assert torch.equal(flat(trained.modules), weights)
    assert trained.modules.net.seen == seen == 9
    found = trained.checkpointer.find(min_key="loss", n=number)
    averages = [trained.checkpointer.read(each, ["brain"])["brain"]["ema"] for each in found]
    by_hand = Tied()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parts = [each["average"][f"net.{name}"].double() for each in averages]
            parameter.copy_(sum(parts) / number)
    batch = batches(1)[0]
    wanted = (by_hand(batch["x"]) - batch["y"]).square().mean().item()
    assert losses[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_stage_start"])
def test_an_average_begins_with_the_weights_that_a_hook_has_loaded(
    tmp_path: Path, hook: str
) -> None:
    loaded = net().state_dict()
    for tensor in loaded.values():
        tensor.fill_(0.5)

    def load(brain: Any, *given: Any) -> None:
        if brain.progress.optimizer_step == 0:
            brain.modules.net.load_state_dict(loaded)

    kind: Any = type("Loading", (Plain,), {hook: load})
    still = partial(torch.optim.SGD, lr=0.0)
    keep = Checkpointer(tmp_path)
    brain = build(kind, {"net": net()}, still, ema_decay=0.9, checkpointer=keep)
    brain.fit([1, 2], batches(2), batches(1))
    with brain.best_weights():
        assert torch.equal(flat(brain.modules), torch.full_like(flat(brain.modules), 0.5))


def test_a_layer_that_a_hook_puts_in_and_no_optimizer_has_is_named() -> None:
    class Exchanging(Plain):
        def on_fit_start(self) -> None:
            self.modules.net[-1] = nn.Linear(self.modules.net[-1].in_features, 2)

    with pytest.warns(UserWarning, match="reaches 2 parameters that no optimizer has"):
        make(Exchanging).fit([1], batches(2))


def test_groups_that_a_hook_has_added_are_told_of_in_a_resumed_run(tmp_path: Path) -> None:
    class Thawing(Plain):
        def init_optimizers(self) -> None:
            self.modules.net[0].requires_grad_(False)
            self.optimizer = self.opt_class(self.modules.net[-1].parameters())

        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> None:
            self.optimizer.add_param_group({"params": self.modules.net[0].parameters()})

    make(Thawing, checkpointer=Checkpointer(tmp_path)).fit([1], batches(2))
    with pytest.raises(ValueError, match=r"of \[2, 2\].* or with groups that a hook has"):
        make(Thawing, checkpointer=Checkpointer(tmp_path)).fit([1, 2], batches(2))


def test_an_average_that_the_run_did_not_have_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = make(checkpointer=Checkpointer(tmp_path))
    trained.fit([1], batches(2))
    wanted = trained.evaluate(batches(1))
    tested = make(checkpointer=Checkpointer(tmp_path), ema_decay=0.5)
    assert tested.evaluate(batches(1)) == wanted
    assert any("ema_decay is 0.5, but the run had none" in each for each in caplog.messages)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_lazy_modules_are_refused_before_the_training(options: dict[str, Any]) -> None:
    modules = {"net": nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 2))}
    seen: list[Any] = []

    class Noting(Plain):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            seen.append(batch)

    with pytest.raises(
        ValueError, match=r"shape of net\.0\.weight, of a lazy module, .*: run a batch thr"
    ):
        build(Noting, modules, **options)
    assert not seen
    with torch.no_grad():
        modules["net"](batches(1)[0]["x"])
    build(Noting, modules, **options).fit([1], batches(2))
    assert len(seen) == 2


def test_batch_norm_of_one_example_is_told_with_what_to_do() -> None:
    brain = make(norm=True)
    with pytest.raises(ValueError, match=r"epoch 1, batch 3 \(utt0-0\).*drop_last=True"):
        brain.fit([1], [*batches(2), *batches(1, size=1)])
    assert torch.isfinite(flat(brain.modules)).all()


# --- optimizers ----------------------------------------------------------------------------------


class Relative(torch.optim.Optimizer):
    """Steps of a size of its own, as Adafactor's."""

    def __init__(self, params: Any, rate: dict[str, None]) -> None:
        super().__init__(params, dict(rate))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.01 * p.grad


@pytest.mark.parametrize("rate", [{}, {"lr": None}])
def test_an_optimizer_without_a_rate_trains(tmp_path: Path, rate: dict[str, None]) -> None:
    def brain() -> Any:
        more = {"output_folder": str(tmp_path / "run"), "log_interval": 1}
        return make(
            optimizer=partial(Relative, rate=rate), checkpointer=Checkpointer(tmp_path), **more
        )

    brain().fit([1], batches(3), batches(1))
    again = brain()
    again.fit([1, 2], batches(3), batches(1))
    assert again.optimizer_step == 6
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"lr": null' in lines
    assert "NaN" not in lines


def test_a_schedule_or_search_for_an_optimizer_without_a_rate_is_refused() -> None:
    for more in ({"hparams": {"schedule": NewBob}}, {"find_lr": True}):
        brain = make(optimizer=partial(Relative, rate={"lr": None}), **more)
        with pytest.raises(ValueError, match="lr is None"):
            brain.fit([1], batches(3))


class Wrapper(torch.optim.Optimizer):
    """Wraps another optimizer, and leaves out the constructor of torch's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def step(self, closure: Any = None) -> None:
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def test_an_optimizer_without_hooks_trains_as_the_one_that_it_wraps(tmp_path: Path) -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    plain = make(optimizer=sgd)
    wrapped = make(optimizer=lambda p: Wrapper(sgd(p)), checkpointer=Checkpointer(tmp_path))
    for brain in (plain, wrapped):
        brain.fit([1], batches(3))
    assert torch.equal(flat(plain.modules), flat(wrapped.modules))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_new_optimizer_between_two_fits_trains_and_is_resumed(tmp_path: Path, kind: Any) -> None:
    """Phases with an optimizer each, of another kind or of the same one."""

    class Stopping(Plain):
        stop = 0

        def on_fit_batch_end(self, batch: Any, *given: Any) -> None:
            if self.optimizer_step + 1 == self.stop:
                raise KeyboardInterrupt

    def phases(folder: str, stop: int = 0) -> Any:
        keep = Checkpointer(tmp_path / folder)
        brain = make(Stopping, checkpointer=keep, checkpoint_every_steps=1)
        brain.stop = stop
        brain.fit([1], batches(3))
        brain.opt_class = partial(kind, lr=0.05)
        brain.init_optimizers()
        brain.fit([1], batches(3))
        return brain

    whole = phases("whole")
    assert whole.updates["main"].optimizer is whole.optimizer
    assert type(whole.optimizer) is kind
    assert len(whole.optimizer.state) == 4
    with pytest.raises(KeyboardInterrupt):
        phases("cut", stop=5)
    resumed = phases("cut")
    assert same(resumed.modules.state_dict(), whole.modules.state_dict())
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_an_optimizer_that_stays_goes_on_beside_a_new_one() -> None:
    brain = make(Players, hparams={"schedule": partial(Noam, warmup_steps=10)})
    brain.fit([1], batches(3))
    kept, old = brain.updates["discriminator"], brain.optimizers_dict["generator"]
    new = torch.optim.SGD(brain.modules.generator.parameters(), lr=0.1)
    brain.optimizers_dict = {**brain.optimizers_dict, "generator": new}
    brain.fit([1], batches(3))
    assert brain.updates["discriminator"] is kept
    assert kept.schedule.last_epoch == 6
    assert brain.updates["generator"].optimizer is new
    assert brain.updates["generator"].schedule.last_epoch == 3
    assert kept.others == [brain.updates["generator"]]
    old.step()  # It is a recipe's own now: no warning.


def test_optimizers_that_cannot_be_taken_over_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Thawing(Plain):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if epoch == 2:
                self.init_optimizers()

    make(Thawing).fit([1, 2], batches(2))
    assert sum("a hook has replaced the optimizers" in each for each in caplog.messages) == 1
    caplog.clear()
    brain = make()
    brain.fit([1], batches(2))
    brain.opt_class = partial(torch.optim.SGD, lr=1.0)
    brain.fit([1], batches(2))
    assert sum("call init_optimizers() before fit" in each for each in caplog.messages) == 1


# --- schedules -----------------------------------------------------------------------------------


def rate(brain: Any) -> float:
    return float(brain.optimizer.param_groups[0]["lr"])


class Metrics(Plain):
    """Gives the metrics that ``of`` returns."""

    def on_stage_end(self, stage: Stage, loss: Any, epoch: int | None = None) -> Any:
        return self.of(epoch) if stage is Stage.VALID else None


def scheduled(schedule: Any, of: Any = lambda epoch: {}, **more: Any) -> Any:
    brain = make(Metrics, optimizer=partial(torch.optim.SGD, lr=0.1), **more | {
        "hparams": {"schedule": schedule}})  # fmt: skip
    brain.of = of
    return brain


def test_a_plateau_is_that_of_the_metric_that_is_named(caplog: pytest.LogCaptureFixture) -> None:
    plateau = partial(lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, factor=0.5)
    rising, falling = (lambda epoch: {"acc": epoch}), (lambda epoch: {"acc": -epoch})
    for of, wanted in ((rising, 0.1), (falling, 0.1 / 2**3)):
        brain = scheduled(plateau, of, schedule_metric="acc")
        brain.fit(range(1, 5), batches(1), batches(1))
        assert rate(brain) == pytest.approx(wanted)
    assert not any("watches" in each for each in caplog.messages)
    scheduled(plateau, rising).fit([1], batches(1), batches(1))
    assert any("mode='max') watches the metric 'loss'" in each for each in caplog.messages)
    with pytest.raises(ValueError, match="watches the metric 'f1', which the stage did not give"):
        scheduled(plateau, rising, schedule_metric="f1").fit([1], batches(1), batches(1))


@pytest.mark.parametrize(
    ("schedule", "every", "told"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=100), "epoch", "total_steps=100"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=4), "step", "at the last rate"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=2), "epoch", "at the last rate"),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=50), "epoch", "T_max=50"),
        (partial(lr_scheduler.LinearLR, total_iters=50), "epoch", "total_iters=50"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=6), "step", ""),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=3), "epoch", ""),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=3), "epoch", ""),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=50), "step", ""),
        (partial(Noam, warmup_steps=50), "epoch", ""),
    ],
)
@pytest.mark.parametrize("counter", [range(1, 4), EpochCounter(3)])
def test_a_schedule_whose_length_does_not_fit_is_told_and_ends_no_run(
    caplog: pytest.LogCaptureFixture, schedule: Any, every: str, told: str, counter: Any
) -> None:
    if isinstance(counter, EpochCounter):
        counter.current = 0
    brain = scheduled(schedule, schedule_every=every)
    brain.fit(counter, batches(2))
    assert brain.optimizer_step == 6
    lines = [each for each in caplog.messages if "schedule_every" in each]
    assert len(lines) == bool(told)
    assert all(told in each for each in lines)
    ended = [each for each in caplog.messages if "the learning rate stays" in each]
    assert len(ended) == (told == "at the last rate")


def test_a_cycle_that_is_over_leaves_the_rate(tmp_path: Path) -> None:
    def run(epochs: int) -> Any:
        cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)
        brain = scheduled(cycle, schedule_every="step", checkpointer=Checkpointer(tmp_path))
        brain.fit(range(1, epochs + 1), batches(2))
        return brain

    last = 0.1 / 25 / 1e4
    assert rate(run(2)) == pytest.approx(last)
    longer = run(4)
    assert longer.optimizer_step == 8
    assert rate(longer) == pytest.approx(last)


def test_a_cycle_as_long_as_the_limit_of_steps_is_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)
    scheduled(cycle, schedule_every="step", optimizer_step_limit=4).fit([1, 2, 3], batches(2))
    assert not any("OneCycleLR" in each for each in caplog.messages)


@pytest.mark.parametrize("kind", [NewBob, Plateau])
def test_the_last_rate_of_a_resumed_schedule_is_that_of_the_optimizer(
    tmp_path: Path, kind: Any
) -> None:
    def run(epochs: int) -> Any:
        brain = scheduled(
            partial(kind, patience=0), lambda epoch: {"loss": 1.0},
            checkpointer=Checkpointer(tmp_path),
        )  # fmt: skip
        brain.fit(range(1, epochs + 1), batches(1), batches(1))
        return brain

    run(3)
    schedule = run(3).updates["main"].schedule
    assert schedule.get_last_lr() == [0.1 / 4] == [rate_of(schedule)]


def rate_of(schedule: Any) -> float:
    return float(schedule.optimizer.param_groups[0]["lr"])


# --- metrics and counters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.5]), torch.tensor([[0.5]]), np.array([0.5]), np.array(0.5),
        np.float32(0.5), np.float64(0.5), np.array([0.5], "f2"),
    ],
)  # fmt: skip
def test_a_metric_of_one_element_is_a_number(tmp_path: Path, value: Any) -> None:
    keep = Checkpointer(tmp_path, keep_best={"acc": "max"})
    plateau = partial(Plateau, metric="acc", mode="max")
    brain = scheduled(plateau, lambda epoch: {"acc": value}, checkpointer=keep)
    brain.fit([1], batches(1), batches(1))
    found = keep.find_checkpoint(max_key="acc")
    assert found is not None
    assert type(found.meta["acc"]) is float
    assert found.meta["acc"] == 0.5
    brain.log("share", value)
    bare = Checkpointer(tmp_path / "bare").save_checkpoint({"acc": value})
    assert bare is not None
    assert bare.meta["acc"] == 0.5


def test_nested_metrics_are_numbers_and_what_decides_is_one(tmp_path: Path) -> None:
    keep = Checkpointer(tmp_path)
    nested = {"by": {"a": torch.tensor([0.5]), "b": [np.float32(2)]}}
    scheduled(None, lambda epoch: nested, checkpointer=keep).fit([1], batches(1), batches(1))
    found = keep.find_checkpoint()
    assert found is not None
    assert found.meta["by"] == {"a": 0.5, "b": [2.0]}
    for value in ("low", {"a": 1.0}):
        brain = scheduled(partial(Plateau, metric="acc"), lambda epoch, v=value: {"acc": v})
        with pytest.raises(
            ValueError, match="schedule watches the metric 'acc', which is .* no nu"
        ):
            brain.fit([1], batches(1), batches(1))


def test_a_metric_of_several_elements_is_refused() -> None:
    for value in (torch.ones(2), np.ones(2)):
        with pytest.raises(ValueError, match=r"returned 'acc' of shape \(2,\); allowed: a number"):
            scheduled(None, lambda epoch, v=value: {"acc": v}).fit([1], batches(1), batches(1))


@pytest.mark.parametrize("name", [1, None, ("wer", "test")])
def test_a_metric_whose_name_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="returned a metric named .*; allowed: a text"):
        scheduled(None, lambda epoch: {name: 1.0}).fit([1], batches(1), batches(1))


def test_a_save_by_a_metric_that_is_misspelt_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = Checkpointer(tmp_path, keep_best={"WER": "min"})
    for epoch in (1, 2):
        keep.save_and_keep_only({"epoch": epoch, "wer": 3.0}, min_keys=["cer"])
    assert caplog.messages == [
        "keep_best names the metric 'WER', which the epoch did not give; it gave wer: no "
        "checkpoint can be the best by it",
        "a save is to keep by the metric 'cer', which the epoch did not give; it gave wer: no "
        "checkpoint can be the best by it",
    ]


@pytest.mark.parametrize(("kept", "told"), [(1, True), (3, False)])
def test_an_average_of_more_checkpoints_than_are_kept_is_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int, told: bool
) -> None:
    brain = make(checkpointer=Checkpointer(tmp_path, keep_last=kept), average_checkpoints=3)
    brain.fit([], batches(1))
    assert any("average_checkpoints is 3" in each for each in caplog.messages) == told


@pytest.mark.parametrize("end_of_epoch", [False, True])
def test_a_bare_checkpointer_goes_on_within_the_epoch(tmp_path: Path, end_of_epoch: bool) -> None:
    counter = EpochCounter(3)
    keep = Checkpointer(tmp_path, recoverables={"counter": counter})
    for epoch in counter:
        if epoch == 2:
            keep.save_checkpoint(end_of_epoch=end_of_epoch)
            break
    again = EpochCounter(3)
    Checkpointer(tmp_path, recoverables={"counter": again}).recover_if_possible()
    assert list(again) == ([3] if end_of_epoch else [2, 3])


def test_sound_weights_of_a_checkpoint_are_tested_if_its_epoch_is_not_known(
    tmp_path: Path,
) -> None:
    counter = EpochCounter(2)
    keep = Checkpointer(tmp_path, keep_last=2)
    brain = make(Regressor, hparams={"counter": counter}, checkpointer=keep)
    brain.fit(counter, batches(2), batches(1))
    expected = brain.evaluate(batches(1), min_key="loss")
    best = keep.find(min_key="loss")[0].path / "brain.pt"
    best.write_bytes(best.read_bytes()[::-1])
    with pytest.warns(UserWarning, match="brain.pt is broken.*; epoch counters keep their present"):
        assert brain.evaluate(batches(1), min_key="loss") == expected


def test_a_counter_beside_a_brain_goes_on_within_the_epoch(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Noting(Plain):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if len(seen) == 5:
                seen.append("killed")
                raise Stop
            seen.append((self.progress.epoch, batch["id"][0]))

    for _ in range(2):
        counter = EpochCounter(2)
        keep = Checkpointer(tmp_path, recoverables={"counter": counter})
        brain = make(Noting, checkpointer=keep, checkpoint_every_steps=1)
        try:
            brain.fit(counter, batches(3))
        except Stop:
            continue
    wanted: list[Any] = [(epoch, f"utt{item}-0") for epoch in (1, 2) for item in range(3)]
    wanted.insert(5, "killed")
    assert seen == wanted
    assert counter.current == 2


class Stop(Exception):
    """The end of a run that is killed."""


@pytest.mark.parametrize("name", ["step", "epoch", "optimizer_step"])
@pytest.mark.parametrize("kill", [3, 7])
def test_counters_that_a_recipe_changes_lose_no_batch(tmp_path: Path, name: str, kill: int) -> None:
    seen: list[Any] = []

    class Counting(Plain):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if len(seen) == kill:
                seen.append("killed")
                raise Stop
            seen.append((self.progress.epoch, batch["id"][0]))

        def on_fit_batch_end(self, *given: Any) -> None:
            setattr(self, name, getattr(self, name) + 1)

    for _ in range(2):
        brain = make(Counting, checkpointer=Checkpointer(tmp_path), checkpoint_every_steps=1)
        try:
            brain.fit([1, 2], batches(4))
        except Stop:
            continue
    wanted: list[Any] = [(epoch, f"utt{item}-0") for epoch in (1, 2) for item in range(4)]
    wanted.insert(kill, "killed")
    assert seen == wanted
    # Own counts stand beside those of the loop, and are saved.
    assert getattr(brain, name) == {"step": 8, "epoch": 1 + 8, "optimizer_step": 8}[name]
    assert (brain.progress.step, brain.progress.epoch, brain.progress.optimizer_step) == (4, 2, 8)


# --- state of users' objects ---------------------------------------------------------------------


class Statistics:
    """A running sum in NumPy."""

    def __init__(self) -> None:
        self.total, self.most, self.rows = np.zeros(3), np.float64(0), [np.arange(2, dtype="i2")]

    def update(self, x: Any) -> None:
        self.total += x  # In place: a snapshot must not change with it.
        self.most = np.float64(self.total.max())
        self.rows[0] = self.rows[0] + 1

    def state_dict(self) -> dict[str, Any]:
        counts = {np.int64(3): np.uint32(1), np.str_("a"): np.arange(2, dtype=">f8")}
        return {
            "total": self.total, "most": self.most, "rows": self.rows, "none": np.zeros((0, 2)),
            "counts": counts, "random": np.random.RandomState(0).get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["none"].shape == (0, 2)
        assert state["counts"]["a"].tolist() == [0, 1]
        assert state["counts"][3] == 1
        np.random.RandomState().set_state(state["random"])
        self.total, self.most, self.rows = state["total"], state["most"], state["rows"]


GENERATORS: dict[str, Any] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "RandomState": lambda: np.random.RandomState(3),
    **{
        kind: partial(lambda kind: np.random.Generator(getattr(np.random, kind)(3)), kind)
        for kind in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    },
}


class Drawing(Plain):
    """Draws from generators that it has as attributes, hyperparameters and in containers."""

    def on_fit_batch_start(self, *given: Any) -> None:
        if self.optimizer_step == self.hparams.stop:
            raise Stop
        for each in (self.dice, self.hparams.dice, self.more["some"][0]):
            if isinstance(each, torch.Generator):
                self.hparams.drawn.append(torch.randn((), generator=each).item())
            elif isinstance(each, random.Random):
                self.hparams.drawn.append(each.gauss(0, 1))
            else:  # NumPy keeps the other half of a draw for the next one.
                self.hparams.drawn += [
                    each.normal(),
                    float(
                        each.integers(9, dtype=np.int32)
                        if hasattr(each, "integers")
                        else each.randint(9)
                    ),
                ]


@pytest.mark.parametrize("make_generator", GENERATORS.values(), ids=GENERATORS)
def test_a_generator_of_any_kind_goes_on_in_a_resumed_run(
    make_generator: Any, tmp_path: Path
) -> None:
    def draw(folder: Path, stop: int | None = None) -> list[float]:
        drawn: list[float] = []
        brain = make(
            Drawing,
            checkpointer=Checkpointer(folder),
            hparams={"drawn": drawn, "dice": make_generator(), "stop": stop},
            checkpoint_every_steps=1,
        )
        brain.dice, brain.more = make_generator(), {"some": [make_generator()]}
        with nullcontext() if stop is None else pytest.raises(Stop):
            brain.fit(range(3), batches(3))
        return drawn

    whole = draw(tmp_path / "whole")
    assert len(set(whole)) >= 9
    assert draw(tmp_path / "parts", 4) + draw(tmp_path / "parts") == whole


def test_a_checkpoint_of_a_version_that_saved_fewer_generators_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import seed

    with monkeypatch.context() as before:
        before.setattr(seed, "as_stateful", lambda value: None)
        brain = make(Plain, checkpointer=Checkpointer(tmp_path))
        brain.dice = np.random.RandomState(3)
        brain.fit([1], batches(2))
    brain = make(Plain, checkpointer=Checkpointer(tmp_path))
    brain.dice = np.random.RandomState(3)
    brain.fit([1, 2], batches(2))
    assert brain.optimizer_step == 4


class Normalised(Plain):
    """Changes a user's object and attributes of NumPy's."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.hparams.statistics.total += 1  # A resumed run undoes it.

    def on_fit_batch_start(self, *given: Any) -> None:
        if self.optimizer_step == vars(self.hparams).get("stop"):
            raise Stop

    def on_fit_batch_end(self, batch: Any, *given: Any) -> None:
        self.hparams.statistics.update(batch["x"].sum(0)[:3].numpy())
        self.own = getattr(self, "own", np.zeros(2, dtype="complex64")) + 1j


def numbers_of(brain: Any) -> list[Any]:
    found = brain.hparams.statistics
    return [found.total.tolist(), float(found.most), found.rows[0].tolist(), brain.own.tolist()]


def test_numpy_in_the_state_of_users_objects_is_saved_and_restored(tmp_path: Path) -> None:
    def run(epochs: int, folder: str, stop: int = -1) -> Any:
        hparams = {"statistics": Statistics(), "stop": stop}
        keep = Checkpointer(tmp_path / folder)
        brain = make(Normalised, hparams=hparams, checkpointer=keep, checkpoint_every_steps=1)
        brain.fit(range(1, epochs + 1), batches(3))
        return brain

    with pytest.raises(Stop):
        run(2, "resumed", stop=4)
    resumed, whole = run(2, "resumed"), run(2, "whole")
    assert numbers_of(resumed) == numbers_of(whole)
    found = resumed.hparams.statistics
    assert (found.total.dtype, found.rows[0].dtype) == (np.float64, np.int16)
    assert resumed.own.dtype == np.complex64


def test_a_snapshot_of_arrays_does_not_change_with_them() -> None:
    brain = make(Normalised, hparams={"statistics": Statistics()})
    brain.fit([1], batches(3))
    before = numbers_of(brain)
    with brain.sandbox():
        brain.train_batch(batches(1)[0])
        assert numbers_of(brain) != before
    assert numbers_of(brain) == before


@pytest.mark.parametrize(
    "value", [np.array(["a"]), np.array([None]), np.array(["2020"], "M8[D]"), np.ma.zeros(2)]
)
def test_arrays_that_hold_no_numbers_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    class Odd(Statistics):
        def state_dict(self) -> dict[str, Any]:
            return {"total": {"of": value}}

    keep = Checkpointer(tmp_path, recoverables={"odd": Odd()})
    with pytest.raises(ValueError, match=r"odd\.total\.of is a numpy\.(ndarray|ma)"):
        keep.save_checkpoint()


@pytest.mark.parametrize("place", ["hparams", "callback", "recoverable"])
def test_a_state_that_cannot_be_saved_is_refused_before_the_training(
    tmp_path: Path, place: str
) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"names": {"a", "b"}}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    seen: list[Any] = []

    class Noting(Plain):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            seen.append(batch)

    keep = Checkpointer(tmp_path, recoverables={"odd": Odd()} if place == "recoverable" else None)
    brain = make(Noting, hparams={"odd": Odd()} if place == "hparams" else {}, checkpointer=keep)
    if place == "callback":
        brain.callbacks.append(Odd())
    with pytest.raises(ValueError, match="(?i)odd.*names is a builtins.set, which a checkpoint"):
        brain.fit([1], batches(2))
    assert not seen


def test_a_rate_of_numpy_is_saved_and_resumed(tmp_path: Path) -> None:
    def run(epochs: int) -> float:
        cosine = partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: np.cos(epoch / 7))
        brain = scheduled(cosine, checkpointer=Checkpointer(tmp_path))
        brain.fit(range(1, epochs + 1), batches(1))
        return rate(brain)

    assert run(2) == pytest.approx(0.1 * math.cos(2 / 7))
    assert run(3) == pytest.approx(0.1 * math.cos(3 / 7))


# --- attributes, arguments, environment ----------------------------------------------------------


def test_an_attribute_of_the_framework_runs_or_is_refused() -> None:
    brain = make()
    brain.device = "cpu"
    brain.hparams = {"width": 3}
    assert brain.device == torch.device("cpu")
    assert brain.hparams.width == 3
    brain.fit([1], batches(2))

    class Early(Brain):
        def __init__(self) -> None:
            self.callbacks = []  # Before that of Brain, which would replace it.
            super().__init__()

    with pytest.raises(ValueError, match=r"Early\.callbacks cannot be set: use"):
        Early()

    class Counting(Brain):
        def __init__(self) -> None:
            self.hparams = None
            self.step = 0
            super().__init__()

    with pytest.raises(ValueError, match=r"Counting\.step is a count.*0 cannot be set before it"):
        Counting()
    for name, value in {
        "device": "meta", "options": {}, "callbacks": [], "progress": 0, "updates": None,
        "hparams": 3, "step": "one", "log": "text", "driver": 3, "modules": {},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"Regressor\.{name} .*(use|set|choose|allowed)"):
            setattr(brain, name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("callbacks", ()), ("device", "cpu"), ("log", "text"), ("frozen", True)]
)
def test_an_attribute_of_a_class_that_would_have_no_effect_is_refused(
    name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"Own\.{name} .*(use|choose)"):
        type("Own", (Brain,), {name: value})


@pytest.mark.parametrize("name", ["device", "modules", "hparams", "checkpointer"])
def test_a_property_in_place_of_an_attribute_of_the_framework_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Own\.{name} is a property without a setter.*choose"):
        type("Own", (Plain,), {name: property(lambda brain: None)})


@pytest.mark.parametrize("made", [None, [1], nn.Identity()])
def test_what_makes_no_optimizer_is_named(made: Any) -> None:
    with pytest.raises(ValueError, match=rf"made a {type(made).__name__}; allowed: a torch.optim"):
        build(Plain, {"net": net()}, lambda parameters: made).fit([1], batches(1))


@pytest.mark.parametrize("count", [None, "many", -1, math.nan])
def test_a_weight_of_a_batch_that_is_no_number_is_refused(count: Any) -> None:
    kind: Any = type("Own", (Plain,), {"count_examples": lambda brain, batch: count})
    with pytest.raises(ValueError, match="count_examples returned .*; allowed: a finite number"):
        make(kind).fit([1], batches(1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"modules": net()}, "modules is a Sequential; allowed: a mapping from names"),
        ({"modules": [net()]}, "modules is a list; allowed: a mapping from names"),
        ({"modules": {"a.b": net()}}, "modules has a name that cannot be one: .*a.b"),
        ({"modules": {1: net()}}, "modules has a name that cannot be one: .*int"),
        ({"hparams": [1]}, "hparams is a list; allowed: a mapping"),
        ({"run_opts": ["cpu"]}, "run_opts is a list; allowed: a mapping"),
        ({"checkpointer": "saves"}, "checkpointer is a str; allowed: a trainer.Checkpointer"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Brain(**arguments)


def test_a_list_of_optimizers_is_refused() -> None:
    class Listed(Plain):
        def init_optimizers(self) -> None:
            self.optimizers_dict = [self.opt_class(self.modules.parameters())]

    with pytest.raises(ValueError, match="optimizers_dict is a list; allowed: a mapping"):
        make(Listed).fit([1], batches(1))


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xpu", "hpu", "meta", "vulkan", "xla"])
def test_an_absent_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device '{name}'.*use --device cpu") as caught:
        pick_device(name)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["gpu", "cpu:3", "CPU", "cuda:", "cuda:-1", "cuda:0,1", "0", ""])
def test_a_device_that_no_machine_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{name}'; allowed: auto, cpu, cuda, cuda:0"):
        pick_device(name)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2.*but no MASTER_ADDR: unset RANK"),
        ({"RANK": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "do not fit"),
        ({"RANK": "0", "WORLD_SIZE": "b", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "do not fit"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "do not fit"),
    ],
)
def test_left_over_variables_of_a_launcher_are_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], sentence: str
) -> None:
    for name in distributed.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for enter in (distributed.start, distributed.join):
        with pytest.raises(ValueError, match=sentence):
            enter("cpu")


def test_processes_that_do_not_come_are_told(
    monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(distributed, "RENDEZVOUS", distributed.timedelta(seconds=1))
    for name, value in zip(
        distributed.LAUNCHER, ("0", "2", "127.0.0.1", str(free_port)), strict=True
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"did not come together within 1 s \(RANK=0, WORLD_SIZE"):
        distributed.start("cpu")


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
