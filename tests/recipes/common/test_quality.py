"""Measures of quality behave as their papers say, and tell what they cannot measure."""

import importlib.util

import numpy as np
import pytest

from recipes.common import quality
from recipes.common.quality import NotMeasurable, measure, require, si_snr
from tests.recipes.common.speakers import RATE, noise, voice

needs_enhance = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pesq", "pystoi"))), reason="needs the extra enhance"
)
CLEAN = voice(2.0).numpy()
HISS = 0.02 * noise(len(CLEAN)).numpy()


def test_si_snr_is_a_ratio_in_decibels_that_no_gain_changes() -> None:
    orthogonal = HISS - HISS.mean()
    target = CLEAN - CLEAN.mean()
    orthogonal = orthogonal - (orthogonal @ target) / (target @ target) * target
    orthogonal *= np.linalg.norm(target) / np.linalg.norm(orthogonal)
    for snr in (-3.0, 0.0, 17.0):
        heard = CLEAN + 10 ** (-snr / 20) * orthogonal
        assert si_snr(CLEAN, heard) == pytest.approx(snr, abs=1e-3)
        assert si_snr(CLEAN, 0.3 * heard + 0.5) == pytest.approx(snr, abs=1e-3)
    assert si_snr(CLEAN, CLEAN) > 60
    for silent in ((CLEAN, 0 * CLEAN), (0 * CLEAN, CLEAN)):
        with pytest.raises(NotMeasurable, match="SI-SNR of silence"):
            si_snr(*silent)


@needs_enhance
def test_less_noise_is_better_by_every_measure() -> None:
    levels = (0.015, 0.06, 0.25, 1.0)
    louder = [measure(CLEAN, CLEAN + HISS * k, quality.MEASURES, RATE)[0] for k in levels]
    for name in quality.MEASURES:
        scores = [each[name] for each in louder]
        assert scores == sorted(scores, reverse=True), name
        assert scores[0] > scores[-1] + 0.04, name
    same, reasons = measure(CLEAN, CLEAN, quality.MEASURES, RATE)
    assert list(same) == list(quality.MEASURES)
    assert not reasons
    assert same["pesq"] == pytest.approx(4.644, abs=0.001)  # the most that P.862.2 gives
    assert same["stoi"] == pytest.approx(1.0, abs=1e-3)
    assert same["csig"] == same["covl"] == 5.0


@needs_enhance
def test_what_cannot_be_measured_has_a_reason_and_the_rest_a_score() -> None:
    scores, reasons = measure(CLEAN[:2000], CLEAN[:2000] + HISS[:2000], quality.MEASURES, RATE)
    assert list(scores) == ["si_snr"]
    assert set(reasons) == {"pesq", "stoi", "csig", "cbak", "covl"}
    assert reasons["pesq"].startswith("PESQ: ")
    assert reasons["stoi"] == "STOI: too little speech (it takes 0.4 s)"
    scores, reasons = measure(0 * CLEAN, CLEAN, ["pesq"], RATE)
    assert (scores, reasons) == ({}, {"pesq": "PESQ of silence"})


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"have a C compiler and pip install 'cortex-speech\[enh"):
        require(["csig"], RATE)
    with pytest.raises(ImportError, match=r"STOI needs the package pystoi: pip install pystoi"):
        require(["stoi"], RATE)
    require(["si_snr"], RATE)


def test_wrong_names_and_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'sdr' is not a measure; allowed: pesq, stoi, si_snr, "):
        require(["sdr"], RATE)
    with pytest.raises(ValueError, match="wide-band PESQ takes 16000 Hz, not 8000 Hz; set sample"):
        require(["pesq"], 8000)
