"""Transcribing files with nothing but a run folder."""

import shutil
from pathlib import Path

import pytest

import trainer
from recipes.asr import infer
from recipes.asr.scoring import Scores
from recipes.asr.train import train
from recipes.asr.transcriber import Transcriber
from tests.recipes.asr.test_train import HPARAMS, TINY
from tests.recipes.common.speakers import sound
from tests.recipes.small_runs import moved_run
from trainer import load_hparams


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, moved to where it was not made."""
    folder = tmp_path_factory.mktemp("made")
    return moved_run(
        train, HPARAMS / "fsdd.yaml", folder, *TINY,
        "--data_folder", str(tones), "--corpus.strings", "{train: 12, valid: 4, test: 5}",
        "--average_checkpoints", "2", "--checkpointer.keep_last", "2", "--opt_class.lr", "0.1",
        "--batch_seconds", "60",
    )  # fmt: skip


def test_every_rate_channel_and_length_is_transcribed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        sound(tmp_path / "one.wav", 8000, 8000),
        sound(tmp_path / "stereo.flac", 66150, 44100, channels=2),
        sound(tmp_path / "short.wav", 16, 16000),
        sound(tmp_path / "two words.ogg", 32000, 16000),
    ]
    assert infer.main([str(run), *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(file) for file in files]
    assert all(line.count("\t") == 1 for line in lines)


def test_transcripts_are_those_of_the_test(run: Path, tones: Path) -> None:
    """The weights, the decoding and the precision are the same: so are the error rates."""
    model = trainer.load(run)
    assert isinstance(model, Transcriber)
    corpus = load_hparams(run / "hyperparams.yaml")["corpus"]()
    scores, rate = Scores(), model.hparams.sample_rate
    for cut in corpus["test"]:
        said = " ".join(each.text for each in cut.supervisions)
        scores.add([cut.id], [said], [str(model.transcribe(cut.load_audio(), rate))])
    first = (run / "wer_test.txt").read_text().splitlines()[0]
    rates = scores.rates()
    assert first.endswith(f"WER {rates['wer']:.2f} %, CER {rates['cer']:.2f} %")
    assert any(utterance.heard for utterance in scores.utterances)


def test_unusable_files_are_named_and_the_others_transcribed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.wav").write_text("no sound at all")
    good = sound(tmp_path / "good.wav", 8000, 8000)
    missing = tmp_path / "missing.wav"
    assert infer.main([str(run), str(missing), str(tmp_path / "text.wav"), str(good)]) == 2
    told = capsys.readouterr()
    assert told.out.startswith(f"{good}\t")
    assert told.out.count("\n") == 1
    assert f"error: {missing}: it does not exist" in told.err
    assert "text.wav: it is not an audio file" in told.err


def test_a_folder_that_is_no_run_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(sound(tmp_path / "good.wav", 8000, 8000))
    assert infer.main([str(tmp_path), good]) == 2
    assert f"error: {tmp_path} is no run folder: it has no hyperparams.yaml" in (
        capsys.readouterr().err
    )
    shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    assert infer.main([str(tmp_path / "empty"), good]) == 2
    assert "has no weights: neither checkpoints" in capsys.readouterr().err
