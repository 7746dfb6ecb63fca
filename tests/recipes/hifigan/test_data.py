"""Folders of sounds as train, valid and test, and clips made of them."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes.hifigan.data import Clips, datasets, folder
from trainer.data import BadItem, make_loader

RATE = 8000


def sound(path: Path, samples: int, rate: int = RATE) -> None:
    """A ramp, so that every sample tells where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.arange(samples, dtype=np.int16)
    soundfile.write(path, ramp, rate, subtype="PCM_16")


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Twelve clips of 1,000 to 1,011 samples, half of them in a subfolder."""
    for number in range(12):
        below = "more/" if number % 2 else ""
        sound(tmp_path / f"{below}clip{number}.{'flac' if number % 3 else 'wav'}", 1000 + number)
    (tmp_path / "notes.txt").write_text("not a sound")
    return tmp_path


def names(corpus: object) -> dict[str, list[str]]:
    return {split: [cut.id for cut in cuts] for split, cuts in corpus.items()}


def test_every_file_is_in_one_split(sounds: Path) -> None:
    found = names(folder(str(sounds), valid=2, test=3))
    assert {split: len(ids) for split, ids in found.items()} == {"train": 7, "valid": 2, "test": 3}
    every = sorted(id for ids in found.values() for id in ids)
    expected = [f"{'more/' if n % 2 else ''}clip{n}" for n in range(12)]
    assert every == sorted(expected)
    assert found == names(folder(str(sounds), valid=2, test=3))


def test_what_is_held_out_depends_on_names_alone(sounds: Path, tmp_path_factory: object) -> None:
    moved = tmp_path_factory.mktemp("elsewhere")
    for path in sounds.rglob("clip*"):
        sound(moved / path.relative_to(sounds).with_suffix(".wav"), 50)
    assert names(folder(str(moved), 2, 3)) == names(folder(str(sounds), 2, 3))


def test_too_few_files_and_no_folder_are_told(sounds: Path) -> None:
    with pytest.raises(ValueError, match="has 12 usable sound files .*; needed are 6 for valid, 6"):
        folder(str(sounds), valid=6, test=6)
    with pytest.raises(ValueError, match="nowhere is not there; expected was a folder of sound"):
        folder("nowhere", 1, 1)


def test_broken_files_are_left_out_or_too_many(sounds: Path) -> None:
    (sounds / "broken.wav").write_bytes(b"RIFF")
    assert sum(map(len, folder(str(sounds), 2, 3, max_bad=0.1).values())) == 12
    with pytest.raises(ValueError, match=r"(?s)1 of 13 files are bad.*broken.wav"):
        folder(str(sounds), 2, 3, max_bad=0.05)
    with pytest.raises(BadItem, match=r"broken.wav"):
        folder(str(sounds), 2, 3, on_bad="raise")


def test_segments_are_parts_of_their_clips_and_others_each_epoch(sounds: Path) -> None:
    data = datasets(folder(str(sounds), 2, 3), RATE, 256, times=3)["train"]
    assert len(data) == 7 * 3
    loader = make_loader(data, train=True, batch_size=21, seed=1)
    starts = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch.wav.data.shape == (21, 256)
        ramps = (batch.wav.data * 32768).round().long()
        assert torch.equal(ramps - ramps[:, :1], torch.arange(256).expand(21, -1))
        by_name = sorted(zip(batch.id, ramps[:, 0].tolist(), strict=True))
        starts.append([start for _, start in by_name])
        assert len({*starts[-1]}) > 10
        assert [name for name, _ in by_name] == sorted(cut.id for cut in data.cuts * 3)
    assert starts[0] != starts[1]


def test_every_part_can_be_drawn(sounds: Path) -> None:
    data = Clips(list(folder(str(sounds), 2, 3)["train"])[:1], RATE, 900, times=300)
    starts = {round(float(data[index]["wav"][0]) * 32768) for index in range(300)}
    assert min(starts) == 0
    assert max(starts) > 10


def test_valid_and_test_are_whole(sounds: Path) -> None:
    sets = datasets(folder(str(sounds), 2, 3), RATE, 256, times=3)
    for split, count in (("valid", 2), ("test", 3)):
        assert len(sets[split]) == count
        for index, cut in enumerate(sets[split].cuts):
            assert len(sets[split][index]["wav"]) == cut.num_samples


def test_clips_shorter_than_a_segment_are_left_out_or_there_are_no_others(sounds: Path) -> None:
    sound(sounds / "short.wav", 100)
    corpus = folder(str(sounds), 2, 3)
    kept = [cut.id for cut in datasets(corpus, RATE, 256)["train"].cuts]
    assert "short" not in kept
    assert len(kept) >= 7
    told = "no clip to train on has the 4000 samples of a segment: no audio lasts 0.500125 to inf s"
    with pytest.raises(ValueError, match=told + ": the 8 cuts last 0.01"):
        datasets(corpus, RATE, 4000)


def test_a_silent_clip_is_bad_and_a_pause_is_not(tmp_path: Path) -> None:
    half = np.concatenate([np.zeros(3000), np.random.default_rng(0).normal(0.0, 0.1, 3000)])
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", half, RATE)
    cuts = folder(str(tmp_path), 1, 1)["test"]
    clips = Clips(cuts, RATE, 256, times=30)
    parts = [clips[index]["wav"] for index in range(30)]
    silent = sum(not part.any() for part in parts)
    assert 0 < silent < 30
    assert len(Clips(cuts, RATE)[0]["wav"]) == 6000
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", 0 * half, RATE)
    for segment in (None, 256):
        with pytest.raises(BadItem, match=r"\d.wav: it is silent: nothing in it is louder"):
            Clips(cuts, RATE, segment)[0]


def test_a_clip_too_short_for_a_mel_is_bad(tmp_path: Path) -> None:
    for number in range(3):
        sound(tmp_path / f"{number}.wav", 100)
    clips = Clips(folder(str(tmp_path), 1, 1)["test"], RATE, shortest=385)
    with pytest.raises(BadItem, match="it holds 100 samples; a mel takes 385 or more"):
        clips[0]


def test_another_rate_is_refused_or_resampled(sounds: Path) -> None:
    corpus = folder(str(sounds), 2, 3)
    told = (
        r"all 7 clips to train on have another rate; .*clip\d+ is sampled at 8000 Hz, not at 16000"
    )
    with pytest.raises(ValueError, match=told):
        datasets(corpus, 16000, 256)
    for split in ("train", "test"):  # Some may have another one: they are bad files.
        with pytest.raises(BadItem, match="it is sampled at 8000 Hz, not at 16000 Hz"):
            Clips(corpus[split], 16000, 256)[0]
    sets = datasets(corpus, 16000, 256, resample=True)
    assert sets["train"][0]["wav"].shape == (256,)
    assert len(sets["test"][0]["wav"]) == 2 * sets["test"].cuts[0].num_samples
