"""Cost of the layer monitor in a step of a model of ten million parameters.

    python tests/benchmarks/monitor_cost.py

Two Brains train a transformer encoder on one thread, one with a monitor record every 50 steps and
one with none. They take turns of 50 steps. Printed is the median ratio of a turn with a record to
its two neighbours without; the ratio of these two is the noise. Processor time is compared, since
on a busy machine the time of a clock says how busy that is.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainer

EVERY = 50


class Encoder(trainer.Brain):
    """Predicts the mean of frames."""

    def compute_forward(self, batch: Any, stage: trainer.Stage) -> Tensor:
        return self.modules.net(batch)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: trainer.Stage) -> Tensor:
        return (predictions.float() - batch.mean(1, keepdim=True)).square().mean()


def make_net() -> nn.Module:
    """Return a network of ten million parameters in 72 tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 4, 1408, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def make_brain(every: int, folder: Path) -> Encoder:
    """Return a Brain that writes what a run writes."""
    options = {
        "progressbar": False, "monitor_every": every, "output_folder": str(folder / str(every)),
        "precision": "bf16", "log_interval": 50,
    }  # fmt: skip
    return Encoder({"net": make_net()}, torch.optim.AdamW, {}, options)


def seconds(brain: Encoder, batches: list[Tensor]) -> float:
    """Return the processor time of an epoch, in seconds."""
    start = time.process_time()
    brain.fit([brain.epoch + 1], batches)
    return time.process_time() - start


def main(turns: int = 6) -> None:
    """Print the medians."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    batches = [torch.randn(4, 50, 384)] * EVERY
    with tempfile.TemporaryDirectory() as folder:
        off, on = make_brain(0, Path(folder)), make_brain(EVERY, Path(folder))
        size = sum(p.numel() for p in on.modules.parameters())
        off.fit([0], batches[:3])
        on.fit([0], batches[:3])
        ratios, noise, before = [], [], seconds(off, batches)
        for _ in range(turns):
            own, after = seconds(on, batches), seconds(off, batches)
            ratios.append(2 * own / (before + after))
            noise.append(after / before)
            print(f"x{ratios[-1]:.4f} (x{noise[-1]:.4f})", end=" ", flush=True)
            before = after
        log = (Path(folder) / str(EVERY) / "metrics.jsonl").read_text()
    assert log.count('"kind": "monitor"') >= turns
    print(
        f"\ntorch {torch.__version__}, one thread, {size / 1e6:.1f} M parameters, "
        f"{1e3 * before / EVERY:.0f} ms a step: a record every {EVERY} steps "
        f"x{statistics.median(ratios):.4f} (without x{statistics.median(noise):.4f})"
    )


if __name__ == "__main__":
    main()
