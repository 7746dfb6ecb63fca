"""Loggers: strict JSON by whole lines, no record twice after resuming, and no run that they end."""

import errno
import itertools
import json
import logging
import math
import os
import re
import resource
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import Forks
from tests.trainer.small import Players, Regressor, batches, make
from trainer import Callback, RunOptions, StageReport, StepReport, distributed
from trainer.loggers import (
    JsonlLogger,
    Logger,
    LoggerCallback,
    ProgressBar,
    TensorBoardLogger,
    TextLog,
)
from trainer.loggers.callback import describe
from trainer.loggers.files import as_json
from trainer.progress import Progress, Stage


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records, read by a strict reader: it stumbles over NaN, partial lines and blank ones."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


@contextmanager
def full_disk(bytes_left: int, file: Path) -> Iterator[None]:
    """No file of this process may grow beyond what `file` has and a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + bytes_left, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.text(), JSON, max_size=4))
@settings(max_examples=50, deadline=None)
def test_every_record_is_one_line_of_strict_json(
    record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    log = JsonlLogger(folder)
    log.scalars("step", record, 1)
    log.scalars("stage", record, 2)
    log.close()
    plain = as_json(record)
    assert lines(folder) == [
        {"kind": "step"} | plain | {"step": 1},
        {"kind": "stage"} | plain | {"step": 2},
    ]


def test_numbers_of_any_make_are_numbers_and_lost_ones_are_null() -> None:
    import numpy

    record = {
        "tensor": torch.tensor(1.5, requires_grad=True),
        "tensors": torch.tensor([1.0, math.nan]),
        "numpy": numpy.float32(0.25),
        "count": numpy.int64(3),
        "lost": [math.nan, math.inf, -math.inf],
        "none": None,
        "path": Path("a/b"),
        7: (1, 2),
    }
    assert as_json(record) == {
        "tensor": 1.5,
        "tensors": [1.0, None],
        "numpy": 0.25,
        "count": 3,
        "lost": [None, None, None],
        "none": None,
        "path": str(Path("a/b")),
        "7": [1, 2],
    }


def test_a_file_name_that_is_not_utf8_is_logged_and_read_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"take-\xff.wav")
    log, text = JsonlLogger(tmp_path), TextLog(tmp_path)
    log.scalars("step", {"worst": name}, 1)
    text.write(name)
    log.close()
    text.close()
    assert lines(tmp_path)[0]["worst"] == name
    assert "take-\\udcff.wav" in (tmp_path / "train.log").read_text()


def test_the_same_folder_again_goes_on_below(tmp_path: Path) -> None:
    for step in (1, 2):
        log, text = JsonlLogger(tmp_path / "new" / "run"), TextLog(tmp_path / "new" / "run")
        log.scalars("step", {"loss": 0.5}, step)
        text.write(f"run {step}")
        for each in (log, text, log, text):
            each.close()
    assert [line["step"] for line in lines(tmp_path / "new" / "run")] == [1, 2]
    written = (tmp_path / "new" / "run" / "train.log").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d run [12]\n){2}", written)


@pytest.mark.parametrize("length", [0, 1, 30, 70_000, 200_000])
def test_a_partial_last_line_is_cut_away(tmp_path: Path, length: int) -> None:
    log = JsonlLogger(tmp_path)
    log.scalars("step", {"note": "x" * 100_000}, 1)
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "loss'[:length] + b"y" * max(0, length - 22))
    log = JsonlLogger(tmp_path)
    log.scalars("step", {}, 2)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_file_that_is_one_partial_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "st' * 20_000)
    JsonlLogger(tmp_path).close()
    assert lines(tmp_path) == []


def log_on_and_on(folder: str) -> None:
    log = JsonlLogger(Path(folder))
    for step in itertools.count():
        log.scalars("step", {"loss": 1.0 / (step + 1), "note": "x" * 3000}, step)


def test_a_killed_run_leaves_whole_lines(tmp_path: Path, forks: Forks) -> None:
    process = forks.start(log_on_and_on, tmp_path)
    file = tmp_path / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size > 100_000):
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    JsonlLogger(tmp_path).close()
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 30


@pytest.mark.parametrize("step", [-1, 0, 3, 10, 11])
def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path, step: int) -> None:
    log = JsonlLogger(tmp_path)
    log.write({"stage": "note"})  # Without a step: of no particular time.
    for n in range(1, 11):
        log.scalars("step", {}, n)
        if n % 5 == 0:
            log.scalars("stage", {"stage": "valid"}, n)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    log.resume(step)
    kept = [line.get("step", -1) for line in lines(tmp_path)]
    assert all(n <= step for n in kept if n > 0)
    assert len(kept) == 1 + sum(1 + (n % 5 == 0) for n in range(1, 11) if n <= step)
    assert log.lines == len(kept)
    log.scalars("step", {}, step + 1)
    log.close()
    assert lines(tmp_path)[-1]["step"] == step + 1
    assert len(lines(tmp_path)) == len(kept) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    if step >= 10:  # Nothing to forget, nothing rewritten.
        assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_records_of_the_checkpoints_own_step_are_told_apart_by_their_number(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path)
    log.scalars("step", {}, 1)
    log.scalars("step", {}, 2)
    saved = log.lines
    log.scalars("stage", {"stage": "valid"}, 2)
    log.resume(2, saved)
    log.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["step", "step"]


def test_what_cannot_be_read_is_dropped_when_resuming(tmp_path: Path) -> None:
    broken = b'{"step": 1}\nnot json\n[1]\n\xff\xfe\n' + b"[" * 5000 + b'\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(broken)
    log = JsonlLogger(tmp_path)
    log.resume(2)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_large_log_is_resumed_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        for step in range(20_000):
            file.write(b'{"step": %d, "x": "%s"}\n' % (step, b"x" * 1000))
        file.write(b"[" * (40 << 20) + b"\n")  # One line of 40 MB.
    log = JsonlLogger(tmp_path)
    assert log.lines == 20_001
    tracemalloc.start()
    log.resume(10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    log.close()
    assert peak < 20 << 20  # Of 60 MB.
    assert [line["step"] for line in lines(tmp_path)] == list(range(10_001))


def test_a_full_disk_is_a_sentence_and_leaves_no_half_line(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path)
    log.scalars("step", {}, 1)
    sentence = r"could not be written \(File too large\); free some space or choose another"
    limit = full_disk(10, tmp_path / "metrics.jsonl")
    with limit, pytest.raises(OSError, match=sentence) as caught:
        log.scalars("step", {"loss": 0.125}, 2)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    log.scalars("step", {}, 3)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_full_disk_while_resuming_keeps_the_old_file(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path)
    for step in (1, 2, 3):
        log.scalars("step", {}, step)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limit = full_disk(-len(before) + 10, tmp_path / "metrics.jsonl")
    with limit, pytest.raises(OSError, match="could not be written"):
        log.resume(2)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    JsonlLogger(tmp_path).close()  # And what was begun is cleared away.
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_one_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for kind in (JsonlLogger, TextLog):
        with pytest.raises(
            OSError, match=r"could not be written \(.*\); free some space or choose"
        ):
            kind(tmp_path / "file" / "run")


def test_a_full_disk_is_one_warning_of_the_text_log_which_goes_on_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = TextLog(tmp_path)

    class Handler(logging.Handler):
        """Write messages into the log, as the command line does."""

        def emit(self, record: logging.LogRecord) -> None:
            text.write(self.format(record))

    text.write("before")
    handler = Handler()
    logging.getLogger("trainer").addHandler(handler)
    try:
        with full_disk(10, tmp_path / "train.log"):
            text.write("lost")
            text.write("lost, too")
    finally:
        logging.getLogger("trainer").removeHandler(handler)
    text.write("after")
    text.close()
    text.write("closed")
    written = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in written] == ["before", "after"]
    (warning,) = caplog.messages
    assert str(tmp_path / "train.log") in warning
    assert "free some space" in warning


def test_the_files_of_a_closed_log_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        log, text = JsonlLogger(tmp_path), TextLog(tmp_path)
        log.scalars("step", {}, 1)
        log.resume(0)
        log.close()
        text.close()
    assert (len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0) == before


# --- TensorBoard ----------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x80" * width) * height)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def accumulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # Its files are read in the order of their names, which tell the second they were opened in.
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))

    def read(folder: Path) -> Any:
        read = module.EventAccumulator(str(folder / "tensorboard"))
        read.Reload()
        return read

    return read


def test_tensorboard_gets_every_number_and_a_resumed_run_purges(
    tmp_path: Path, accumulator: Any
) -> None:
    log = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        optimizers = {"main": {"lr": 0.1, "norm": None, "norms": [1.0, 2.0]}}
        record = {"step": step, "loss": 1.0 / step, "lost": math.nan, "optimizers": optimizers}
        log.scalars("step", record, step)
    log.scalars("stage", {"stage": "valid", "step": 3, "epoch": 1, "wer": 12.5}, 3)
    log.close()
    log.close()
    log = TensorBoardLogger(tmp_path)
    log.resume(1)
    log.scalars("step", {"loss": 7.0}, 2)
    log.close()
    read = accumulator(tmp_path)
    assert set(read.Tags()["scalars"]) == {
        "train_step/loss",
        "train_step/optimizers.main.lr",
        "valid_stage/wer",
        "valid_stage/epoch",
    }
    losses = [(event.step, event.value) for event in read.Scalars("train_step/loss")]
    assert losses == [(1, 1.0), (2, 7.0)]
    assert read.Scalars("train_step/optimizers.main.lr")[0].value == pytest.approx(0.1)


def test_tensorboard_gets_distributions_pictures_sounds_and_texts(
    tmp_path: Path, accumulator: Any
) -> None:
    log = TensorBoardLogger(tmp_path)
    log.histogram("weights", torch.tensor([1.0, math.inf, 3.0, math.nan]), 5)
    log.histogram("nothing", torch.tensor([math.nan]), 5)
    log.figure("attention", png(3, 2), 6)
    log.audio("speech", torch.tensor([0.0, 0.5, -2.0]), 16000, 7)
    log.text("transcript", "a word", 8)
    log.histogram("half", torch.ones(3, dtype=torch.bfloat16), 9)
    log.audio("half", torch.zeros(3, dtype=torch.bfloat16), 16000, 9)
    log.audio("silent", torch.zeros(0), 16000, 9)
    log.close()
    read = accumulator(tmp_path)
    assert read.Tags()["histograms"] == ["weights", "half"]
    assert read.Tags()["audio"] == ["speech", "half"]
    histogram = read.Histograms("weights")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (2, 1.0, 3.0)
    picture = read.Images("attention")[0]
    assert (picture.width, picture.height) == (3, 2)
    assert picture.encoded_image_string == png(3, 2)
    sound = read.Audio("speech")[0]
    assert (sound.step, sound.sample_rate, sound.length_frames) == (7, 16000, 3)
    assert struct.unpack("<3h", sound.encoded_audio_string[-6:]) == (0, 16383, -32767)
    assert read.Tags()["tensors"] == ["transcript/text_summary"]


def test_tensorboard_that_is_missing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard was asked for and is not installed; pip"):
        TensorBoardLogger(tmp_path)
    loggers, brain = callback(tmp_path, tensorboard=True)
    with pytest.raises(ValueError, match="tensorboard was asked for and is not installed; pip"):
        loggers.on_fit_start(brain)  # At the start of a run, not after days of training.


# --- the callback ---------------------------------------------------------------------------------


def callback(folder: Path | None, *factories: Any, **options: Any) -> tuple[LoggerCallback, Any]:
    """A callback, and a Brain as far as it needs one."""
    run = RunOptions(output_folder=None if folder is None else str(folder), **options)
    updates = {"main": SimpleNamespace(lr=0.001), "other": SimpleNamespace(lr=0.25)}
    brain: Any = SimpleNamespace(options=run, updates=updates, step=0, progress=Progress())
    usual = [JsonlLogger, TensorBoardLogger] if run.tensorboard else [JsonlLogger]
    return LoggerCallback(run, factories or usual), brain


class Memory(Logger):
    """Keeps the names of the methods that were called; some raise."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise RuntimeError("no network")

    def scalars(self, kind: str, values: Any, step: int) -> None:
        self._note(f"{kind} {step}")

    def histogram(self, name: str, values: Any, step: int) -> None:
        self._note("histogram")

    def figure(self, name: str, png: bytes, step: int) -> None:
        self._note("figure")

    def audio(self, name: str, samples: Any, rate: int, step: int) -> None:
        self._note("audio")

    def text(self, name: str, text: str, step: int) -> None:
        self._note("text")

    def artifact(self, name: str, path: Path) -> None:
        self._note("artifact")

    def resume(self, step: int) -> None:
        self._note(f"resume {step}")

    def close(self) -> None:
        self._note("close")


