"""Messages, signals and errors of a run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from trainer import distributed, processes, signals
from trainer.config.registry import recipe_packages
from trainer.loggers import TextLog

logger = logging.getLogger("trainer")

ORPHAN_SECONDS = 7.0  # Time that a rank has to save and stop when its launcher has died.
_follows_launcher = False


class _Handler(logging.Handler):
    """Handler that writes to train.log, and to stderr; off the main rank only warnings go there."""

    def __init__(self, log: TextLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message: each of its lines with the time, and above the progress bar."""
        text, warning = self.format(record), record.levelno >= logging.WARNING
        for line in text.splitlines():
            self.log.write(line)
        if warning or distributed.is_main():
            level = "error: " if record.levelno >= logging.ERROR else "warning: " * warning
            prefix = f"{rank_prefix()}{level}"
            tqdm.write(f"{prefix}{text}", file=sys.stderr)


@contextmanager
def messages(log: TextLog, names: Iterable[str]) -> Iterator[None]:
    """Context manager that sends messages and Python's warnings to train.log and the terminal.

    These are the messages of the trainer, and of the loggers `names`.
    """
    handler = _Handler(log)
    loggers = [logging.getLogger(name) for name in {"trainer", "py.warnings", *names}]
    before = [(each.level, each.propagate) for each in loggers]
    logging.captureWarnings(True)
    for each in loggers:
        each.setLevel(logging.INFO)
        each.propagate = False
        each.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for each, (level, propagate) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.propagate = propagate
            each.removeHandler(handler)


@contextmanager
def signals_at_safe_points() -> Iterator[None]:
    """Context manager in which requests to stop let the loop save and stop at a safe point."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only.
        return
    before = signals.install()
    try:
        with signals.hung_waits_left():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.reset()


def end_with_launcher() -> None:
    """Make a rank stop, as by SIGTERM, once the torchrun that started it has ended."""
    global _follows_launcher
    if not _follows_launcher and distributed.launched():
        _follows_launcher = True
        processes.call_when_orphaned(_stop_orphan)


def _stop_orphan() -> None:
    logger.warning("the launcher of this process has ended: stopping within %g s", ORPHAN_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    logger.error("stopping without a new checkpoint, since the time is over")
    os._exit(128 + signal.SIGTERM)


@contextmanager
def stopping_with_others() -> Iterator[None]:
    """Context manager that turns the error of a rank which another has left into its request."""
    try:
        yield
    except Exception as error:
        number = distributed.left()
        if number is None:
            raise
        raise signals.Interrupted(number, saves=False) from error


@contextmanager
def logged_exceptions(log: TextLog, note: str = "") -> Iterator[None]:
    """Context manager that writes the traceback of an exception to train.log.

    The note is added to the exception, for users who see its message alone.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            lines = [f"stopped with exit code {error.code}"]
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
        for line in lines:
            log.write(line)
        if note:
            error.add_note(note)
        raise


def is_user_error(error: BaseException) -> bool:
    """Return True for an error that users can correct, so that its message is enough.

    These are errors of the operating system (a missing file, a full disk), and errors that the
    trainer or a recipe raises itself. An error that a library raises, or an import that fails
    unexpectedly, is a bug and needs its traceback.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename).resolve()
    packages = [sys.modules[name] for name in ("trainer", *recipe_packages())]
    return any(
        Path(folder).resolve() in file.parents for each in packages for folder in each.__path__
    )


def message(error: BaseException) -> str:
    """Return the message of an error; that of an OSError without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def rank_prefix() -> str:
    """Return "[rank 1] ", the prefix of messages from processes other than the main one."""
    return "" if distributed.is_main() else f"[rank {distributed.rank()}] "
