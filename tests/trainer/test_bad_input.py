"""Settings that cannot work are refused: what was wrong, where, and what is allowed."""

import math
import operator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer.small import Players, Regressor, batches, make, net
from trainer import Brain, EpochCounter, RunOptions, Stage, clipping
from trainer.checkpoint import Checkpointer
from trainer.clipping import AutoClip, NormClip
from trainer.schedules import EarlyStopping, Plateau, WarmupDecay


def refused(sentence: str, brain: Brain, **fit: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        brain.fit([1], fit.pop("data", batches(2)), **fit)


# --- a fit_batch and its losses ------------------------------------------------------------------


class Lossy(Regressor):
    """Returns what it is told to as its loss."""

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Any:
        return self.make_loss(predictions)


@pytest.mark.parametrize(
    ("make_loss", "sentence"),
    [
        (lambda x: 1.0, "got a float as its loss; allowed: a scalar tensor"),
        (lambda x: None, "got a NoneType as its loss"),
        (lambda x: (x.mean(), x.mean()), "got a tuple as its loss"),
        (lambda x: {"ctc": x.mean()}, "there is no optimizer 'ctc'; this Brain has 'main'"),
        (lambda x: x, r"got a loss of shape \(3, 2\); allowed: a scalar \(use loss.mean\(\)\)"),
        (lambda x: x.mean(1), r"got a loss of shape \(3,\)"),
        (lambda x: x.mean().detach(), "got a loss without a graph"),
        (lambda x: torch.tensor(1.0, requires_grad=True), "reaches none of this optimizer's param"),
    ],
)
def test_what_is_no_loss(make_loss: Any, sentence: str) -> None:
    brain = make(Lossy)
    brain.make_loss = make_loss
    refused(sentence, brain)


def test_an_optimizer_that_does_not_exist() -> None:
    class Typo(Players):
        def fit_batch(self, batch: Any) -> Any:
            return self.optimize(self.loss_g(batch, self.modules.generator(batch["x"])), "genrator")

    refused(
        "there is no optimizer 'genrator'; this Brain has 'discriminator', 'generator'", make(Typo)
    )

    class Frozen(Players):
        def fit_batch(self, batch: Any) -> Any:
            with self.frozen("critic"):
                pass

    refused("there is no optimizer 'critic'; this Brain has", make(Frozen))


def test_optimizing_outside_of_a_fit() -> None:
    brain = make()
    with pytest.raises(
        ValueError, match="there is no optimizer 'main'; this Brain has none yet: fit"
    ):
        brain.optimize(brain.modules.net(torch.ones(1, 4)).mean(), "main")
    with pytest.raises(
        ValueError, match="there is no optimizer to train with: give opt_class, set"
    ):
        brain.optimize(brain.modules.net(torch.ones(1, 4)).mean())


def test_a_fit_batch_that_never_optimizes() -> None:
    class Idle(Regressor):
        def fit_batch(self, batch: Any) -> Tensor:
            return self.compute_objectives(self.modules.net(batch["x"]), batch, Stage.TRAIN)

    refused(r"Idle.fit_batch ran 2 times and never called self.optimize\(loss, name\)", make(Idle))


def test_an_optimizer_that_needs_a_closure() -> None:
    brain = Regressor({"net": net()}, torch.optim.LBFGS, {}, {"device": "cpu"})
    refused("the optimizer 'main' is LBFGS, which computes its loss several times a step", brain)


def test_no_optimizer_at_all() -> None:
    brain = Regressor({"net": net()}, None, {}, {"device": "cpu", "progressbar": False})
    refused("there is no optimizer to train with: give opt_class, set self.optimizer in", brain)

    class AllFrozen(Regressor):
        def freeze_optimizers(self, optimizers: dict[str, Any]) -> dict[str, Any]:
            return {}

    refused(
        "there is no optimizer to train with.*or let freeze_optimizers leave one", make(AllFrozen)
    )


def test_an_optimizer_in_the_place_of_its_class() -> None:
    built = torch.optim.SGD(net().parameters())
    brain = Regressor({"net": net()}, built, {}, {"device": "cpu", "progressbar": False})
    refused(
        "opt_class is a SGD; allowed: a callable that makes an optimizer from parameters", brain
    )


def test_one_module_in_the_place_of_a_mapping() -> None:
    with pytest.raises(ValueError, match="modules is a Linear; allowed: a mapping from names to"):
        Regressor(torch.nn.Linear(4, 1), None, {}, {"device": "cpu"})  # type: ignore[arg-type]


def test_a_logged_value_that_is_no_scalar_is_named() -> None:
    class Logging(Regressor):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            self.log("acc", torch.ones(2, 3))

    refused(r"self.log\('acc', …\): an average is of scalars; got a tensor", make(Logging))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_grad_nrm", "max_grad_norm"), ("precison", "precision")],
)
def test_a_hyperparameter_that_is_almost_an_option_is_warned_of(
    caplog: pytest.LogCaptureFixture, name: str, meant: str
) -> None:
    make(hparams={name: 1, "learning_rate": 0.1, "seeds": [1, 2], "width": 3})
    assert caplog.messages == [
        f"{name!r} is not a run option and has no effect by itself; the option is {meant!r}"
    ]