def stage(name: str = "valid", step: int = 4, **changes: Any) -> StageReport:
    return StageReport(name, 1, 0.5, {"wer": 3.21}, step, **changes)


def test_a_run_records_its_steps_and_stages_and_a_test_after_it(tmp_path: Path) -> None:
    loggers, brain = callback(tmp_path)
    loggers.on_fit_start(brain)
    loggers.on_log(brain, {"step": 2, "epoch": 1, "stage": "train", "loss": math.nan})
    loggers.on_fit_start(brain)  # A fit within a hook of the fit.
    loggers.on_log(brain, {"step": 3, "loss": 1.0})
    loggers.on_fit_end(brain)
    loggers.scalars("monitor", {"layers": {"net": {"grad": 1.5}}}, 4)
    loggers.on_stage_end(brain, stage())
    loggers.on_fit_end(brain)
    loggers.on_evaluate_start(brain)
    loggers.on_stage_end(brain, StageReport("test", None, 0.25, step=4))
    loggers.on_evaluate_end(brain)
    assert lines(tmp_path) == [
        {"kind": "step", "step": 2, "epoch": 1, "stage": "train", "loss": None},
        {"kind": "step", "step": 3, "loss": 1.0},
        {"kind": "monitor", "step": 4, "layers": {"net": {"grad": 1.5}}},
        stage().record(),
        StageReport("test", None, 0.25, step=4).record(),
    ]


