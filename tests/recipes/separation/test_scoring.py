"""Improvements in dB, the table of them, and the mixtures to listen to."""

import csv
import math
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from recipes.separation import scoring
from recipes.separation.scoring import Scores

RATE = 8000


def batch(noise: list[float], samples: int = 4000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixtures of two sources, and estimates in the wrong order with so much noise in each."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(len(noise), 2, samples, generator=generator)
    hiss = torch.randn(len(noise), 2, samples, generator=generator)
    estimates = (sources + torch.tensor(noise)[:, None, None] * hiss).flip(1)
    return sources.sum(1), sources, 5 * estimates, torch.full((len(noise),), samples)


@pytest.fixture
def scores() -> Scores:
    found = Scores(RATE, shown=1)
    found.add(["b", "a"], *batch([0.1, 0.01]))
    found.add(["c"], *batch([1.0]))
    return found


def test_improvements_are_over_the_mixture(scores: Scores) -> None:
    by_name = {row.id: row for row in scores.rows}
    for name, expected in (("b", 20.0), ("a", 40.0), ("c", 0.0)):
        row = by_name[name]
        assert row.si_snr == pytest.approx(expected, abs=0.4)
        assert row.sdr == pytest.approx(expected, abs=1.5)  # its filter fits some of the noise
        assert row.si_snri == pytest.approx(row.si_snr, abs=0.4)  # two sources, equally loud: 0 dB
        assert (row.seconds, row.sources) == (0.5, 2)
    means = scores.means()
    assert means["si_snri"] == pytest.approx(sum(row.si_snri for row in scores.rows) / 3)
    assert means["sdri"] == pytest.approx(sum(row.sdri or 0.0 for row in scores.rows) / 3)


def test_the_mixture_itself_is_no_improvement() -> None:
    mixtures, sources, _, lengths = batch([0.1])
    scores = Scores(RATE)
    scores.add(["a"], mixtures, sources, mixtures[:, None].expand_as(sources), lengths)
    assert scores.means() == pytest.approx({"si_snri": 0.0, "sdri": 0.0}, abs=1e-6)


def test_sdr_is_that_of_bss_eval() -> None:
    """A filtered source is no distortion to it, and one to SI-SNR."""
    _, sources, _, lengths = batch([0.0])
    filtered = 0.3 * sources + 0.5 * sources.roll(1, -1) + sources.roll(2, -1)
    scores = Scores(RATE)
    scores.add(["a"], sources.sum(1), sources, filtered, lengths)
    assert scores.rows[0].si_snr < 10
    assert (scores.rows[0].sdr or 0) > 25


def test_padding_is_not_scored() -> None:
    mixtures, sources, estimates, _ = batch([0.1])
    padded, whole = Scores(RATE), Scores(RATE)
    padded.add(["a"], mixtures, sources, estimates, torch.tensor([3000]))
    whole.add(
        ["a"], mixtures[:, :3000], sources[..., :3000], estimates[..., :3000], torch.tensor([3000])
    )
    assert padded.rows == whole.rows


def test_without_sdr_it_is_left_out() -> None:
    scores = Scores(RATE, sdr=False)
    scores.add(["a"], *batch([0.1]))
    assert list(scores.means()) == ["si_snri"]
    assert scores.rows[0].sdr is None


def test_the_table_has_a_line_per_mixture(scores: Scores, tmp_path: Path) -> None:
    every = scores.gather()
    every.write_table(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert list(rows[0]) == ["id", "seconds", "sources", "si_snr", "si_snri", "sdr", "sdri"]
    assert float(rows[0]["si_snri"]) == pytest.approx(every.rows[0].si_snri, abs=1e-3)


def test_the_worst_and_the_best_can_be_listened_to(scores: Scores, tmp_path: Path) -> None:
    scores.gather().write_audio(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["best1", "worst1"]
    _, sources, *_ = batch([1.0])
    heard = {}
    for path in (tmp_path / "worst1").iterdir():
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        heard[path.stem] = torch.from_numpy(samples)
    assert sorted(heard) == ["estimate1", "estimate2", "mixture", "source1", "source2"]
    torch.testing.assert_close(heard["source1"], sources[0, 0])
    torch.testing.assert_close(heard["mixture"], sources[0].sum(0))
    # In the order of the sources, and as loud as what it holds of them.
    left = (heard["estimate1"] - sources[0, 0]).square().mean()
    assert 0.2 < left / sources[0, 0].square().mean() < 0.8


def test_a_few_mixtures_are_kept_whatever_the_number() -> None:
    scores = Scores(RATE, sdr=False, shown=2)
    noise = [0.5, 0.1, 0.9, 0.3, 0.7, 0.01, 0.2]
    for number, each in enumerate(noise):
        scores.add([str(number)], *batch([each], samples=800))
    kept = {heard.row.id for heard in scores._heard}
    assert kept == {"2", "4", "1", "5"}


def test_all_ranks_count_once_and_each_writes_its_own(
    scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = {"id": "0", "seconds": 1.0, "sources": 2, "si_snr": 50.0, "si_snri": 50.0, "sdr": 1.0,
           "sdri": 1.0}  # fmt: skip
    monkeypatch.setattr(scoring.distributed, "all_gather_json", lambda mine: [mine, [far]])
    every = scores.gather()
    assert [row.id for row in every.rows] == ["0", "a", "b", "c"]
    every.write_audio(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["worst1"]  # the best is the other rank's


def test_a_track_that_is_silent_is_scored_and_written(tmp_path: Path) -> None:
    mixtures, sources, estimates, lengths = batch([0.1])
    scores = Scores(RATE)
    scores.add(["a"], mixtures, sources, torch.zeros_like(estimates), lengths)
    assert math.isfinite(scores.rows[0].si_snri)
    scores.write_audio(tmp_path)
    assert not soundfile.read(tmp_path / "worst1" / "estimate1.wav")[0].any()
