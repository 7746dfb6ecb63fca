"""`init_from`: weights that a new run starts from, what is taken of them, and what is refused."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer
from tests.trainer.old_checkpoint import network
from tests.trainer.small import Regressor, batches, ema_of, make, net, same
from trainer import Checkpointer
from trainer.checkpoint import storage
from trainer.inference.initialise import initialise
from trainer.options import RunOptions

WINDOW = Path(__file__).parent / "data" / "checkpoint-v1" / "window"
YAML = """
net: !new:torch.nn.Sequential
  - !new:torch.nn.Linear [4, 6]
  - !new:torch.nn.Tanh
  - !new:torch.nn.Linear [6, 2]
modules: {net: !ref <net>}
"""


def started(source: Path | str, names: Any = None, seed: int = 5, **more: Any) -> Any:
    """Return a Brain that has read its first weights and trained nothing."""
    brain = make(init_from=str(source), init_map=names, **more)
    with torch.no_grad():
        for p in brain.modules.parameters():
            p.add_(float(seed))
    brain.evaluate(batches(1))
    return brain


def weights(brain: Any) -> dict[str, Tensor]:
    return copy.deepcopy(brain.modules.state_dict())


def run_of(folder: Path, epochs: int = 2, **options: Any) -> Any:
    """Train by the command line; return the Brain."""
    yaml = folder.parent / f"{folder.name}.yaml"
    yaml.write_text(YAML)
    kept: list[Any] = []

    def train(run: trainer.Run) -> None:
        optimizer = partial(torch.optim.Adam, lr=0.05)
        checkpointer = Checkpointer(run.folder / "checkpoints", keep_last=5)
        brain = Regressor(run.hparams["modules"], optimizer, run.hparams, run.options, checkpointer)
        brain.fit(range(1, epochs + 1), batches(3), batches(2))
        kept.append(brain)

    more = {"device": "cpu", "progressbar": "false", "output_folder": folder, **options}
    trainer.main(train, [str(yaml), *(str(x) for k, v in more.items() for x in (f"--{k}", v))])
    return kept[0]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    torch.save({f"net.{name}": value for name, value in net(9).state_dict().items()}, path)
    return path


def expected() -> dict[str, Tensor]:
    return {f"net.{name}": value for name, value in net(9).state_dict().items()}


@pytest.mark.parametrize("kind", ["plain", "holder", "nested", "wrapped", "compiled"])
def test_a_state_dict_is_found_where_programs_put_it(kind: str, tmp_path: Path) -> None:
    plain = expected()
    content: Any = {
        "plain": plain,
        "holder": {"epoch": 3, "state_dict": plain},
        "nested": {"model": {"state_dict": plain, "width": 4}},
        "wrapped": {f"module.{name}": value for name, value in plain.items()},
        "compiled": {"model": {f"_orig_mod.{name}": value for name, value in plain.items()}},
    }[kind]
    torch.save(content, tmp_path / "state.ckpt")
    assert same(weights(started(tmp_path / "state.ckpt")), plain)


def test_what_was_taken_what_is_new_and_what_was_left_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")
    content = expected()
    del content["net.2.bias"]
    torch.save({**content, "quantizer.x": torch.zeros(2)}, tmp_path / "state.pt")
    brain = started(tmp_path / "state.pt")
    assert caplog.messages[0].endswith(
        "state.pt: 3 tensors taken, 1 new (net.2.bias), 1 left (quantizer.x)"
    )
    assert torch.equal(brain.modules.net[2].bias, net(0)[2].bias + 5)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ({"net.*": "a.*"}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"net.2.*": None, "net.*": "a.*"}, {"0.weight", "0.bias"}),
        ({"net.*.weight": "a.*.weight"}, {"0.weight", "2.weight"}),
        ({"net.0.weight": "a.0.weight"}, {"0.weight"}),
        ({"*.*.bias": "*a.*.bias"}, set()),
        ({"net.0.*": "a.0.*", "net.*": "other.*"}, {"0.weight", "0.bias", "2.weight"}),
    ],
)
def test_names_are_mapped_by_patterns(names: Any, taken: set[str], tmp_path: Path) -> None:
    source = {f"a.{name}": value for name, value in net(9).state_dict().items()}
    source["other.2.weight"] = net(9)[2].weight.detach()
    torch.save(source, tmp_path / "state.pt")
    if not taken:
        with pytest.raises(ValueError, match=r"init_map maps '\*\.\*\.bias'.* has no such name"):
            started(tmp_path / "state.pt", names)
        return
    found, own = weights(started(tmp_path / "state.pt", names)), weights(started_without())
    for name, value in net(9).state_dict().items():
        assert torch.equal(found[f"net.{name}"], value if name in taken else own[f"net.{name}"])


def started_without() -> Any:
    brain = make()
    with torch.no_grad():
        for p in brain.modules.parameters():
            p.add_(5.0)
    return brain


def test_types_are_those_of_the_model(tmp_path: Path) -> None:
    torch.save({n: v.double() for n, v in expected().items()}, tmp_path / "state.pt")
    assert same(weights(started(tmp_path / "state.pt")), expected())


# Runs


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.7}, {"average_checkpoints": 2}])
def test_a_run_gives_the_weights_that_it_is_tested_with(
    options: dict[str, Any], tmp_path: Path
) -> None:
    brain = run_of(tmp_path / "run", **options)
    with brain.best_weights():
        wanted = weights(brain)
    assert same(weights(started(tmp_path / "run")), wanted)
    if options:
        assert not same(weights(brain), wanted)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved)
    assert same(weights(started(moved)), wanted)


def test_a_run_of_the_first_format_is_read(tmp_path: Path) -> None:
    shutil.copytree(WINDOW, tmp_path / "run" / "checkpoints" / "window")
    for text, part in (("ema_decay: 0.9", "ema"), ("seed: 1", "modules")):
        (tmp_path / "run" / "hyperparams.yaml").write_text(text)
        modules = nn.ModuleDict({
            "generator": network(3, 2, 1), "discriminator": network(2, 1, 2)
        })  # fmt: skip
        initialise(modules, str(tmp_path / "run"))
        saved = storage.load_state(
            Checkpointer(tmp_path / "run" / "checkpoints").find()[0], "brain"
        )
        wanted = saved["modules"] if part == "modules" else saved["ema"]["average"]
        assert same(dict(modules.state_dict()), dict(wanted))


def test_a_resumed_run_reads_nothing_and_says_so(
    tmp_path: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")

    def fit(epochs: int, folder: Path) -> Any:
        brain = make(init_from=str(state), checkpointer=Checkpointer(folder), ema_decay=0.9)
        brain.fit(range(1, epochs + 1), batches(3), batches(2))
        return brain

    whole = fit(2, tmp_path / "whole")
    fit(1, tmp_path / "part")
    state.unlink()
    caplog.clear()
    resumed = fit(2, tmp_path / "part")
    said = "init_from is not read: the run goes on from its checkpoint"
    assert caplog.messages.count(said) == 1
    assert same(weights(whole), weights(resumed))
    assert same(ema_of(whole).state_dict(), ema_of(resumed).state_dict())


def test_a_fresh_run_trains_from_the_weights(state: Path) -> None:
    brain = make(init_from=str(state), ema_decay=0.9, optimizer=partial(torch.optim.SGD, lr=0.0))
    brain.fit([1], batches(2))
    assert same(weights(brain), expected())
    assert same(ema_of(brain).state_dict()["average"], expected())


def test_a_base_that_is_not_saved_is_read_again(tmp_path: Path, state: Path) -> None:
    def fit(epochs: int, source: Path) -> Any:
        brain = make(
            init_from=str(source), save="trainable", checkpointer=Checkpointer(tmp_path / "c")
        )
        brain.modules.net[0].requires_grad_(False)
        brain.fit(range(1, epochs + 1), batches(3), batches(2))
        return brain

    fit(1, state)
    saved = Checkpointer(tmp_path / "c").find()[0]
    assert saved.base is not None
    assert saved.base["name"] == str(state)
    brain = fit(2, state)
    assert torch.equal(brain.modules.net[0].weight, net(9)[0].weight)
    assert not torch.equal(brain.modules.net[2].weight, net(9)[2].weight)
    torch.save({n: v + 1 for n, v in expected().items()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"state\.pt' .*other\.pt' .* 2 of 2 tensors differ"):
        fit(3, tmp_path / "other.pt")


def test_the_base_of_a_loaded_run_is_named_by_the_user(tmp_path: Path, state: Path) -> None:
    yaml = tmp_path / "task.yaml"
    yaml.write_text(f"{YAML}\nsave: trainable\ninit_from: {state}\n")
    kept = []

    def train(run: trainer.Run) -> None:
        run.hparams["net"][0].requires_grad_(False)
        optimizer = partial(torch.optim.Adam, lr=0.05)
        brain = Regressor(
            run.hparams["modules"], optimizer, run.hparams, run.options, run.checkpointer
        )
        brain.fit([1], batches(3), batches(2))
        kept.append(brain)

    folder = tmp_path / "run"
    more = ["--output_folder", str(folder), "--device", "cpu", "--progressbar", "false"]
    trainer.main(train, [str(yaml), *more])
    with pytest.raises(ValueError, match="2 of 2 tensors differ"):
        trainer.load(folder, "cpu", brain=Regressor)
    model = trainer.load(folder, "cpu", brain=Regressor, overrides={"init_from": str(state)})
    assert same(weights(model), weights(kept[0]))


def test_init_from_is_a_key_of_the_training(tmp_path: Path, state: Path) -> None:
    yaml = tmp_path / "task.yaml"
    yaml.write_text(YAML)

    def train(run: trainer.Run) -> None:
        run.checkpointer.save_checkpoint()

    more = ["--output_folder", str(tmp_path / "run"), "--device", "cpu"]
    trainer.main(train, [str(yaml), *more])
    with pytest.raises(SystemExit):
        trainer.main(train, [str(yaml), *more, "--init_from", str(state)])


def test_the_options_are_given_on_a_command_line(tmp_path: Path) -> None:
    torch.save({f"a.{n}": v for n, v in net(9).state_dict().items()}, tmp_path / "state.pt")
    names = "{net.0.*: a.0.*, net.2.*: null}"
    options = {"init_from": tmp_path / "state.pt", "init_map": names}
    brain = run_of(tmp_path / "run", epochs=1, **options)
    assert brain.options.init_map == {"net.0.*": "a.0.*", "net.2.*": None}
    (tmp_path / "state.pt").unlink()
    run_of(tmp_path / "run", epochs=2, **options)  # It goes on.


# Errors


def test_shapes_that_differ_are_named_and_may_be_left_new(tmp_path: Path) -> None:
    content = {**expected(), "net.2.weight": torch.zeros(3, 6), "net.2.bias": torch.zeros(3)}
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"net\.2\.weight has shape \[3, 6\] there and \[2, 6\] "):
        started(tmp_path / "state.pt")
    brain = started(tmp_path / "state.pt", {"net.2.*": None})
    assert torch.equal(brain.modules.net[0].weight, net(9)[0].weight)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: (100 * w).to(torch.int8), "torch.int8 there, and torch.float32 here"),
        (lambda w: w > 0, "torch.bool there"),
        (lambda w: w.to(torch.complex64), "torch.complex64 there"),
        (lambda w: w.to(torch.float8_e4m3fn), "torch.float8_e4m3fn there"),
        (lambda w: w.to_sparse(), "of layout torch.sparse_coo there"),
        (lambda w: w.to("meta"), "without content there"),
    ],
)  # fmt: skip
def test_numbers_that_are_codes_or_have_no_content_are_refused(
    change: Any, sentence: str, tmp_path: Path
) -> None:
    weights_there = {f"net.{name}": w.detach() for name, w in net(9).state_dict().items()}
    weights_there["net.2.weight"] = change(weights_there["net.2.weight"])
    torch.save(weights_there, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=f"net.2.weight is .*{sentence}") as info:
        started(tmp_path / "state.pt")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"nett.*": "a.*"}, "'nett.*', which matches no name of this model; .*net.0.weight"),
        ({"net.*": "a"}, "maps 'net.*' to 'a'; allowed: null, or a name with as many"),
        ({"net.*": "a.*"}, "has no such name.*; it has net"),
        ({"net.*": None}, "none of its 4 names fits"),
        (["net"], "init_map must be a mapping of names to names or null"),
    ],
)
def test_maps_that_fit_nothing_are_refused(names: Any, sentence: str, state: Path) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".*'", r"\.\*'").replace("(", r"\(")):
        started(state, names)


def test_a_map_by_which_names_would_fit_is_suggested(tmp_path: Path) -> None:
    torch.save({f"a.b.{n}": v for n, v in net(9).state_dict().items()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"did you mean init_map: \{net\.\*: 'a\.b\.\*'\}"):
        started(tmp_path / "state.pt")
    torch.save(net(9).state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"did you mean init_map: \{net\.\*: '\*'\}"):
        started(tmp_path / "state.pt")
    assert same(weights(started(tmp_path / "state.pt", {"net.*": "*"})), expected())


class Evil:
    """Pickled, it makes a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["module", "evil", "pickle", "text", "empty", "zip"])
