"""What turns mels into sound: the right one, and only where the mels fit."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes.common.griffin_lim import GriffinLim
from recipes.common.mel import LogMel
from recipes.common.vocoder import Generator, Vocoder
from recipes.tacotron2 import sound
from recipes.tacotron2.sound import make_sound, write_sound


def test_without_a_vocoder_it_is_griffin_and_lim() -> None:
    mel = LogMel(16000, 8, 512, 128)
    made = make_sound(mel)
    assert isinstance(made, GriffinLim)
    assert made(torch.zeros(8, 10)).shape == (1280,)


def test_a_vocoder_must_take_these_mels(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = LogMel(16000, 8, 512, 128)
    vocoder = Vocoder(Generator(8, 16, (8, 16), (16, 32), (3,), ((1,),), 1), theirs)
    monkeypatch.setattr(sound, "load_vocoder", lambda run, device: vocoder)
    assert make_sound(LogMel(16000, 8, 512, 128), "run") is vocoder
    told = "the vocoder run takes mels with sample_rate=16000; those that are .* have 22050"
    with pytest.raises(ValueError, match=told):
        make_sound(LogMel(22050, 8, 512, 128), "run")


def test_sounds_are_written_whole(tmp_path: Path) -> None:
    wave = torch.tensor([0.0, 0.5, -2.0, 2.0])
    write_sound(tmp_path / "new" / "a.wav", wave, 8000)
    data, rate = soundfile.read(tmp_path / "new" / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(data, [0, 0.5, -1, 1], atol=1e-4)