def test_loggers_are_open_until_the_outermost_call_ends(tmp_path: Path) -> None:
    memory = Memory()
    loggers, brain = callback(tmp_path, lambda folder: memory)
    loggers.on_fit_start(brain)
    loggers.on_evaluate_start(brain)
    loggers.on_stage_end(brain, stage())
    loggers.on_evaluate_end(brain)
    assert memory.calls == ["stage 4"]
    loggers.on_fit_end(brain)
    assert memory.calls == ["stage 4", "close"]
    loggers.on_evaluate_start(brain)
    loggers.on_stage_end(brain, stage("test"))
    loggers.on_evaluate_end(brain)
    assert memory.calls[2:] == ["stage 4", "close"]
    loggers.on_fit_start(brain)
    loggers.scalars("step", {}, 5)
    loggers.on_exception(brain, RuntimeError())  # The fit has not begun: its end is not told.
    loggers.on_evaluate_start(brain)
    loggers.scalars("step", {}, 6)
    loggers.on_evaluate_end(brain)
    assert memory.calls[4:] == ["step 5", "close", "step 6", "close"]


def test_every_kind_of_record_reaches_every_logger(tmp_path: Path) -> None:
    first, second = Memory(), Memory()
    loggers, brain = callback(tmp_path, lambda folder: first, JsonlLogger, lambda folder: second)
    assert loggers.wants_histograms
    loggers.scalars("monitor", {"step": 1}, 1)
    loggers.histogram("w", torch.ones(3), 1)
    loggers.figure("f", b"", 1)
    loggers.audio("a", torch.ones(3), 16000, 1)
    loggers.text("t", "text", 1)
    loggers.artifact("report", tmp_path / "report.html")
    brain.progress.optimizer_step = 1
    loggers.on_resume(brain)
    loggers.close()
    expected = [
        "monitor 1",
        "histogram",
        "figure",
        "audio",
        "text",
        "artifact",
        "resume 1",
        "close",
    ]
    assert first.calls == second.calls == expected
    assert [line["kind"] for line in lines(tmp_path)] == ["monitor"]
    alone, _ = callback(tmp_path)
    assert not alone.wants_histograms
    alone.close()


