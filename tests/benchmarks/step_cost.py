"""What a step costs over a bare PyTorch loop, and how often it waits for the device.

    python tests/benchmarks/step_cost.py

Every trainer runs the same steps: a tiny MLP, Adam, a clipped norm, a finite check, the loss read.
They take turns, each beside a bare loop of its own, and the median of the ratios is printed, so
that a noisy machine disturbs all alike. Peers take part where they are installed: speechbrain,
accelerate, lightning.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import trainer

Batches = list[tuple[Tensor, Tensor]]
LIMIT = 5.0


def make_net() -> nn.Sequential:
    """32 → 64 → 64 → 10, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def make_batches(number: int = 200) -> Batches:
    """Random inputs (32, 32) and classes (32,)."""
    torch.manual_seed(1)
    return [(torch.randn(32, 32), torch.randint(0, 10, (32,))) for _ in range(number)]


def run_bare(batches: Batches, epochs: int) -> None:
    """What one would write by hand."""
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    total = 0.0
    for _ in range(epochs):
        for x, y in batches:
            loss = cross_entropy(net(x), y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
            total += loss.item()


class Classifier(trainer.Brain):
    """The same as a Brain."""

    def compute_forward(self, batch: Any, stage: trainer.Stage) -> Tensor:
        return self.modules.net(batch[0])

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: trainer.Stage) -> Tensor:
        return cross_entropy(predictions, batch[1])


def run_brain(batches: Batches, epochs: int) -> None:
    """Ours, with every guard."""
    brain = Classifier({"net": make_net()}, torch.optim.Adam, {}, {"progressbar": False})
    brain.fit(range(epochs), batches)


class Ready(DataLoader[Any]):
    """A list of batches as it is, for those who would take a plain list apart."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        return iter(self.dataset)


def run_speechbrain(batches: Batches, epochs: int) -> None:
    """SpeechBrain's Brain."""
    import speechbrain

    class Peer(speechbrain.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Tensor:
            return self.modules.net(batch[0])

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
            return cross_entropy(predictions, batch[1])

    brain = Peer({"net": make_net()}, torch.optim.Adam, {}, {"device": "cpu"})
    brain.fit(range(epochs), Ready(batches), progressbar=False)


def run_accelerate(batches: Batches, epochs: int) -> None:
    """The bare loop through Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = make_net()
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    total = 0.0
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(net):
                loss = cross_entropy(net(x), y)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(net.parameters(), LIMIT)
                if torch.isfinite(norm):
                    optimizer.step()
                optimizer.zero_grad()
                total += loss.item()


def run_lightning(batches: Batches, epochs: int) -> None:
    """Lightning's Trainer."""
    import lightning

    class Peer(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", gradient_clip_val=LIMIT, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Peer(), Ready(batches))  # fmt: skip


TRAINERS: dict[str, Callable[[Batches, int], None]] = {
    "trainer": run_brain,
    "speechbrain": run_speechbrain,
    "accelerate": run_accelerate,
    "lightning": run_lightning,
}


def seconds(run: Callable[[Batches, int], None], batches: Batches, epochs: int) -> float:
    """How long a run of so many epochs took."""
    start = time.perf_counter()
    run(batches, epochs)
    return time.perf_counter() - start


def ratios(names: list[str], turns: int = 9, epochs: int = 5) -> dict[str, float]:
    """The median over turns of each trainer's time over that of the bare loop beside it."""
    batches = make_batches()
    for name in names:
        TRAINERS[name](batches[:20], 1)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            before = seconds(run_bare, batches, epochs)
            own = seconds(TRAINERS[name], batches, epochs)
            after = seconds(run_bare, batches, epochs)
            found[name].append(2 * own / (before + after))
    return {name: statistics.median(values) for name, values in found.items()}


@contextmanager
def counted_syncs() -> Iterator[list[str]]:
    """The names of the calls that make the host wait for a device, as they happen.

    Counted where Python asks for a value, so that a CPU shows what a GPU would wait for.
    """
    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
    calls: list[str] = []
    originals = {name: getattr(Tensor, name) for name in names}
    depth = 0

    def counting(name: str) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            calls.extend([name] if not depth else [])
            depth += 1
            try:
                return originals[name](self, *args, **kwargs)
            finally:
                depth -= 1

        return call

    for name in names:
        setattr(Tensor, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def syncs_per_step(run: Callable[[Batches, int], None], steps: int = 100) -> float:
    """Syncs a step between log intervals, Adam's own step counter (a CPU tensor) left out."""
    batches = make_batches(steps)
    with counted_syncs() as calls:
        run(batches, 1)
        once = len(calls)
        run(batches, 2)
    optimizer = 6  # torch.optim.Adam reads the step of each of the six parameters on the host
    return (len(calls) - 2 * once) / steps - optimizer


def main() -> None:
    """Print one line for each trainer that is installed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [
        name for name in TRAINERS if name == "trainer" or importlib.util.find_spec(name) is not None
    ]
    print(f"torch {torch.__version__}, one thread, tiny MLP, median of 9 turns")
    bare = syncs_per_step(run_bare)
    print(f"{'bare loop':12} x1.000  syncs a step {bare:.2f}")
    for name, ratio in ratios(names).items():
        print(f"{name:12} x{ratio:.3f}  syncs a step {syncs_per_step(TRAINERS[name]):.2f}")


if __name__ == "__main__":
    main()
