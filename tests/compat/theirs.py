"""Imports SpeechBrain for tests, which are skipped where it is not installed."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sb: Any = pytest.importorskip("speechbrain")
    import speechbrain.dataio.dataset
    import speechbrain.dataio.encoder
    import speechbrain.nnet.losses
    import speechbrain.nnet.schedulers
    import speechbrain.processing.features
    import speechbrain.utils.checkpoints
    import speechbrain.utils.epoch_loop  # noqa: F401

logging.getLogger("speechbrain").setLevel(logging.ERROR)
