"""Parameter groups by patterns: the same steps as torch takes with the same groups by hand."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from trainer import Brain, Stage, cli, schedules
from trainer.checkpoint import Checkpointer
from trainer.config.hyperparameters import load_hparams
from trainer.diagnostics.replay import Replayed
from trainer.optim.groups import ParameterGroups, clean_name

from ..processes import TwoRanks
from . import resuming
from .small import Players, Regressor, batches, ema_of, same, spoilt
from .small import make as small
from .test_models import Wrapper
from .test_tuner import found

EXAMPLE = """
param_groups:
  "encoder.*": {lr: 1e-5, layer_decay: 0.9, freeze_until: 1000}
  "*.bias|*norm*": {weight_decay: 0}
  "*": {lr: 1e-3}
"""


HEAD = "head.weight"


class Encoder(nn.Module):
    """A front end, layers with dropout, and a last norm."""

    def __init__(self, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(dropout))
            for _ in range(layers)
        )
        self.last_norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.last_norm(x)


class Tuner(Brain):
    """An encoder and a head."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.head(self.modules.encoder(batch["x"]))

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions - batch["y"]).square().mean()


def modules(dropout: float = 0.0) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"encoder": Encoder(dropout=dropout), "head": nn.Linear(6, 2)}


def make(
    groups: Any, optimizer: Any = None, kind: type[Brain] = Tuner, dropout: float = 0.0,
    parts: dict[str, nn.Module] | None = None, hparams: dict[str, Any] | None = None,
    checkpointer: Any = None, **options: Any,
) -> Any:  # fmt: skip
    return kind(
        modules(dropout) if parts is None else parts,
        optimizer or partial(AdamW, lr=0.01, weight_decay=0.1),
        {"param_groups": groups, **(hparams or {})},
        {"device": "cpu", "progressbar": False, "max_grad_norm": None, **options},
        checkpointer,
    )


def fit(brain: Any, number: int = 6, epochs: int = 1) -> Any:
    brain.fit(range(1, epochs + 1), batches(number))
    return brain


def settings(brain: Any, *keys: str, update: str | None = None) -> dict[str, Any]:
    """Return settings of the group that each parameter is in, by its name."""
    names = {p: name for name, p in brain.modules.named_parameters()}
    found = {}
    for name, each in brain.updates.items():
        for group in each.optimizer.param_groups if update in (None, name) else ():
            values = tuple(group.get(key) for key in keys)
            found |= {names[p]: values if len(keys) > 1 else values[0] for p in group["params"]}
    return found


# --- what a pattern gives ------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> Any:
    """Return the example as a YAML gives it."""
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    return load_hparams(path)["param_groups"]


def test_for_each_key_the_first_pattern_that_sets_it_wins(example: Any) -> None:
    brain = fit(make(example), 1)
    found = settings(brain, "lr", "weight_decay", "freeze_until")
    below = {"embed": 3, "layers.0": 2, "layers.1": 1, "layers.2": 0, "last_norm": 0}
    assert len(found) == len(list(brain.modules.parameters())) == 18
    for name, (rate, decay, until) in found.items():
        encoder = name.startswith("encoder.")
        depth = next((d for part, d in below.items() if f"encoder.{part}." in name), 0)
        assert rate == pytest.approx(1e-5 * 0.9**depth if encoder else 1e-3)
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1)
        assert until == (1000 if encoder else None)


def test_groups_of_the_recipe_keep_what_no_pattern_sets() -> None:
    def made(params: Any) -> Optimizer:
        chosen = list(params)
        rest = {"params": chosen[5:], "betas": (0.5, 0.6)}
        return AdamW([{"params": chosen[:5], "lr": 0.5, "mark": 7}, rest], lr=0.1)

    brain = fit(make({"*.bias": {"weight_decay": 0.0, "betas": [0.1, 0.2]}}, made), 1)
    found = settings(brain, "lr", "betas", "weight_decay", "mark")
    assert found["encoder.embed.weight"] == (0.5, (0.9, 0.999), 0.01, 7)
    assert found["encoder.embed.bias"] == (0.5, (0.1, 0.2), 0.0, 7)
    assert found["head.weight"] == (0.1, (0.5, 0.6), 0.01, None)
    assert found["head.bias"] == (0.1, (0.1, 0.2), 0.0, None)


def test_optimizers_have_patterns_of_their_own_or_the_same() -> None:
    one = {"generator": {"*.bias": {"lr": 0.5}, "generator.2.*": {"lr": 0.25}}}
    brain = small(Players, hparams={"param_groups": one})
    brain.fit(range(1, 2), batches(2))
    found = settings(brain, "lr")
    assert found["generator.0.bias"] == found["generator.2.bias"] == 0.5
    assert found["generator.2.weight"] == 0.25
    assert len(brain.updates["discriminator"].optimizer.param_groups) == 1
    brain = small(Players, hparams={"param_groups": {"*.0.*": {"lr": 0.5}}})
    brain.fit(range(1, 2), batches(2))
    assert {name for name, rate in settings(brain, "lr").items() if rate == 0.5} == {
        f"{player}.0.{part}" for player in ("generator", "discriminator")
        for part in ("weight", "bias")
    }  # fmt: skip