@pytest.mark.parametrize("failing", ["step 1", "histogram", "resume 3", "close", "open"])
def test_a_logger_that_fails_is_named_once_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    memory, made = Memory(failing), []

    def make(folder: Path) -> Logger:
        made.append(folder)
        if failing == "open":
            raise ConnectionError("no network")
        return memory

    loggers, brain = callback(tmp_path, make, JsonlLogger)
    for _ in range(2):
        loggers.on_fit_start(brain)
        loggers.on_log(brain, {"step": 1})
        loggers.histogram("w", torch.ones(3), 1)
        brain.progress.optimizer_step = 3
        loggers.on_resume(brain)
        loggers.on_fit_end(brain)
    assert made == [tmp_path]
    assert memory.calls.count(failing) == (failing != "open")
    assert not memory.calls or memory.calls[-1] == failing
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    name = "make" if failing == "open" else "Memory"
    assert re.search(
        rf"{name} failed and is not used.*the run goes on.*no network", warning.message
    )
    assert len(lines(tmp_path)) == 2


def test_a_full_disk_ends_no_run_and_the_warning_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    loggers, brain = callback(tmp_path, JsonlLogger, lambda folder: memory)
    loggers.on_fit_start(brain)
    loggers.on_log(brain, {"step": 1})
    with full_disk(10, tmp_path / "metrics.jsonl"):
        loggers.on_log(brain, {"step": 2})
    loggers.on_log(brain, {"step": 3})
    assert loggers.state_dict() == {"jsonl_lines": None}
    loggers.on_fit_end(brain)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert memory.calls == ["step 1", "step 2", "step 3", "close"]
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "JsonlLogger failed and is not used any more" in warning.message
    assert str(tmp_path / "metrics.jsonl") in warning.message
    assert "free some space or choose another output_folder" in warning.message


