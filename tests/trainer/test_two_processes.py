"""Two processes end where one does, decide as one, and resume where they were stopped.

Each test calls a function beside it on both ranks, and can be run alone.
"""

import contextlib
import copy
import functools
import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import NonFiniteError, Stage, StepReport, distributed, signals
from trainer.diagnostics.replica_check import DriftError
from trainer.metrics import Mean
from trainer.schedules import EarlyStopping

from ..processes import TwoRanks
from . import resuming
from .clipping_kinds import KINDS
from .small import ema_of, poison, same, state_of, update_state
from .two_processes import (
    ROUNDS,
    ByHand,
    Catching,
    Choosy,
    Editing,
    Exchanging,
    Growing,
    Joint,
    Line,
    OddLayouts,
    OwnStep,
    Players,
    PlayersNotFrozen,
    Points,
    Reentrant,
    Resting,
    SmallBuckets,
    SparseEmbedding,
    Thawing,
    Together,
    TwoForwards,
    TwoLosses,
    UnfrozenLater,
    Waves,
    batches,
    make,
    train,
    weights,
)

Found = dict[str, Any]


def equal_weights(ranks: list[Found]) -> Found:
    """Check that both ranks have equal weights, to the bit; return what the first one found."""
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    return ranks[0]


# --- collective functions ------------------------------------------------------------------------


def call_every_collective() -> Found:
    rank = distributed.rank()
    tensors = [torch.full((2,), float(rank)), torch.tensor([rank], dtype=torch.int64)]
    distributed.broadcast_(tensors)
    long = {"rank": rank, "text": "ä" * (1 + 5000 * rank), "none": None, "list": [1.5, rank]}
    distributed.barrier()
    return {
        "rank": (rank, distributed.world_size(), distributed.local_rank(), distributed.is_main()),
        "any_rank": distributed.any_rank(rank == 0, rank == 1, False, True),
        "gather": [len(each["text"]) for each in distributed.all_gather_json(long)],
        "gather_exact": distributed.all_gather_json(0.1 + rank),
        "gather_nan": str(distributed.all_gather_json(float("nan"))[1 - rank]),
        "broadcast_json": distributed.broadcast_json({"from": rank}),
        "broadcast": tensors,
        "sum": distributed.all_reduce_sum_(torch.tensor([1.0 + rank, 2.0])),
        "max": distributed.all_reduce_max_(torch.tensor([1.0 + rank, 2.0 - rank])),
        "rows": distributed.all_gather_rows(torch.full((3 * rank, 2), float(rank))),
        "no_rows": distributed.all_gather_rows(torch.zeros(0, 2)),
        "on_main": distributed.run_on_main(lambda: {"from": distributed.rank()}),
    }


def test_collective_functions_give_every_rank_the_same(two_ranks: TwoRanks) -> None:
    for rank, found in enumerate(two_ranks(call_every_collective)):
        assert found["rank"] == (rank, 2, rank, rank == 0)
        assert found["any_rank"] == (True, True, False, True)
        assert found["gather"] == [1, 5001]
        assert found["gather_exact"] == [0.1, 1.1]
        assert found["gather_nan"] == "nan"
        assert found["broadcast_json"] == {"from": 0}
        assert [tensor.tolist() for tensor in found["broadcast"]] == [[0.0, 0.0], [0]]
        assert found["sum"].tolist() == [3.0, 4.0]
        assert found["max"].tolist() == [2.0, 2.0]
        assert found["rows"].tolist() == [[1.0, 1.0]] * 3
        assert found["no_rows"].shape == (0, 2)
        assert found["on_main"] == {"from": 0}


DISK = ["RuntimeError: rank 1 failed (OSError: disk)", "OSError: disk"]
# Errors of rank 0 and of rank 1, the kind that may be shared, and what is raised on each.
FAILURES: dict[str, tuple[tuple[Exception | None, ...], list[type[Exception]], list[str]]] = {
    "one": ((None, OSError("disk")), [], DISK),
    "shared": (
        (None, ValueError("lost")), [ValueError],
        ["ValueError: on rank 1: ValueError: lost", "ValueError: lost"],
    ),
    "both": ((ValueError("a"), ValueError("b")), [ValueError], ["ValueError: a", "ValueError: b"]),
    "worse": ((ValueError("a"), OSError("disk")), [ValueError], DISK),
    "none": ((None, None), [ValueError], ["none", "none"]),
}  # fmt: skip


def failure(name: str) -> str:
    """Return what `run_on_all` raises on this rank."""
    errors, shared, _ = FAILURES[name]

    def work() -> str:
        if (error := errors[distributed.rank()]) is not None:
            raise error
        return "none"

    try:
        return distributed.run_on_all(work, shared=next(iter(shared), None))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_of_one_rank_is_one_of_all(two_ranks: TwoRanks, name: str) -> None:
    assert two_ranks(failure, name) == FAILURES[name][2]


