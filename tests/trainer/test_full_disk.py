"""A disk that takes no more costs a run what cannot be written, and ends it only where it must."""

import errno
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import Brain, Stage, distributed
from trainer.checkpoint import Checkpointer, storage

from ..processes import TwoRanks

ROOT = Path(__file__).parents[2]
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Disk:
    """The disk of the checkpoints: the saves whose numbers are in `failing` it does not take."""

    def __init__(self, failing: Any, error: int = errno.ENOSPC) -> None:
        self.failing, self.error, self.saves = failing, error, 0
        self._make, self._put = storage.make_temporary, storage.HashingFile._put

    def __enter__(self) -> "Disk":
        def make(path: Path) -> str:
            self.saves += 1
            return self._make(path)

        def put(file: Any, data: Any) -> None:
            if self.saves in self.failing:
                raise OSError(self.error, os.strerror(self.error))
            self._put(file, data)

        storage.make_temporary, storage.HashingFile._put = make, put  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        storage.make_temporary = self._make
        storage.HashingFile._put = self._put  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Line(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return (predictions - batch["x"].sum(1, keepdim=True)).square().mean()

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        return {"error": 1.0 / (epoch or 1)}


def batches() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [{"x": torch.randn(2, 3)} for _ in range(8)]


def make(folder: Path, **options: Any) -> tuple[Line, Checkpointer]:
    torch.manual_seed(0)
    keeper = Checkpointer(folder, keep_best={"error": "min"})
    brain = Line(
        {"net": torch.nn.Linear(3, 1)},
        lambda params: torch.optim.SGD(params, lr=0.1),
        run_opts={"device": "cpu", "progressbar": False, **options},
        checkpointer=keeper,
    )
    return brain, keeper


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines of level error."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer").addHandler(handler)
    yield found
    logging.getLogger("trainer").removeHandler(handler)


@pytest.mark.parametrize("error", ERRORS)
def test_a_periodic_save_that_fails_is_a_line_and_is_tried_again_at_the_next(
    tmp_path: Path, errors: list[str], error: int
) -> None:
    plain, _ = make(tmp_path / "plain")
    plain.fit(range(1, 3), batches())
    brain, keeper = make(tmp_path / "checkpoints", checkpoint_every_steps=3)
    # Saves 1 and 2 are within the first epoch, 3 is at its end, 4 and 5 are within the second.
    with Disk({1, 2, 4}, error) as disk:
        brain.fit(range(1, 3), batches())
    assert disk.saves == 6
    assert len(errors) == 3
    for line, step in zip(errors, (3, 6, 11), strict=True):
        assert f"{tmp_path}/checkpoints/step-{step:08d} could not be saved" in line
        assert "bytes" in line
        assert "free" in line
        assert os.strerror(error) in line
        assert "The run goes on and tries again at its next save" in line
    newest = keeper.find()[0]
    assert (newest.step, newest.end_of_epoch) == (16, True)
    assert torch.equal(plain.modules.net.weight, brain.modules.net.weight)
    assert temporaries(keeper.folder) == []


@pytest.mark.parametrize("error", ERRORS)
def test_three_in_a_row_end_the_run_and_the_checkpoint_before_stays(
    tmp_path: Path, errors: list[str], error: int
) -> None:
    brain, _ = make(tmp_path, checkpoint_every_steps=1)
    with (
        Disk({2, 3, 4}, error) as disk,
        pytest.raises(
            OSError, match=r"step-0{7}4 could not be saved: .* needs \d+ bytes"
        ) as caught,
    ):
        brain.fit(range(1, 3), batches())
    assert caught.value.errno == error
    assert "free some space or choose another folder" in str(caught.value)
    assert disk.saves == 4
    assert len(errors) == 2
    assert [each.step for each in Checkpointer(tmp_path).find(n=None)] == [1]
    assert temporaries(tmp_path) == []
    again, _ = make(tmp_path)
    again.fit(range(1, 3), batches())
    plain, _ = make(tmp_path / "plain")
    plain.fit(range(1, 3), batches())
    assert torch.equal(plain.modules.net.weight, again.modules.net.weight)


def test_the_last_save_of_a_run_is_tried_twice(tmp_path: Path, errors: list[str]) -> None:
    brain, keeper = make(tmp_path)
    with Disk({2}):
        brain.fit(range(1, 3), batches())
    assert len(errors) == 1
    newest = keeper.find()[0]
    assert (newest.step, newest.meta["error"], newest.end_of_epoch) == (16, 0.5, True)
    assert [each.step for each in keeper.find(n=None)] == [16]  # The rules held for it, too.


def test_the_last_save_of_a_run_ends_it_where_it_fails(tmp_path: Path) -> None:
    brain, keeper = make(tmp_path)
    with Disk({2, 3}), pytest.raises(OSError, match=r"step-0{6}16 could not be saved"):
        brain.fit(range(1, 3), batches())
    assert [each.step for each in keeper.find(n=None)] == [8]


