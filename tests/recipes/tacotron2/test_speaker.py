"""Speech from texts: alone and in batches, by every kind of vocoder."""

import threading
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import trainer
from recipes.common.mel import LogMel
from recipes.common.vocoder import Generator
from recipes.hifigan.vocoder import Vocoder
from recipes.tacotron2.speaker import AT_ONCE, Speaker
from recipes.tacotron2.text import Characters
from tests.recipes.small_runs import make_run
from tests.recipes.tacotron2.conftest import tacotron
from trainer.inference.results import Speech
from trainer.options import RunOptions

TEXTS = ["Yes.", "Dr. No has 2 cats.", "a", "The door is open."]
MEL = {"sample_rate": 8000, "bands": 6, "n_fft": 64, "hop": 16}


def speaking(reduction: int = 2, rest: bool = True, **changes: Any) -> Speaker:
    torch.manual_seed(0)
    front = Characters()
    model = tacotron(reduction, symbols=len(front))
    model.rest = rest
    gate = model.net.decoder.gate_layer  # It ends some of the texts at once, and others never.
    gate.weight.data.mul_(30)
    gate.bias.data.fill_(-2.3)
    hparams = {
        "front": front, "mel": LogMel(**MEL), "longest": 0.2, "longest_text": 40, "vocoder": None,
        **changes,
    }  # fmt: skip
    speaker = Speaker({"model": model}, hparams, RunOptions(device="cpu"))
    speaker.modules.eval()
    return speaker


def vocoder(**changes: Any) -> Vocoder:
    torch.manual_seed(1)
    generator = Generator(6, 8, (4, 4), (8, 8), (3,), ((1,),), 1)
    modules = {"generator": generator, "mel": LogMel(**{**MEL, **changes})}
    return Vocoder(modules, {"best": None}, RunOptions(device="cpu"))


def assert_alike(one: Speech, other: Speech, tolerance: float) -> None:
    assert (one.text, one.symbols, one.rate) == (other.text, other.symbols, other.rate)
    assert one.finished == other.finished
    for name in ("samples", "mel", "alignment"):
        left, right = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reduction", [1, 3])
def test_speech_has_its_mel_alignment_and_symbols(reduction: int, tmp_path: Path) -> None:
    speaker, state = speaking(reduction), torch.get_rng_state()
    speech = speaker.synthesise("Dr. No has 2 cats.")
    assert torch.equal(torch.get_rng_state(), state)
    assert speech.text == "doctor No has two cats."
    assert "".join(speech.symbols[:-1]) == speech.text.lower()
    frames = speech.mel.shape[1]
    assert 0 < frames <= 0.2 * 8000 / 16 + reduction
    assert speech.mel.shape[0] == 6
    assert speech.alignment.shape == (frames, len(speech.symbols))
    torch.testing.assert_close(speech.alignment.sum(1), torch.ones(frames))
    assert speech.samples.shape == (1, frames * 16)
    tensors = (speech.samples, speech.mel, speech.alignment)
    assert not any(each.is_inference() or each.requires_grad for each in tensors)
    assert speech.mel_config == LogMel(**MEL).config
    assert soundfile.info(speech.save(tmp_path / "x.wav")).frames == frames * 16
    assert_alike(speaker.synthesise("Dr. No has 2 cats."), speech, 0.0)


@pytest.mark.parametrize("rest", [True, False])
def test_a_list_gives_what_each_text_gives_alone(rest: bool) -> None:
    speaker, voice = speaking(rest=rest), vocoder()
    texts = (TEXTS * AT_ONCE)[: AT_ONCE + 3]
    alone = {text: speaker.synthesise(text, voice) for text in TEXTS}
    together = speaker.synthesise(texts, voice)
    assert len(together) == len(texts)
    assert len({each.mel.shape[1] for each in together}) > 1
    for text, speech in zip(texts, together, strict=True):
        assert_alike(speech, alone[text], 1e-4 if rest else 0.0)
    assert speaker.synthesise([]) == []
    assert [each.text for each in speaker.synthesise(tuple(TEXTS[2:]))] == TEXTS[2:]


