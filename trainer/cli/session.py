"""Messages, signals and errors of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from trainer import distributed, processes, signals
from trainer.config.registry import recipe_packages
from trainer.frames import is_library
from trainer.loggers import TextLog
from trainer.texts import cause

logger = logging.getLogger("trainer")

ORPHAN_SECONDS = 7.0  # Time for a rank to save and stop after its launcher has died.
FRAME = re.compile(r'^  File "(.+)", line \d+.*\n(?:    .*\n)*', re.MULTILINE)
_follows_launcher = False


class _Handler(logging.Handler):
    """Handler that writes to train.log and stderr; only rank 0 writes more than warnings there."""

    def __init__(self, log: TextLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message above the progress bar, each line with the time."""
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

    ``names`` are loggers besides those of the trainer and of Python's warnings.
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
    """Context manager in which requests to stop make the loop save and stop at a safe point."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signal handlers only in the main thread.
        return
    before = signals.install()
    try:
        with signals.hung_waits_left():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.reset()


class _TolerantStream:
    """Stream of `sys` that drops text that cannot be written, with one warning."""

    def __init__(self, name: str) -> None:
        self._name, self._stream, self._warned = name, getattr(sys, name), False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if not self._warned:
                self._warned = True  # Before the warning, which is written here, too.
                why = error.strerror or error
                logger.warning("%s lacks text from here on: %s", self._name, why)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Context manager in which a full disk or a closed pipe behind stdout or stderr ends no run."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    own = {name: _TolerantStream(name) for name in before}
    vars(sys).update(own)
    try:
        yield
    finally:
        for name, stream in own.items():
            if getattr(sys, name) is stream:  # Not redirected since, as by a notebook.
                setattr(sys, name, before[name])


@contextmanager
def recorded(folder: Path | None, names: Iterable[str]) -> Iterator[TextLog]:
    """Context manager that yields train.log, and sends `messages` to it; output may fail.

    Nothing is written without a folder.
    """
    with closing(TextLog(folder)) as log, tolerant_output(), messages(log, names):
        yield log


def end_with_launcher() -> None:
    """Stop a rank, as by SIGTERM, once the torchrun that started it has ended."""
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
def failing_as_one() -> Iterator[None]:
    """Context manager that ends all ranks of a run when one of them fails.

    A rank sends its error to the others. If a collective fails because another rank has left or
    failed, that rank's request to stop is raised, or one line about its error.

    Raises:
        Interrupted: another rank was asked to stop.
        OtherRankFailed: another rank failed.
    """
    try:
        yield
    except (Exception, signals.Interrupted) as error:
        several = distributed.world_size() > 1
        if several:
            signals.keep_error()  # torchrun sends SIGTERM once the first rank has ended.
        stop = error if isinstance(error, signals.Interrupted) else None
        # Collectives raise these types; torchrun stops the remaining ranks by a signal. Errors that
        # all ranks raise have other types.
        failed = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
        first = distributed.departure() if failed or stop is not None else None
        if first is not None:
            if first["request"] is not None:
                raise signals.Interrupted(first["request"], saves=False) from error
            raise OtherRankFailed(f"rank {first['rank']} failed: {first['error']}") from error
        number = None if stop is None else stop.number
        distributed.depart(request=number, error=cause(error))
        if stop is None and several:
            error.add_note(f"(on rank {distributed.rank()})")
        raise


class OtherRankFailed(RuntimeError):
    """Error of a rank that ends because another one has failed."""


@contextmanager
def logged_exceptions(log: TextLog, path: Path | None, note: str = "") -> Iterator[None]:
    """Context manager that writes the traceback of an exception to train.log.

    The main rank writes to ``log``, and the others append to its file, at ``path``. ``note`` is
    added to the exception, for users who see only its message.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            lines = [f"stopped with exit code {error.code}"]
        elif isinstance(error, OtherRankFailed):
            lines = [f"stopped: {error}"]
        else:
            lines = "".join(traceback.format_exception(error)).splitlines()
        if distributed.is_main():
            for line in lines:
                log.write(line)
            if path is not None and isinstance(error, Exception):
                _refresh_report(path.parent)
        elif path is not None:
            _append(path, lines)
        if note and not isinstance(error, OtherRankFailed):
            error.add_note(note)
        raise


def _refresh_report(folder: Path) -> None:
    """Rewrite the report of a run, if it has one, so that it shows the error in train.log."""
    from trainer.report import write_html

    if (folder / "report.html").exists():
        try:
            write_html(folder)
        except Exception as failure:  # The run's own error matters more.
            logger.warning("the report lacks the end of the run: %s", failure)


def _append(path: Path, lines: list[str]) -> None:
    """Append lines to train.log by one write, so that lines of ranks do not mix."""
    start = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {rank_prefix()}"
    data = "".join(f"{start}{line}\n" for line in lines).encode(errors="backslashreplace")
    try:
        # The main rank may not have written yet; on another machine there may be no folder.
        with path.open("ab", buffering=0) as file:
            file.write(data)
    except OSError as error:
        logger.warning("%s lacks the error of rank %d: %s", path, distributed.rank(), error)


def trim(error: BaseException) -> None:
    """Remove frames of Python, of installed packages and of the trainer from tracebacks.

    The last frame stays. Causes, contexts and torch's text of errors in loader workers are trimmed,
    too.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        waiting += [each.__cause__, each.__context__]
        each.__traceback__ = _trimmed(each.__traceback__)
        if each.args and isinstance(each.args[0], str) and each.args[0].startswith("Caught "):
            text = each.args[0]
            each.args = (type(text)(_trimmed_text(text)), *each.args[1:])


def _trimmed(trace: TracebackType | None) -> TracebackType | None:
    frames, kept = [], None
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    for each in reversed(frames):
        if kept is None or not is_library(each.tb_frame.f_code.co_filename):
            kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return kept


def _trimmed_text(text: str) -> str:
    """Return the text of a traceback without frames of libraries; the last frame stays."""
    last = max((found.start() for found in FRAME.finditer(text)), default=0)
    return FRAME.sub(
        lambda found: "" if is_library(found[1]) and found.start() != last else found[0], text
    ).removesuffix("\n")


def say(text: str, delay: int = 0) -> None:
    """Write the final message of this rank to stderr and to torchrun."""
    print(f"{rank_prefix()}{text}", file=sys.stderr)
    tell_launcher(text, delay)


def tell_launcher(text: str, delay: int = 0) -> None:
    """Write the cause of this rank's end to torchrun's error file, if torchrun has started it.

    torchrun reports the earliest error, in whole seconds, as the root cause; ``delay`` seconds are
    added to the time of this one.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()) + delay)}
        whole = Path(f"{path}.new")
        with suppress(OSError):  # The terminal shows it, too.
            whole.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
            os.replace(whole, path)  # torchrun fails on a half-written file.


def is_user_error(error: BaseException) -> bool:
    """Return True for an error whose message is enough: of the system, the trainer or a recipe.

    An error raised by a library, or an import that fails unexpectedly, needs its traceback.
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
    """Return the message of an error; for an OSError, its file and reason without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def rank_prefix() -> str:
    """Return "[rank 1] ", the prefix of messages from processes other than the main one."""
    return "" if distributed.is_main() else f"[rank {distributed.rank()}] "


def environment_of_children() -> dict[str, str]:
    """Return the environment of a program that imports modules of the current folder, too."""
    path = filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
