"""Recipes written for SpeechBrain or for earlier versions: hooks, names, steps by hand, imports."""

import importlib
import pydoc
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer as sb
from tests.trainer.small import Players, Regressor, batches, everything, make, net, same
from trainer import Stage, load_hparams
from trainer.compat.old_paths import OLD_PATHS, current_path


class ByHand(Players):
    """Vocoder with SpeechBrain's fit_batch and attribute names."""

    def init_optimizers(self) -> None:
        opt_g_class, opt_d_class, sch_g_class = self.opt_class
        self.optimizer_g = opt_g_class(self.modules.generator.parameters())
        self.optimizer_d = opt_d_class(self.modules.discriminator.parameters())
        self.optimizers_dict = {"optimizer_g": self.optimizer_g, "optimizer_d": self.optimizer_d}
        self.scheduler_g = sch_g_class(self.optimizer_g)

    def fit_batch(self, batch: Any) -> Tensor:
        fake = self.modules.generator(batch["x"])
        loss_d = self.loss_d(batch, fake.detach())
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()
        loss_g = self.loss_g(batch, fake)
        self.optimizer_g.zero_grad()
        loss_g.backward()
        self.optimizer_g.step()
        self.train_loss = self.update_average(loss_g, getattr(self, "train_loss", 0.0))
        return loss_g.detach().cpu()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        if stage == sb.Stage.TRAIN:
            self.scheduler_g.step()
            self.stage_loss = stage_loss


def by_hand(kind: type[ByHand] = ByHand, **options: Any) -> Any:
    adam = partial(torch.optim.Adam, lr=0.01)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    return make(kind, optimizer=(adam, adam, decay), **options)


def test_a_fit_batch_that_steps_by_hand_runs_and_is_warned_once() -> None:
    brain = by_hand(precision="bf16", ema_decay=0.9)
    with pytest.warns(UserWarning, match="itself") as record:
        brain.fit([1, 2], batches(3), batches(1))
    brain.fit([3], batches(3))  # Once is enough: another warning would be an error.
    assert [str(each.message) for each in record] == [
        "ByHand.fit_batch calls backward() and the step of 'optimizer_d' itself: precision, "
        "clipping, the non-finite guard and accumulation do not apply. "
        "self.optimize(loss, 'optimizer_d') in their place has all of them"
    ]
    assert brain.optimizer_step == brain.stateful()["ema"].part.count == 9
    assert brain.stage_loss == brain.stateful()["metrics"].part.average.value()
    assert brain.updates["optimizer_g"].lr == 0.01 / 8
    d, g = net(0), net(1)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (d, g)]
    truth = make(Players)
    truth.modules.update({"discriminator": d, "generator": g})
    for epoch in range(3):
        for batch in batches(3):
            fake = g(batch["x"])
            for optimizer, loss in zip(optimizers, (truth.loss_d, truth.loss_g), strict=True):
                optimizer.zero_grad()
                loss(batch, fake.detach() if loss == truth.loss_d else fake).backward()
                optimizer.step()
        optimizers[1].param_groups[0]["lr"] = 0.01 * 0.5 ** (epoch + 1)
    assert same(brain.modules.state_dict(), truth.modules.state_dict())


def test_one_player_by_hand_and_one_by_optimize() -> None:
    class Half(ByHand):
        def fit_batch(self, batch: Any) -> Tensor:
            fake = self.modules.generator(batch["x"])
            self.optimize(self.loss_d(batch, fake.detach()), "optimizer_d")
            loss_g = self.loss_g(batch, fake)
            self.optimizer_g.zero_grad()
            loss_g.backward()
            self.optimizer_g.step()
            return loss_g

    whole, half = by_hand(max_grad_norm=None), by_hand(Half, max_grad_norm=None)
    with pytest.warns(UserWarning, match="itself"):
        whole.fit([1, 2], batches(3))
    # loss_g.backward() leaves gradients in the discriminator.
    with (
        pytest.warns(UserWarning, match="the step of 'optimizer_g' itself"),
        pytest.warns(UserWarning, match="'optimizer_d' had gradients that no optimize.. made"),
    ):
        half.fit([1, 2], batches(3))
    assert same(whole.modules.state_dict(), half.modules.state_dict())
    assert half.optimizer_step == 6


def test_steps_by_hand_are_counted_as_they_come() -> None:
    class Accumulating(ByHand):
        def fit_batch(self, batch: Any) -> Tensor:
            loss = self.loss_g(batch, self.modules.generator(batch["x"]))
            (loss / 2).backward()
            if self.step % 2 == 0:
                self.optimizer_g.step()
                self.zero_grad()
            return loss.detach()

    brain = by_hand(Accumulating)
    with pytest.warns(UserWarning, match="itself"):
        brain.fit([1, 2], batches(4))
    assert brain.optimizer_step == 4


def test_optimizers_are_found_without_a_dictionary() -> None:
    class Loose(ByHand):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            del self.optimizers_dict

    with pytest.warns(UserWarning, match="the step of 'optimizer_d' itself"):
        by_hand(Loose).fit([1], batches(1))
    brain = by_hand(Loose)
    brain.fit_batch = lambda batch: brain.optimize(
        brain.loss_g(batch, brain.modules.generator(batch["x"])), "optimizer_g"
    )
    brain.fit([1], batches(1))
    assert sorted(brain.updates) == ["optimizer_d", "optimizer_g"]


