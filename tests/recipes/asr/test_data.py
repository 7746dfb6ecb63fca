"""Corpora on small made-up folders: what is made of them, and what is said of unusable ones."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from recipes.asr.data import DIGITS, datasets, digits, librispeech
from recipes.asr.text import Characters
from trainer.data import BadItem

RATE = 8000
STRINGS = {"train": 40, "valid": 10, "test": 20}
TAKES = {"train": (4, 99), "valid": (2, 3), "test": (0, 1)}
PARTS = {
    "train": ["train-clean-100", "train-clean-360"],
    "valid": ["dev-clean"],
    "test": ["dev-clean"],
}


def write(path: Path, seconds: float, level: float, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * rate), level, dtype=np.float32), rate)


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes 0 to 5 of two speakers; the level of a sound tells its digit, and its sign the take's
    parity."""
    folder = tmp_path_factory.mktemp("fsdd")
    for digit in range(10):
        for take in range(6):
            for speaker, seconds in (("ann", 0.2), ("bob_b", 0.3)):
                path = folder / "recordings" / f"{digit}_{speaker}_{take}.wav"
                write(path, seconds + 0.01 * take, 0.05 * (digit + 1))
    (folder / "recordings" / "notes.wav").write_text("not of the layout, and left alone")
    return folder


def make(folder: Path, **more: object) -> dict[str, CutSet]:
    given = {"strings": STRINGS, "takes": TAKES, "longest": 4, "pause": 0.1} | more
    return dict(digits(str(folder), RATE, **given))  # type: ignore[arg-type]


def text_of(cut: object) -> str:
    return " ".join(said.text for said in cut.supervisions)  # type: ignore[attr-defined]


def test_strings_are_joined_from_takes_of_one_speaker_and_split(fsdd: Path) -> None:
    corpus = make(fsdd)
    assert {split: len(cuts) for split, cuts in corpus.items()} == STRINGS
    seen = 0
    for split, (first, last) in TAKES.items():
        for cut in corpus[split]:
            assert len({said.speaker for said in cut.supervisions}) == 1
            assert 1 <= len(cut.tracks) <= 4
            for track in cut.tracks:
                assert first <= int(track.cut.id.rpartition("_")[2]) <= last
                seen += 1
    assert seen > 100
    assert {len(cut.tracks) for cut in corpus["train"]} == {1, 2, 3, 4}
    assert {word for cut in corpus["train"] for word in text_of(cut).split()} == set(DIGITS)


def test_what_is_heard_is_what_the_text_says(fsdd: Path) -> None:
    sets = datasets(make(fsdd), Characters(), RATE, frames=lambda samples: samples)
    for index in range(len(sets["test"])):
        item = sets["test"][index]
        digit = (item["sig"] / 0.05).round().long() - 1
        heard = torch.unique_consecutive(digit)
        heard = heard[heard >= 0]
        said = [DIGITS.index(word) for word in item["text"].split()]
        joined = [one for one, before in zip(said, [-1, *said], strict=False) if one != before]
        # Two equal digits without a pause between them cannot be told apart here.
        assert heard.tolist() in (joined, said)
        assert Characters().decode(item["tokens"].tolist()) == item["text"]


def test_the_same_strings_in_every_run(fsdd: Path) -> None:
    first, second = make(fsdd), make(fsdd)
    for split in STRINGS:
        one, other = list(first[split]), list(second[split])
        assert [cut.id for cut in one] == [cut.id for cut in other]
        assert [cut.duration for cut in one] == [cut.duration for cut in other]


def test_takes_of_two_splits_must_not_overlap(fsdd: Path) -> None:
    with pytest.raises(ValueError, match="test and valid share take 2; their takes must not"):
        make(fsdd, takes={**TAKES, "test": (0, 2)})


def test_every_split_must_be_described(fsdd: Path) -> None:
    with pytest.raises(ValueError, match="takes must be given for train, valid, test; got {'test'"):
        make(fsdd, takes={"test": (0, 1)})


def test_a_split_without_takes_is_told(fsdd: Path) -> None:
    with pytest.raises(ValueError, match="train is made of takes 40 to 99; .* has none"):
        make(fsdd, takes={**TAKES, "train": (40, 99)})


def test_a_missing_folder_and_another_layout_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not there; expected was a folder of record"):
        make(tmp_path / "nowhere")
    write(tmp_path / "seven.wav", 0.1, 0.1)
    with pytest.raises(ValueError, match="another layout: expected were recordings named digit_"):
        make(tmp_path)


def test_a_broken_take_is_left_out_or_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for digit in range(5):
        for take in range(6):
            write(tmp_path / f"{digit}_ann_{take}.wav", 0.1, 0.1)
    (tmp_path / "3_ann_5.wav").write_bytes(b"")
    assert len(make(tmp_path)["train"]) == 40
    assert "3_ann_5.wav: it is empty" in caplog.text
    with pytest.raises(BadItem, match="3_ann_5.wav: it is empty"):
        make(tmp_path, on_bad="raise")


