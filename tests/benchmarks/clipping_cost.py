"""Cost of measuring and clipping relative to torch's clip_grad_norm_ on the same gradients.

    python tests/benchmarks/clipping_cost.py [kind …]

Gradients of a Conformer and of an MLP, and a million gradients in 1, 100 and 1,000 tensors of one
shape. Both sides also read the norm on the host, as any guard must. They take turns within one
run, and the ratio of their best CPU times is printed, so that a noisy machine disturbs neither.
"clipped" uses limits that always clip, "free" limits that never do; "ms" is the best time of the
former.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn

from trainer import clipping
from trainer.clipping import Gradients


def shapes_of(net: nn.Module) -> list[torch.Size]:
    """Return the shapes of a network's parameters."""
    return [p.shape for p in net.parameters()]


def mlp() -> nn.Module:
    """Build an MLP of 0.7 M parameters."""
    widths = [256, 512, 512, 512, 10]
    return nn.Sequential(*(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)))


def equal(number: int) -> list[torch.Size]:
    """Return ``number`` equal shapes of a million elements in total."""
    return [torch.Size([1_000_000 // number // 50, 50])] * number


SHAPES: dict[str, Callable[[], Sequence[torch.Size]]] = {
    "Conformer 1.6 M": lambda: shapes_of(torchaudio.models.Conformer(144, 4, 432, 4, 31)),
    "MLP 0.7 M": lambda: shapes_of(mlp()),
    "1 tensor": lambda: equal(1),
    "100 tensors": lambda: equal(100),
    "1,000 tensors": lambda: equal(1000),
}
# Constructors of each kind with limits that always clip, and with limits that never do.
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
    "median": (lambda: clipping.MedianClip(0.5), lambda: clipping.MedianClip(2.0)),
    "ZClip": (lambda: clipping.ZClip(max_norm=1.0), lambda: clipping.ZClip(z=1e6)),
    "AdaGC": (lambda: clipping.AdaGC(lambda_rel=0.9), lambda: clipping.AdaGC(lambda_abs=1e9)),
    "AGC": (lambda: clipping.AGC(1e-3), lambda: clipping.AGC(1e9)),
    "SPAM": (lambda: clipping.SPAM(1e-3, 0), lambda: clipping.SPAM(1e9, 0)),
}


class Bench:
    """Gradients of the given shapes, and an optimizer that has made a step with them."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.saved = [torch.randn_like(p) for p in self.params]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.optimizer = torch.optim.Adam(self.params, lr=0.0)
        self.restore()
        self.optimizer.step()

    def restore(self) -> None:
        """Put the gradients back as they were before clipping."""
        torch._foreach_copy_([p.grad for p in self.params if p.grad is not None], self.saved)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the CPU time of one call."""
        self.restore()
        start = time.process_time()
        run()
        return time.process_time() - start

    def plain(self, limit: float) -> Callable[[], float]:
        """Return a call of torch's clip_grad_norm_."""
        return lambda: float(torch.nn.utils.clip_grad_norm_(self.params, limit))

    def ours(self, clip: Any) -> Callable[[], float]:
        """Return what a step does: measure, one transfer, clip."""
        names: dict[Tensor, str] = {p: f"layer{i}.weight" for i, p in enumerate(self.params)}
        clip.bind("main", names, self.optimizer)
        groups = self.optimizer.param_groups

        def run() -> float:
            gradients = Gradients(groups, clip)
            gradients.take(gradients.measure().tolist())
            clip(gradients)
            return gradients.norm

        return run


def ratio(bench: Bench, clip: Any, limit: float, turns: int = 41) -> tuple[float, float]:
    """Return our best time over torch's, and ours in milliseconds."""
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
    """Print a row for each kind, or for those named on the command line."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, best of turns")
    print(f"{'':18}" + "".join(f"{name:>28}" for name in SHAPES))
    print(f"{'':18}" + f"{'clipped':>12}{'free':>9}{'ms':>7}" * len(SHAPES))
    benches = [Bench(shapes()) for shapes in SHAPES.values()]
    for name in sys.argv[1:] or KINDS:
        clips, free = KINDS[name]
        cells = []
        for bench in benches:
            first, milliseconds = ratio(bench, clips(), 1.0)
            second = ratio(bench, free(), 1e9)[0]
            cells.append(f"{f'x{first:.2f}':>12}{f'x{second:.2f}':>9}{milliseconds:>7.2f}")
        print(f"{name:18}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