def test_a_shared_parameter_goes_by_any_of_its_names() -> None:
    parts = modules()
    parts["second"] = nn.Linear(6, 2)
    parts["second"].weight = parts["head"].weight  # type: ignore[assignment]
    brain = fit(make({"second.weight": {"lr": 0.5}}, parts=parts), 1)
    assert settings(brain, "lr")["head.weight"] == 0.5


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("encoder.layers.0.weight", "encoder.layers.0.weight"),
        ("encoder._orig_mod.layers.0.weight", "encoder.layers.0.weight"),
        ("encoder.base_model.model.layers.0.q.base_layer.weight", "encoder.layers.0.q.weight"),
        ("base_model.model.q.lora_A.default.weight", "q.lora_A.default.weight"),
        ("encoder.base_model.model.layers.0.q.base_layer", "encoder.layers.0.q"),
        ("my_base_model.model.q.base_layers.weight", "my_base_model.model.q.base_layers.weight"),
    ],
)
def test_names_are_those_without_wrappers(name: str, clean: str) -> None:
    assert clean_name(name) == clean


LAYERED = {
    "transformers": (
        "masked_spec_embed feature_extractor.conv_layers.0.x feature_extractor.conv_layers.1.x "
        "feature_projection.x encoder.pos_conv_embed.x encoder.layer_norm "
        "encoder.layers.0.attention.q encoder.layers.0.final_layer_norm encoder.layers.1.x",
        [2, 2, 2, 2, 2, 2, 1, 1, 0],
    ),
    "bert": (
        "embeddings.word encoder.layer.0.x encoder.layer.1.x encoder.layer.2.x pooler.dense",
        [3, 2, 1, 0, 0],
    ),
    "t5": (
        "shared block.0.layer.0.q block.0.layer.1.wi block.1.layer.0.q final_layer_norm.x",
        [2, 1, 1, 0, 0],
    ),
    "two stacks": (
        "encoder.conv1 encoder.layers.0.x encoder.layers.1.x encoder.layer_norm.x "
        "decoder.embed.x decoder.layers.0.x decoder.layers.1.x decoder.layer_norm.x",
        [4, 3, 2, 2, 2, 1, 0, 0],
    ),
    "torchaudio": ("subsample.0.x conformer_layers.0.x conformer_layers.1.x", [2, 1, 0]),
    "plain numbers": ("0.weight 0.bias 2.weight 5.weight", [2, 2, 1, 0]),
}


@pytest.mark.parametrize("kind", LAYERED)
def test_layers_are_counted_down_from_the_top(kind: str) -> None:
    names, depths = LAYERED[kind]
    root = nn.Module()
    params = []
    for name in names.split():
        at, *path, last = root, *name.split(".")
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        params.append(nn.Parameter(torch.zeros(1)))
        at.register_parameter(last, params[-1])
    optimizer = SGD(params, lr=1.0)
    ParameterGroups({"*": {"layer_decay": 0.5}}).regroup({"main": optimizer}, root)
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert [rates[p] for p in params] == [0.5**depth for depth in depths]