def test_a_file_of_anything_but_tensors_is_refused_and_runs_nothing(
    kind: str, tmp_path: Path
) -> None:
    path, mark = tmp_path / "state.pt", tmp_path / "mark"
    if kind == "module":
        torch.save(net(), path)
    elif kind == "evil":
        torch.save({"net.0.weight": Evil(mark)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Evil(mark)}))
    elif kind == "zip":
        torch.save({"a": 3}, path)
    else:
        path.write_bytes(b"hello" if kind == "text" else b"")
    with pytest.raises(ValueError, match="init_from .*state.pt: it (holds|cannot)") as info:
        started(path)
    assert "\n" not in str(info.value)
    assert not mark.exists()


def test_a_folder_with_weights_in_pickle_alone_is_refused(tmp_path: Path) -> None:
    torch.save(expected(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="has only pickled weights .pytorch_model.bin.*safetensors"
    ):
        started(tmp_path)


@pytest.mark.parametrize("source", ["/not/there", "./not.pt", "a/b/c", "no where"])
def test_a_source_that_is_nowhere_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="there is no file or folder of weights"):
        started(source)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder .* and has no weights"):
        started(tmp_path)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hyperparams.yaml").write_text(YAML)
    with pytest.raises(ValueError, match="the run has no sound checkpoint"):
        started(tmp_path)


