"""The whole recipe from a command line to measures, for every YAML."""

import importlib.util
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import trainer
from recipes.metricgan import infer
from recipes.metricgan.discriminator import UtteranceNorm
from recipes.metricgan.train import train
from tests.recipes.common.speakers import RATE, noise, voice
from tests.trainer.shown import kinds_shown
from trainer import cli
from trainer.config.hyperparameters import load_hparams

HPARAMS = Path(__file__).parents[3] / "hparams" / "metricgan"
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pesq", "pystoi"))), reason="needs the extra enhance"
)
PHASE = "!new:recipes.metricgan.phases.Phase"
PHASES = (
    f"[{PHASE} {{name: warm_up, epochs: 1, items: 2, batch_size: 1, passes: [spectral]}}, "
    f"{PHASE} {{name: metric, epochs: 2, items: 2, batch_size: 1}}]"
)
BRIEF = PHASES.replace("epochs: 2", "epochs: 1")  # PESQ takes most of the time
TINY = [
    "--units=4", "--generator.layers=1", "--generator.width=4", "--discriminator.channels=2",
    "--num_workers=0", "--judges=0", "--device=cpu", "--no-progressbar", "--log_interval=1",
    "--precision=fp32", "--extremes=1",
]  # fmt: skip
KEYS = [
    "pesq",
    "pesq_noisy",
    "stoi",
    "stoi_noisy",
    "si_snr",
    "si_snr_noisy",
    "csig",
    "cbak",
    "covl",
]


def run(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    given = [str(HPARAMS / f"{name}.yaml"), "--output_folder", str(folder), *TINY, *arguments]
    return cli.main(train, given)


def check(folder: Path, metrics: dict[str, float], printed: str, phases: list[str]) -> None:
    """Each phase has told what it came to, and the last line is that of the test."""
    lines = printed.splitlines()
    found = [line.split(":")[0] for line in lines if line.split(":")[0] in (*phases, "test")]
    assert found == [*phases, "test"]
    for first, second in pairwise(phases):
        added = metrics["pesq"] - metrics[f"pesq_{first}"]  # of the last of two
        assert f"{second} adds to {first}: pesq {added:+.3f}, standard error " in printed
    before = [f"pesq_{phase}" for phase in phases[:-1]]
    assert list(metrics) == [*KEYS, *before]
    assert lines[-1].startswith("test: pesq=")
    stages = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages[-1] == {"kind": "stage", "stage": "test", **metrics}
    assert (folder / "scores_test.csv").is_file()
    assert len(list((folder / "audio_test").iterdir())) == 6
    sounds = dict.fromkeys(("noisy", "enhanced", "clean"), "audio")
    shown = kinds_shown(folder)
    assert {"pesq": "number", "stoi noisy": "number", **sounds}.items() <= shown.items()
    assert sounds.items() <= kinds_shown(folder, "valid").items()
    assert not (folder / "audio_valid").exists()


def write(path: Path, wav: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav.numpy(), RATE)


def speech(number: int, seconds: float = 1.2) -> torch.Tensor:
    return 0.5 * voice(seconds) + 0.002 * noise(round(seconds * RATE), number)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in the layout of VoiceBank-DEMAND."""
    folder = tmp_path_factory.mktemp("voicebank")
    for split, names in (
        ("trainset_28spk", ["p225_001", "p225_002", "p226_001"]),
        ("testset", ["p232_001", "p232_002"]),
    ):
        for number, name in enumerate(names):
            clean = speech(number)
            write(folder / f"clean_{split}_wav" / f"{name}.wav", clean)
            noisy = clean + 0.05 * noise(len(clean), number + 9)
            write(folder / f"noisy_{split}_wav" / f"{name}.wav", noisy)
    return folder


@pytest.fixture(scope="module")
def voicebank(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run") / "voicebank"
    run("voicebank", folder, "--data_folder", str(pairs), "--phases", PHASES)
    return folder


def test_there_is_a_test_for_every_yaml() -> None:
    assert sorted(path.stem for path in HPARAMS.glob("*.yaml")) == ["demo", "real", "voicebank"]


def test_voicebank(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For the metric that needs no compiler, and in a run that is gone on with."""
    arguments = [
        "--data_folder", str(pairs), "--phases", PHASES, "--target", "stoi", "--valid_measures",
        "[si_snr]", "--measures", "[stoi, si_snr]",
    ]  # fmt: skip
    metrics = run("voicebank", tmp_path / "run", *arguments)
    assert list(metrics) == ["stoi", "stoi_noisy", "si_snr", "si_snr_noisy", "stoi_warm_up"]
    first = capsys.readouterr().out
    assert run("voicebank", tmp_path / "run", *arguments) == metrics
    assert capsys.readouterr().out == first


@pytest.mark.usefixtures("empty_speech_cache")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--corpus.train", "6", "--corpus.valid", "1", "--corpus.test", "2"]
    sizes = ["--segment", "16000", "--phases", BRIEF]
    metrics = run("demo", tmp_path / "run", *counts, *sizes)
    check(tmp_path / "run", metrics, capsys.readouterr().out, ["warm_up", "metric"])


def test_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, chapter in (("train-clean-100", 1), ("dev-clean", 2), ("test-clean", 3)):
        for number in range(2):
            name = f"{chapter}-7-{number:04d}.flac"
            write(tmp_path / "speech" / split / f"{chapter}" / "7" / name, speech(number))
    for number in range(3):
        write(tmp_path / "noise" / f"place{number}_L.wav", 0.1 * noise(30000, number))
    arguments = [
        "--data_folder", str(tmp_path / "speech"), "--noise_folder", str(tmp_path / "noise"),
        "--segment", "16000", "--phases", BRIEF,
    ]  # fmt: skip
    metrics = run("real", tmp_path / "run", *arguments)
    check(tmp_path / "run", metrics, capsys.readouterr().out, ["warm_up", "metric"])


def test_the_published_setting() -> None:
    hparams = load_hparams(HPARAMS / "voicebank.yaml", {"data_folder": "VBD"})
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in hparams["modules"].items()}
    assert sizes == {"generator": 1_895_514, "discriminator": 19_010}
    (phase,) = hparams["phases"]
    assert (phase.epochs, phase.items, phase.batch_size) == (750, 100, 1)
    assert phase.passes == ["enhance", "current", "history", "current", "generator"]
    assert hparams["history"].share == 0.2
    assert hparams["spectrum"].size == hparams["hearing"].size == 512
    assert hparams["spectrum"].gain == hparams["hearing"].gain == 1.0
    assert hparams["hearing"].filters is None
    assert isinstance(hparams["discriminator"].norm, UtteranceNorm)
    assert hparams["opt_metric"] is None
    plain = ("spectral_weight", "variations", "within_weight")
    assert [hparams[name] for name in plain] == [0, 0, 0]
    for name in ("opt_d", "opt_g"):
        assert hparams[name]([torch.zeros(1)]).defaults["lr"] == 5e-4


