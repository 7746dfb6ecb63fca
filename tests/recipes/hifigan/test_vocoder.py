"""Sounds from mels and from sounds, whole, in pieces, in batches and from files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from recipes.common.mel import LogMel, write_mel
from recipes.hifigan import vocoder
from recipes.hifigan.vocoder import Vocoder
from tests.recipes.common.test_vocoder import KINDS, make
from trainer.data import BadItem
from trainer.inference.results import Sound, Speech
from trainer.options import RunOptions


def speaking(kind: str = "first kind", **options: Any) -> Vocoder:
    generator = make(kind)
    mel = LogMel(8000, bands=5, n_fft=5 * generator.hop, hop=generator.hop)
    modules = {"generator": generator, "mel": mel}
    voice = Vocoder(modules, {"best": None}, RunOptions(device="cpu", **options))
    voice.modules.eval()
    voice.prepare()
    return voice


def whole_of(voice: Vocoder, mel: torch.Tensor) -> torch.Tensor:
    return voice.modules.generator(mel).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 7, 16, 100])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_pieces_join_to_the_whole(
    kind: str, frames: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = speaking(kind)
    monkeypatch.setattr(vocoder, "CHUNK", 16)
    mel = torch.randn(3, 5, frames)
    given = [each for piece in mel.split(size, -1) for each in (piece[..., :0], piece)]
    pieces = list(voice.vocode_stream(given))
    torch.testing.assert_close(torch.cat(pieces, -1), whole_of(voice, mel), rtol=0, atol=1e-6)
    assert not any(piece.is_inference() for piece in pieces)
    longest = (16 + voice.modules.generator.context) * voice.mel.hop
    assert all(piece.shape[-1] <= longest for piece in pieces)


@pytest.mark.parametrize("samples", [0, 1, 16, 17, 500, 1003])
@pytest.mark.parametrize("size", [7, 2000])
def test_a_signal_is_resynthesised_with_its_length_and_channels(samples: int, size: int) -> None:
    voice = speaking()
    wav = 0.1 * torch.randn(2, samples)
    pieces = list(voice.resynthesise_stream(wav.split(size, -1) if samples else []))
    assert sum(piece.shape[1] for piece in pieces) == samples
    assert all(len(piece) == 2 for piece in pieces)
    if samples == 1003:
        hop = voice.mel.hop
        whole = whole_of(voice, voice.mel(F.pad(wav, (0, -samples % hop))))[:, :samples]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


def waves(voice: Vocoder, number: int = 3, frames: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(number, frames * voice.mel.hop, generator=generator)


def test_a_mel_sounds_the_same_in_every_form(tmp_path: Path) -> None:
    voice = speaking()
    state = torch.get_rng_state()
    mel = voice.mel(waves(voice)[0])
    files = [tmp_path / "mel.npy", tmp_path / "mel.pt"]
    for file in files:
        write_mel(file, mel, voice.mel.config)
    speech = Speech(torch.zeros(1, 1), 8000, mel=mel, mel_config=voice.mel.config)
    learned = mel.double().requires_grad_()
    swapped = mel.numpy().astype(">f8")[:, ::-1]
    forms = [mel, mel.numpy(), swapped[:, ::-1], learned, files[0], str(files[1]), speech]
    found = voice.vocode(forms)
    assert len(found) == 7
    whole = whole_of(voice, mel[None])  # With its weight norm.
    for sound in found:
        assert isinstance(sound, Sound)
        assert (sound.rate, sound.samples.dtype) == (8000, torch.float32)
        assert not sound.samples.requires_grad
        assert not sound.samples.is_inference()
        torch.testing.assert_close(sound.samples, whole, rtol=0, atol=1e-5)
    assert torch.equal(voice.vocode(mel).samples, found[0].samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert voice.vocode([]) == []


def test_a_batch_of_mels_is_each_of_them() -> None:
    voice = speaking()
    mels = voice.mel(waves(voice, vocoder.AT_ONCE + 3))
    found = voice.vocode(mels)
    assert len(found) == vocoder.AT_ONCE + 3
    for one, mel in zip(found, mels, strict=True):
        alone = voice.vocode(mel).samples
        assert one.samples.shape == alone.shape == (1, 40 * voice.mel.hop)
        torch.testing.assert_close(one.samples, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 11025])
def test_a_sound_keeps_rate_length_and_channels_in_every_form(rate: int, tmp_path: Path) -> None:
    voice = speaking()
    numbers = (3000 * waves(voice, 2, 100)).round().clamp(-32768, 32767).short()
    soundfile.write(tmp_path / "two.wav", numbers.mT.numpy(), rate)
    floats = numbers / 32768
    given = [numbers, numbers.numpy(), floats, floats.double().numpy()]
    found = voice.vocode(given, rate=rate)
    found += voice.vocode([tmp_path / "two.wav", str(tmp_path / "two.wav"), Sound(floats, rate)])
    assert len(found) == 7
    for sound in found:
        assert sound.rate == rate
        assert sound.samples.shape == numbers.shape
        torch.testing.assert_close(sound.samples, found[0].samples, rtol=0, atol=1e-5)
    if rate == 8000:
        whole = whole_of(voice, voice.mel(floats))
        torch.testing.assert_close(found[0].samples, whole, rtol=0, atol=1e-5)
    one = voice.vocode(floats[0], rate=rate)
    torch.testing.assert_close(one.samples, found[0].samples[:1], rtol=0, atol=1e-5)


def test_what_is_no_mel_is_refused_with_its_name(tmp_path: Path) -> None:
    voice = speaking()
    good = torch.zeros(5, 4)
    wrong = torch.full((5, 600), 0.0)
    wrong[0, 599] = torch.nan
    other = LogMel(8000, bands=5, n_fft=40, hop=8, f_max=3000.0)
    write_mel(tmp_path / "other.pt", torch.zeros(5, 4), other.config)
    (tmp_path / "text.wav").write_text("no sound")
    speech = Speech(torch.zeros(1, 1), 8000, mel=good, mel_config=other.config)
    cases: list[tuple[Any, str]] = [
        (torch.zeros(4, 5), r"the mel: it has the shape \(4, 5\); expected: 5 bands before the"),
        (torch.zeros(100), r"the mel: it has the shape \(100,\); allowed: log-mels \(5, frames\)"),
        (np.zeros((5, 4), int), "the mel: a mel is a matrix .* of floats, not .*int64"),
        (np.full((5, 4), "a"), "the mel has values of <U1; allowed: real numbers"),
        (torch.zeros(5, 0), "the mel: its mel has no frames"),
        (torch.zeros(2, 3, 5, 4), "the mel: a mel is a matrix"),
        (torch.zeros(2, 6, 4), r"the batch: it has the shape \(2, 6, 4\)"),
        ([good, wrong], "the mel 2: its mel has values that are not finite numbers"),
        ([good, None], "sound 1 is a NoneType; allowed: a path"),
        ([good, [good]], "sound 1 is a list"),
        ([good, good[None]], "the mel 2: a mel is a matrix"),
        (good.to("meta"), "the mel is a tensor that is without content"),
        (tmp_path / "other.pt", "other.pt: its mel was made with f_max=3000.0; expected: 4000.0"),
        ([good, speech], "the speech 2: its mel was made with f_max=3000.0"),
        ([good, tmp_path / "none.npy"], "none.npy: it does not exist"),
        (tmp_path / "text.wav", "text.wav: it is not an audio file"),
    ]
    for given, told in cases:
        with pytest.raises((ValueError, TypeError), match=told):
            voice.vocode(given)
    with pytest.raises(ValueError, match="piece 2: it has the shape .* expected: 5 bands"):
        list(voice.vocode_stream([good, torch.zeros(6, 4)]))
    with pytest.raises(ValueError, match=r"piece 2: .* expected: as that of the first, \(5, fra"):
        list(voice.vocode_stream([good, good[None]]))
    with pytest.raises(TypeError, match="piece 1 is a str; allowed: a tensor or array"):
        list(voice.vocode_stream("mel.npy"))  # type: ignore[arg-type]
    with pytest.raises(BadItem, match="sound 2: 1 of its samples are not finite"):
        voice.vocode([good[0], torch.tensor([torch.nan])], rate=8000)
    with pytest.raises(ValueError, match="samples have 5 channels, .* a mel without a rate"):
        voice.vocode([good[0], good], rate=8000)
    assert voice.vocode(good[0], rate=8000).samples.shape == (1, 4)
    with pytest.raises(ValueError, match=r"the sound has the shape \(\)"):
        voice.vocode(np.array(3.0), rate=8000)
    with pytest.raises(ValueError, match="rate is 0; allowed"):
        voice.vocode(good[0], rate=0)


def test_networks_that_make_no_numbers_are_told_of() -> None:
    voice = speaking()
    torch.nn.init.constant_(voice.modules.generator.last.bias, torch.nan)
    with pytest.raises(BadItem, match="the mel: the network makes numbers of it that are not"):
        voice.vocode(torch.zeros(5, 4))


def test_the_precision_is_that_of_the_run() -> None:
    mel = speaking().mel(waves(speaking())[0])
    full, rough = speaking().vocode(mel), speaking(eval_precision="bf16").vocode(mel)
    assert rough.samples.dtype is torch.float32
    assert not torch.equal(rough.samples, full.samples)
    torch.testing.assert_close(rough.samples, full.samples, rtol=0, atol=0.05)
    same = speaking(precision="bf16", eval_precision="fp32").vocode(mel)
    assert torch.equal(same.samples, full.samples)