class Bad:
    def state_dict(self) -> dict[str, Any]:
        return {"x": object()}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_an_error_that_is_no_disks_ends_the_run_at_once(tmp_path: Path) -> None:
    brain, _ = make(tmp_path, checkpoint_every_steps=1)
    brain.bad = Bad()
    with pytest.raises(ValueError, match="a checkpoint cannot hold"):
        brain.fit(range(1, 3), batches())


def _on_two(folder: Path, failing: tuple[int, ...], whose: int) -> list[Any]:
    """Train on this rank of two, of which one has a disk that fails; return how it ended."""
    os.fsync = lambda handle: None
    brain, keeper = make(folder, checkpoint_every_steps=1)
    put, saves = storage.HashingFile._put, [0]
    write = Checkpointer._write_states

    def counting(self: Checkpointer, place: Path) -> Any:
        saves[0] += 1
        return write(self, place)

    def failing_put(file: Any, data: Any) -> None:
        if saves[0] in failing and distributed.rank() == whose:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        put(file, data)

    Checkpointer._write_states = counting  # type: ignore[method-assign]
    storage.HashingFile._put = failing_put  # type: ignore[method-assign]
    try:
        brain.fit(range(1, 2), batches())
        end = "well"
    except OSError as error:
        end = f"OSError: {error}"
    finally:
        Checkpointer._write_states = write  # type: ignore[method-assign]
        storage.HashingFile._put = put  # type: ignore[method-assign]
    return [end, brain.optimizer_step, [each.step for each in keeper.find(n=None)]]


@pytest.mark.parametrize("whose", [0, 1])
def test_two_ranks_go_on_and_end_as_one(two_ranks: TwoRanks, tmp_path: Path, whose: int) -> None:
    ends = two_ranks(_on_two, tmp_path / "on", (2, 3, 5), whose)  # The fifth is at the epoch's end.
    assert ends[0] == ends[1] == ["well", 4, [4, 4]]
    ends = two_ranks(_on_two, tmp_path / "end", (2, 3, 4), whose)
    for end, step, kept in ends:
        assert end.startswith("OSError: ")
        assert str(tmp_path / "end") in end
        assert "could not be saved" in end
        assert os.strerror(errno.EDQUOT) in end
        assert (step, kept) == (4, [1])


# The whole of a run

RECIPE = """
import os, resource, torch, trainer
from trainer import Brain, Stage

class Net(Brain):
    def compute_forward(self, batch, stage): return self.modules.net(batch["x"])
    def compute_objectives(self, predictions, batch, stage): return predictions.square().mean()
    def on_stage_end(self, stage, loss, epoch=None):
        if "LIMIT" in os.environ:
            limit = int(os.environ["LIMIT"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return {"loss": loss}

def train(run):
    h = run.hparams
    batches = [{"x": torch.randn(2, 64)} for _ in range(40)]
    brain = Net({"net": h["net"]}, h["opt"], h, run.options, run.checkpointer)
    brain.fit(range(1, 9), batches)
    return brain.test_metrics or {"done": 1}

if __name__ == "__main__":
    trainer.main(train)
"""
SETTINGS = """
seed: 1
net: !new:torch.nn.Linear [64, 64]
opt: !name:torch.optim.SGD {lr: 0.1}
log_interval: 1
"""


def run(folder: Path, **where: Any) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(RECIPE)
    (folder / "toy.yaml").write_text(textwrap.dedent(SETTINGS))
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **where}
    limits = settings.pop("limits", {})
    return subprocess.run(
        [sys.executable, "train.py", "toy.yaml", "--output_folder", str(folder / "run")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **limits},
        text=True,
        timeout=120,
        check=False,
        **settings,
    )


@pytest.mark.faults
def test_log_metrics_and_report_warn_once_and_end_no_run(tmp_path: Path) -> None:
    """A limit that checkpoints fit under, and the files that grow do not."""
    done = run(tmp_path, limits={"LIMIT": "30000"})
    assert done.returncode == 0, done.stderr
    assert "test: done=1" in done.stdout
    for name in ("JsonlLogger failed", "the report of the run is not up to date"):
        assert done.stderr.count(name) == 1, done.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes().endswith(b"\n")
    assert (tmp_path / "run/checkpoints/step-00000320/manifest.json").exists()


@pytest.mark.faults
def test_checkpoints_that_do_not_fit_end_the_run_with_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path, limits={"LIMIT": "10000"})
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "could not be saved" in line]
    assert len(errors) == 3
    assert all(line.startswith("error: the checkpoint ") for line in errors)
    assert "File too large" in errors[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.faults
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_output_to_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(tmp_path, stdout=full, stderr=full)
    assert (tmp_path / "run/checkpoints/step-00000320/manifest.json").exists()
    said = (tmp_path / "run/train.log").read_text()
    assert said.count("lacks text from here on") == 2
    assert "Traceback" not in said
    assert done.returncode in (0, 120)  # Python's own, where the end of the output is lost.
