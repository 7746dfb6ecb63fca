"""The whole recipe from a command line to error rates, for every YAML."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes.asr.train import train
from tests.trainer.shown import kinds_shown
from trainer import cli
from trainer.config.hyperparameters import load_hparams

HPARAMS = Path(__file__).parents[3] / "hparams" / "asr"
TINY = [
    "--width=16", "--bands=32", "--model.front.channels=4", "--model.encoder.num_layers=1",
    "--model.encoder.num_heads=2", "--steps=2", "--schedule.warmup_steps=1", "--batch_seconds=10",
    "--num_workers=0", "--device=cpu", "--no-progressbar", "--log_interval=1",
]  # fmt: skip


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *TINY, *arguments]
    return cli.main(train, given)


def stages(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "stage"]


@pytest.fixture
def librispeech_like(tmp_path: Path) -> Path:
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        folder = tmp_path / "LibriSpeech" / part / "19" / "198"
        folder.mkdir(parents=True)
        for number in range(6):
            noise = np.random.default_rng(number).normal(0, 0.1, 32000 + 1600 * number)
            soundfile.write(folder / f"19-198-{number:04d}.flac", noise, 16000)
        lines = (f"19-198-{number:04d} SO MANY WORDS\n" for number in range(6))
        (folder / "19-198.trans.txt").write_text("".join(lines))
    return tmp_path / "LibriSpeech"


def test_there_is_a_test_for_every_yaml() -> None:
    found = sorted(path.stem for path in HPARAMS.glob("*.yaml"))
    assert found == ["demo", "fsdd", "librispeech", "table"]


def check(folder: Path, metrics: dict[str, float], printed: str) -> None:
    assert set(metrics) == {"wer", "cer"}
    assert printed.splitlines()[-1].startswith("test: wer=")
    *found, last = stages(folder)
    assert last == {"kind": "stage", "stage": "test", **metrics}
    assert sum(line["steps"] for line in found if line["stage"] == "train") == 2
    assert "HYP:" in (folder / "wer_test.txt").read_text()
    assert (folder / "wer_valid.txt").is_file()
    kinds = {"id": "text", "WER": "number", "said and heard": "aligned", "sound": "audio"}
    assert kinds_shown(folder) == kinds_shown(folder, "valid") == kinds


@pytest.mark.usefixtures("empty_speech_cache")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--corpus.train", "12", "--corpus.valid", "3", "--corpus.test", "3"]
    metrics = run("demo", tmp_path / "run", *counts)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_fsdd(tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = "{train: 12, valid: 4, test: 5}"
    takes = "{train: [8, 9], valid: [6, 7], test: [0, 5]}"
    arguments = ["--data_folder", str(tones), "--corpus.strings", counts, "--corpus.takes", takes]
    metrics = run("fsdd", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_librispeech(
    librispeech_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data_folder", str(librispeech_like), "--grad_accumulation_factor", "1"]
    metrics = run("librispeech", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_table(librispeech_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, part in (
        ("train", "train-clean-100"),
        ("valid", "dev-clean"),
        ("test", "test-clean"),
    ):
        paths = [f"{part}/19/198/19-198-{number:04d}.flac" for number in range(6)]
        rows = ["path,text", *[f"{path},so many words" for path in paths]]
        (librispeech_like / f"{split}.csv").write_text("\n".join(rows))
    metrics = run("table", tmp_path / "run", "--data_folder", str(librispeech_like))
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_the_published_size() -> None:
    hparams = load_hparams(HPARAMS / "librispeech.yaml", {"data_folder": "LibriSpeech"})
    parameters = sum(p.numel() for p in hparams["model"].parameters())
    assert parameters == 28_224_925
    assert hparams["average_checkpoints"] == hparams["checkpointer"].retention.last == 10
    assert not hparams["checkpointer"].retention.best


@pytest.mark.long
def test_strings_of_tones_are_learned(tones: Path, tmp_path: Path) -> None:
    metrics = run(
        "fsdd", tmp_path / "run", "--data_folder", str(tones), "--width", "64", "--steps", "500",
        "--model.encoder.num_layers", "2", "--opt_class.lr", "0.004", "--schedule.warmup_steps",
        "50", "--corpus.strings", "{train: 1000, valid: 10, test: 50}", "--precision", "fp32",
        "--speeds", "[1.0]", "--batch_seconds", "20",  # another speed is another pitch
    )  # fmt: skip
    assert metrics["wer"] < 10.0
