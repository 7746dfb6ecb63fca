"""Processes of a pool that end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import threading
import time


def serve(parent: int) -> None:
    """Initialise a process of a pool.

    It outlives the signals that ask a run to stop at a safe point, which the process ``parent``
    handles, but not that process.

        ProcessPoolExecutor(2, get_context("spawn"), initializer=serve, initargs=(os.getpid(),))
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
