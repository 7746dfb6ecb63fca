"""Corpora are found in their layouts, split without sharing anything, and refused in words."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import soundfile
import torch

from recipes.common.noisy_speech import embedded, speech_and_noise, voicebank
from recipes.common.noisy_speech.made import MadeNoise
from recipes.common.noisy_speech.mixed import RecordedNoise, recording_of
from recipes.common.pairs import Pairs
from tests.recipes.common.speakers import RATE, cut, noise, voice, write
from trainer.data import BadItem


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    """VoiceBank-DEMAND's folders, of 8 kHz files."""
    folder = tmp_path / "vbd"
    for part, names in (
        ("trainset_28spk", [f"{s}_{n:03d}" for s in ("p225", "p226", "p227") for n in range(3)]),
        ("testset", ["p232_001", "p257_001"]),
    ):
        for number, name in enumerate(names):
            clean = voice(0.5, number, 8000)
            write(folder / f"clean_{part}_wav" / f"{name}.wav", clean, 8000)
            noisy = clean + 0.01 * noise(len(clean), number)
            write(folder / f"noisy_{part}_wav" / f"{name}.wav", noisy, 8000)
    return folder


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    folder = tmp_path / "noises"
    for number, name in enumerate(("city_L", "city_R", "rain", "sea/waves", "wind_L", "wind_R")):
        write(folder / f"{name}.wav", 0.1 * noise(8000, number))
    return folder


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "LibriSpeech"
    for part, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-clean", "61")):
        for chapter in ("1", "2"):
            for number in range(2):
                name = f"{speaker}-{chapter}-{number:04d}.flac"
                write(folder / part / speaker / chapter / name, voice(0.5, number))
    return folder


# --- embedded ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo"
)
def test_embedded_splits_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_CACHE", str(tmp_path))
    corpus = embedded(4, 3, 3, snr=(5.0, 5.0))
    assert {split: len(sources) for split, sources in corpus.items()} == {
        "train": 4, "valid": 3, "test": 3,
    }  # fmt: skip
    voices = [set(sources[0].noise.voices) for sources in corpus.values()]
    assert not voices[0] & voices[1]
    assert not voices[1] & voices[2]
    item = Pairs(corpus["test"], RATE, fixed=True)[0]
    ratio = item["clean"].square().mean() / (item["noisy"] - item["clean"]).square().mean()
    assert 10 * ratio.log10().item() == pytest.approx(5.0, abs=0.01)


def test_babble_is_of_other_voices(tmp_path: Path) -> None:
    """Each speaker has a tone: the babble behind one has all tones but that one."""
    time = torch.arange(RATE) / RATE
    tones = {"ann": 500, "bob": 1000, "eve": 1500}
    cuts = [
        cut(write(tmp_path / f"{n}.wav", 0.1 * torch.sin(2 * torch.pi * f * time)), n)
        for n, f in tones.items()
    ]
    made = MadeNoise(cuts, babble_share=1.0)
    for each in cuts:
        found = torch.fft.rfft(made(each, RATE, RATE, random.Random(1))).abs()
        heard = {name for name, f in tones.items() if found[f] > 0.1 * found.max()}
        assert heard == set(tones) - {each.id}


