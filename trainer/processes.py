"""Processes that end with their parent: workers of loaders and pools, and ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 1.0  # Interval at which a process looks for its parent.
GRACE = 30.0  # Seconds that a worker goes on after SIGTERM, the same that torchrun gives ranks.


def call_when_orphaned(function: Callable[[], None]) -> None:
    """Call a function once, in a thread, when the parent of this process has ended."""
    parent, process = os.getppid(), multiprocessing.parent_process()

    def watch() -> None:
        # getppid misses a parent that ended before the first call; parent_process does not.
        while os.getppid() == parent and (process is None or process.is_alive()):
            time.sleep(POLL_SECONDS)
        function()

    threading.Thread(target=watch, daemon=True, name="parent").start()


def serve(closing: Callable[[], bool] = lambda: False) -> None:
    """Prepare a worker process, which ends soon after its parent.

    It ignores the signals that ask a run to stop, since the main process may need it up to the next
    safe point; but it ends `GRACE` seconds after SIGTERM.

        ProcessPoolExecutor(2, get_context("spawn"), initializer=serve)

    Args:
        closing: returns True once the main process no longer needs the worker; SIGTERM then ends it
            at once.
    """
    call_when_orphaned(lambda: os._exit(1))

    def terminate(_number: int, _frame: object) -> None:
        if closing():
            os._exit(0)
        timer = threading.Timer(GRACE, os._exit, [0])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, terminate)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
