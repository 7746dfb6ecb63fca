"""A batch for which memory runs out on one rank is given up on all; nothing else is lost."""

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from trainer import Brain, distributed

from ..processes import TwoRanks
from . import two_processes
from .two_processes import batches, make, weights

Found = dict[str, Any]
Failures = Sequence[Sequence[Any]]  # Rank, batch and place of each.

LAST = len(two_processes.SIZES)  # The last batch of the epoch.


def run_out(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails.")


def short(kind: type[Brain], failures: Failures) -> type[Brain]:
    """Return a Brain that runs out of memory on some ranks, in some batches and places.

    "start" is before the first loss of a batch, "net" and "branch" are within a backward pass
    through that module, "between" is after the first call of `optimize`, "step" in the optimizer.
    """

    class Short(kind):  # type: ignore[misc, valid-type]
        def fail(self, place: str) -> None:
            if [distributed.rank(), self.step, place] in [list(each) for each in failures]:
                run_out()

        def on_fit_start(self) -> None:
            super().on_fit_start()
            for part in ("net", "branch"):
                next(self.modules[part].parameters()).register_post_accumulate_grad_hook(
                    lambda _, part=part: self.fail(part)
                )
            for update in self.updates.values():
                update.optimizer.register_step_pre_hook(lambda *_: self.fail("step"))

        def fit_batch(self, batch: Any) -> Any:
            self.fail("start")
            return super().fit_batch(batch)

        def optimize(self, *arguments: Any, **named: Any) -> Any:
            report = super().optimize(*arguments, **named)
            self.fail("between")
            return report

    return Short


def train(kind: str, window: int, failures: Failures, rounds: Sequence[int]) -> Found:
    """Train on some rounds of batches, and return what is left of it."""
    warnings.filterwarnings("ignore", "Short.fit_batch calls")
    brain = make(
        short(getattr(two_processes, kind), failures), grad_accumulation_factor=window,
        progressbar=False,
    )  # fmt: skip
    data = batches()
    world = distributed.world_size()
    shares = [data[world * (n - 1) : world * n] for n in rounds]
    brain.fit([1], [batch for share in shares for batch in share])
    return {
        "weights": weights(brain),
        "grads": [p.grad for p in brain.modules.parameters() if p.grad is not None],
        "steps": brain.optimizer_step,
        "batches": brain.progress.step,
    }


def train_both(kind: str, window: int, failures: Failures, rounds: Sequence[int]) -> Found:
    """Train with the failures on all rounds, and without them on the rounds that are left."""
    lost = train(kind, window, failures, range(1, LAST + 1))
    return {"lost": lost, "without": train(kind, window, [], rounds)}


def left(window: int, steps: set[int]) -> list[int]:
    """Return the rounds that train: neither those that fail nor those of their open windows."""
    kept: list[int] = []
    open_window: list[int] = []
    for n in range(1, LAST + 1):
        if n in steps:
            open_window = []
            continue
        open_window.append(n)
        if len(open_window) == window:
            kept += open_window
            open_window = []
    return kept + open_window


def check(found: Found) -> None:
    lost, without = found["lost"], found["without"]
    assert lost["steps"] == without["steps"]
    assert lost["batches"] == LAST
    assert not lost["grads"]
    for ours, theirs in zip(lost["weights"], without["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


ONE_STEP = ("Line", "SmallBuckets", "SparseEmbedding", "Together", "Joint")


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *product(
            ["Line", "SmallBuckets", "SparseEmbedding", "Together", "Joint"], ["start", "net"]
        ),
        ("Together", "branch"),
        ("ByHand", "start"),
        ("ByHand", "net"),
    ],
)
def test_two_ranks_give_up_the_same_batches(
    two_ranks: TwoRanks, kind: str, place: str, window: int
) -> None:
    for failures in (
        [[1, 1, place], [0, 5, place], [1, LAST, "start"]],
        [[0, 2, place], [1, 3, place], [0, 4, "start"]],
        [[0, 5, place], [1, 5, place]],
    ):
        rounds = left(1 if kind == "ByHand" else window, {step for _, step, _ in failures})
        ranks = two_ranks(train_both, kind, window, failures, rounds)
        for found in ranks:
            check(found)
        assert torch.equal(*(found["lost"]["weights"] for found in ranks))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("place", ["start", "branch"])
def test_a_rank_need_not_know_what_the_others_are_going_to_do(
    two_ranks: TwoRanks, place: str, window: int
) -> None:
    # The first player rests in every second batch.
    failures = [[1, 1, place], [0, 4, "start"], [1, 7, place]]
    ranks = two_ranks(train, "Resting", window, failures, list(range(1, LAST + 1)))
    assert torch.equal(*(found["weights"] for found in ranks))
    assert [found["steps"] for found in ranks] == [{1: 4, 2: 2}[window]] * 2


class Disordered(two_processes.Players):
    """Calls `optimize` in another order on rank 1, from batch 3 on."""

    def fit_batch(self, batch: Any) -> Any:
        names = ["d", "g"]
        if self.step >= 3 and distributed.rank() == 1:
            names.reverse()
        for name in names:
            part = self.modules["branch" if name == "d" else "net"]
            self.optimize(part(batch["x"]).square().mean(), name)


class Halved(two_processes.Players):
    """Rank 1 leaves out its second player in batch 3."""

    def fit_batch(self, batch: Any) -> Any:
        self.optimize(self.modules.branch(batch["x"]).square().mean(), "d")
        if self.step != 3 or distributed.rank() != 1:
            self.optimize(self.modules.net(batch["x"]).square().mean(), "g")


class Silent(two_processes.Line):
    """Rank 1 trains on nothing in batch 3."""

    def fit_batch(self, batch: Any) -> Any:
        return super().fit_batch(batch) if self.step != 3 or distributed.rank() != 1 else None


def disorder(kind: str, window: int) -> str:
    try:
        brain = make(globals()[kind], grad_accumulation_factor=window)
        brain.fit([1], batches())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        distributed.stop()
    return "none"


@pytest.mark.parametrize(
    ("kind", "window", "first", "second"),
    [
        ("Disordered", 1, "'d'", "'g'"),
        ("Disordered", 3, "'d'", "'g'"),
        ("Halved", 1, "'g'", "'d'"),
        ("Silent", 1, "'main'", "none"),
        ("Silent", 3, "'main'", "none"),
    ],
)
def test_ranks_that_call_optimize_in_different_orders_are_told(
    two_ranks: TwoRanks, kind: str, window: int, first: str, second: str
) -> None:
    for found in two_ranks(disorder, kind, window, seconds=60):
        assert found.startswith("ValueError: ranks call optimize in different orders")
        assert first in found
        assert second in found


def caught(kind: str, failures: Failures) -> str:
    """Return the error that ends a training, and leave the other rank."""
    try:
        train(kind, 1, failures, range(1, LAST + 1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        distributed.stop()
    return "none"


@pytest.mark.parametrize(
    ("kind", "place", "why"),
    [
        ("Players", "between", "after an optimizer, 'd', had stepped in this batch"),
        ("Players", "net", "after an optimizer, 'd', had stepped in this batch"),
        ("Line", "step", "in the step of an optimizer, which may have moved a part of the weights"),
    ],
)
def test_a_batch_that_has_moved_weights_ends_the_run(
    two_ranks: TwoRanks, kind: str, place: str, why: str
) -> None:
    found = two_ranks(caught, kind, [[1, 4, place]], seconds=60)
    assert found[1].startswith("OutOfMemoryError: memory ran out in epoch 1, batch 4 (")
    assert why in found[1]
    assert "its last checkpoint is sound. Allowed: a smaller batch_size" in found[1]
    assert found[0] != "none"
