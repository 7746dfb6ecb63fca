"""Files as people have them are read alike by every recipe: names, suffixes, links, left-overs."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from recipes.common.audio import read_header
from recipes.common.cuts import files_below, sounds
from recipes.tacotron2.data import readings
from tests.recipes.test_missing_files import CORPORA, sound
from trainer.data import BadItem

# A table of LibriMix names whole paths; the others find files by their ids.
BY_ID = [name for name in CORPORA if name != "separation librimix table"]


def ids(corpus: Mapping[str, Any]) -> dict[str, list[str]]:
    return {split: sorted(each.id for each in part) for split, part in corpus.items()}


@pytest.mark.parametrize("name", BY_ID)
def test_suffixes_in_capitals_and_what_lies_beside_change_nothing(
    name: str, tmp_path: Path
) -> None:
    made = CORPORA[name](tmp_path)
    before = ids(made.load())
    for number, path in enumerate(made.files):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" * 20)
        path.with_suffix(".txt").write_text("what is said")
        path.with_suffix(".m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
        if number % 2:
            path.rename(path.with_suffix(path.suffix.upper()))
    hidden = made.files[0].parent / ".cache"
    shutil.copytree(made.files[0].parent, hidden, ignore=shutil.ignore_patterns(".*"))
    (made.files[0].parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert ids(made.load()) == before


@pytest.mark.parametrize("name", BY_ID)
def test_one_recording_in_two_formats_is_refused_with_both_names(name: str, tmp_path: Path) -> None:
    made = CORPORA[name](tmp_path)
    path = made.files[3]
    other = path.with_suffix(".aiff")
    samples, rate = soundfile.read(path)
    soundfile.write(other, samples, rate)
    with pytest.raises(ValueError, match="two files") as caught:
        made.load()
    assert str(path) in str(caught.value)
    assert str(other) in str(caught.value)


@pytest.mark.parametrize("name", ["hifigan folder", "separation wham"])
def test_the_same_name_in_two_folders_is_two_recordings(name: str, tmp_path: Path) -> None:
    made = CORPORA[name](tmp_path)
    before = ids(made.load())
    for path in files_below(tmp_path):
        if path.suffix == ".wav":
            again = path.parent / "again" / path.name
            again.parent.mkdir(exist_ok=True)
            shutil.copy(path, again)
    found = ids(made.load())
    every = [each for part in found.values() for each in part]
    assert len(every) == len(set(every)) == 2 * sum(map(len, before.values())) or "wham" in name
    assert {f"again/{each}" for part in before.values() for each in part} < set(every)


def test_utterances_of_two_chapters_may_have_one_name(tmp_path: Path) -> None:
    from recipes.asr.data import librispeech
    from recipes.common.noisy_speech import speech_and_noise

    parts = {"train": ["a"], "valid": ["b"], "test": ["c"]}
    for number, place in enumerate(f"{p}/{s}/{c}" for p in "abc" for s in "12" for c in "34"):
        sound(tmp_path / "speech" / place / "0001.wav", number)
        (tmp_path / "speech" / place / "x.trans.txt").write_text("0001 SOME WORDS\n")
        sound(tmp_path / "noise" / f"{number}.wav", number)
    expected = {
        split: [f"{part}/{s}/{c}/0001" for s in "12" for c in "34"]
        for split, (part,) in parts.items()
    }
    assert ids(librispeech(str(tmp_path / "speech"), parts)) == expected
    mixed = speech_and_noise(str(tmp_path / "speech"), str(tmp_path / "noise"), parts)
    assert ids(mixed) == expected
    assert {each.cut.supervisions[0].speaker for each in mixed["test"]} == {"1", "2"}


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    sound(tmp_path / "elsewhere" / "one.wav", 1)
    sound(tmp_path / "data" / "two.wav", 2)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "linked too").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert list(sounds(tmp_path / "data")) == ["linked/one", "two"]


def test_links_out_of_the_folder_of_a_table_are_an_option(tmp_path: Path) -> None:
    made = CORPORA["tacotron2 readings"](tmp_path / "data")
    path = made.files[0]
    (tmp_path / "store").mkdir()
    shutil.move(path, tmp_path / "store" / "x.wav")
    path.symlink_to(tmp_path / "store" / "x.wav")
    with pytest.raises(ValueError, match="line 1 of .*leads out of .*--corpus.follow_links=true"):
        made.load()
    assert sum(map(len, made.load(follow_links=True).values())) == 40


def test_a_name_that_is_not_utf_8_is_read_and_can_be_written_down(tmp_path: Path) -> None:
    made = CORPORA["hifigan folder"](tmp_path)
    odd = made.files[0].with_name(os.fsdecode(b"Gr\xfc.wav"))
    made.files[0].rename(odd)
    corpus = made.load()
    (cut,) = (cut for part in corpus.values() for cut in part if cut.id.startswith("Gr"))
    assert cut.id == "Gr\\xfc"
    assert cut.load_audio().shape == (1, 2400)
    odd.write_bytes(b"no sound")
    with pytest.raises(BadItem, match="it is not an audio file"):
        made.load(on_bad="raise")


def test_names_with_accents_in_either_form_and_with_suffixes_are_found(tmp_path: Path) -> None:
    """macOS writes the accent of a file's name as a character of its own."""
    names = ["caf\u00e9", "b", "c", "d.wav"]
    for number, name in enumerate(["cafe\u0301", *names[1:3], "d"]):
        sound(tmp_path / "wavs" / f"{name}.wav", number)
    (tmp_path / "metadata.csv").write_text(
        "".join(f"{each}|Text {each[0]}.\n" for each in names), "utf-8"
    )
    assert sum(map(len, readings(str(tmp_path), 1, 1, spell=False).values())) == 4
    (tmp_path / "metadata.csv").write_text("b|Once.\nb.wav|Twice.\n")
    with pytest.raises(ValueError, match="line 2 of .* has the name '.*b.wav' of line 1 again"):
        readings(str(tmp_path), 1, 1, spell=False)