def test_a_resumed_run_has_every_record_once(tmp_path: Path) -> None:
    loggers, brain = callback(tmp_path)
    loggers.on_fit_start(brain)
    for step in (1, 2):
        loggers.on_log(brain, {"step": step})
    saved = json.loads(json.dumps(loggers.state_dict()))
    loggers.on_stage_end(brain, stage(step=2))
    loggers.on_log(brain, {"step": 3})
    loggers.on_fit_end(brain)
    assert saved == {"jsonl_lines": 2}
    again, brain = callback(tmp_path)
    again.load_state_dict(saved)
    again.on_fit_start(brain)
    again.on_log(brain, {"step": 1})  # By a hook that runs once more.
    assert len(lines(tmp_path)) == 5
    brain.progress.optimizer_step = 2
    again.on_resume(brain)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    again.on_fit_end(brain)
    old, brain = callback(tmp_path)
    old.load_state_dict({"jsonl_lines": None})
    brain.progress.optimizer_step = 1
    old.on_resume(brain)
    old.close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_restart_without_a_checkpoint_has_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: int
) -> None:
    options = {"output_folder": str(tmp_path), "log_interval": 1}
    make(**options).fit([1], batches(3))
    before = lines(tmp_path)
    monkeypatch.setattr(distributed, "restarts", lambda: restarts)
    make(**options).fit([1], batches(3))
    steps = [line["step"] for line in lines(tmp_path)]
    # A user who starts anew keeps the records of before; torchrun's restart takes their place.
    assert steps == [line["step"] for line in before] * (1 if restarts else 2)


@pytest.mark.parametrize("why", ["folder", "rank", "debug", "replay", "find_clip"])
def test_without_a_folder_and_off_the_main_rank_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = None if why == "folder" else tmp_path / "run"
    given = {"debug": True, "replay": "somewhere", "find_clip": True}
    options = {why: given[why]} if why in given else {}
    if why == "rank":
        monkeypatch.setattr(distributed, "is_main", lambda: False)
    loggers, brain = callback(folder, tensorboard=True, **options)
    loggers.on_fit_start(brain)
    loggers.on_log(brain, {"step": 1})
    loggers.on_stage_end(brain, stage())
    brain.progress.optimizer_step = 0
    loggers.on_resume(brain)
    assert loggers.state_dict() == {"jsonl_lines": None}
    assert not loggers.wants_histograms
    loggers.on_fit_end(brain)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_stage_has_a_line_for_people_with_or_without_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, with_folder: bool
) -> None:
    caplog.set_level(logging.INFO)
    loggers, brain = callback(tmp_path if with_folder else None)
    loggers.on_stage_end(brain, stage(seconds=12.3))
    loggers.on_stage_end(brain, stage("train", skipped=2))
    assert caplog.messages == [
        "epoch 1 valid: loss 0.5, wer 3.21, 12 s",
        "epoch 1 train: loss 0.5, wer 3.21, skipped 2, 0 s, lr 0.001 0.25",
    ]


