"""The whole recipe from a command line to what is read, for every YAML."""

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.tacotron2 import data
from recipes.tacotron2.text import plain
from recipes.tacotron2.train import train
from tests.trainer.shown import kinds_shown
from trainer import cli
from trainer.config.hyperparameters import load_hparams

HPARAMS = Path(__file__).parents[3] / "hparams" / "tacotron2"
NAMES = ["demo", "ljspeech", "prompts"]
NET = {
    "encoder_embedding_dim": 8, "symbol_embedding_dim": 8, "attention_rnn_dim": 8,
    "attention_hidden_dim": 8, "attention_location_n_filter": 2, "decoder_rnn_dim": 8,
    "prenet_dim": 8, "postnet_embedding_dim": 8, "postnet_n_convolution": 2,
}  # fmt: skip
TINY = [
    *(f"--model.net.{name}={value}" for name, value in NET.items()), "--steps=2", "--batch_size=4",
    "--num_workers=0", "--device=cpu", "--no-progressbar", "--log_interval=1", "--threads=1",
    "--precision=fp32", "--longest=0.5", "--pictures=1", "--mel.n_fft=512",
    "--logger=tensorboard",
]  # fmt: skip
RECORDED = ["--corpus.valid=2", "--corpus.test=3", "--corpus.lengths=[0.1, 5.0]"]

pictures = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs the extra tts")
pytestmark = pictures


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *TINY, *arguments]
    return cli.main(train, given)


