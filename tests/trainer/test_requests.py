"""A request to stop reaches every rank, also one whose data hang while the others wait for it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import alive

SCRIPT = """
    import os, sys, time
    from functools import partial
    from pathlib import Path
    import torch, trainer
    from trainer import Brain, distributed

    FOLDER, WORKERS = Path(sys.argv[1]), int(sys.argv[2])

    class Points(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            if index == 20:  # Of the sixth batch of rank 0.
                (FOLDER / "hangs").write_text(os.environ["RANK"])
                time.sleep(600)
            return torch.full((2,), float(index))

    class Line(Brain):
        def compute_forward(self, batch, stage):
            return self.modules.net(batch)

        def compute_objectives(self, predictions, batch, stage):
            return predictions.square().mean()

    def train(run):
        sgd = partial(torch.optim.SGD, lr=1e-4)
        net = torch.nn.Linear(2, 1)
        brain = Line({"net": net}, sgd, {}, run.options, run.checkpointer)
        (FOLDER / f"pid-{distributed.rank()}").write_text(str(os.getpid()))
        loader = {"batch_size": 2, "shuffle": False, "num_workers": WORKERS}
        brain.fit([1], Points(), train_loader_kwargs=loader)

    options = {"progressbar": False, "device": "cpu", "checkpoint_every_steps": 2}
    trainer.launch(train, options, FOLDER / "run")
"""


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_is_asked_to_stop_while_the_data_of_another_hang(
    tmp_path: Path, workers: int
) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [*command, "program.py", str(tmp_path), str(workers)], cwd=tmp_path, stdout=said,
            stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "hangs").exists(), 60)
        time.sleep(1.0)  # Rank 1 has trained up to where it waits for rank 0.
        pids = [int((tmp_path / f"pid-{each}").read_text()) for each in (0, 1)]
        os.kill(pids[1], signal.SIGTERM)
        wait_for(lambda: not any(map(alive, pids)), 10)
        process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (tmp_path / "said").read_text()
    assert (tmp_path / "hangs").read_text() == "0"
    assert "asked to stop (SIGTERM) while waiting for batch 5 of epoch 1" in text
    assert "(exitcode: 143)" in text
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