def test_a_metric_to_keep_by_that_no_epoch_gives_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, keep_best={"wer": "min", "loss": "min"})
    checkpointer.keep_best({"of_the_last_epoch": "max"}, every_epoch=False)
    brain = make(checkpointer=checkpointer)
    brain.fit(range(1, 4), batches(2), batches(2))
    assert [each for each in caplog.messages if "keep_best" in each] == [
        "keep_best names the metric 'wer', which the epoch did not give; it gave loss: no "
        "checkpoint can be the best by it"
    ]


def test_something_that_is_no_optimizer() -> None:
    class Classy(Players):
        def init_optimizers(self) -> None:
            self.optimizers_dict = {"generator": torch.optim.Adam}

    refused(
        r"optimizers_dict\['generator'\] is .*Adam.*; allowed: a torch.optim.Optimizer",
        make(Classy),
    )


def test_a_frozen_player_cannot_be_optimized() -> None:
    class Stuck(Players):
        def fit_batch(self, batch: Any) -> Any:
            with self.frozen("discriminator"):
                self.optimize(
                    self.loss_g(batch, self.modules.generator(batch["x"])), "discriminator"
                )

    refused("no parameter of this optimizer requires a gradient; is it within frozen", make(Stuck))


def test_a_fit_batch_that_returns_what_has_no_average() -> None:
    class Wordy(Regressor):
        def fit_batch(self, batch: Any) -> Any:
            super().fit_batch(batch)
            return "fine"

    refused("an average is of numbers; got a str", make(Wordy))

    class Vector(Wordy):
        def fit_batch(self, batch: Any) -> Any:
            super().fit_batch(batch)
            return {"a": torch.ones(2)}

    refused(r"an average is of scalars; got a tensor of 'a' of shape \[2\]", make(Vector))


def test_a_fit_batch_may_return_nothing_and_an_evaluation_too() -> None:
    class Silent(Regressor):
        def fit_batch(self, batch: Any) -> None:
            super().fit_batch(batch)

        def evaluate_batch(self, batch: Any, stage: Stage) -> None:
            super().evaluate_batch(batch, stage)

    brain = make(Silent)
    brain.fit([1], batches(2), batches(1))
    assert brain.optimizer_step == 2
    assert math.isnan(brain.evaluate(batches(1)))


def test_metrics_that_are_no_mapping() -> None:
    class Odd(Regressor):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
            return 3.2

    refused("on_stage_end returned a float; allowed: a mapping from names of metrics", make(Odd))


def test_the_hooks_that_a_recipe_must_write() -> None:
    options = {"device": "cpu", "progressbar": False}
    brain = Brain({"net": net()}, torch.optim.Adam, {}, options)
    with pytest.raises(NotImplementedError, match=r"Brain has no compute_forward\(batch, stage\)"):
        brain.fit([1], batches(1))


