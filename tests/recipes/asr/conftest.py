"""Small corpora in the layouts of the real ones."""

from pathlib import Path

import numpy as np
import pytest
import soundfile


def tone(digit: int, seconds: float, rate: int, seed: int) -> np.ndarray:
    """A sound that tells its digit by its pitch, with some noise of its own."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0.0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * (300 + 300 * digit) * time) + noise).astype(np.float32)


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten takes of ten digits by two speakers, as the Free Spoken Digit Dataset has them."""
    folder = tmp_path_factory.mktemp("tones") / "recordings"
    folder.mkdir()
    for digit in range(10):
        for take in range(10):
            for number, speaker in enumerate(("ann", "bob")):
                sound = tone(
                    digit, 0.3 + 0.05 * number, 8000, seed=100 * digit + 10 * number + take
                )
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", sound, 8000)
    return folder.parent