def test_threads_do_not_disturb_each_other() -> None:
    speaker, found = speaking(rest=False), {}
    alone = {text: speaker.synthesise(text) for text in TEXTS}

    def say(text: str) -> None:
        found[text] = [speaker.synthesise(text) for _ in range(3)]

    threads = [threading.Thread(target=say, args=[text]) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in TEXTS:
        for speech in found[text]:
            assert_alike(speech, alone[text], 0.0)


def test_what_the_gate_does_not_end_is_not_finished() -> None:
    speaker = speaking()
    for bias, finished in ((-1e4, False), (1e4, True)):
        speaker.modules.model.net.decoder.gate_layer.bias.data.fill_(bias)
        speech = speaker.synthesise("yes")
        assert speech.finished is finished
        assert speech.mel.shape[1] == (2 if finished else 100)


def test_any_vocoder_may_be_given_that_takes_these_mels(tmp_path: Path) -> None:
    speaker, voice = speaking(), vocoder()
    plain, speech = speaker.synthesise("yes"), speaker.synthesise("yes", vocoder=voice)
    assert torch.equal(plain.mel, speech.mel)
    assert not torch.equal(plain.samples, speech.samples)
    assert torch.equal(speech.samples, voice.vocode(speech).samples)
    own = speaker.synthesise(["yes"], vocoder=lambda mel: mel.sum(0))[0]
    assert torch.equal(own.samples[0], speech.mel.sum(0))
    with pytest.raises(ValueError, match="takes mels with hop=32; those that are .* have 16"):
        speaker.synthesise("yes", vocoder=vocoder(hop=32))
    with pytest.raises(ValueError, match="is a model of another kind: it has synthesise, not voco"):
        speaker.synthesise("yes", vocoder=speaker)
    with pytest.raises(TypeError, match="vocoder is a int; allowed"):
        speaker.synthesise("yes", vocoder=3)
    with pytest.raises(ValueError, match="is no run folder"):
        speaker.synthesise("yes", vocoder=tmp_path)


def test_the_vocoder_of_the_run_is_used_if_it_is_in_its_folder(tmp_path: Path) -> None:
    run = make_run("hifigan", tmp_path / "run" / "vocoder")
    voice = trainer.load(run, "cpu")
    speaker = speaking(mel=voice.mel, vocoder=run)
    speaker.modules.model = tacotron(2, symbols=len(speaker.hparams.front), bands=80).eval()
    speaker.folder = tmp_path / "run"
    speech = speaker.synthesise("yes")
    assert torch.equal(speech.samples, voice.vocode(speech).samples)
    assert torch.equal(speaker.synthesise("yes", vocoder=str(run)).samples, speech.samples)
    far = speaking(vocoder=run)
    far.folder = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="the vocoder of the run, .* lies outside of .*: name it"):
        far.synthesise("yes")
    assert far.synthesise("yes", vocoder=vocoder()).finished in (True, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no text to say in the text"),
        (["yes", " \n"], "there is no text to say in the text 2"),
        (["ñ"], "does not know 'ñ' in the text 1 at character 1"),
        (["yes", "very " * 20], "the text 2 has 100 symbols; .* up to 40: divide it"),
        (["yes", 3], "the text 2 is a int; allowed: a str, or a list of them"),
        (None, "the text is a NoneType; allowed"),
        (b"yes", "the text is a bytes; allowed"),
    ],
)
def test_what_cannot_be_said_is_named(text: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        speaking().synthesise(text)


def test_a_front_end_or_mels_that_do_not_fit_the_network_are_refused(tmp_path: Path) -> None:
    run = make_run("tacotron2", tmp_path / "run")
    with pytest.raises(ValueError, match="and mel 20 bands; the network .* makes 80 bands"):
        trainer.load(run, "cpu", overrides={"mel": {"bands": 20}})
    letters = "".join(map(chr, range(200, 400)))
    with pytest.raises(ValueError, match="front has 202 symbols .* takes up to 148 symbols"):
        trainer.load(run, "cpu", overrides={"front": {"alphabet": letters}})