def test_weights_that_are_in_half_precision_already() -> None:
    brain = make(precision="fp16")
    brain.modules.half()
    refused("the optimizer 'main' has weights in float16; precision fp16 computes in", brain)


def test_clipping_by_value_what_has_no_order() -> None:
    class Embedding(Regressor):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            return self.modules.net(self.modules.table(torch.tensor([1, 2, 1])))

    options = {"device": "cpu", "progressbar": False, "max_grad_norm": 1e-6}
    for clip in ("norm", "value"):
        modules = {"net": net(), "table": nn.Embedding(3, 4, sparse=True)}
        brain = Embedding(modules, partial(torch.optim.SGD, lr=0.1), {}, {**options, "clip": clip})
        brain.fit([1], batches(2))


def test_epochs_that_are_a_number() -> None:
    with pytest.raises(
        ValueError, match=r"the epoch_counter is 10; allowed: an iterable of epochs"
    ):
        make().fit(10, batches(1))


# --- data ----------------------------------------------------------------------------------------


def test_data_of_no_kind() -> None:
    refused(
        "the train set is a int; allowed: a Dataset, a DataLoader or any iterable", make(), data=3
    )
    refused(
        r"loader options \['batch_size'\] were given for the valid set, but a list is no Dataset",
        make(), valid_set=batches(1), valid_loader_kwargs={"batch_size": 2},
    )  # fmt: skip


def test_data_without_a_batch() -> None:
    refused("the train set gave no batch in epoch 1: is it empty, or a generator", make(), data=[])
    refused("the valid set gave no batch in epoch 1: is it empty, or a", make(), valid_set=[])
    brain = make()
    with pytest.raises(ValueError, match="the train set gave no batch in epoch 2"):
        brain.fit([1, 2], iter(batches(2)))
    with pytest.raises(ValueError, match="the valid set gave no batch in epoch 2: is it empty"):
        make().fit([1, 2], batches(1), iter(batches(2)))
    with pytest.raises(ValueError, match="the test set gave no batch"):
        make().evaluate([])


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, "five", True, [5.0], {"main": "five"}])
def test_limits_that_are_no_numbers(bad: Any) -> None:
    with pytest.raises(
        ValueError, match="max_grad_norm must be a number, a mapping of names to num"
    ):
        make(max_grad_norm=bad)


def rates() -> torch.optim.Optimizer:
    return torch.optim.SGD(net().parameters(), lr=1.0)


@pytest.mark.parametrize(
    ("made", "read"),
    [
        (lambda n: AutoClip(history=n), "_norms.maxlen"),
        (lambda n: AutoClip(n), "percentile"),
        (lambda n: NormClip(n), "limit"),
        (lambda n: EpochCounter(n), "limit"),
        (lambda n: EarlyStopping(patience=n), "patience"),
        (lambda n: WarmupDecay(rates(), n, 9), "warmup_steps"),
        (lambda n: Plateau(rates(), min_lr=n), "min_lr"),
        (lambda n: RunOptions(seed=n), "seed"),
        (lambda n: RunOptions(max_grad_norm=n), "max_grad_norm"),
        (lambda n: RunOptions.build({"log_interval": n}), "log_interval"),
        (
            lambda n: Checkpointer(Path("no such"), n, {"a": {"mode": "min", "n": n}}),
            "retention.last",
        ),
    ],
)
def test_a_number_may_be_of_numpy_or_in_a_tensor_and_no_bool(made: Any, read: str) -> None:
    def value(number: Any) -> Any:
        return operator.attrgetter(read)(made(number))

    for kind in (np.int64, np.uint8, np.array, torch.tensor):
        found = value(kind(2))
        assert found == value(2)
        assert type(found) is type(value(2))
    for odd in (True, np.bool_(True), torch.tensor(True), np.array([2, 2]), "2", 2j):
        with pytest.raises(ValueError, match="allowed|must be"):
            made(odd)


