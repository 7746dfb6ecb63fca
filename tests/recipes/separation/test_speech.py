"""Corpora of single speakers: who is in which split, and what is said of unusable folders."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from recipes.separation.speech import Coloured, by_speakers, listed, recorded, wham
from tests.recipes.separation.conftest import RATE, buzz, cut_of, librispeech_part, write
from trainer.data import BadItem

PARTS = {"train": ["train-clean-100"], "valid": ["dev-clean"], "test": ["dev-clean"]}


def speakers(cuts: CutSet) -> set[str]:
    return {cut.supervisions[0].speaker for cut in cuts}


@pytest.fixture(scope="module")
def librispeech_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    librispeech_part(root, "train-clean-100", range(10, 16))
    librispeech_part(root, "dev-clean", range(20, 24))
    lines = [
        "; id | sex | part\n",
        *(f"{n} | {'FM'[n % 2]} | part | 1.0 | name\n" for n in range(10, 23)),
    ]
    (root / "SPEAKERS.TXT").write_text("".join(lines))
    return root


def test_parts_are_splits_and_a_shared_part_is_dealt_by_its_speakers(
    librispeech_like: Path, tmp_path: Path
) -> None:
    corpus = recorded(str(librispeech_like), PARTS, str(tmp_path))
    assert speakers(corpus["train"]) == {str(n) for n in range(10, 16)}
    assert speakers(corpus["valid"]) | speakers(corpus["test"]) == {str(n) for n in range(20, 24)}
    assert not speakers(corpus["valid"]) & speakers(corpus["test"])
    assert {len(corpus[split]) for split in ("valid", "test")} == {4}
    again = recorded(str(librispeech_like), PARTS, str(tmp_path))
    assert speakers(again["test"]) == speakers(corpus["test"])


def test_genders_come_from_the_list_of_speakers(librispeech_like: Path, tmp_path: Path) -> None:
    corpus = recorded(str(librispeech_like), PARTS, str(tmp_path))
    told = {
        cut.supervisions[0].speaker: cut.supervisions[0].gender
        for cuts in corpus.values()
        for cut in cuts
    }
    assert told["10"] == "female"
    assert told["11"] == "male"
    assert told["23"] is None  # not in the list


def test_a_folder_that_is_not_librispeech_is_told(librispeech_like: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not there; expected was a folder of folders"):
        recorded(str(tmp_path / "nowhere"), PARTS, str(tmp_path))
    with pytest.raises(
        ValueError, match="test is made of test-clean; .* has none of these, but dev"
    ):
        recorded(str(librispeech_like), {**PARTS, "test": ["test-clean"]}, str(tmp_path))
    every = dict.fromkeys(PARTS, ["dev-clean"])
    with pytest.raises(ValueError, match="dev-clean has 4 speakers; train, valid, test need two"):
        recorded(str(librispeech_like), every, str(tmp_path))
    empty = tmp_path / "empty"
    for name in ("train-clean-100", "dev-clean"):
        (empty / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="dev-clean has another layout: expected were, as in"):
        recorded(str(empty), PARTS, str(tmp_path / "prepared"))


def test_a_recording_of_librispeech_that_is_cut_is_left_out_or_ends_the_run(
    librispeech_like: Path, tmp_path: Path
) -> None:
    root, prepared = tmp_path / "LibriSpeech", str(tmp_path / "prepared")
    shutil.copytree(librispeech_like, root)
    recorded(str(root), PARTS, prepared)
    (root / "train-clean-100/10/1/10-1-0000.flac").write_bytes(b"")  # after it was prepared
    assert len(recorded(str(root), PARTS, prepared, max_bad=0.1)["train"]) == 11
    with pytest.raises(ValueError, match="1 of 12 files are bad"):
        recorded(str(root), PARTS, prepared)
    with pytest.raises(BadItem, match="10-1-0000.flac: it is empty"):
        recorded(str(root), PARTS, prepared, on_bad="raise")


def test_speakers_are_dealt_once(voices: CutSet, tmp_path: Path) -> None:
    cuts = []
    for number in range(30):
        path = write(tmp_path / f"{number}.wav", buzz(100, 0.2, number))
        cuts.append(cut_of(path, f"p{number}", None))
    dealt = by_speakers(cuts, ["train", "valid", "test"], "all")
    assert [len(speakers(CutSet.from_cuts(dealt[s]))) for s in ("train", "valid", "test")] == [
        24,
        3,
        3,
    ]
    assert sorted(cut.id for part in dealt.values() for cut in part) == sorted(c.id for c in cuts)
    assert by_speakers(cuts, ["test"], "all") == {"test": cuts}


def table(root: Path, people: int = 8, gap: str = "|") -> Path:
    """Two recordings of 0.3 s of each person, every fourth of whom is to test."""
    rows = [gap.join(["id", "split", "speaker", "gender", "text"])]
    for number in range(people):
        for take in range(2):
            name, split = f"{number:03d}{take}", "train" if number % 4 else "test"
            write(root / "audio" / f"{name}.flac", buzz(90 + 20 * number, 0.3, take), 16000)
            rows.append(gap.join([name, split, str(number), "fm"[number % 2], "some words"]))
    (root / "utterances.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("gap", ["|", ","])
def test_a_table_lists_recordings(tmp_path: Path, gap: str) -> None:
    corpus = recorded(str(table(tmp_path, gap=gap)), PARTS, str(tmp_path))
    assert speakers(corpus["test"]) == {"0", "4"}
    assert len(speakers(corpus["valid"])) == 2
    assert len(speakers(corpus["train"])) == 4
    assert not speakers(corpus["train"]) & speakers(corpus["valid"])
    cut = next(iter(corpus["test"]))
    assert (cut.sampling_rate, cut.supervisions[0].gender) == (16000, "female")
    assert cut.load_audio().shape == (1, round(0.3 * 8000))  # what was written at twice the rate


def test_a_table_that_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not there; expected was a folder of a table utterances"):
        listed(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"utterances.csv is not there; expected was a table with"):
        listed(str(tmp_path))
    root = table(tmp_path)
    whole = (root / "utterances.csv").read_text()
    (root / "utterances.csv").write_text(whole + "1230|train|1|f|words\n")
    with pytest.raises(ValueError, match=r"1 of 17 files are bad.*\n.*1230.wav: it does not exist"):
        listed(str(root))
    assert sum(len(cuts) for cuts in listed(str(root), max_bad=0.1).values()) == 16
    (root / "utterances.csv").write_text(whole.replace("speaker", "person"))
    with pytest.raises(
        ValueError, match="utterances.csv has no column speaker, but id, split, per"
    ):
        listed(str(root))
    (root / "utterances.csv").write_text(whole.replace("|test|", "|train|"))
    with pytest.raises(ValueError, match="has no usable recording of test"):
        listed(str(root))
    (root / "utterances.csv").write_text(whole)
    (root / "audio" / "0010.flac").write_bytes(b"")
    with pytest.raises(BadItem, match=r"0010.flac: it is empty"):
        listed(str(root), on_bad="raise")
    assert sum(len(cuts) for cuts in listed(str(root), max_bad=0.1).values()) == 15


def test_coloured_noise_is_another_one_each_time() -> None:
    noise, rng = Coloured(1.0), random.Random(1)
    first, second = noise(rng, 1000), noise(rng, 1000)
    assert first.shape == (1000,)
    assert not torch.equal(first, second)
    assert torch.equal(first, noise(random.Random(1), 1000))


def test_noise_of_wham_is_found_and_cut(tmp_path: Path) -> None:
    root = tmp_path / "wham_noise"
    for number, name in enumerate(("tr", "cv", "tt")):
        stereo = 0.1 * torch.randn(16000, 2, generator=torch.Generator().manual_seed(number))
        write(root / name / f"{name}1.wav", stereo.numpy(), 16000)
        write(root / name / f"{name}2.wav", stereo[:1000].numpy(), 16000)  # too short
    found = wham(str(root), RATE, 0.5)
    assert set(found) == {"train", "valid", "test"}
    rng = random.Random(1)
    first, second = found["test"](rng, 4000), found["test"](rng, 4000)
    assert first.shape == second.shape == (4000,)
    assert first.square().mean() > 0
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="none of the 2 recordings of noise lasts 3 s"):
        wham(str(root), RATE, 3.0)
    shutil.rmtree(root / "cv")
    with pytest.raises(ValueError, match="has no folder cv; expected: tr, cv, tt"):
        wham(str(root), RATE, 0.5)
