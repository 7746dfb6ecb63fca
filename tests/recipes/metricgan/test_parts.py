"""Gain of a phase over another: clip by clip, with its standard error."""

import math
from statistics import stdev

import pytest

from recipes.common.scoreboard import Row
from recipes.metricgan.parts import part


def rows(**scores: float) -> list[Row]:
    return [
        Row(id, {} if math.isnan(score) else {"pesq": score}, {}) for id, score in scores.items()
    ]


def test_clips_are_compared_with_themselves() -> None:
    before, after = rows(a=1.0, b=3.0, c=2.0), rows(c=2.3, a=1.1, b=3.2)
    found = part(before, after, "pesq")
    assert found.mean == pytest.approx(0.2)
    assert found.error == pytest.approx(stdev([0.1, 0.2, 0.3]) / math.sqrt(3))
    assert found.clips == 3


def test_a_clip_counts_where_it_was_measured_both_times() -> None:
    found = part(rows(a=1.0, b=math.nan, c=2.0), rows(a=1.5, b=2.0, c=math.nan, d=4.0), "pesq")
    assert (found.mean, found.clips) == (0.5, 1)
    assert math.isnan(found.error)
    with pytest.raises(ValueError, match="pesq: no clip was measured both times"):
        part(rows(a=1.0), rows(b=1.0), "pesq")
