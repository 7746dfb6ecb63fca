"""Run a function on two ranks of one process group.

`TwoRanks` keeps a server process that has imported torch and forks both ranks of each call. A call
therefore costs milliseconds, and each starts from a process that has run nothing: no generator,
signal handler, patched module or process group of one call reaches the next.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

ROOT = Path(__file__).parents[1]
WORLD_SIZE = 2


class TwoRanks:
    """Calls functions on ranks 0 and 1 of a gloo group on this machine.

    Args:
        folder: where results and outputs of the ranks lie, one folder a call.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0
    ) -> list[Any]:
        """Return what ``function(*arguments)`` returns on each rank.

        Args:
            function: a function of a module, found there by its name.
            arguments: values that JSON can hold, and paths, which arrive as strings.
            seconds: time limit; the ranks are killed after it.

        Returns:
            The results of ranks 0 and 1: tensors, numbers, strings and containers of these.

        Raises:
            RuntimeError: if a rank fails, or takes too long. The message has the end of what each
                rank wrote. No process of the call is left behind.
        """
        if self._server is None or self._server.poll() is not None:
            self._start()
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._calls += 1
        folder = self._folder / str(self._calls)
        folder.mkdir(parents=True)
        call = {
            "module": function.__module__, "name": function.__qualname__, "arguments": arguments,
            "folder": folder, "seconds": seconds, "port": _free_port(),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(call, default=os.fspath) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], seconds + 60)
        codes = json.loads(self._server.stdout.readline() or "null") if ready else None
        if codes is None:  # The server is gone or hangs, as in an import.
            self.close()
        if codes != [0] * WORLD_SIZE:
            files = [folder / f"output-{rank}.txt" for rank in range(WORLD_SIZE)]
            outputs = [file.read_text()[-3000:] if file.exists() else "" for file in files]
            written = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outputs))
            raise RuntimeError(
                f"exit codes {codes} of {function.__qualname__} (None: not ready when the other "
                f"failed, or within {seconds:g} s)\n{written}"
            )
        results = [folder / f"result-{rank}.pt" for rank in range(WORLD_SIZE)]
        return [torch.load(result, weights_only=True) for result in results]

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
            self._server = None

    def _start(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serve() -> None:
    """Answer each call, a line of stdin, by a line of two exit codes."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # The first optimizer imports modules for a second.
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        call = json.loads(line)
        with contextlib.suppress(Exception):  # A rank that imports it again reports the error.
            importlib.import_module(call["module"])
        gc.freeze()  # A collection in a rank would copy the pages of all that is imported.
        ranks: list[Any] = [
            fork.Process(target=_run, args=(rank, call)) for rank in range(WORLD_SIZE)
        ]
        try:
            for rank in ranks:
                rank.start()
            codes = _wait(ranks, call["seconds"])
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
                with contextlib.suppress(ProcessLookupError):  # Loader workers, for one.
                    os.killpg(rank.pid, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def _wait(ranks: list[Any], seconds: float) -> list[int | None]:
    """Return exit codes once all ranks have ended, one has failed or the time is over."""
    end = time.monotonic() + seconds
    while True:
        codes = [rank.exitcode for rank in ranks]
        running = [rank.sentinel for rank, code in zip(ranks, codes, strict=True) if code is None]
        # A rank that fails leaves the other waiting for it.
        if not running or any(codes):
            return codes
        if not connection.wait(running, max(0.0, end - time.monotonic())):
            return codes


def _run(rank: int, call: dict[str, Any]) -> None:
    """Be one of the ranks: run the function and store its result."""
    os.setsid()
    folder = Path(call["folder"])
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(call["port"]),
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE),
    )  # fmt: skip
    warnings.simplefilter("error")
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    function = attrgetter(call["name"])(importlib.import_module(call["module"]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = function(*call["arguments"])
    torch.save(result, folder / f"result-{rank}.pt")
    if dist.is_initialized():  # The function may have left it already.
        dist.destroy_process_group()


if __name__ == "__main__":
    _serve()
