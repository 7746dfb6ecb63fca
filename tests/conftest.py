"""Fixtures of all tests: one thread, restored process state, two ranks, recorded speech."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import Forks, TwoRanks
from trainer import signals

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
HANDLED = (*signals.ALWAYS, *signals.UNLESS_IN_USE)

# The shell may ignore them, as under nohup, and the processes of the tests would inherit that.
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems() -> None:
    """Give SpeechBrain's lazy modules a file: hypothesis asks for it, which would import them."""
    for module in list(sys.modules.values()):
        if type(module).__module__ == "speechbrain.utils.importutils":
            vars(module).setdefault("__file__", None)


@pytest.fixture(autouse=True)
def _restore_process_state() -> Iterator[None]:
    """Restore environment, signals, log levels, default dtype and process group after each test."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    loggers = [logging.getLogger(name) for name in ("trainer", "recipes")]
    levels = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, kept in levels:
        logger.setLevel(level)
        logger.handlers[:] = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals.reset()
    os.environ.clear()
    os.environ.update(before)
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Call functions and run programs in processes that have imported torch; see `Forks`."""
    server = Forks(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def two_ranks(forks: Forks) -> TwoRanks:
    """Call functions on two ranks of a process group; see `TwoRanks`."""
    return TwoRanks(forks)


@pytest.fixture
def speech_data() -> Path:
    """Return the folder of recorded speech for tests marked `real`; skip without it."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPEECH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no recorded speech in {folder}: say where it is by SPEECH_DATA")
    return folder