# --- the same as one process ---------------------------------------------------------------------

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "window": {"grad_accumulation_factor": 3},  # The last one of an epoch is of 1 batch,
    "window-of-4": {"grad_accumulation_factor": 4},  # 3 batches,
    "window-of-5": {"grad_accumulation_factor": 5},  # 2 batches.
    "value-clip": {"clip": "value", "max_grad_norm": 0.05},
    "forwards": {"kind": TwoForwards},
    "sparse": {"kind": SparseEmbedding},
    "sparse-window": {"kind": SparseEmbedding, "grad_accumulation_factor": 3},
    "players": {"kind": Players},
    "players-window": {"kind": Players, "grad_accumulation_factor": 3},
    "thawing": {"kind": Thawing, "grad_accumulation_factor": 2},
    "complex": {"kind": Waves},
    "complex-window": {"kind": Waves, "grad_accumulation_factor": 3},
    "players-thawed": {"kind": PlayersNotFrozen, "grad_accumulation_factor": 2},
    "together": {"kind": Together},
    "together-window": {"kind": Together, "grad_accumulation_factor": 3},
    "resting": {"kind": Resting},
    "resting-window": {"kind": Resting, "grad_accumulation_factor": 2},
    "two-losses": {"kind": TwoLosses},
    "reentrant": {"kind": Reentrant},
    "reentrant-window": {"kind": Reentrant, "grad_accumulation_factor": 3},
    "joint": {"kind": Joint},
    "unfrozen-later": {"kind": UnfrozenLater},
    "small-buckets": {"kind": SmallBuckets},
    "small-buckets-window": {"kind": SmallBuckets, "grad_accumulation_factor": 3},
    "growing": {"kind": Growing},
    "growing-window": {"kind": Growing, "grad_accumulation_factor": 3},
    "exchanging": {"kind": Exchanging},
    "own-step": {"kind": OwnStep},
    "own-step-window": {"kind": OwnStep, "grad_accumulation_factor": 3},
    "choosy": {"kind": Choosy},
    "choosy-window": {"kind": Choosy, "grad_accumulation_factor": 2},
    "exchanging-window": {"kind": Exchanging, "grad_accumulation_factor": 3},
    "editing": {"kind": Editing},
    "catching": {"kind": Catching},
    "catching-window": {"kind": Catching, "grad_accumulation_factor": 3},
    "odd-layouts": {"kind": OddLayouts},
}
# Those that learn, and those that are applied to units and elements.
CLIPS = ("pattern", "gradual-linear", "value-auto", "auto", "median", "z", "adagc", "agc", "spam")
RUNS = [f"{name}-{precision}" for name in SETTINGS for precision in DTYPES]
RUNS += [f"{name}-fp64" for name in CLIPS]
RUNS += ["dataset-fp64", "dataset-window-fp64", "by-hand-fp64"]