def test_the_start_of_a_run_lists_the_groups(
    example: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")
    fit(make(example), 1)
    lines = [m for m in caplog.messages if m.startswith("  ")]
    assert "parameter groups of the optimizer 'main':" in caplog.messages
    assert [line.split("  ")[1] for line in lines] == [
        "encoder.*", "encoder.* + *.bias|*norm*", "*", "*.bias|*norm* + *",
    ]  # fmt: skip
    assert len({line.index("  lr ") for line in lines}) == 1
    encoder = next(line for line in lines if line.startswith("  encoder.*  "))
    for part in ("7 tensors", "150 parameters", "lr 7.29e-06 to 1e-05", "until step 1000"):
        assert part in encoder


# --- bad input -----------------------------------------------------------------------------------

BAD = {
    "no mapping": ([1], "param_groups is .1.; allowed: a mapping from patterns"),
    "empty": ({}, "param_groups is {}; allowed"),
    "no keys": ({"*": {}}, r"'\*' has {}; allowed"),
    "no settings": ({"*": 1e-3}, r"'\*' has 0.001; allowed"),
    "mixed": ({"main": {"*": {"lr": 1.0}}, "head.*": {"lr": 1.0}}, "optimizer 'head.*', which"),
    "optimizer": ({"mian": {"*": {"lr": 1.0}}}, "'mian', which does not .*did you mean 'main'"),
    "pattern": ({"encodr.*": {"lr": 1.0}}, r"'encodr\.\*' matches no .*names are encoder\.\w"),
    "nested": ({"main": {"hed.*": {"lr": 1.0}}}, r"'hed\.\*' matches no .*names are head\."),
    "key": ({"*": {"weight_decai": 0}}, "'weight_decai', which AdamW .*mean 'weight_decay'"),
    "other's key": ({"*": {"momentum": 0.9}}, "'momentum', which AdamW .* does not have; allowed"),
    "of the whole": ({"*": {"fused": True}}, "'fused', which AdamW"),
    "text": ({"*": {"lr": "1e-3"}}, "lr must be a number in .*got '1e-3'"),
    "negative": ({"*": {"lr": -1.0}}, r"'\*': lr must be a number in \[0, inf\); got -1"),
    "nan": ({"*": {"lr": math.nan}}, "lr must be a number"),
    "bool": ({"*": {"lr": True}}, "lr must be a number"),
    "null": ({"*": {"lr": None}}, "lr must be a number"),
    "decay": ({"*": {"weight_decay": -0.1}}, "weight_decay must be a number"),
    "betas": ({"*": {"betas": [0.9]}}, "betas must be 2 numbers, such as .0.9, 0.999."),
    "beta": ({"*": {"betas": [0.9, 1.0]}}, r"betas must be a number in \[0, 1\); got 1"),
    "switch": ({"*": {"amsgrad": 1}}, "amsgrad must be true or false; got 1"),
    "layers": ({"*": {"layer_decay": 1.5}}, r"layer_decay must be a number in \(0, 1\]"),
    "no layers": ({"head.*": {"layer_decay": 0.9}}, "no parameter .*number in its name.*head.w"),
    "steps": ({"encoder.*": {"freeze_until": 2.5}}, "freeze_until must be a whole number"),
    "nothing left": ({"*": {"freeze_until": 2}}, "freezes every parameter of the optimizer 'main'"),
    "eval": ({"encoder.*": {"eval": "yes"}}, "eval must be true or false; got 'yes'"),
    "limit": ({"*": {"max_grad_norm": "x"}}, "max_grad_norm is 'x'; allowed"),
    "factor": ({"*": {"lr_factor": -1}}, "lr_factor must be a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_before_the_first_batch(case: str) -> None:
    groups, message = BAD[case]
    brain = make(groups)
    with pytest.raises(ValueError, match=message) as caught:
        brain.fit(range(1, 2), map(pytest.fail, ["a batch is read"]))
    assert "\n" not in str(caught.value)


def test_what_has_no_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    groups = {
        "encoder.*|hed.*": {"lr": 1e-5}, "encoder.embed.*": {"lr": 1.0, "weight_decay": 0},
        "*": {"lr": 0.1},
    }  # fmt: skip
    fit(make({**groups, "head.*": {"eval": True}, "*.bias": {"eval": True}}), 1)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 4
    assert told[0].startswith("param_groups: 'hed.*' matches no parameter")
    assert told[1].startswith("param_groups: 'encoder.embed.*' comes too late for lr, which")
    assert [text.partition(" has")[0] for text in told[2:]] == [
        "param_groups: eval of 'head.*'", "param_groups: eval of '*.bias'",
    ]  # fmt: skip


def test_a_schedule_that_gives_all_groups_one_rate_is_refused() -> None:
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    brain = make({"head.*": {"lr": 1.0}}, hparams={"schedule": cycle}, schedule_every="step")
    with pytest.raises(ValueError, match=r"several learning rates, and its schedule .* lr_factor"):
        fit(brain)
    listed = partial(lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2], total_steps=20)
    fit(make({"head.*": {"lr": 1.0}}, hparams={"schedule": listed}, schedule_every="step"))


# --- the steps -----------------------------------------------------------------------------------


def states(optimizer: Optimizer, params: list[Tensor]) -> list[Any]:
    return [dict(optimizer.state.get(p, {})) for p in params]


def test_steps_are_those_of_torch_with_the_same_groups() -> None:
    groups = {
        "encoder.*": {"lr": 0.003, "freeze_until": 3}, "*.bias|*norm*": {"weight_decay": 0},
        "head.*": {"lr": 0.02, "betas": [0.8, 0.9]}, "*": {"eps": 1e-7},
    }  # fmt: skip
    brain = fit(make(groups, ema_decay=0.9), 7)
    own = nn.ModuleDict(modules())
    made = []
    for name, p in own.named_parameters():
        group: dict[str, Any] = {"params": [p], "eps": 1e-7, "weight_decay": 0.1}
        group |= {"lr": 0.003} if name.startswith("encoder.") else {"lr": 0.02, "betas": (0.8, 0.9)}
        if name.endswith("bias") or "norm" in name:
            group["weight_decay"] = 0.0
        made.append(group)
    optimizer, average = AdamW(made), {n: p.detach().clone() for n, p in own.named_parameters()}
    for number, batch in enumerate(batches(7)):
        loss = (own["head"](own["encoder"](batch["x"])) - batch["y"]).square().mean()
        loss.backward()
        for p in own["encoder"].parameters() if number < 3 else ():
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for name, p in own.named_parameters():
            average[name].lerp_(p.detach(), 0.1)
    assert same(dict(brain.modules.state_dict()), dict(own.state_dict()))
    ours, theirs = list(brain.modules.parameters()), list(own.parameters())
    assert same(states(brain.optimizer, ours), states(optimizer, theirs))
    assert same(ema_of(brain).state_dict()["average"], average)
    assert brain.optimizer.state[brain.modules.encoder.embed.weight]["step"] == 4
    assert brain.optimizer.state[brain.modules.head.weight]["step"] == 7


def test_everything_together_is_as_in_a_loop_by_hand() -> None:
    """Windows of two, a warm-up, factors and decay by layer, two limits, and an average."""
    groups = {
        "encoder.layers.*": {
            "lr": 0.02, "layer_decay": 0.5, "lr_factor": 0.5, "freeze_until": 3,
            "max_grad_norm": 0.05,
        },
        "encoder.*": {"max_grad_norm": 0.03, "weight_decay": 0.3},
        "*": {"lr": 0.01},
    }  # fmt: skip
    schedule = partial(schedules.WarmupDecay, warmup_steps=2, total_steps=8)
    brain = make(
        groups, hparams={"schedule": schedule}, max_grad_norm=0.2, grad_accumulation_factor=2,
        ema_decay=0.9,
    )  # fmt: skip
    fit(brain, 12)
    own = nn.ModuleDict(modules())
    params, data = dict(own.named_parameters()), batches(12)
    kinds = [n.startswith("encoder.") + n.startswith("encoder.layers.") for n in params]
    peaks = [0.01 * 0.5 ** (2 - int(n.split(".")[2])) if k == 2 else 0.01
             for n, k in zip(params, kinds, strict=True)]  # fmt: skip
    optimizer = AdamW([
        {"params": [p], "weight_decay": 0.3 if kind else 0.1}
        for p, kind in zip(params.values(), kinds, strict=True)
    ])  # fmt: skip
    average = {n: p.detach().clone() for n, p in params.items()}
    for step, share in enumerate((0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6)):
        for batch in data[2 * step : 2 * step + 2]:
            loss = (own["head"](own["encoder"](batch["x"])) - batch["y"]).square().mean()
            (loss / 2).backward()
        for kind, limit in enumerate((0.2, 0.03, 0.05)):
            members = [p for p, k in zip(params.values(), kinds, strict=True) if k == kind]
            for p in members if kind == 2 and step < 3 else ():
                p.grad = None
            torch.nn.utils.clip_grad_norm_(members, limit)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.step()
        optimizer.zero_grad()
        for name, p in params.items():
            average[name].lerp_(p.detach(), 0.1)
    torch.testing.assert_close(dict(brain.modules.state_dict()), dict(own.state_dict()))
    torch.testing.assert_close(ema_of(brain).state_dict()["average"], average)


CYCLE = {"max_lr": 0.1, "cycle_momentum": False}
FLAT = {"threshold": 0.9, "patience": 0, "min_lr": 0.004}
SCHEDULES: dict[str, Any] = {
    "Noam": partial(schedules.Noam, warmup_steps=3),
    "WarmupDecay": partial(schedules.WarmupDecay, warmup_steps=2, total_steps=9),
    "NewBob": partial(schedules.NewBob, threshold=0.9, min_lr=0.004),
    "Plateau": partial(schedules.Plateau, **FLAT),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, total_steps=20, **CYCLE),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, step_size_up=3, **CYCLE),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=9, eta_min=0.005),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, **FLAT),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "none": None,
}
OF_TENSORS = {"Noam", "WarmupDecay", "NewBob", "Plateau", "none"}  # Torch's own do as they like.


