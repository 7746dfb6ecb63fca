"""The table, the samples and the means of a test."""

import csv
import math
from pathlib import Path

import pytest
import torch

from recipes.common.griffin_lim import GriffinLim
from recipes.common.judges import Judges
from recipes.common.mel import LogMel
from recipes.hifigan.scoring import Scores, mel_distance
from trainer.samples import Audio

KEYS = ["mel_l1", "mel_l1_griffinlim", "stoi", "stoi_griffinlim"]


def speech(seed: int, samples: int = 16384) -> torch.Tensor:
    """A buzz that comes and goes, with some noise."""
    time = torch.arange(samples) / 16000
    buzz = sum(torch.sin(2 * math.pi * (120 + 10 * seed) * k * time) / k for k in range(1, 30))
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return 0.05 * buzz * (1.2 + torch.sin(2 * math.pi * 4 * time)) + 0.001 * noise


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    mel = LogMel(16000)
    judges = Judges(["stoi"], 16000, workers=0)
    return Scores(judges, mel, GriffinLim(mel, iterations=5), tmp_path, shown=2)


def fill(scores: Scores, number: int = 3) -> dict[str, float]:
    scores.start()
    for n in range(number):
        wav = speech(n)
        scores.add(f"clip/{n}", wav, 0.5 * wav)
    return scores.finish()


def test_means_are_of_all_clips(scores: Scores, tmp_path: Path) -> None:
    means = fill(scores)
    assert list(means) == KEYS
    with (tmp_path / "scores_test.csv").open() as file:
        *rows, last = csv.DictReader(file)
    assert [row["id"] for row in rows] == ["clip/0", "clip/1", "clip/2"]
    for key in KEYS:
        column = [float(row[key]) for row in rows]
        assert means[key] == pytest.approx(sum(column) / 3, abs=1e-4)
        assert float(last[key]) == pytest.approx(means[key], abs=1e-4)
    # Half as loud is log 2 less in every band that is above the floor.
    assert means["mel_l1"] == pytest.approx(math.log(2), abs=0.02)
    assert means["stoi"] == pytest.approx(1.0, abs=1e-3)


def test_some_clips_are_kept_to_hear(scores: Scores) -> None:
    fill(scores)
    rows = scores.samples()
    assert [row["id"] for row in rows] == ["clip/0", "clip/1"]
    for n, row in enumerate(rows):
        assert sorted(row) == sorted(["id", *KEYS, "original", "resynthesised", "Griffin-Lim"])
        original = row["original"]
        assert isinstance(original, Audio)
        assert original.rate == 16000
        assert torch.allclose(original.signal(), speech(n), atol=1e-4)


def test_a_second_test_forgets_the_first(scores: Scores) -> None:
    first = fill(scores)
    assert fill(scores, 1) != first
    assert fill(scores) == first


def test_what_no_clip_has_is_told(scores: Scores) -> None:
    scores.start()
    scores.add("short", speech(0, 2048), speech(0, 2048))
    with pytest.raises(ValueError, match="stoi: none of 1 clips could be measured"):
        scores.finish()


def test_the_distance_is_zero_only_for_the_same_mels() -> None:
    mel = LogMel(16000)
    assert mel_distance(mel, speech(0), speech(0)) == 0.0
    assert mel_distance(mel, speech(0), -speech(0)) == pytest.approx(0.0, abs=1e-5)
    assert mel_distance(mel, speech(0), speech(1)) > 0.1