def check(folder: Path, metrics: dict[str, float], printed: str) -> None:
    assert list(metrics) == ["focus_rate", "gate_ok", "mel_l1"]
    line = printed.splitlines()[-1]
    assert re.fullmatch(r"test: focus_rate=[\d.]+ gate_ok=[\d.]+ mel_l1=[\d.]+", line)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    *found, last = [line for line in lines if line["kind"] == "stage"]
    assert last == {"kind": "stage", "stage": "test", **metrics}
    assert sum(line["steps"] for line in found if line["stage"] == "train") == 2
    assert len(list((folder / "pictures").glob("valid-*.png"))) == len(
        [line for line in found if line["stage"] == "valid"]
    )
    assert (folder / "pictures" / "test.png").is_file()
    assert sorted(each.name for each in (folder / "audio").iterdir()) == [
        "00-free.wav", "00-true.wav",
    ]  # fmt: skip
    pictures = dict.fromkeys(("true", "teacher-forced", "free", "attention (up: text)"), "image")
    sounds = dict.fromkeys(("sound, true", "sound, free"), "audio")
    assert kinds_shown(folder, "valid") == {"id": "text", "text": "text", **pictures}
    assert kinds_shown(folder) == kinds_shown(folder, "valid") | sounds
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(folder / "tensorboard"), {"images": 0, "audio": 0})
    read.Reload()
    assert {tag.split("/")[-1] for tag in read.Tags()["images"]} == set(pictures)
    assert {tag.split("/")[-1] for tag in read.Tags()["audio"]} == set(sounds)
    with (folder / "readings_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    share = sum(row["gate_ok"] == "True" for row in rows) / 3
    assert metrics["gate_ok"] == pytest.approx(share)


def test_there_is_a_test_for_every_yaml() -> None:
    assert sorted(path.stem for path in HPARAMS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_clips_at_one(name: str) -> None:
    """The limit is where readers look for it: in the file itself, not in a default or a base."""
    lines = (HPARAMS / f"{name}.yaml").read_text().splitlines()
    assert lines.count("max_grad_norm: 1.0") == 1
    folder = [] if name == "demo" else ["--data_folder", "somewhere"]
    _, options = cli.configure([str(HPARAMS / f"{name}.yaml"), *folder])
    assert options.max_grad_norm == 1.0


@pytest.mark.usefixtures("empty_speech_cache")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--corpus.train=8", "--corpus.valid=2", "--corpus.test=3"]
    metrics = run("demo", tmp_path / "run", *counts)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


@pytest.mark.usefixtures("empty_speech_cache")
def test_prompts(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run("prompts", tmp_path / "run", "--data_folder", str(recorded), *RECORDED)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_ljspeech(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run("ljspeech", tmp_path / "run", "--data_folder", str(recorded), *RECORDED)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_the_published_size_and_setting() -> None:
    hparams = load_hparams(HPARAMS / "ljspeech.yaml", {"data_folder": "LJSpeech-1.1"})
    assert sum(p.numel() for p in hparams["model"].parameters()) == 28_193_153
    optimizer = hparams["opt_class"](hparams["model"].parameters())
    assert optimizer.defaults["lr"] == 0.001
    assert optimizer.defaults["weight_decay"] == 6e-6
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    model, objective = hparams["model"], hparams["objective"]
    assert (model.forget, model.blind, model.rest, model.drop) == (0.0, False, False, True)
    assert objective.absolute == 0.0
    assert (hparams["mel"].sample_rate, hparams["mel"].hop, hparams["mel"].f_max) == (
        22050,
        256,
        8000,
    )


def test_vocoder_and_synthesiser_may_meet() -> None:
    """The mels of the demo are those of the vocoder's demo."""
    ours = load_hparams(HPARAMS / "demo.yaml", {})["mel"].config
    theirs = load_hparams(HPARAMS.parent / "hifigan" / "demo.yaml", {})["mel"].config
    assert ours == theirs


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    newest = max((folder / "checkpoints").glob(f"step-{step:08d}*"))
    found: dict[str, Tensor] = torch.load(newest / "brain.modules.pt", weights_only=True)
    return found


def test_a_resumed_run_ends_as_one_that_was_not_stopped(recorded: Path, tmp_path: Path) -> None:
    """To the bit, with the dropout of the pre-net, in an epoch's middle."""
    more = [
        "--data_folder", str(recorded), *RECORDED, "--steps=5", "--batch_size=2",
        "--checkpoint_every_steps=1", "--checkpointer.keep_last=9",
        "--schedule.milestones=[2, 4]", "--schedule.gamma=0.5",
    ]  # fmt: skip
    whole = run("ljspeech", tmp_path / "whole", *more)
    for stopped in (2, 4):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"stopped-{stopped}")
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if int(checkpoint.name.split("-")[1]) > stopped:
                shutil.rmtree(checkpoint)
        again = run("ljspeech", folder, *more)
        assert again == whole
        theirs, ours = weights(tmp_path / "whole", 5), weights(folder, 5)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    before = weights(tmp_path / "whole", 4)
    assert not all(torch.equal(theirs[name], before[name]) for name in theirs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(recorded: Path, tmp_path: Path, precision: str) -> None:
    more = ["--data_folder", str(recorded), *RECORDED, "--precision", precision, "--steps=3"]
    metrics = run("ljspeech", tmp_path / "run", *more)
    assert all(value == value for value in metrics.values())


@pytest.mark.real
class TestRecorded:
    """On what is in SPEECH_DATA, a few steps each."""

    def test_ljspeech(self, speech_data: Path, tmp_path: Path) -> None:
        folder = speech_data / "ljspeech_32"
        more = ["--data_folder", str(folder), *RECORDED, "--corpus.lengths=[1.0, 10.5]"]
        metrics = run("ljspeech", tmp_path / "run", *more)
        assert 0 < metrics["mel_l1"] < 20

    def test_prompts(self, speech_data: Path, tmp_path: Path) -> None:
        folder = speech_data / "asterisk_allison"
        more = ["--data_folder", str(folder), "--corpus.valid=2", "--corpus.test=3"]
        metrics = run("prompts", tmp_path / "run", *more)
        assert 0 < metrics["mel_l1"] < 20

    def test_the_alphabet_has_all_that_ljspeech_says(self, speech_data: Path) -> None:
        hparams: dict[str, Any] = load_hparams(
            HPARAMS / "ljspeech.yaml", {"data_folder": "LJSpeech-1.1"}
        )
        lines = (speech_data / "texts" / "ljspeech_text.csv").read_text("utf-8").splitlines()
        texts = dict(line.split("|")[:: len(line.split("|")) - 1] for line in lines)
        assert len(texts) == 13100
        data.check_texts({name: plain(text) for name, text in texts.items()}, hparams["front"])
        assert len(hparams["front"]) <= 148