# ---------------------------------------------------------------------------------------- inference


def test_files_keep_rate_length_and_channels(
    voicebank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing but the run folder, wherever it lies now; and as the network does it at once."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(voicebank, moved)
    stereo = torch.stack([voice(1.0), 0.1 * noise(RATE, 3)], 1)
    soundfile.write(tmp_path / "stereo.flac", stereo[:8000].numpy(), 8000)
    wav = voice(1.0)
    soundfile.write(tmp_path / "mono.wav", wav.numpy(), RATE, subtype="FLOAT")
    (tmp_path / "broken.wav").write_text("no sound")
    names = ["stereo.flac", "mono.wav", "broken.wav"]
    output = tmp_path / "out"
    files = [str(tmp_path / name) for name in names]
    assert infer.main([str(moved), *files, "-o", str(output)]) == 2
    told = capsys.readouterr()
    assert [line.split("\t")[0] for line in told.out.splitlines()] == files[:2]
    assert "broken.wav: it is not an audio file" in told.err
    header = soundfile.info(output / "stereo.flac")
    assert (header.samplerate, header.channels, header.frames) == (8000, 2, 8000)
    model: Any = trainer.load(moved)
    expected = model.network(wav[None])[0]
    found = torch.from_numpy(soundfile.read(output / "mono.wav", dtype="float32")[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_chunks_join_as_the_whole(voicebank: Path) -> None:
    """But for what a chunk's ends cannot know, which the overlap hides."""
    from recipes.common.streaming import Chunks, enhance_signal

    model: Any = trainer.load(voicebank)
    wav = torch.cat([voice(1.5), 0.05 * noise(RATE, 1), voice(1.0)])[None]
    whole = model.network(wav)
    chunked = enhance_signal(wav, model.network, Chunks(RATE, RATE // 4, 4))
    assert chunked.shape == whole.shape
    assert (chunked - whole).norm() < 0.05 * whole.norm()


def test_a_folder_that_is_no_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer.main([str(tmp_path), "a.wav", "-o", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path} is no run folder: it has no hyperparams.yaml" in (
        capsys.readouterr().err
    )
