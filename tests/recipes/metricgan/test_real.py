"""Recorded speech in the layouts of the real corpora, from files to measures."""

from pathlib import Path

import pytest

from tests.recipes.metricgan.test_train import KEYS, PHASES, run

pytestmark = pytest.mark.real


def test_voicebank(speech_data: Path, tmp_path: Path) -> None:
    """Whole recordings of unlike lengths, in the published layout; noisy, they score as known."""
    metrics = run(
        "voicebank", tmp_path, "--data_folder", str(speech_data / "voicebank_demand"),
        "--valid", "[p287_001]", "--folders", "{train: [clean, noisy], test: [clean, noisy]}",
        "--phases", PHASES,
    )  # fmt: skip
    assert list(metrics) == [*KEYS, "pesq_warm_up"]
    assert metrics["pesq_noisy"] == pytest.approx(1.413, abs=0.002)


def test_librispeech_and_noises(speech_data: Path, tmp_path: Path) -> None:
    speech, noise = str(speech_data / "librispeech_3spk"), str(speech_data / "noise_cc")
    metrics = run(
        "real", tmp_path, "--data_folder", speech, "--noise_folder", noise, "--phases", PHASES,
        "--splits", "{train: [19], valid: [26], test: [27]}",
        "--corpus.most", "{valid: 2, test: 3}",
    )  # fmt: skip
    assert list(metrics) == [*KEYS, "pesq_warm_up"]
