"""Adapters by peft: what trains, what checkpoints hold, and what comes back."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer
from tests.processes import TwoRanks
from tests.trainer import two_processes
from tests.trainer.small import Players, Regressor, batches, ema_of, everything, make, same
from trainer import Brain, Checkpointer, Stage
from trainer.adapters import apply_adapters, merge_adapters, plain_name
from trainer.checkpoint import storage
from trainer.checkpoint.frozen import BASE, OtherBase, digests

peft = pytest.importorskip("peft")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}


class Speller(Brain):
    """An encoder with a batch norm, and a head."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.head(self.modules.encoder(batch["x"]))

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions.float() - batch["y"]).square().mean()

    def on_stage_end(self, stage: Stage, loss: Any, epoch: int | None = None) -> Any:
        return {"error": loss} if stage is not Stage.TRAIN else None


def encoder(seed: int = 0, width: int = 64) -> nn.Module:
    """4 → width → width → 6 with running statistics, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 6),
    )  # fmt: skip


def speller(
    folder: Path | None = None, seed: int = 0, hparams: dict[str, Any] | None = None, **options: Any
) -> Speller:
    modules = {"encoder": encoder(seed), "head": nn.Linear(6, 2)}
    hparams = {"adapters": {"encoder": {**LORA, "target_modules": ["0", "2"]}}} | (hparams or {})
    given = {"device": "cpu", "progressbar": False, "save": "trainable", **options}
    kept = None if folder is None else Checkpointer(folder, keep_last=10)
    opt_class = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Speller(modules, opt_class, hparams, given, kept)


def weights(brain: Brain) -> dict[str, Any]:
    return copy.deepcopy(brain.modules.state_dict())


def wav2vec2(size: str = "small") -> Any:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "conv_dim": (32, 32), "conv_stride": (5, 4),
        "conv_kernel": (10, 4), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**(small if size == "small" else {}))
    return transformers.Wav2Vec2Model(config)


def test_what_an_adapter_freezes_does_not_move_and_the_rest_trains() -> None:
    brain = speller()
    before = weights(brain)
    brain.fit([1, 2], batches(4))
    after = brain.modules.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    lora = {name for name in before if "lora_" in name}
    statistics = {name for name in before if "running" in name or "tracked" in name}
    assert len(lora) == 4
    assert moved == lora | statistics | {"head.weight", "head.bias"}
    own = brain.updates["main"].all_params
    assert {id(p) for p in own} == {id(p) for p in brain.modules.parameters() if p.requires_grad}


def test_the_module_keeps_its_class_and_its_methods() -> None:
    model = wav2vec2()
    kind = type(model)
    modules = nn.ModuleDict({"encoder": model})
    apply_adapters(modules, {"encoder": {"r": 2, "target_modules": ["q_proj", "v_proj"]}})
    assert type(modules["encoder"]) is kind
    assert modules["encoder"]._get_feat_extract_output_lengths(400) == 19
    names = [name for name, p in modules.named_parameters() if p.requires_grad]
    assert len(names) == 3 * 2 * 2
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("more", "trained"),
    [
        ({"bias": "all"}, lambda n: n.endswith(".bias")),
        ({"bias": "lora_only"}, lambda n: n.endswith("base_layer.bias")),
        ({"modules_to_save": ["4"]}, lambda n: "modules_to_save" in n),
        ({"use_dora": True}, lambda n: "magnitude" in n),
    ],
)
def test_biases_and_modules_to_save_train_and_come_back(
    more: dict[str, Any], trained: Callable[[str], bool], tmp_path: Path
) -> None:
    adapters = {"encoder": {**LORA, "target_modules": ["2"], **more}}
    brain = speller(tmp_path, hparams={"adapters": adapters})
    found = [n for n, p in brain.modules.encoder.named_parameters() if p.requires_grad]
    assert any(map(trained, found))
    assert all(trained(n) or "lora_" in n for n in found)
    brain.fit([1], batches(4), batches(2))
    again = speller(tmp_path, hparams={"adapters": adapters})
    again.fit([1], batches(4), batches(2))
    assert same(everything(brain), everything(again))


def test_a_part_of_a_module_is_adapted_and_the_rest_of_it_trains() -> None:
    modules = nn.ModuleDict({"model": nn.Sequential(encoder(), nn.Linear(6, 2))})
    apply_adapters(modules, {"model.0": LORA})
    names = [n for n, p in modules.named_parameters() if p.requires_grad]
    assert [n for n in names if "lora_" not in n] == ["model.1.weight", "model.1.bias"]


def test_the_start_says_how_many_of_how_many_train(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer")
    brain = speller()
    brain.fit([1], batches(2))
    count = 2 * (4 + 64) + 2 * (64 + 64)
    base = sum(p.numel() for p in encoder().parameters())
    total = base + count + 14
    wanted = (
        f"trainable: {count + 14:,} of {total:,} parameters ({(count + 14) / total:.2%}".replace(
            "%", " %"
        )
        + f"): encoder {count:,} of {base + count:,}, head 14 of 14"
    )
    assert [r.message for r in caplog.records if r.message.startswith("trainable")] == [wanted]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("window", [1, 3])
def test_a_run_resumes_exactly_at_every_batch(
    ema: float | None, window: int, tmp_path: Path
) -> None:
    options = {
        "ema_decay": ema, "grad_accumulation_factor": window, "checkpoint_every_steps": 1,
    }  # fmt: skip

    class Saving(Speller):
        def on_fit_batch_end(self, *_: Any) -> None:
            assert self.checkpointer is not None
            self.checkpointer.save_checkpoint(name=f"at-{self.epoch}-{self.step}")

    def made(folder: Path) -> Speller:
        brain = speller(folder, **options)
        brain.__class__ = Saving
        return brain

    whole = made(tmp_path / "whole")
    whole.fit([1, 2], batches(4), batches(2))
    points = sorted((tmp_path / "whole").glob("at-*"))
    assert len(points) == 8
    for point in points:
        folder = tmp_path / f"from-{point.name}"
        shutil.copytree(point, folder / point.name)
        again = made(folder)
        again.fit([1, 2], batches(4), batches(2))
        assert same(everything(whole), everything(again)), point.name
        for one, other in zip(
            whole.modules.named_parameters(), again.modules.named_parameters(), strict=True
        ):
            assert (one[0], one[1].requires_grad) == (other[0], other[1].requires_grad)


def test_a_resumed_run_in_which_others_train_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(epochs: int, frozen: bool) -> None:
        brain = speller(tmp_path, hparams={"adapters": None}, save="all")
        brain.modules.encoder.requires_grad_(not frozen)
        brain.fit(range(1, epochs + 1), batches(3), batches(2))

    fit(1, frozen=True)
    fit(2, frozen=True)
    said = "10 of 10 tensors of parameters train now, and 2 did when"
    assert not [each for each in caplog.messages if "train now" in each]
    fit(3, frozen=False)
    assert len([each for each in caplog.messages if said in each]) == 1


def test_checkpoints_hold_what_trains_and_what_changes_alone(tmp_path: Path) -> None:
    brain = speller(tmp_path, ema_decay=0.9)
    brain.fit([1], batches(4), batches(2))
    saved = brain.checkpointer.find()[0]
    state = storage.load_state(saved, "brain")
    names = set(brain.modules.state_dict())
    frozen = {n for n, p in brain.modules.named_parameters() if not p.requires_grad}
    assert len(frozen) == 8
    assert set(state["modules"]) - {BASE} == names - frozen
    assert set(state["ema"]["average"]) - {BASE} == names - frozen
    assert set(state["modules"][BASE]["tensors"]) == frozen
    assert saved.base["name"] == "Sequential, Linear"
    assert len(saved.base["sha256"]) == 64
    with torch.no_grad():
        assert not any(p.requires_grad for n, p in brain.modules.named_parameters() if n in frozen)


def test_a_part_that_trains_later_or_is_changed_is_saved_from_then_on(tmp_path: Path) -> None:
    class Unfreezing(Speller):
        def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
            if stage is Stage.TRAIN and epoch is not None:
                self.modules.head.requires_grad_(epoch == 2)
            if stage is Stage.TRAIN and epoch == 3:
                with torch.no_grad():
                    self.modules.encoder[1].weight.data += 1.0

    def made(epochs: int) -> Speller:
        brain = speller(tmp_path, hparams={"adapters": None})
        brain.__class__ = Unfreezing
        brain.modules.head.requires_grad_(False)
        brain.modules.encoder[1].requires_grad_(False)
        brain.fit(range(1, epochs + 1), batches(3), batches(2))
        return brain

    for epoch, missing in ((1, 4), (2, 2), (3, 1)):
        brain = made(epoch)
        saved = storage.load_state(brain.checkpointer.find()[0], "brain")["modules"]
        assert len(saved[BASE]["tensors"]) == missing
    again = made(3)
    assert same(weights(brain), weights(again))
    test = speller(tmp_path, hparams={"adapters": None}, average_checkpoints=3)
    for part in (test.modules.head, test.modules.encoder[1]):
        part.requires_grad_(False)
    test.evaluate(batches(2))  # Checkpoints with and without the frozen parts have a mean.


@pytest.mark.parametrize("use", ["resume", "best", "average", "ema"])
def test_another_base_is_refused_in_a_sentence_that_names_both(use: str, tmp_path: Path) -> None:
    options = {"ema_decay": 0.9} if use == "ema" else {}
    brain = speller(tmp_path, **options)
    brain.fit([1, 2], batches(3), batches(2))
    other = speller(tmp_path, seed=1, **options)
    if use == "average":
        other = speller(tmp_path, seed=1, average_checkpoints=2)
    before = weights(other)
    key = "error" if use == "best" else None
    run = partial(other.evaluate, batches(2), min_key=key)
    if use == "resume":
        run = partial(other.fit, [1, 2, 3], batches(3), batches(2))
    with pytest.raises(
        ValueError, match="'Sequential, Linear' .* 'Sequential, Linear' .* 6 of 8"
    ) as info:
        run()
    assert brain.checkpointer.find()[0].base["sha256"][:12] in str(info.value)
    assert same(before, weights(other))


def test_one_changed_number_of_the_base_is_named(tmp_path: Path) -> None:
    speller(tmp_path).fit([1], batches(3), batches(2))
    other = speller(tmp_path)
    with torch.no_grad():
        other.modules.encoder[2].base_layer.weight[3, 3] += 1e-6
    with pytest.raises(ValueError, match=r"1 of 8 tensors .* encoder\.2\.base_layer\.weight"):
        other.fit([1, 2], batches(3))


def test_a_manifest_that_names_another_base_is_refused(tmp_path: Path) -> None:
    speller(tmp_path).fit([1], batches(3), batches(2))
    saved = Checkpointer(tmp_path).find()[0]
    content = storage.manifest_content(saved)
    content["base"] = {**content["base"], "sha256": "0" * 64}
    (saved.path / "manifest.json").write_bytes(storage.encode_manifest(content))
    with (
        pytest.warns(UserWarning, match="another base than its manifest"),
        pytest.raises(ValueError, match="another base than its manifest"),
    ):
        speller(tmp_path).fit([1, 2], batches(3))


@pytest.mark.parametrize("adapted", [True, False])
def test_a_run_may_change_what_it_saves(adapted: bool, tmp_path: Path) -> None:
    hparams = {} if adapted else {"adapters": None}
    runs = {}
    for name, saves in {"one": ("all", "trainable"), "two": ("trainable", "all")}.items():
        for epochs, save in enumerate(saves, 1):
            brain = speller(tmp_path / name, hparams=hparams, save=save)
            brain.modules.encoder[1].requires_grad_(False)
            brain.fit(range(1, epochs + 1), batches(3), batches(2))
        runs[name] = everything(brain)
    assert same(runs["one"], runs["two"])


def test_evaluation_by_any_rule_has_the_weights_that_were_saved(tmp_path: Path) -> None:
    wanted = {}
    for save in ("all", "trainable"):
        brain = speller(tmp_path / save, save=save, ema_decay=0.8)
        brain.fit([1, 2, 3], batches(3), batches(2))
        for options in ({}, {"average_checkpoints": 2}, {"ema_decay": None}):
            for key in (None, "error"):
                again = speller(tmp_path / save, save=save, **{"ema_decay": 0.8, **options})
                loss = again.evaluate(batches(2), min_key=key)
                assert wanted.setdefault((str(options), key), loss) == loss
    assert len(wanted) == 6


def test_a_checkpoint_of_a_small_encoder_is_a_small_part_of_it(tmp_path: Path) -> None:
    part, whole, tensors, trained = _sizes("small", tmp_path)
    # Weights and two moments of each, and names, digests and the like of all tensors.
    assert part < 3 * trained + 1000 * tensors < whole


@pytest.mark.long
def test_a_checkpoint_of_a_base_encoder_is_under_two_percent(tmp_path: Path) -> None:
    part, whole, _, _ = _sizes("base", tmp_path)
    print(f"{part:,} of {whole:,} bytes, {part / whole:.2%}")
    assert part < 0.02 * whole


class Listener(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.encoder(batch["wav"]).last_hidden_state

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return predictions.square().mean()


def _sizes(size: str, folder: Path) -> tuple[int, int, int, int]:
    """Return bytes of a checkpoint and of the model, its tensors, and bytes of what trains."""
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    model = wav2vec2(size)
    whole = sum(p.nbytes for p in model.parameters())
    options = {"device": "cpu", "progressbar": False, "save": "trainable"}
    brain = Listener(
        {"encoder": model}, partial(torch.optim.AdamW, lr=1e-3), {"adapters": {"encoder": config}},
        options, Checkpointer(folder),
    )  # fmt: skip
    torch.manual_seed(1)
    brain.fit([1], [{"wav": torch.randn(2, 8000)}])
    state = storage.load_state(brain.checkpointer.find()[0], "brain")
    moments = state["optimizers.main"]["optimizer"]["state"]
    assert len(moments) == sum(p.requires_grad for p in model.parameters())
    files = brain.checkpointer.find()[0].path.iterdir()
    params = list(model.parameters())
    trained = sum(p.nbytes for p in params if p.requires_grad)
    return sum(each.stat().st_size for each in files), whole, len(params), trained


# Layers of torch


def conformer() -> nn.Module:
    torchaudio = pytest.importorskip("torchaudio")
    torch.manual_seed(0)
    return torchaudio.models.Conformer(8, 2, 16, 2, 3)


@pytest.mark.parametrize(
    "targets",
    [["self_attn"], ["self_attn", "ffn1.sequential.1", "ffn2.sequential.4"], "all-linear"],
)
def test_a_conformer_keeps_its_base_to_the_bit_and_merges(targets: Any) -> None:
    model = conformer()
    lengths, x = torch.tensor([9, 7]), torch.randn(2, 9, 8)
    modules = nn.ModuleDict({"encoder": model})
    plain = model.eval()(x, lengths)[0]
    apply_adapters(modules, {"encoder": {"r": 2, "target_modules": targets}})
    torch.testing.assert_close(model(x, lengths)[0], plain)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    before = digests(frozen)
    _randomise(modules)
    adapted = model(x, lengths)[0]
    assert not torch.allclose(adapted, plain, atol=1e-3)
    for _ in range(3):
        model.train()(x, lengths)[0].sum().backward()
    found = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert digests(found) == before
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    _merges(modules, lambda: model.eval()(x, lengths)[0])


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], ["self_attn", "linear2"]])
def test_adapters_count_in_the_evaluation_of_a_transformer(targets: list[str]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    modules = nn.ModuleDict({"encoder": model})
    apply_adapters(modules, {"encoder": {"r": 2, "target_modules": targets}})
    _randomise(modules)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    training = model.train()(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated[0], training[0])
    torch.testing.assert_close(evaluated[1, :3], training[1, :3])


def _randomise(modules: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in modules.named_parameters():
            if p.requires_grad and ("lora_" in name or "hada" in name or "lokr" in name):
                p.copy_(torch.randn_like(p) * 0.3)


def _merges(modules: nn.Module, output: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        adapted = output()
        merge_adapters(modules)
        torch.testing.assert_close(output(), adapted, atol=1e-5, rtol=1e-5)
    assert not [name for name in modules.state_dict() if "lora_" in name or "base_layer" in name]


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "IA3Config"])
def test_other_kinds_of_peft_train_and_merge(kind: str) -> None:
    more = {"feedforward_modules": ["2"]} if kind == "IA3Config" else {"r": 2}
    config = getattr(peft, kind)(target_modules=["0", "2"], **more)
    brain = speller(hparams={"adapters": {"encoder": config}})
    before = weights(brain)
    brain.fit([1], batches(3))
    moved = [n for n, v in brain.modules.state_dict().items() if not torch.equal(v, before[n])]
    assert any(n.startswith("encoder.0.") for n in moved)
    assert not any("base_layer" in n for n in moved)
    _randomise(brain.modules)
    brain.modules.eval()
    _merges(brain.modules, lambda: brain.modules.encoder(batches(1)[0]["x"]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_layer_whose_weight_is_computed_merges(norm: str, frozen: bool) -> None:
    torch.manual_seed(0)
    normed = getattr(nn.utils.parametrizations, norm)(nn.Conv1d(4, 6, 3))
    normed.requires_grad_(not frozen)
    modules = nn.ModuleDict({"net": nn.Sequential(normed, nn.Tanh(), nn.Conv1d(6, 2, 1))})
    modules.eval()
    before = copy.deepcopy(modules.state_dict())
    names, x = set(before), torch.randn(2, 4, 9)
    plain = modules.net(x)
    apply_adapters(modules, {"net": {"r": 2, "target_modules": ["0"]}})
    torch.testing.assert_close(modules.net(x), plain)
    kept = {plain_name(n): v for n, v in modules.state_dict().items() if "lora_" not in n}
    assert same(kept, dict(before))
    assert [n for n, p in modules.named_parameters() if p.requires_grad and "lora_" not in n] == []
    _randomise(modules)
    _merges(modules, lambda: modules.net(x))
    assert (set(modules.state_dict()) == names) is (norm == "weight_norm")


@pytest.mark.parametrize("window", [1, 2])
def test_players_have_adapters_and_resume(window: int, tmp_path: Path) -> None:
    def made(folder: str) -> Any:
        adapters = {"generator": LORA, "discriminator": {**LORA, "target_modules": ["2"]}}
        return make(
            Players, hparams={"adapters": adapters}, checkpointer=Checkpointer(tmp_path / folder),
            save="trainable", ema_decay=0.9, grad_accumulation_factor=window,
        )  # fmt: skip

    whole, part = made("whole"), made("part")
    whole.fit([1, 2], batches(3), batches(2))
    part.fit([1], batches(3), batches(2))
    again = made("part")
    again.fit([1, 2], batches(3), batches(2))
    assert same(everything(whole), everything(again))
    assert not [n for n in ema_of(again).state_dict()["average"] if "base_layer" in n]
    assert [len(u.all_params) for u in again.updates.values()] == [2, 2]


# Export


def test_an_export_gives_what_the_adapted_model_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layer_norm"]}
    hparams = {"adapters": {"encoder": config}}
    modules = {"encoder": wav2vec2(), "head": nn.Linear(48, 2)}
    brain = Listener(modules, None, hparams, {"device": "cpu"})
    _randomise(brain.modules)
    with torch.no_grad():
        for name, p in brain.modules.named_parameters():
            if "modules_to_save" in name:
                p += 0.1
    brain.modules.eval()
    x = torch.randn(2, 2000)
    with torch.no_grad():
        wanted = brain.modules.encoder(x).last_hidden_state
        before = weights(brain)
        folder = trainer.export(brain, tmp_path / "out")
        assert same(before, weights(brain))
        loaded = transformers.AutoModel.from_pretrained(folder / "encoder").eval()
        torch.testing.assert_close(loaded(x).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)
        plain = Listener(
            {"encoder": wav2vec2(), "head": nn.Linear(48, 2)}, None, {},
            {"device": "cpu", "init_from": str(folder)},
        )  # fmt: skip
        plain.evaluate([{"wav": x}])
        found = plain.modules.eval().encoder(x).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert set(load_file(folder / "model.safetensors")) == set(plain.modules.state_dict())
    with pytest.raises(ValueError, match="not an empty folder"):
        trainer.export(brain, folder)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


# Two processes


def fit_on_two_ranks(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    def made(name: str) -> Any:
        adapters = {"net": {"r": 2, "target_modules": ["0"]}}
        return two_processes.make(
            dtype=torch.float32, folder=Path(folder, name), hparams={"adapters": adapters},
            save="trainable", checkpoint_every_steps=1, **options,
        )  # fmt: skip

    data = two_processes.batches(torch.float32)
    whole, part = made("whole"), made("part")
    whole.fit(range(1, 3), data)
    part.fit(range(1, 2), data)
    again = made("part")
    again.fit(range(1, 3), data)
    again.evaluate(data[:2])
    saved = again.checkpointer.find()[0]
    return {
        "weights": two_processes.weights(again),
        "same": same(everything(whole), everything(again)),
        "base": saved.base,
        "saved": len(storage.load_state(saved, "brain")["modules"]),
        "trains": [n for n, p in again.modules.named_parameters() if p.requires_grad],
    }


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "grad_accumulation_factor": 3}])
def test_two_ranks_resume_exactly(
    two_ranks: TwoRanks, tmp_path: Path, options: dict[str, Any]
) -> None:
    one, other = two_ranks(fit_on_two_ranks, tmp_path, options)
    assert one["same"]
    assert other["same"]
    assert torch.equal(one["weights"], other["weights"])
    assert one["base"] == other["base"]
    assert one["saved"] == 2 + 4 + 1  # Adapters, the other modules, and what was left out.
    assert len(one["trains"]) == 6


# Run folders

YAML = """
seed: 3
encoder: !new:torch.nn.Sequential
  - !new:torch.nn.Linear [4, 16]
  - !new:torch.nn.Linear [16, 6]
