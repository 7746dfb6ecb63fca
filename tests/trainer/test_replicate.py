"""Gradients leave during the last backward pass of a window, and ranks that differ are told."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import Stage, distributed
from trainer.distributed import buckets
from trainer.distributed.announcements import Windows
from trainer.distributed.strategy import BatchGivenUp, Replicate, WindowSums

from ..processes import TwoRanks
from .two_processes import Line, Players, Reentrant, batches, make, weights

Found = dict[str, Any]


class Watched(Line):
    """Logs, for each message with gradients, whether a backward pass is running."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        buckets.BUCKET_BYTES = buckets.FIRST_BUCKET_BYTES = 1
        self.sent: list[tuple[int, bool]] = []
        self.in_backward = False
        send = distributed.begin_sum

        def begin_sum(tensor: Tensor) -> Any:
            self.sent.append((self.step, self.in_backward))
            return send(tensor)

        distributed.begin_sum = begin_sum

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        loss.register_hook(lambda grad: setattr(self, "in_backward", True))
        return loss

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.in_backward = False

    def optimize(self, loss: Any, name: str | None = None, **named: Any) -> Any:
        handle = self.modules.net[0].weight.register_post_accumulate_grad_hook(
            lambda p: setattr(self, "in_backward", False)  # The last one of the backward pass.
        )
        try:
            return super().optimize(loss, name, **named)
        finally:
            handle.remove()


def send(window: int) -> Found:
    brain = make(Watched, grad_accumulation_factor=window)
    data = [{name: x for name, x in batch.items() if name != "branch"} for batch in batches()]
    brain.fit([1], data)
    return {"sent": brain.sent, "weights": weights(brain)}


@pytest.mark.parametrize("window", [1, 3])
def test_gradients_leave_in_the_last_backward_pass_of_a_window(
    two_ranks: TwoRanks, window: int
) -> None:
    ranks = two_ranks(send, window)
    assert ranks[0]["sent"] == ranks[1]["sent"]
    within = [step for step, in_backward in ranks[0]["sent"] if in_backward]
    # All but the first window, by its end; the last one of an epoch is closed by its last batch.
    ends = [1, 2, 3, 4, 5, 6, 7] if window == 1 else [3, 6, 7]
    assert sorted(set(within)) == ends[1:]
    assert sorted({step for step, _ in ranks[0]["sent"]}) == ends
    # Of four parameters of the network three are sent before the first layer's weight has its own.
    assert all(within.count(step) >= 2 for step in ends[1:])


class Surprising(Reentrant):
    """Uses the network twice from batch 4 on only."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        if self.step < 4:
            return Line.compute_forward(self, batch, stage)
        return super().compute_forward(batch, stage)


def surprise() -> Found:
    brain = make(Surprising)
    with pytest.raises(ValueError, match="in two parts, unlike in the first step") as error:
        brain.fit([1], batches())
    return {"message": str(error.value), "steps": brain.optimizer_step}


def test_a_gradient_that_comes_in_two_parts_later_on_is_refused(two_ranks: TwoRanks) -> None:
    for found in two_ranks(surprise):
        assert "the parameter 'net." in found["message"]
        assert found["steps"] == 3


def build(kind: str) -> Found:
    rank = distributed.rank()
    brain = make(Players)
    if kind == "shape":
        brain.modules.net[0] = nn.Linear(3, 4 + rank, dtype=torch.float64)
    elif kind == "missing" and rank == 1:
        del brain.modules.never
    elif kind == "optimizers":
        made = brain.init_optimizers

        def init_optimizers() -> None:
            made()
            if rank == 1:
                del brain.optimizers_dict["d"]

        brain.init_optimizers = init_optimizers
    try:
        brain.fit([1], batches())
    except ValueError as error:
        return {"message": str(error)}
    return {"message": ""}


def test_a_step_by_hand_sums_numbers_on_the_device_of_the_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend of a GPU takes no tensors on the CPU; a meta tensor stands for one on a GPU."""
    devices: list[str] = []

    class Recording(Replicate):
        def announce(self, windows: Windows) -> None:
            pass

        def end_window(
            self, names: Sequence[str], loss: Tensor, weight: float | Tensor, reference: float
        ) -> WindowSums:
            devices.append(loss.device.type)
            return WindowSums(torch.ones(5), [], 1.0)

    monkeypatch.setattr(distributed, "open_gradient_group", lambda: None)
    strategy = Recording()
    strategy.prepare_backward("main", [nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(BatchGivenUp):
        strategy.average("main")
    assert devices == ["meta"]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("shape", "the same modules, and 'net.0.weight' is float64 (4, 3) on rank 0 and float64"),
        ("missing", "same modules, and 'never.weight' is float64 (2, 2) on rank 0 and missing on"),
        ("optimizers", "the same optimizers, and 'd' is branch.weight float64 (1, 3), branch.bias"),
    ],
)  # fmt: skip
def test_ranks_with_other_parameters_or_optimizers_are_refused(
    two_ranks: TwoRanks, kind: str, sentence: str
) -> None:
    for found in two_ranks(build, kind):
        assert sentence in found["message"]


