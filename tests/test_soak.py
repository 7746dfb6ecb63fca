"""A run survives random faults; the soak that shows it finds what is wrong and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import soak

ROOT = Path(__file__).parents[1]
KINDS = 11  # Of the processes and of the data.


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip


def run(*arguments: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # Sockets need a shorter path than tmp_path.
        process = start(Path(folder), *arguments)
        try:
            out, error = process.communicate()
        finally:
            process.terminate()
            process.wait()
        assert os.listdir(folder) == []
    line = out.splitlines()[-1]
    assert process.returncode == 0, f"{line}\n{error[-5000:]}"
    assert re.fullmatch(
        r"soak: \d+ faults in \d+ s \(.*\), \d+ restarts, slowest return [\d.]+ s, end equal, "
        r"0 processes left", line,
    )  # fmt: skip
    counts = re.findall(
        r"([a-zA-Z ]+?) (\d+)[,)]", line[line.index("(") + 1 :].partition(")")[0] + ")"
    )
    assert len(counts) == KINDS
    assert all(int(count) > 0 for _, count in counts)


@pytest.mark.faults
def test_two_processes_survive_one_fault_of_each_kind() -> None:
    run("--minutes", "0.5", "--every", "0.5", "2", "--seed", "3")


@pytest.mark.long
def test_two_processes_survive_ten_minutes_of_random_faults() -> None:
    run("--minutes", "10", "--seed", "1")


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_soak_that_is_interrupted_leaves_no_process_and_no_folder(number: int, code: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), "--minutes", "1")
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("the ranks started in ")
            (made,) = Path(folder).glob("soak-*")
            assert len(soak.marked(made / "run")) >= 3  # The launcher and two ranks.
            process.send_signal(number)
            process.communicate(timeout=30)
        finally:
            process.terminate()
            process.wait()
        assert process.returncode == code
        assert soak.marked(made / "run") == set()
        assert os.listdir(folder) == []


def test_the_faults_of_an_epoch_depend_on_seed_and_epoch_alone() -> None:
    seen = {(seed, epoch): soak.data_faults(seed, epoch) for seed in (1, 2) for epoch in (1, 2)}
    assert all(sorted(each.values()) == sorted(soak.DATA_FAULTS) for each in seen.values())
    assert len({tuple(each) for each in seen.values()}) == 4
    assert seen[1, 2] == soak.data_faults(1, 2)


STATE: Any = {
    "modules": {"weight": torch.ones(2, 3)}, "optimizer": {"state": [{"step": torch.tensor(1.0)}]},
    "progress": {"epoch": 3, "seconds": 1.5}, "name": "a", "empty": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("modules", "weight"), torch.ones(2, 3).nextafter(torch.tensor(2.0))),
        (("modules", "weight"), torch.ones(2, 3, dtype=torch.float64)),
        (("modules", "weight"), torch.ones(3, 2)),
        (("modules",), {"weight": torch.ones(2, 3), "bias": torch.ones(1)}),
        (("optimizer", "state"), []),
        (("progress", "epoch"), 4),
        (("name",), None),
        (("empty",), [1]),
    ],
)
def test_a_difference_of_two_states_is_found_and_named(path: tuple[str, ...], value: Any) -> None:
    def changed(state: Any, path: tuple[str, ...]) -> Any:
        if not path:
            return value
        return {**state, path[0]: changed(state[path[0]], path[1:])}

    found = soak.difference(STATE, changed(STATE, path))
    assert found is not None
    assert found.startswith("." + ".".join(path))


def test_times_alone_may_differ() -> None:
    other = {**STATE, "progress": {"epoch": 3, "seconds": 2.5}}
    assert soak.difference(STATE, other) is None


def test_records_that_are_lost_doubled_or_changed_are_found() -> None:
    records = [{"kind": "step", "step": n, "loss": 1 / n, "seconds": 1.0} for n in (2, 4, 6)]
    soak.compare_records(records, [{**each, "seconds": 2.0} for each in records])
    for wrong in (
        records[:2], [*records, records[-1]], [], [*records[:2], {**records[2], "loss": 1.0}],
    ):  # fmt: skip
        with pytest.raises(soak.SoakFailed, match=r"metrics\.jsonl"):
            soak.compare_records(wrong, records)


def test_files_that_were_left_half_written_are_found(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    assert soak.leftovers(tmp_path) == []
    (tmp_path / "checkpoints" / ".saving-12@host-step-00000020").mkdir()
    assert soak.leftovers(tmp_path) == ["checkpoints/.saving-12@host-step-00000020"]


def test_memory_that_grows_is_found() -> None:
    warm = [500, 700, *[900] * 40]
    assert soak.growth(warm) == 0
    assert soak.growth([mb + 2 * n for n, mb in enumerate(warm)]) > 40


def test_processes_of_a_soak_are_found_by_their_mark(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, soak.MARK: str(tmp_path)}, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 10
        while soak.marked(tmp_path) != {process.pid} and time.monotonic() < end:
            time.sleep(0.01)  # It has the mark from its exec on.
        assert soak.marked(tmp_path) == {process.pid}
        assert soak.marked(tmp_path.parent) == set()
    finally:
        process.kill()
        process.wait()
    assert soak.marked(tmp_path) == set()
