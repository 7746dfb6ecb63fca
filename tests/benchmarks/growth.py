"""Growth of a long run: memory, metrics, report, and the time to start it again when it is over.

    python tests/benchmarks/growth.py [STEPS [EPOCHS]]

Trains a tiny model and logs every step. What a run holds and writes must grow with its steps by
the lines of metrics.jsonl alone.
"""

import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import trainer
from trainer import Brain, Stage

STEPS, EPOCHS = 40_000, 20


class Line(Brain):
    """Fits a line, and notes the memory of the process at the end of each epoch."""

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return (predictions - batch["x"].sum(1, keepdim=True)).square().mean()

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        if stage is Stage.VALID:
            MEMORY.append(resident())
        return {"error": float(stage_loss)}


MEMORY: list[int] = []


def resident() -> int:
    """Return the memory that the process holds, in bytes."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this benchmark needs Linux")


def run(folder: Path, steps: int, epochs: int) -> float:
    """Train in a run folder, or start the run that is over again; return the seconds it took."""

    def train(run: trainer.Run) -> None:
        torch.manual_seed(0)
        batches = [{"x": torch.randn(4, 8)} for _ in range(steps // epochs)]
        brain = Line(
            {"net": torch.nn.Linear(8, 1)},
            lambda params: torch.optim.Adam(params, lr=1e-4),
            run.hparams,
            run.options,
            run.checkpointer,
        )
        brain.fit(range(1, epochs + 1), batches, batches[:10])

    options = {"log_interval": 1, "progressbar": False, "device": "cpu", "threads": 1}
    start = time.perf_counter()
    trainer.launch(train, options, folder)
    return time.perf_counter() - start


def main(folder: Path, steps: int, epochs: int) -> None:
    """Print what has grown, and by how much."""
    took = run(folder, steps, epochs)
    after_two, end = MEMORY[1], MEMORY[-1]
    size = (folder / "metrics.jsonl").stat().st_size
    again = run(folder, steps, epochs)
    print(f"{steps} logged steps in {epochs} epochs: {took:.0f} s")
    print(f"memory from the second epoch to the last: {(end - after_two) / 1e6:+.1f} MB")
    print(f"metrics.jsonl: {size / steps:.0f} bytes a step")
    print(f"report.html: {(folder / 'report.html').stat().st_size / 1000:.0f} kB")
    print(f"a start of the run that is over: {again:.1f} s, {again / took:.3f} of the training")


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary) / "run", *given, *(STEPS, EPOCHS)[len(given) :])