def test_fractions_and_results_may_be_of_numpy_or_in_a_tensor() -> None:
    for half in (np.float32(0.5), np.float16(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert RunOptions(max_bad_item=half).max_bad_item == 0.5
        assert Plateau(rates(), factor=half).factor == WarmupDecay(rates(), 1, 9, half).final == 0.5
        assert math.isinf(AutoClip(half).limit)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: AutoClip(110), r"AutoClip: percentile must be a number in \[0, 100\]; got 110"),
        (lambda: AutoClip(-1), r"AutoClip: percentile must be a number in \[0, 100\]; got -1"),
        (lambda: AutoClip("10"), "AutoClip: percentile must be a number .* got '10'"),
        (lambda: AutoClip(history=0), "AutoClip: history must be a whole number, 1 or more"),
        (lambda: NormClip(math.nan), "NormClip: limit is nan; allowed: a number; null, inf, 0"),
        (lambda: NormClip(p=0), r"NormClip: p must be a number in \(0, inf\]; got 0"),
        (lambda: clipping.AGC(0), r"AGC: clipping must be a number in \(0, inf\)"),
        (lambda: clipping.ZClip(alpha=1), r"ZClip: alpha must be a number in \(0, 1\)"),
        (lambda: clipping.SPAM(theta=-1), r"SPAM: theta must be a number in \(0, inf\)"),
        (lambda: clipping.GradualClip({}), "GradualClip: limits is {}; allowed: a mapping of"),
        (lambda: clipping.GradualClip({0: 1}, "square"), "GradualClip: shape must be linear or c"),
        (lambda: clipping.GradualClip({0: 1, 9: None}), "a linear limit cannot pass through inf"),
        (lambda: clipping.GradualClip({0: 1}, clip=AutoClip()), "clip is .*; allowed: a kind with"),
        (lambda: clipping.PatternClip([1]), r"PatternClip: limits is \[1\]; allowed: a mapping"),
        (lambda: clipping.MixedClip([]), r"MixedClip: clips is \[\]; allowed: a list"),
        (lambda: clipping.MixedClip([5.0]), "MixedClip: one of its clips is 5.0; allowed: kinds"),
        (lambda: clipping.MixedClip([one := NormClip(), one]), "has the same object twice"),
    ],
)
def test_clippers_that_cannot_be(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_clippers_that_do_not_fit_the_optimizer() -> None:
    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    def grouped(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(params), "max_grad_norm": 1.0}], lr=0.1)

    refused("SPAM needs the running mean of squares .*; SGD has none", make(
        optimizer=sgd, clip=clipping.SPAM()
    ))  # fmt: skip
    refused(
        "the optimizer 'main' has two clippers: AutoClip, and parameter groups with a max_grad_n",
        make(optimizer=grouped, clip=AutoClip()),
    )
    refused("clip is a list of 2, and an optimizer has one clipper; for several in order write",
            make(clip=[NormClip(), AutoClip()]))  # fmt: skip
    refused(
        "the pattern 'ne.0.weight' matches no parameter of the optimizer 'main'; the nearest names "
        "are net.0.weight, ",
        make(clip=clipping.PatternClip({"ne.0.weight": 1.0})),
    )
    refused(
        r"the pattern '\*.bias' comes too late: earlier patterns take every parameter",
        make(clip=clipping.PatternClip({"net.*": 1.0, "*.bias": 0.1})),
    )
    refused(
        r"AGC: exclude 'head\.\*' matches no parameter of the optimizer 'main'",
        make(clip=clipping.AGC(exclude=["head.*"])),
    )
    refused(
        "two clippers: ZClip", make(optimizer=grouped, clip=clipping.MixedClip([clipping.ZClip()]))
    )


def test_a_limit_that_a_clipper_does_not_use_is_said() -> None:
    brain = make(clip=AutoClip(), max_grad_norm=2.0)
    with pytest.warns(UserWarning, match="max_grad_norm 2 is not used for the optimizer 'main': i"):
        brain.fit([1], batches(1))
    make(clip=AutoClip(), max_grad_norm=None).fit([1], batches(1))  # It says the same.


def test_no_clipping_is_null() -> None:
    brain = make(hparams={"clip": None}, max_grad_norm=1e-6)
    brain.fit([1], batches(1))
    assert brain.updates["main"].clip.limit == math.inf


