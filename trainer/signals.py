"""Requests to stop: signals and a time limit end a run at its next safe point, after a checkpoint.

The loop calls `requested` after each batch. A wait for data is a safe point as well, since no step
is half-done; a wait that lasts too long after a request is ended; see `waiting`.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from trainer import distributed

logger = logging.getLogger("trainer")

ALWAYS = (signal.SIGTERM, signal.SIGINT)
# Signals of a closed terminal and of schedulers, handled where they would kill the process.
UNLESS_IN_USE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = 0  # In place of a signal's number: the run option max_hours.
PATIENCE = 3.0  # Seconds that a wait for data may last after a request.
RESCUE = 6.0  # Seconds after a request at which a wait that ignores exceptions is given up.

_received: int | None = None
_received_at = 0.0
_deadline: float | None = None
_deferring = 0  # Depth of `at_safe_points` blocks.
_stopping = False  # True once an exception for the request was raised.
_last_code, _asked_again = 0, False  # See `end_with`.
_wait: waiting | None = None
_leaving = threading.Lock()  # Held while a wait ends, and by the thread that gives one up.


class Interrupted(SystemExit):
    """Exit of a run that was asked to stop.

    Args:
        number: number of the signal, or `TIME_LIMIT`. The exit code is 143 for SIGTERM, 130 for
            SIGINT and 75 for all else.
        saves: False if the state is not that of a safe point, and must not be saved.
    """

    def __init__(self, number: int, saves: bool = True) -> None:
        super().__init__(exit_code(number))
        self.number, self.saves = number, saves
        self.signal = name_of(number)


class KeyboardInterrupted(KeyboardInterrupt, SystemExit):
    """Ctrl-C for programs and notebooks: an uncaught one ends the process with exit code 130."""

    def __init__(self) -> None:
        self.code = exit_code(signal.SIGINT)


def exit_code(number: int) -> int:
    """Return the exit code after a request: 143 for SIGTERM, 130 for SIGINT and 75 for others."""
    # 75 means "try again later" in sysexits.h.
    return 128 + number if number in ALWAYS else 75


def name_of(number: int) -> str:
    """Return the name of a request, such as "SIGTERM" or "max_hours"."""
    return "max_hours" if number == TIME_LIMIT else signal.Signals(number).name


@contextmanager
def at_safe_points() -> Iterator[None]:
    """Context manager in which requests wait for a safe point: they only set `requested`.

    Outside of it a request raises at once: KeyboardInterrupt for SIGINT, `Interrupted` for others.
    """
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


class waiting:
    """Context manager around a wait for data, in which the state of the run is complete.

    A request older than `PATIENCE` seconds raises `Interrupted` in it, since the data hang.

    Args:
        describe: returns a description of the wait, such as "waiting for batch 3 of epoch 1".
        rescue: called in another thread with the number of the request, before the process ends, if
            the main thread is in a call that no exception interrupts.
    """

    def __init__(self, describe: Callable[[], str], rescue: Callable[[int], None]) -> None:
        self.describe, self.rescue = describe, rescue

    def __enter__(self) -> None:
        global _wait
        self.over = False
        _wait = self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        global _wait
        self.over = True  # From here on no handler raises.
        with _leaving:
            _wait = None
        if isinstance(error, Interrupted):
            logger.warning("asked to stop (%s) while %s", error.signal, self.describe())


def _receive(number: int) -> int:
    """Record a request and its time, unless there is one; return the recorded one."""
    global _received, _received_at
    if _received is None:
        _received, _received_at = number, time.monotonic()
    return _received


def _handle(number: int, _frame: FrameType | None) -> None:
    global _stopping
    again = _received == signal.SIGINT == number
    first = _receive(number)
    waits = _wait is not None and not _wait.over
    if waits and time.monotonic() - _received_at >= PATIENCE:
        _stopping = True  # Raised again at each further signal: a dataset may swallow it.
        raise Interrupted(first)
    if _stopping and number != signal.SIGINT:
        return  # The run is ending already.
    if not _deferring:
        _stopping = True
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)
    if again:
        raise KeyboardInterrupt  # A second Ctrl-C does not wait for a safe point.


def install() -> dict[int, Any]:
    """Handle SIGTERM, SIGINT and others that would end the process; return the former handlers."""
    # SIG_IGN stays, as under nohup, and so does a handler of the program.
    unused = [n for n in UNLESS_IN_USE if signal.getsignal(n) in (signal.SIG_DFL, _end)]
    return {number: signal.signal(number, _handle) for number in (*ALWAYS, *unused)}


def _mask_term(how: int) -> None:
    if installed():
        signal.pthread_sigmask(how, [signal.SIGTERM])


def _leave_parent() -> None:
    """Let SIGTERM end a forked process, and keep its signals from its parent."""
    if installed():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


# Until `_leave_parent` has run, a forked process would handle SIGTERM as its parent does.
os.register_at_fork(
    before=lambda: _mask_term(signal.SIG_BLOCK),
    after_in_parent=lambda: _mask_term(signal.SIG_UNBLOCK),
    after_in_child=_leave_parent,
)


def end_with(code: int) -> None:
    """Keep the exit code of a process that is about to end, despite further signals.

    torchrun sends SIGTERM to ranks that are ending. A second SIGTERM ends the process at once.
    """
    global _last_code, _asked_again
    if threading.current_thread() is not threading.main_thread():
        return  # The end of another thread is not that of the process.
    _last_code, _asked_again = code, False
    for number in (signal.SIGTERM, *UNLESS_IN_USE):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


@atexit.register
def _end_at_exit() -> None:
    """End the process with the code of `end_with`, after Python has stopped handling signals."""
    for number in (signal.SIGTERM, *UNLESS_IN_USE):
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)
    if _last_code and distributed.launched():
        # If ranks end at the same time, threads of process groups abort one in ten of them
        # ("terminate called without an active exception"), which would lose the exit code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_last_code)


def _end(_number: int, _frame: FrameType | None) -> None:
    global _asked_again
    if _asked_again:
        os._exit(_last_code)
    _asked_again = True


def installed() -> bool:
    """Return True if this process handles requests by signals."""
    return signal.getsignal(signal.SIGTERM) is _handle


def set_limit(hours: float | None) -> None:
    """Request a stop once this process is some hours old; None for no limit."""
    global _deadline
    _deadline = None if hours is None else time.monotonic() - _age() + 3600 * hours


def _age() -> float:
    """Return the age of this process in seconds."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def requested() -> int | None:
    """Return the request to stop: the number of a signal, or `TIME_LIMIT`; None without one."""
    if _received is None and _deadline is not None and time.monotonic() >= _deadline:
        return _receive(TIME_LIMIT)
    return _received


