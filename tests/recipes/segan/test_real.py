"""Recorded speech: the layouts of the real corpora, and measures that others computed."""

import csv
from pathlib import Path

import pytest

from recipes.common.judges import Judges
from recipes.common.noisy_speech import speech_and_noise, voicebank
from recipes.common.pairs import Pairs
from tests.recipes.common.speakers import RATE
from tests.recipes.segan.test_train import KEYS, WARM, run

pytestmark = pytest.mark.real
FOLDERS = {"train": ["clean", "noisy"], "test": ["clean", "noisy"]}


def test_noisy_speech_scores_as_published(speech_data: Path) -> None:
    """PESQ, STOI and SNR of six pairs of VoiceBank-DEMAND, which came with them."""
    folder = speech_data / "voicebank_demand"
    sources = voicebank(str(folder), FOLDERS, valid=["p287_001"])["test"]
    with (folder / "pairs.csv").open(newline="") as file:
        published = {row["id"]: row for row in csv.DictReader(file)}
    with Judges(("pesq", "stoi", "si_snr", "csig", "cbak", "covl"), RATE) as judges:
        for item in Pairs(sources, RATE, fixed=True):
            judges.submit(item["id"], item["clean"], item["noisy"])
        found = judges.collect()
    assert list(found) == sorted(published)
    for id, scores in found.items():
        row = published[id]
        assert scores["pesq"] == pytest.approx(float(row["noisy_pesq_wb"]), abs=2e-3)
        assert scores["stoi"] == pytest.approx(float(row["noisy_stoi"]), abs=1e-3)
        assert scores["si_snr"] == pytest.approx(float(row["snr_db"]), abs=0.1)
        assert 1.0 <= scores["covl"] <= scores["csig"] + 1.0 <= 6.0


def test_voicebank(speech_data: Path, tmp_path: Path) -> None:
    folder = str(speech_data / "voicebank_demand")
    metrics = run(
        "voicebank", tmp_path, "--data_folder", folder, "--valid", "[p287_001]", "--times", "1",
        "--folders", "{train: [clean, noisy], test: [clean, noisy]}",
    )  # fmt: skip
    assert list(metrics) == KEYS
    assert metrics["pesq_noisy"] == pytest.approx(1.413, abs=0.002)


def test_librispeech_and_noises(speech_data: Path, tmp_path: Path) -> None:
    speech, noise = str(speech_data / "librispeech_3spk"), str(speech_data / "noise_cc")
    splits = {"train": ["19"], "valid": ["26"], "test": ["27"]}
    corpus = speech_and_noise(speech, noise, splits)
    assert sum(map(len, corpus.values())) == 197
    assert [len(corpus[split]) for split in splits] == [111, 27, 59]
    metrics = run(
        "real", tmp_path, *WARM, "--data_folder", speech, "--noise_folder", noise,
        "--splits", "{train: [19], valid: [26], test: [27]}",
        "--corpus.most", "{valid: 2, test: 3}",
    )  # fmt: skip
    assert list(metrics) == KEYS
