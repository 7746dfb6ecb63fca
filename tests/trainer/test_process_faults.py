"""Signals, hung loaders, dead launchers and restarts, on real processes."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import alive
from tests.trainer.faulty import YAML, main

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "trainer" / "faulty.py"
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.trainer.faulty"])
pytestmark = pytest.mark.faults


class Run:
    """A run of the program in a folder of its own, on one process or by torchrun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy.yaml").write_text(YAML)
        self.process: Any = None

    def start(
        self, *arguments: str, ranks: int = 1, restarts: int = 0, hangup: Any = signal.SIG_DFL
    ) -> "Run":
        given = ["toy.yaml", "--output_folder", "run", *arguments]
        if ranks == 1:  # Forked from a process that has imported torch.
            self.process = FORKS.Process(target=main, args=(str(self.folder), given, hangup))
            self.process.start()
            return self
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        with open(self.folder / "said", "ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, *command, f"--max-restarts={restarts}", str(PROGRAM), *given],
                cwd=self.folder, env=ENV, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        return self

    def wait(self, seconds: float = 60) -> int:
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(seconds)
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the run has not ended"
        return int(self.process.exitcode)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def log(self) -> str:
        return (self.folder / "run" / "train.log").read_text()

    def has_met_its_moment(self, rank: int = 0, seconds: float = 60) -> int:
        """Wait for the fault; return the process that met it."""
        mark = self.folder / f"met-{rank}"
        wait_for(lambda: mark.exists() and mark.read_text() != "", seconds)
        return int(mark.read_text())

    def rank(self, rank: int) -> int:
        """Wait for the first batch of a rank, and return its process."""
        file = self.folder / f"pid-{rank}"
        wait_for(lambda: file.exists() and file.read_text() != "", 60)
        return int(file.read_text())

    def checkpoints(self) -> int:
        return len(list((self.folder / "run").glob("checkpoints/*/manifest.json")))

    def final(self, rank: int = 0) -> dict[str, Any]:
        weights: dict[str, Any] = torch.load(self.folder / f"final-{rank}.pt", weights_only=True)
        return weights

    def ends_as(self, other: "Run") -> bool:
        """Go on after a stop, and compare the end with that of a run without faults."""
        return self.start().wait() == 0 and same(self.final(), other.final())

    def kill(self) -> None:
        found = [int(f.read_text() or 0) for f in self.folder.glob("pid-*")]
        found += [int(f.read_text() or 0) for f in self.folder.glob("met-*")]
        for number in filter(None, found):
            if alive(number):
                os.kill(number, signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.wait()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    assert len(some) == 4
    return all(torch.equal(some[name], others[name]) for name in others)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "faulty")
    yield made
    made.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without faults."""
    made = Run(tmp_path_factory.mktemp("whole"))
    assert made.start().wait() == 0, made.said()
    return made


# ---------------------------------------------------------------------------------------- signals

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 75, "SIGUSR1": 75, "SIGUSR2": 75}


@pytest.mark.parametrize("name", list(CODES))
def test_a_signal_saves_and_ends_with_its_code(run: Run, whole: Run, name: str) -> None:
    run.start("--moment", "train 5 of 1", "--fault", name)
    assert run.wait() == CODES[name]
    assert run.checkpoints() > 0
    assert run.ends_as(whole)


@pytest.mark.parametrize(
    "moment",
    ["fit start", "train 1 of 1", "save 1", "valid 12 of 1", "train 12 of 2", "valid 12 of 2"],
)
def test_two_signals_at_any_moment_of_a_fit(run: Run, whole: Run, moment: str) -> None:
    run.start("--moment", moment, "--fault", "SIGUSR1 SIGTERM")
    assert run.wait() == 75, run.said()
    assert run.checkpoints() > 0
    assert run.ends_as(whole)


@pytest.mark.parametrize("moment", ["start", "between", "test 12 of 2"])
def test_a_signal_outside_of_a_fit_ends_at_once(run: Run, whole: Run, moment: str) -> None:
    run.start("--moment", moment, "--fault", "SIGTERM hang")
    assert run.wait() == 143
    assert run.ends_as(whole)


def test_an_ignored_hangup_stays_ignored(run: Run, whole: Run) -> None:
    run.start("--moment", "train 5 of 1", "--fault", "SIGHUP", hangup=signal.SIG_IGN)  # As nohup.
    assert run.wait() == 0
    assert same(run.final(), whole.final())


def test_a_run_ends_at_its_age(run: Run, whole: Run) -> None:
    run.start("--slow", "0.5", "--max_hours", str(6 / 3600))
    begin = time.monotonic()
    assert run.wait() == 75
    assert 5 < time.monotonic() - begin < 16
    assert "saved and stopping (max_hours)" in run.log()
    assert run.checkpoints() > 0
    assert run.ends_as(whole)


# ------------------------------------------------------------------------------------ hung loaders


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["hang", "hang_deaf", "hang_in_c"])
def test_a_signal_in_a_wait_for_data_that_hang(
    run: Run, whole: Run, workers: int, fault: str
) -> None:
    run.start("--moment", "item 13", "--fault", fault, "--workers", str(workers))
    loading = run.has_met_its_moment()
    time.sleep(0.5)
    run.signal(signal.SIGTERM)
    assert run.wait(10) == 143
    assert not alive(loading)
    assert "saved and stopping (SIGTERM)" in run.log()
    by = "worker 0 loaded" if workers else "this process loaded"
    assert f"of epoch 1 while {by} item take13.wav" in run.log()
    if not workers:  # In workers the global generators are others.
        assert run.ends_as(whole)


def test_two_ranks_that_both_wait_save(run: Run) -> None:
    run.start("--moment", "load 18", "--fault", "hang", ranks=2)
    ranks = [run.has_met_its_moment(rank) for rank in (0, 1)]
    time.sleep(0.5)
    run.signal(signal.SIGTERM)  # The launcher hands it on.
    wait_for(lambda: not any(map(alive, ranks)), 10)
    assert "saved and stopping (SIGTERM)" in run.log()
    assert "waiting for batch 4 of epoch 1 while this process loaded item take" in run.log()
    assert run.wait() == 1


@pytest.mark.parametrize("fault", ["hang", "hang_in_c"])
def test_two_ranks_of_which_one_waits_end_without_a_save(run: Run, fault: str) -> None:
    run.start("--moment", "load 18", "--fault", fault, "--rank", "1", ranks=2)
    ranks = [run.rank(0), run.has_met_its_moment(1)]
    wait_for(lambda: run.checkpoints() > 0, 10)
    os.kill(ranks[1], signal.SIGTERM)
    wait_for(lambda: not any(map(alive, ranks)), 10)
    assert run.wait() == 1
    assert "saved and stopping" not in run.said()
    assert "while waiting for batch 4 of epoch 1 while this process loaded item take" in run.said()
    assert run.checkpoints() > 0
    assert set(exit_codes(run)) == {143}, run.said()


def test_a_wait_without_workers_is_warned_of(run: Run) -> None:
    run.start("--moment", "item 13", "--fault", "hang", "--item_timeout", "1")
    run.has_met_its_moment()
    wait_for(lambda: "no batch for 1 s, waiting for batch" in run.log(), 10)
    assert "while this process loaded item take13.wav" in run.log()


# --------------------------------------------------------------------------- launchers and workers


def exit_codes(run: Run) -> list[int]:
    """Return the exit codes of ranks, of which torchrun's report tells."""
    return [int(code) for code in re.findall(r"exitcode *: (-?\d+)", run.said())]


@pytest.mark.parametrize(
    ("name", "moment"),
    [("SIGTERM", "train 3 of 1"), ("SIGUSR1", "valid 6 of 1"), ("SIGUSR1", "between")],
)
def test_a_signal_to_one_rank_stops_both_with_one_code(run: Run, name: str, moment: str) -> None:
    run.start("--moment", moment, "--fault", name, "--rank", "1", ranks=2)
    assert run.wait() == 1
    assert set(exit_codes(run)) == {CODES[name]}, run.said()
    assert run.checkpoints() > 0
    assert run.start(ranks=2).wait() == 0
    assert same(run.final(0), run.final(1))


@pytest.mark.parametrize("fault", ["none", "hang", "hang_in_c"])
def test_ranks_end_with_their_launcher(run: Run, fault: str) -> None:
    moment = ["--moment", "load 18", "--fault", fault, "--rank", "1"]
    run.start(*moment, "--slow", "0.5", ranks=2)
    ranks = [run.rank(rank) for rank in (0, 1)]
    if fault != "none":
        run.has_met_its_moment(1)
    run.signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, ranks)), 10)
    assert ("saved and stopping (SIGTERM)" in run.log()) == (fault == "none")


