"""Functions and programs in processes that are forked from one that has imported torch and trainer.

A new Python imports torch for seconds; a fork costs milliseconds, and starts as truly from a
process that has run nothing: no generator, signal handler, patched module or process group of one
call reaches the next.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

ROOT = Path(__file__).parents[1]
WORLD_SIZE = 2


def alive(process: int) -> bool:
    """Return True for a process that runs, and is no zombie, which is left to its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Forks:
    """Server of processes, started by the first call.

    Args:
        folder: where results and outputs of the processes lie, one folder a call.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0
    ) -> Any:
        """Return what ``function(*arguments)`` returns in a process of its own; see `run`."""
        return self.run(function, *arguments, seconds=seconds, ranks=0)[0]

    def run(
        self, function: Callable[..., Any], *arguments: Any, seconds: float, ranks: int
    ) -> list[Any]:
        """Return what ``function(*arguments)`` returns in each process of a call.

        Args:
            function: a function of a module, found there by its name.
            arguments: values that JSON can hold, and paths, which arrive as strings.
            seconds: time limit; the processes are killed after it.
            ranks: size of their gloo group on this machine; 0 for one process and no group.

        Returns:
            The results in order of ranks: tensors, numbers, strings and containers of these.

        Raises:
            RuntimeError: if a process fails, or takes too long. The message has the end of what
                each wrote. No process of the call is left behind.
        """
        folder, codes = self._ask(function, arguments, ranks, seconds)
        if codes != [0] * max(ranks, 1):
            files = [folder / f"output-{rank}.txt" for rank in range(max(ranks, 1))]
            outputs = [file.read_text()[-3000:] if file.exists() else "" for file in files]
            written = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(outputs))
            raise RuntimeError(
                f"exit codes {codes} of {function.__qualname__} (None: not ready when the other "
                f"failed, or within {seconds:g} s)\n{written}"
            )
        results = [folder / f"result-{rank}.pt" for rank in range(max(ranks, 1))]
        return [torch.load(result, weights_only=True) for result in results]

    def output(self, rank: int = 0) -> str:
        """Return what a process of the last call has written."""
        return (self._folder / str(self._calls) / f"output-{rank}.txt").read_text()

    def program(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python program to its end.

        Args:
            words: the command without Python: a file, or -m and a module, and arguments.
            folder: working directory.
            environment: the whole environment of the program.
        """
        done = self(_run_program, [*words], folder, dict(environment))
        return subprocess.CompletedProcess([*words], **done)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Started:
        """Call a function in a process that goes on beside the test."""
        folder, (process,) = self._ask(function, arguments, 0, None)
        return Started(self, process, folder / "output-0.txt")

    def end(self, process: int) -> None:
        """Kill a process of `start` with its children, and wait for its end."""
        if self._server is not None:
            self._request({"end": process}, 60)

    def close(self) -> None:
        """End the server and all that it has started."""
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.close()  # It ends what it has started, and itself.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(10)
            self._server.kill()
            self._server.wait()
            self._server.stdout.close()
            self._server = None

    def _ask(
        self, function: Callable[..., Any], arguments: Sequence[Any], ranks: int, seconds: Any
    ) -> tuple[Path, Any]:
        if self._server is not None and self._server.poll() is not None:
            self.close()
        if self._server is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.processes"], cwd=ROOT, text=True, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        self._calls += 1
        folder = self._folder / str(self._calls)
        folder.mkdir(parents=True)
        call = {
            "module": function.__module__, "name": function.__qualname__, "arguments": arguments,
            "folder": folder, "seconds": seconds, "ranks": ranks,
        }  # fmt: skip
        return folder, self._request(call, (seconds or 0) + 240)  # It may have to start first.

    def _request(self, call: dict[str, Any], seconds: float) -> Any:
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(call, default=os.fspath) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], seconds)
        answer = json.loads(self._server.stdout.readline() or "null") if ready else None
        if answer is None:  # The server is gone or hangs, as in an import.
            self._server.kill()
            self.close()
        return answer


class Started:
    """Process that goes on beside the test.

    Attributes:
        pid: its number.
    """

    def __init__(self, forks: Forks, pid: int, output: Path) -> None:
        self._forks, self.pid, self._output = forks, pid, output

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Wait until the process has written a text."""
        end = time.monotonic() + seconds
        while not (self._output.exists() and text in self._output.read_text()):
            assert time.monotonic() < end, f"the process did not write {text!r}"
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the process with its children, and wait for its end."""
        self._forks.end(self.pid)


