"""The whole recipe from a command line to scores, for every YAML."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes.hifigan.train import train
from tests.recipes.common.test_vocoder import plain_size
from tests.trainer.shown import kinds_shown
from trainer import cli
from trainer.config.hyperparameters import load_hparams

HPARAMS = Path(__file__).parents[3] / "hparams" / "hifigan"
KEYS = {"mel_l1", "mel_l1_griffinlim", "stoi", "stoi_griffinlim"}
TINY = [
    "--generator.channels=16", "--discriminator.periods=[2, 3]", "--discriminator.scales=1",
    "--discriminator.period_channels=[2, 4]", "--discriminator.scale_layers=[[4, 15, 4, 1]]",
    "--segment=2048", "--batch_size=2", "--steps=2", "--adversarial_from=1", "--num_workers=0",
    "--judges=0", "--measures=[stoi]", "--shown=1", "--device=cpu", "--no-progressbar",
    "--log_interval=1",
]  # fmt: skip
SPOKEN = ["--schedule.generator.warmup_steps=1", "--schedule.discriminator.warmup_steps=0"]
HELD_OUT = ["--corpus.valid=1", "--corpus.test=2"]


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *TINY, *arguments]
    return cli.main(train, given)


def noises(folder: Path, rate: int = 22050, number: int = 7) -> Path:
    """Clips of noise that comes and goes."""
    (folder / "wavs").mkdir(parents=True)
    for n in range(number):
        time = np.arange(rate) / rate
        noise = np.random.default_rng(n).normal(0, 0.1, rate) * (1.1 + np.sin(25 * time))
        soundfile.write(folder / "wavs" / f"LJ001-{n:04d}.wav", 0.3 * noise, rate)
    return folder


def check(folder: Path, metrics: dict[str, float], printed: str) -> None:
    assert set(metrics) == KEYS
    assert printed.splitlines()[-1].startswith("test: mel_l1=")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"kind": "stage", "stage": "test", **metrics}
    steps = [line for line in lines if line["kind"] == "step"]
    assert [set(line["optimizers"]) for line in steps] == [
        {"generator"}, {"discriminator", "generator"},
    ]  # fmt: skip
    assert {"mel", "adversarial", "features"} < steps[1]["loss"].keys()
    sounds = dict.fromkeys(("original", "resynthesised", "Griffin-Lim"), "audio")
    assert sounds.items() <= kinds_shown(folder).items()
    assert len(list((folder / "samples" / "test").glob("*.flac"))) == 3


def test_there_is_a_test_for_every_yaml() -> None:
    found = sorted(path.stem for path in HPARAMS.glob("*.yaml"))
    assert found == ["demo", "ljspeech", "v1", "v2", "v3"]


@pytest.mark.usefixtures("empty_speech_cache")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--corpus.train", "4", "--corpus.valid", "1", "--corpus.test", "2"]
    metrics = run("demo", tmp_path / "run", *SPOKEN, *counts)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


@pytest.mark.parametrize("name", ["v1", "v2", "v3", "ljspeech"])
def test_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = noises(tmp_path / "data")
    metrics = run(name, tmp_path / "run", "--data_folder", str(data), *HELD_OUT)
    check(tmp_path / "run", metrics, capsys.readouterr().out)


def test_another_rate_stops_the_run_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = noises(tmp_path / "data", rate=16000)
    with pytest.raises(SystemExit):
        run("v3", tmp_path / "run", "--data_folder", str(data), *HELD_OUT)
    assert "at 16000 Hz, not at 22050 Hz; --resample makes them so" in capsys.readouterr().err
    run("v3", tmp_path / "other", "--data_folder", str(data), *HELD_OUT, "--resample")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--segment=2000", "segment is 2000 samples; allowed: multiples of the hop, 256, of 512"),
        ("--segment=256", "segment is 256 samples; allowed: multiples of the hop, 256, of 512"),
        ("--mel.hop=128", "the generator has hop=256, the mel front end 128"),
        ("--loss_mel.sample_rate=16000", "loss_mel has sample_rate=16000; allowed: that of the"),
    ],
)
def test_sizes_that_do_not_fit_stop_the_run_with_a_sentence(
    given: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("v3", tmp_path / "run", "--data_folder", str(tmp_path), *HELD_OUT, given)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "generator"),
    [("v1", 13_926_017), ("ljspeech", 13_926_017), ("v2", 925_985), ("v3", 1_462_273)],
)
def test_the_published_setting(name: str, generator: int) -> None:
    hparams = load_hparams(HPARAMS / f"{name}.yaml", {"data_folder": "x", "discriminator": None})
    assert plain_size(hparams["generator"]) == generator
    assert (hparams["adversarial_from"], hparams["segment"], hparams["batch_size"]) == (0, 8192, 16)
    assert (hparams["mel_weight"], hparams["feature_weight"]) == (45.0, 2.0)
    expected = {"bands": 80, "f_max": 8000.0, "f_min": 0.0, "hop": 256, "n_fft": 1024}
    assert hparams["mel"].config == {**expected, "sample_rate": 22050}
    assert hparams["loss_mel"].config == {**expected, "sample_rate": 22050, "f_max": 11025.0}
    for optimizer in (hparams["opt_g"], hparams["opt_d"]):
        assert optimizer.keywords == {"lr": 2e-4, "betas": [0.8, 0.99], "weight_decay": 0.01}
    assert set(hparams["schedule"]) == {"generator", "discriminator"}
    assert all(each.keywords == {"gamma": 0.999} for each in hparams["schedule"].values())
    assert hparams["schedule_every"] == "epoch"


def test_the_published_discriminator() -> None:
    judge = load_hparams(HPARAMS / "v1.yaml", {"data_folder": "x"})["discriminator"]
    # The lengths that weight norm adds are parameters too: one for each of 21,799 channels.
    assert sum(p.numel() for p in judge.parameters()) == 70_702_792 + 21_799
    assert len(judge.parts) == 8
