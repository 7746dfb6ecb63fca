"""Processes that end with the one that started them: workers of loaders and pools, and ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 1.0  # Interval at which a process looks for the one that started it.
GRACE = 30.0  # Seconds that a worker goes on after SIGTERM, as torchrun gives ranks.


def call_when_orphaned(function: Callable[[], None]) -> None:
    """Call a function in a thread, once, when the process that started this one has ended."""
    parent, process = os.getppid(), multiprocessing.parent_process()

    def watch() -> None:
        # getppid misses a parent that ended before it was called; parent_process does not.
        while os.getppid() == parent and (process is None or process.is_alive()):
            time.sleep(POLL_SECONDS)
        function()

    threading.Thread(target=watch, daemon=True, name="parent").start()


def serve(closing: Callable[[], bool] = lambda: False) -> None:
    """Prepare a process that works for the one that started it.

    It ends soon after that process, in the middle of its work. It ignores the signals that ask a
    run to stop, since the main process may need it up to its next safe point; but `GRACE` seconds
    after SIGTERM it ends.

        ProcessPoolExecutor(2, get_context("spawn"), initializer=serve)

    Args:
        closing: returns True once the main process needs this one no more; SIGTERM then ends it
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
