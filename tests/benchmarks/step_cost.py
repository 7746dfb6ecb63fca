"""Cost of a step over a bare PyTorch loop, and how often it waits for the device.

    python tests/benchmarks/step_cost.py

Every trainer runs the same steps: a tiny MLP, Adam, a clipped norm, a finite check, the loss read.
Batches come from a list, from a DataLoader of ready batches, and from a DataLoader of items, which
the bare loop reads as well. All take turns, each beside a bare loop of its own, and the median of
the ratios is printed, so that a noisy machine disturbs all alike. Peers take part where they are
installed: speechbrain, accelerate, pytorch-lightning.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import trainer

Batches = Iterable[tuple[Tensor, Tensor]]
Run = Callable[[Batches, int, int], None]  # Batches, epochs, and batches of a window.
LIMIT = 5.0


def make_net() -> nn.Sequential:
    """32 → 64 → 64 → 10, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def make_batches(number: int = 200, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Random inputs (size, 32) and classes (size,)."""
    torch.manual_seed(1)
    return [(torch.randn(size, 32), torch.randint(0, 10, (size,))) for _ in range(number)]


def make_items(size: int) -> DataLoader[Any]:
    """As many batches, of which each is joined from ``size`` items in a new order."""
    inputs, classes = (torch.cat(each) for each in zip(*make_batches(size=size), strict=True))
    return DataLoader(TensorDataset(inputs, classes), batch_size=size, shuffle=True)


@dataclass
class Row:
    """One way in which the batches come, and the largest ratio that is wanted of ours, if any."""

    make: Callable[[], Batches]
    goal: float | None = None
    window: int = 1


ROWS = {
    "list of batches": Row(make_batches, 1.05),
    "list, windows of 4": Row(make_batches, window=4),
    "DataLoader of batches": Row(lambda: DataLoader(make_batches(), batch_size=None), 1.05),  # type: ignore[arg-type]
    "items, 8 a batch": Row(lambda: make_items(8), 1.15),
    "items, 32 a batch": Row(lambda: make_items(32), 1.15),
}


def run_bare(batches: Batches, epochs: int, window: int = 1) -> None:
    """Write the same loop by hand."""
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    total = 0.0
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches, 1):
            loss = cross_entropy(net(x), y)
            (loss / window if window > 1 else loss).backward()
            if number % window == 0:
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


def run_brain(batches: Batches, epochs: int, window: int = 1) -> None:
    """Ours, with every guard."""
    options = {"progressbar": False, "grad_accumulation_factor": window}
    brain = Classifier({"net": make_net()}, torch.optim.Adam, {}, options)
    brain.fit(range(epochs), batches)


class Ready(DataLoader[Any]):
    """A list of batches as it is, for those who would take a plain list apart."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        return iter(self.dataset)


def loader_of(batches: Batches) -> DataLoader[Any]:
    """Batches as the peers take them."""
    return batches if isinstance(batches, DataLoader) else Ready(batches)


def run_speechbrain(batches: Batches, epochs: int, window: int = 1) -> None:
    """SpeechBrain's Brain."""
    import speechbrain

    class Peer(speechbrain.Brain):
        def compute_forward(self, batch: Any, stage: Any) -> Tensor:
            return self.modules.net(batch[0])

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
            return cross_entropy(predictions, batch[1])

    options = {"device": "cpu", "grad_accumulation_factor": window}
    brain = Peer({"net": make_net()}, torch.optim.Adam, {}, options)
    brain.fit(range(epochs), loader_of(batches), progressbar=False)


def run_accelerate(batches: Batches, epochs: int, window: int = 1) -> None:
    """The bare loop through Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=window)
    net = make_net()
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    if isinstance(batches, DataLoader):
        batches = accelerator.prepare(batches)
    total = 0.0
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(net):
                loss = cross_entropy(net(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(net.parameters(), LIMIT)
                    if torch.isfinite(norm):
                        optimizer.step()
                    optimizer.zero_grad()
                total += loss.item()


def run_lightning(batches: Batches, epochs: int, window: int = 1) -> None:
    """Lightning's Trainer."""
    import pytorch_lightning as lightning

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
        accumulate_grad_batches=window,
    ).fit(Peer(), loader_of(batches))  # fmt: skip


TRAINERS: dict[str, Run] = {
    "trainer": run_brain,
    "speechbrain": run_speechbrain,
    "accelerate": run_accelerate,
    "pytorch_lightning": run_lightning,
}


def seconds(run: Run, batches: Batches, epochs: int, window: int) -> float:
    """Return how long a run of so many epochs took."""
    start = time.perf_counter()
    run(batches, epochs, window)
    return time.perf_counter() - start


def ratios(
    names: list[str], row: Row, turns: int = 15, epochs: int = 2
) -> tuple[dict[str, float], float]:
    """The median over turns of each trainer's time over that of the bare loop beside it.

    The second value is the median duration of a step of the bare loop, in microseconds.
    """
    batches = row.make()
    for name in names:
        TRAINERS[name](batches, 1, row.window)
    found: dict[str, list[float]] = {name: [] for name in names}
    bare: list[float] = []
    for _ in range(turns):
        for name in names:
            before = seconds(run_bare, batches, epochs, row.window)
            own = seconds(TRAINERS[name], batches, epochs, row.window)
            after = seconds(run_bare, batches, epochs, row.window)
            found[name].append(2 * own / (before + after))
            bare += [before, after]
    step = statistics.median(bare) / epochs / 200 * 1e6
    return {name: statistics.median(values) for name, values in found.items()}, step


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


def syncs_per_step(run: Run, steps: int = 100) -> float:
    """Syncs a step between log intervals, Adam's own step counter (a CPU tensor) left out."""
    batches = make_batches(steps)
    with counted_syncs() as calls:
        run(batches, 1, 1)
        once = len(calls)
        run(batches, 2, 1)
    optimizer = 6  # torch.optim.Adam reads the step of each of the six parameters on the host
    return (len(calls) - 2 * once) / steps - optimizer


def main() -> None:
    """Print one row for each kind of data, with the trainers that are installed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [
        name for name in TRAINERS if name == "trainer" or importlib.util.find_spec(name) is not None
    ]
    print(f"torch {torch.__version__}, one thread, tiny MLP, median of 15 turns")
    heads = "".join(f"{name.removeprefix('pytorch_'):>12}" for name in names)
    print(f"{'':24}{'bare loop':>12}{heads}{'goal':>8}")
    for title, row in ROWS.items():
        found, step = ratios(names, row)
        cells = "".join(f"{f'x{found[name]:.3f}':>12}" for name in names)
        print(f"{title:24}{f'{step:.0f} us':>12}{cells}{row.goal or '':>8}", flush=True)
    counts = [syncs_per_step(run) for run in (run_bare, *(TRAINERS[name] for name in names))]
    print(f"{'syncs a step':24}" + "".join(f"{count:>12.2f}" for count in counts))


if __name__ == "__main__":
    main()
