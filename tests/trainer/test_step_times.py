"""Times of the parts of a step: measured once per record; other steps run as before."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.small import Players, Regressor, batches, make
from trainer import Brain, Checkpointer
from trainer.callbacks import CallbackList
from trainer.data.batch import Batch, pad
from trainer.diagnostics.step_times import _padding
from trainer.optim import step


def steps(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [each for each in records if each["kind"] == "step"]


class Slow(Regressor):
    """Sleeps in a known part of each batch."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        time.sleep(0.02)
        return super().compute_forward(batch, stage)


def slowly(number: int) -> list[Any]:
    class Data(list[Any]):
        def __iter__(self) -> Any:
            for each in super().__iter__():
                time.sleep(0.01)
                yield each

    return Data(batches(number))


@pytest.mark.parametrize("window", [1, 3])
def test_the_time_is_given_to_the_part_that_takes_it(tmp_path: Path, window: int) -> None:
    brain = make(
        Slow, output_folder=str(tmp_path), log_interval=2, grad_accumulation_factor=window,
        checkpointer=Checkpointer(tmp_path / "checkpoints"),
    )  # fmt: skip
    brain.fit([1], slowly(6 * window))
    first, second, third = steps(tmp_path)
    for record in (first, second, third):
        times = record["times"]
        assert list(times)[:4] == ["data", "forward", "backward", "step"]
        assert window * 0.02 <= times["forward"]
        assert window * 0.01 <= times["data"]
        assert times["backward"] < times["forward"]
        assert times["step"] < times["forward"]
        assert record["memory"] > 1e7


def test_both_players_count(tmp_path: Path) -> None:
    brain = make(Players, output_folder=str(tmp_path), log_interval=1)
    brain.fit([1], batches(3))
    assert set(steps(tmp_path)[-1]["times"]) == {"data", "forward", "backward", "step"}


def test_no_batch_but_the_measured_one_calls_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[int] = []
    listened: list[int] = []
    before = CallbackList.call

    def call(self: CallbackList, event: str, *arguments: Any) -> None:
        if event == "on_batch_start":
            listened.append(len(self._methods[event]))
        before(self, event, *arguments)

    class Watched(Regressor):
        def fit_batch(self, batch: Any) -> Any:
            marked.append(step.stopwatch is not None)
            return super().fit_batch(batch)

    monkeypatch.setattr(CallbackList, "call", call)
    make(Watched, output_folder=str(tmp_path), log_interval=4).fit([1], batches(12))
    # The second, and the first after each record.
    assert marked == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert step.stopwatch is None
    assert len({listened[n] for n in (2, 3, 5, 6, 7)}) == 1
    assert len(set(listened)) == 2


@pytest.mark.parametrize("part", ["forward", "data"])
def test_an_error_ends_the_measurement(tmp_path: Path, part: str) -> None:
    class Failing(Regressor):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            if part == "forward" and self.step > 1:
                raise RuntimeError("broken")
            return super().compute_forward(batch, stage)

    def data() -> Any:
        yield from batches(2)
        raise RuntimeError("broken")

    brain: Brain = make(Failing, output_folder=str(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        brain.fit([1], data() if part == "data" else batches(4))
    assert step.stopwatch is None


def test_padding_is_that_of_the_largest_field() -> None:
    long = pad([torch.zeros(10), torch.zeros(5)])
    short = pad([torch.zeros(3), torch.zeros(1)])
    assert _padding(Batch({"sig": long, "tokens": short}, 2)) == pytest.approx(0.25)
    assert _padding({"x": torch.zeros(2)}) is None
    assert _padding(torch.zeros(2)) is None