def test_positional_and_keyword_arguments_are_those_that_are_known_there() -> None:
    class Recipe(sb.Brain):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            return self.modules.model(batch["x"].to(self.device))

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            assert self.hparams.weight == 2.0
            return self.hparams.weight * (predictions - batch["y"]).square().mean()

        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage != sb.Stage.TRAIN:
                self.metric = 0.0

        def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int) -> None:
            stats.append((stage.name, epoch, stage_loss))

    stats: list[Any] = []
    brain = Recipe(
        modules={"model": net()},
        opt_class=lambda params: torch.optim.SGD(params, 0.1),
        hparams={"weight": 2.0, "max_grad_norm": 1.0},
        run_opts={"device": "cpu", "precision": "fp32"},
        checkpointer=None,
    )
    counter = sb.EpochCounter(limit=2)
    brain.fit(counter, batches(2), batches(1), False, {}, {})
    test_loss = brain.evaluate(
        batches(1), max_key=None, min_key=None, progressbar=False, test_loader_kwargs={}
    )
    assert [entry[:2] for entry in stats] == [
        ("TRAIN", 1),
        ("VALID", 1),
        ("TRAIN", 2),
        ("VALID", 2),
        ("TEST", None),
    ]
    assert stats[-1][2] == test_loss
    assert brain.options.max_grad_norm == 1.0


def test_hooks_may_be_called_on() -> None:
    """Recipes call the hook that they override."""

    class Polite(Regressor):
        def on_fit_start(self) -> None:
            super().on_fit_start()

        def init_optimizers(self) -> None:
            super().init_optimizers()

        def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
            super().on_fit_batch_end(batch, outputs, loss, should_step)

        def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
            super().on_evaluate_start(max_key, min_key)

        def evaluate_batch(self, batch: Any, stage: Stage) -> Tensor:
            return super().evaluate_batch(batch, stage=stage).cpu()

    polite, plain = make(Polite), make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for brain in (polite, plain):
            brain.fit([1], batches(2), batches(1))
            brain.evaluate(batches(1))
    assert same(everything(polite), everything(plain))


def test_update_average_is_the_average_of_the_batches_so_far() -> None:
    brain = make()
    average = 0.0
    for brain.step, loss in enumerate((4.0, 2.0, float("nan"), 3.0), 1):
        average = brain.update_average(torch.tensor(loss), average)
    assert average == pytest.approx(3.0)


def test_zero_grad_forgets_open_windows() -> None:
    class Forgetful(Regressor):
        def on_fit_batch_end(self, *_: Any) -> None:
            if self.step == 1:
                self.zero_grad()
                assert all(p.grad is None for p in self.modules.parameters())

    brain, plain = make(Forgetful, grad_accumulation_factor=2), make(grad_accumulation_factor=2)
    data = batches(3)
    brain.fit([1], data)
    plain.fit([1], data[1:])
    assert same(everything(brain), everything(plain))


def test_former_attributes_answer_until_a_recipe_sets_its_own() -> None:
    class Former(Players):
        def fit_batch(self, batch: Any) -> Any:
            last.append(self.last_batch)
            return super().fit_batch(batch)

    class Own(Players):
        def on_fit_start(self) -> None:
            assert self.last_batch is False
            self.last_batch = None

        def fit_batch(self, batch: Any) -> Any:
            self.last_batch = batch
            return super().fit_batch(batch)

    last: list[bool] = []
    brain, own = make(Former, precision="bf16"), make(Own, precision="bf16")
    brain.fit([1], batches(3))
    own.fit([1], batches(3))
    assert last == [False, False, True]
    assert brain.precision == "bf16"
    assert own.last_batch["x"].equal(batches(3)[-1]["x"])
    assert same(brain.modules.state_dict(), own.modules.state_dict())
    with pytest.raises(AttributeError, match="'Own' object has no attribute 'patience'"):
        _ = own.patience


@pytest.mark.parametrize("old", OLD_PATHS)
def test_former_modules_are_those_that_replaced_them(old: str) -> None:
    module = importlib.import_module(old)
    new = [importlib.import_module(each) for each in OLD_PATHS[old]]
    if len(new) == 1 and not hasattr(new[0], "__path__"):
        assert module is new[0]
    for each in new:
        assert each.__spec__ is not None
        assert each.__spec__.name == each.__name__
        assert {name for name in vars(each) if name[0] != "_"} <= set(vars(module))


@pytest.mark.parametrize(
    "name",
    [
        "trainer.averages.Mean",
        "trainer.averages.WeightAverage",
        "trainer.hparams.load_hparams",
        "trainer.nonfinite.NonFiniteError",
        "trainer.run.main",
        "trainer.interrupt.Interrupted",
    ],
)
def test_former_names_lead_to_the_same_objects(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert pydoc.locate(name) is found
    assert pydoc.locate(current_path(name)) is found
    assert current_path(name) != name


def test_a_former_package_has_no_second_copies_of_modules() -> None:
    importlib.import_module("trainer.run")
    with pytest.raises(ModuleNotFoundError, match="is not a package"):
        importlib.import_module("trainer.run.folder")


def test_a_yaml_may_use_current_and_former_names(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(
        "schedule: !name:trainer.schedules.WarmupDecay {warmup_steps: 10}\n"
        "mean: !new:trainer.averages.Mean\n"
        "average: !name:trainer.averages.WeightAverage\n"
    )
    found = load_hparams(path)
    assert found["schedule"].func is pydoc.locate("trainer.schedules.WarmupDecay")
    assert type(found["mean"]) is pydoc.locate("trainer.metrics.Mean")
    assert found["average"] is pydoc.locate("trainer.optim.ema.WeightAverage")
    path.write_text("x: !apply:trainer.run.main\n")
    with pytest.raises(ValueError, match="is not allowed"):
        load_hparams(path)


def test_unknown_modules_and_attributes_are_unknown() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("trainer.nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sb.nothing  # type: ignore[attr-defined]
    assert current_path("torch.nn.Linear") == "torch.nn.Linear"
    assert sb.__version__
    assert {"Callback", "launch", "main"} <= set(dir(sb)) | set(sb.__all__)
