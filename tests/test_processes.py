"""Functions run on two ranks of one group, from fresh process state, and leave no process."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.processes import TwoRanks, alive


def identify() -> dict[str, object]:
    rank = torch.distributed.get_rank()
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)
    return {"rank": rank, "local_rank": os.environ["LOCAL_RANK"], "total": total}


def test_each_rank_returns_its_result(two_ranks: TwoRanks) -> None:
    first, second = two_ranks(identify)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["local_rank"], second["local_rank"]) == ("0", "1")
    assert first["total"] == second["total"] == 3


def change_everything() -> tuple[bool, float, float, bool]:
    found = (
        hasattr(torch, "changed"), random.random(), torch.rand(()).item(),
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    )  # fmt: skip
    torch.changed = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return found


def test_nothing_of_one_call_reaches_the_next(two_ranks: TwoRanks) -> None:
    first, second = two_ranks(change_everything), two_ranks(change_everything)
    assert first == second
    assert all(changed is False and default for changed, _, _, default in first)
    assert first[0][1:3] != first[1][1:3]  # Each rank has its own random numbers.


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("no more data")
    time.sleep(60)


def test_one_that_fails_ends_the_other_and_its_error_is_shown(two_ranks: TwoRanks) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)exit codes \[None, 1\].*ValueError: no more data"):
        two_ranks(fail_on_rank_1)
    assert time.monotonic() - started < 30
    assert len(two_ranks(identify)) == 2  # The next call works.


def start_a_child_and_hang(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(folder, str(child.pid)).touch()
    time.sleep(60)


def test_what_takes_too_long_is_ended_with_its_children(
    two_ranks: TwoRanks, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[None, None\] .*within 2 s"):
        two_ranks(start_a_child_and_hang, tmp_path, seconds=2)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    end = time.monotonic() + 10
    while any(map(alive, children)):
        assert time.monotonic() < end
        time.sleep(0.01)


def end_the_server() -> None:
    torch.distributed.barrier()
    os.kill(os.getppid(), signal.SIGKILL)


def test_a_server_that_ends_is_started_again(two_ranks: TwoRanks) -> None:
    with pytest.raises(RuntimeError, match="exit codes None of end_the_server"):
        two_ranks(end_the_server)
    assert len(two_ranks(identify)) == 2


def test_arguments_travel_as_json(two_ranks: TwoRanks, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected str, bytes or os.PathLike object, not object"):
        two_ranks(identify, object())
    assert two_ranks(listed, tmp_path, 1.5, ["a", None]) == [[str(tmp_path), 1.5, ["a", None]]] * 2


def listed(*arguments: object) -> list[object]:
    return list(arguments)