class Watching(Tuner):
    """Notes the rate of each parameter in each step, from what plain SGD moves it by."""

    def init_optimizers(self) -> None:
        super().init_optimizers()
        self.rates: list[dict[str, float]] = []
        self.optimizer.register_step_pre_hook(self.begin)
        self.optimizer.register_step_post_hook(self.end)

    def begin(self, *_: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in self.modules.named_parameters()}

    def end(self, *_: Any) -> None:
        self.rates.append({
            name: ((self.before[name] - p.detach()).norm() / p.grad.norm()).item()
            for name, p in self.modules.named_parameters()
        })  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor"),
    [*((name, False) for name in SCHEDULES), *((name, True) for name in sorted(OF_TENSORS))],
)
def test_lr_factor_holds_under_every_schedule(name: str, tensor: bool) -> None:
    def run(groups: Any) -> Any:
        rate = torch.tensor(0.02) if tensor else 0.02
        kind = partial(SGD, lr=rate, momentum=0.0)
        brain = make(
            groups, kind, Watching, hparams={"schedule": SCHEDULES[name]}, schedule_every="step"
        )
        return fit(brain, 4, epochs=3)

    plain, scaled = run(None), run({"encoder.*": {"lr_factor": 0.25}})
    assert len(plain.rates) == len(scaled.rates) == 12
    if name != "none":
        assert len({round(each["head.weight"], 6) for each in plain.rates}) > 1
    given = [each["head.weight"] for each in plain.rates]
    assert [each["head.weight"] for each in scaled.rates] == pytest.approx(given, rel=1e-3)
    for part in ("encoder.embed.weight", "encoder.layers.1.0.weight"):
        found = [each[part] for each in scaled.rates]
        assert found == pytest.approx([rate / 4 for rate in given], rel=1e-2)
    assert scaled.updates["main"].lr == pytest.approx(plain.updates["main"].lr)


def test_a_group_is_clipped_by_its_own_limit_on_its_own_norm() -> None:
    groups = {
        "encoder.*": {"max_grad_norm": 0.01, "layer_decay": 0.5}, "*.bias": {"weight_decay": 0},
    }  # fmt: skip
    sgd = partial(SGD, lr=1.0)
    brain, own = make(groups, sgd, max_grad_norm=0.02), nn.ModuleDict(modules())
    assert same(dict(brain.modules.state_dict()), dict(own.state_dict()))
    batch = batches(1)
    brain.fit(range(1, 2), batch)
    assert len(brain.optimizer.param_groups) > 5
    loss = (own["head"](own["encoder"](batch[0]["x"])) - batch[0]["y"]).square().mean()
    loss.backward()
    for name, limit in (("encoder", 0.01), ("head", 0.02)):
        assert torch.nn.utils.clip_grad_norm_(own[name].parameters(), limit) > limit
    rates = settings(brain, "lr")
    for name, p in own.named_parameters():
        moved = p.detach() - rates[name] * p.grad
        torch.testing.assert_close(brain.modules.get_parameter(name).detach(), moved)


