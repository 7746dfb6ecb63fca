"""Resynthesis of files and mels with nothing but a run folder."""

import shutil
from pathlib import Path

import pytest
import soundfile
import torch

import trainer
from recipes.common.mel import LogMel, write_mel
from recipes.hifigan import infer, vocoder
from recipes.hifigan.train import HiFiGAN, train
from recipes.hifigan.vocoder import Vocoder
from tests.recipes.common.speakers import sound
from tests.recipes.hifigan.test_train import HELD_OUT, HPARAMS, TINY, noises
from tests.recipes.small_runs import moved_run
from trainer import Stage, cli
from trainer.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    folder = tmp_path_factory.mktemp("made")
    data = noises(folder / "data", number=6)
    given = ["--data_folder", str(data), *HELD_OUT, "--checkpointer.keep_last", "3",
             "--steps", "3", "--opt_g.lr", "0.01", "--segment", "8192"]  # fmt: skip
    return moved_run(train, HPARAMS / "v3.yaml", folder, *TINY, *given)


def made(run: Path, folder: Path, *files: Path) -> int:
    return infer.main([str(run), *map(str, files), "-o", str(folder)])


def test_rate_length_and_channels_stay(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        sound(tmp_path / "one.wav", 30001, 22050),
        sound(tmp_path / "stereo.flac", 20000, 44100, channels=2),
        sound(tmp_path / "short.wav", 3, 16000),
        sound(tmp_path / "float.wav", 5000, 8000, subtype="FLOAT"),
        sound(tmp_path / "voice.ogg", 12345, 16000),
    ]
    assert made(run, tmp_path / "out", *files) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(file) for file in files]
    for file, (_, result) in zip(files, lines, strict=True):
        was, now = soundfile.info(file), soundfile.info(result)
        assert (now.samplerate, now.frames, now.channels) == (
            was.samplerate, was.frames, was.channels,
        )  # fmt: skip
        if file.suffix != ".ogg":
            assert (now.format, now.subtype) == (was.format, was.subtype)


def test_a_long_file_is_what_it_would_be_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sound(tmp_path / "long.wav", 40 * 2048, 22050, subtype="FLOAT")
    voice = trainer.load(run, model=Vocoder)
    monkeypatch.setattr(vocoder, "CHUNK", 64)
    assert made(run, tmp_path / "out", path) == 0
    wav, found = (
        torch.from_numpy(soundfile.read(each, dtype="float32")[0])
        for each in (path, tmp_path / "out" / "long.wav")
    )
    whole = voice.modules.generator(voice.mel(wav)[None])[0].detach()
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(voice.vocode(path).samples[0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_a_mel_file_becomes_sound(run: Path, tmp_path: Path, suffix: str) -> None:
    voice = trainer.load(run, model=Vocoder)
    mel = voice.mel(0.1 * torch.randn(256 * 300))
    write_mel(tmp_path / f"said{suffix}", mel, voice.mel.config)
    assert made(run, tmp_path / "out", tmp_path / f"said{suffix}") == 0
    found, rate = soundfile.read(tmp_path / "out" / "said.wav", dtype="float32")
    assert rate == 22050
    samples = voice.vocode(tmp_path / f"said{suffix}").samples
    assert torch.equal(samples, voice.vocode(mel).samples)
    torch.testing.assert_close(torch.from_numpy(found), samples[0], rtol=0, atol=1e-4)


def test_a_mel_of_another_configuration_names_the_parameter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = LogMel(22050, f_max=7000.0)
    write_mel(tmp_path / "other.npy", other(torch.randn(8192)), other.config)
    wrong = torch.full((80, 4), float("nan"))
    write_mel(tmp_path / "wrong.pt", wrong, trainer.load(run, model=Vocoder).mel.config)
    good = sound(tmp_path / "good.wav", 5000, 22050)
    assert made(run, tmp_path / "out", tmp_path / "other.npy", tmp_path / "wrong.pt", good) == 2
    told = capsys.readouterr()
    assert "other.npy: its mel was made with f_max=7000.0; expected: 8000.0" in told.err
    assert "wrong.pt: its mel has values that are not finite numbers" in told.err
    assert told.out.startswith(f"{good}\t")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.wav"]


def test_unusable_files_and_folders_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.wav").write_text("no sound at all")
    assert made(run, tmp_path / "out", tmp_path / "text.wav", tmp_path / "missing.wav") == 2
    told = capsys.readouterr().err
    assert "text.wav: it is not an audio file" in told
    assert "missing.wav: it does not exist" in told
    good = sound(tmp_path / "good.wav", 5000, 22050)
    assert made(tmp_path, tmp_path / "out", good) == 2
    assert f"{tmp_path} is no run folder: it has no hyperparams.yaml" in capsys.readouterr().err
    assert made(run, tmp_path, good) == 2
    assert "would overwrite itself" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    assert made(tmp_path / "empty", tmp_path / "out", good) == 2
    assert "has no weights: neither checkpoints" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "hyperparams.yaml").write_text("mel: 1\n")
    assert made(tmp_path / "other", tmp_path / "out", good) == 2
    assert f"{tmp_path / 'other' / 'hyperparams.yaml'} builds no modules" in capsys.readouterr().err


def test_the_weights_are_those_that_were_tested(run: Path) -> None:
    checkpoints = Checkpointer(run / "checkpoints")
    (newest, *others) = checkpoints.list_checkpoints()
    assert others
    saved = checkpoints.read(newest)["brain"]["modules"]
    voice = trainer.load(run)
    assert isinstance(voice, Vocoder)
    assert voice.tasks() == ["vocode"]
    trained = voice.modules.state_dict()
    assert trained.keys() == {name for name in saved if name.startswith("generator.")}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trained.items())
    assert voice.hparams.discriminator is None  # It may be many times larger.
    assert isinstance(trainer.load(run, brain=HiFiGAN), HiFiGAN)


def test_the_best_weights_are_found_where_the_test_took_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a metric that is best after the first of three epochs, and of the mean over steps."""
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(
        HiFiGAN, "on_stage_end",
        lambda brain, stage, *_: {"mel_l1": next(scores)} if stage is Stage.VALID else None,
    )  # fmt: skip
    data = noises(tmp_path / "data", number=5)
    given = ["--data_folder", str(data), *HELD_OUT, "--checkpointer.keep_last", "3", "--best",
             "mel_l1", "--ema_decay", "0.5", "--opt_g.lr", "0.01", "--steps", "3"]  # fmt: skip
    folder = tmp_path / "run"
    cli.main(train, [str(HPARAMS / "v3.yaml"), "--output_folder", str(folder), *TINY, *given])
    checkpoints = Checkpointer(folder / "checkpoints")
    first = checkpoints.list_checkpoints()[-1]
    assert f"testing with the weights of {first.path.name}" in (folder / "train.log").read_text()
    saved = checkpoints.read(first)["brain"]
    name, voice = "generator.first.bias", trainer.load(folder, model=Vocoder)
    mean = saved["ema"]["average"][name]
    assert torch.equal(voice.modules.generator.first.bias.detach(), mean)
    assert not torch.equal(mean, saved["modules"][name])