def test_the_options_are_typed() -> None:
    assert RunOptions(init_map={"a.*": None, "b": "c"}).init_map == {"a.*": None, "b": "c"}
    with pytest.raises(ValueError, match="save must be one of all, trainable, not 'some'"):
        RunOptions(save="some")


# The layout of the hub


def test_safetensors_in_a_file_a_folder_and_shards(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(expected(), tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert same(weights(started(source)), expected())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(ValueError, match="it is no file of safetensors"):
        started(tmp_path)


@pytest.mark.parametrize("evil", ["", "../x.safetensors", "/etc/passwd", "y.bin", 3])
def test_shards_lie_beside_their_index(evil: Any, tmp_path: Path) -> None:
    import json

    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "m").mkdir()
    names = sorted(expected())
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, each in shards.items():
        save_file({n: expected()[n] for n in each}, tmp_path / "m" / file)
    save_file(expected(), tmp_path / "x.safetensors")
    index = {name: file for file, each in shards.items() for name in each}
    if evil:
        index["net.0.bias"] = evil
    path = tmp_path / "m" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    for source in (tmp_path / "m", path):
        if evil:
            with pytest.raises(ValueError, match="it is no index of weights"):
                started(source)
        else:
            assert same(weights(started(source)), expected())


def test_a_model_of_transformers_is_read_and_the_hub_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    hub = pytest.importorskip("huggingface_hub")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(1)
    model = transformers.BertModel(config)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("lab/bert")  # As a name on the hub.
    torch.manual_seed(2)
    other = transformers.BertModel(config)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("it asks the hub"))
    brain = Regressor({"bert": other}, None, {}, {"device": "cpu", "init_from": "lab/bert"})
    with pytest.raises(ValueError, match=r"did you mean init_map: \{bert\.\*: '\*'\}"):
        brain.evaluate([])
    options = {"device": "cpu", "init_from": "lab/bert", "init_map": {"bert.*": "*"}}
    brain = Regressor({"bert": other}, None, {}, options)
    with pytest.raises(ValueError, match="gave no batch"):
        brain.evaluate([])
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_offline_a_name_on_the_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, **_: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline mode is enabled\nand nothing is cached")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="the hub does not give it .offline mode is enabled and n"):
        started("facebook/nothing-here")