def test_a_limit_of_a_group_and_a_clipper_without_are_refused() -> None:
    from trainer.clipping import AutoClip

    brain = make({"encoder.*": {"max_grad_norm": 1.0}}, hparams={"clip": AutoClip()})
    with pytest.raises(ValueError, match=r"two clippers: AutoClip, and parameter groups"):
        fit(brain)


# --- freezing ------------------------------------------------------------------------------------


class Noting(Tuner):
    """Notes in each batch what requires gradients and which parts are in evaluation mode."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.notes = getattr(self, "notes", [])
        trains = {n for n, p in self.modules.named_parameters() if p.requires_grad}
        resting = {n for n, m in self.modules.named_modules() if not m.training}
        self.notes.append((self.optimizer_step, trains, resting))


def test_parameters_are_unfrozen_where_a_window_begins() -> None:
    groups = {"encoder.layers.*": {"freeze_until": 2}, "encoder.*": {"freeze_until": 4}}
    brain = fit(make(groups, kind=Noting, grad_accumulation_factor=3), 18)
    layers = {n for n, _ in brain.modules.named_parameters() if n.startswith("encoder.layers.")}
    every = {n for n, _ in brain.modules.named_parameters()}
    for number, (_, trains, _) in enumerate(brain.notes):
        step = number // 3
        head = {"head.weight", "head.bias"}
        expected = head if step < 2 else head | layers if step < 4 else every
        assert trains == expected, number
    assert brain.optimizer_step == 6
    assert brain.optimizer.state[brain.modules.encoder.embed.weight]["step"] == 2


def test_what_the_recipe_froze_stays_frozen() -> None:
    parts = modules()
    parts["encoder"].embed.requires_grad_(False)
    brain = fit(make({"encoder.*": {"freeze_until": 2}}, parts=parts))
    frozen = {n for n, p in brain.modules.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.embed.weight", "encoder.embed.bias"}


def test_inf_freezes_for_the_whole_run() -> None:
    brain = make({"encoder.*": {"freeze_until": math.inf}})
    before = {n: p.detach().clone() for n, p in brain.modules.encoder.named_parameters()}
    fit(brain)
    assert same(before, dict(brain.modules.encoder.named_parameters()))
    assert brain.modules.encoder.embed.weight not in brain.optimizer.state


def test_frozen_modules_are_in_evaluation_mode_where_asked() -> None:
    groups = {
        "encoder.layers.2.*": {"freeze_until": 2, "eval": True},
        "encoder.*": {"freeze_until": 4, "eval": True},
    }
    brain = make(groups, kind=Noting, dropout=0.5)
    brain.fit(range(1, 5), batches(2), batches(1))
    every = {n for n, _ in brain.modules.encoder.named_modules(prefix="encoder")}
    top = {n for n in every if n.startswith("encoder.layers.2")}
    # A container without parameters of its own, only some of which train, is in training mode.
    some = every - top - {"encoder", "encoder.layers"}
    assert [resting for *_, resting in brain.notes] == [every] * 2 + [some] * 2 + [set()] * 4
    plain = make({"encoder.*": {"freeze_until": 4}}, kind=Noting, dropout=0.5)
    assert not any(resting for *_, resting in fit(plain).notes)


def test_modules_that_the_recipe_froze_are_in_evaluation_mode_where_asked() -> None:
    parts = modules(0.5)
    parts["encoder"].requires_grad_(False)
    head = parts["head"]
    brain = make(
        {"encoder.*": {"eval": True}}, lambda _: SGD(head.parameters(), lr=0.1), Noting, parts=parts
    )
    assert all("encoder.layers.0.2" in resting for *_, resting in fit(brain).notes)
    brain = make(
        {"*": {"eval": True, "lr": 0.2}}, lambda _: SGD(head.parameters(), lr=0.1), Noting,
        parts=parts,
    )  # fmt: skip
    assert all("encoder.layers.0.2" in resting for *_, resting in fit(brain).notes)
    assert settings(brain, "lr") == {"head.weight": 0.2, "head.bias": 0.2}


class Rivals(Players):
    """Notes which parameters require gradients between and within the players' losses."""

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        before = self.frozen_names()
        found = super().fit_batch(batch)
        with self.frozen("discriminator"):
            within = self.frozen_names()
        assert within == before | {n for n, _ in self.modules.named_parameters() if "discr" in n}
        assert self.frozen_names() == before
        self.seen = [*getattr(self, "seen", []), before]
        return found

    def frozen_names(self) -> set[str]:
        return {n for n, p in self.modules.named_parameters() if not p.requires_grad}


def test_players_that_freeze_each_other_leave_what_is_frozen() -> None:
    groups = {
        "generator": {"generator.0.*": {"freeze_until": 2}},
        "discriminator": {"discriminator.2.bias": {"freeze_until": 3}},
    }
    brain = small(Rivals, hparams={"param_groups": groups})
    before = {n: p.detach().clone() for n, p in brain.modules.named_parameters()}
    brain.fit(range(1, 2), batches(5))
    first, second = {"generator.0.weight", "generator.0.bias"}, {"discriminator.2.bias"}
    assert brain.seen == [first | second] * 2 + [second] + [set()] * 2
    assert all(not torch.equal(p, before[n]) for n, p in brain.modules.named_parameters())


