"""What monitors cost: a step of a model of ten million parameters with them over one without.

    python tests/benchmarks/monitor_cost.py

A transformer encoder trains on one thread, with a look at its layers every 50 steps and with none.
Runs take turns, so that a noisy machine disturbs both alike, and the median of the ratios of
neighbours is printed; the ratio of two runs without monitors, beside it, is the noise.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

import trainer

STEPS, EVERY = 100, 50


class Encoder(trainer.Brain):
    """Tells frames what their mean is: work of the usual kind."""

    def compute_forward(self, batch: Any, stage: trainer.Stage) -> Tensor:
        return self.modules.net(batch)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: trainer.Stage) -> Tensor:
        return (predictions.float() - batch.mean(1, keepdim=True)).square().mean()


def make_net() -> nn.Module:
    """Ten million parameters in 72 tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 4, 1152, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def seconds(every: int) -> float:
    """A run of `STEPS` steps, its end and its log included."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 50, 384, generator=generator) for _ in range(4)] * (STEPS // 4)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "progressbar": False, "monitor_every": every, "output_folder": folder,
            "precision": "bf16", "log_interval": 50,
        }  # fmt: skip
        brain = Encoder({"net": make_net()}, torch.optim.AdamW, {}, options)
        brain.fit([0], batches[:4])
        start = time.perf_counter()
        brain.fit([1], batches)
        return time.perf_counter() - start


def main(turns: int = 7) -> None:
    """Print the medians."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    size = sum(p.numel() for p in make_net().parameters())
    seconds(EVERY)
    ratios, noise, steps = [], [], []
    for _ in range(turns):
        before, on, after = seconds(0), seconds(EVERY), seconds(0)
        ratios.append(2 * on / (before + after))
        noise.append(after / before)
        steps.append(before / STEPS)
        print(f"x{ratios[-1]:.4f} (x{noise[-1]:.4f})", end=" ", flush=True)
    print(
        f"\ntorch {torch.__version__}, one thread, {size / 1e6:.1f} M parameters, "
        f"{1e3 * statistics.median(steps):.0f} ms a step: a look every {EVERY} steps "
        f"x{statistics.median(ratios):.4f} (two runs without: x{statistics.median(noise):.4f})"
    )


if __name__ == "__main__":
    main()
