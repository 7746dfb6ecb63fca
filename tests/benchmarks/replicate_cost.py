"""Cost of a training step on several processes beside DistributedDataParallel's.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.replicate_cost
    OMP_NUM_THREADS=1 torchrun … -m tests.benchmarks.replicate_cost --peak ddp 10

Prints the time of a step, medians of alternating rounds in one launch, with a stack of linear
layers and AdamW. Both loops clip at 5.0, check that the norm is finite and read the loss. With
``--peak`` it prints by how much the memory of rank 0 grew in a few steps of one of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import Brain, Stage, distributed

WIDTHS = {1.5: 433, 10: 1118, 30: 1936}  # Of eight layers, by millions of parameters.
BATCH = 32


def make_net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(8)])


class Regression(Brain):
    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.net(batch)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return (predictions - batch).square().mean()


def ours(width: int) -> Callable[[Tensor, int], None]:
    """Return a function that trains on a batch some number of times."""
    brain = Regression(
        {"net": make_net(width)}, torch.optim.AdamW,
        run_opts={"device": "cpu", "progressbar": False},
    )  # fmt: skip

    def train(batch: Tensor, steps: int) -> None:
        brain.fit([1], [batch] * (steps * distributed.world_size()))

    return train


def bare(width: int, engine: str = "ddp") -> Callable[[Tensor, int], None]:
    """Return the same for a bare loop around DistributedDataParallel, or a sum after backward."""
    net = make_net(width)
    wrapped = nn.parallel.DistributedDataParallel(net) if engine == "ddp" else net
    optimizer = torch.optim.AdamW(net.parameters())

    def train(batch: Tensor, steps: int) -> None:
        for _ in range(steps):
            loss = (wrapped(batch) - batch).square().mean()
            loss.backward()
            if engine == "after":
                for p in net.parameters():
                    assert p.grad is not None
                    distributed.all_reduce_sum_(p.grad).div_(distributed.world_size())
            norm = nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return train


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("LOOP", "MILLIONS"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--millions", type=float, nargs="+", default=list(WIDTHS))
    parsed = parser.parse_args()
    distributed.start("cpu")
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(distributed.rank())
    if parsed.peak:
        name, width = parsed.peak[0], WIDTHS[float(parsed.peak[1])]
        batch, before = torch.randn(BATCH, width, generator=numbers), resident()
        (ours(width) if name == "ours" else bare(width, name))(batch, 6)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        if distributed.is_main():
            print(f"{name} {parsed.peak[1]} M: peak +{peak - before:.0f} MB")
        distributed.stop()
        return
    for millions in parsed.millions:
        width = WIDTHS[millions]
        steps = max(5, round(60 / millions))
        batch = torch.randn(BATCH, width, generator=numbers)
        loops = {"ddp": bare(width), "after": bare(width, "after"), "ours": ours(width)}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(parsed.rounds + 1):  # The first warms up.
            for name, train in loops.items():
                distributed.barrier()
                start = time.perf_counter()
                train(batch, steps)
                times[name].append((time.perf_counter() - start) / steps)
        medians = {name: statistics.median(each[1:]) for name, each in times.items()}
        if distributed.is_main():
            row = "  ".join(
                f"{name} x{seconds / medians['ddp']:.2f} ({1e3 * seconds:.1f} ms)"
                for name, seconds in medians.items()
            )
            print(f"{millions:4g} M parameters: {row}", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
