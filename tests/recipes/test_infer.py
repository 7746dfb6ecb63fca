"""Every ``infer.py`` refuses, before it works, another recipe's run and what cannot be written."""

import importlib
import io
import os
import shlex
from pathlib import Path

import pytest

from tests.recipes.common.speakers import noise, write
from trainer.inference import loading

# An object of each recipe that the YAML of its run builds.
RUNS = {
    "asr": "text.Characters",
    "hifigan": "model.Discriminators",
    "metricgan": "discriminator.Discriminator",
    "segan": "model.Generator",
    "separation": "model.SepFormer",
    "tacotron2": "text.Characters",
}
WRITES = [name for name in RUNS if name != "asr"]


def run_of(recipe: str, folder: Path) -> Path:
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(f"thing: !new:recipes.{recipe}.{RUNS[recipe]}\n")
    return folder


def infer(recipe: str, run: Path, file: Path, output: Path) -> int:
    given = ["--text", "yes"] if recipe == "tacotron2" else [str(file)]
    given += ["-o", str(output)] if recipe in WRITES else []
    return int(importlib.import_module(f"recipes.{recipe}.infer").main([str(run), *given]))


@pytest.mark.parametrize("recipe", RUNS)
def test_a_run_of_another_recipe_is_refused_with_both_names(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.wav", noise(900))
    others = [name for name in RUNS if name != recipe]
    assert len(others) == 5
    for other in others:
        run = run_of(other, tmp_path / other)
        assert infer(recipe, run, file, tmp_path / "out" / "a.wav") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"is a run of recipes.{other}, not of recipes.{recipe}: its model can " in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RUNS)
def test_what_a_run_ends_with_is_a_command_of_infer(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.wav", noise(900)).rename(tmp_path / "FILE")
    run = run_of(recipe, tmp_path / "run")
    given = getattr(importlib.import_module(f"recipes.{recipe}"), "INFER", "FILE")
    made = importlib.import_module(f"recipes.{recipe}.infer")
    assert made.main([str(run), *shlex.split(given)]) == 2
    error = capsys.readouterr().err  # It has come as far as the run, which holds no model.
    assert "usage" not in error
    assert "run" in error


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail if a run is read."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the run was read")

    monkeypatch.setattr(loading, "Configuration", opened)


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize("recipe", WRITES)
def test_an_output_that_cannot_be_written_is_refused_before_the_run_is_read(
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, file = run_of(recipe, tmp_path / "run"), write(tmp_path / "a.wav", noise(900))
    (tmp_path / "file").write_text("no folder")
    for name in ("a.wav", "a_1.wav"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    for output, reason in (("file/a.wav", "is no folder"), ("taken/a.wav", "it is a folder")):
        target = tmp_path / output
        folder = target if recipe == "tacotron2" else target.parent
        assert infer(recipe, run, file, folder) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"cannot be written: {reason}" in error or error.endswith(f"{reason}\n")


def test_speech_is_written_as_a_kind_of_sound_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("tacotron2", tmp_path / "run")
    assert infer("tacotron2", run, run, tmp_path / "speech.mp3") == 2
    assert "speech.mp3 cannot be written: the name of a sound file ends in .wav, .flac" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize("recipe", WRITES)
def test_outputs_that_no_file_system_takes_are_refused_before_the_run_is_read(
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of(recipe, tmp_path / "run")
    file = write(tmp_path / f"{'n' * 250}.wav", noise(900))
    single = recipe == "tacotron2"
    if recipe in ("tacotron2", "separation"):  # The others keep the name.
        target = tmp_path / "out" / (f"{'n' * 252}.wav" if single else "")
        assert infer(recipe, run, file, target) == 2
        assert "its name has more than 255 bytes\n" in capsys.readouterr().err
    if Path("/proc/self").is_dir():  # Where even the superuser makes no file.
        short = file.rename(tmp_path / "a.wav")
        assert infer(recipe, run, short, Path("/proc/a.wav" if single else "/proc")) == 2
        assert "no file can be made in /proc" in capsys.readouterr().err


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for recipe in WRITES:
        run = run_of(recipe, tmp_path / recipe)
        assert infer(recipe, run, Path("~/a.wav"), Path("~/file/a.wav")) == 2
        assert f"{tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_a_name_as_long_as_may_be_is_written(tmp_path: Path) -> None:
    from recipes.common.writing import Kind, check_outputs, written

    path = tmp_path / "new" / f"{'n' * 251}.wav"
    check_outputs([path])
    with written(path, 8000, 1, Kind()) as file:
        file.write(noise(100).numpy())
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_name_that_the_terminal_cannot_write_is_no_error(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes.common.command import each_of, told

    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding))
    names = ["\u65e5.wav", os.fsdecode(b"Gr\xfc.wav")]
    assert told(lambda: each_of(names, lambda name: print(name, flush=True))) == 0
    expected = [b"\\u65e5.wav", b"Gr\\udcfc.wav"]
    if encoding == "utf-8":
        expected = ["\u65e5.wav".encode(), b"Gr\xfc.wav"]
    assert written.getvalue().splitlines() == expected
