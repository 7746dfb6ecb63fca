"""What surrounds a run: where its messages go, how it is stopped, and how its errors are told."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from trainer import distributed, signals
from trainer.loggers.run_log import RunLog

LOGGERS = ("trainer", "recipes", "py.warnings")


class _ToLog(logging.Handler):
    """Messages into train.log, each of their lines with the time before it."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; a full disk ends the run here as anywhere."""
        for line in self.format(record).splitlines():
            self.log.text(line)


class _ToTerminal(logging.Handler):
    """Messages to stderr, above the progress bar: all of the main process, warnings of others."""

    def __init__(self) -> None:
        super().__init__(logging.INFO if distributed.is_main() else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{rank()}{warning}{self.format(record)}", file=sys.stderr)


@contextmanager
def messages(log: RunLog, own: str) -> Iterator[None]:
    """While it lasts, what is logged under `LOGGERS` and the module `own`, and Python's warnings,
    go to train.log and the terminal.
    """
    handlers = [_ToLog(log), _ToTerminal()]
    loggers = [logging.getLogger(name) for name in {*LOGGERS, own}]
    before = [(each.level, each.propagate) for each in loggers]
    logging.captureWarnings(True)
    for each in loggers:
        each.setLevel(logging.INFO)
        each.propagate = False
        for handler in handlers:
            each.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for each, (level, propagate) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.propagate = propagate
            for handler in handlers:
                each.removeHandler(handler)


@contextmanager
def stoppable() -> Iterator[None]:
    """While it lasts SIGTERM and Ctrl-C are requests that the loop follows at a safe point."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread alone.
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.reset()


@contextmanager
def told(log: RunLog) -> Iterator[None]:
    """An exception that leaves it is in train.log, with its traceback, before it goes on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            lines = [f"stopped with exit code {error.code}"]
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
        with contextlib.suppress(OSError):  # A full disk may be the very error to tell.
            for line in lines:
                log.text(line)
        raise


def meant_for_users(error: BaseException) -> bool:
    """Whether an error is one that the user can mend, so that its sentence is enough.

    Such are what the system refuses (files, space), and what this package and the recipes raise
    themselves, a package that is to be installed among them; one out of anything below them, or of
    an import that nobody foresaw, is a bug to be traced.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = str(last.tb_frame.f_globals.get("__name__")) if last is not None else ""
    return name.partition(".")[0] in ("trainer", "recipes")


def sentence(error: BaseException) -> str:
    """An error as a user reads it: what the system says without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def rank() -> str:
    """What goes before a message of a process that is not the main one."""
    return "" if distributed.is_main() else f"[rank {distributed.rank()}] "
