"""Methods of Brain and Checkpointer that recipes written for SpeechBrain call."""

from __future__ import annotations

import enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.small import Regressor, batches, everything, make, same
from trainer import Brain, Checkpointer, EpochCounter
from trainer import Stage as OurStage


class Stage(enum.Enum):
    """A Stage of another toolkit."""

    TRAIN = enum.auto()
    VALID = enum.auto()
    TEST = enum.auto()


def test_stages_are_equal_by_name() -> None:
    for ours, theirs in zip(OurStage, Stage, strict=True):
        assert ours == theirs
        assert theirs == ours
        assert {ours: 1}[theirs] == {theirs: 1}[ours] == 1  # type: ignore[index]
    assert OurStage.TRAIN != Stage.VALID
    assert OurStage.TRAIN != "TRAIN"
    assert OurStage("train") is OurStage.TRAIN


def test_a_stage_of_theirs_is_taken() -> None:
    brain = make()
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    ours = [b[0].tolist() for b in brain.make_dataloader(data, OurStage.TRAIN, batch_size=8)]
    theirs = [b[0].tolist() for b in brain.make_dataloader(data, Stage.TRAIN, batch_size=8)]
    assert ours == theirs != [list(range(8))]


class ByHand(Regressor):
    """The step of a hand-written fit_batch, as separation recipes have it."""

    def fit_batch(self, batch: Any) -> Any:
        with self.no_sync(), self.training_ctx:
            loss = self.compute_objectives(
                self.compute_forward(batch, OurStage.TRAIN), batch, OurStage.TRAIN
            )
        self.check_loss_isfinite(loss)
        self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        self.averages.append(self.avg_train_loss)
        self.optimizers_step()
        self.last_batch = batch
        return loss.detach().cpu()


def test_a_step_by_hand_is_clipped_as_the_default_one() -> None:
    hand, plain = make(ByHand, max_grad_norm=0.1), make(max_grad_norm=0.1)
    hand.averages = []
    for brain in (hand, plain):
        brain.fit([1, 2], batches(4))
    assert same(hand.modules.state_dict(), plain.modules.state_dict())
    assert hand.optimizer_step == plain.optimizer_step == 8
    assert hand.averages[0] == hand.averages[4] == 0.0
    assert hand.averages[1] > 0.0
    assert hand.last_batch["id"] == batches(4)[-1]["id"]


def test_a_step_by_hand_with_a_gradient_that_is_not_finite_moves_nothing() -> None:
    brain, data = make(ByHand), batches(1)
    brain.averages, before = [], {}
    brain.on_fit_start = lambda: before.update(
        {n: p.detach().clone() for n, p in brain.modules.named_parameters()}
    )
    brain.fit([1], [{**data[0], "gradient": True}])
    assert brain.nonfinite_count == 1
    assert same(dict(brain.modules.named_parameters()), before)
    assert brain.optimizer_step == 0


def test_check_gradients_drops_those_that_are_not_finite(caplog: Any) -> None:
    brain = make()
    for number, parameter in enumerate(brain.modules.parameters()):
        parameter.grad = torch.full_like(parameter, float("nan") if number == 1 else 1.0)
    brain.check_gradients()
    assert [p.grad is None for p in brain.modules.parameters()] == [False, True, False, False]
    assert "the gradient of net.0.bias is not finite" in caplog.text


def test_losses_that_are_not_finite_exhaust_the_patience() -> None:
    brain = make(nonfinite_patience=1)
    brain.check_loss_isfinite(torch.tensor(float("inf")))
    brain.check_loss_isfinite(torch.tensor(1.0))
    with pytest.raises(ValueError, match="2 losses of epoch 0 were not finite, more than"):
        brain.check_loss_isfinite(torch.tensor(float("nan")))


def test_names_are_read_and_options_are_not_set() -> None:
    brain = make(precision="bf16", max_grad_norm=3.0, grad_accumulation_factor=2)
    assert brain.precision == "bf16"
    assert (brain.max_grad_norm, brain.grad_accumulation_factor, brain.debug) == (3.0, 2, False)
    assert brain.noprogressbar is True
    assert brain.distributed_launch is False
    assert brain.train_sampler is None
    assert brain.avg_train_loss == 0.0
    assert not brain.scaler.is_enabled()
    with brain.evaluation_ctx:
        assert torch.is_autocast_enabled("cpu")
    for name in ("precision", "max_grad_norm", "grad_accumulation_factor"):
        with pytest.raises(AttributeError, match=f"{name} cannot be set: it is a run option"):
            setattr(brain, name, "fp32")
    brain.train_sampler = brain.scaler = 7
    assert (brain.train_sampler, brain.scaler) == (7, 7)


