"""Fine-tunings as runs: what they learn, keep, load, resume and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

transformers = pytest.importorskip("transformers")

import trainer  # noqa: E402
from recipes.asr.data import table  # noqa: E402
from recipes.common.hearing import given_sounds  # noqa: E402
from recipes.common.loading import Speech  # noqa: E402
from recipes.common.tables import TableError  # noqa: E402
from recipes.finetune import infer  # noqa: E402
from recipes.finetune.text import Vocabulary  # noqa: E402
from recipes.finetune.train import train  # noqa: E402
from recipes.finetune.whisper import Whisper  # noqa: E402
from tests.recipes.common.speakers import voice, write  # noqa: E402
from tests.recipes.finetune.small import (  # noqa: E402
    SECONDS,
    SPECIAL,
    save_encoder,
    save_whisper,
)
from trainer import cli  # noqa: E402
from trainer.inference.initialise import initialise  # noqa: E402
from trainer.inference.loading import open_run  # noqa: E402
from trainer.inference.results import Transcript  # noqa: E402

HPARAMS = Path(__file__).parents[3] / "hparams" / "finetune"
TEXTS = ["one two", "two one", "a word", "it's one"]
FEW = [
    "--num_workers=0", "--device=cpu", "--no-progressbar", "--batch_seconds=6", "--threads=1",
    "--grad_accumulation_factor=1", "--steps=3", "--schedule.warmup_steps=1", "--lengths=[0.1, 5]",
]  # fmt: skip
CTC = ["--encoder.channel_span=8", "--encoder.time_span=4", "--param_groups=null"]


def spoken(folder: Path, rate: int = 16000, seconds: float = 0.8) -> Path:
    """Write tables of a few recordings."""
    for split, count in (("train", 8), ("valid", 3), ("test", 3)):
        rows = ["path,text,speaker"]
        for number in range(count):
            name = f"{split}/{number}.wav"
            write(folder / name, voice(seconds + 0.1 * number, number, rate), rate)
            rows.append(f"{name},{TEXTS[number % 4]},s{number}")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder


def corpus(folder: Path) -> list[str]:
    tables = "{train: train.csv, valid: valid.csv, test: test.csv}"
    made = f"!name:recipes.asr.data.table {{data_folder: {folder}, tables: {tables}}}"
    return [f"--corpus={made}", f"--data_folder={folder}"]


def run(name: str, folder: Path, source: Path, *arguments: str) -> dict[str, Any]:
    given = [str(HPARAMS / f"{name}.yaml"), f"--output_folder={folder}", f"--source={source}"]
    return cli.main(train, [*given, *FEW, *arguments])


def stages(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "stage"]


def test_there_is_a_test_for_every_yaml() -> None:
    tested = {"classify", "ctc_wav2vec2", "demo", "few", "pretrain", "speaker", "whisper"}
    assert {path.stem for path in HPARAMS.glob("*.yaml")} == tested


# ---------------------------------------------------------------------------------------------- CTC


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_an_encoder_is_fine_tuned_by_ctc_and_loads_without_its_source(
    tmp_path: Path, kind: str, norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_encoder(tmp_path / "model", kind, feat_extract_norm=norm)
    data = spoken(tmp_path / "data")
    found = run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    assert set(found) == {"wer", "cer"}
    shutil.rmtree(source)
    shutil.rmtree(data / "train")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    brain = trainer.load(tmp_path / "moved", "cpu")
    assert brain.hparams.codec.tokens == ["<blank>", *sorted(set("".join(TEXTS)))]
    text = brain.transcribe(voice(1.0), 16000)
    capsys.readouterr()
    path = write(tmp_path / "sound.wav", voice(1.0))
    assert infer.main([str(tmp_path / "moved"), str(path), str(tmp_path / "none.wav")]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"{path}\t{brain.transcribe(path)}\n"
    assert "none.wav" in printed.err
    assert isinstance(text, Transcript)
    assert all(0 <= word.start < word.end <= 1 for word in text.words)


def test_the_front_end_stays_and_the_rest_learns(tmp_path: Path) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC, "--opt_class.lr=0.01")
    before = transformers.AutoModel.from_pretrained(source).state_dict()
    model = trainer.load(tmp_path / "run", "cpu").modules.model.encoder.model
    moved = {name for name, each in model.state_dict().items() if not each.equal(before[name])}
    assert not [name for name in moved if name.startswith("feature_extractor")]
    assert "encoder.layers.1.attention.k_proj.weight" in moved
    assert "feature_projection.projection.weight" in moved


def test_a_model_goes_on_with_its_own_vocabulary_and_last_layer(tmp_path: Path) -> None:
    source, data = save_encoder(tmp_path / "model", ctc=True), spoken(tmp_path / "data")
    own = [*corpus(data), *CTC, "--codec.source=!ref <source>", "--opt_class.lr=0.0"]
    found = run("ctc_wav2vec2", tmp_path / "run", source, *own)
    model = transformers.AutoModelForCTC.from_pretrained(source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(source)
    brain = trainer.load(tmp_path / "run", "cpu")
    for seed in range(3):
        signal = voice(1.0, seed)
        given = extractor(signal.numpy(), sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            best = model(**given).logits.argmax(-1)[0]
        # The tokenizer of the model writes special tokens out, which are no text here.
        expected = tokenizer.decode(best, skip_special_tokens=True).lower()
        assert str(brain.transcribe(signal, 16000)) == " ".join(expected.split())
    assert found["cer"] > 0


def test_another_vocabulary_is_refused_with_its_characters(tmp_path: Path) -> None:
    source, data = save_encoder(tmp_path / "model", ctc=True), spoken(tmp_path / "data")
    rows = (data / "valid.csv").read_text().replace("one two", "caf\u00e9 1")
    (data / "valid.csv").write_text(rows)
    with pytest.raises(SystemExit, match="2"):
        run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "transcripts have characters that the vocabulary lacks: '1' in valid/0.wav" in log
    plain = save_encoder(tmp_path / "plain")
    with pytest.raises(ValueError, match="cannot be used|no vocabulary of characters"):
        Vocabulary(tmp_path / "vocabulary.json", str(plain))


def test_recordings_of_another_rate_are_converted_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data", rate=8000)
    assert run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    for arguments, message in [
        (["--sample_rate=8000"], "sample_rate is 8000, and the pretrained model takes 16000 Hz"),
        (["--resample=false"], "no recording has the sample rate of the recipe, 16000 Hz"),
    ]:
        with pytest.raises(SystemExit):
            run("ctc_wav2vec2", tmp_path / "b", source, *corpus(data), *CTC, *arguments)
        assert message in capsys.readouterr().err + (tmp_path / "b" / "train.log").read_text()
        shutil.rmtree(tmp_path / "b")


def test_what_is_shorter_than_a_frame_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    write(data / "test" / "1.wav", voice(0.02))
    with pytest.raises(SystemExit):
        run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    error = capsys.readouterr().err
    assert "1 of 3 utterances of test do not fit the pretrained model" in error
    assert "25 ms at least: the first is test/1.wav of 0.020 s" in error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_batches_are_of_near_equal_length_where_the_front_end_normalises_over_time(
    tmp_path: Path,
) -> None:
    data = spoken(tmp_path / "data")
    counts = {}
    for norm in ("group", "layer"):
        source = save_encoder(tmp_path / norm, feat_extract_norm=norm)
        run("ctc_wav2vec2", tmp_path / f"run-{norm}", source, *corpus(data), *CTC)
        log = (tmp_path / f"run-{norm}" / "train.log").read_text()
        counts[norm] = int(log.split("8 items, ")[1].split(" in ")[1].split()[0])
    assert counts == {"group": 8, "layer": 2}


def test_a_run_that_is_stopped_before_its_first_checkpoint_begins_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    given = [*corpus(data), *CTC, "--encoder.layer_drop=0", "--encoder.time_masking=0"]
    whole = run("ctc_wav2vec2", tmp_path / "whole", source, *given)
    with monkeypatch.context() as patch:
        patch.setattr("recipes.finetune.train.Recogniser.on_fit_batch_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run("ctc_wav2vec2", tmp_path / "run", source, *given)
    assert (tmp_path / "run" / "prepared" / "encoder" / "config.json").is_file()
    assert run("ctc_wav2vec2", tmp_path / "run", source, *given) == whole
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_given_alphabet_takes_the_place_of_that_of_the_transcripts(tmp_path: Path) -> None:
    source, data = save_encoder(tmp_path / "model", ctc=True), spoken(tmp_path / "data")
    (data / "test.csv").write_text("path,text\ntest/0.wav,a quiz")  # Letters that train lacks.
    given = [*corpus(data), *CTC, "--codec=!new:recipes.asr.text.Characters"]
    assert set(run("ctc_wav2vec2", tmp_path / "run", source, *given)) == {"wer", "cer"}
    assert trainer.load(tmp_path / "run", "cpu").modules.model.vocabulary == 29


def test_an_earlier_run_is_tested_by_its_word_errors(tmp_path: Path) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    path = tmp_path / "run" / "hyperparams.yaml"
    path.write_text(path.read_text().replace("\nbest: wer", "\n"))
    brain: Any = trainer.load(tmp_path / "run", "cpu")
    assert brain.best_checkpoint == {"min_key": "wer"}


@pytest.mark.parametrize("best", ["wer", "cer"])
def test_a_run_starts_from_the_checkpoint_that_another_is_tested_with(
    tmp_path: Path, best: str
) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    keep = f"--checkpointer.keep_best={{{best}: min}}"
    given = [*corpus(data), *CTC, f"--best={best}", keep]
    run("ctc_wav2vec2", tmp_path / "first", source, *given)
    with open_run(tmp_path / "first") as opened:
        assert opened.best_checkpoint(opened.brain_class()) == {"min_key": best}
    wanted = trainer.load(tmp_path / "first", "cpu").modules
    found = trainer.load(tmp_path / "first", "cpu").modules
    for each in found.parameters():
        each.data.zero_()
    initialise(found, str(tmp_path / "first"))
    states = wanted.state_dict(), found.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


ADAPTED = [
    "--adapters={model.encoder: {r: 2, target_modules: [q_proj]}}", "--save=trainable",
]  # fmt: skip


def test_a_run_without_its_base_reads_the_source_that_its_user_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC, *ADAPTED)
    file = str(data / "test" / "0.wav")
    assert infer.main([str(tmp_path / "run"), file]) == 2
    assert "overrides={'source'" in capsys.readouterr().err
    moved = source.rename(tmp_path / "moved")
    assert infer.main([str(tmp_path / "run"), file, f"--source={moved}"]) == 0
    brain = trainer.load(tmp_path / "run", "cpu", overrides={"source": str(moved)})
    assert capsys.readouterr().out == f"{file}\t{infer.answer(brain, file)}\n"


@pytest.mark.parametrize("place", ["folder", "hub", "link"])
def test_a_run_folder_reads_nothing_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    source, data = save_encoder(tmp_path / "model"), spoken(tmp_path / "data")
    run("ctc_wav2vec2", tmp_path / "run", source, *corpus(data), *CTC)
    kept = tmp_path / "run" / "prepared" / "encoder"
    message = "lacks its frozen weights, and has their source, .*, which is outside of it: name it"
    if place == "link":
        (kept / "config.json").unlink()
        (kept / "config.json").symlink_to(source / "config.json")
        message = "lies outside of"
    else:
        shutil.rmtree(kept)
    if place == "hub":
        yaml = tmp_path / "run" / "hyperparams.yaml"
        yaml.write_text(yaml.read_text().replace(str(source), "somebody/a-model"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.socket.connect", stop)
    with pytest.raises(ValueError, match=message):
        trainer.load(tmp_path / "run", "cpu")


def stop(*_: object) -> None:
    raise RuntimeError("stopped")


def losses(folder: Path) -> list[float]:
    return [each["loss"] for each in stages(folder) if "loss" in each]


# ------------------------------------------------------------------------------------------ Whisper


def test_whisper_is_fine_tuned_and_loads_without_its_source(tmp_path: Path) -> None:
    source, data = save_whisper(tmp_path / "model"), spoken(tmp_path / "data")
    given = [*corpus(data), "--model.longest=12", "--opt_class.lr=0.01", "--steps=6"]
    found = run("whisper", tmp_path / "run", source, *given)
    assert set(found) == {"wer", "cer"}
    train_losses = [each["loss"] for each in stages(tmp_path / "run") if each["stage"] == "train"]
    assert train_losses[-1] < train_losses[0]
    shutil.rmtree(source)
    brain = trainer.load(tmp_path / "run", "cpu")
    heard = brain.modules.model.generate(brain.modules.model.features(voice(1.0))[None])
    assert 1 <= len(heard[0]) <= 12
    found = brain.transcribe(voice(1.0), 16000)
    assert str(found) == brain.modules.model.decode(heard[0])
    assert found.words == ()
    assert 0 < found.score < 1
    assert infer.main([str(tmp_path / "run"), str(data / "test" / "0.wav")]) == 0


def test_whisper_hears_its_own_features_and_generates_the_likeliest_tokens(tmp_path: Path) -> None:
    source = save_whisper(tmp_path / "model")
    model = Whisper(str(source), longest=9).eval()
    known = model.tokenizer.get_vocab()
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert model.prompt == [known[name] for name in names]
    signals = [voice(1.0), voice(0.5, 1)]
    features = torch.stack([model.features(each) for each in signals])
    assert features.shape == (2, 8, 100 * SECONDS)
    original = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
    for row, signal in enumerate(signals):
        given = model.extractor(signal.numpy(), sampling_rate=16000, return_tensors="pt")
        torch.testing.assert_close(features[row], given["input_features"][0])
    tokens = torch.tensor([model.prompt] * 2)
    with torch.inference_mode():
        for _ in range(9):
            scores = original(input_features=features, decoder_input_ids=tokens).logits[:, -1]
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
        assert model.generate(features) == tokens[:, len(model.prompt) :].tolist()
        forced = model(features, tokens[:, len(model.prompt) :])
    assert torch.equal(forced.argmax(-1), tokens[:, len(model.prompt) :])
    assert model.decode(model.encode("it's one")) == "it's one"
    assert model.encode("a")[-1] == known["<|endoftext|>"]


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ({"num_mel_bins": 10}, {}, "takes 600 frames of 10 mel bands, .* gives 600 of 8"),
        ({"max_source_positions": 100}, {}, "takes 200 frames of 8 mel bands, .* gives 600 of 8"),
        ({}, {"language": "fr"}, r"has no <\|fr\|>; language must be a code"),
        ({}, {"task": "summarise"}, "task is 'summarise'; allowed: transcribe, translate"),
        ({}, {"longest": 217}, "longest is 217; the model has room for 1 to 216 tokens"),
    ],
)
def test_a_whisper_that_does_not_fit_together_is_refused(
    tmp_path: Path, saved: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    source = save_whisper(tmp_path / "model", **saved)
    with pytest.raises(ValueError, match=message):
        Whisper(str(source), **{"longest": 9, **given})


def test_an_english_whisper_has_no_language(tmp_path: Path) -> None:
    special = [each for each in SPECIAL if each not in ("<|en|>", "<|de|>", "<|transcribe|>")]
    model = Whisper(str(save_whisper(tmp_path / "m", special)), language=None, longest=9)
    assert len(model.prompt) == 2
    with pytest.raises(ValueError, match="model type 'wav2vec2', which is no model of the kind"):
        Whisper(str(save_encoder(tmp_path / "other")))


@pytest.mark.parametrize("rate", [16000, 22050])
def test_nothing_of_a_long_file_is_lost_on_a_whisper_that_takes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    source, data = save_whisper(tmp_path / "model"), spoken(tmp_path / "data")
    run("whisper", tmp_path / "run", source, *corpus(data), "--model.longest=3")
    brain = trainer.load(tmp_path / "run", "cpu")
    heard: list[int] = []

    def features(signal: torch.Tensor) -> torch.Tensor:
        heard.append(len(signal))
        return own(signal)

    own = brain.modules.model.features
    monkeypatch.setattr(brain.modules.model, "features", features)
    write(tmp_path / "long.wav", voice(3.3 * SECONDS, rate=rate), rate)
    infer.answer(brain, tmp_path / "long.wav")
    assert max(heard) <= brain.modules.model.samples
    assert sum(heard) == pytest.approx(3.3 * SECONDS * 16000, abs=len(heard))
    for samples in (0, (SECONDS + 1) * 16000):
        with pytest.raises(ValueError, match=f"{samples} samples were given; .* 1 to 96000 .6 s"):
            brain.modules.model.features(torch.zeros(samples))


def test_a_source_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    source = save_whisper(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(ValueError, match="the folder has no tokenizer_config.json or tokenizer"):
        Whisper(str(source), longest=9)
    with pytest.raises(ValueError, match="the folder has no tokenizer_config.json or tokenizer"):
        Vocabulary(tmp_path / "none.json", str(save_encoder(tmp_path / "encoder")))


def test_an_utterance_that_is_too_long_for_whisper_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = save_whisper(tmp_path / "model"), spoken(tmp_path / "data")
    write(data / "valid" / "2.wav", voice(SECONDS + 1))
    with pytest.raises(SystemExit):
        run("whisper", tmp_path / "run", source, *corpus(data), "--model.longest=12")
    assert f"and {SECONDS} s at most: the first is valid/2.wav" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- data

TABLES = {"train": "train.csv", "valid": "valid.csv", "test": "test.csv"}
Spoil = Callable[[Path], object]


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_recording_of_several_channels_is_heard_in_training_as_by_infer(
    tmp_path: Path, rate: int
) -> None:
    folder = spoken(tmp_path)
    both = torch.stack([voice(1.0, 1, rate), 0.5 * voice(1.0, 2, rate), torch.zeros(rate)])
    soundfile.write(folder / "train" / "0.wav", both.T.numpy(), rate)
    cut = next(cut for cut in table(str(folder), TABLES)["train"] if cut.id == "train/0.wav")
    (source,), _ = given_sounds(folder / "train" / "0.wav")
    heard = source.read(16000)
    for speed in (1.0, 1.1):
        found = Speech([cut], 16000, speeds=(speed,), resample=True)[0]
        assert found["text"] == "one two"
        if speed == 1.0:
            torch.testing.assert_close(found["sig"], heard, atol=1e-4, rtol=0)
        assert len(found["sig"]) == pytest.approx(16000 / speed, abs=1)


def in_two_splits(folder: Path) -> None:
    text = (folder / "test.csv").read_text()
    (folder / "test.csv").write_text(text + "\ntrain/0.wav,one,s0")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (in_two_splits, "line 5 of .*test.csv has 'train/0.wav', as train has"),
        (lambda f: (f / "valid.csv").unlink(), "valid.csv is not there; expected was a table"),
        (lambda f: (f / "valid.csv").write_text("path\na.wav"), "has no column text"),
        (lambda f: (f / "valid.csv").write_text("path,text\n../a.wav,one"), "line 2 .*'..'"),
        (lambda f: (f / "valid.csv").write_text('path,text\na.wav,""'), "has no text for 'a.wav'"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_with_its_line(
    tmp_path: Path, spoil: Spoil, message: str
) -> None:
    folder = spoken(tmp_path)
    assert {split: len(list(each)) for split, each in table(str(folder), TABLES).items()} == {
        "train": 8,
        "valid": 3,
        "test": 3,
    }
    spoil(folder)
    with pytest.raises(TableError, match=message):
        table(str(folder), TABLES)
