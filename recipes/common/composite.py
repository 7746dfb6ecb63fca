"""Composite measures of enhanced speech: what listeners would say of signal, background and all.

Y. Hu and P. Loizou, "Evaluation of objective quality measures for speech enhancement", IEEE
Transactions on Audio, Speech and Language Processing 16(1), 2008: regressions on opinions of
listeners, from the log-likelihood ratio, the weighted spectral slope, the segmental SNR and PESQ.
PESQ is wide-band here, as in all figures for VoiceBank-DEMAND.

F frames of 30 ms, three quarters of which overlap; N samples each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

KEPT = 0.95  # of the frames: the worst 5 % are outliers, and left out of the mean
SNR_RANGE = (-10.0, 35.0)  # dB; a frame beyond it is heard as one at its end
EPS = 1e-10

# Critical bands (Klatt, 1982): centres and widths in Hz.
CENTRES = np.array([
    50.0, 120.0, 190.0, 260.0, 330.0, 400.0, 470.0, 540.0, 617.372, 703.378, 798.717, 904.128,
    1020.38, 1148.30, 1288.72, 1442.54, 1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97,
    2978.04, 3276.17, 3597.63,
])  # fmt: skip
WIDTHS = np.array([
    70.0, 70.0, 70.0, 70.0, 70.0, 70.0, 70.0, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914,
    140.423, 153.823, 168.154, 183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126,
    321.465, 346.136,
])  # fmt: skip
PEAK_WEIGHT, LOCAL_WEIGHT = 20.0, 1.0  # Klatt's constants of the two weights


def composite(clean: Array, heard: Array, sample_rate: int, pesq: float) -> dict[str, float]:
    """Return the composite measures of a clip.

    Args:
        clean: samples (T,) of the clean speech.
        heard: samples (T,) of the enhanced speech.
        sample_rate: in Hz.
        pesq: wide-band PESQ of the clip.

    Returns:
        ``csig``, ``cbak`` and ``covl``, each from 1 to 5.
    """
    llr = log_likelihood_ratio(clean, heard, sample_rate)
    wss = weighted_spectral_slope(clean, heard, sample_rate)
    snr = segmental_snr(clean, heard, sample_rate)
    opinions = {
        "csig": 3.093 - 1.029 * llr + 0.603 * pesq - 0.009 * wss,
        "cbak": 1.634 + 0.478 * pesq - 0.007 * wss + 0.063 * snr,
        "covl": 1.594 + 0.805 * pesq - 0.512 * llr - 0.007 * wss,
    }
    return {name: float(np.clip(opinion, 1.0, 5.0)) for name, opinion in opinions.items()}


def log_likelihood_ratio(clean: Array, heard: Array, sample_rate: int) -> float:
    """Return the log-likelihood ratio of the linear predictors of ``heard`` and ``clean``; from 0.

    Of order 16 (10 below 10 kHz); the mean of the frames but for the worst 5 %.
    """
    order = 16 if sample_rate >= 10000 else 10
    target = _autocorrelation(_frames(clean, sample_rate), order)  # (F, order + 1)
    given = _autocorrelation(_frames(heard, sample_rate), order)
    lags = np.abs(np.arange(order + 1)[:, None] - np.arange(order + 1))
    covariance = target[:, lags]  # (F, order + 1, order + 1)
    own, other = (_predictor(each, lags[:-1, :-1]) for each in (target, given))
    best, worse = (np.einsum("fi,fij,fj->f", a, covariance, a) for a in (own, other))
    return _typical(np.log(np.maximum(worse, EPS) / np.maximum(best, EPS)))


def weighted_spectral_slope(clean: Array, heard: Array, sample_rate: int) -> float:
    """The squared difference of spectral slopes in 25 critical bands, weighted near peaks.

    In dB squared; the mean of the frames but for the worst 5 %.
    """
    first, second = (
        _band_levels(_frames(each, sample_rate), sample_rate) for each in (clean, heard)
    )
    one, other = np.diff(first, axis=1), np.diff(second, axis=1)  # (F, 24)
    weights = (_slope_weights(first, one) + _slope_weights(second, other)) / 2
    distance = (weights * (one - other) ** 2).sum(1) / weights.sum(1)
    return _typical(distance)


def segmental_snr(clean: Array, heard: Array, sample_rate: int) -> float:
    """The mean over frames of the SNR in dB, each limited to -10 to 35 dB."""
    target, given = (_frames(each, sample_rate) for each in (clean, heard))
    power, error = (target**2).sum(1), ((target - given) ** 2).sum(1)
    return float(np.clip(10 * np.log10((power + EPS) / (error + EPS)), *SNR_RANGE).mean())


def _frames(signal: Array, sample_rate: int) -> Array:
    """(T,) to windowed frames (F, N); what is shorter than one frame is padded to one."""
    length = round(0.03 * sample_rate)
    samples = signal.astype(np.float64)
    samples = np.pad(samples, (0, max(0, length - len(samples))))
    views = np.lib.stride_tricks.sliding_window_view(samples, length)[:: length // 4]
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1, length + 1) / (length + 1)))
    return views * window


def _autocorrelation(frames: Array, order: int) -> Array:
    """(F, N) to (F, order + 1)."""
    size = frames.shape[1]
    lags = [(frames[:, : size - lag] * frames[:, lag:]).sum(1) for lag in range(order + 1)]
    found = np.stack(lags, axis=1)
    found[:, 0] = found[:, 0] * (1 + 1e-9) + EPS  # A silent frame has a predictor too: none.
    return found


def _predictor(autocorrelation: Array, lags: Array) -> Array:
    """The error filter of linear prediction, (F, order + 1), its first entry being 1."""
    matrix = autocorrelation[:, lags]
    found = np.linalg.solve(matrix, autocorrelation[:, 1:, None])[:, :, 0]
    return np.concatenate([np.ones((len(found), 1)), -found], axis=1)


def _band_levels(frames: Array, sample_rate: int) -> Array:
    """(F, N) to the levels of the critical bands in dB, (F, 25)."""
    size = 1 << (2 * frames.shape[1] - 1).bit_length()
    power = np.abs(np.fft.rfft(frames, size)) ** 2 / size  # (F, size / 2 + 1)
    centres, widths = (np.asarray(each) * size / sample_rate for each in (CENTRES, WIDTHS))
    bins = np.arange(power.shape[1])
    shape = np.exp(-11 * ((bins - np.floor(centres)[:, None]) / widths[:, None]) ** 2)
    filters = shape * (WIDTHS.min() / WIDTHS)[:, None]
    filters[filters < np.exp(-30 / (2 * 2.303))] = 0.0  # -30 dB
    return 10 * np.log10(np.maximum(power @ filters.T, EPS))


def _slope_weights(levels: Array, slopes: Array) -> Array:
    """Klatt's weights of the slopes, (F, 24): large near the highest peak, and near the nearest."""
    below = levels[:, :-1]
    highest = levels.max(1, keepdims=True) - below
    nearest = _nearest_peak(levels, slopes) - below
    return PEAK_WEIGHT / (PEAK_WEIGHT + highest) * LOCAL_WEIGHT / (LOCAL_WEIGHT + nearest)


def _nearest_peak(levels: Array, slopes: Array) -> Array:
    """The level of the peak to which each band climbs: to the right where it rises, else left."""
    bands = slopes.shape[1]
    right, left = np.empty_like(slopes), np.empty_like(slopes)
    climbing = levels[:, -1]
    for band in reversed(range(bands)):
        climbing = np.where(slopes[:, band] > 0, climbing, levels[:, band])
        right[:, band] = climbing
    climbing = levels[:, 0]
    for band in range(bands):
        if band:  # Where a rise from the left ends, this band is the peak of those that fall after.
            climbing = np.where(slopes[:, band - 1] > 0, levels[:, band], climbing)
        left[:, band] = climbing
    return np.where(slopes > 0, right, left)


def _typical(distances: Array) -> float:
    kept = max(1, round(KEPT * len(distances)))
    return float(np.sort(distances)[:kept].mean())
