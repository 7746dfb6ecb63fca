"""A batch for which memory runs out on one rank is given up on all; nothing else is lost."""

import gc
import json
import logging
import resource
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import Brain, Callback, Stage, distributed

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


def train_both(
    kind: str, window: int, cases: Sequence[tuple[Failures, Sequence[int]]]
) -> list[Found]:
    """Train with each case's failures on all rounds, and without on the rounds that are left."""
    return [
        {
            "lost": train(kind, window, failures, range(1, LAST + 1)),
            "without": train(kind, window, [], rounds),
        }
        for failures, rounds in cases
    ]


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
    cases = [
        (failures, left(1 if kind == "ByHand" else window, {step for _, step, _ in failures}))
        for failures in (
            [[1, 1, place], [0, 5, place], [1, LAST, "start"]],
            [[0, 2, place], [1, 3, place], [0, 4, "start"]],
            [[0, 5, place], [1, 5, place]],
        )
    ]
    ranks = two_ranks(train_both, kind, window, cases)
    for both in zip(*ranks, strict=True):
        for found in both:
            check(found)
        assert torch.equal(*(found["lost"]["weights"] for found in both))


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


def error_of(training: Callable[[], object]) -> str:
    """Return the error that ends a training, and leave the other rank."""
    try:
        training()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        distributed.stop()
    return "none"


def disorder(kind: str, window: int) -> str:
    return error_of(
        lambda: make(globals()[kind], grad_accumulation_factor=window).fit([1], batches())
    )


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


class Thinning(two_processes.Players):
    """Has three optimizers, of which two step together from batch 3 on; which, ``choose`` says."""

    def choose(self, names: list[str]) -> list[str]:
        return names[:2]

    def init_optimizers(self) -> None:
        parts = {"a": self.modules.net[0], "b": self.modules.net[2], "c": self.modules.branch}
        self.optimizers_dict = {
            name: torch.optim.SGD(part.parameters(), lr=0.01) for name, part in parts.items()
        }

    def freeze_optimizers(self, optimizers: Any) -> Any:
        names = list(optimizers) if self.step < 3 else self.choose(list(optimizers))
        return {name: optimizers[name] for name in names}

    def fit_batch(self, batch: Any) -> Any:
        return Brain.fit_batch(self, batch)


class Parted(Thinning):
    """Each rank chooses others."""

    def choose(self, names: list[str]) -> list[str]:
        return names[distributed.rank() :][:2]


class PartedInOrder(Thinning):
    """Each rank has another order."""

    def choose(self, names: list[str]) -> list[str]:
        return names[:: 1 - 2 * distributed.rank()]


@pytest.mark.parametrize("kind", ["Parted", "PartedInOrder"])
def test_ranks_that_freeze_other_optimizers_are_told(two_ranks: TwoRanks, kind: str) -> None:
    for found in two_ranks(disorder, kind, 1, seconds=60):
        assert found.startswith("ValueError: optimize without a name steps with other optimizers")
        assert "freeze_optimizers" in found


def train_here(kind: str, window: int, failures: Failures, rounds: Sequence[int]) -> Found:
    two_processes.Thinning = Thinning  # type: ignore[attr-defined]
    return train_both(kind, window, [(failures, rounds)])[0]


@pytest.mark.parametrize("place", ["start", "net"])
def test_a_rank_answers_for_the_optimizers_that_step_together_now(
    two_ranks: TwoRanks, place: str
) -> None:
    for found in two_ranks(train_here, "Thinning", 1, [[1, 3, place]], left(1, {3})):
        check(found)


class Unlucky(two_processes.Line):
    """Its second batch is not finite, and rank 1 runs out of memory after it."""

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        return loss * float("nan") if self.step == 2 else loss

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == 2 and distributed.rank() == 1:
            run_out()


class Nesting(two_processes.Line):
    """Calls another `fit` after the step of batch 2, whose last batch is given up."""

    inner = False

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        if self.inner and self.step == 2 and distributed.rank() == 1:
            run_out()
        return super().compute_objectives(predictions, batch, stage)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if not self.inner and self.step == 2:
            self.inner = True
            self.fit([1], batches(torch.float32)[:4])
            self.inner = False