def test_the_line_of_a_stage_names_the_losses_of_several_players() -> None:
    report = StageReport("test", None, {"g": 1.23456, "d": None}, {"files": 3}, seconds=61.0)
    assert describe(report) == "test: loss g 1.235, d None, files 3, 61 s"


def test_the_line_of_a_stage_without_losses_names_none() -> None:
    metrics = {"eer": 12.5}
    assert describe(StageReport("test", None, math.nan, metrics)) == "test: eer 12.5, 0 s"
    lost = StageReport("test", None, math.nan, metrics, examples=3)
    assert describe(lost) == "test: loss nan, eer 12.5, 0 s"


def test_a_metric_that_would_hide_a_count_ends_the_run_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    loggers, brain = callback(tmp_path)
    with pytest.raises(ValueError, match="returned a metric named 'examples'"):
        loggers.on_stage_end(brain, StageReport("valid", 1, 0.5, {"examples": 1}))


# --- the progress bar -----------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The bars that were made."""
    from trainer.loggers import progress_bar

    bars: list[Any] = []

    class Bar(progress_bar.tqdm):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            bars.append(self)
            self.options = options
            super().__init__(**options)

    monkeypatch.setattr(progress_bar, "tqdm", Bar)
    yield bars
    for bar in bars:
        bar.close()


