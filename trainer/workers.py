"""The processes that load batches: they outlive polite signals, and their deaths have a cause."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from torch import Tensor


def start(closing: Tensor, own_start: Callable[[int], None] | None, worker: int) -> None:
    """Make a worker serve until the main process closes it; runs first in the worker.

    Ctrl-C, and torchrun's SIGTERM, reach the workers too; a worker that died of them would break
    the main process in the middle of the step after which it wants to save. ``closing`` lies in
    shared memory, and says that SIGTERM comes from the main process and is meant.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.item() else None)
    if own_start is not None:
        own_start(worker)


def death(workers: Sequence[BaseProcess]) -> str | None:
    """What a worker died of, in words; None when none of them died of a signal."""
    # A broken connection to a worker may be noticed just before its end; and torch's own handler
    # may notice that end, and raise, while we wait for it.
    with suppress(RuntimeError):
        connection.wait([worker.sentinel for worker in workers], timeout=0.5)
    for worker in workers:
        if worker.exitcode is not None and worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"a worker of the loader (pid {worker.pid}) died of {name}{hint}"
    return None
