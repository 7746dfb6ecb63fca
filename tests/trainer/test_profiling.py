"""The profiler writes a trace of a few steps if one is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.small import Players, Regressor, batches, make
from trainer import Brain


@pytest.mark.parametrize("kind", [Regressor, Players])
def test_the_trace_has_the_steps_that_were_asked_for(kind: type[Brain], tmp_path: Path) -> None:
    brain = make(
        kind, profile_training=True, profile_warmup=1, profile_steps=2, output_folder=str(tmp_path)
    )
    brain.fit([1, 2], batches(5), batches(1))
    files = list((tmp_path / "profile").iterdir())
    assert len(files) == 1  # Of the first epoch alone.
    events = json.loads(files[0].read_text())["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert {name for name in names if name.startswith("ProfilerStep")} == {
        "ProfilerStep#1",
        "ProfilerStep#2",
    }
    assert any("aten::" in name for name in names)


def test_without_it_there_is_no_trace(tmp_path: Path) -> None:
    make(output_folder=str(tmp_path)).fit([1], batches(3))
    assert not (tmp_path / "profile").exists()


def test_an_epoch_that_is_too_short_for_a_trace_is_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile_training": True, "output_folder": str(tmp_path)}
    with pytest.warns(
        UserWarning, match="profile_training: the epoch ended within the 5 steps of wa"
    ):
        make(profile_warmup=5, **options).fit([1], batches(2))
    # One that ends within the trace has what there was.
    make(profile_warmup=1, profile_steps=9, **options).fit([1], batches(3))
    assert len(list((tmp_path / "profile").iterdir())) == 1
