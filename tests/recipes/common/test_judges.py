"""Judges give what measuring by oneself gives, and no clip can stop them."""

import importlib.util
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

from recipes.common import judges as module
from recipes.common.judges import Judges
from recipes.common.quality import measure
from tests.recipes.common.speakers import RATE, noise, voice

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pesq", "pystoi"))), reason="needs the extra enhance"
)
CLEAN = voice(1.5)
HEARD = [CLEAN + 0.01 * k * noise(len(CLEAN), k) for k in range(1, 5)]
NAMES = ("pesq", "stoi", "si_snr")


@pytest.fixture(scope="module")
def pool() -> Iterator[Judges]:
    with Judges(NAMES, RATE, workers=1) as judges:
        yield judges


def truth(heard: torch.Tensor) -> dict[str, float]:
    return measure(CLEAN.numpy(), heard.numpy(), NAMES, RATE)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_scores_come_by_id_in_the_order_of_submission(pool: Judges, workers: int) -> None:
    judges = pool if workers else Judges(NAMES, RATE, workers=0)
    judges.forget()
    for name, heard in zip("dbca", HEARD, strict=True):
        judges.submit(name, CLEAN, heard)
    found = judges.collect()
    assert list(found) == ["d", "b", "c", "a"]
    for scores, heard in zip(found.values(), HEARD, strict=True):
        assert scores == pytest.approx(truth(heard), abs=1e-6)
    assert judges.collect() == {}
    assert judges.failed == {}


def test_what_is_submitted_may_change_afterwards(pool: Judges) -> None:
    pool.forget()
    heard = HEARD[0].clone()
    pool.submit("one", CLEAN, heard)
    heard.zero_()
    assert pool.collect()["one"] == pytest.approx(truth(HEARD[0]), abs=1e-6)


def test_a_clip_that_cannot_be_measured_is_named_once_and_left_out(
    pool: Judges, caplog: pytest.LogCaptureFixture
) -> None:
    pool.forget()
    for _ in range(2):
        pool.submit("silent", CLEAN, torch.zeros_like(CLEAN), ["pesq"])
        pool.submit("short", CLEAN[:500], HEARD[0][:500])
        pool.submit("good", CLEAN, HEARD[0], ["si_snr"])
        found = pool.collect()
        assert list(found) == ["short", "good"]
        assert list(found["short"]) == list(found["good"]) == ["si_snr"]
        assert pool.failed["silent"] == "PESQ of silence"
        assert set(pool.failed) == {"silent", "short"}
    assert caplog.text.count("silent could not be measured: PESQ of silence") == 1


def test_who_submits_too_fast_waits(pool: Judges) -> None:
    pool.forget()
    for number in range(3 * module.WAITING):
        pool.submit(str(number), CLEAN, HEARD[0], ["si_snr"])
        assert len(pool._waiting) <= module.WAITING
    assert list(pool.collect()) == [str(number) for number in range(3 * module.WAITING)]


def test_what_is_ready_can_be_had_without_waiting(pool: Judges) -> None:
    pool.forget()
    pool.submit("one", CLEAN, HEARD[0], ["si_snr"])
    since = time.monotonic()
    while not (found := pool.collect(wait=False)):
        assert time.monotonic() - since < 60
        time.sleep(0.01)
    assert list(found) == ["one"]


def test_a_process_that_dies_costs_its_clip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout of no time kills the process that measures, as a crash in C code would."""
    with Judges(NAMES, RATE, workers=1) as judges:
        judges.submit("before", CLEAN, HEARD[0], ["si_snr"])
        judges.timeout = 1e-3
        judges.submit("deadly", CLEAN.repeat(20), CLEAN.repeat(20) * 0.5)
        judges.timeout = 60.0
        judges.submit("after", CLEAN, HEARD[0], ["si_snr"])
        assert list(judges.collect()) == ["before", "after"]
        assert list(judges.failed) == ["deadly"]
        assert judges.failed["deadly"].startswith("the process that measured it died, or took more")


def test_processes_have_one_thread_and_end_with_the_pool(pool: Judges) -> None:
    before = {name: os.environ.get(name) for name in module.ONE_THREAD}
    with module._single_threaded():
        assert {os.environ[name] for name in module.ONE_THREAD} == {"1"}
    assert {name: os.environ.get(name) for name in module.ONE_THREAD} == before


def test_clips_of_different_length_are_refused(pool: Judges) -> None:
    with pytest.raises(ValueError, match=r"x: clean \(24000,\) and enhanced \(23999,\) must have"):
        pool.submit("x", CLEAN, CLEAN[:-1])


def test_who_waits_for_some_does_not_wait_for_those_behind() -> None:
    judges = Judges(NAMES, RATE, workers=0)
    for name, heard in zip("abcd", HEARD, strict=True):
        judges.submit(name, CLEAN, heard, ["si_snr"])
    judges._waiting = [task._replace(future=Future()) for task in judges._waiting]
    for task in judges._waiting[:2]:
        assert task.future is not None
        task.future.set_result(({"si_snr": 1.0}, {}))
    assert list(judges.collect(until=["b"])) == ["a", "b"]
    assert [task.id for task in judges._waiting] == ["c", "d"]
    assert judges.collect(until=["a", "b"]) == {}
