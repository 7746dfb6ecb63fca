"""Composite measures and their parts have the properties that define them."""

import numpy as np
import pytest
from scipy.signal import lfilter

from recipes.common.composite import (
    composite,
    log_likelihood_ratio,
    segmental_snr,
    weighted_spectral_slope,
)
from tests.recipes.common.speakers import RATE, noise, voice

CLEAN = voice(2.0).numpy() + 1e-3 * noise(2 * RATE).numpy()
HISS = 0.02 * noise(len(CLEAN), 1).numpy()
PARTS = (log_likelihood_ratio, weighted_spectral_slope)


@pytest.mark.parametrize("part", PARTS)
def test_a_distance_is_0_to_itself_and_grows_with_the_noise(part) -> None:
    assert part(CLEAN, CLEAN, RATE) == pytest.approx(0, abs=1e-9)
    distances = [part(CLEAN, CLEAN + HISS * 4**k, RATE) for k in range(3)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("part", PARTS)
def test_spectral_distances_do_not_hear_gains(part) -> None:
    heard = CLEAN + HISS
    assert part(CLEAN, 3 * heard, RATE) == pytest.approx(part(CLEAN, heard, RATE), rel=1e-3)


def test_the_likelihood_ratio_of_known_predictors() -> None:
    """White noise through 1 / (1 - a z) against white noise: log of (1, -a) R (1, -a)' / ..."""
    white = noise(8 * RATE, 2).numpy()
    coloured = lfilter([1.0], [1.0, -0.8], white)
    # The flat predictor (1, 0, …) leaves all of the coloured signal's power, its own only 1 of it:
    # the ratio is 1 / (1 - a²), and the worst 5 % of frames are left out.
    found = log_likelihood_ratio(coloured, white, RATE)
    assert found == pytest.approx(-np.log(1 - 0.8**2), abs=0.15)


def test_segmental_snr_of_noise_in_a_known_ratio() -> None:
    steady = noise(2 * RATE, 3).numpy()
    error = noise(2 * RATE, 4).numpy()
    assert segmental_snr(steady, steady + 0.1 * error, RATE) == pytest.approx(20, abs=0.2)
    assert segmental_snr(steady, steady, RATE) == 35.0
    assert segmental_snr(steady, steady + 100 * error, RATE) == -10.0


def test_the_slope_of_one_band_decides() -> None:
    """A tone in another band is far away, one in the same band is near."""
    time = np.arange(RATE) / RATE
    tone, near, far = (np.sin(2 * np.pi * f * time) for f in (1000, 1010, 2000))
    distances = [weighted_spectral_slope(tone, each, RATE) for each in (near, far)]
    assert distances[0] < distances[1] / 5


def test_the_regressions() -> None:
    perfect = composite(CLEAN, CLEAN, RATE, 4.644)
    assert perfect == {"csig": 5.0, "cbak": 5.0, "covl": 5.0}
    heard = CLEAN + HISS
    llr, wss = (part(CLEAN, heard, RATE) for part in PARTS)
    snr = segmental_snr(CLEAN, heard, RATE)
    found = composite(CLEAN, heard, RATE, 2.5)
    # Hu and Loizou (2008), Table VI, rounded to three digits there.
    assert found["csig"] == pytest.approx(
        np.clip(3.093 - 1.029 * llr + 0.603 * 2.5 - 0.009 * wss, 1, 5)
    )
    assert found["cbak"] == pytest.approx(
        np.clip(1.634 + 0.478 * 2.5 - 0.007 * wss + 0.063 * snr, 1, 5)
    )
    assert found["covl"] == pytest.approx(
        np.clip(1.594 + 0.805 * 2.5 - 0.512 * llr - 0.007 * wss, 1, 5)
    )
    better = composite(CLEAN, heard, RATE, 3.0)
    assert all(better[name] > found[name] for name in found)


def test_silence_and_short_clips_give_numbers() -> None:
    silent = np.zeros(RATE)
    for clean, heard in ((silent, HISS[:RATE]), (CLEAN[:RATE], silent), (CLEAN[:100], HISS[:100])):
        assert all(1.0 <= score <= 5.0 for score in composite(clean, heard, RATE, 1.1).values())
