"""The log is strict JSON by whole lines, whatever kills the run; resuming leaves no doubles."""

import errno
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.loggers.run_log import RunLog, as_json


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
    log = RunLog(folder)
    log.step(record | {"step": 1})
    log.stage(record | {"step": 2})
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
    log = RunLog(tmp_path)
    log.step({"step": 1, "worst": name})
    log.text(name)
    log.close()
    assert lines(tmp_path)[0]["worst"] == name
    assert "take-\\udcff.wav" in (tmp_path / "train.log").read_text()


def test_the_same_folder_again_goes_on_below(tmp_path: Path) -> None:
    for step in (1, 2):
        log = RunLog(tmp_path / "new" / "run")
        log.step({"step": step, "loss": 0.5})
        log.text(f"run {step}")
        log.close()
        log.close()
    assert [line["step"] for line in lines(tmp_path / "new" / "run")] == [1, 2]
    text = (tmp_path / "new" / "run" / "train.log").read_text()
    assert re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d run [12]\n){2}", text)


@pytest.mark.parametrize("length", [0, 1, 30, 70_000, 200_000])
def test_a_partial_last_line_is_cut_away(tmp_path: Path, length: int) -> None:
    log = RunLog(tmp_path)
    log.step({"step": 1, "note": "x" * 100_000})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "loss'[:length] + b"y" * max(0, length - 22))
    log = RunLog(tmp_path)
    log.step({"step": 2})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_file_that_is_one_partial_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "st' * 20_000)
    RunLog(tmp_path).close()
    assert lines(tmp_path) == []


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    endless = textwrap.dedent(
        """
        import itertools, sys
        from trainer.loggers.run_log import RunLog
        log = RunLog(sys.argv[1])
        for step in itertools.count():
            log.step({"step": step, "loss": 1.0 / (step + 1), "note": "x" * 3000})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", endless, str(tmp_path)])
    file = tmp_path / "metrics.jsonl"
    while not (file.exists() and file.stat().st_size > 100_000):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    RunLog(tmp_path).close()
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 30


@pytest.mark.parametrize("step", [-1, 0, 3, 10, 11])
def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path, step: int) -> None:
    log = RunLog(tmp_path)
    log.stage({"stage": "note"})  # without a step: of no particular time
    for n in range(1, 11):
        log.step({"step": n})
        if n % 5 == 0:
            log.stage({"stage": "valid", "step": n})
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    log.truncate(step)
    kept = [line.get("step", -1) for line in lines(tmp_path)]
    assert all(n <= step for n in kept if n > 0)
    assert len(kept) == 1 + sum(1 + (n % 5 == 0) for n in range(1, 11) if n <= step)
    log.step({"step": step + 1})
    log.close()
    assert lines(tmp_path)[-1]["step"] == step + 1
    assert len(lines(tmp_path)) == len(kept) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "train.log"]
    if step >= 10:  # nothing to forget, nothing rewritten
        assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_what_cannot_be_read_is_dropped_when_resuming(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\nnot json\n[1]\n\xff\xfe\n{"step": 2}\n')
    log = RunLog(tmp_path)
    log.truncate(2)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_full_disk_is_a_sentence_and_leaves_no_half_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.step({"step": 1})
    sentence = r"could not be written \(File too large\); free some space or choose another"
    limit = full_disk(10, tmp_path / "metrics.jsonl")
    with limit, pytest.raises(OSError, match=sentence) as caught:
        log.step({"step": 2, "loss": 0.125})
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    log.step({"step": 3})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_full_disk_while_resuming_keeps_the_old_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limit = full_disk(-len(before) + 10, tmp_path / "metrics.jsonl")
    with limit, pytest.raises(OSError, match="could not be written"):
        log.truncate(2)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    RunLog(tmp_path).close()  # and what was begun is cleared away
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "train.log"]


def test_a_folder_that_cannot_be_one_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written \(.*\); free some space or choose"):
        RunLog(tmp_path / "file" / "run")


@pytest.mark.parametrize("with_folder", [True, False])
def test_without_a_folder_and_off_the_main_rank_nothing_happens(
    tmp_path: Path, with_folder: bool
) -> None:
    folder = tmp_path / "run"
    log = RunLog(folder, tensorboard=True, main=False) if with_folder else RunLog(None)
    log.step({"step": 1})
    log.stage({"stage": "valid"})
    log.text("line")
    log.truncate(0)
    log.close()
    assert not folder.exists()


def test_tensorboard_gets_every_number_and_a_resumed_run_purges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # Its files are read in the order of their names, which tell the second they were opened in.
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    log = RunLog(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        log.step(
            {"step": step, "loss": 1.0 / step, "optimizers": {"main": {"lr": 0.1, "norm": None}}}
        )
    log.stage({"stage": "valid", "step": 3, "epoch": 1, "wer": 12.5})
    log.close()
    log = RunLog(tmp_path, tensorboard=True)
    log.truncate(1)
    log.step({"step": 2, "loss": 7.0})
    log.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    tags = {
        "train_step/loss",
        "train_step/optimizers.main.lr",
        "valid_stage/wer",
        "valid_stage/epoch",
    }
    assert set(read.Tags()["scalars"]) == tags
    losses = [(event.step, event.value) for event in read.Scalars("train_step/loss")]
    assert losses == [(1, 1.0), (2, 7.0)]
    assert read.Scalars("train_step/optimizers.main.lr")[0].value == pytest.approx(0.1)


def test_tensorboard_that_is_missing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard was asked for and is not installed; pip"):
        RunLog(tmp_path, tensorboard=True)


def test_the_files_of_a_closed_log_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        log = RunLog(tmp_path)
        log.step({"step": 1})
        log.truncate(0)
        log.close()
    assert (len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0) == before
