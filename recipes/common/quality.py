"""Quality of enhanced speech against the clean speech: PESQ, STOI, SI-SNR, composites.

Everything here takes NumPy arrays and imports neither torch nor lhotse, so that the processes that
measure (`recipes.common.judges`) start quickly.

| name | what it is | from |
|---|---|---|
| ``pesq`` | wide-band PESQ, -0.5 to 4.64 | ITU-T P.862.2, package `pesq` |
| ``stoi`` | short-time objective intelligibility, 0 to 1 | Taal et al. (2011), package `pystoi` |
| ``si_snr`` | scale-invariant signal-to-noise ratio, dB | Le Roux et al. (2019) |
| ``csig``, ``cbak``, ``covl`` | predicted opinion of signal, background, all | Hu, Loizou (2008) |
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MEASURES = ("pesq", "stoi", "si_snr", "csig", "cbak", "covl")
COMPOSITE = frozenset({"csig", "cbak", "covl"})
EPS = 1e-10  # of a power, far below what 16 bits can hold


class NotMeasurable(ValueError):
    """Error of a measure that cannot be computed for a clip, with the reason."""


def require(measures: Collection[str], sample_rate: int) -> None:
    """Check that measures exist, can take this rate, and are installed.

    Raises ValueError for one that does not exist or cannot take the rate, and ImportError for one
    whose package is missing, with what to install and what goes without it.
    """
    for name in measures:
        if name not in MEASURES:
            raise ValueError(f"{name!r} is not a measure; allowed: {', '.join(MEASURES)}")
    needs_pesq = "pesq" in measures or bool(COMPOSITE & set(measures))
    if needs_pesq and sample_rate != 16000:
        raise ValueError(
            f"wide-band PESQ takes 16000 Hz, not {sample_rate} Hz; set sample_rate: 16000, or "
            "measures: [stoi, si_snr]"
        )
    if needs_pesq and importlib.util.find_spec("pesq") is None:
        raise ImportError(
            "PESQ needs the package pesq, which is compiled from source: have a C compiler and "
            "pip install 'cortex-speech[enhance]'; without one, set measures: [stoi, si_snr]"
        )
    if "stoi" in measures and importlib.util.find_spec("pystoi") is None:
        raise ImportError(
            "STOI needs the package pystoi: pip install pystoi (or 'cortex-speech[enhance]', which "
            "brings PESQ too and needs a C compiler)"
        )


def measure(
    clean: Array, heard: Array, measures: Sequence[str], sample_rate: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure a clip.

    Args:
        clean: samples (T,) of the clean speech.
        heard: samples (T,) of the enhanced speech.
        measures: names from ``MEASURES``.
        sample_rate: in Hz.

    Returns:
        The scores by measure; and the reasons, by measure, for those that cannot be computed, such
        as PESQ where it finds no speech.
    """
    known: dict[str, Callable[[], Mapping[str, float]]] = {
        "pesq": lambda: {"pesq": pesq(clean, heard, sample_rate)},
        "stoi": lambda: {"stoi": stoi(clean, heard, sample_rate)},
        "si_snr": lambda: {"si_snr": si_snr(clean, heard)},
    }
    scores: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in measures:
        try:
            if name in known:
                scores.update(known[name]())
            elif name not in scores:
                from recipes.common.composite import composite

                opinion = scores.get("pesq") or pesq(clean, heard, sample_rate)
                scores.update(composite(clean, heard, sample_rate, opinion))
        except NotMeasurable as error:
            reasons[name] = str(error)
    return {name: scores[name] for name in measures if name in scores}, reasons


def pesq(clean: Array, heard: Array, sample_rate: int = 16000) -> float:
    """Wide-band PESQ as MOS-LQO. Raises NotMeasurable where it finds no speech."""
    from pesq import PesqError
    from pesq import pesq as measured

    if not np.any(heard) or not np.any(clean):
        raise NotMeasurable("PESQ of silence")
    try:
        return float(measured(sample_rate, clean, heard, "wb"))
    except (PesqError, ValueError, ZeroDivisionError) as error:
        told = error.args[0] if error.args else type(error).__name__
        told = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
        raise NotMeasurable(f"PESQ: {told}") from error


def stoi(clean: Array, heard: Array, sample_rate: int) -> float:
    """STOI. Raises NotMeasurable for less than about 0.4 s of speech."""
    from pystoi import stoi as measured

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(measured(clean, heard, sample_rate))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise NotMeasurable("STOI: too little speech (it takes 0.4 s)") from error


def si_snr(clean: Array, heard: Array) -> float:
    """Scale-invariant SNR in dB of ``heard`` (T,); both are made free of their means first."""
    target = clean.astype(np.float64) - clean.mean(dtype=np.float64)
    estimate = heard.astype(np.float64) - heard.mean(dtype=np.float64)
    power = float(target @ target)
    if power <= EPS or not np.any(estimate):
        raise NotMeasurable("SI-SNR of silence")
    part = float(estimate @ target) / power * target
    rest = estimate - part
    return 10 * float(np.log10((part @ part + EPS) / (rest @ rest + EPS)))