@pytest.mark.parametrize("factor", [1, 2])
def test_an_override_of_optimizers_step_is_called_at_each_step(factor: int) -> None:
    class Watching(Regressor):
        def optimizers_step(self) -> None:
            norms.append(sum(float(p.grad.square().sum()) for p in self.modules.parameters()))
            super().optimizers_step()

    norms: list[float] = []
    watching = make(Watching, grad_accumulation_factor=factor)
    plain = make(grad_accumulation_factor=factor)
    for brain in (watching, plain):
        brain.fit([1, 2], batches(5))
    assert len(norms) == watching.optimizer_step == plain.optimizer_step
    assert min(norms) > 0.0
    assert same(everything(watching), everything(plain))


def test_an_override_may_leave_the_step_out_or_take_it_itself() -> None:
    class Idle(Regressor):
        def optimizers_step(self) -> None:
            self.gradients = sum(p.grad.numel() for p in self.modules.parameters())

    class Own(Regressor):
        def optimizers_step(self) -> None:
            self.optimizer.step()

    idle, own, before = make(Idle), make(Own), make()
    idle.fit([1], batches(3))
    assert idle.gradients == 44
    assert same(idle.modules.state_dict(), before.modules.state_dict())
    with pytest.warns(UserWarning, match="Own.optimizers_step calls the step of 'main' itself"):
        own.fit([1], batches(3))
    assert own.optimizer_step == 3
    assert not same(own.modules.state_dict(), before.modules.state_dict())
    for brain in (idle, own):
        assert brain.stateful()["metrics"].part.average.value() > 0.0


