"""Saying texts with nothing but a run folder."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import soundfile

from recipes.tacotron2 import infer
from recipes.tacotron2.train import train
from tests.recipes.small_runs import moved_run
from tests.recipes.tacotron2.test_train import HPARAMS, RECORDED, TINY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason="needs the extra tts"
)


@pytest.fixture(scope="module")
def run(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    folder = tmp_path_factory.mktemp("made")
    return moved_run(
        train, HPARAMS / "ljspeech.yaml", folder, *TINY, *RECORDED,
        "--data_folder", str(recorded), "--longest_text", "40",
    )  # fmt: skip


def test_a_text_becomes_the_same_sound_each_time(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.wav", tmp_path / "new" / "two.wav"]
    for file in files:
        assert infer.main([str(run), "--text", "Dr. No has 2 cats.", "-o", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    found = soundfile.info(files[0])
    assert (found.samplerate, found.channels, found.subtype) == (22050, 1, "PCM_16")
    lines = capsys.readouterr().out.splitlines()
    path, seconds, text = lines[0].split("\t")
    assert path == str(files[0])
    assert float(seconds) == pytest.approx(found.duration, abs=0.01)
    assert text == "Dr. No has 2 cats."


def test_a_file_of_lines(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that cannot be said is named with its line, and the others are said."""
    lines = tmp_path / "lines.txt"
    lines.write_text(f"yes\n\nñandú bird\n{'very ' * 20}long\nno\n", encoding="utf-8")
    assert infer.main([str(run), "--file", str(lines), "-o", str(tmp_path / "said")]) == 2
    assert sorted(each.name for each in (tmp_path / "said").iterdir()) == ["0001.wav", "0005.wav"]
    told = capsys.readouterr()
    assert told.out.count("\n") == 2
    for sentence in (
        f"error: there is no text to say in line 2 of {lines}\n",
        f"error: the text front end does not know 'ñ' in line 3 of {lines} at character 1; "
        f"'ú' in line 3 of {lines} at character 5\n",
        f"error: line 4 of {lines} has 105 symbols; the model has learned to align up to 40: "
        "divide it into sentences\n",
    ):
        assert sentence in told.err


def test_a_gate_that_does_not_stop_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer.main([str(run), "--text", "yes", "-o", str(tmp_path / "a.wav")]) == 0
    seconds = soundfile.info(tmp_path / "a.wav").duration
    warned = "warning: the text was cut at 0.5 s: the gate did not stop it" in (
        capsys.readouterr().err
    )
    assert warned == (seconds > 0.49)


def test_what_cannot_be_used_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: object) -> str:
        assert infer.main([*map(str, arguments), "-o", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "is no run folder: it has no hyperparams.yaml" in error(tmp_path, "--text", "yes")
    (tmp_path / "none.txt").touch()
    assert "none.txt is empty: there is no text to say" in error(
        run, "--file", tmp_path / "none.txt"
    )
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "bytes.txt is text in UTF-16 or UTF-32" in error(run, "--file", tmp_path / "bytes.txt")
    assert "missing.txt is not there" in error(run, "--file", tmp_path / "missing.txt")
    assert "hyperparams.yaml" in error(run, "--text", "yes", "--vocoder", tmp_path)
    assert (
        f"the vocoder {run} is a model of another kind: it has synthesise, not vocode\n"
        in error(run, "--text", "yes", "--vocoder", run)
    )
    shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no weights: neither checkpoints" in error(tmp_path / "empty", "--text", "yes")
    # A run from elsewhere names no folder of this machine.
    shutil.copytree(run, tmp_path / "far")
    yaml = (tmp_path / "far" / "hyperparams.yaml").read_text()
    yaml = yaml.replace("vocoder: null", f"vocoder: {tmp_path}")
    (tmp_path / "far" / "hyperparams.yaml").write_text(yaml)
    far = error(tmp_path / "far", "--text", "yes")
    assert (
        f"the vocoder of the run, '{tmp_path}' lies outside of {tmp_path / 'far'}: name it" in far
    )
