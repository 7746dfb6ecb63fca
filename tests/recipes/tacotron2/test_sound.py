"""Choice of what turns mels into sound: the right one, and only where the mels fit."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import trainer
from recipes.common.griffin_lim import GriffinLim
from recipes.common.mel import LogMel
from recipes.common.vocoder import Generator
from recipes.hifigan.vocoder import Vocoder
from recipes.tacotron2.sound import make_sound, write_sound
from trainer.options import RunOptions


def test_without_a_vocoder_it_is_griffin_and_lim() -> None:
    mel = LogMel(16000, 8, 512, 128)
    made = make_sound(mel)
    assert isinstance(made, GriffinLim)
    assert made(torch.zeros(8, 10)).shape == (1280,)


def test_a_vocoder_must_take_these_mels(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = LogMel(16000, 8, 512, 128)
    generator = Generator(8, 16, (8, 16), (16, 32), (3,), ((1,),), 1)
    modules = {"generator": generator, "mel": theirs}
    vocoder = Vocoder(modules, {"best": None}, RunOptions(device="cpu"))
    monkeypatch.setattr(trainer, "load", lambda run, device: vocoder)
    mel = torch.randn(8, 10)
    for given in ("run", vocoder):
        made = make_sound(LogMel(16000, 8, 512, 128), given)
        assert torch.equal(made(mel), vocoder.vocode(mel).samples[0])
        with pytest.raises(ValueError, match="takes mels with sample_rate=16000; .* have 22050"):
            make_sound(LogMel(22050, 8, 512, 128), given)
    assert make_sound(theirs, torch.sum) is torch.sum
    with pytest.raises(TypeError, match="vocoder is a int; allowed: a run folder or model of"):
        make_sound(theirs, 3)


def test_sounds_are_written_whole(tmp_path: Path) -> None:
    wave = torch.tensor([0.0, 0.5, -2.0, 2.0])
    write_sound(tmp_path / "new" / "a.wav", wave, 8000)
    data, rate = soundfile.read(tmp_path / "new" / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(data, [0, 0.5, -1, 1], atol=1e-4)
