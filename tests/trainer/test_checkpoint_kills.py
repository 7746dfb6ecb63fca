"""Processes that are killed, exit, run out of disk or fail one at a time while they save."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import Checkpointer, storage

from . import checkpoint_torture
from .checkpoint_torture import Uniform, temporaries, two_checkpoints

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def torture() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run commands of `checkpoint_torture.py` in one process of its own."""
    with subprocess.Popen(
        [sys.executable, str(checkpoint_torture.__file__)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asking, answering = server.stdin, server.stdout

        def run(command: str, folder: Path, *arguments: int) -> dict[str, Any]:
            asking.write(json.dumps([command, str(folder), *arguments]) + "\n")
            asking.flush()
            lines = iter(answering.readline, "")  # Some versions of torch write on stdout, too.
            answer = next(line for line in lines if not line.startswith("[Gloo]"))
            report: dict[str, Any] = json.loads(answer)
            return report

        yield run
        asking.close()


@pytest.fixture(params=["disk", "shared memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk, and one in memory where there is such a place."""
    if request.param == "disk":
        yield tmp_path
        return
    if not SHARED_MEMORY.is_dir():
        pytest.skip("there is no /dev/shm here")
    place = SHARED_MEMORY / f"checkpoints-{os.getpid()}"
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("count", "weights_alone"),
    [
        pytest.param(30, 0, id="30"),
        pytest.param(30, 1, id="30 and weights alone", marks=pytest.mark.faults),
        pytest.param(500, 0, id="500", marks=pytest.mark.long),
        pytest.param(500, 1, id="500 and weights alone", marks=pytest.mark.long),
    ],
)
def test_a_killed_process_loses_at_most_the_save_it_was_in(
    torture: Callable[..., dict[str, Any]], folder: Path, count: int, weights_alone: int
) -> None:
    report = torture("kills", folder / "checkpoints", count, weights_alone)
    assert report["resumed"] == count
    assert report["lost"] == 0
    assert report["during_a_save"] >= count // 4  # The kills did hit what they were aimed at.
    assert report["saves"] >= count // 10  # And some saves were finished before their kill.
    assert report["stale_after"] == 0
    assert report["complete"][0]
    assert (False in report["complete"]) == bool(weights_alone)


@pytest.mark.parametrize("weights_alone", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_hard_exit_before_any_operation_leaves_a_checkpoint_that_loads(
    torture: Callable[..., dict[str, Any]], tmp_path: Path, weights_alone: int
) -> None:
    report = torture("exits", tmp_path, weights_alone)
    operations = report["operations"]
    assert {"open", "write", "fsync", "rename", "mkdir", "rmtree", "unlink", "rmdir"} == set(
        operations
    )
    published = operations.index("rename")
    assert len(report["recovered"]) == len(operations) >= (35 if weights_alone else 25)
    for at, (status, value, stale) in enumerate(report["recovered"]):
        assert status == 9
        assert value == (3 if at > published else 2), (at, operations[at])
        assert not stale, (at, operations[at])
    # The next start and save leave the two newest, the best ones, and nothing of the interrupted.
    for at, left in enumerate(report["left"]):
        before = "step-00000003" if at > published else "step-00000002"
        assert left == {"step-00000004": True, before: not weights_alone}, (at, operations[at])


def test_a_full_disk_is_told_with_path_and_bytes_and_changes_nothing(
    torture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = torture("limits", tmp_path)["results"]
    for result in results[:-1]:
        assert re.search(
            r"the checkpoint .*/step-00000002 could not be saved: brain\.modules\.pt needs "
            r"52\d{4} bytes, \d+ of them were stored, \d+ are free on the disk \(File too large\)",
            result["sentence"],
        )
        assert result["value"] == 1
        assert result["left"] == ["step-00000001"]
    assert results[-1] == {"sentence": "", "value": 2, "left": ["step-00000002"]}
    assert len(results) == 4


def test_two_ranks_save_fail_and_fall_back_as_one(
    torture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = torture("ranks", tmp_path)
    assert report["left"] == ["step-00000001", "step-00000002"]
    for rank, seen in enumerate(report["reports"]):
        assert seen["files"][-2:] == ["rank-0.pt", "rank-1.pt"]
        for failing in (0, 1):
            own = r"OSError: .*step-00000003 could not be saved: .*No space left on device"
            others = rf"RuntimeError: rank {failing} failed \(OSError: .*No space left on device"
            assert re.match(own if rank == failing else others, seen[f"failing_{failing}"])
            assert seen[f"left_{failing}"] == ["step-00000001", "step-00000002"]
        assert seen["recovered"] == ["step-00000002", 2]
        # Only rank 1 reads the broken file; both use the checkpoint before, and nothing else.
        assert seen["fallback"] == ["step-00000001", 1, [1]]
        assert seen["average"] == [1.0]


def test_a_hundred_killed_saves_leave_nothing_after_one_clean_start(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for index in range(100):
        verb = ("saving", "deleting")[index % 2]
        left = tmp_path / f".{verb}-{dead.pid}@{storage.HOST}-step-{index:08d}"
        left.mkdir()
        (left / "brain.pt").write_bytes(b"half")
    # A container's restart has the process ids and the host name of the one before.
    (tmp_path / f".saving-{os.getppid()}@{storage.HOST}-step-00000009").mkdir()
    (tmp_path / f".saving-{dead.pid}@elsewhere-step-00000009").mkdir()
    Checkpointer(tmp_path, recoverables={"brain": Uniform()}).recover_if_possible()
    assert temporaries(tmp_path) == []


# Other processes in the same folder

OWNER = """
import os, sys, time, torch
from trainer import Checkpointer
class Thing:
    def state_dict(self): return {"x": torch.zeros(2)}
    def load_state_dict(self, state): pass
checkpointer = Checkpointer(sys.argv[1], recoverables={"thing": Thing()})
checkpointer.save_and_keep_only({"optimizer_step": 1})
if "fork" in sys.argv and os.fork() == 0: time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that saves once and stays alive."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path / "checkpoints"), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_second_writer_is_refused_and_a_reader_changes_nothing(
    owner: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, folder = owner(), tmp_path / "checkpoints"
    (folder / f".saving-{process.pid}@{storage.HOST}-step-00000002").mkdir()
    before = sorted(os.listdir(folder))
    other = Checkpointer(folder, recoverables={"thing": Uniform()})
    with pytest.raises(ValueError, match=r"checkpoints: another process, .* saves there; end it"):
        other.save_checkpoint()
    with pytest.raises(ValueError, match="another process"):
        other.prepare()
    assert [each.name for each in other.find()] == ["step-00000001"]
    with pytest.raises(ValueError, match="does not fit this run"):
        other.recover_if_possible()
    assert sorted(os.listdir(folder)) == before
    process.kill()
    process.wait()
    other.save_checkpoint()
    assert temporaries(folder) == []


@pytest.mark.faults
def test_a_script_that_ends_with_its_checkpointer_says_nothing(tmp_path: Path) -> None:
    program = OWNER.partition("if ")[0]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "checkpoints")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_that_was_forked_does_not_hold_the_lock_on(
    owner: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = owner("fork")
    process.kill()
    process.wait()
    Checkpointer(tmp_path / "checkpoints", recoverables={"thing": Uniform()}).save_checkpoint()


def test_a_reader_beside_a_writer_never_fails(
    torture: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = torture("readers", tmp_path / "checkpoints", 300)
    assert report["read"] == 300
    assert report["values"] >= 10  # The writer went on meanwhile.
    assert report["ascending"]
    assert report["warnings"] == []
