"""Sound that can be had from mels without training."""

import math

import pytest
import torch

from recipes.common.griffin_lim import GriffinLim
from recipes.common.mel import LogMel


def front() -> LogMel:
    return LogMel(16000, bands=80)


def vowel(samples: int) -> torch.Tensor:
    """A buzz of 150 Hz whose timbre changes."""
    time = torch.arange(samples) / 16000
    parts = [
        torch.sin(2 * math.pi * 150 * k * time) / k * (1 + 0.5 * torch.sin(2 * math.pi * k * time))
        for k in range(1, 30)
    ]
    return 0.1 * torch.stack(parts).sum(0)


def test_it_has_the_mels_that_were_given() -> None:
    mel = front()
    given = mel(vowel(16384))
    found = mel(GriffinLim(mel, iterations=30)(given))
    assert found.shape == given.shape
    assert float((found - given).abs().mean()) < 0.3


def test_frames_are_where_they_were() -> None:
    """No shift: a click comes back where it was, to a fraction of a hop."""
    wav = torch.zeros(16384)
    wav[8000] = 1.0
    found = GriffinLim(front(), iterations=10)(front()(wav))
    assert abs(int(found.abs().argmax()) - 8000) < 128


def test_the_same_mels_sound_the_same_every_time() -> None:
    mel, voice = front()(vowel(8192)), GriffinLim(front(), iterations=3)
    assert torch.equal(voice(mel), voice(mel))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_few_frames_are_enough(frames: int) -> None:
    found = GriffinLim(front(), iterations=2)(torch.full((80, frames), -3.0))
    assert found.shape == (frames * 256,)
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) <= 1.0
