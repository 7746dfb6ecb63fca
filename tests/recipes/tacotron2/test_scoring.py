"""Focus rate, gate and error, against cases worked out by hand."""

import csv
from pathlib import Path

import pytest
import torch

from recipes.tacotron2.scoring import Reading, Scores, focus_rate, mel_error


def test_focus_rate_is_the_mean_of_the_largest_weights() -> None:
    attention = torch.tensor(
        [[[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]] * 3]
    )
    found = focus_rate(attention, torch.tensor([2, 3]))
    torch.testing.assert_close(found, torch.tensor([(0.7 + 0.4) / 2, 1.0]))


def test_mel_error_leaves_the_padding_out() -> None:
    found, target = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    target[0, 1:] = torch.nan
    target[1] *= 4
    torch.testing.assert_close(
        mel_error(found, target, torch.tensor([1, 3])), torch.tensor([1.0, 4.0])
    )


@pytest.mark.parametrize(
    ("frames", "stopped", "good"),
    [(100, True, True), (80, True, True), (120, True, True), (79, True, False), (121, True, False),
     (100, False, False)],
)  # fmt: skip
def test_the_gate_is_right_within_a_fifth(frames: int, stopped: bool, good: bool) -> None:
    assert Reading("a", "text", 0.5, frames, 100, stopped, 1.0).gate_ok is good


def test_rates_and_table(tmp_path: Path) -> None:
    scores = Scores()
    scores.readings = [
        Reading("b", "yes, sir", 0.5, 100, 100, True, 1.0),
        Reading("a", "no", 0.9, 10, 100, True, 2.0),
    ]
    every = scores.gather()
    assert every.rates() == {"focus_rate": 0.7, "gate_ok": 0.5, "mel_l1": 1.5}
    every.write(tmp_path / "readings.csv")
    with (tmp_path / "readings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[1]["text"] == "yes, sir"
    assert [row["gate_ok"] for row in rows] == ["False", "True"]
