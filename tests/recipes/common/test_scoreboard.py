"""The board adds up what judges say, and keeps what is worth hearing."""

import csv
from pathlib import Path

import pytest
import soundfile
import torch

from recipes.common.judges import Judges
from recipes.common.scoreboard import Scoreboard
from tests.recipes.common.speakers import RATE, noise, voice


class Counting(Judges):
    """Counts what it is asked to measure."""

    asked = 0

    def submit(self, *arguments: object) -> None:
        self.asked += 1
        super().submit(*arguments)


@pytest.fixture
def board(tmp_path: Path) -> Scoreboard:
    return Scoreboard(Counting(["si_snr"], RATE, workers=0), tmp_path / "run")


def fill(board: Scoreboard, clips: int = 7) -> dict[str, float]:
    """Clips whose SI-SNR rises with their number; all were at 0 dB."""
    clean = voice(0.5)
    for number in range(clips):
        length = len(clean) - number
        noisy = clean + clean.std() * noise(len(clean), 1)
        enhanced = clean + 10 ** (-number / 20) * clean.std() * noise(len(clean), 2)
        noisy[length:] = enhanced[length:] = 1e3  # what lies beyond a clip's end is nobody's
        sides = (each[None] for each in (noisy, enhanced))
        board.add([f"clip/{number}"], clean[None], torch.tensor([length]), *sides)
    return board.finish()


def test_means_and_the_table(board: Scoreboard) -> None:
    board.start("test", extremes=2)
    means = fill(board)
    assert list(means) == ["si_snr", "si_snr_noisy"]
    assert means["si_snr"] == pytest.approx(3.0, abs=0.3)
    assert means["si_snr_noisy"] == pytest.approx(0.0, abs=0.3)
    with (board.folder / "scores_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [*(f"clip/{n}" for n in range(7)), "mean"]
    scores = [float(row["si_snr"]) for row in rows[:-1]]
    assert scores == sorted(scores)
    assert float(rows[-1]["si_snr"]) == pytest.approx(means["si_snr"], abs=1e-4)
    assert sum(scores) / 7 == pytest.approx(means["si_snr"], abs=1e-3)


def test_the_best_and_the_worst_can_be_heard(board: Scoreboard) -> None:
    board.start("test", extremes=2)
    fill(board)
    names = sorted(path.name for path in (board.folder / "audio_test").iterdir())
    clips = [("best_1", 6), ("best_2", 5), ("worst_1", 0), ("worst_2", 1)]
    kinds = ("clean", "enhanced", "noisy")
    assert names == [f"{place}_clip_{n}_{kind}.wav" for place, n in clips for kind in kinds]
    sound, rate = soundfile.read(board.folder / "audio_test" / "best_2_clip_5_clean.wav")
    assert rate == RATE
    assert len(sound) == len(voice(0.5)) - 5
    torch.testing.assert_close(torch.from_numpy(sound).float(), voice(0.5)[:-5], atol=1e-4, rtol=0)


def test_no_more_sounds_are_kept_than_may_be_written(board: Scoreboard) -> None:
    board.start("test", extremes=1)
    kept = []
    take = board._take

    def watched(found: dict[str, dict[str, float]]) -> None:
        take(found)
        kept.append(len(board._sounds))

    board._take = watched
    fill(board, 12)
    assert max(kept) <= 3
    board.start("valid")
    fill(board)
    assert not (board.folder / "audio_valid").exists()


def test_what_was_noisy_is_measured_once(board: Scoreboard) -> None:
    for stage, asked in (("valid", 14), ("valid", 21), ("test", 28)):
        board.start(stage)
        fill(board)
        assert board.judges.asked == asked


def test_clips_that_cannot_be_measured_are_left_out_of_the_mean(
    board: Scoreboard, caplog: pytest.LogCaptureFixture
) -> None:
    clean, lengths = voice(0.5)[None], torch.tensor([8000])
    heard = clean + clean.std() * noise(8000)
    board.start("test", extremes=1)
    board.add(["good"], clean, lengths, heard, heard)
    board.add(["silent"], clean, lengths, heard, torch.zeros_like(heard))
    means = board.finish()
    assert means["si_snr"] == means["si_snr_noisy"]
    assert "si_snr of test: 1 of 2 clips could not be measured, the mean is over" in caplog.text
    lines = (board.folder / "scores_test.csv").read_text().splitlines()
    assert lines[2].startswith("silent,,")
    board.start("test")
    board.add(["silent"], clean, lengths, heard, torch.zeros_like(heard))
    with pytest.raises(ValueError, match=r"none of 1 clips could be measured \(silent: SI-SNR of"):
        board.finish()
