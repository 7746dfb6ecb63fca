"""Recordings with labels: read, dealt to splits that share nothing, and cut to parts."""

import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.finetune.labelled import Corpus, Labelled, Recording, deal, folders, table
from recipes.finetune.trials import make_trials
from trainer.data import BadItem, in_epoch

SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}


def record(path: Path, seconds: float = 0.1, rate: int = 8000, channels: int = 1) -> None:
    """Write noise that no other recording has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(bytes(path)))
    soundfile.write(path, rng.normal(0, 0.1, (round(seconds * rate), channels)), rate)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        record(folder / name)
    return folder


def ids(corpus: Corpus) -> Mapping[str, list[str]]:
    return {split: [each.id for each in recordings] for split, recordings in corpus.items()}


# ------------------------------------------------------------------------------------------ dealing


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), min_size=3, max_size=60),
    st.booleans(),
)
@settings(deadline=None)
def test_groups_stay_whole_and_every_recording_is_dealt_once(
    said: list[tuple[int, str]], by_label: bool
) -> None:
    recordings = [Recording(f"{n:02d}", Path(f"{n}"), label) for n, (_, label) in enumerate(said)]
    keys = {f"{n:02d}": label if by_label else group for n, (group, label) in enumerate(said)}
    dealt = deal(recordings, keys, SHARES)
    assert sorted(sum(dealt.values(), [])) == recordings
    homes = {(keys[each.id], split) for split, some in dealt.items() for each in some}
    assert len(homes) == len(set(keys.values()))
    assert deal(reversed(recordings), keys, SHARES) == dealt


@given(
    st.lists(st.integers(1, 400), min_size=3, max_size=19),
    st.sampled_from("abc"),
    st.sampled_from([(0.1, 0.1), (0.02, 0.3), (0.4, 0.4)]),
)
@settings(deadline=None)
def test_few_groups_of_any_size_reach_every_split(
    sizes: list[int], label: str, shares: tuple[float, float]
) -> None:
    owners = [number for number, size in enumerate(sizes) for _ in range(size)]
    by_split = {"train": 1 - sum(shares), "valid": shares[0], "test": shares[1]}
    for least in (1, 2):
        for labels in (str, lambda _: label):
            recordings = [
                Recording(f"{n:05d}", Path(), labels(owner)) for n, owner in enumerate(owners)
            ]
            keys = {each.id: owner for each, owner in zip(recordings, owners, strict=True)}
            dealt = deal(recordings, keys, by_split, least)
            assert sorted(sum(dealt.values(), [])) == recordings
            groups = {split: {keys[each.id] for each in some} for split, some in dealt.items()}
            assert sum(map(len, groups.values())) == len(sizes)
            assert min(map(len, groups.values())) >= min(least, len(sizes) // 3)


@pytest.mark.parametrize("speakers", [3, 4, 6])
def test_a_few_speakers_are_dealt_with_the_default_shares(tmp_path: Path, speakers: int) -> None:
    names = [f"{word}/s{who}-{n}.wav" for word in "ab" for who in range(speakers) for n in range(5)]
    corpus = folders(str(make(tmp_path, *names)), r"(?P<label>\w)/(?P<speaker>s\d)-\d")
    assert all({each.label for each in some} == {"a", "b"} for some in corpus.values())
    if speakers == 6:
        pairs = folders(str(tmp_path), r"\w/(?P<label>s\d)-\d", unseen=True)
        assert [len({each.label for each in some}) for some in pairs.values()] == [2, 2, 2]
        for split in ("valid", "test"):
            make_trials({each.id: each.label for each in pairs[split]})


def test_each_class_is_dealt_by_the_shares() -> None:
    recordings = [Recording(f"{n}", Path(), "often" if n < 200 else "rare") for n in range(220)]
    dealt = deal(recordings, {each.id: each.id for each in recordings}, SHARES)
    counts = {split: Counter(each.label for each in some) for split, some in dealt.items()}
    assert {split: dict(each) for split, each in counts.items()} == {
        "train": {"often": 120, "rare": 12},
        "valid": {"often": 40, "rare": 4},
        "test": {"often": 40, "rare": 4},
    }


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    names = [f"{label}/{n}.wav" for label in ("no", "yes") for n in range(10)]
    make(tmp_path, *names, "_background_noise_/hum.wav", "no/deeper/10.flac")
    corpus = folders(str(tmp_path))
    every = [each for recordings in corpus.values() for each in recordings]
    assert len(every) == 21
    assert {each.label for each in every} == {"no", "yes"}
    assert {each.label for each in corpus["test"]} == {"no", "yes"}
    assert all(each.path.is_file() and each.seconds == 0.1 for each in every)
    assert all(each.label == each.id.split("/")[0] for each in every)
    assert folders(str(tmp_path)) == corpus
    only = folders(str(tmp_path / "no"), r"(?P<label>\d|d).*", ["1", "2", "3"], 0.3, 0.3)
    assert Counter(each.label for r in only.values() for each in r) == {"1": 1, "2": 1, "3": 1}


def test_folders_and_lists_that_say_what_is_for_what(tmp_path: Path) -> None:
    names = [f"{split}/{label}/1.wav" for split in ("train", "dev", "test") for label in "ab"]
    corpus = folders(str(make(tmp_path / "folders", *names)))
    assert ids(corpus)["valid"] == ["dev/a/1", "dev/b/1"]
    assert [each.label for each in corpus["valid"]] == ["a", "b"]
    speech = make(
        tmp_path / "speech", *(f"{x}/{n}_nohash_{m}.wav" for x in "ab" for n in "pqr" for m in "01")
    )
    (speech / "validation_list.txt").write_text("a/p_nohash_0.wav\nb/p_nohash_0.wav\n")
    (speech / "testing_list.txt").write_text("a/q_nohash_0.wav\na/q_nohash_1.wav\r\n")
    corpus = folders(str(speech))
    assert ids(corpus)["valid"] == ["a/p_nohash_0", "b/p_nohash_0"]
    assert ids(corpus)["test"] == ["a/q_nohash_0", "a/q_nohash_1"]
    assert len(corpus["train"]) == 8
    pattern = r"(?P<label>[^/_]+)/(?P<speaker>[^_]+)_nohash_\d+"
    with pytest.raises(
        ValueError, match="the speaker 'p' is in train .* and valid .*, and 1 more "
    ):
        folders(str(speech), pattern)
    (speech / "testing_list.txt").write_text("a/q_nohash_9.wav\n")
    with pytest.raises(ValueError, match=r"line 1 of .* names 'a/q_nohash_9.wav', which is not"):
        folders(str(speech))


def test_speakers_that_a_name_tells_are_in_one_split(tmp_path: Path) -> None:
    make(tmp_path, *(f"{d}_{who}_{n}.wav" for d in "01" for who in "pqrst" for n in "123"))
    corpus = folders(str(tmp_path), r"(?P<label>\d)_(?P<speaker>[a-z])_\d", valid=0.2, test=0.2)
    speakers = {split: {each.speaker for each in some} for split, some in corpus.items()}
    assert {split: len(each) for split, each in speakers.items()} == {
        "train": 3, "valid": 1, "test": 1
    }  # fmt: skip
    assert len(set().union(*speakers.values())) == 5


def test_one_recording_under_several_names_is_in_one_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, *(f"{label}/{n}.wav" for label in "ab" for n in range(6)))
    for n in range(1, 6):
        shutil.copy(tmp_path / "a/0.wav", tmp_path / f"a/copy{n}.wav")
        os.symlink(tmp_path / "b/0.wav", tmp_path / f"b/link{n}.wav")
    corpus = folders(str(tmp_path), valid=0.3, test=0.3)
    for same in ("copy", "link"):
        homes = {split for split, some in ids(corpus).items() if any(same in id for id in some)}
        assert len(homes) == 1, same
    given_splits = tmp_path / "given"
    for n, split in enumerate(("train", "valid", "test")):
        make(given_splits, f"{split}/a/{n}.wav", f"{split}/b/{n}.wav")
    shutil.copy(given_splits / "train/a/0.wav", given_splits / "test/a/7.wav")
    shutil.copy(given_splits / "valid/b/1.wav", given_splits / "valid/b/8.wav")
    found = ids(folders(str(given_splits)))
    assert found["train"] == ["train/b/0"]
    assert found["valid"] == ["valid/a/1", "valid/b/1", "valid/b/8"]
    assert found["test"] == ["test/a/2", "test/a/7", "test/b/2"]
    assert "1 recordings of train are in test under other names, left out: train/a/0" in caplog.text
    (given_splits / "train/b/0.wav").unlink()
    with pytest.raises(ValueError, match="every recording of train is in another split under ano"):
        folders(str(given_splits))


def test_a_file_that_cannot_be_used_moves_no_other_to_another_split(tmp_path: Path) -> None:
    make(tmp_path, *(f"{label}/{n}.wav" for label in "abc" for n in range(20)))
    before = ids(folders(str(tmp_path)))
    for name in (before["train"][3], before["test"][0]):
        (tmp_path / f"{name}.wav").write_bytes(b"")
        before = {split: [each for each in some if each != name] for split, some in before.items()}
        assert ids(folders(str(tmp_path))) == before


def test_labels_that_are_to_be_new_are_in_one_split(tmp_path: Path) -> None:
    make(tmp_path, *(f"s{who:02d}/{n}.wav" for who in range(20) for n in range(3)))
    corpus = folders(str(tmp_path), unseen=True)
    found = {split: {each.label for each in some} for split, some in corpus.items()}
    assert {split: len(each) for split, each in found.items()} == {
        "train": 16, "valid": 2, "test": 2
    }  # fmt: skip
    assert len(set().union(*found.values())) == 20


def test_the_speakers_of_a_list_of_trials_are_those_of_the_test(tmp_path: Path) -> None:
    make(tmp_path, *(f"s{who}/{n}.wav" for who in range(6) for n in range(3)))
    trials = tmp_path / "trials.txt"
    trials.write_text("1 s1/0.wav s1/2.wav\n0 s1/0.wav s4/1.wav\n")
    corpus = folders(str(tmp_path), unseen=True, trials=str(trials), valid=0.3)
    assert {each.label for each in corpus["test"]} == {"s1", "s4"}
    assert len(corpus["test"]) == 6
    assert len({each.label for each in corpus["valid"]}) == 2  # of whom pairs are made
    trials.write_text("1 x/0.wav x/2.wav\n0 s1/0.wav y/1.wav\n")
    with pytest.raises(ValueError, match="names 3 recordings that are not there, in 2 of 2 trials"):
        folders(str(tmp_path), unseen=True, trials=str(trials))
    with pytest.raises(ValueError, match="trials has an effect only with unseen: true"):
        folders(str(tmp_path), trials=str(trials))


# ------------------------------------------------------------------------------------------- tables


def test_a_table(tmp_path: Path) -> None:
    make(tmp_path / "audio", *(f"{n}.wav" for n in range(5)))
    rows = ["id|emotion|speaker|split", "0|glad|p|train", "1.wav|sad|p|train", "2|sad|q|dev",
            "3|glad|r|test", "4|sad|r|test"]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(rows))
    columns = {"path": "id", "label": "emotion"}
    corpus = table(str(tmp_path), "t.csv", "audio", columns)
    assert ids(corpus) == {"train": ["0", "1"], "valid": ["2"], "test": ["3", "4"]}
    assert [each.label for each in corpus["test"]] == ["glad", "sad"]
    assert [each.speaker for each in corpus["train"]] == ["p", "p"]


HEAD = "path,label,speaker,split\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,split\n0,train\n", "has no column label"),
        (HEAD + "0,,p,train\n", "line 2 of .* has no label"),
        (HEAD + "0,a,p,tarin\n", "line 2 of .* has the split 'tarin'; allowed: train, valid, test"),
        (HEAD + "0,a,p,train\n1,b,p,\n", "some recordings have a split and others none, such as"),
        (HEAD + "0,a,p,train\n0.wav,b,p,test\n", "line 3 of .* has the name .* of line 2 again"),
        (HEAD + "../0,a,p,train\n", "line 2 of .* contains '..'"),
        (HEAD + "0,a,p,train\n1,b,p,valid\n2,a,p,test\n", r"'p' is in train \(0\) and valid \(1"),
        (HEAD + "0,a,p,train\n1,b,p,train\n", "has no usable recording for valid, test"),
        (HEAD + "0,a,p,\n1,b,p,\n2,b,p,\n", "has no usable recording for .* 1 groups that must"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    make(tmp_path, "0.wav", "1.wav", "2.wav")
    (tmp_path / "utterances.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        table(str(tmp_path), max_bad=0.9)


def test_speakers_may_be_the_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"{who}{n}.wav" for who in "ab" for n in range(10)))
    rows = [f"{who}{n},{who}" for who in "ab" for n in range(10)]
    (tmp_path / "utterances.csv").write_text("\n".join(["path,speaker", *rows]))
    corpus = table(str(tmp_path), columns={"label": "speaker"})
    assert {each.label for each in corpus["test"]} == {"a", "b"}
    with pytest.raises(ValueError, match="no usable recording for test: 20 recordings in 2"):
        table(str(tmp_path), columns={"label": "speaker"}, unseen=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": ".*"}, "has no group"),
        ({"pattern": "(?P<label>x)"}, "none of the 6 recordings in .* fits the pattern"),
        ({"classes": ["a", "z"]}, "classes has z; the recordings have a, b"),
        ({"valid": 0.5, "test": 0.5}, "together below 1"),
    ],
)
def test_folders_that_do_not_fit_are_a_sentence(
    tmp_path: Path, given: dict[str, object], message: str
) -> None:
    make(tmp_path, *(f"{label}/{n}.wav" for label in "ab" for n in range(3)))
    with pytest.raises(ValueError, match=message):
        folders(str(tmp_path), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not there"):
        folders(str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------ dataset


def dataset(path: Path, seconds: float, train: bool, rate: int = 8000) -> Labelled:
    recording = Recording("x", path, "b", None, soundfile.info(path).duration)
    return Labelled([recording], ["a", "b"], rate, seconds, shortest=400, train=train)


def test_parts_to_train_are_drawn_and_others_are_from_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    sound = np.arange(8000) / 8000
    soundfile.write(path, sound, 8000, subtype="FLOAT")
    part = dataset(path, 0.5, train=False)[0]
    assert (part["id"], part["label"], part["name"]) == ("x", 1, "b")
    assert torch.equal(part["sig"], torch.from_numpy(sound[2000:6000]).float())
    train, starts = dataset(path, 0.5, train=True), []
    for epoch in (1, 2, 1):
        with in_epoch(epoch, seed=3):
            part = train[0]["sig"]
        start = round(float(part[0]) * 8000)
        assert torch.equal(part, torch.from_numpy(sound[start : start + 4000]).float())
        starts.append(start)
    assert starts[0] == starts[2] != starts[1]
    assert torch.equal(dataset(path, 3.0, train=True)[0]["sig"], torch.from_numpy(sound).float())
    assert dataset(path, 3.0, train=True).durations == [1.0]


def test_any_rate_and_number_of_channels(tmp_path: Path) -> None:
    record(tmp_path / "x.wav", 0.5, 44100, channels=2)
    assert abs(len(dataset(tmp_path / "x.wav", 3.0, train=False)[0]["sig"]) - 4000) <= 1


def test_a_recording_that_is_too_short_is_a_bad_item(tmp_path: Path) -> None:
    record(tmp_path / "x.wav", 0.04)
    with pytest.raises(BadItem, match="it has 320 samples at 8000 Hz; the encoder needs 400"):
        dataset(tmp_path / "x.wav", 3.0, train=True)[0]
    with pytest.raises(ValueError, match=r"parts of 0.01 s are taken; the encoder needs 400 samp"):
        dataset(tmp_path / "x.wav", 0.01, train=True)