def trained(run: str) -> Found:
    """Train as one of RUNS says, on as many processes as there are."""
    name, _, precision = run.rpartition("-")
    if name in SETTINGS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\w+.optimizers_step calls the step", UserWarning)
            return train(dtype=DTYPES[precision], **SETTINGS[name])
    if name in CLIPS:  # Made anew: a clipper with a history belongs to one run.
        return train(clip=KINDS[name](), max_grad_norm=None, grad_accumulation_factor=2)
    if name == "by-hand":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ByHand.fit_batch calls backward", UserWarning)
            return train(ByHand, data=batches(sizes=(4,)))
    window = {"dataset": 1, "dataset-window": 3}[name]
    loader = {"batch_size": 8 // distributed.world_size()}
    return train(data=Points(), loader=loader, grad_accumulation_factor=window)


def trained_one_by_one(runs: list[str]) -> dict[str, Found]:
    return {run: trained(run) for run in runs}


@pytest.fixture(scope="module")
def trained_by_two(two_ranks: TwoRanks) -> Callable[[str], list[Found]]:
    """Train one of RUNS on two ranks, in both precisions, once for all tests that read it."""

    @functools.cache
    def of_name(name: str) -> dict[str, list[Found]]:
        runs = [run for run in RUNS if run.rpartition("-")[0] == name]
        first, second = two_ranks(trained_one_by_one, runs)
        return {run: [first[run], second[run]] for run in runs}

    return lambda run: of_name(run.rpartition("-")[0])[run]


@pytest.mark.parametrize("run", RUNS)
def test_ends_as_one_process_on_the_joined_batch(
    trained_by_two: Callable[[str], list[Found]], run: str
) -> None:
    one, two = trained(run), equal_weights(trained_by_two(run))
    bound = 1e-12 if run.endswith("64") else 1e-6
    assert two["steps"] == one["steps"] > 2
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=bound)
    assert len(two["losses"]) == len(one["losses"]) == 2
    for ours, theirs in zip(two["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=bound)


@pytest.mark.parametrize("name", CLIPS)
def test_what_a_clipper_has_learnt_is_equal_on_all_ranks(
    trained_by_two: Callable[[str], list[Found]], name: str
) -> None:
    first, second = (found["clip"] for found in trained_by_two(f"{name}-fp64"))
    assert same(first, second)
    assert first.keys() == {"main"}


@pytest.mark.parametrize("run", RUNS)
def test_what_no_loss_reaches_does_not_move(
    trained_by_two: Callable[[str], list[Found]], run: str
) -> None:
    torch.manual_seed(10)
    start = make().modules.never.weight
    for found in trained_by_two(run):
        torch.testing.assert_close(found["never"], start.to(found["never"].dtype), rtol=0, atol=0)


# --- what is not finite --------------------------------------------------------------------------


class Poisoned(Line):
    """On rank 1 some batches have a loss or a gradient that is not finite."""

    kind = "loss"
    value = math.nan
    bad: tuple[int, ...] = (4,)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.reports: list[StepReport] = []

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        if self.step == self.first:
            self.before = picture(self)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == self.first + self.options.grad_accumulation_factor - 1:
            self.after = picture(self)

    @property
    def first(self) -> int:
        """The first batch of the window with the first bad one."""
        size = self.options.grad_accumulation_factor
        return (self.bad[0] - 1) // size * size + 1

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
        loss = super().compute_objectives(predictions, batch, stage)
        loss = loss * (1e-2 if self.options.precision == "fp16" else 1.0)  # For its first scale.
        if self.step in self.bad and distributed.rank() == 1:
            return loss + self.poison()
        return loss

    def poison(self) -> Any:
        return self.value if self.kind == "loss" else poison(self.modules.net[0].weight, self.value)

    def optimize(self, loss: Any, name: str | None = None, **named: Any) -> StepReport:
        self.reports.append(super().optimize(loss, name, **named))
        return self.reports[-1]

    def batch_ids(self, batch: Any) -> list[str]:
        return [f"rank {distributed.rank()} batch {self.step}"]

    def outcomes(self) -> Counter[str]:
        return Counter(report.outcome for report in self.reports)


class PoisonedPlayers(Poisoned, Players):
    """The second of two players is poisoned; the first goes on."""

    def fit_batch(self, batch: Any) -> dict[str, Tensor]:
        self.on_fit_batch_start(batch, True)
        result = Players.fit_batch(self, batch)
        self.on_fit_batch_end(batch, None, None, True)
        return result

    def optimize(self, loss: Any, name: str | None = None, **named: Any) -> StepReport:
        if name == "g" and self.step in self.bad and distributed.rank() == 1:
            loss = loss + self.poison()
        return super().optimize(loss, name, **named)


def picture(brain: Any) -> Found:
    """Copy what a skipped step must leave as it was."""
    return copy.deepcopy(
        {
            "modules": dict(brain.modules.state_dict()),
            "trainable": {name: p.requires_grad for name, p in brain.modules.named_parameters()},
            "updates": {name: update_state(u) for name, u in brain.updates.items()},
            "average": state_of(ema_of(brain)),
            "step": brain.optimizer_step,
        }
    )


SKIPS: dict[str, dict[str, Any]] = {
    "loss-nan": {},
    "loss-inf": {"value": math.inf},
    "element-nan": {"kind": "gradient"},
    "element-inf": {"kind": "gradient", "value": math.inf},
    "loss-in-window": {"grad_accumulation_factor": 3},
    "element-in-window": {"kind": "gradient", "grad_accumulation_factor": 3},
    "window-of-players": {"players": True, "grad_accumulation_factor": 3, "kind": "gradient"},
    "player-loss": {"players": True},
    "player-element": {"players": True, "kind": "gradient"},
}


def poisoned(
    bad: tuple[int, ...], players: bool = False, kind: str = "loss", value: float = math.nan,
    **options: Any,
) -> Any:  # fmt: skip
    """Return a Brain with those batches bad."""
    brain = make(PoisonedPlayers if players else Poisoned, ema_decay=0.9, **options)
    brain.bad, brain.kind, brain.value = bad, kind, value
    return brain


def skip(name: str) -> Found:
    brain = poisoned((5,), **SKIPS[name])
    brain.fit(range(1, 2), batches())
    impatient = poisoned((5,), **SKIPS[name], nonfinite_patience=0)
    try:
        impatient.fit(range(1, 2), batches())
        message = ""
    except NonFiniteError as error:
        message = str(error)
    stepped = [(r.loss, r.weight) for r in brain.reports if r.outcome == "stepped"]
    return {
        "before": brain.before, "after": brain.after, "weights": weights(brain),
        "outcomes": dict(brain.outcomes()), "finite": bool(weights(brain).isfinite().all()),
        "loss": brain.losses[0], "stepped": stepped, "message": message,
    }  # fmt: skip


@pytest.mark.parametrize("name", SKIPS)
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(two_ranks: TwoRanks, name: str) -> None:
    ranks = two_ranks(skip, name)
    both = equal_weights(ranks)
    for found in ranks:
        before, after = found["before"], found["after"]
        assert found["outcomes"].get("skipped") == 1
        assert "overflowed" not in found["outcomes"]
        assert found["message"] == both["message"]
        assert "were not finite 1 times in epoch 1 (nonfinite_patience is 0)" in found["message"]
        assert found["finite"]
        if SKIPS[name].get("players"):  # The other player has gone on.
            assert after["updates"]["d"]["optimizer"]["state"][0]["step"] == (
                1 + before["updates"]["d"]["optimizer"]["state"].get(0, {"step": 0})["step"]
            )
            assert not same(before["modules"]["branch.weight"], after["modules"]["branch.weight"])
            assert same(before["updates"]["g"], after["updates"]["g"])
            parts = [part for part in before["modules"] if not part.startswith("branch")]
            assert len(parts) == 6
            assert all(same(before["modules"][part], after["modules"][part]) for part in parts)
        else:
            changed = [key for key in before if not same(before[key], after[key])]
            assert changed == []
            # The skipped loss is in no average.
            total = math.fsum(loss * weight for loss, weight in found["stepped"])
            mean = total / math.fsum(weight for _, weight in found["stepped"])
            assert found["loss"] == pytest.approx(mean, rel=1e-14)
    for moment in ("before", "after"):
        for part in ("modules", "updates", "average"):
            assert same(ranks[0][moment][part], ranks[1][moment][part])


class Remembering(Line):
    """Remembers the loss of each batch; one on rank 1 is not finite."""

    what = "report"

    def fit_batch(self, batch: Any) -> Any:
        loss = self.compute_objectives(self.compute_forward(batch, Stage.TRAIN), batch, Stage.TRAIN)
        report = self.optimize(
            loss * math.nan if self.step == 5 and distributed.rank() == 1 else loss,
            last=self.is_last_batch,
        )
        vars(self).setdefault("seen", []).append((self.step, loss.item(), len(batch["y"])))
        return {"report": report, "scalar": loss.detach(), "dict": {"a": loss.detach()}}[self.what]


def average_beside_a_skipped_window(what: str) -> Found:
    brain = make(Remembering, grad_accumulation_factor=3)
    brain.what = what
    brain.fit(range(1, 2), batches())
    loss = brain.losses[0]
    seen = [each for rank in distributed.all_gather_json(brain.seen) for each in rank]
    kept = [(value, weight) for step, value, weight in seen if step not in (4, 5, 6)]
    weight = sum(weight for _, weight in kept)
    return {
        "average": loss["a"] if isinstance(loss, dict) else loss,
        "expected": sum(value * weight for value, weight in kept) / weight,
        "batches": len(seen),
    }


@pytest.mark.parametrize("what", ["report", "scalar", "dict"])
def test_no_batch_of_a_window_that_both_skip_is_in_the_average(
    two_ranks: TwoRanks, what: str
) -> None:
    for found in two_ranks(average_beside_a_skipped_window, what):
        assert found["average"] == pytest.approx(found["expected"], rel=1e-9)
        assert found["batches"] == 2 * ROUNDS


def run_out_of_patience() -> Found:
    brain = poisoned((3, 4, 5, 6, 7), nonfinite_patience=2)
    started = time.monotonic()
    try:
        brain.fit(range(1, 2), batches())
    except NonFiniteError as error:
        return {
            "message": str(error), "seconds": time.monotonic() - started, "step": brain.step,
            "weights": weights(brain),
        }  # fmt: skip
    return {}


def test_patience_ends_with_the_same_sentence_on_both(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(run_out_of_patience)
    equal_weights(ranks)
    assert ranks[0]["message"] == ranks[1]["message"]
    assert ranks[0]["message"].startswith(
        "Loss or gradients were not finite 3 times in epoch 1 (nonfinite_patience is 2); the last "
        "time in batch 5, optimizer 'main' (rank 0 batch 5, rank 1 batch 5);"
    )
    for found in ranks:
        assert found["seconds"] < 5
        assert found["step"] == 5
        assert found["weights"].isfinite().all()


def mask() -> Found:
    brain = poisoned((5,), kind="gradient", skip_nonfinite_grads=True)
    brain.fit(range(1, 2), batches())
    moved = {
        name: not torch.equal(tensor, brain.after["modules"][name])
        for name, tensor in brain.before["modules"].items()
    }
    return {"moved": moved, "weights": weights(brain), "steps": brain.optimizer_step}


def test_masked_gradients_are_the_same_on_both(two_ranks: TwoRanks) -> None:
    both = equal_weights(two_ranks(mask))
    assert both["steps"] == ROUNDS
    names = {"net.0.weight": False, "net.0.bias": True, "net.2.weight": True, "net.2.bias": True,
             "never.weight": False, "never.bias": False}  # fmt: skip
    assert {name: both["moved"][name] for name in names} == names


def overflow() -> Found:
    """An overflow spends no patience, of which there is none."""
    brain = poisoned((2,), kind="gradient", value=math.inf, dtype=torch.float32,
                     precision="fp16", nonfinite_patience=0)  # fmt: skip
    brain.fit(range(1, 2), batches(torch.float32))
    return {
        "scale": brain.updates["main"].scaler.get_scale(), "outcomes": dict(brain.outcomes()),
        "weights": weights(brain), "schedule": brain.updates["main"].schedule.last_epoch,
        "steps": brain.optimizer_step,
    }  # fmt: skip


def test_the_fp16_scale_is_the_same_on_both(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(overflow)
    both = equal_weights(ranks)
    for found in ranks:
        assert found["outcomes"] == {"stepped": ROUNDS - 1, "overflowed": 1}
        assert found["scale"] == 32768.0
    assert both["steps"] == both["schedule"] == ROUNDS - 1


# --- replicas that differ ------------------------------------------------------------------------


class Drifting(Line):
    """On rank 1 one element becomes the next larger number, without an optimizer."""

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.step == 3 and distributed.rank() == 1:
            element = self.modules.net[2].weight.data[0, 1]
            element.copy_(torch.nextafter(element, element.new_tensor(math.inf)))


def drift(every: int, dtype: str) -> Found:
    brain = make(Drifting, getattr(torch, dtype), drift_check_every=every)
    try:
        brain.fit(range(1, 2), batches(getattr(torch, dtype)))
    except DriftError as error:
        return {"message": str(error), "step": brain.step}
    return {"message": "", "step": brain.step}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("every", "found_at"), [(1, 3), (3, 3), (5, 5), (0, None)])
def test_a_rank_that_drifts_by_one_bit_is_found_at_the_next_check(
    two_ranks: TwoRanks, every: int, found_at: int | None, dtype: str
) -> None:
    for found in two_ranks(drift, every, dtype):
        if found_at is None:
            assert found == {"message": "", "step": ROUNDS}
            continue
        assert found["step"] == found_at
        assert found["message"].startswith(
            f"epoch 1, batch {found_at}: the ranks have different weights: net."
        )
        assert "Something moved them on one rank alone" in found["message"]


class Normed(Line):
    """With running statistics, which differ between ranks within an epoch, and a constant."""

    what = ""

    def __init__(self, modules: Any, *arguments: Any, **named: Any) -> None:
        modules["net"].insert(1, nn.BatchNorm1d(4))
        modules["net"].register_buffer("scale", torch.ones(5))
        modules["net"].register_buffer("seen", torch.zeros(()))
        super().__init__(modules, *arguments, **named)

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        if stage is Stage.TRAIN:
            self.modules.net.seen += batch["x"].sum()  # Each rank sees its own.
        return super().compute_forward(batch, stage)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if self.epoch == 2 and self.step == 3 and distributed.rank() == 1:
            if self.what == "buffer":
                self.modules.net.scale[2] *= 1 + 2e-7
                self.modules.net.scale[3] /= 1 + 2e-7
            elif self.what == "state":
                for state in self.updates["main"].optimizer.state.values():
                    moment = next(v for v in state.values() if isinstance(v, Tensor) and v.dim())
                    moment.reshape(-1)[0] += 1.0


def drift_beside(what: str) -> str:
    brain = make(Normed, torch.float32, drift_check_every=1)
    brain.what = what
    data = [each for each in batches(torch.float32) if len(each["x"]) > 1][:8]
    try:
        brain.fit(range(1, 4), data)
    except DriftError as error:
        return str(error)
    return f"epoch {brain.epoch}"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("", "epoch 3"),
        ("buffer", "epoch 2, batch 3: the ranks have different buffers: net.scale. Something"),
        ("state", "epoch 2, batch 3: the ranks have different optimizer states: main: "),
    ],
)
def test_constant_buffers_and_moments_are_compared_and_running_statistics_are_not(
    two_ranks: TwoRanks, what: str, said: str
) -> None:
    for found in two_ranks(drift_beside, what):
        assert found.startswith(said)


# --- stopping and saving -------------------------------------------------------------------------


def mean_of(rank: int) -> float:
    """Return a metric that is gathered before it is returned."""
    mean = Mean()
    mean.update(float(rank), weight=1.0 + rank)
    value = mean.reduce().value()
    assert isinstance(value, float)
    return value


class OwnMetric(Line):
    """Returns a metric that each rank has worked out from its own part alone."""

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        rank = distributed.rank()
        return {"own": float(epoch or 0) * (1 - 2 * rank), "fair": mean_of(rank)}


def stop_early() -> Found:
    stop = EarlyStopping("own", mode="max", patience=2)  # On rank 1 it falls with each epoch.
    brain = make(OwnMetric, hparams={"early_stopping": stop})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        brain.fit(range(1, 6), batches())
    return {
        "epoch": brain.epoch, "weights": weights(brain), "best": stop.best,
        "warnings": [str(each.message) for each in caught],
    }  # fmt: skip


def test_ranks_stop_early_together(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(stop_early)
    equal_weights(ranks)
    for found in ranks:
        assert found["epoch"] == 5  # On rank 1 alone it would have been 3.
        assert found["best"] == 5.0
        (said, *more) = found["warnings"]
        assert said.startswith("on_stage_end returned another 'own' on each rank: every rank sees")
        assert set(more) <= {said}


class LateClock(Line):
    """On rank 1 two hours pass before the first batch."""

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        if self.step == 1 and distributed.rank() == 1:
            clock = time.monotonic
            time.monotonic = lambda: clock() + 7200


def reach_limits(folder: str) -> Found:
    brain = make(folder=Path(folder, "steps"), optimizer_step_limit=10, checkpoint_every_steps=3)
    brain.fit(range(1, 9), batches())
    late = make(LateClock, folder=Path(folder, "clock"), checkpoint_every_minutes=60)
    late.fit(range(1, 2), batches())
    return {
        "steps": brain.optimizer_step, "weights": weights(brain),
        "names": sorted(each.name for each in brain.checkpointer.list_checkpoints()),
        "clock": sorted(each.name for each in late.checkpointer.list_checkpoints()),
    }  # fmt: skip


def test_limits_and_saves_are_agreed(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """A limit of steps, saves by steps, and saves by a clock that is late on one rank only."""
    ranks = two_ranks(reach_limits, tmp_path)
    equal_weights(ranks)
    for found in ranks:
        assert found["steps"] == 10
        # The last two are of one step: where the limit came, and the end of that epoch.
        assert found["names"] == [
            "step-00000003", "step-00000006", "step-00000007", "step-00000010", "step-00000010-2",
        ]  # fmt: skip
        assert found["clock"] == ["step-00000001", "step-00000007"]


# --- evaluation ----------------------------------------------------------------------------------


class Reader(Line):
    """Notes which items it evaluates."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.ids: list[str] = []

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        self.ids += batch["id"]
        return super().evaluate_batch(batch, stage)

    def on_stage_end(self, stage: Stage, stage_loss: Any, epoch: int | None = None) -> Any:
        everyone = distributed.all_gather_json(self.ids)
        return {"items": sum(map(len, everyone)), "distinct": len(set(sum(everyone, [])))}


def evaluate(name: str) -> Found:
    """Evaluate data that does not divide by ranks."""
    few = [{**b, "id": [f"{i}-{k}" for k in range(len(b["x"]))]} for i, b in enumerate(batches())]
    data, loader = {
        "dataset": (Points(items=11), {"batch_size": 2}),
        "one-batch": (Points(items=3), {"batch_size": 8}),
        "list": (few[:5], None),
    }[name]
    brain = make(Reader)
    for p in brain.modules.parameters():
        nn.init.constant_(p, 0.3)
    before = torch.get_rng_state()
    loss = brain.evaluate(data, test_loader_kwargs=loader)
    return {
        "loss": loss, "ids": brain.ids, **brain.test_metrics,
        "same_rng": torch.equal(before, torch.get_rng_state()),
        "training": brain.modules.training,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "items"), [("dataset", 11), ("one-batch", 3), ("list", 15)])
def test_every_item_is_evaluated_once(two_ranks: TwoRanks, name: str, items: int) -> None:
    ranks, alone = two_ranks(evaluate, name), evaluate(name)
    for found in ranks:
        assert (found["items"], found["distinct"]) == (items, items)
        assert found["loss"] == ranks[0]["loss"] == pytest.approx(alone["loss"], rel=1e-14)
        assert found["same_rng"]
        assert found["training"]
    assert sorted(ranks[0]["ids"] + ranks[1]["ids"]) == sorted(alone["ids"])


class Normalized(Line):
    """With a batch norm, whose running statistics are each rank's own."""

    def compute_forward(self, batch: Any, stage: Stage) -> Tensor:
        return super().compute_forward({**batch, "x": self.modules.norm(batch["x"])}, stage)


def run_batch_norm() -> Found:
    brain = make(Normalized, ema_decay=0.9)
    brain.modules["norm"] = nn.BatchNorm1d(3).double()
    brain.fit(range(1, 2), batches(sizes=(4,)), batches(sizes=(3,)))
    average = ema_of(brain).state_dict()["average"]
    return {
        "mean": brain.modules.norm.running_mean.clone(), "average": average["norm.running_mean"],
        "losses": brain.losses, "weights": weights(brain),
    }  # fmt: skip


def test_batch_statistics_are_rank_zeros_after_an_epoch(two_ranks: TwoRanks) -> None:
    ranks = two_ranks(run_batch_norm)
    both = equal_weights(ranks)
    for found in ranks:
        assert torch.equal(found["mean"], both["mean"])
        assert torch.equal(found["average"], both["mean"])
        assert found["losses"] == both["losses"]


def evaluate_the_best(folder: str) -> Found:
    brain = make(Reader, folder=Path(folder))
    parts = [{**b, "id": [f"{i}"] * len(b["x"])} for i, b in enumerate(batches())]
    brain.fit(range(1, 4), parts, parts[:5])
    before = weights(brain)
    tested: list[Tensor] = []
    brain.on_evaluate_start = lambda **_: tested.append(weights(brain))
    loss = brain.evaluate(parts[:5], max_key="loss")
    losses = [each.meta["loss"] for each in brain.checkpointer.list_checkpoints()]
    return {
        "weights": weights(brain), "unchanged": torch.equal(before, weights(brain)),
        "tested": tested[0], "loss": loss, "losses": losses,
    }  # fmt: skip


def test_both_test_the_best_weights(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Both evaluate the same checkpoint, and have their own weights again."""
    ranks = two_ranks(evaluate_the_best, tmp_path)
    both = equal_weights(ranks)
    assert both["loss"] == max(both["losses"]) > min(both["losses"])
    for found in ranks:
        assert found["unchanged"]
        assert torch.equal(found["tested"], both["tested"])
        assert not torch.equal(found["tested"], both["weights"])
        assert (found["loss"], found["losses"]) == (both["loss"], both["losses"])


# --- resuming ------------------------------------------------------------------------------------


def even() -> resuming.Sentences:
    """Return items enough for each rank to have several in a batch, as batch statistics need."""
    return resuming.Sentences(44)


RESUMED = {
    "default": (resuming.Setting(window=4, data=even, epochs=lambda: range(1, 3)), (3, 6, 8)),
    "players": (
        resuming.Setting(
            resuming.Adversary, window=2, precision="bf16", data=even, epochs=lambda: range(1, 3)
        ),
        (3, 6),
    ),
    "workers": (resuming.Setting(workers=1, data=even, epochs=lambda: range(1, 2)), (2,)),
    "list": (
        resuming.Setting(
            precision="fp16", schedule="newbob", data=resuming.batches, loader=None,
            epochs=lambda: range(1, 3),
        ),
        (2, 7),
    ),
}  # fmt: skip


def straight_and_resumed(folder: str, name: str) -> Found:
    straight, found = resuming.on_all_ranks(RESUMED[name][0], Path(folder), RESUMED[name][1])
    return {"found": found, "weights": weights(straight), "trace": straight.test.trace}


@pytest.mark.parametrize("name", RESUMED)
def test_two_go_on_exactly(two_ranks: TwoRanks, tmp_path: Path, name: str) -> None:
    ranks = two_ranks(straight_and_resumed, tmp_path, name)
    equal_weights(ranks)
    for found in ranks:
        assert found["found"] == {stop: [] for stop in RESUMED[name][1]}
    traces = [found["trace"] for found in ranks]
    assert len(traces[0]) == len(traces[1])
    # Each has its own data and its own random numbers.
    assert all(a[2] != b[2] and a[4] != b[4] for a, b in zip(*traces, strict=True))


def interrupt(folder: str, moment: str) -> Found:
    """Rank 1 gets a SIGTERM."""
    signals.install()
    setting = resuming.Setting(data=even, epochs=lambda: range(1, 3))
    straight = resuming.run(setting, Path(folder, "straight"), (), resuming.Setting.fit)
    brain = setting.make(Path(folder, "stopped"))
    calls = iter(range(1000))

    def kill(brain: resuming.Learner) -> None:
        if next(calls) == (moment == "training") and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(brain.test, {"training": "after", "validation": "valid"}[moment], kill)
    try:
        setting.fit(brain)
        code = 0
    except SystemExit as stop:
        code = int(str(stop.code))
    seen = len(brain.test.trace)
    signals.reset()
    saved = brain.checkpointer.list_checkpoints()
    resumed = setting.fit(setting.make(Path(folder, "stopped"), seed=50 + distributed.rank()))
    found = resuming.differing(straight, resumed, seen)
    return {"code": code, "found": found, "saved": len(saved), "seen": seen}


# In training it is told after its vote of batch 2, which travels with the gradients, has left.
@pytest.mark.parametrize(("moment", "seen"), [("training", 3), ("validation", 6)])
def test_one_that_is_told_to_stop_takes_the_other_along(
    two_ranks: TwoRanks, tmp_path: Path, moment: str, seen: int
) -> None:
    for found in two_ranks(interrupt, tmp_path, moment):
        assert found == {"code": 143, "saved": 1, "seen": seen, "found": []}


def spoil_the_checkpoint_of_rank_1(folder: str) -> Found:
    setting = resuming.Setting(epochs=lambda: range(1, 2), data=resuming.batches, loader=None)
    resuming.run(setting, Path(folder), (), resuming.Setting.fit)
    if distributed.is_main():
        (found,) = Path(folder).glob("saved/*/rank-1.pt")
        shutil.copy(found.with_name("rank-0.pt"), found)
    distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            setting.fit(setting.make(Path(folder)))
        except ValueError as error:
            return {"error": str(error), "warnings": [str(each.message) for each in caught]}
    return {}


def test_what_only_one_cannot_read_neither_uses(two_ranks: TwoRanks, tmp_path: Path) -> None:
    ranks = two_ranks(spoil_the_checkpoint_of_rank_1, tmp_path)
    for found in ranks:
        assert "every checkpoint in" in found["error"]
        assert "on rank 1: " in found["error"] or "rank-1.pt is broken" in found["error"]
    assert [len(found["warnings"]) for found in ranks] == [1, 0]


# --- another number of processes -----------------------------------------------------------------

ONE = resuming.Setting(data=lambda: resuming.Sentences(48), epochs=lambda: range(1, 2))


def resume_what_one_began(folder: str) -> Found:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        brain = ONE.fit(ONE.make(Path(folder), seed=distributed.rank()))
    return {
        "ids": [id for entry in brain.test.trace for id in entry[2]],
        "steps": [entry[1] for entry in brain.test.trace],
        "weights": weights(brain),
    }


def test_two_go_on_where_one_was_stopped(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """With a batch more than needed rather than with one too few: five do not divide by two."""
    one = resuming.run(ONE, tmp_path / "one", (5,), resuming.Setting.fit)
    resuming.stopped(tmp_path / "one", "stop-5", tmp_path / "two")
    ranks = two_ranks(resume_what_one_began, tmp_path / "two")
    equal_weights(ranks)
    seen = [id for entry in one.test.trace[:4] for id in entry[2]]
    seen += [id for found in ranks for id in found["ids"]]
    assert sorted(seen) == sorted(f"s{i}" for i in range(48))
    assert [found["steps"] for found in ranks] == [[3, 4, 5, 6]] * 2


def stop_after_three(folder: str) -> Found:
    setting, _ = RESUMED["default"]
    brain = resuming.run(setting, Path(folder), (3,), resuming.Setting.fit)
    return {"trace": brain.test.trace}


def test_one_goes_on_where_two_were_stopped(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """With the same weights and optimizer, and with what is left of the epoch."""
    two = [found["trace"] for found in two_ranks(stop_after_three, tmp_path / "two")]
    setting, _ = RESUMED["default"]
    resuming.stopped(tmp_path / "two", "stop-3", tmp_path / "one")
    brain = setting.make(tmp_path / "one", seed=9)
    with pytest.warns(UserWarning, match="was saved by 2 processes and is restored by 1"):
        setting.fit(brain)
    assert [trace[2][:2] for trace in two] == [(1, 3)] * 2
    assert brain.test.trace[0][:2] == (1, 7)  # Three batches of each of two are six of one.
    before = [id for trace in two for t in trace[:3] for id in t[2]]
    after = [id for t in brain.test.trace if t[0] == 1 for id in t[2]]
    assert sorted(before + after) == sorted(f"s{i}" for i in range(44))


# Prints how many threads the process group has, and how many are left at its end.
ENDING = """
from pathlib import Path
from trainer import distributed

def threads():
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("runloop" in name for name in names)

distributed.start("cpu")
import torch
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # The first optimizer imports more of torch.
distributed.barrier()
before = threads()
distributed.stop()
print(before, threads())
"""


def leave_the_group() -> Found:
    counted: dict[str, Any] = {}
    brain = make(Line)
    brain.fit([1], batches())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(ENDING, counted)  # The group has been joined.
    return {"steps": brain.optimizer_step, "threads": printed.getvalue()}


@pytest.mark.skipif(
    sys.platform != "linux" or torch.__version__ < (2, 14), reason="finds threads by their names"
)
def test_no_thread_of_the_group_outlives_it(two_ranks: TwoRanks) -> None:
    """One that meets the end of the interpreter would abort a process whose run has succeeded."""
    ranks = two_ranks(leave_the_group)
    assert all(found["steps"] for found in ranks)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    alone = subprocess.run(
        [sys.executable, "-c", ENDING], env={**os.environ, **place}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    for printed in (*(found["threads"] for found in ranks), alone.stdout):
        before, after = map(int, printed.split())
        assert before > after == 0