class Resting(Noting):
    """Leaves the head in evaluation mode by a hook, as one may."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.modules.head.eval()


def test_what_a_hook_put_into_evaluation_mode_stays_there() -> None:
    groups = {"encoder.*": {"freeze_until": 2, "eval": True}}
    brain = fit(make(groups, kind=Resting), 4)
    assert [resting & {"head", "encoder"} for *_, resting in brain.notes] == [
        {"head", "encoder"}, {"head", "encoder"}, {"head"}, {"head"},
    ]  # fmt: skip


def test_a_fit_within_a_hook_goes_by_the_steps_of_the_whole_run() -> None:
    class Nesting(Noting):
        def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: Any = None) -> None:
            if not getattr(self, "nested", False):
                self.nested = True
                self.fit(range(1, 2), batches(2))

    brain = make({"encoder.*": {"freeze_until": 4}}, kind=Nesting)
    brain.fit(range(1, 3), batches(3))
    frozen = [len(trains) == 2 for _, trains, _ in brain.notes]
    assert [step for step, *_ in brain.notes] == list(range(8))
    assert frozen == [True] * 4 + [False] * 4


def test_what_is_undone_is_frozen_again() -> None:
    brain = fit(make({"encoder.*": {"freeze_until": 4}}, kind=Noting), 2)
    with brain.sandbox():
        for batch in batches(4):
            brain.train_batch(batch)
        assert brain.modules.encoder.embed.weight.requires_grad
    assert not brain.modules.encoder.embed.weight.requires_grad
    brain.fit(range(1, 2), batches(4))
    assert [len(trains) for *_, trains, _ in brain.notes[-4:]] == [2, 2, 18, 18]


# --- resuming ------------------------------------------------------------------------------------

GROUPS = {
    "net.0.*|net.1.*": {"lr": 0.02, "freeze_until": 3, "eval": True, "lr_factor": 0.5},
    "*.bias": {"weight_decay": 0.0, "max_grad_norm": 0.1},
    "*": {"layer_decay": 0.8},
}
ADVERSARY = {
    "d": {"judge.0.*": {"freeze_until": 4, "lr": 0.01}},
    "g": {"net.0.*": {"freeze_until": 2, "eval": True}, "*.bias": {"weight_decay": 0.5}},
}
FEW = {"data": resuming.batches, "loader": None, "epochs": lambda: range(1, 3)}


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.report.write_html", lambda folder: folder)


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize(
    ("setting", "stops"),
    [
        (resuming.Setting(window=3, optimizer=AdamW, groups=GROUPS, **FEW), range(1, 23)),
        (resuming.Setting(optimizer=AdamW, groups=GROUPS, **FEW), (3, 4)),
        (resuming.Setting(schedule="newbob", optimizer=AdamW, groups=GROUPS, **FEW), (3, 11)),
        (resuming.Setting(window=2, precision="fp16", groups=GROUPS, **FEW), (6, 7)),
        (resuming.Setting(resuming.Adversary, window=2, groups=ADVERSARY, **FEW), (4, 5, 8, 9)),
    ],
    ids=["every batch", "no windows", "by epoch", "fp16", "two players"],
)  # fmt: skip
def test_a_resumed_run_is_exact(tmp_path: Path, setting: resuming.Setting, stops: Any) -> None:
    straight = resuming.check(setting, tmp_path, stops)
    assert all(p.requires_grad for p in straight.modules.parameters())
    assert straight.optimizer_step >= 6


class Pretrained(resuming.Learner):
    """The first layers come in evaluation mode, as those of transformers' `from_pretrained` do."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.modules.net[:2].eval()
        self.modes: list[list[bool]] = []

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        self.modes.append([part.training for part in self.modules.net])


@pytest.mark.usefixtures("_no_page")
def test_a_part_in_evaluation_mode_trains_from_where_it_is_unfrozen(tmp_path: Path) -> None:
    groups = {"net.0.*": {"freeze_until": 3}, "net.1.*": {"freeze_until": 5}}
    setting = resuming.Setting(Pretrained, groups=groups, **FEW)
    straight = resuming.check(setting, tmp_path, (3, 4, 6, 12))
    resting = [[not mode for mode in modes[:2]] for modes in straight.modes]
    assert resting == [[True, True]] * 3 + [[False, True]] * 2 + [[False, False]] * 17
    assert all(all(modes[2:]) for modes in straight.modes)


def straight_and_resumed(folder: str) -> dict[str, Any]:
    setting = resuming.Setting(
        window=2, optimizer=AdamW, groups=GROUPS, data=lambda: resuming.Sentences(44),
        epochs=lambda: range(1, 3), dropout=0.5,
    )  # fmt: skip
    # Before the window that follows step 3, and in it.
    straight, found = resuming.on_all_ranks(setting, Path(folder), (6, 7))
    state = {n: p.detach().clone() for n, p in straight.modules.named_parameters()}
    moments = [int(straight.optimizer.state[p]["step"]) for p in straight.modules.parameters()]
    return {"found": found, "state": state, "moments": moments}


def test_two_ranks_resume_exactly(two_ranks: TwoRanks, tmp_path: Path) -> None:
    ranks = two_ranks(straight_and_resumed, tmp_path)
    assert same(ranks[0]["state"], ranks[1]["state"])
    for each in ranks:
        assert each["found"] == {stop: [] for stop in (6, 7)}
        assert len(set(each["moments"])) == 2  # Three steps fewer where it was frozen.


