"""What measuring and clipping costs, beside torch's clip_grad_norm_ on the same gradients.

    python tests/benchmarks/clipping_cost.py

A million gradients in 1, 100 and 1,000 tensors of one shape, and in 100 of which no two have the
same. Both sides also read the norm, as any guard must. They take turns within one run, and the
ratio of their best CPU times is printed, so that a noisy machine disturbs neither. "clipped" is
with limits that always clip, "free" with limits that never do; "ms" is the best time of the former.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer import clipping
from trainer.clipping import Gradients

# How many tensors, and whether they have one shape.
TENSORS = {
    "1 tensor": (1, True),
    "100 tensors": (100, True),
    "1,000 tensors": (1000, True),
    "100 shapes": (100, False),
}
TOTAL = 1_000_000
# How each kind is made so that it always clips, and so that it never does.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "norm": (lambda: clipping.NormClip(1.0), lambda: clipping.NormClip(None)),
    "norm, p = 1": (lambda: clipping.NormClip(1.0, p=1), lambda: clipping.NormClip(None, p=1)),
    "norm, p = inf": (
        lambda: clipping.NormClip(1e-3, p=math.inf),
        lambda: clipping.NormClip(None, p=math.inf),
    ),
    "value": (lambda: clipping.ValueClip(1e-3), lambda: clipping.ValueClip(None)),
    "per layer": (lambda: clipping.LayerClip(1e-3), lambda: clipping.LayerClip(None)),
    "per name": (
        lambda: clipping.PatternClip({"*.weight": 1e-3}),
        lambda: clipping.PatternClip({"*.weight": 1e9}),
    ),
    "gradual": (
        lambda: clipping.GradualClip({0: 1.0, 1000: 0.5}),
        lambda: clipping.GradualClip({0: 1e9, 1000: 1e8}),
    ),
    "per layer, value": (
        lambda: clipping.MixedClip([clipping.LayerClip(1e-3), clipping.ValueClip(1e-6)]),
        lambda: clipping.MixedClip([clipping.LayerClip(1e9), clipping.ValueClip(1e9)]),
    ),
    "AutoClip": (lambda: clipping.AutoClip(0.0), lambda: clipping.AutoClip(100.0)),
    "median": (lambda: clipping.MedianClip(0.5), lambda: clipping.MedianClip(2.0)),
    "ZClip": (lambda: clipping.ZClip(max_norm=1.0), lambda: clipping.ZClip(z=1e6)),
    "AdaGC": (lambda: clipping.AdaGC(lambda_rel=0.9), lambda: clipping.AdaGC(lambda_abs=1e9)),
    "AGC": (lambda: clipping.AGC(1e-3), lambda: clipping.AGC(1e9)),
    "SPAM": (lambda: clipping.SPAM(1e-3, 0), lambda: clipping.SPAM(1e9, 0)),
}


class Bench:
    """Gradients of so many tensors, and an optimizer that has made a step with them."""

    def __init__(self, number: int, alike: bool) -> None:
        torch.manual_seed(0)
        rows = [max(TOTAL // number // 50, 1)] * number
        if not alike:
            rows = [row - number // 2 + place for place, row in enumerate(rows)]
        self.params = [nn.Parameter(torch.randn(row, 50)) for row in rows]
        self.saved = [torch.randn_like(p) for p in self.params]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.optimizer = torch.optim.Adam(self.params, lr=0.0)
        self.restore()
        self.optimizer.step()

    def restore(self) -> None:
        """The gradients as they were before they were clipped."""
        torch._foreach_copy_([p.grad for p in self.params if p.grad is not None], self.saved)

    def seconds(self, run: Callable[[], object]) -> float:
        """How long one call takes."""
        self.restore()
        start = time.process_time()
        run()
        return time.process_time() - start

    def plain(self, limit: float) -> Callable[[], float]:
        """torch's own."""
        return lambda: float(torch.nn.utils.clip_grad_norm_(self.params, limit))

    def ours(self, clip: Any) -> Callable[[], float]:
        """What a step does: measure, one transfer, clip."""
        names: dict[Tensor, str] = {p: f"layer{i}.weight" for i, p in enumerate(self.params)}
        clip.bind("main", names, self.optimizer)
        groups = self.optimizer.param_groups

        def run() -> float:
            gradients = Gradients(groups, clip)
            gradients.take(torch.cat(gradients.measure()).tolist())
            clip(gradients)
            return gradients.norm

        return run


def ratio(bench: Bench, clip: Any, limit: float, turns: int = 41) -> tuple[float, float]:
    """Our best time over torch's, and ours in milliseconds."""
    ours, plain = bench.ours(clip), bench.plain(limit)
    for _ in range(3):
        bench.seconds(plain)
        bench.seconds(ours)
    own, their = math.inf, math.inf
    for _ in range(turns):
        their = min(their, bench.seconds(plain))
        own = min(own, bench.seconds(ours))
    return own / their, 1e3 * own


def main() -> None:
    """Print a row for each kind."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {TOTAL:,} gradients in float32, best of turns")
    print(f"{'':18}" + "".join(f"{name:>28}" for name in TENSORS))
    print(f"{'':18}" + f"{'clipped':>12}{'free':>9}{'ms':>7}" * len(TENSORS))
    benches = [Bench(number, alike) for number, alike in TENSORS.values()]
    for name, (clips, free) in KINDS.items():
        cells = []
        for bench in benches:
            first, milliseconds = ratio(bench, clips(), 1.0)
            second = ratio(bench, free(), 1e9)[0]
            cells.append(f"{f'x{first:.2f}':>12}{f'x{second:.2f}':>9}{milliseconds:>7.2f}")
        print(f"{name:18}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
