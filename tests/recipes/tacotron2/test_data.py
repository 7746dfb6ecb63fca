"""Corpora on small made-up folders: what is made of them, and what is said of unusable ones."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from recipes.common.mel import LogMel
from recipes.tacotron2 import data
from recipes.tacotron2.data import Mels, datasets, readings, trimmed
from recipes.tacotron2.text import Characters
from tests.recipes.tacotron2.conftest import RATE, SENTENCES, reading_folder
from trainer.data import BadItem


@pytest.fixture
def mel() -> LogMel:
    return LogMel(RATE, bands=8, n_fft=512, hop=128)


def texts_of(corpus: data.Corpus) -> dict[str, set[str]]:
    return {split: {cut.supervisions[0].text for cut in cuts} for split, cuts in corpus.items()}


def make(folder: Path, **more: object) -> data.Corpus:
    return readings(str(folder), **{"valid": 2, "test": 3, "spell": False, **more})  # type: ignore[arg-type]


def test_what_is_held_out_depends_on_the_texts_alone(recorded: Path, tmp_path: Path) -> None:
    texts = texts_of(make(recorded))
    assert {split: len(each) for split, each in texts.items()} == {
        "train": 5,
        "valid": 2,
        "test": 3,
    }
    assert set.union(*texts.values()) == set(SENTENCES)
    folder = shutil.copytree(recorded, tmp_path / "copy")
    lines = (folder / "metadata.csv").read_text().splitlines()
    twice = [line.replace("r", "twice", 1) for line in lines[:4]]
    for number in range(4):
        shutil.copy(folder / "wavs" / f"r{number}.wav", folder / "wavs" / f"twice{number}.wav")
    (folder / "metadata.csv").write_text("\n".join([*reversed(lines), *twice]))
    corpus = make(folder)
    assert texts_of(corpus) == texts
    assert sum(len(cuts) for cuts in corpus.values()) == 14


@pytest.mark.parametrize("suffix", [".flac", ".ogg"])
def test_other_files_and_rates_are_read(tmp_path: Path, suffix: str, mel: LogMel) -> None:
    folder = reading_folder(tmp_path / "other", suffix, rate=24000)
    sets = datasets(make(folder), Characters(), mel, 100)
    item = sets["test"][0]
    cut = sets["test"].cuts[0]
    assert abs(len(item["mel"]) - cut.duration * RATE / 128) <= 1
    assert item["mel"].shape[1] == 8


def test_others_are_left_out(recorded: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    corpus = make(recorded, lengths=(0.65, 0.75), valid=1, test=1)
    assert sum(len(cuts) for cuts in corpus.values()) == 5
    corpus = make(recorded, sounds="!", valid=1, test=1)
    assert sum(len(cuts) for cuts in corpus.values()) == 9
    assert "r2 is no speech, left out: Good bye!" in caplog.text


def test_numbers_are_spelled_out(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "spell_out", lambda text, name: f"{name}: {text.lower()}")
    texts = texts_of(make(recorded, spell=True))
    assert "r0: press one." in set.union(*texts.values())


def test_a_number_that_is_not_sure_is_told_with_its_line(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(recorded, tmp_path / "copy")
    lines = (folder / "metadata.csv").read_text().splitlines()
    table = folder / "metadata.csv"
    lines[1:4] = ["r1|In the 1990s.", 'r2|A 10" record.', "r3|On 2/3/2020."]
    table.write_text("\n".join(lines) + "\n\n \n")
    with pytest.raises(ValueError, match="2 of 10 texts are bad, more than the 5.0%") as caught:
        make(folder, spell=True)
    assert f"line 3 of {table}: r2 has '10\"', which cannot be spelled out" in str(caught.value)
    with pytest.raises(BadItem, match="line 3 of .*: r2 has '10\"'"):
        make(folder, spell=True, on_bad="raise")
    assert sum(map(len, make(folder, spell=True, max_bad=0.2).values())) == 8
    assert f"skipped line 4 of {table}: r3 has '2/3/2020', which cannot be" in caplog.text
    lines[2:4] = ["r2|A ten\u2028inch record.", "r3|On the 2nd."]
    table.write_text("\n".join(lines), "utf-8")
    said = set.union(*texts_of(make(folder, spell=True)).values())
    assert {"In the nineteen nineties.", "A ten inch record.", "On the second."} < said


def test_a_missing_folder_and_other_layouts_are_told(recorded: Path, tmp_path: Path) -> None:
    expected = "expected was a metadata.csv of lines id|text or id|text|… and a folder wavs"
    with pytest.raises(ValueError, match="nowhere is not there; expected was a metadata.csv"):
        make(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has another layout: it has no metadata.csv; expected"):
        make(tmp_path)
    table = tmp_path / "metadata.csv"
    for content, told in (
        ("", "is empty; expected was"),
        (
            "a|yes\nb,no\n",
            "line 2 of .* has 1 columns: 'b,no'; expected were an id and, in column 2",
        ),
        ("a|yes\nb| \n", r"line 2 of .* has no text: 'b\| '"),
        ("a|yes\n../b|no\n", "'../b.wav' in a manifest contains '..'"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=told):
            make(tmp_path)
    assert expected.startswith("expected")
    with pytest.raises(ValueError, match="column 4, a text, separated by"):
        make(recorded, column=3)
    with pytest.raises(ValueError, match="leave nothing to train on: there are 10 different texts"):
        make(recorded, valid=5, test=5)


def test_missing_and_broken_files_are_named(recorded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(recorded, tmp_path / "copy")
    (folder / "wavs" / "r3.wav").unlink()
    (folder / "wavs" / "r4.wav").write_text("no sound")
    with pytest.raises(
        ValueError, match=r"(?s)r3.wav: it does not exist.*r4.wav: it is not an aud"
    ):
        make(folder)
    corpus = make(folder, max_bad=0.2)
    assert sum(len(cuts) for cuts in corpus.values()) == 8


def test_items(recorded: Path, mel: LogMel) -> None:
    front = Characters()
    sets = datasets(make(recorded), front, mel, 100, cached=True)
    for each in sets.values():
        for index in range(len(each)):
            item = each[index]
            assert item["tokens"].tolist() == front.encode([item["text"]])[0]
            assert item["mel"].shape == (each.cuts[index].num_samples // 128, 8)
            assert each[index]["mel"] is item["mel"]
    assert sets["train"].name_of(0) == f"0 ({sets['train'].cuts[0].id})"


def test_unknown_characters_are_told_with_where_they_are(recorded: Path, mel: LogMel) -> None:
    alphabet = " .abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(ValueError, match="does not know '!' in r2 at character 9"):
        datasets(make(recorded), Characters(alphabet), mel, 100)


def test_texts_too_long_are_not_trained_on(
    recorded: Path, mel: LogMel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = datasets(make(recorded), Characters(), mel, 100)
    short = datasets(make(recorded), Characters(), mel, 13)
    assert 0 < len(short["train"]) < len(whole["train"]) == 5
    assert all(len(tokens) <= 13 for tokens in short["train"].tokens)
    assert len(short["test"]) == 3
    assert "texts have more than 13 symbols, left out: r" in caplog.text
    with pytest.raises(ValueError, match="all 5 texts have more than longest_text=5 symbols"):
        datasets(make(recorded), Characters(), mel, 5)


def test_silence_is_trimmed_but_for_a_margin() -> None:
    torch.manual_seed(0)
    signal = torch.cat(
        [torch.randn(n) * level for n, level in ((8000, 1e-4), (4000, 1), (6000, 1e-4))]
    )
    found = trimmed(signal, RATE, quiet=40)
    assert abs(len(found) - (4000 + 2 * 800)) <= 320
    assert torch.equal(trimmed(signal, RATE, quiet=120), signal)
    assert len(trimmed(torch.zeros(50), RATE, 40)) == 50
    assert len(trimmed(torch.zeros(500), RATE, 40)) == 500


def test_a_very_short_recording_has_a_frame(mel: LogMel, recorded: Path) -> None:
    cut = make(recorded)["train"][0].truncate(duration=0.002)
    assert Mels([cut], [[3, 1]], mel)[0]["mel"].shape[0] >= 1
