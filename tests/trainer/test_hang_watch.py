"""A rank that hangs ends the run, and is named with the place where it stands."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    import trainer
    from trainer import Brain, Stage, distributed

    KIND, FOLDER = sys.argv[1], Path(sys.argv[2])

    def stand_still():
        (FOLDER / "stands").touch()
        if KIND == "sleep":
            time.sleep(600)
        elif KIND == "loop":
            while True: pass
        elif KIND == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)

    class Upload(trainer.Callback):
        def on_checkpoint(self, brain, checkpoint):
            if KIND == "upload" and distributed.is_main():
                time.sleep(4)

    class Net(Brain):
        def compute_forward(self, batch, stage):
            if stage is Stage.TRAIN and self.step == 3 and distributed.rank() == 1:
                stand_still()
            if stage is Stage.VALID and KIND == "evaluation" and distributed.rank() == 1:
                time.sleep(4)
            if self.step == 2 and KIND == "work":
                distributed.run_on_main(lambda: time.sleep(4))
            return self.modules.net(batch)

        def compute_objectives(self, predictions, batch, stage):
            return predictions.square().mean()

    def train(run):
        brain = Net(
            {"net": torch.nn.Linear(2, 1)}, torch.optim.SGD, run.hparams, run.options,
            run.checkpointer, [Upload()],
        )
        data = [torch.ones(3, 2)] * 16
        brain.fit([1], data, data[:2])
        (FOLDER / f"ended-{distributed.rank()}").touch()

    options = {"hang_timeout": 1.5, "progressbar": False, "checkpoint_every_steps": 6}
    trainer.launch(train, options, FOLDER / "run")
"""


PLACES = {"sleep": "    time.sleep(600)", "loop": "    while True: pass"}


def start(folder: Path, kind: str) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, str(script), kind, str(folder)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=90)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["sleep", "loop", "stopped"])
def test_a_rank_that_hangs_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    process = start(tmp_path, kind)
    if kind == "stopped":  # torchrun waits for a process that is stopped until it goes on.
        while process.poll() is None and not (tmp_path / "stands").exists():
            time.sleep(0.1)
    output = finish(process)
    assert process.returncode == 1
    assert "no progress for 1.5 s (hang_timeout): rank 1 at " in output
    if kind != "stopped":  # That one stands where it did when it could still say so.
        line = textwrap.dedent(SCRIPT).splitlines().index(f"    {PLACES[kind]}") + 1
        assert f"program.py:{line} in stand_still" in output
    assert "stands still. All ranks end" in output
    log = (tmp_path / "run" / "train.log").read_text()
    assert "hang_timeout): rank 1 at " in log


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["evaluation", "work", "upload"])
def test_work_that_may_take_long_does_not_count(tmp_path: Path, kind: str) -> None:
    process = start(tmp_path, kind)
    output = finish(process)
    assert process.returncode == 0, output
    assert (tmp_path / "ended-0").exists()
    assert (tmp_path / "ended-1").exists()
