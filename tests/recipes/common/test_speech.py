"""Embedded speech: found again, whole, level, and told clearly when it cannot be had."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import soundfile
import torch

from recipes.common import speech_cache
from recipes.common.speech import (
    Utterance,
    embedded_speech,
    one_voice_reading,
    spoken_words,
    to_cuts,
)
from recipes.common.voices import READER, VOICES

installed = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="the synthesiser is not installed: pip install 'cortex-speech[demo]'",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_CACHE", str(tmp_path / "cache"))


def _contents(utterances: list[Utterance]) -> dict[str, bytes]:
    return {one.id: one.path.read_bytes() for one in utterances}


@installed
@pytest.mark.parametrize("sample_rate", [8000, 22050])
def test_each_file_holds_what_is_said_of_it(sample_rate: int) -> None:
    utterances = embedded_speech("test", 12, sample_rate=sample_rate)
    assert len({one.id for one in utterances}) == 12
    for one in utterances:
        wave, rate = soundfile.read(one.path, dtype="int16")
        info = soundfile.info(one.path)
        assert (info.channels, info.subtype, rate) == (1, "PCM_16", sample_rate)
        assert wave.shape == (one.samples,)
        assert one.duration == one.samples / sample_rate
        # 25 letters a second is faster than anybody speaks, 4 slower.
        assert len(one.text) / 25 < one.duration < len(one.text) / 4 + 0.5


@installed
def test_levels_are_even_and_the_ends_are_trimmed() -> None:
    for one in embedded_speech("valid", 12):
        wave = torch.from_numpy(soundfile.read(one.path, dtype="float32")[0])
        assert wave.abs().max() <= 0.951
        assert 0.03 < wave.square().mean().sqrt() < 0.0701
        loud = (wave.abs() > 0.01 * wave.abs().max()).nonzero()
        assert loud[0] / 16000 < 0.2
        assert (len(wave) - loud[-1]) / 16000 < 0.2


@installed
def test_voices_take_turns_and_a_longer_list_begins_with_the_shorter() -> None:
    few, more = embedded_speech("test", 4, speakers=2), embedded_speech("test", 6, speakers=2)
    assert more[:4] == few
    names = [voice.name for voice in VOICES["test"][:2]]
    assert [one.speaker for one in more] == names * 3
    assert [one.gender for one in more[:2]] == [voice.gender for voice in VOICES["test"][:2]]


@installed
def test_what_is_there_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded_speech("valid", 5)
    monkeypatch.setattr(speech_cache, "Synthesiser", None)  # would fail where it is called
    assert embedded_speech("valid", 5) == first
    with pytest.raises(TypeError):
        embedded_speech("valid", 6)


@installed
def test_what_is_there_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_speech("valid", 20)
    opened, asked = [], []
    length, version = speech_cache.length, importlib.metadata.version
    monkeypatch.setattr(speech_cache, "length", lambda path: (opened.append(path), length(path))[1])
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: (asked.append(name), version(name))[1]
    )
    found = embedded_speech("valid", 20)
    assert opened == [each.path for each in found]
    assert len(asked) <= 2


@installed
@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "gone", "not audio"])
def test_a_damaged_file_is_made_again_with_the_same_bytes(damage: str) -> None:
    utterances = embedded_speech("valid", 2)
    whole = _contents(utterances)
    path = utterances[0].path
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": content[:-100],
                "empty": b"",
                "longer": content + b"x",
                "not audio": b"x" * len(content),
            }[damage]
        )
    assert _contents(embedded_speech("valid", 2)) == whole


@installed
def test_each_voice_of_a_split_says_each_word() -> None:
    found = {split: spoken_words(split, ["yes", "no"], 8000) for split in ("valid", "test")}
    for said in found.values():
        assert Counter(each.text for each in said) == {"yes": 6, "no": 6}
        assert len({each.speaker for each in said}) == 6
        assert all(0.1 < each.duration < 1.0 for each in said)
    assert not {each.speaker for each in found["valid"]} & {each.speaker for each in found["test"]}


@installed
def test_one_reader_reads_other_sentences_in_each_split() -> None:
    reading = {split: one_voice_reading(split, 2) for split in VOICES}
    every = [one for some in reading.values() for one in some]
    assert {one.speaker for one in every} == {READER.name}
    assert len({one.text for one in every}) == 6


_PROGRAM = """
import json, sys
from recipes.common.speech import embedded_speech
print(json.dumps([one.id for one in embedded_speech("train", int(sys.argv[1]))]))
"""


def _start(count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, str(count)]
    folder = Path(__file__).parents[3]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)


@pytest.mark.faults
@installed
def test_a_kill_leaves_nothing_broken_and_two_processes_at_once_agree() -> None:
    files = speech_cache.folder() / "speech"
    with _start(2000) as killed:
        deadline = time.monotonic() + 60
        while not list(files.glob("*/*.wav")) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.kill()
    finished = list(files.glob("*/*.wav"))
    assert 1 <= len(finished) < 2000
    assert all(speech_cache.length(path) for path in finished)

    with _start(30) as other:
        expected = _contents(embedded_speech("train", 30))
        assert json.loads(other.communicate()[0]) == list(expected)
    assert len(expected) == 30
    assert not list(files.glob("*/*.part"))
    os.environ["CORTEX_CACHE"] += "-apart"
    assert _contents(embedded_speech("train", 30)) == expected


@installed
def test_cuts_carry_text_speaker_and_sound() -> None:
    utterances = embedded_speech("test", 3)
    cuts = to_cuts(utterances)
    assert len(cuts) == 3
    for one, cut in zip(utterances, cuts, strict=True):
        (said,) = cut.supervisions
        assert (cut.id, said.text, said.speaker, said.gender) == (
            one.id,
            one.text,
            one.speaker,
            one.gender,
        )
        assert (cut.duration, cut.sampling_rate) == (one.duration, 16000)
        assert cut.load_audio().shape == (1, one.samples)


def test_without_the_synthesiser_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cortex-speech\[demo\]'"):
        embedded_speech("train", 1)


@installed
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CORTEX_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"cannot write the embedded speech into .*file.*CORTEX_CACHE"
    ):
        embedded_speech("train", 1)


@pytest.mark.parametrize("speakers", [0, -1, 1000])
def test_more_speakers_than_there_are_is_an_error(speakers: int) -> None:
    most = len(VOICES["test"])
    with pytest.raises(ValueError, match=f"test has 1 to {most} speakers, not {speakers}"):
        embedded_speech("test", 1, speakers=speakers)


def test_an_unknown_split_or_style_is_named() -> None:
    with pytest.raises(ValueError, match="split of the embedded speech is 'dev'"):
        embedded_speech("dev", 1)
    with pytest.raises(ValueError, match="style of the embedded speech is 'verse'"):
        embedded_speech("train", 1, style="verse")


@pytest.mark.parametrize("utterances", [0, -3])
def test_no_utterances_is_an_error(utterances: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 utterance, not {utterances}"):
        embedded_speech("train", utterances)


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORTEX_CACHE")
    home = Path.home()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert speech_cache.folder() == Path("/somewhere/cortex-speech")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert speech_cache.folder() == home / ".cache" / "cortex-speech"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert speech_cache.folder() == home / "Library" / "Caches" / "cortex-speech"


@installed
def test_a_reading_of_short_sentences() -> None:
    texts = [one.text for one in one_voice_reading("valid", 3, longest=50)]
    assert all(len(text) <= 50 for text in texts)
    assert len(set(texts)) == 3
    with pytest.raises(ValueError, match="longest must be at least 45 characters, not 20"):
        one_voice_reading("valid", 3, longest=20)
