"""The vocoder on recorded speech, and what an independent recogniser hears of its demo."""

import math
from pathlib import Path

import pytest

import trainer
from recipes.hifigan.data import folder
from recipes.hifigan.train import train
from recipes.hifigan.vocoder import Vocoder
from tests.recipes.hifigan.test_train import HPARAMS, TINY
from trainer import cli

pytestmark = pytest.mark.real


def test_ljspeech_is_read_and_split(speech_data: Path) -> None:
    corpus = folder(str(speech_data / "ljspeech_32"), valid=3, test=5)
    assert [len(corpus[split]) for split in ("train", "valid", "test")] == [24, 3, 5]
    assert {cut.sampling_rate for cuts in corpus.values() for cut in cuts} == {22050}
    assert len({cut.id for cuts in corpus.values() for cut in cuts}) == 32


def test_recordings_train_and_are_tested(speech_data: Path, tmp_path: Path) -> None:
    metrics = cli.main(
        train,
        [
            str(HPARAMS / "ljspeech.yaml"), "--output_folder", str(tmp_path), *TINY,
            "--data_folder", str(speech_data / "ljspeech_32"), "--corpus.valid", "1",
            "--corpus.test", "2", "--steps", "5",
        ],
    )  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    # Griffin-Lim needs no training, and hears what it is compared with.
    assert metrics["mel_l1_griffinlim"] < 0.4
    assert metrics["stoi_griffinlim"] > 0.8


@pytest.mark.long
def test_the_demo_says_what_was_said(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    from tests.benchmarks.vocoder_words import embedded, word_errors

    run = tmp_path / "run"
    arguments = ["--output_folder", str(run), "--no-progressbar"]
    metrics = cli.main(train, [str(HPARAMS / "demo.yaml"), *arguments])
    assert metrics["mel_l1"] <= 0.60
    vocoder = trainer.load(run, model=Vocoder)
    rates = word_errors(vocoder, list(embedded(vocoder, 36)))
    assert rates["resynthesis"] - rates["original"] <= 25.0
