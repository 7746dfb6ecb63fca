"""Reports count what happened and nothing else: a lost number is None, never 0."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics import OUTCOMES, RESERVED, StageReport, StepReport, Tally

REPORTS = st.builds(
    StepReport,
    name=st.just("main"),
    outcome=st.sampled_from(OUTCOMES),
    norm=st.none() | st.floats(0, 1e6),
    limit=st.sampled_from([5.0, math.inf]),
    clipped=st.booleans(),
    lr=st.floats(0, 1),
)


def tally_of(reports: list[StepReport]) -> Tally:
    tally = Tally()
    for report in reports:
        tally.add(report)
    return tally


@given(reports=st.lists(REPORTS, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_tally_counts_every_outcome_and_measures_the_steps_that_were_taken(
    reports: list[StepReport],
) -> None:
    entry = tally_of(reports).record()
    for outcome in ("stepped", "skipped", "overflowed"):
        assert entry[outcome] == sum(report.outcome == outcome for report in reports)
    taken = [
        report for report in reports if report.outcome == "stepped" and report.norm is not None
    ]
    norms = [report.norm for report in taken if report.norm is not None]
    if norms:
        assert entry["norm"] == pytest.approx(math.fsum(norms) / len(norms))
        assert entry["norm_max"] == max(norms)
        assert entry["clipped"] == sum(report.clipped for report in taken) / len(taken)
    else:
        assert (entry["norm"], entry["norm_max"], entry["clipped"]) == (None, None, None)
    last = reports[-1] if reports else None
    assert entry["lr"] == (last and last.lr)
    assert entry["limit"] == (last and last.limit)


def test_a_record_starts_the_next_count() -> None:
    tally = tally_of(
        [StepReport("main", "stepped", norm=1.0, lr=0.5), StepReport("main", "skipped", lr=0.25)]
    )
    first, second = tally.record(), tally.record()
    assert (first["stepped"], first["skipped"], first["norm"]) == (1, 1, 1.0)
    assert (second["stepped"], second["skipped"], second["norm"]) == (0, 0, None)
    assert second["lr"] == first["lr"] == 0.25


@given(reports=st.lists(REPORTS, max_size=8), stop=st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_a_tally_goes_on_from_its_saved_state(reports: list[StepReport], stop: int) -> None:
    whole = tally_of(reports)
    second = Tally(**json.loads(json.dumps(asdict(tally_of(reports[:stop])))))
    for report in reports[stop:]:
        second.add(report)
    assert second.record() == whole.record()


def test_only_a_step_that_was_taken_has_stepped() -> None:
    assert [outcome for outcome in OUTCOMES if StepReport("main", outcome).stepped] == ["stepped"]
    assert not hasattr(StepReport("main", "skipped"), "__dict__")


def test_a_stage_line_has_the_metrics_beside_the_counts() -> None:
    report = StageReport(
        "valid", 2, 1.25, {"wer": 3.5}, step=120, steps=7, examples=50.0, seconds=1.5
    )
    line = report.record()
    assert line == {
        "kind": "stage",
        "stage": "valid",
        "epoch": 2,
        "step": 120,
        "loss": 1.25,
        "wer": 3.5,
        "steps": 7,
        "examples": 50.0,
        "seconds": 1.5,
        "skipped": 0,
        "overflowed": 0,
        "out_of_memory": 0,
        "bad_files": 0,
    }


def test_a_recipes_own_loss_takes_the_place_of_the_average() -> None:
    losses: dict[str, Any] = {"loss": {"d": 1.0, "g": 2.0}}
    assert StageReport("valid", 1, 9.0, losses).record()["loss"] == {"d": 1.0, "g": 2.0}


@pytest.mark.parametrize("name", RESERVED)
def test_a_metric_that_would_hide_a_count_is_refused(name: str) -> None:
    report = StageReport("valid", 1, 1.0, {name: 3.0})
    with pytest.raises(ValueError, match=f"stage 'valid' returned a metric named '{name}', which"):
        report.record()