# Adapters


def test_weights_of_a_base_go_into_an_adapted_model_and_back(tmp_path: Path, state: Path) -> None:
    pytest.importorskip("peft")
    hparams = {
        "adapters": {"net": {"r": 2, "target_modules": ["0"], "modules_to_save": ["2"]}}
    }  # fmt: skip
    brain = make(hparams=hparams, init_from=str(state))
    brain.evaluate(batches(1))
    own = brain.modules.net
    assert torch.equal(own[0].base_layer.weight, net(9)[0].weight)
    assert torch.equal(own[2].modules_to_save["default"].weight, net(9)[2].weight)
    assert torch.equal(own[2].original_module.weight, net(9)[2].weight)
    with torch.no_grad():
        own[2].modules_to_save["default"].weight.add_(1)
    torch.save(brain.modules.state_dict(), tmp_path / "adapted.pt")
    plain = started(tmp_path / "adapted.pt")
    assert torch.equal(plain.modules.net[0].weight, net(9)[0].weight)
    assert torch.equal(plain.modules.net[2].weight, net(9)[2].weight + 1)


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
     {"use_dora": True, "init_lora_weights": "olora"}],
)  # fmt: skip
def test_adapters_that_are_computed_from_a_base_are_so_from_the_one_that_was_loaded(
    more: dict[str, Any], tmp_path: Path, state: Path
) -> None:
    pytest.importorskip("peft")
    hparams = {"adapters": {"net": {"r": 2, "target_modules": ["0", "2"], **more}}}
    x = torch.randn(5, 4)

    def run(source: Path, epochs: int = 0) -> Any:
        kept = Checkpointer(tmp_path / "checkpoints", keep_last=1) if epochs else None
        brain = make(hparams=hparams, init_from=str(source), checkpointer=kept, save="trainable")
        brain.fit(range(1, epochs + 1), batches(3), batches(2))
        brain.modules.eval()
        return brain

    assert torch.allclose(run(state).modules.net(x), net(9)(x), atol=1e-5)
    once = run(state, 1)
    assert not torch.allclose(once.modules.net(x), net(9)(x), atol=1e-3)
    torch.save(once.modules.state_dict(), tmp_path / "adapted.pt")  # Whose adapters stay.
    assert same(weights(run(tmp_path / "adapted.pt")), weights(once))
    assert same(weights(run(state, 1)), weights(once))  # It is resumed.


