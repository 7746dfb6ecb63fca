"""A pool's processes end with the one that started them, and not with a signal that it handles."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PARENT = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from trainer.processes import serve
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=serve)
    print(pool.submit(os.getpid).result(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def a_pool(path: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process with a pool of one, and the number of that one."""
    with open(path, "w") as file:
        file.write(PARENT)
    with subprocess.Popen(
        [sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            yield parent, int(parent.stdout.readline())
        finally:
            parent.kill()


def lives(number: int) -> bool:
    """Return True if there is such a process."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.faults
def test_they_outlive_a_signal_but_not_their_parent(tmp_path) -> None:
    with a_pool(str(tmp_path / "parent.py")) as (parent, child):
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        assert lives(child)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 10
        while lives(child) and time.monotonic() < end:
            time.sleep(0.1)
        assert not lives(child)