def test_utterances_of_other_lengths_are_left_out_of_training_alone(fsdd: Path) -> None:
    corpus = make(fsdd)
    sets = datasets(corpus, Characters(), RATE, frames=lambda samples: samples, lengths=(0.4, 1.0))
    assert all(0.4 <= seconds <= 1.0 for seconds in sets["train"].durations)
    assert 0 < len(sets["train"]) < 40
    assert (len(sets["valid"]), len(sets["test"])) == (10, 20)
    with pytest.raises(ValueError, match="no audio lasts 5 to 9 s: the 40 cuts last 0.2"):
        datasets(corpus, Characters(), RATE, frames=lambda samples: samples, lengths=(5, 9))


def test_a_corpus_of_another_rate_is_one_sentence(fsdd: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"no recording has .* {2 * RATE} Hz \(\d+ at {RATE} Hz\)"
    ) as caught:
        datasets(make(fsdd), Characters(), 2 * RATE, frames=lambda samples: samples)
    assert len(str(caught.value)) < 200
    datasets(make(fsdd), Characters(), 2 * RATE, frames=lambda samples: samples, resample=True)


def test_what_is_spoken_too_fast_for_ctc_is_left_out_of_training(
    fsdd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    corpus = make(fsdd)

    def sizes(frames_a_second: float, speed: float) -> tuple[int, int]:
        sets = datasets(
            corpus,
            Characters(),
            RATE,
            frames=lambda samples: int(samples / RATE * frames_a_second),
            speeds=(1.0, speed),
        )
        return len(sets["train"]), len(sets["test"])

    slow, test = sizes(18, 1.0)
    fast, _ = sizes(18, 1.2)
    assert 0 < fast < slow < 40
    assert test == 20
    assert "utterances have more tokens than frames, left out: train-" in caplog.text
    with pytest.raises(ValueError, match="all 40 utterances are spoken too fast: at speed 1.2"):
        sizes(1, 1.2)


def test_equal_letters_need_a_frame_between_them(tmp_path: Path) -> None:
    for take, _ in enumerate(TAKES):
        write(tmp_path / f"3_ann_{2 * take}.wav", 0.1, 0.1)
    corpus = make(tmp_path, longest=1, pause=0.0)  # "three": five letters in six frames
    assert len(datasets(corpus, Characters(), RATE, frames=lambda _: 6)["train"]) == 40
    with pytest.raises(ValueError, match="all 40 utterances are spoken too fast"):
        datasets(corpus, Characters(), RATE, frames=lambda _: 5)


def test_unknown_characters_are_told_with_where_they_are(fsdd: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary lacks: 'z' in \w+-\d+-ann-\d*0"):
        datasets(make(fsdd), Characters(" efghinorstuvwx"), RATE, frames=lambda n: n)


@pytest.fixture
def librispeech_like(tmp_path: Path) -> Path:
    for part, name in (("train-clean-100", "19-198"), ("dev-clean", "84-121123")):
        folder = tmp_path / "LibriSpeech" / part / name.replace("-", "/")
        for number in range(2):
            write(folder / f"{name}-{number:04d}.flac", 1.0 + number, 0.1, 16000)
        lines = [
            f"{name}-0000 GO DO YOU HEAR\n",
            f"{name}-0001 BUT IN LESS\u2028THAN FIVE MINUTES\n\n",
        ]
        (folder / f"{name}.trans.txt").write_text("".join(lines), "utf-8")
    return tmp_path / "LibriSpeech"


def test_parts_of_librispeech_are_prepared(
    librispeech_like: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = librispeech(str(librispeech_like), PARTS, str(tmp_path / "prepared"))
    assert [(cut.duration, text_of(cut)) for cut in corpus["train"]] == [
        (1.0, "go do you hear"),
        (2.0, "but in less than five minutes"),
    ]
    assert len(corpus["valid"]) == 2
    assert "has no train-clean-360: going on without" in caplog.text
    again = librispeech(str(librispeech_like), PARTS, str(tmp_path / "prepared"))
    assert [cut.id for cut in again["train"]] == [cut.id for cut in corpus["train"]]


def test_a_folder_that_is_not_librispeech_is_told(librispeech_like: Path, tmp_path: Path) -> None:
    prepared = str(tmp_path / "prepared")
    with pytest.raises(ValueError, match="is not there; expected was a folder of folders such as"):
        librispeech(str(tmp_path / "nowhere"), PARTS, prepared)
    told = "test is made of test-clean; .* has none of these, but dev-clean, train-clean-100"
    with pytest.raises(ValueError, match=told):
        librispeech(str(librispeech_like), {**PARTS, "test": ["test-clean"]}, prepared)


def test_a_broken_file_of_librispeech_is_named(librispeech_like: Path, tmp_path: Path) -> None:
    broken = next(librispeech_like.rglob("84-121123-0001.flac"))
    broken.write_bytes(b"not sound")
    with pytest.raises(ValueError, match=r"1 of 2 files are bad.*\n.*0001.flac: it is no"):
        librispeech(str(librispeech_like), PARTS)
    assert len(librispeech(str(librispeech_like), PARTS, max_bad=0.5)["valid"]) == 1
    broken.with_name("84-121123.trans.txt").unlink()
    with pytest.raises(ValueError, match="dev-clean has another layout: expected were, as in Lib"):
        librispeech(str(librispeech_like), PARTS)
