"""Separation of recorded speech, in the layouts of real corpora."""

import math
from pathlib import Path

import pytest

from recipes.separation.mixing import Drawn, Mixing
from recipes.separation.speech import librispeech, listed
from recipes.separation.train import train
from tests.recipes.separation.test_train import HPARAMS, TINY
from trainer import cli

pytestmark = pytest.mark.real


def test_many_speakers_of_a_table_are_mixed(speech_data: Path) -> None:
    corpus = listed(str(speech_data / "speechocean762_1000"))
    people = {
        split: {cut.supervisions[0].speaker for cut in cuts} for split, cuts in corpus.items()
    }
    assert sum(map(len, people.values())) == len(set.union(*people.values())) == 127
    assert min(map(len, people.values())) >= 2
    dataset = Drawn(corpus["test"], Mixing(8000, seconds=2.0, resample=True), 10)
    for number in range(10):
        item = dataset[number]
        assert item["sources"].shape == (16000, 2)
        assert item["sources"].isfinite().all()


def test_three_speakers_of_librispeech_are_mixed(speech_data: Path, tmp_path: Path) -> None:
    folder = speech_data / "librispeech_3spk"
    corpus = librispeech(str(folder), {"train": ["train-clean-100"]}, str(tmp_path))
    mixing = Mixing(16000, speakers=3, seconds=4.0)
    item = Drawn(corpus["train"], mixing, 1, train=True)[0]
    assert item["sources"].shape == (64000, 3)
    genders = {cut.supervisions[0].speaker: cut.supervisions[0].gender for cut in corpus["train"]}
    assert genders == {"19": "female", "26": "male", "27": "male"}
    parts = dict.fromkeys(("train", "test"), ["train-clean-100"])
    with pytest.raises(ValueError, match="has 3 speakers; train, test need two each"):
        librispeech(str(folder), parts, str(tmp_path))


def test_recorded_speech_is_separated_and_scored(speech_data: Path, tmp_path: Path) -> None:
    metrics = cli.main(
        train,
        [str(HPARAMS / "real.yaml"), "--output_folder", str(tmp_path), *TINY["conv"], "--steps=2",
         "--schedule.warmup_steps=1", "--mixtures", "{train: 4, valid: 2, test: 3}",
         "--data_folder", str(speech_data / "speechocean762_1000")],
    )  # fmt: skip
    assert math.isfinite(metrics["si_snri"])
    assert math.isfinite(metrics["sdri"])
