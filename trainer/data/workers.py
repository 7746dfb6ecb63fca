"""The processes that load batches: they outlive polite signals, and their deaths have a cause."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor

GLANCE = 0.5  # Seconds from one look at the workers to the next.


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


class Watched:
    """A DataLoader's iterator whose workers cannot die or hang without being noticed.

    torch hears of a death at once, or, when the signal comes just before it starts to wait, after
    5 s. Here it looks twice a second.
    """

    def __init__(self, iterator: Any, timeout: float) -> None:
        self._iterator, self._timeout = iterator, timeout
        self._workers: list[BaseProcess] = list(getattr(iterator, "_workers", []))
        self._glance(GLANCE)

    def _glance(self, seconds: float) -> None:
        """How long torch waits for a batch before it looks at its workers and gives up."""
        if self._workers:  # Not DataLoader's own option: its restart for an epoch may take longer.
            self._iterator._timeout = seconds

    def next(self, doing: Callable[[], str]) -> Any:
        """What the next task gave; None at the end of the epoch.

        Raises RuntimeError for a worker that died, or that gives nothing within the timeout (0: no
        limit), ending in what ``doing`` says; and whatever the dataset raises.
        """
        since = time.monotonic()
        while True:
            try:
                result = next(self._iterator, None)
                if result is None:
                    self._glance(0)  # Persistent workers are about to be restarted.
                return result
            except Exception as error:
                trouble = self._trouble(str(error), time.monotonic() - since)
                if trouble is None:
                    raise
            if trouble:  # Raised out here: chained, it would keep all that torch's frames hold.
                raise RuntimeError(f"{trouble}, {doing()}")

    def _trouble(self, error: str, waited: float) -> str | None:
        """An error of torch in clearer words; None if it is not about workers, "" to go on."""
        if error.startswith("DataLoader timed out"):
            if not self._timeout or waited < self._timeout:
                return ""
            return (
                f"the loader's workers gave no batch within {self._timeout:g} s (one hangs, or the "
                "loader option timeout is too small)"
            )
        return None if error.startswith("Caught ") else death(self._workers)  # Caught: a dataset's.

    def close(self) -> None:
        """End the workers at once: torch would wait for what they are loading."""
        for worker in self._workers:
            worker.terminate()
        if self._workers:
            # One may have ended with the lock of torch's own event in its hands, and torch, which
            # sets that before it lets the iterator go, would wait for ever. Nobody heeds it now.
            self._iterator._workers_done_event = threading.Event()
        self._iterator = None  # A traceback may keep this object, and must not keep the workers.


def death(workers: list[BaseProcess]) -> str | None:
    """What a worker died of, in words; None when none did."""
    # A broken connection to a worker may be noticed just before its end; and torch's own handler
    # may notice that end, and raise, while we wait for it.
    with suppress(RuntimeError):
        ended = connection.wait([worker.sentinel for worker in workers], timeout=GLANCE)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(timeout=GLANCE)
    for worker in workers:
        if code := worker.exitcode:
            how = (
                f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            )
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"a worker of the loader (pid {worker.pid}) {how}{hint}"
    return None
