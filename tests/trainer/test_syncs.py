"""How often a step waits for the device: once an optimizer step, and for nothing else."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.step_cost import counted_syncs
from tests.trainer.small import Players, Regressor, batches, make
from trainer import Brain

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
