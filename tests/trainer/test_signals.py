"""Requests to stop within one process: exit codes, the time limit, and waits for data that hang."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.trainer.small import Regressor, batches, net
from trainer import Checkpointer, processes, signals
from trainer.data import make_loader
from trainer.data.loader import resumable

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def _handled() -> None:
    signals.install()


def make(folder: Path, **options: Any) -> Regressor:
    options = {"seed": 1, "progressbar": False, **options}
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    return Regressor({"net": net()}, sgd, {}, options, Checkpointer(folder))


def test_exit_codes() -> None:
    codes = {number: signals.exit_code(number) for number in (*NUMBERS, signals.TIME_LIMIT)}
    assert codes == {15: 143, 2: 130, 1: 75, 10: 75, 12: 75, 0: 75}
    assert signals.Interrupted(signal.SIGHUP).signal == "SIGHUP"
    assert signals.Interrupted(signals.TIME_LIMIT).signal == "max_hours"


def test_a_process_knows_its_age() -> None:
    signals.set_limit(100.0)
    assert signals.requested() is None
    signals.set_limit(1e-6)  # It is older than that.
    assert signals.requested() == signals.TIME_LIMIT
    signals.reset()
    assert signals.requested() is None


def test_a_run_that_is_too_old_saves_after_a_batch_and_ends(tmp_path: Path) -> None:
    brain = make(tmp_path, max_hours=0.0)
    with pytest.raises(signals.Interrupted) as stopped:
        brain.fit(range(1, 3), batches(4))
    signals.reset()
    assert (stopped.value.code, brain.step) == (75, 1)
    again = make(tmp_path)
    again.fit(range(1, 3), batches(4))
    assert (again.epoch, again.optimizer_step) == (2, 8)


@pytest.mark.usefixtures("_handled")
def test_a_request_at_the_end_of_a_fit_is_not_lost(tmp_path: Path) -> None:
    class Late(Regressor):
        def on_stage_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR2)

    brain = Late({"net": net()}, torch.optim.Adam, {}, {"progressbar": False})
    with pytest.raises(signals.Interrupted, match="75"):
        brain.fit(range(1, 2), batches(2))


class Slow(IterableDataset[Any]):
    """Gives four batches; the third one hangs."""

    def __init__(self, hang: Any) -> None:
        self.hang = hang

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(batches(4)):
            if number == 2:
                self.hang()
            yield batch


@pytest.mark.usefixtures("_handled")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_that_lasts_on_after_a_request_is_left_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.3)
    main = os.getpid()

    def hang() -> None:
        time.sleep(1.0)  # By then the main process has trained on what a worker loaded ahead.
        os.kill(main, signal.SIGTERM)
        time.sleep(60)

    data = DataLoader(Slow(hang), batch_size=None, num_workers=workers)
    brain = make(tmp_path)
    begin = time.monotonic()
    with signals.hung_waits_left(), pytest.raises(signals.Interrupted, match="143"):
        brain.fit(range(1, 2), data)
    assert time.monotonic() - begin < 10
    assert "asked to stop (SIGTERM) while waiting for batch 2 of epoch 1" in caplog.messages
    signals.reset()
    again = make(tmp_path)
    again.fit(range(1, 2), DataLoader(Slow(lambda: None), batch_size=None))
    straight = make(tmp_path / "straight")
    straight.fit(range(1, 2), DataLoader(Slow(lambda: None), batch_size=None))
    assert again.optimizer_step == straight.optimizer_step == 4
    for some, other in zip(again.modules.parameters(), straight.modules.parameters(), strict=True):
        assert torch.equal(some, other)


@pytest.mark.usefixtures("_handled")
def test_a_slow_batch_is_waited_for(tmp_path: Path) -> None:
    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    brain = make(tmp_path)
    with signals.hung_waits_left(), pytest.raises(signals.Interrupted):
        brain.fit(range(1, 2), DataLoader(Slow(hang), batch_size=None))
    assert brain.step == 3


class Named(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def name_of(self, index: int) -> str:
        return f"take{index}.wav"

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            time.sleep(60)
        return batches(1)[0]


@pytest.mark.parametrize("kind", ["dataset", "loader", "stream"])
def test_a_hang_is_an_error_at_the_limit_of_the_run(tmp_path: Path, kind: str) -> None:
    data: Any = Named()
    load = {"num_workers": 1, "batch_size": None, "shuffle": False}
    if kind != "dataset":
        data, load = DataLoader(Named() if kind == "loader" else Slow(lambda: time.sleep(60)),
                                num_workers=1, batch_size=None), {}  # fmt: skip
    brain = make(tmp_path, item_timeout=1.0)
    named = "" if kind == "stream" else " of epoch 1 while worker 0 loaded item take2.wav"
    with pytest.raises(RuntimeError, match=f"no batch within 1 s .*, waiting for batch 2{named}"):
        brain.fit(range(1, 2), data, train_loader_kwargs=load)


def test_no_limit_and_the_limit_of_a_loader_win(caplog: pytest.LogCaptureFixture) -> None:
    class Item(Named):
        def __getitem__(self, index: int) -> Any:
            time.sleep(1.2 if index == 2 else 0)
            return torch.ones(1)

    for timeout, warnings in ((0, 0), (30, 0), (0.5, 1)):
        caplog.clear()
        assert len(list(make_loader(Item(), train=False, timeout=timeout))) == 4
        found = [each for each in caplog.messages if each.startswith("no batch for")]
        assert len(found) == warnings
    assert (
        "waiting for batch 2 of an evaluation while this process loaded item take2.wav" in found[0]
    )


def test_workers_of_any_iterable_live_through_the_signals_of_the_main_process() -> None:
    def all_signals() -> None:
        for number in NUMBERS:
            os.kill(os.getpid(), number)

    source = DataLoader(Slow(all_signals), batch_size=None, num_workers=1)
    assert len(list(resumable(source, seed=1))) == 4


def test_a_worker_that_is_told_to_end_does_so_after_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "GRACE", 1.0)

    def work(ready: str) -> None:
        processes.serve()
        Path(ready).touch()
        time.sleep(60)

    ready = tmp_path / "ready"
    worker = multiprocessing.get_context("fork").Process(target=work, args=(str(ready),))
    worker.start()
    while not ready.exists():
        time.sleep(0.01)
    begin = time.monotonic()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    assert time.monotonic() - begin >= 0.9


def _terminate_a_fork() -> None:
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    fork.start()
    fork.terminate()
    fork.join(10)
    assert fork.exitcode == -signal.SIGTERM


def _terminate_a_worker() -> None:
    batches = iter(make_loader(list(range(4)), train=False, num_workers=1))
    next(batches)
    batches.close()  # type: ignore[attr-defined]


def _signal_the_program() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]


@pytest.mark.usefixtures("_handled")
@pytest.mark.parametrize("act", [_terminate_a_fork, _terminate_a_worker, _signal_the_program])
def test_signals_for_others_are_no_request(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.1)
    wait = signals.waiting(lambda: "waiting for nothing", lambda number: None)
    with signals.hung_waits_left(), signals.at_safe_points():
        act()
        with wait:
            time.sleep(2.5)  # The thread that ends waits looks each second.
    assert signals.requested() is None


@pytest.mark.usefixtures("_handled")
def test_a_worker_that_dies_of_the_request_ends_the_run_as_the_request() -> None:
    def die() -> None:
        os.kill(os.getppid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGKILL)

    source = DataLoader(Slow(die), batch_size=None, num_workers=1)
    with signals.at_safe_points(), pytest.raises(signals.Interrupted) as stopped:
        list(resumable(source, seed=1))
    assert stopped.value.number == signal.SIGUSR1


def test_the_end_of_a_thread_is_not_that_of_the_process() -> None:
    thread = threading.Thread(target=signals.end_with, args=(1,))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
