"""Models of other libraries in a YAML: local or downloaded in a run, and never code."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.cli.arguments import configure
from trainer.config.hyperparameters import Configuration, load_hparams

Write = Callable[[str], Path]
SIZES = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "vocab_size": 12, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a YAML; nothing can be reached on the network."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> Path:
        Path("demo.yaml").write_text(text)
        return Path("demo.yaml")

    return _write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a small random model and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    path = tmp_path / "model"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(path)
    return path


def test_classes_are_built_from_values(write: Write) -> None:
    transformers = pytest.importorskip("transformers")
    found = load_hparams(
        write(
            f"config: !new:transformers.BertConfig {json.dumps(SIZES)}\n"
            "model: !new:transformers.BertModel {config: !ref <config>}\n"
            "auto: !apply:transformers.AutoModel.from_config {config: !ref <config>}\n"
            "first: !apply:transformers.AutoModel.from_config\n  - !ref <config>\n"
            "features: !new:transformers.Wav2Vec2FeatureExtractor {sampling_rate: 8000}\n"
        )
    )
    assert type(found["first"]) is transformers.BertModel
    assert found["model"].config.hidden_size == 8
    assert type(found["auto"]) is transformers.BertModel
    assert found["features"].sampling_rate == 8000
    known = load_hparams(write("x: !new:transformers.BertConfig {own: 3, num_labels: 4}\n"))["x"]
    assert (known.own, known.num_labels) == (3, 4)


def test_a_local_folder_is_loaded_and_no_network_asked(write: Write, folder: Path) -> None:
    found = load_hparams(
        write(
            "model: !apply:transformers.AutoModel.from_pretrained [model]\n"
            "same: !apply:transformers.BertModel.from_pretrained\n"
            "  pretrained_model_name_or_path: model\n"
            "tokens: !apply:transformers.AutoTokenizer.from_pretrained [model]\n"
            "config: !apply:transformers.AutoConfig.from_pretrained [model]\n"
            "later: !name:transformers.AutoModel.from_pretrained [model]\n"
        )
    )
    assert found["config"].hidden_size == 8
    assert found["tokens"].tokenize("a b") == ["a", "b"]
    assert found["later"].keywords == {"trust_remote_code": False, "use_safetensors": True}
    models = [found["model"], found["same"], found["later"]()]
    weights = [each.embeddings.word_embeddings.weight for each in models]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_model_of_ones_own_is_loaded_like_its_parent(write: Write, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    Path("ownmodel.py").write_text(
        "import transformers\nclass Net(transformers.BertModel):\n    pass\n"
    )
    text = "x: !name:ownmodel.Net.from_pretrained {P: model}\n".replace(
        "P", "pretrained_model_name_or_path"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")
        later = load_hparams(write(text), allow=["ownmodel"])["x"]
        other = write(text.replace("model}", "model, use_safetensors: false}"))
        assert load_hparams(other, allow=["ownmodel"])["x"].keywords["use_safetensors"] is True
    assert later.keywords["use_safetensors"] is True
    assert isinstance(later(), transformers.BertModel)


def test_a_download_is_left_to_the_run(write: Write) -> None:
    pytest.importorskip("transformers")
    path = write("model: !apply:transformers.AutoConfig.from_pretrained [somebody/a-model]\n")
    with pytest.raises(
        ValueError, match=r"line 1\): .* \(nothing is downloaded while a YAML is rea"
    ):
        load_hparams(path)
    configuration, _ = configure([str(path)])  # A run reads the YAML, and nothing is asked.
    configuration.described()
    with pytest.raises(ValueError, match="somebody/a-model|the network was asked") as caught:
        configuration.build()
    assert "nothing is downloaded" not in str(caught.value)
    with pytest.raises(ValueError, match="makes an object, which !apply:"):
        Configuration(
            write("x: !applyref:transformers.AutoConfig.from_pretrained [somebody/a-model]\n")
        ).options()


@pytest.mark.parametrize("kind", ["AutoModel", "BertModel"])
def test_a_folder_without_the_files_is_told_as_one(write: Write, folder: Path, kind: str) -> None:
    for each in folder.iterdir():
        if each.name != "config.json":
            each.rename(each.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"line 1\): transformers") as caught:
        load_hparams(write(f"x: !apply:transformers.{kind}.from_pretrained [model]\n"))
    assert "nothing is downloaded" not in str(caught.value)
    assert "must be in safetensors" in str(caught.value)


ATTACKS = [
    "!apply:transformers.AutoModel.from_pretrained {P: model, trust_remote_code: true}",
    "!name:transformers.AutoModel.from_pretrained {P: model, trust_remote_code: true}",
    "!name:transformers.AutoTokenizer.from_pretrained {P: model, trust_remote_code: 1}",
    "!apply:transformers.AutoModel.from_pretrained {P: model, use_safetensors: false}",
    "!apply:transformers.AutoModel.from_pretrained {P: model, attn_implementation: a/kernel}",
    "!apply:transformers.AutoModel.from_pretrained {P: model, use_kernels: true}",
    "!apply:transformers.AutoModel.from_pretrained {P: model, trust_remote_code: !ref <yes>}",
    "!new:transformers.BertConfig {attn_implementation: a/kernel}",
    "!new:transformers.BertConfig {_attn_implementation: a/kernel}",
    "!new:transformers.BertConfig {inner: {trust_remote_code: true}}",
]
REFUSED = [
    "!apply:transformers.pipeline [text-generation]",
    "!apply:transformers.dynamic_module_utils.get_class_from_dynamic_module [a, model]",
    "!apply:transformers.AutoModel.register [a, b]",
    "!apply:transformers.BertModel.save_pretrained [x]",
    "!apply:transformers.utils.hub.cached_file [model, config.json]",
    "!apply:transformers.modeling_utils.os.system [true]",
    "!apply:transformers.BertConfig.from_json_file [model/config.json]",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_a_model_brings_no_code(write: Write, folder: Path, text: str) -> None:
    text = text.replace("P:", "pretrained_model_name_or_path:")
    for allow in ([], ["transformers"]):
        with pytest.raises(
            ValueError, match=r"must be .*: a model that a YAML names brings no code"
        ):
            load_hparams(write(f"yes: true\nx: {text}\n"), allow=allow)


def test_nobody_is_told_to_trust_code(write: Write) -> None:
    for tree in ("!new:dict {trust_remote_code: true}", "!new:dict {a: [{trust_remote_code: 1}]}"):
        with pytest.raises(ValueError, match="trust_remote_code .* must be false"):
            load_hparams(write(f"x: {tree}\n"))
    assert load_hparams(write("x: !new:dict {trust_remote_code: false}\n"))


@pytest.mark.parametrize("text", REFUSED)
def test_what_makes_no_model_is_refused(write: Write, folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        load_hparams(write(f"x: {text}\n"))


def test_code_and_pickles_in_a_folder_are_not_used(write: Write, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Net"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("open('ran', 'w')\n")
    for name in ("AutoConfig", "AutoModel"):
        with pytest.raises(ValueError, match=r"x \(demo\.yaml, line 1\)"):
            load_hparams(write(f"x: !apply:transformers.{name}.from_pretrained [model]\n"))
    load_hparams(write("x: !apply:transformers.AutoTokenizer.from_pretrained [model]\n"))
    assert not Path("ran").exists()


def test_weights_that_are_no_safetensors_are_refused(write: Write, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for kind in ("AutoModel", "BertModel"):
        with pytest.raises(ValueError, match="safetensors"):
            load_hparams(write(f"x: !apply:transformers.{kind}.from_pretrained [model]\n"))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_adapters_are_put_on_a_model(write: Write, folder: Path) -> None:
    pytest.importorskip("peft")
    text = (
        "base_model: !apply:transformers.BertModel.from_pretrained [model]\n"
        "lora: !new:peft.LoraConfig {r: 2, target_modules: [query, value]}\n"
        "model: !apply:peft.get_peft_model [!ref <base_model>, !ref <lora>]\n"
    )
    model = load_hparams(write(text))["model"]
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    evil = text.replace("r: 2", "r: 2, megatron_config: {a: 1}, megatron_core: evil")
    with pytest.raises(ValueError, match=r"megatron_con.* must be null"):
        load_hparams(write(evil))
    for name in ("PeftModel.from_pretrained", "PromptTuningConfig", "tuners.lora.model.os.system"):
        with pytest.raises(ValueError, match="is not allowed"):
            load_hparams(write(f"x: !apply:peft.{name} [model]\n"))


def test_metrics_that_download_nothing_are_built(write: Write) -> None:
    pytest.importorskip("torchmetrics")
    names = [
        "MeanMetric",
        "MetricCollection",
        "text.WordErrorRate",
        "text.BLEUScore",
        "text.MatchErrorRate",
        "classification.BinaryAccuracy",
        "audio.ScaleInvariantSignalDistortionRatio",
        "retrieval.RetrievalMAP",
    ]
    given = {"MetricCollection": " [[!new:torchmetrics.MeanMetric ]]"}
    lines = [f"m{n}: !new:torchmetrics.{each}{given.get(each, '')}" for n, each in enumerate(names)]
    assert len(load_hparams(write("\n".join(lines)))) == 8
    loading = """
        text.BERTScore text.ROUGEScore text.SacreBLEUScore image.FrechetInceptionDistance
        multimodal.CLIPScore audio.DeepNoiseSuppressionMeanOpinionScore
        """
    for name in loading.split():
        with pytest.raises(ValueError, match="is not allowed|does not exist"):
            load_hparams(write(f"x: !new:torchmetrics.{name}\n"))


def test_a_sentencepiece_model_is_read(write: Write) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    Path("text.txt").write_text("a few words of text\nand a few more words\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input="text.txt", model_prefix="pieces", vocab_size=18, minloglevel=2
    )
    text = "x: !new:sentencepiece.SentencePieceProcessor {model_file: pieces.model}\n"
    assert load_hparams(write(text))["x"].get_piece_size() == 18
    with pytest.raises(ValueError, match="is not allowed"):
        load_hparams(write("x: !apply:sentencepiece.SentencePieceTrainer.train [--input=a]\n"))
