"""Messages, signals and errors of a run."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from trainer import distributed, signals
from trainer.config.registry import recipe_packages
from trainer.loggers import TextLog


class _ToLog(logging.Handler):
    """Handler that writes messages to train.log, each of their lines with the time."""

    def __init__(self, log: TextLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; OSError, as elsewhere, if the disk is full."""
        for line in self.format(record).splitlines():
            self.log.write(line)


class _ToTerminal(logging.Handler):
    """Handler that writes to stderr, above the progress bar; off the main rank only warnings."""

    def __init__(self) -> None:
        super().__init__(logging.INFO if distributed.is_main() else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        warning = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{rank_prefix()}{warning}{self.format(record)}", file=sys.stderr)


@contextmanager
def messages(log: TextLog, names: Iterable[str]) -> Iterator[None]:
    """Context manager that sends messages and Python's warnings to train.log and the terminal.

    Args:
        log: the open log of the run.
        names: loggers in addition to those of the trainer.
    """
    handlers = [_ToLog(log), _ToTerminal()]
    loggers = [logging.getLogger(name) for name in {"trainer", "py.warnings", *names}]
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
def signals_at_safe_points() -> Iterator[None]:
    """Context manager in which SIGTERM and Ctrl-C let the loop save and stop at a safe point."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only.
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
def logged_exceptions(log: TextLog) -> Iterator[None]:
    """Context manager that writes the traceback of an exception to train.log."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            lines = [f"stopped with exit code {error.code}"]
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
        with contextlib.suppress(OSError):  # A full disk may be the error itself.
            for line in lines:
                log.write(line)
        raise


def is_user_error(error: BaseException, package: str = "") -> bool:
    """Return True for an error that users can correct, so that its message is enough.

    These are what the system refuses (files, space), and what the trainer and the recipes raise
    themselves, including a package that is not installed. An error from a library below them, or of
    an unforeseen import, is a bug that needs its traceback.

    Args:
        error: an exception with its traceback.
        package: the package of the program that runs as a script.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = str(last.tb_frame.f_globals.get("__name__")) if last is not None else ""
    if name == "__main__":
        name = package
    return any(f"{name}.".startswith(f"{each}.") for each in ("trainer", *recipe_packages()))


def sentence(error: BaseException) -> str:
    """Return the message of an error; of the system's without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def rank_prefix() -> str:
    """Return the prefix of messages from other processes than the main one."""
    return "" if distributed.is_main() else f"[rank {distributed.rank()}] "