def equal_gradients(kind: str) -> Found:
    rank = distributed.rank()
    brain = make()
    data = batches(sizes=(4,))
    if kind == "data":
        data = [data[i // 2] for i in range(len(data))]  # Both ranks get the same.
    if kind == "by hand":
        objectives = brain.compute_objectives

        def summed(*arguments: Any) -> Tensor:
            loss = objectives(*arguments)
            for p in brain.modules.parameters():
                if not p._backward_hooks:
                    p.register_hook(lambda grad: distributed.all_reduce_sum_(grad.clone()))
            return loss

        brain.compute_objectives = summed
        data = [{n: x for n, x in batch.items() if n != "branch"} for batch in data]
    expected = (
        contextlib.nullcontext() if kind == "none"
        else pytest.warns(UserWarning, match="equal on all 2 ranks before they are summed")
    )  # fmt: skip
    with expected:
        brain.fit([1], data[:2])
    return {"weights": weights(brain), "rank": rank}


@pytest.mark.parametrize("kind", ["none", "data", "by hand"])
def test_gradients_that_are_equal_on_all_ranks_are_warned_of(
    two_ranks: TwoRanks, kind: str
) -> None:
    ranks = two_ranks(equal_gradients, kind)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


class Noting(Line):
    """Saves after batch 5, and notes the sizes of the messages that are sent later.

    The layer ``branch`` is used from batch 6 on only.
    """

    def on_fit_start(self) -> None:
        self.sizes: list[int] = []
        send = distributed.begin_sum

        def begin_sum(tensor: Tensor) -> Any:
            self.sizes += [tensor.numel()] if self.step > 5 else []
            return send(tensor)

        distributed.begin_sum = begin_sum

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return super().compute_forward({**batch, "branch": torch.tensor(self.step > 5)}, stage)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == 5:
            self.checkpointer.save_checkpoint(name="stop")


def resume_in_a_window(folder: str) -> Found:
    straight = make(Noting, folder=Path(folder, "straight"), grad_accumulation_factor=4)
    straight.fit([1], batches())
    sizes = straight.sizes.copy()
    if distributed.is_main():
        shutil.copytree(Path(folder, "straight", "stop"), Path(folder, "resumed", "stop"))
    distributed.barrier()
    resumed = make(Noting, folder=Path(folder, "resumed"), grad_accumulation_factor=4)
    resumed.fit([1], batches())
    return {"straight": sizes, "resumed": resumed.sizes}


def test_a_window_that_is_resumed_sends_the_same_messages(
    two_ranks: TwoRanks, tmp_path: Path
) -> None:
    for found in two_ranks(resume_in_a_window, tmp_path):
        assert found["straight"] == found["resumed"]
        # The network, the question which parameters have gradients too, and the branch.
        assert found["resumed"][:3] == [12 + 4 + 4 + 1, 1 + 4 + 8, 3 + 1]


def references(folder: str) -> Found:
    brain = make(folder=Path(folder))
    brain.fit([1], batches())
    entry = brain.stateful()["strategy"].part
    resumed = make(folder=Path(folder))
    resumed.fit(range(1, 3), batches())
    again = resumed.stateful()["strategy"].part
    return {"first": entry.state_dict(), "second": again.state_dict()}


def test_the_weight_that_gradients_are_relative_to_is_agreed_once_and_saved(
    two_ranks: TwoRanks, tmp_path: Path
) -> None:
    ranks = two_ranks(references, tmp_path)
    assert ranks[0] == ranks[1]
    assert ranks[0]["first"]["references"] == {"main": 8.0}  # The first batches are of 3 and 5.
    assert ranks[0]["second"]["references"] == {"main": 8.0}
    assert ranks[0]["first"]["buckets"] == ranks[0]["second"]["buckets"]