def test_a_bar_counts_the_batches_of_a_stage_from_where_it_resumed(
    terminal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    brain = make()
    brain.progress.step = 7
    bars = ProgressBar()
    bars.on_fit_start(brain)
    bars.on_stage_start(brain, Stage.TRAIN, 2, 10)
    bars.on_fit_start(brain)  # In a hook.
    bars.on_stage_start(brain, Stage.VALID, 2, None)
    bars.on_batch_end(brain, Stage.VALID, torch.tensor(1.0))
    bars.on_stage_end(brain, stage())
    bars.on_fit_end(brain)
    bars.on_evaluate_start(brain)
    bars.on_stage_start(brain, Stage.TEST, None, 3)
    bars.on_evaluate_end(brain)  # It failed, which the hook caught.
    for _ in range(2):
        bars.on_batch_end(brain, Stage.TRAIN, StepReport("main", "stepped", loss=0.123456))
    training, validation, test = terminal
    assert (training.desc, training.total, training.n) == ("epoch 2 train", 10, 9)
    assert (validation.desc, validation.total, validation.n) == ("epoch 2 valid", None, 1)
    assert (test.desc, test.total, test.n) == ("test", 3, 0)
    assert (validation.disable, test.disable, training.disable) == (True, True, False)
    bars.on_exception(brain, RuntimeError())
    assert training.disable


class Skipping(Regressor):
    """Has a loss that is not finite for the second batch of an epoch."""

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * math.nan if self.step == 2 else loss


FIGURES = (
    r"step (\d), loss ([\d.]+), norm [\d.]+, lr 0.1, [\d.e+]+ items/s(, 1 skipped)?"  # of a step
)


def test_a_bar_shows_the_figures_of_the_training(
    terminal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    brain = make(Skipping, progressbar=True, optimizer=partial(torch.optim.SGD, lr=0.1))
    seen: list[str] = []

    class Watch(Callback):
        def on_stage_start(self, brain: Any, stage: Any, epoch: Any, total: Any) -> None:
            terminal[-1].mininterval = 0.0

        def on_batch_end(self, brain: Any, stage: Any, loss: Any) -> None:
            seen.append(str(terminal[-1]))

    brain.callbacks.append(Watch())
    brain.fit([1], batches(3), batches(1))
    found = [re.search(FIGURES, each) for each in seen]
    assert [m and (m[1], m[3]) for m in found] == [
        ("1", None), ("1", ", 1 skipped"), ("2", ", 1 skipped"), None,
    ]  # fmt: skip
    assert re.match(r"epoch 1 train 3/3 \|.*\| 00:00 left, step 2, loss", seen[2])


def test_a_bar_shows_several_losses_once_they_are_logged(terminal: list[Any]) -> None:
    brain = make(Players, log_interval=1, progressbar=True)
    bars = ProgressBar()
    bars.on_stage_start(brain, Stage.TRAIN, 1, 10)
    bars.on_log(brain, {"loss": {"d": 0.51234, "g": None}, "examples_per_second": 102.3})
    assert bars.figures(brain) == "step 0, loss d 0.5123, 102.3 items/s"


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_where_there_is_no_terminal_a_line_is_printed_once_a_minute(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer.loggers import progress_bar

    monkeypatch.setattr(progress_bar, "LINE_SECONDS", seconds)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    sgd = partial(torch.optim.SGD, lr=0.1)
    make(Skipping, progressbar=True, optimizer=sgd).fit([1], batches(3), iter(batches(1)))
    lines = [each for each in capfd.readouterr().err.splitlines() if re.match(r".* \d/", each)]
    if seconds:
        assert lines == []
    else:
        train, valid = lines[:3], lines[3:]
        for number, line in enumerate(train, 1):
            assert re.fullmatch(rf"epoch 1 train {number}/3, 00:0\d left, {FIGURES}", line), line
        assert valid == ["epoch 1 valid 1/?"]


@pytest.mark.parametrize("source", [list, iter])  # An iterator has no length.
@pytest.mark.parametrize(
    ("limit", "ends"), [(1, [2]), (3, [6]), (4, [7]), (5, [7, 2]), (None, [7, 7])]
)
def test_a_bar_ends_where_the_limit_of_steps_ends_the_training(
    terminal: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    ends: list[int],
    source: Any,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    brain = make(progressbar=True, optimizer_step_limit=limit, grad_accumulation_factor=2)
    epochs = len(ends) if source is list else 1
    brain.fit(range(epochs), source(batches(7)))
    steps = limit and limit * 2  # of the first epoch, if it were that long
    totals = ends if source is list else [steps]
    assert [bar.total for bar in terminal] == totals
    if steps is None or steps <= 7:
        assert [bar.n for bar in terminal] == ends[:epochs]


def test_colours_are_left_out_where_they_are_not_wanted(
    terminal: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    ProgressBar().on_stage_start(make(), Stage.TRAIN, 1, 10)
    assert terminal[0].options["colour"] is None  # whatever TQDM_COLOUR says


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_bar_of_its_own_or_lines_and_no_warning(
    widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import auto, notebook

    class Bar(notebook.tqdm_notebook):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            self.disable, self.total = False, options["total"]

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    if widgets:
        monkeypatch.setattr(auto, "tqdm", Bar)
    bars = ProgressBar()
    bars.on_stage_start(make(), Stage.VALID, 1, 10)
    assert (type(bars.current) is Bar) == widgets
    bars.on_stage_end(make(), stage())


def test_a_training_begins_with_five_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer")
    brain = make(Players, grad_accumulation_factor=2, output_folder=None)
    next(brain.modules.parameters()).requires_grad_(False)
    brain.fit([1, 2], batches(4), batches(1))
    lines = [each.getMessage() for each in caplog.records][:5]
    sizes = {
        name: sum(p.numel() for p in each.parameters()) for name, each in brain.modules.items()
    }
    assert lines[0] == "device: cpu, precision fp32"
    assert lines[2:] == [
        "ranks: 1", "epoch: 4 batches, an optimizer step every 2", "run folder: none",
    ]  # fmt: skip
    total, frozen = sum(sizes.values()), next(brain.modules.parameters()).numel()
    assert lines[1].startswith(f"trainable: {total - frozen:,} of {total:,} parameters (")
    assert all(f"{name} " in lines[1] for name in sizes)
    assert sum(each.getMessage().startswith("device: ") for each in caplog.records) == 1


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_hidden_off_the_main_rank_and_where_it_is_not_wanted(
    terminal: list[Any], monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: not shown)
    brain = make()
    bars = ProgressBar()
    bars.progressbar_shown = shown
    bars.on_stage_start(brain, Stage.TRAIN, 1, 10)
    bars.on_batch_end(brain, Stage.TRAIN, None)
    assert terminal[0].disable
    bars.on_stage_end(brain, stage())


@pytest.mark.parametrize("shown", [True, False])
def test_a_program_without_logging_sees_the_line_of_each_stage(
    capsys: pytest.CaptureFixture[str], shown: bool
) -> None:
    brain = make(progressbar=shown)
    brain.fit([1], batches(2), batches(2))
    lines = re.findall(r"epoch 1 \w+: loss [\d.]+", capsys.readouterr().err)
    assert len(lines) == (2 if shown else 0)
