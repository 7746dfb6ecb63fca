"""Cost of the replica check (weights, and a part of Adam's moments), at every hundredth batch.

    torchrun --nproc_per_node=2 tests/benchmarks/drift_cost.py

Steps and checks take turns, so that a busy machine slows both.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from trainer import Brain, RunOptions, Stage, distributed
from trainer.diagnostics.replica_check import ReplicaCheck

EVERY = RunOptions().drift_check_every
ROUNDS = 10


class Wide(Brain):
    """10 million parameters in 20 layers, on batches of 32."""

    def compute_forward(self, batch: torch.Tensor, stage: object) -> torch.Tensor:
        return self.modules.net(batch)

    def compute_objectives(
        self, predictions: torch.Tensor, batch: torch.Tensor, stage: object
    ) -> torch.Tensor:
        return predictions.square().mean()


def seconds(work: Callable[[], object]) -> float:
    """Return the duration of a call, in seconds."""
    distributed.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print the ratio of a check to a step."""
    torch.set_num_threads(1)
    distributed.start("cpu")
    net = nn.Sequential(*(nn.Linear(700, 700) for _ in range(20)))
    options = {"device": "cpu", "progressbar": False, "drift_check_every": 0}
    brain = Wide({"net": net}, torch.optim.Adam, run_opts=options)
    batch = torch.randn(32, 700)  # Batches of a list are dealt to the ranks in turn.
    brain.fit([1], [batch] * 2)
    check = ReplicaCheck(1)
    steps, checks = [], []
    for epoch in range(2, ROUNDS + 2):
        steps.append(seconds(lambda epoch=epoch: brain.fit([epoch], [batch] * 6)) / 3)
        checks.append(seconds(lambda: check.on_batch_end(brain, Stage.TRAIN, None)))
    if distributed.is_main():
        step, cost = sorted(steps)[ROUNDS // 2], sorted(checks)[ROUNDS // 2]
        count = sum(p.numel() for p in brain.modules.parameters())
        print(f"{count / 1e6:.1f} M parameters, {distributed.world_size()} processes")
        print(f"a check costs {cost / step:.2f} steps; every {EVERY} batches: "
              f"{100 * cost / step / EVERY:.3f} % of a step")  # fmt: skip
    distributed.stop()


if __name__ == "__main__":
    main()