def raise_agreed() -> NoReturn:
    """Raise `Interrupted` if any rank has a request. Every rank must call it.

    All ranks end with the exit code of the first rank with a request.
    """
    requests = distributed.all_gather_json(requested())
    keep_error()
    raise Interrupted(next(number for number in requests if number is not None))


def keep_error() -> None:
    """Ignore further signals except SIGINT, so that the error that ends the run is reported."""
    global _stopping
    _stopping = True


def reset() -> None:
    """Forget a request to stop, and the time limit."""
    global _received, _deadline, _stopping
    _received, _deadline, _stopping = None, None, False


@contextmanager
def hung_waits_left() -> Iterator[None]:
    """Context manager in which a thread ends hanging waits for data after a request.

    It learns of signals through `signal.set_wakeup_fd`, which works even while the main thread is
    in a call that runs no Python handlers.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(reader, done), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        done.set()
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, done: threading.Event) -> None:
    """Watch the waits of the main thread until ``done`` is set."""
    number: int | None = None
    since, main = 0.0, threading.main_thread().ident
    assert main is not None
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        told = os.read(reader, 4096) if ready else b""
        if done.is_set():
            return
        if number is None:
            # The pipe holds the numbers of all signals with a handler, also those of the program.
            heard = [each for each in told if each and signal.getsignal(each) is _handle]
            number, since = heard[0] if heard else requested(), time.monotonic()
            if number is not None:
                distributed.ask(number)
            else:
                number = _asked_elsewhere()
        if number is None or _wait is None or _wait.over:
            continue
        lasted = time.monotonic() - since
        if lasted >= RESCUE:
            _give_up(number)
        elif lasted >= PATIENCE:
            signal.pthread_kill(main, signal.SIGTERM)  # Its handler raises the exception.


def _asked_elsewhere() -> int | None:
    """Take over the request of another rank, which may be waiting for this one in a collective."""
    try:
        number = distributed.asked()
    except RuntimeError:  # The launcher is gone: this process learns of that by itself.
        return None
    if number is not None:
        _receive(number)
    return number


def _give_up(number: int) -> None:
    """End the process while its main thread waits for data; return if the wait is over."""
    with _leaving:
        wait = _wait
        if wait is None or wait.over:
            return
        logger.error(
            "asked to stop (%s) while %s: no exception ends this call, so the process does",
            name_of(number), wait.describe(),
        )  # fmt: skip
        rescue = threading.Thread(target=wait.rescue, args=(number,), daemon=True)
        rescue.start()
        rescue.join(60)
        os._exit(exit_code(number))
