"""Host-device syncs of a step: one an optimizer step, and no other.

And how many operators it dispatches: hardly more than a loop that one would write by hand.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.step_cost import counted_syncs
from tests.host_reads import HostReads
from tests.trainer.small import Players, Regressor, batches, make
from trainer import Brain, Stage
from trainer.brain import FitArguments

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "allclose")


class Dispatched(TorchDispatchMode):
    """Counts the operators that read a value back, from wherever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Lists the operators that are dispatched, those of backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":  # Others are marks for the profiler.
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def syncs(kind: type[Brain], number: int, **options: Any) -> tuple[int, int]:
    """Reads of so many batches beyond those of the epoch's start and end, and optimizer steps."""
    counts, steps = [], []
    options = {"optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9), **options}
    for size in (8, 8 + number):
        brain = make(kind, **options)
        data = batches(size)
        brain.fit([1], data[:8])
        with counted_syncs() as python, Dispatched() as below:
            brain.fit([2], data)
        # The mode sees those that do not go through Python's own methods.
        counts.append(len(python) + sum(name != "_local_scalar_dense" for name in below.calls))
        steps.append(brain.optimizer_step)
    return counts[1] - counts[0], steps[1] - steps[0]


@pytest.mark.parametrize("kind", [Regressor, Players])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("factor", [1, 4])
def test_a_step_waits_once_for_each_optimizer(
    kind: type[Brain], precision: str, factor: int
) -> None:
    players = 1 if kind is Regressor else 2
    found, steps = syncs(
        kind, 24, precision=precision, grad_accumulation_factor=factor, log_interval=1000
    )
    assert steps == 24 // factor
    assert found == players * 24 // factor


def test_nothing_that_is_switched_on_waits_more() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    found, steps = syncs(
        Players, 24, norm=True, hparams={"schedule": schedule}, schedule_every="step",
        ema_decay=0.9, max_grad_norm=1e-3, skip_nonfinite_grads=True, log_interval=1000,
    )  # fmt: skip
    assert (found, steps) == (2 * 24, 24)
    found, _ = syncs(Regressor, 24, clip="value", max_grad_norm=1e-3, log_interval=1000)
    assert found == 24


@pytest.mark.parametrize("kind", [Regressor, Players])
def test_a_line_of_the_log_reads_all_losses_at_once(kind: type[Brain]) -> None:
    # 16 steps to a line: 32 batches more are two lines more.
    quiet, _ = syncs(kind, 32, log_interval=1000)
    lines, _ = syncs(kind, 32, log_interval=16)
    each = 0 if kind is Regressor else 2  # The line's own average and the epoch's.
    assert lines - quiet == 2 * each


class Sum(nn.Module):
    """A network of 128 parameters of unlike shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(i + 1, 3) / 100 for i in range(128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(weight * x).square().sum() for weight in self.weights]).sum()


class Summed(Brain):
    """Makes that sum small."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        return predictions * 0.01


def bare_step(net: Sum, optimizer: torch.optim.Optimizer, x: Tensor, limit: float) -> None:
    """Write the same loop by hand."""
    loss = net(x) * 0.01
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
    if torch.isfinite(norm):
        optimizer.step()
    loss.item()
    optimizer.zero_grad()


@pytest.mark.parametrize("limit", [1e-2, 1e6])
def test_a_step_dispatches_few_operators_more_than_a_bare_loop(limit: float) -> None:
    batch = {"x": torch.ones(3)}
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    net = Sum()
    optimizer = sgd(net.parameters())
    bare_step(net, optimizer, batch["x"], limit)
    with Operators() as bare:
        bare_step(net, optimizer, batch["x"], limit)
    options = {"device": "cpu", "progressbar": False, "max_grad_norm": limit}
    brain = Summed({"net": Sum()}, sgd, None, options)
    brain.start_training(FitArguments([1], [batch]))
    brain.train_batch(batch)
    with Operators() as own:
        brain.train_batch(batch)
    for made, expected in zip(brain.modules.net.weights, net.weights, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=0.0)  # It is the same step.
    reads = HostReads()
    reads.place([batch["x"], *brain.modules.parameters()])
    with reads.counted():
        brain.train_batch(batch)
    assert len(bare.calls) > 5 * 128
    assert len(own.calls) <= len(bare.calls) + 30
    assert reads.calls == ["tolist"]
    # A tensor that is made of Python's numbers is one to copy to a device. On a CPU, clipping makes
    # one, since that is faster there.
    assert own.calls.count("lift_fresh") == (limit < 1.0)


def test_validation_waits_at_its_end_alone() -> None:
    counts = []
    for size in (4, 40):
        brain = make()
        brain.fit([1], batches(1))
        with counted_syncs() as calls:
            brain.evaluate(batches(size))
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_the_counter_counts() -> None:
    with counted_syncs() as python, Dispatched() as below:
        tensor = torch.ones(3)
        float(tensor[0])
        tensor[0].item()
        tensor.tolist()
        bool(tensor.equal(tensor))
    assert python == ["__float__", "item", "tolist"]
    assert below.calls[-1] == "equal"