def test_a_checkpoint_with_other_groups_is_refused(tmp_path: Path) -> None:
    first = {"head.*": {"lr": 0.1}, "*": {"lr": 0.01}}
    fit(make(first, checkpointer=Checkpointer(tmp_path)))
    again = {"encoder.*": {"lr": 0.1}, "*": {"lr": 0.01}}
    with pytest.raises(ValueError, match=r"has the param_groups '\*', 'head.*', this Brain"):
        fit(make(again, checkpointer=Checkpointer(tmp_path)), epochs=2)
    with pytest.raises(ValueError, match="this Brain's has none: a run resumes with"):
        fit(make(None, checkpointer=Checkpointer(tmp_path)), epochs=2)
    fit(make(first, checkpointer=Checkpointer(tmp_path)), epochs=2)


def test_another_rate_of_a_group_is_in_force_after_resuming(tmp_path: Path) -> None:
    fit(make({"head.*": {"lr": 0.1}}, checkpointer=Checkpointer(tmp_path)))
    again = make({"head.*": {"lr": 0.05}}, checkpointer=Checkpointer(tmp_path))
    assert settings(fit(again, epochs=2), "lr")["head.weight"] == 0.05


def test_settings_of_a_group_may_come_and_go_when_a_run_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = {"head.*": {"lr_factor": 0.5, "freeze_until": 2}, "*": {"lr": 0.1}}
    again = {"head.*": {"max_grad_norm": 2.0, "freeze_until": 9}, "*": {"lr": 0.2}}
    fit(make(first, checkpointer=Checkpointer(tmp_path)))
    brain = fit(make(again, kind=Noting, checkpointer=Checkpointer(tmp_path)), epochs=2)
    found = settings(brain, "lr_factor", "max_grad_norm", "freeze_until", "lr")
    assert found[HEAD] == (None, 2.0, 9, 0.2)
    assert found["encoder.embed.bias"] == (None, None, None, 0.2)
    assert [HEAD in trains for _, trains, _ in brain.notes] == [False] * 3 + [True] * 3
    told = next(m for m in caplog.messages if "resumes with other settings" in m)
    for part in ("lr_factor: 0.5 -> None", "max_grad_norm: None -> 2.0", "freeze_until: 2 -> 9"):
        assert part in told


# --- searches and replays ------------------------------------------------------------------------


def test_a_search_scales_all_groups_together(tmp_path: Path) -> None:
    class Recording(Tuner):
        def on_fit_batch_end(self, *_: Any) -> None:
            rates.append(tuple(settings(self, "lr")[name] for name in ("encoder.embed.bias", HEAD)))

    rates: list[tuple[float, float]] = []
    brain = make({"encoder.*": {"lr": 0.001}, "*": {"lr": 0.01}}, kind=Recording)
    result = found(brain, batches(60), find_lr=True, find_steps=20)["find_lr"]["main"]
    assert result.own == 0.01  # That of the head, which is the larger one.
    assert {round(head / encoder, 6) for encoder, head in rates if head} == {10.0}
    assert len({head for _, head in rates}) > 20
    assert set(settings(brain, "lr").values()) == set()  # Nothing of the search is left.
    fit(brain, 1)
    assert settings(brain, "lr")[HEAD] == 0.01


def test_trials_begin_with_the_same_parts_frozen() -> None:
    groups = {"encoder.*": {"freeze_until": 5, "eval": True}}
    brain = make(groups, dropout=0.5)
    result = found(brain, batches(20), find_clip=True, find_steps=15)["find_clip"]["main"]
    assert len(result.trials) >= 3
    assert len({tuple(trial.losses[:1]) for trial in result.trials}) == 1


class Frozen(Regressor):
    """Notes in each batch how many parameters require gradients."""

    seen: ClassVar[list[int]] = []

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        self.seen.append(sum(p.requires_grad for p in self.modules.parameters()))
        return super().compute_forward(batch, stage)


@pytest.mark.parametrize("number", [2, 5])
def test_a_batch_is_replayed_with_what_trained_in_it(number: int, tmp_path: Path) -> None:
    data = batches(7)
    data[number] = spoilt(data[number], "input")

    def started(**options: Any) -> Any:
        hparams = {"param_groups": {"net.0.*": {"freeze_until": 4}}}
        return small(Frozen, hparams=hparams, output_folder=str(tmp_path), **options)

    Frozen.seen = []
    started().fit([1], data)
    kept = tmp_path / "nonfinite" / str(number + 1)
    assert Frozen.seen[0] == 2
    assert Frozen.seen[-1] == 4
    Frozen.seen = []
    with pytest.raises(Replayed):
        started(replay=str(kept)).fit([1], data)
    assert set(Frozen.seen) == {2 if number < 4 else 4}


TRAIN = """
import torch
import trainer

class Toy(trainer.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.head(self.modules.encoder(batch["x"]))

    def compute_objectives(self, predictions, batch, stage):
        return predictions.square().mean()

def train(run):
    torch.manual_seed(0)
    modules = {"encoder": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)}
    brain = Toy(modules, torch.optim.AdamW, run.hparams, run.options, run.hparams["checkpointer"])
    brain.fit(range(1, 3), [{"x": torch.randn(2, 4)}])
    groups = brain.optimizer.param_groups
    return {group["patterns"]: group["lr"] for group in groups}
"""
YAML = """
seed: 1
slow: 1e-5
param_groups:
  "encoder.*": {lr: !ref <slow>, betas: [0.8, 0.9]}
  "*.bias|*norm*": {weight_decay: 0}
  "*": {lr: 1e-3}
checkpointer: !new:trainer.checkpoint.checkpointer.Checkpointer
  folder: !ref <output_folder>/checkpoints
device: cpu
progressbar: false
"""