head: !new:torch.nn.Linear [6, 2]
modules: {encoder: !ref <encoder>, head: !ref <head>}
adapters:
  encoder: ADAPTER
save: trainable
"""


@pytest.mark.parametrize(
    "adapter",
    ["{r: 2, target_modules: ['0']}", "!new:peft.LoraConfig {r: 2, target_modules: ['0']}"],
)
def test_a_run_folder_gives_the_model_back(adapter: str, tmp_path: Path) -> None:
    yaml = tmp_path / "task.yaml"
    yaml.write_text(YAML.replace("ADAPTER", adapter))
    kept: list[Any] = []

    def train(run: trainer.Run) -> None:
        opt_class = partial(torch.optim.Adam, lr=0.01)
        brain = Speller(
            run.hparams["modules"], opt_class, run.hparams, run.options, run.checkpointer
        )
        brain.fit([1], batches(3), batches(2))
        kept.append(brain)

    folder = tmp_path / "run"
    more = ["--output_folder", str(folder), "--device", "cpu", "--progressbar", "false"]
    trainer.main(train, [str(yaml), *more])
    model = trainer.load(folder, "cpu", brain=Speller)
    assert same(weights(model), weights(kept[0]))
    assert [n for n, p in model.modules.named_parameters() if p.requires_grad] == [
        n for n, p in kept[0].modules.named_parameters() if p.requires_grad
    ]
    with pytest.raises(OtherBase, match="give the base that the run was trained on"):
        trainer.load(folder, "cpu", brain=Speller, overrides={"seed": 4})


@pytest.mark.parametrize(
    "adapter",
    [
        "!new:peft.LoraConfig {r: 2, target_modules: ['0'], megatron_core: os}",
        "{r: 2, target_modules: ['0'], megatron_core: os}",
        "!apply:peft.get_peft_model [1]",
        "!new:peft.PeftModel [1]",
        "!new:peft.PrefixTuningConfig {}",
    ],
)
def test_a_run_folder_builds_adapters_of_layers_and_imports_nothing(
    adapter: str, tmp_path: Path
) -> None:
    (tmp_path / "hyperparams.yaml").write_text(YAML.replace("ADAPTER", adapter))
    with pytest.raises(ValueError, match="must be|not allowed"):
        trainer.load(tmp_path, "cpu", brain=Speller)


@pytest.mark.parametrize("claim", [10**18, -1, "all"])
def test_a_run_folder_says_what_it_wants_of_a_base(claim: Any, tmp_path: Path) -> None:
    brain = speller(tmp_path / "checkpoints")
    brain.fit([1], batches(3), batches(2))
    yaml = YAML.replace("ADAPTER", "{r: 2, target_modules: ['0']}")
    (tmp_path / "hyperparams.yaml").write_text(yaml)
    saved = brain.checkpointer.find()[0]
    content = storage.manifest_content(saved)
    content["base"] = {**content["base"], "bytes": claim}
    (saved.path / "manifest.json").write_bytes(storage.encode_manifest(content))
    del brain
    with pytest.raises(ValueError, match="tensors differ"):  # Of another model.
        trainer.load(tmp_path, "cpu", brain=Speller)


# Errors


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    [
        ([LORA], "adapters is a list; allowed: a mapping"),
        ({"encodr": LORA}, "names 'encodr', which is not .* encoder, head; did you mean 'encoder'"),
        ({"encoder": {"alpha": 3}}, "'alpha' is no argument of peft.LoraConfig"),
        ({"encoder": {**LORA, "r": 0}}, "adapters.encoder: .*positive"),
        ({"encoder": {**LORA, "r": "8"}}, "adapters.encoder: "),
        ({"encoder": {"r": 2}}, "adapters.encoder: .*target_modules"),
        ({"encoder": {**LORA, "target_modules": ["q_proj"]}}, "'q_proj', which matches no layer"),
        ({"encoder": {**LORA, "target_modules": ["0", "9"]}}, "'9', which .* end in 0, 1, 2, 4"),
        ({"encoder": {**LORA, "target_modules": "x.*"}}, "'x.*', which matches no layer"),
        ({"encoder": {**LORA, "target_modules": "("}}, "is no regular expression"),
        ({"encoder": {**LORA, "modules_to_save": ["hed"]}}, "modules_to_save has 'hed'"),
        ({"encoder": {**LORA, "target_modules": ["1"]}}, "adapters.encoder: .*not supported"),
        ({"encoder": {**LORA, "megatron_core": "os"}}, "megatron_core must be 'megatron.core'"),
        ({"encoder": 3}, "adapters.encoder is a int; allowed: arguments of peft.LoraConfig"),
        ({"head": LORA}, "adapters.head: .*it is one layer"),
    ],
)
def test_bad_adapters_are_a_sentence_before_training(adapters: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as info:
        speller(hparams={"adapters": adapters})
    assert "\n" not in str(info.value)


def test_prompts_are_no_adapters_of_layers() -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="is a PREFIX_TUNING; allowed: .* LORA"):
        speller(hparams={"adapters": {"encoder": config}})


def test_the_projection_that_an_attention_does_not_call_is_refused() -> None:
    modules = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16)})
    with pytest.raises(ValueError, match="'self_attn.out_proj', .* no effect, .* 'self_attn'"):
        apply_adapters(modules, {"encoder": {"target_modules": ["out_proj"]}})


def test_modules_of_a_second_brain_keep_their_adapters() -> None:
    first = speller()
    kept = weights(first)
    hparams = {"adapters": first.hparams.adapters}
    second = Speller(dict(first.modules.items()), None, hparams, {"device": "cpu"})
    assert same(kept, weights(second))
    hparams = {"adapters": {"encoder": {**LORA, "r": 3}}}
    with pytest.raises(ValueError, match="has adapters already"):
        Speller(dict(first.modules.items()), None, hparams, {"device": "cpu"})


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("encoder.q_proj.base_layer.weight", "encoder.q_proj.weight"),
        ("encoder.q_proj.lora_A.default.weight", "encoder.q_proj.lora_A.weight"),
        ("base_model.model.encoder.q.weight", "encoder.q.weight"),
        ("encoder.head.modules_to_save.default.bias", "encoder.head.bias"),
        ("encoder.head.original_module.bias", "encoder.head.bias"),
    ],
)
def test_plain_names_are_those_without_adapters(name: str, clean: str) -> None:
    assert plain_name(name) == clean


def test_an_optimizer_of_the_recipe_has_nothing_that_is_frozen() -> None:
    class Own(Regressor):
        def init_optimizers(self) -> None:
            self.optimizer = torch.optim.Adagrad(self.modules.net.parameters(), lr=0.1)

    brain = make(Own, hparams={"adapters": {"net": LORA}})
    brain.fit([1], batches(3))
    assert len(brain.optimizer.param_groups[0]["params"]) == 2
    brain.optimizer.state_dict()