def test_a_nested_fit_has_the_epoch_of_the_outer_one() -> None:
    class Sampler(list[int]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    class Nested(Regressor):
        inner = False

        def on_stage_start(self, stage: Any, epoch: int | None = None) -> None:
            if stage == Stage.TRAIN and not self.inner:
                self.inner, self.epoch = True, epoch
                loader = {"sampler": Sampler(range(4)), "batch_size": 2}
                self.fit(range(1), items, train_loader_kwargs=loader)
                self.inner = False

        def fit_batch(self, batch: Any) -> Any:
            epochs.append((self.inner, self.epoch))
            return super().fit_batch(batch)

    class Items(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return {"x": torch.ones(4) * index, "y": torch.ones(2)}

    told: list[int] = []
    epochs: list[tuple[bool, int]] = []
    items = Items()
    brain = make(Nested)
    brain.compute_forward = lambda batch, stage: brain.modules.net(
        batch["x"].data if hasattr(batch["x"], "lengths") else batch["x"]
    )
    brain.compute_objectives = lambda out, batch, stage: out.square().mean()
    brain.fit([1, 2], batches(1))
    assert epochs == [(True, 1), (True, 1), (False, 1), (True, 2), (True, 2), (False, 2)]
    assert set(told[: len(told) // 2]) == {1}
    assert set(told[len(told) // 2 :]) == {2}
    assert brain.progress.outer_epoch is None


def test_make_dataloader_may_make_the_dataset_of_a_mapping() -> None:
    class Mapped(Regressor):
        def make_dataloader(
            self, dataset: Any, stage: Any, ckpt_prefix: str = "dataloader-", **options: Any
        ) -> Any:
            asked.append((stage, ckpt_prefix, sorted(options)))
            dataset = [dataset[key] for key in dataset]
            data = torch.utils.data.TensorDataset(torch.stack(dataset), torch.ones(3, 2))
            return super().make_dataloader(data, stage, ckpt_prefix, **options)

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return self.modules.net(batch[0])

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return (predictions - batch[1]).square().mean()

    asked: list[Any] = []
    brain = make(Mapped)
    brain.fit([1], {name: torch.ones(4) for name in "abc"}, train_loader_kwargs={"batch_size": 2})
    assert asked == [(OurStage.TRAIN, "dataloader-", ["batch_size"])]
    assert brain.optimizer_step == 2
    with pytest.raises(ValueError, match="the train set is a mapping, a dict"):
        make().fit([1], {"a": torch.ones(4)})


class Averaging(Regressor):
    """Loads other weights before a test, and saves them after it."""

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        with torch.no_grad():
            for parameter in self.modules.parameters():
                parameter.fill_(7.0)

    def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
        if stage == Stage.VALID:
            self.checkpointer.save_and_keep_only({"ACC": 0.1 * epoch}, max_keys=["ACC"])
        if stage == Stage.TEST:
            self.checkpointer.save_and_keep_only({"ACC": 1.1}, max_keys=["ACC"])


def test_a_save_in_a_test_has_its_weights_and_the_run_keeps_its_own(tmp_path: Path) -> None:
    def fresh() -> Any:
        return make(Averaging, checkpointer=Checkpointer(tmp_path))

    brain = fresh()
    brain.fit([1, 2], batches(2), batches(1))
    own = {name: p.detach().clone() for name, p in brain.modules.named_parameters()}
    brain.evaluate(batches(1), max_key="ACC")
    assert same(dict(brain.modules.named_parameters()), own)
    (best,) = brain.checkpointer.list_checkpoints()
    assert best.meta["ACC"] == 1.1
    weights = brain.checkpointer.read(best)["brain"]["modules"]
    assert all(bool((weight == 7.0).all()) for weight in weights.values())
    whole = make(Averaging, checkpointer=Checkpointer(tmp_path / "whole"))
    whole.fit([1, 2, 3], batches(2), batches(1))
    resumed = fresh()
    resumed.fit([1, 2, 3], batches(2), batches(1))
    assert same(resumed.modules.state_dict(), whole.modules.state_dict())


def test_evaluate_can_leave_the_weights_that_it_tested(tmp_path: Path) -> None:
    class Chosen(Regressor):
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            if stage == Stage.VALID:
                at[epoch] = self.modules.net[0].weight.detach().clone()
                wer = [0.0, 2.0, 1.0, 3.0][epoch or 0]
                self.checkpointer.save_and_keep_only({"WER": wer}, min_keys=["WER"])
            if stage == Stage.TEST:
                loaded.append(self.hparams.counter.current)

    loaded: list[int] = []
    counter = EpochCounter(3)
    at: dict[Any, Any] = {}
    brain = make(Chosen, hparams={"counter": counter}, checkpointer=Checkpointer(tmp_path))
    brain.fit(counter, batches(2), batches(1))
    brain.evaluate(batches(1), min_key="WER")
    brain.evaluate(batches(1))
    assert loaded == [2, 3]
    assert counter.current == 3
    assert same(brain.modules.net[0].weight, at[3])
    brain.evaluate(batches(1), min_key="WER", keep_weights=True)
    assert same(brain.modules.net[0].weight, at[2])


def test_calls_of_the_checkpointer(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    checkpointer = Checkpointer(tmp_path, {"model": net})
    for number in range(4):
        nn.init.constant_(net.weight, float(number))
        checkpointer.save_checkpoint({"number": number}, verbosity=10)
    assert checkpointer.checkpoints_dir == tmp_path
    newest = checkpointer.find_checkpoint()
    assert newest is not None
    assert newest.meta["unixtime"] > 1.7e9
    assert newest.meta["end-of-epoch"] is True
    assert newest.meta == {"number": 3}
    saved = torch.load(newest.paramfiles["model"], weights_only=True)
    assert saved["weight"].item() == 3.0
    found = checkpointer.find_checkpoints(
        importance_key=lambda c: -c.meta["number"], ckpt_predicate=lambda c: c.meta["number"] > 0
    )
    assert [each.meta["number"] for each in found] == [1, 2, 3]
    device = torch.device("cpu")
    checkpointer.recover_if_possible(device=device, ckpt_predicate=lambda c: c.meta["number"] < 2)
    assert net.weight.item() == 1.0
    checkpointer.save_and_keep_only(
        {"number": 9}, num_to_keep=1, ckpt_predicate=lambda c: c.meta["number"] % 2 == 1,
        importance_keys=[lambda c: c.meta["number"] == 1],
    )  # fmt: skip
    assert sorted(c.meta["number"] for c in checkpointer.list_checkpoints()) == [0, 1, 2, 9]
    checkpointer.delete_checkpoints(num_to_keep=1, min_keys=["number"])
    assert sorted(c.meta["number"] for c in checkpointer.list_checkpoints()) == [0, 9]
    checkpointer.delete_checkpoints(num_to_keep=0)
    assert checkpointer.list_checkpoints() == []


def test_a_checkpoint_may_lack_what_is_optional(tmp_path: Path) -> None:
    old, new = nn.Linear(1, 1), nn.Linear(1, 1)
    Checkpointer(tmp_path, {"old": old}).save_checkpoint()
    strict = Checkpointer(tmp_path, {"old": nn.Linear(1, 1), "new": new})
    with pytest.raises(ValueError, match="it lacks new"):
        strict.recover_if_possible()
    for made in (Checkpointer(tmp_path), Checkpointer(tmp_path, allow_partial_load=True)):
        loaded = nn.Linear(1, 1)
        made.add_recoverable("old", loaded)
        made.add_recoverable("new", new, optional_load=True)
        assert made.recover_if_possible() is not None
        assert same(loaded.state_dict(), old.state_dict())


def test_a_folder_of_their_checkpoints_is_told_of(tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "CKPT+2026-01-01+10-00-00+00"
    folder.mkdir()
    (folder / "CKPT.yaml").write_text("unixtime: 1.0\n")
    brain = make(checkpointer=Checkpointer(tmp_path))
    brain.fit([1], batches(1))
    assert f"{tmp_path} has 1 checkpoints of SpeechBrain's" in caplog.text
    assert (folder / "CKPT.yaml").exists()


def test_an_option_object_is_no_recipe() -> None:
    brain = Brain({"net": nn.Linear(1, 1)}, partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="no optimizer to train with"):
        Regressor({"net": nn.Linear(4, 2)}, None).fit([1], batches(1))
    assert brain.options.precision == "fp32"
