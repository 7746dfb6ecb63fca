"""The bytes of an utterance depend on its text and voice alone, and come from another process."""

import importlib.util
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes.common import synthesiser
from recipes.common.speech_cache import Line, Synthesiser
from recipes.common.voices import VOICES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="the synthesiser is not installed: pip install 'cortex-speech[demo]'",
)
VOICE = VOICES["train"][0]
TEXTS = ["turn the light on", "the ninth of may", "open the gate and lock the door"]


def _lines() -> list[Line]:
    """Each text by each voice: with echo, flutter, breath and without."""
    voices = [voice for split in VOICES.values() for voice in split]
    return [Line(voice, text, 16000) for voice in voices for text in TEXTS]


def _say(lines: list[Line]) -> dict[str, torch.Tensor]:
    with Synthesiser() as child:
        return {line.key: child.say(line) for line in lines}


def test_order_process_and_memory_do_not_reach_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines()
    shuffled = [lines[i] for i in torch.randperm(len(lines)).tolist()]
    # glibc fills fresh memory with this byte: some other voices read what they never wrote.
    monkeypatch.setenv("MALLOC_PERTURB_", "17")
    first = _say(lines)
    monkeypatch.setenv("MALLOC_PERTURB_", "170")
    second, alone = _say(shuffled), _say(lines[-1:])
    assert len(first) == len(lines) == 120
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(alone[lines[-1].key], first[lines[-1].key])


def test_a_repetition_in_one_process_is_the_same() -> None:
    line = Line(VOICE, TEXTS[0], 16000)
    with Synthesiser() as child:
        first, second = child.say(line), child.say(line)
    assert torch.equal(first, second)


def test_where_the_library_cannot_be_unloaded_the_child_starts_itself_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _say(_lines()[:5])
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import importlib.util, os, pathlib, sys
            spec = importlib.util.spec_from_file_location("synthesiser", {synthesiser.__file__!r})
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            with open({str(tmp_path / "starts")!r}, "a") as starts:
                starts.write("x")
            module.unload = lambda library: library.espeak_Terminate()
            module.main(pathlib.Path(sys.argv[1]))
        """)
    )
    monkeypatch.setattr(synthesiser, "__file__", str(program))
    said = _say(_lines()[:5])
    assert len((tmp_path / "starts").read_text()) >= 5
    assert all(torch.equal(said[key], expected[key]) for key in expected)


def test_the_text_and_each_property_of_the_voice_change_the_bytes() -> None:
    line = Line(VOICE, TEXTS[0], 16000)
    others = [
        replace(line, text=TEXTS[1]),
        replace(line, voice=replace(VOICE, accent="en-gb-scotland")),
        replace(line, voice=replace(VOICE, variant="m3")),
        replace(line, voice=replace(VOICE, rate=VOICE.rate + 20)),
        replace(line, voice=replace(VOICE, pitch=VOICE.pitch + 5)),
        replace(line, voice=replace(VOICE, range=80)),
    ]
    said = _say([line, *others])
    assert len({tuple(samples.tolist()) for samples in said.values()}) == 7


@pytest.mark.parametrize("unknown", [{"variant": "nobody"}, {"accent": "xx"}])
def test_an_unknown_voice_is_named(unknown: dict[str, str]) -> None:
    nobody = replace(VOICE, **unknown)
    with Synthesiser() as child:
        with pytest.raises(RuntimeError, match=f"has no voice '{re.escape(nobody.label)}'"):
            child.say(Line(nobody, "hello", 16000))
        with pytest.raises(RuntimeError, match="the synthesiser ended with status 1 at 'again'"):
            child.say(Line(VOICE, "again", 16000))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the map of this process's memory")
def test_the_library_is_never_in_this_process() -> None:
    _say([Line(VOICE, TEXTS[0], 16000)])
    assert "espeak" not in Path("/proc/self/maps").read_text()
    assert "espeakng_loader" not in sys.modules


def _voiced(spoken: torch.Tensor) -> float:
    """The share of the frames that are not quiet with a period of 60 to 400 Hz."""
    frames = spoken.double().unfold(0, 882, 441)  # 40 ms, every 20 ms
    energy = frames.square().mean(1)
    frames = frames[energy > 0.05 * energy.mean()]
    power = torch.fft.rfft(frames, n=2 * 882).abs().square()
    correlation = torch.fft.irfft(power)[:, :882] / torch.arange(882, 0, -1)  # unbiased
    peak = correlation[:, 22050 // 400 : 22050 // 60].amax(1) / correlation[:, 0]
    return (peak > 0.6).double().mean().item()


def test_nobody_whispers() -> None:
    speakers = [voice for voices in VOICES.values() for voice in voices]
    whisperer = replace(VOICE, variant="whisper")
    lines = [Line(voice, TEXTS[2], 16000) for voice in [*speakers, whisperer]]
    shares = [_voiced(spoken) for spoken in _say(lines).values()]
    assert len(shares) == len(speakers) + 1
    assert min(shares[:-1]) > 0.5
    assert shares[-1] < 0.25