def test_limits_of_optimizers_that_do_not_exist() -> None:
    refused(
        "max_grad_norm names the optimizer 'generator', which does not exist; this Brain has 'mai",
        make(max_grad_norm={"generator": 1.0}),
    )
    schedule = {"generator": partial(torch.optim.lr_scheduler.StepLR, step_size=1)}
    refused("schedule names the optimizer 'generator'", make(hparams={"schedule": schedule}))
    refused("clip names the optimizer 'g'", make(hparams={"clip": {"g": NormClip()}}))


def test_limits_of_groups_that_are_no_numbers() -> None:
    def grouped(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(params), "max_grad_norm": "1.0"}], lr=0.1)

    refused("max_grad_norm is '1.0'; allowed: a number; null, inf, 0", make(optimizer=grouped))


@pytest.mark.parametrize("off", [None, math.inf, 0, -1.0, "inf"])
def test_limits_that_mean_none(off: Any) -> None:
    brain = make(max_grad_norm=off)
    brain.fit([1], batches(1))
    assert brain.updates["main"].clip.limit == math.inf


def test_something_that_is_no_clipper_and_no_schedule() -> None:
    with pytest.raises(ValueError, match="clip must be one of norm, value, not 5.0"):
        make(hparams={"clip": 5.0})
    refused("clip is <object .*; allowed: norm or value", make(hparams={"clip": object()}))
    refused("clip is <class .*; allowed: norm or value", make(hparams={"clip": AutoClip}))
    refused("schedule is a float; allowed: a function of an opti", make(hparams={"schedule": 0.5}))
    for made in (None, 3, {"scheduler": None, "interval": "step"}):
        refused(
            f"schedule has made a {type(made).__name__}; allowed: a schedule",
            make(hparams={"schedule": lambda optimizer, made=made: made}),
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp64"}, "precision must be one of fp32, fp16, bf16, not 'fp64'"),
        ({"device": "abacus"}, "device is 'abacus'; allowed: auto, cpu, cuda"),
        ({"nonfinite_patience": -1}, "nonfinite_patience must be a whole number of at least 0"),
        (
            {"grad_accumulation_factor": 0},
            "grad_accumulation_factor must be a whole number of at l",
        ),
        ({"clip": "median"}, "clip must be one of norm, value, not 'median'"),
        ({"optimizer_step_limit": "3"}, "optimizer_step_limit must be .* not '3'"),
        ({"gradient_accumulation": 2}, "'gradient_accumulation' is not a run option; did you mean"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_where_there_is_none() -> None:
    with pytest.raises(
        ValueError, match="device 'cuda:1' asks for GPU 1, but this machine has no GPUs"
    ):
        make(device="cuda:1")


def test_modules_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"modules\['net'\] is a dict; allowed: a torch.nn.Module"):
        Regressor({"net": {}}, None, {}, {"device": "cpu"})


def test_modules_to_compile_that_do_not_exist() -> None:
    with pytest.raises(
        ValueError, match="compile_modules names 'ent', which is not among the modules net; did you"
    ):
        make(compile=True, compile_modules=["ent"])


def test_precision_that_a_device_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda device: False)
    with pytest.raises(
        ValueError, match="precision 'fp16' is not supported on the device 'cpu' by"
    ):
        make(precision="fp16")
    make(precision="fp32")


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_of_other_shapes_names_the_parameter(tmp_path: Path) -> None:
    make(checkpointer=Checkpointer(tmp_path)).fit([1], batches(1))
    wider = make(checkpointer=Checkpointer(tmp_path))
    wider.modules.net[2] = nn.Linear(6, 3)
    refused(
        r"the saved parameter 'net.2.weight' has shape \(2, 6\), this Brain's has \(3, 6\)", wider
    )


def test_a_best_checkpoint_where_none_is_kept_is_not_silently_the_last() -> None:
    brain = make()
    brain.fit([1], batches(1), batches(1))
    with pytest.warns(
        UserWarning, match="min_key='wer' asks for the best checkpoint, but this Brain"
    ):
        brain.evaluate(batches(1), min_key="wer")