class Handling(two_processes.Line):
    """Handles the errors of its steps by going on, or by another try."""

    def fit_batch(self, batch: Any) -> Any:
        for _ in range(2):
            try:
                return super().fit_batch(batch)
            except Exception:
                logging.getLogger("test").info("went on")
        return None


def given_up(kind: str, failures: Failures, precision: str) -> Found:
    """Return the numbers of the batches that were given up, and the weights."""
    lost: list[int] = []

    class Listing(Callback):
        def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
            if loss is None:
                lost.append(brain.step)

    brain = make(
        short(globals()[kind], failures), torch.float32, precision=precision, drift_check_every=1,
        nonfinite_reports=0,
    )  # fmt: skip
    brain.callbacks.append(Listing())
    try:
        brain.fit([1], batches(torch.float32))
    except Exception as error:
        distributed.stop()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"lost": lost, "weights": weights(brain), "steps": brain.optimizer_step}


@pytest.mark.parametrize(
    ("kind", "place", "lost", "steps"),
    [
        ("Unlucky", "never", [2], 6),
        ("Unlucky", "between", [2], 6),
        ("Nesting", "never", [2], 8),
        ("Handling", "net", [3], 6),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_ranks_leave_the_same_batch(
    two_ranks: TwoRanks, kind: str, place: str, lost: list[int], steps: int, precision: str
) -> None:
    step = 2 if kind == "Unlucky" else 3
    ranks = two_ranks(given_up, kind, [[1, step, place]], precision, seconds=60)
    for found in ranks:
        assert "error" not in found, found
        assert found["lost"] == lost
        assert found["steps"] == steps - (precision == "fp16")  # The first one overflows.
    assert torch.equal(*(found["weights"] for found in ranks))


def test_a_recipe_does_not_go_on_from_a_step_without_memory(two_ranks: TwoRanks) -> None:
    found = two_ranks(given_up, "Handling", [[1, 3, "step"]], "fp32", seconds=60)
    assert "in the step of an optimizer" in found[1]["error"]
    assert "error" in found[0]


def test_the_next_batch_keeps_its_buffers_after_a_step_that_was_skipped() -> None:
    class Counting(Unlucky):
        def __init__(self, modules: Any, *arguments: Any, **named: Any) -> None:
            norm = torch.nn.BatchNorm1d(3, dtype=torch.float64)
            super().__init__({**modules, "norm": norm}, *arguments, **named)

        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            return super().compute_forward({**batch, "x": self.modules.norm(batch["x"])}, stage)

        def on_fit_batch_end(self, *_: Any) -> None:
            if self.step == 2:
                run_out()

    brain = make(Counting)
    brain.fit([1], [batches()[n] for n in (0, 1, 3, 4)])
    assert brain.modules.norm.num_batches_tracked == 3


def caught(kind: str, failures: Failures) -> str:
    return error_of(lambda: train(kind, 1, failures, range(1, LAST + 1)))


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


class Watching(Callback):
    """Keeps what the end of each training batch was told."""

    def __init__(self) -> None:
        self.losses: list[Any] = []

    def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
        self.losses.append(loss)


class Named(two_processes.Line):
    """A Line with named examples, whose evaluation runs out of memory if ``spoilt``."""

    spoilt = False

    def batch_ids(self, batch: Any) -> list[str]:
        return [f"utt{len(batch['x'])}"]

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        predictions = super().compute_forward(batch, stage)
        self.predictions = weakref.ref(predictions)
        if self.spoilt and stage is Stage.VALID:
            run_out()
        return predictions


@pytest.mark.parametrize("place", ["start", "net"])
@pytest.mark.parametrize("window", [1, 3])
def test_one_process_skips_the_batch_and_says_so(
    place: str, window: int, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [[0, 1, place], [0, 5, place], [0, LAST, place]]
    brain = make(short(Named, failures), grad_accumulation_factor=window)
    watching = Watching()
    brain.callbacks.append(watching)
    with caplog.at_level(logging.WARNING):
        brain.fit([1], batches()[:LAST])
    expected = make(Named, grad_accumulation_factor=window)
    rounds = left(window, {1, 5, LAST})
    expected.fit([1], [batches()[n - 1] for n in rounds])
    assert torch.equal(weights(brain), weights(expected))
    assert brain.losses == pytest.approx(expected.losses) or window > 1
    assert [loss is None for loss in watching.losses] == [n in (1, 5, 7) for n in range(1, 8)]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert told[0].startswith(
        "epoch 1, batch 1: out of memory, batch and open accumulation windows"
    )
    assert "(utt3; x (3, 3), y (3,), branch (3,): CUDA out of memory. Tried to allocate" in told[0]
    assert "Details" not in told[0]


def test_the_count_is_in_the_record_of_the_stage(tmp_path: Path) -> None:
    brain = make(short(Named, [[0, 2, "start"], [0, 4, "net"]]), output_folder=str(tmp_path))
    brain.fit([1, 2], batches()[:LAST])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [each["out_of_memory"] for each in records if each["kind"] == "stage"]
    assert counts == [2, 2]
    assert "batches out of memory" in (tmp_path / "report.html").read_text()


def test_patience_is_for_batches_in_a_row() -> None:
    failures = [[0, step, "net"] for step in (1, 2, 4, 5, 6)]
    make(short(Named, failures), oom_patience=3).fit([1, 2], batches()[:LAST])
    brain = make(short(Named, failures), oom_patience=2)
    with pytest.raises(torch.OutOfMemoryError) as error:
        brain.fit([1], batches()[:LAST])
    for part in (
        "memory ran out in 3 batches in a row (oom_patience is 2)", "batch 6 of epoch 1", "utt6",
        "Allowed: a smaller batch_size",
    ):  # fmt: skip
        assert part in str(error.value)
    assert brain.optimizer_step == 1


def test_an_evaluation_that_runs_out_of_memory_ends_with_advice() -> None:
    brain = make(Named)
    brain.spoilt = True
    with pytest.raises(torch.OutOfMemoryError) as error:
        brain.fit([1], batches()[:LAST], batches()[:1])
    assert any("Allowed: a smaller batch_size" in note for note in error.value.__notes__)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("x"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_errors_of_allocators_count_and_others_do_not(error: Exception, counts: bool) -> None:
    class Failing(two_processes.Line):
        def compute_objectives(self, *arguments: Any) -> Tensor:
            if self.step == 3:
                raise error
            return super().compute_objectives(*arguments)

    brain = make(Failing)
    with nullcontext() if counts else pytest.raises(type(error)):
        brain.fit([1], batches()[:LAST])
    assert brain.optimizer_step == (LAST - 1 if counts else 2)


@pytest.mark.parametrize("place", ["start", "net"])
def test_nothing_of_the_batch_stays_in_memory(place: str) -> None:
    brain = make(short(Named, [[0, 4, place]]))
    alive: list[bool] = []

    class Looking(Callback):
        def on_batch_end(self, brain: Brain, stage: Stage, loss: Any) -> None:
            if loss is None:
                alive.append(brain.predictions() is not None)

    brain.callbacks.append(Looking())
    gc.disable()
    try:
        brain.fit([1], batches()[:LAST])
    finally:
        gc.enable()
    assert alive == [False]


def growth(_: str) -> float:
    """Return by how many bytes the process grows from the tenth to the last of 100 failures."""
    rank, grown = distributed.rank(), []

    class Large(two_processes.Line):
        def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
            predictions = super().compute_forward(batch, stage)
            held = predictions.sum() + torch.zeros(100_000, requires_grad=True).exp().sum()
            if rank == 1 and self.step % 2 == 0:
                run_out()
            return predictions + 0 * held

        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if self.step % 2:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                grown.append(pages * resource.getpagesize())

    make(Large, oom_patience=1).fit([1], batches()[:2] * 202)
    assert len(grown) == 101
    return float(grown[-1] - grown[10])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures by /proc")
def test_memory_is_flat_over_a_hundred_of_them(two_ranks: TwoRanks) -> None:
    for grown in two_ranks(growth, ""):
        assert grown < 10e6