def test_too_few_voices_give_coloured_noise_alone(tmp_path: Path) -> None:
    alone = [cut(write(tmp_path / "a.wav", voice()))]
    made = MadeNoise(alone, babble_share=1.0)
    first, again, other = (made(alone[0], 5000, RATE, random.Random(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (5000,)
    with pytest.raises(ValueError, match="babble_share must be a number from 0 to 1, not 1.5"):
        MadeNoise(alone, babble_share=1.5)


# --- VoiceBank-DEMAND ----------------------------------------------------------------------------


def test_the_official_split(pairs_folder: Path) -> None:
    corpus = voicebank(str(pairs_folder))
    names = {split: [each.id for each in sources] for split, sources in corpus.items()}
    assert names["valid"] == ["p226_000", "p226_001", "p226_002"]
    assert {name[:4] for name in names["train"]} == {"p225", "p227"}
    assert names["test"] == ["p232_001", "p257_001"]
    item = Pairs(corpus["test"], RATE, fixed=True)[1]  # 8 kHz files at 16 kHz
    assert item["clean"].shape == (8000,)
    assert 0.005 < (item["noisy"] - item["clean"]).std() < 0.02


def test_speakers_may_have_folders_with_the_same_names_in_them(tmp_path: Path) -> None:
    for side in ("clean", "noisy"):
        for number, name in enumerate(("p1/001", "p2/001", "p3/001")):
            write(tmp_path / side / f"{name}.wav", voice(0.5, number, 8000), 8000)
    folders = {"train": ["clean", "noisy"], "test": ["clean", "noisy"]}
    corpus = voicebank(str(tmp_path), folders, valid=["p2"])
    assert [each.id for each in corpus["train"]] == ["p1/001", "p3/001"]
    assert [each.id for each in corpus["valid"]] == ["p2/001"]
    (pair,) = corpus["valid"]
    assert [Path(file).parts[-2:] for file in pair.files] == [("p2", "001.wav")] * 2


def test_folders_of_another_name(pairs_folder: Path) -> None:
    own = ["clean_testset_wav", "noisy_testset_wav"]
    corpus = voicebank(str(pairs_folder), {"train": own, "test": own}, valid=["p257"])
    assert [len(corpus[split]) for split in ("train", "valid", "test")] == [1, 1, 2]
    wrong = "folders has test: ['one']; allowed: train and test, [clean, noisy] each"
    with pytest.raises(ValueError, match=re.escape(wrong)):
        voicebank(str(pairs_folder), {"test": ["one"]})


def test_a_missing_layout_is_told(pairs_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"clean_trainset_28spk_wav is not there; .* has "):
        voicebank(str(pairs_folder.parent))
    empty = pairs_folder / "noisy_testset_wav"
    for file in empty.iterdir():
        file.unlink()
    wrong = f"{empty} has another layout: expected were sound files, such as .wav"
    with pytest.raises(ValueError, match=re.escape(wrong)):
        voicebank(str(pairs_folder))
    with pytest.raises(ValueError, match="valid has no clips in"):
        voicebank(str(pairs_folder), {"test": ["clean_trainset_28spk_wav"] * 2}, valid=["p999"])


def noisy_file(folder: Path) -> Path:
    return folder / "noisy_trainset_28spk_wav" / "p225_001.wav"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("rate", "it has 16000 Hz, its clean partner {clean} has 8000"),
        ("length", "it has 4001 samples, its clean partner {clean} has 4000"),
        ("channels", "it has 2 channels, its clean partner {clean} has 1"),
        ("name", "it has no partner of the same name in {folder}"),
        ("text", "it is not an audio file"),
    ],
)
def test_an_unusable_pair_is_named(pairs_folder: Path, fault: str, reason: str) -> None:
    noisy = noisy_file(pairs_folder)
    clean = pairs_folder / "clean_trainset_28spk_wav" / noisy.name
    data = voice(0.5, 1, 8000)
    if fault == "rate":
        write(noisy, data, 16000)
    elif fault == "length":
        write(noisy, torch.cat([data, data[:1]]), 8000)
    elif fault == "channels":
        write(noisy, torch.stack([data, data]), 8000)
    elif fault == "name":
        noisy.rename(noisy.with_name("p225_999.wav"))
    else:
        noisy.write_text("no sound")
    told = re.escape(reason.format(clean=clean, folder=noisy.parent))
    with pytest.raises(BadItem, match=told):
        voicebank(str(pairs_folder), on_bad="raise")
    with pytest.raises(ValueError, match=r"of \d+ files are bad, more than the 5.0%"):
        voicebank(str(pairs_folder))
    corpus = voicebank(str(pairs_folder), max_bad=0.25)
    assert noisy.stem not in [each.id for each in corpus["train"]]
    assert len(corpus["train"]) == 5


# --- any speech, any noise -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recording"),
    [
        ("city_L", "city"), ("city_R", "city"), ("sea/waves", "sea/waves"), ("rain-ch2", "rain"),
        ("storm_left", "storm"), ("L", "L"), ("hotel", "hotel"), ("cafe L", "cafe"),
    ],
)  # fmt: skip
def test_sides_of_a_recording_are_known_by_their_names(name: str, recording: str) -> None:
    assert recording_of(name) == recording