def test_a_yaml_and_its_command_line_set_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.yaml").write_text(YAML)
    given = [str(tmp_path / "toy.yaml"), "--output_folder", str(tmp_path / "run")]
    namespace: dict[str, Any] = {"__name__": "toy"}
    exec(TRAIN, namespace)
    assert cli.main(namespace["train"], [*given, "--slow=2e-5"]) == {
        "encoder.*": 2e-5, "encoder.* + *.bias|*norm*": 2e-5, "*.bias|*norm* + *": 1e-3, "*": 1e-3,
    }  # fmt: skip
    assert "  encoder.* + *.bias|*norm*  1 tensor" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # Training goes on with what it began with.
        cli.main(namespace["train"], [*given, "--slow=3e-5"])
    assert "slow: 2e-05 -> 3e-05" in capsys.readouterr().err


def test_keys_of_every_brain_are_given_on_the_command_line_of_any_yaml(tmp_path: Path) -> None:
    lines = YAML.partition("param_groups:")[0] + YAML[YAML.index("checkpointer:") :]
    (tmp_path / "toy.yaml").write_text(lines)
    given = [str(tmp_path / "toy.yaml"), "--output_folder", str(tmp_path / "run")]
    namespace: dict[str, Any] = {"__name__": "toy"}
    exec(TRAIN, namespace)
    rates = cli.main(
        namespace["train"],
        [*given, '--param_groups={"encoder.*": {lr: !ref <slow>}, "*": {lr: 1e-3}}',
         "--schedule=!name:trainer.schedules.WarmupDecay {warmup_steps: 1, total_steps: 9}",
         "--early_stopping", "!new:trainer.schedules.EarlyStopping {metric: loss}"],
    )  # fmt: skip
    assert rates == pytest.approx({"encoder.*": 7.5e-6, "*": 7.5e-4})  # Of the schedule.
    for wrong in ("--param_group={}", "--adapter.encoder.r=3"):
        with pytest.raises(SystemExit):
            cli.main(namespace["train"], [*given, wrong])


# --- optimizers of other kinds -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        partial(SGD, lr=0.1, momentum=0.9), partial(RMSprop, lr=0.01), partial(Adam, lr=0.01),
        partial(torch.optim.Adadelta, lr=1.0), partial(torch.optim.NAdam, lr=0.01),
        partial(torch.optim.Adafactor, lr=0.01), partial(torch.optim.Rprop, lr=0.01),
    ],
)  # fmt: skip
def test_every_optimizer_takes_them(kind: Any) -> None:
    brain = fit(make({"encoder.*": {"lr": 1e-4, "freeze_until": 2}, "*": {"lr": 0.003}}, kind))
    assert {round(rate, 6) for rate in settings(brain, "lr").values()} == {1e-4, 0.003}


def test_names_that_torch_keeps_in_groups_stay_beside_their_parameters() -> None:
    class Named(Tuner):
        def init_optimizers(self) -> None:
            self.optimizer = Adam(self.modules.named_parameters(), lr=0.1)

    brain = fit(make({"*.bias": {"lr": 0.2}}, kind=Named), 1)
    names = {p: name for name, p in brain.modules.named_parameters()}
    for group in brain.optimizer.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]


def test_an_optimizer_that_wraps_another_has_groups_too() -> None:
    def wrapped(params: Any) -> Optimizer:
        return Wrapper(AdamW(params, lr=0.1))

    brain = fit(make({"*.bias": {"lr": 0.2}}, wrapped), 2)
    assert {n for n, rate in settings(brain, "lr").items() if rate == 0.2} == {
        n for n, _ in brain.modules.named_parameters() if n.endswith(".bias")
    }
    assert brain.optimizer.inner.param_groups is brain.optimizer.param_groups
    with pytest.raises(ValueError, match="lr_factor, and Wrapper has no step hooks"):
        fit(make({"*.bias": {"lr_factor": 0.5}}, wrapped), 2)


def test_whole_numbers_are_rates_as_others() -> None:
    """1 and 1.0 are one rate, and a tensor that a schedule fills is read before."""
    schedule = partial(schedules.Noam, warmup_steps=3)

    def ones(params: Any) -> Optimizer:
        first, *others = params
        return SGD([{"params": [first], "lr": 1}, {"params": others, "lr": torch.tensor(1.0)}])

    brain = fit(make({"*.bias": {"lr": 1.0}}, ones, hparams={"schedule": schedule}), 1)
    assert {float(rate) for rate in settings(brain, "initial_lr").values()} == {1.0}


def test_an_optimizer_that_has_a_schedule_already_is_refused() -> None:
    class Scheduled(Tuner):
        def init_optimizers(self) -> None:
            super().init_optimizers()
            self.own = lr_scheduler.StepLR(self.optimizer, 1)

    with pytest.raises(ValueError, match="cannot divide the optimizer 'main', which has a sched"):
        fit(make({"*.bias": {"lr": 0.2}}, kind=Scheduled))