def test_an_encoding_that_is_not_read_says_how_to_convert_it(tmp_path: Path) -> None:
    file = sound(tmp_path / "a.caf", 1)
    file.write_bytes(file.read_bytes().replace(b"lpcm", b"aac "))
    with pytest.raises(BadItem, match=r"its encoding is not read \(.*\): convert it, as by ffmpeg"):
        read_header(file)


@pytest.mark.parametrize("suffix", [".m4a", ".aac", ".webm", ".wma", ".amr"])
def test_what_is_not_read_says_how_to_convert_it(suffix: str, tmp_path: Path) -> None:
    start = {
        ".m4a": b"\0\0\0\x20ftypM4A ", ".aac": b"\xff\xf1\x50\x80", ".webm": b"\x1aE\xdf\xa3\x01",
        ".wma": b"0&\xb2u\x8e\x66", ".amr": b"#!AMR\n",
    }[suffix]  # fmt: skip
    for name in ("separation listed", "hifigan folder"):
        made = CORPORA[name](tmp_path / name)
        made.files[0].unlink()
        made.files[0].with_suffix(suffix).write_bytes(start + bytes(2000))
        with pytest.raises(BadItem, match="which is not read: convert it, as by ffmpeg -i FILE"):
            made.load(on_bad="raise")


@pytest.mark.parametrize(
    ("one", "other"), [("x.mp3", "x.mp3.wav"), ("x.wav", "x.flac.wav"), ("x.ogg.wav", "x.mp3.wav")]
)
def test_what_was_converted_beside_its_source_is_one_recording(
    one: str, other: str, tmp_path: Path
) -> None:
    for name in (one, other):
        sound(tmp_path / "sub" / name, 1)
    with pytest.raises(ValueError, match="one recording in two files"):
        sounds(tmp_path)
    (tmp_path / "sub" / one).unlink()
    assert list(sounds(tmp_path)) == [f"sub/{other.removesuffix('.wav')}"]
    (tmp_path / "sub" / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    assert list(sounds(tmp_path)) == [f"sub/{other.removesuffix('.wav')}"]


def test_a_file_of_several_names_is_in_one_split(tmp_path: Path) -> None:
    made = CORPORA["hifigan folder"](tmp_path)
    before = ids(made.load())
    for number, path in enumerate(made.files):
        name = path.with_name(f"0-{path.name}")  # Which comes first.
        (name.symlink_to if number % 2 else name.hardlink_to)(path)
    after = [each for part in ids(made.load()).values() for each in part]
    assert len(after) == sum(map(len, before.values()))
    links = [f"0-{path.stem}" for path in made.files]
    assert not set(links[1::2]) & set(after)


def test_texts_of_two_lists_for_one_file_are_refused(tmp_path: Path) -> None:
    from recipes.common.librispeech import read_parts

    place = tmp_path / "part" / "1" / "2"
    sound(place / "1-2-0000.flac", 1)
    for name in ("1-2", "1-2.old"):
        (place / f"{name}.trans.txt").write_text(f"1-2-0000 {name}\n")
    with pytest.raises(ValueError, match=r"1-2-0000.flac, as another list has"):
        read_parts(tmp_path, ["part"])


def test_ids_and_texts_may_have_blanks_around(tmp_path: Path) -> None:
    made = CORPORA["tacotron2 readings"](tmp_path)
    before = ids(made.load())
    table = tmp_path / "metadata.csv"
    lines = [
        " \t" + line.replace("|", " |\u00a0 ") + "\t" for line in table.read_text().split("\n")
    ]
    table.write_text("\n".join(lines))
    assert ids(made.load()) == before


def test_texts_that_say_the_same_are_in_one_split(tmp_path: Path) -> None:
    made = CORPORA["tacotron2 readings"](tmp_path)
    before = ids(made.load())
    table = tmp_path / "metadata.csv"
    lines = table.read_text().split("\n")
    for number, line in enumerate(lines):
        shutil.copy(tmp_path / "wavs" / f"r{number}.wav", tmp_path / "wavs" / f"s{number}.wav")
        text = line.partition("|")[2].removesuffix(".")
        lines[number] += f"\ns{number}|{text.swapcase().replace(' ', ', ')}{'?!'[number % 2]}"
    table.write_text("\n".join(lines))
    after = ids(made.load())
    for split, names in before.items():
        said = {cut.supervisions[0].text.lower().strip("?!.") for cut in made.load()[split]}
        assert len(after[split]) == 2 * len(names), said


def test_an_encoding_without_places_is_read_from_any_place(tmp_path: Path) -> None:
    """libsndfile seeks in no GSM, G.721 or NMS ADPCM."""
    from recipes.common.audio import read_audio

    samples = np.random.default_rng(0).normal(0, 0.1, 8000)
    for subtype in ("GSM610", "G721_32", "NMS_ADPCM_16", "PCM_16"):
        path = tmp_path / f"{subtype}.wav"
        soundfile.write(path, samples, 8000, subtype=subtype)
        whole = read_audio(path)
        assert len(whole) >= 8000
        part = read_audio(path, start=0.25, duration=0.5)
        assert part.tolist() == whole[2000:6000].tolist()