def test_a_run_outlives_its_shell(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path)
    command = f"{sys.executable} {PROGRAM} toy.yaml --output_folder run --slow 0.2 & sleep 0.1"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ENV, check=True)
    wait_for((tmp_path / "final-0.pt").exists, 30)
    wait_for(lambda: not alive(run.rank(0)), 10)
    assert same(run.final(), whole.final())


@pytest.mark.parametrize("fault", ["hang", "hang_deaf"])
def test_a_worker_ends_with_its_main_process(run: Run, fault: str) -> None:
    run.start("--moment", "item 13", "--fault", fault, "--workers", "1")
    worker = run.has_met_its_moment()
    run.signal(signal.SIGKILL)
    wait_for(lambda: not alive(worker), 10)


# ---------------------------------------------------------------------------------------- restarts


def check_restarts(folder: Path, number: int) -> None:
    """Kill one rank of two at random moments, in ``number`` runs."""
    whole = Run(folder / "whole").start(ranks=2)
    assert whole.wait() == 0
    for seed in range(number):
        rng, run = random.Random(seed), Run(folder / str(seed))
        try:
            run.start("--slow", "0.2", ranks=2, restarts=3)  # Longer than until the kill.
            first = [run.rank(rank) for rank in (0, 1)]
            time.sleep(rng.uniform(0.0, 2.0))
            os.kill(first[rng.randrange(2)], signal.SIGKILL)
            wait_for(lambda r=run, f=first: all(r.rank(i) != f[i] for i in (0, 1)), 20)
            assert run.wait(60) == 0, run.said()
            for rank in (0, 1):
                assert same(run.final(rank), whole.final(rank)), seed
        finally:
            run.kill()


def test_a_run_comes_back_after_a_rank_was_killed(tmp_path: Path) -> None:
    check_restarts(tmp_path, 3)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("moment", ["start", "train 3 of 1", "valid 6 of 1"])
def test_the_error_of_one_rank_is_in_the_log_and_the_last_on_the_screen(
    run: Run, moment: str
) -> None:
    run.start("--moment", moment, "--fault", "raise_value_error", "--rank", "1", ranks=2)
    run.has_met_its_moment(1)
    assert run.wait(10) == 1
    error = "ValueError: the number of speakers is odd"
    said, log = run.said().splitlines(), run.log().splitlines()
    assert [line.partition("[rank 1] ")[2] for line in log if error in line][0] == error
    assert log[-1].endswith(f" stopped: rank 1 failed: {error}")
    assert f"stopped: rank 1 failed: {error}" in said
    report = said[max(n for n, line in enumerate(said) if "Root Cause" in line) :]
    assert any(error in line for line in report)
    assert any("in raise_value_error" in line for line in report)
    shown = [line for line in said if "faulty.py" in line and "in raise_value_error" in line]
    assert len(shown) == 2  # By the rank, and by the launcher at the end.
    assert not any("trainer/brain.py" in line for line in said)