def test_adapters_of_a_run_go_on_the_same_base_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    hparams = {"adapters": {"net": {"r": 2, "target_modules": ["0", "2"]}}}
    folder = tmp_path / "run"
    first = make(
        hparams=hparams, save="trainable", checkpointer=Checkpointer(folder / "checkpoints")
    )
    first.fit([1], batches(3), batches(2))
    (folder / "hyperparams.yaml").write_text(YAML)
    brain = make(hparams=hparams, init_from=str(folder))
    brain.evaluate(batches(1))
    assert same(weights(brain), weights(first))
    other = make(hparams=hparams, init_from=str(folder))
    with torch.no_grad():
        other.modules.net[0].base_layer.weight.add_(1)
    with pytest.raises(ValueError, match="1 of 4 tensors differ, such as net.0.base_layer.weight"):
        other.evaluate(batches(1))
    with pytest.raises(ValueError, match="none of its 4 names fits"):
        started(folder)


def test_modules_that_are_new_after_a_shape_was_left_out_are_loaded_once(state: Path) -> None:
    brain = make(init_from=str(state))
    brain.evaluate(batches(1))
    with torch.no_grad():
        brain.modules.net[0].weight.zero_()
    brain.evaluate(batches(1))
    assert not brain.modules.net[0].weight.any()
    assert isinstance(brain.modules.net, nn.Sequential)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["net.0.weight", "net.1.running_var"])
def test_weights_that_are_not_finite_are_named_with_their_file(
    tmp_path: Path, value: float, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def masked() -> nn.ModuleDict:
        module = net(norm=True)
        module.register_buffer("mask", torch.full((3,), -math.inf))
        return nn.ModuleDict({"net": module})

    def brain() -> Any:
        options = {"device": "cpu", "progressbar": False}
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return Regressor(masked(), optimizer, {}, options, Checkpointer(tmp_path / "checkpoints"))

    def read(source: Path) -> list[str]:
        caplog.clear()
        if source.is_dir():
            brain().fit([1], batches(2))
            brain().evaluate(batches(1))
        else:
            initialise(masked(), str(source))
        return [
            each.getMessage() for each in caplog.records if "are not finite" in each.getMessage()
        ]

    trained = brain()
    trained.fit([1], batches(2))
    folder = trained.checkpointer.find()[0].path
    assert read(folder) == []
    state = trained.modules.state_dict()
    state[name].view(-1)[1] = value
    folder = trained.checkpointer.save_checkpoint(end_of_epoch=True).path
    torch.save(state, tmp_path / "weights.pt")
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "weights.safetensors")
    for source, times in ((folder, 2), (tmp_path / "weights.pt", 1)):
        said = read(source)
        assert len(said) == times
        assert all(each.startswith(f"{source}: the weights {name} are not finite") for each in said)
    assert read(tmp_path / "weights.safetensors")