def test_no_recording_of_noise_is_in_two_splits(books: Path, noises: Path) -> None:
    corpus = speech_and_noise(str(books), str(noises))
    heard = [{cut.id for cut in corpus[split][0].noise.cuts} for split in corpus]
    assert sum(map(len, heard)) == 6
    assert len(set.union(*heard)) == 6
    for sides in (("city_L", "city_R"), ("wind_L", "wind_R")):
        assert [each & set(sides) for each in heard].count(set(sides)) == 1
    again = speech_and_noise(str(books), str(noises))
    assert heard == [{cut.id for cut in again[split][0].noise.cuts} for split in again]


def test_speech_is_split_by_part_speaker_or_chapter(books: Path, noises: Path) -> None:
    def names(**splits: list[str]) -> list[set[str]]:
        corpus = speech_and_noise(str(books), str(noises), splits)
        return [{each.id[:4] for each in corpus[split]} for split in ("train", "valid", "test")]

    assert names(train=["train-clean-100"], valid=["84"], test=["61-1", "61-2"]) == [
        {"19-1", "19-2"}, {"84-1", "84-2"}, {"61-1", "61-2"},
    ]  # fmt: skip
    assert names(train=["19-1"], valid=["19-2"], test=[61]) == [
        {"19-1"},
        {"19-2"},
        {"61-1", "61-2"},
    ]
    with pytest.raises(ValueError, match="train and test share 19-1-0000.flac; splits must not"):
        names(train=["19"], valid=["84"], test=["train-clean-100"])
    with pytest.raises(ValueError, match=r"has no part, speaker or chapter 20, but for instance"):
        names(train=["20"], valid=["84"], test=["61"])
    with pytest.raises(ValueError, match="splits must be given for train, valid, test; got"):
        names(train=["19"])


def test_long_clips_are_cut_to_train_and_the_others_chosen_evenly(
    books: Path, noises: Path
) -> None:
    corpus = speech_and_noise(str(books), str(noises), longest=0.2, most={"train": 1, "test": 2})
    names = {split: [each.id for each in sources] for split, sources in corpus.items()}
    assert names["train"] == [f"19-1-0000-{part}" for part in range(3)]
    assert names["test"] == ["61-1-0000", "61-2-0000"]
    assert len(names["valid"]) == 4
    parts = [each.load(RATE, random.Random(0))[0] for each in corpus["train"]]
    assert [len(part) for part in parts] == [2666, 2667, 2667]
    torch.testing.assert_close(torch.cat(parts), voice(0.5), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="most must be whole numbers of at least 1, not 0"):
        speech_and_noise(str(books), str(noises), most={"test": 0})


def test_missing_folders_are_told(books: Path, noises: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_folder .* has another layout: expected were, as"):
        speech_and_noise(str(noises), str(noises))
    with pytest.raises(ValueError, match=r"noise_folder .*none is not there"):
        speech_and_noise(str(books), str(tmp_path / "none"))
    (noises / "rain.wav").unlink()
    (noises / "sea" / "waves.wav").unlink()
    with pytest.raises(ValueError, match=r"has 2 recordings \(city, wind\), too few"):
        speech_and_noise(str(books), str(noises))
    with pytest.raises(ValueError, match=r"snr must be \[lowest, highest\] in dB, not \[5, 0\]"):
        speech_and_noise(str(books), str(noises), snr=[5, 0])


def test_a_piece_of_noise_is_as_long_as_the_speech(tmp_path: Path) -> None:
    short, long = 0.1 * noise(4000), 0.1 * noise(64000)
    files = [write(tmp_path / "s.wav", short), write(tmp_path / "l.wav", long, 32000)]
    for file, original in zip(files, (short, None), strict=True):
        made = RecordedNoise([cut(file)])
        pieces = [made(None, 9000, RATE, random.Random(n)) for n in (1, 1, 2)]
        assert {piece.shape for piece in pieces} == {(9000,)}
        assert torch.equal(pieces[0], pieces[1])
        assert not torch.equal(pieces[0], pieces[2])
        if original is not None:  # It goes round.
            torch.testing.assert_close(pieces[0][:4000], pieces[0][4000:8000])
    soundfile.write(tmp_path / "silent.wav", torch.zeros(9000).numpy(), RATE)
    with pytest.raises(BadItem, match=r"silent.wav: it is silent"):
        RecordedNoise([cut(tmp_path / "silent.wav")])(None, 100, RATE, random.Random(1))