class TwoRanks:
    """Calls functions on ranks 0 and 1 of a gloo group on this machine."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0
    ) -> list[Any]:
        """Return what ``function(*arguments)`` returns on each rank; see `Forks.run`."""
        return self._forks.run(function, *arguments, seconds=seconds, ranks=WORLD_SIZE)

    def output(self, rank: int) -> str:
        """Return what a rank of the last call has written."""
        return self._forks.output(rank)


# ------------------------------------------------------------------------------------- the server


def _serve() -> None:
    """Answer each call, a line of stdin, by a line of exit codes, or of the started process."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # The first optimizer imports modules for a second.
    import trainer

    for each in pkgutil.walk_packages(trainer.__path__, "trainer."):  # Each fork would do it.
        if not each.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(each.name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started: set[int] = set()
    for line in sys.stdin:
        call = json.loads(line)
        if "end" in call:
            started.discard(call["end"])
            _end(call["end"])
            print("true", file=answers, flush=True)
            continue
        with contextlib.suppress(Exception):  # A process that imports it again reports the error.
            importlib.import_module(call["module"])
        gc.freeze()  # A collection in a fork would copy the pages of all that is imported.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            count = max(call["ranks"], 1)
            processes = [_fork(partial(_run, rank, call, listener)) for rank in range(count)]
        codes: list[int | None] = [None] * count
        if call["seconds"] is None:
            started |= {*processes}
            print(json.dumps(processes), file=answers, flush=True)
            continue
        try:
            _wait(processes, codes, call["seconds"])
        finally:
            for process, code in zip(processes, codes, strict=True):
                _end(process, code is not None)
        print(json.dumps(codes), file=answers, flush=True)
    for process in started:
        _end(process)


def _fork(work: Callable[[], Any]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.setsid()
        leave(work)
    return child


def _wait(processes: list[int], codes: list[int | None], seconds: float) -> None:
    """Note exit codes until all have ended, one has failed or the time is over."""
    end = time.monotonic() + seconds
    # One that fails leaves the others waiting for it.
    while None in codes and not any(codes) and time.monotonic() < end:
        for place, process in enumerate(processes):
            if codes[place] is None:
                ended, status = os.waitpid(process, os.WNOHANG)
                codes[place] = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.002)


def _end(process: int, has_ended: bool = False) -> None:
    """Kill a process and what it has started, such as the workers of a loader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if not has_ended:
        os.waitpid(process, 0)


def _run(rank: int, call: dict[str, Any], listener: socket.socket) -> None:
    """Be one of the processes of a call: run the function and store its result."""
    folder = Path(call["folder"])
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    if call["ranks"]:
        warnings.simplefilter("error")
        _join(rank, call["ranks"], listener)
    else:
        listener.close()
    function = attrgetter(call["name"])(importlib.import_module(call["module"]))
    result = function(*call["arguments"])
    torch.save(result, folder / f"result-{rank}.pt")
    if dist.is_initialized():  # The function may have left it already.
        dist.destroy_process_group()


def _join(rank: int, ranks: int, listener: socket.socket) -> None:
    """Join the group of a call, whose port nobody else can take meanwhile."""
    port = listener.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
    )  # fmt: skip
    limit = timedelta(seconds=60)
    mine = {"master_listen_fd": listener.detach()} if rank == 0 else {}
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, limit, **mine)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    dist.barrier()  # A rank that ends early would break connections that others still make.


# -------------------------------------------------------------------------------------- programs


def leave(work: Callable[[], Any]) -> None:
    """Call a function, and end this process as Python would end a program."""
    code: Any = 0
    try:
        work()
    except SystemExit as exit_:
        code = exit_.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def start(given: Sequence[str]) -> None:
    """Be the program of a command: a file, or -m and a module, and arguments."""
    if given[0] == "-m":
        sys.argv = ["-m", *given[2:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(given[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*given]
        path = Path(given[0]).absolute()
        sys.path.insert(0, str(path.parent))
        # Unlike `runpy.run_path`, this leaves `sys.argv` as it was given.
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__file__ = str(path)
        exec(compile(path.read_bytes(), str(path), "exec"), vars(main))


def _run_program(words: list[str], folder: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run a program in a fork of this process, and return its exit code and outputs."""
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115

    def work() -> None:
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        start(words)

    child = os.fork()
    if not child:
        leave(work)
    found: dict[str, Any] = {"returncode": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
    for name, file in zip(("stdout", "stderr"), files, strict=True):
        with file:
            file.seek(0)
            found[name] = file.read()
    return found


if __name__ == "__main__":
    _serve()
