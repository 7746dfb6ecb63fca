"""Recipes written for SpeechBrain, with our Brain in place of SpeechBrain's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from tests.compat.theirs import sb
from tests.trainer.small import same
from trainer import Brain, Checkpointer, EpochCounter

OPTIONS = {"device": "cpu", "progressbar": False}
Norm = sb.processing.features.InputNormalization


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)


class Recipe(Brain):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.net(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return predictions.square().mean()


def tensors(*shape: int) -> Any:
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(*shape))


def linear(inputs: int = 1) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, 1)


def signals(lengths: list[int]) -> Any:
    data = sb.dataio.dataset.DynamicItemDataset({f"u{n}": {"n": n} for n in lengths})
    data.add_dynamic_item(lambda n: torch.full((n,), float(n)), takes="n", provides="sig")
    data.set_output_keys(["id", "sig"])
    return data


def test_hooks_get_stages_that_equal_theirs() -> None:
    class Stages(Recipe):
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            seen.append([stage == each for each in sb.Stage])

    seen: list[list[bool]] = []
    brain = Stages({"net": linear()}, sgd, {}, OPTIONS)
    brain.fit([1], tensors(4, 1), tensors(4, 1))
    brain.evaluate(tensors(4, 1))
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]


def test_their_datasets_give_their_batches_with_shares_in_their_order() -> None:
    class Masked(Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            assert type(batch).__name__ == "PaddedBatch"
            wav, lengths = batch.sig
            mask = sb.dataio.dataio.length_to_mask(lengths * wav.shape[1], wav.shape[1])
            valid.append(mask.sum(1).tolist())
            ids.extend(batch.id)
            return self.modules.net(wav.mean(1, keepdim=True))

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return predictions.square().mean()

    valid: list[Any] = []
    ids: list[str] = []
    brain = Masked({"net": linear()}, sgd, {}, OPTIONS)
    brain.fit([1], signals([3, 5, 7, 9, 11]), train_loader_kwargs={"batch_size": 2})
    assert valid == [[3, 5], [7, 9], [11]]
    assert ids == ["u3", "u5", "u7", "u9", "u11"]
    assert brain.progress.step == 3


def test_a_subset_of_their_dataset_gives_their_batches() -> None:
    brain = Recipe({"net": linear()}, sgd, {}, OPTIONS)
    data = torch.utils.data.Subset(signals([3, 5, 7]), [2, 0])
    (batch,) = brain.make_dataloader(data, sb.Stage.TRAIN, batch_size=2)
    assert batch.id == ["u7", "u3"]
    assert batch.sig.lengths.tolist() == pytest.approx([1.0, 3 / 7])


def test_a_method_of_their_loop_is_told_of(caplog: Any) -> None:
    class Overriding(Recipe):
        def _fit_valid(self, valid_set: Any, epoch: int, enable: bool) -> None: ...

    for _ in range(2):
        Overriding({"net": linear()}, sgd, {}, OPTIONS)
    assert caplog.text.count("Overriding has _fit_valid, which overrides a part of") == 1


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"drop_last": False}])
def test_a_recipe_of_theirs_gets_the_order_of_the_data(options: Any) -> None:
    def order(brain: Any, data: Any, **more: Any) -> list[Any]:
        loader = brain.make_dataloader(data, sb.Stage.TRAIN, batch_size=6, **more)
        return [each[0].flatten().tolist() for each in loader]

    data = torch.utils.data.TensorDataset(torch.arange(6.0)[:, None])
    theirs = Recipe({"net": linear()}, sgd, {}, OPTIONS)
    ours = Brain({"net": linear()}, sgd, {}, OPTIONS)
    assert order(theirs, data, **options) == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    assert order(theirs, data, shuffle=True, **options) == order(ours, data, **options)
    assert order(ours, data, **options) != order(theirs, data, **options)


def test_a_recipe_that_imports_it_in_a_function_is_one_of_theirs() -> None:
    def recipe() -> Any:
        import speechbrain as local

        class Inner(Brain):
            def compute_forward(self, batch: Any, stage: Any) -> Any:
                return stage == local.Stage.TRAIN

        return Inner

    from trainer.compat.toolkit import written_for_it

    assert written_for_it(recipe())
    assert written_for_it(Recipe)
    assert not written_for_it(Brain)


def state_objects() -> dict[str, Any]:
    schedulers = sb.nnet.schedulers
    return {
        "noam": schedulers.NoamScheduler(1.0, 10),
        "newbob": schedulers.NewBobScheduler(1.0),
        "cyclic": schedulers.CyclicLRScheduler(),
        "tri": schedulers.TriStageLRSchedule(1.0, 2, 2, 6, 10),
        "counter": sb.utils.epoch_loop.EpochCounterWithStopper(9, 5, 0, "min"),
        "labels": sb.dataio.encoder.CTCTextEncoder(),
        "normaliser": Norm(),
    }


def advance(objects: dict[str, Any]) -> None:
    optimizer = sgd(linear().parameters())
    for _ in range(3):
        objects["noam"](optimizer)
        objects["newbob"](1.0)
        next(objects["counter"])
        objects["counter"].update_metric(2.0)
        objects["normaliser"](torch.randn(2, 4, 3) + 5)
    objects["cyclic"].on_batch_end(optimizer)
    objects["labels"].update_from_iterable(["ab", "c"])


def seen(objects: dict[str, Any]) -> list[Any]:
    return [
        objects["noam"].n_steps, objects["newbob"].hyperparam_value,
        objects["newbob"].metric_values, objects["cyclic"].clr_iterations,
        objects["counter"].current, objects["counter"].best_score, objects["counter"].best_limit,
        objects["labels"].lab2ind, objects["normaliser"].count, objects["normaliser"].glob_mean,
    ]  # fmt: skip


def test_objects_with_their_hooks_are_recoverables(tmp_path: Path) -> None:
    objects = state_objects()
    checkpointer = Checkpointer(tmp_path, objects)
    advance(objects)
    checkpointer.save_checkpoint()
    others = state_objects()
    assert not same(seen(others), seen(objects))
    assert Checkpointer(tmp_path, others).recover_if_possible() is not None
    assert same(seen(others), seen(objects))


def test_a_resumed_run_has_their_states(tmp_path: Path) -> None:
    class Stateful(Recipe):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return self.modules.net(self.modules.norm(batch[0], torch.ones(len(batch[0]))))

        def on_fit_batch_end(self, *_: Any) -> None:
            self.hparams.noam(self.optimizer)

    def run(folder: Path, epochs: int) -> Any:
        hparams = {
            "noam": sb.nnet.schedulers.NoamScheduler(1.0, 10),
            "counter": sb.utils.epoch_loop.EpochCounter(epochs),
        }
        modules = {"norm": Norm(), "net": linear(3)}
        brain = Stateful(modules, sgd, hparams, OPTIONS, Checkpointer(folder))
        brain.fit(hparams["counter"], tensors(8, 4, 3), train_loader_kwargs={"batch_size": 4})
        return (
            brain.modules.state_dict(), brain.modules.norm.count, brain.hparams.noam.n_steps,
            brain.hparams.counter.current, brain.optimizer_step,
        )  # fmt: skip

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    again = run(tmp_path / "cut", 3)
    assert again[1:] == (96, 6, 3, 6)
    assert same(again, whole)


def test_their_checkpointer_is_replaced_by_ours(tmp_path: Path) -> None:
    class Saving(Recipe):
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            if stage == sb.Stage.VALID:
                self.checkpointer.save_and_keep_only(
                    {"WER": [0, 2, 1, 3][epoch or 0]}, min_keys=["WER"], num_to_keep=3
                )

        def on_evaluate_start(self, max_key: Any = None, min_key: Any = None) -> None:
            super().on_evaluate_start()
            found = self.checkpointer.find_checkpoints(max_key=max_key, min_key=min_key)
            average = sb.utils.checkpoints.average_checkpoints(found, recoverable_name="model")
            self.hparams.model.load_state_dict(average, strict=True)
            self.tested = self.hparams.model.weight.item()

    def make() -> Any:
        net = linear()
        counter = sb.utils.epoch_loop.EpochCounter(3)
        recoverables = {"model": net, "counter": counter}
        checkpointer = sb.utils.checkpoints.Checkpointer(tmp_path, recoverables)
        hparams = {"counter": counter, "model": net, "checkpointer": checkpointer}
        brain = Saving({"net": net}, sgd, hparams, OPTIONS, checkpointer)
        assert type(brain.checkpointer) is Checkpointer
        assert brain.hparams.checkpointer is brain.checkpointer
        brain.fit(counter, tensors(8, 1), tensors(8, 1))
        return brain

    brain = make()
    last = brain.modules.net.weight.item()
    values = [
        torch.load(each.paramfiles["model"], weights_only=True)["weight"].item()
        for each in brain.checkpointer.list_checkpoints()
    ]
    brain.evaluate(tensors(8, 1), min_key="WER")
    assert brain.tested == pytest.approx(sum(values) / 3)
    assert len(set(values)) == 3
    assert brain.modules.net.weight.item() == last
    assert make().optimizer_step == 24  # It resumes, and has nothing to do.


def test_their_run_options_object_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    path.write_text("seed: 1\n")
    _, run_opts, _ = sb.parse_arguments([str(path), "--precision", "bf16", "--device=cpu"])
    brain = Recipe({"net": linear()}, sgd, {"max_grad_norm": 2.0}, run_opts)
    assert (brain.precision, brain.max_grad_norm) == ("bf16", 2.0)


def test_a_recipe_without_gradients_runs(caplog: Any) -> None:
    class Means(Recipe):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            self.batches = getattr(self, "batches", 0) + 1
            return torch.tensor(2.0, requires_grad=True)

        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            self.average = stage_loss

    net = linear()
    before = net.weight.item()
    brain = Means({"net": net}, None, {}, OPTIONS)
    brain.fit([1, 2], tensors(8, 1), train_loader_kwargs={"batch_size": 4})
    assert (brain.batches, brain.average, net.weight.item()) == (4, 2.0, before)
    assert caplog.text.count("no optimizer: nothing is trained by gradients") == 1


def test_a_loss_that_reaches_no_parameter_moves_nothing() -> None:
    class Aside(Recipe):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return torch.tensor([3.0], requires_grad=True).sum()

        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            self.average = stage_loss

    net = linear()
    before = net.weight.item()
    brain = Aside({"net": net}, sgd, {}, OPTIONS)
    brain.fit([1], tensors(8, 1), train_loader_kwargs={"batch_size": 4})
    assert (brain.average, net.weight.item(), brain.optimizer_step) == (3.0, before, 0)


def test_masked_losses_refuse_numbers_in_the_place_of_shares() -> None:
    Recipe({"net": linear()}, sgd, {}, OPTIONS)
    prediction, target = torch.zeros(2, 4, 1), torch.ones(2, 4, 1)
    batch = trainer.data.pad([torch.ones(4), torch.ones(2)])
    with pytest.raises(ValueError, match="shares of the longest.*relative"):
        sb.nnet.losses.mse_loss(prediction, target, batch.lengths)
    assert sb.nnet.losses.mse_loss(prediction, target, batch.relative()).item() == 1.0
    assert sb.nnet.losses.mse_loss(prediction, target).item() == 1.0


def test_a_looped_loader_gives_nominal_epochs() -> None:
    brain = Recipe({"net": linear()}, sgd, {}, OPTIONS)
    options = {"looped_nominal_epoch": 3, "batch_size": 8}
    brain.fit([1, 2], tensors(8, 1), train_loader_kwargs=options)
    assert brain.optimizer_step == 6


def test_their_names_in_a_yaml_are_allowed_since_the_program_imports_it(tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    path.write_text(
        "__set_seed: !apply:speechbrain.utils.seed_everything [7]\n"
        "net: !new:speechbrain.nnet.linear.Linear {input_size: 2, n_neurons: 3}\n"
        "loss: !name:speechbrain.nnet.losses.mse_loss\n"
        "counter: !new:speechbrain.utils.epoch_loop.EpochCounter {limit: 2}\n"
    )
    found = trainer.load_hparams(path)
    assert type(found["net"]).__module__ == "speechbrain.nnet.linear"
    assert found["seed"] == 7
    torch.manual_seed(7)
    same_net = sb.nnet.linear.Linear(input_size=2, n_neurons=3)
    assert same(found["net"].state_dict(), same_net.state_dict())
    with path.open() as file:
        again = trainer.load_hyperpyyaml(file, "counter:\n  limit: 5\n")
    assert again["counter"].limit == 5
    for name in ("utils.superpowers.run_shell", "dataio.dataio.load_pkl", "utils.fetching.fetch"):
        path.write_text(f"x: !name:speechbrain.{name}\n")
        with pytest.raises(ValueError, match="is not allowed"):
            trainer.load_hparams(path)


def test_the_module_of_their_name_has_our_brain_and_their_rest() -> None:
    import trainer.compat.speechbrain as both

    assert both.Brain is both.core.Brain is Brain
    assert both.Stage is trainer.Stage
    assert both.dataio is sb.dataio
    assert both.utils.checkpoints is sb.utils.checkpoints
    with pytest.raises(AttributeError):
        _ = both.nothing


def test_their_counters_run_a_fit() -> None:
    counter = sb.utils.epoch_loop.EpochCounterWithStopper(9, 2, 0, "min")

    class Stopping(Recipe):
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> None:
            if stage == sb.Stage.VALID:
                counter.update_metric(1.0)

    brain = Stopping({"net": linear()}, sgd, {"counter": counter}, OPTIONS)
    brain.fit(counter, tensors(4, 1), tensors(4, 1))
    assert brain.progress.epoch == 3


def test_ours_and_theirs_give_the_same_losses() -> None:
    losses: dict[Any, list[float]] = {}
    for base in (sb.Brain, Brain):

        class Both(base):  # type: ignore[misc, valid-type]
            compute_forward = Recipe.compute_forward
            compute_objectives = Recipe.compute_objectives
            kind = base

            def on_stage_end(self, stage: Any, stage_loss: Any, epoch: Any = None) -> None:
                losses.setdefault(self.kind, []).append(float(stage_loss))

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        adam = partial(torch.optim.Adam, lr=0.01)
        brain = Both({"net": net}, adam, {}, {"device": "cpu", "max_grad_norm": 0.1})
        loader = {"batch_size": 4}
        data = tensors(16, 3), tensors(8, 3)
        brain.fit(EpochCounter(3), *data, False, dict(loader), dict(loader))
        brain.evaluate(data[1], progressbar=False, test_loader_kwargs=dict(loader))
    assert losses[Brain] == pytest.approx(losses[sb.Brain], abs=1e-6)
    assert len(losses[Brain]) == 7


def evaluated_on_two_ranks() -> Any:
    class Listing(Recipe):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            if stage != sb.Stage.TRAIN:
                self.ids = [*getattr(self, "ids", []), *batch.id]
            return self.modules.net(batch.sig.data.mean(1, keepdim=True))

    brain = Listing({"net": linear()}, sgd, {}, OPTIONS)
    data = signals([2, 3, 4])
    brain.fit([1], data, train_loader_kwargs={"batch_size": 1})
    brain.evaluate(data)
    whole, brain.ids = brain.ids, []
    brain.evaluate(torch.utils.data.DataLoader(data, collate_fn=sb.dataio.batch.PaddedBatch))
    return whole, brain.ids, brain.optimizer_step


def test_every_rank_evaluates_on_all_data_as_their_metrics_need(two_ranks: Any) -> None:
    ids = ["u2", "u3", "u4"]
    assert two_ranks(evaluated_on_two_ranks) == [(ids, ids, 1)] * 2
