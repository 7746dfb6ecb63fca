"""Pretrained encoders: what they load, what padding does to them, what training masks."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

transformers = pytest.importorskip("transformers")
safe_open = pytest.importorskip("safetensors").safe_open

from recipes.asr.model import padding_mask  # noqa: E402
from recipes.finetune.data import padding_limit  # noqa: E402
from recipes.finetune.model import (  # noqa: E402
    KINDS,
    PretrainedEncoder,
    drawn_spans,
    normalised,
)
from recipes.finetune.sources import tokenizer_of  # noqa: E402
from tests.recipes.finetune.small import SMALL  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

Make = Callable[..., Path]
LENGTHS = torch.tensor([8000, 5003, 2000, 400])


def waves() -> Tensor:
    """Noise of unlike level and offset, and garbage behind the end of each utterance."""
    torch.manual_seed(1)
    return torch.randn(4, 8000) * torch.tensor([[1.0], [0.1], [3.0], [0.5]]) + 0.3


def mapping(kind: str = "wav2vec2", **other: Any) -> dict[str, Any]:
    return {"model_type": kind, "feat_extract_norm": "layer", **SMALL, **other}


def apart(encoder: PretrainedEncoder) -> float:
    """Return the largest difference between a padded batch and each utterance alone."""
    encoder.eval()
    wavs, worst = waves(), 0.0
    with torch.inference_mode():
        features, frames = encoder(wavs, LENGTHS)
        for row, length in enumerate(LENGTHS):
            alone, count = encoder(wavs[row : row + 1, :length], LENGTHS[row : row + 1])
            assert count == frames[row] == alone.shape[1] == encoder.frames(int(length))
            found = features[row, : frames[row]]
            worst = max(worst, float((alone[0] - found).abs().max()))
            assert not features[row, frames[row] :].any()
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["last", "weighted"])
def test_a_padded_batch_gives_what_each_utterance_gives_alone(kind: str, layers: Any) -> None:
    torch.manual_seed(0)
    encoder = PretrainedEncoder(mapping(kind), layers=layers)
    assert encoder.masked
    assert not encoder.normalises_over_time
    assert apart(encoder) < 1e-4


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_padding_changes_what_a_group_norm_gives(kind: str) -> None:
    torch.manual_seed(0)
    encoder = PretrainedEncoder(mapping(kind, feat_extract_norm="group"))
    assert encoder.normalises_over_time
    assert not encoder.masked
    assert apart(encoder) > 1e-2


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_batch_is_prepared_as_by_the_extractor_of_the_model(
    small_model: Make, kind: str, norm: str, normalise: bool
) -> None:
    folder = small_model(kind=kind, feat_extract_norm=norm)
    masks = norm == "layer"
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=normalise, return_attention_mask=masks
    )
    extractor.save_pretrained(folder)
    encoder = PretrainedEncoder(str(folder)).eval()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    each = [wave[:length].numpy() for wave, length in zip(waves(), LENGTHS, strict=True)]
    prepared = extractor(each, sampling_rate=16000, padding=True, return_tensors="pt")
    assert ("attention_mask" in prepared) == masks
    if not masks:  # In a batch it would normalise over the padding, too.
        alone = [extractor(x, sampling_rate=16000).input_values[0] for x in each]
        prepared = {"input_values": pad_sequence(list(map(torch.tensor, alone)), batch_first=True)}
    with torch.inference_mode():
        expected = model(**prepared).last_hidden_state
        features, frames = encoder(waves(), LENGTHS)
    valid = ~padding_mask(frames, features.shape[1])
    torch.testing.assert_close(features[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert (encoder.size, encoder.rate, encoder.hop, encoder.shortest) == (24, 16000, 320, 400)


def test_normalisation_is_over_the_samples_of_each_utterance() -> None:
    wavs = normalised(waves(), LENGTHS, padding_mask(LENGTHS, 8000))
    for wave, length in zip(wavs, LENGTHS, strict=True):
        assert abs(float(wave[:length].mean())) < 1e-5
        assert abs(float(wave[:length].std(correction=0)) - 1) < 1e-4
        assert not wave[length:].any()


def test_masked_spans_are_whole_within_the_utterance_and_as_many_as_asked() -> None:
    torch.manual_seed(0)
    frames = torch.tensor([400, 100, 30, 4])
    beyond, total = padding_mask(frames, 400), torch.zeros(4)
    for _ in range(200):
        masked = drawn_spans(frames, beyond, 0.05, 10)
        assert not (masked & beyond).any()
        runs = masked[0].long().diff(prepend=torch.zeros(1), append=torch.zeros(1))
        lengths = (runs == -1).nonzero() - (runs == 1).nonzero()
        assert lengths.min() >= 10
        total += masked.sum(1)
    share = total / 200 / frames
    assert (share[:2] > 0.33).all()  # 1 - (1 - 0.05)^10 is 0.40, less at the ends.
    assert (share[:2] < 0.45).all()
    assert not drawn_spans(frames, beyond, 0.0, 10).any()


def test_training_masks_drops_layers_and_leaves_the_front_end() -> None:
    torch.manual_seed(0)
    encoder = PretrainedEncoder(mapping(hidden_dropout=0.0), layer_drop=0.0, time_masking=0.2)
    encoder.train()
    assert not encoder.model.feature_extractor.training
    wavs = waves()
    first, second = (encoder(wavs, LENGTHS)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    front = list(encoder.model.feature_extractor.parameters())
    assert front
    assert all(each.grad is None and not each.requires_grad for each in front)
    others = [p for n, p in encoder.named_parameters() if "feature_extractor" not in n]
    assert all(each.grad is not None for each in others)
    dropping = PretrainedEncoder(mapping(), layer_drop=0.999, freeze_front=False).train()
    dropping(waves(), LENGTHS)[0].sum().backward()
    assert dropping.model.encoder.layers[0].attention.k_proj.weight.grad is None
    assert all(p.grad is not None for p in dropping.model.feature_extractor.parameters())


def test_a_model_loads_from_the_description_in_the_run_alone(
    small_model: Make, tmp_path: Path
) -> None:
    folder, kept = small_model(ctc=True), tmp_path / "run" / "encoder"
    first = PretrainedEncoder(str(folder), kept=kept)
    assert not first.described_in_run
    first.keep()
    shutil.move(folder, tmp_path / "away")
    second = PretrainedEncoder(str(folder), kept=kept)
    assert second.described_in_run
    second.load_state_dict(first.state_dict())
    first.eval(), second.eval()
    assert torch.equal(first(waves(), LENGTHS)[0], second(waves(), LENGTHS)[0])
    shutil.move(tmp_path / "away", folder)
    third = PretrainedEncoder(str(folder), kept=kept).eval()
    assert not torch.equal(first(waves(), LENGTHS)[0], third(waves(), LENGTHS)[0])
    third.load_pretrained()
    assert torch.equal(first(waves(), LENGTHS)[0], third(waves(), LENGTHS)[0])


def test_weights_in_half_precision_are_trained_in_single(small_model: Make) -> None:
    folder = small_model()
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    encoder = PretrainedEncoder(str(folder))
    assert {each.dtype for each in encoder.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------- bad input


def changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half_a_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def indexed(folder: Path, name: str) -> None:
    """Split the weights into one file that the index calls by this name."""
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        places = dict.fromkeys(file.keys(), name)
    weights.rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder: Path) -> None:
    indexed(folder, "../outside.safetensors")
    shutil.copy(folder / "a.safetensors", folder.with_name("outside.safetensors"))


def pickled_part(folder: Path) -> None:
    indexed(folder, "w.bin")
    torch.save({}, folder / "w.bin")


def with_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    settings = {"feature_extractor_type": "Own", "auto_map": {"AutoFeatureExtractor": "own.Own"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def extracting(folder: Path, **values: Any) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BAD = {
    "pickled": (pickled, r"pickled weights alone \(pytorch_model.bin\), .* in safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights, and must have"),
    "half a file": (half_a_file, "cannot be used: .*header"),
    "unknown": (lambda f: changed(f, model_type="wav2vec3"), "not known to transformers .*allowed"),
    "a text model": (lambda f: changed(f, model_type="bert"), "'bert', which is no model of the"),
    "more layers": (lambda f: changed(f, num_hidden_layers=3), "lacks 16 weights of Wav2Vec2Model"),
    "another size": (lambda f: changed(f, intermediate_size=48), r"other shapes: .*\(32,\), not"),
    "strides": (lambda f: changed(f, conv_stride=[5, 2]), "cannot be used: .*conv_stride"),
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be used"),
    "no extractor": (
        lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no object of JSON"),
    "weights elsewhere": (outside, r"names '../outside.safetensors', which is no file of the"),
    "pickled parts": (pickled_part, "names 'w.bin', which is no file of the folder in safetensors"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "has an adapter"),
    "code of its own": (with_code, "cannot be used: .*trust_remote_code"),
    "code of the hub": (
        lambda f: changed(f, attn_implementation="some/kernel"), "asks for the code 'some/kernel'"
    ),
    "quantised": (
        lambda f: changed(f, quantization_config={"quant_method": "gptq"}), "is quantised"
    ),
    "other features": (
        lambda f: extracting(f, feature_extractor_type="WhisperFeatureExtractor"),
        "has a WhisperFeatureExtractor; needed is a Wav2Vec2",
    ),
    "no rate": (lambda f: extracting(f, sampling_rate=0), "sampling_rate 0; allowed: whole Hz"),
    "a rate in words": (lambda f: extracting(f, sampling_rate="16k"), "sampling_rate '16k'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_source_that_cannot_be_used_is_told_in_a_sentence(small_model: Make, case: str) -> None:
    folder = small_model()
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        PretrainedEncoder(str(folder))
    assert str(caught.value).startswith(f"source {folder} ")
    assert "\n" not in str(caught.value)


def test_weights_in_several_files_are_read(small_model: Make) -> None:
    folder = small_model()
    whole = PretrainedEncoder(str(folder)).state_dict()
    indexed(folder, "a.safetensors")
    parts = PretrainedEncoder(str(folder)).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_code_beside_a_model_is_neither_run_nor_asked_about(
    small_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    folder = small_model(ctc=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with_code(folder)
    for build in (PretrainedEncoder, tokenizer_of):
        with contextlib.suppress(ValueError):
            build(str(folder))
    assert "own" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "is no folder; allowed: the folder of a model"),
        ("./missing", "is no folder"),
        ("somebody/a-model", "somebody/a-model cannot be used"),
        ({"model_type": "wav2vec2", "hidden": 3}, "'hidden', which is no setting of wav2vec2"),
        ({"model_type": "conformer"}, "not known to transformers"),
        ({}, "model type None"),
    ],
)
def test_a_source_that_is_none_is_told_in_a_sentence(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainedEncoder(source)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("masked", [True, False])
def test_batches_are_near_equal_where_padding_changes_features(norm: str, masked: bool) -> None:
    encoder = PretrainedEncoder(mapping(feat_extract_norm=norm, return_attention_mask=masked))
    encoder.eval()
    together, frames = encoder(waves(), LENGTHS)
    alone, _ = encoder(waves()[2:3, : LENGTHS[2]], LENGTHS[2:3])
    same = torch.allclose(together[2, : frames[2]], alone[0], atol=1e-4)
    assert same == (not encoder.reads_padding) == (padding_limit(None, encoder) == 1.0)
    assert padding_limit(0.5, encoder) == 0.5


def test_strides_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \[0, 2\]; allowed: at least 1"):
        PretrainedEncoder({**mapping(), "conv_dim": [16] * 2, "conv_kernel": [10, 3],
                           "conv_stride": [0, 2], "num_feat_extract_layers": 2})  # fmt: skip


def test_arguments_out_of_range_are_refused() -> None:
    for given, message in [
        ({"layers": "first"}, "layers is 'first'; allowed: last, weighted"),
        ({"layers": "weighted", "layer_drop": 0.1}, "set layer_drop to 0"),
        ({"time_masking": 1.5}, "time_masking is 1.5; allowed"),
        ({"time_span": 0}, "at least 1"),
        ({"channel_masking": 0.01}, "channel_span is 64; the model has 24 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            PretrainedEncoder(mapping(), **given)


def test_an_utterance_without_a_frame_is_told_of() -> None:
    encoder = PretrainedEncoder(mapping())
    with pytest.raises(ValueError, match="an utterance has 399 samples; a frame .* 400 .25 ms"):
        encoder(waves(), torch.tensor([8000, 399, 500, 500]))
