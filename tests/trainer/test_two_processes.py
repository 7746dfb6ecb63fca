"""Two processes end where one does, decide as one, and go on where they were stopped.

One launch goes through all of it (see `two_processes`); each test here asserts one property.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..processes import launch
from . import resuming, two_processes
from .small import same

Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    resuming.run(two_processes.ONE, folder / "one", (5,), resuming.Setting.fit)
    try:
        launch(folder, "-m", two_processes.__name__)
    except RuntimeError as error:  # What was found until then is looked at all the same.
        (folder / "error-launch.txt").write_text(str(error))
    return folder


@pytest.fixture
def results(folder: Path) -> Results:
    """What a property gave on each of the two ranks."""

    def read(name: str) -> list[dict[str, Any]]:
        files = [folder / f"{name}-{rank}.pt" for rank in range(2)]
        errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
        assert all(file.exists() for file in files), f"{name} was not reached: " + "\n".join(errors)
        return [torch.load(file, weights_only=True) for file in files]

    return read


def only(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What both ranks have alike, to the bit."""
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    return ranks[0]


# -------------------------------------------------------------------------------------- the verbs


def test_verbs(results: Results) -> None:
    for rank, found in enumerate(results("verbs")):
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
        assert found["failures"] == {
            "one": ("RuntimeError: rank 1 failed (OSError: disk)", "OSError: disk")[rank],
            "shared": ("ValueError: on rank 1: ValueError: lost", "ValueError: lost")[rank],
            "both": ("ValueError: a", "ValueError: b")[rank],
            "worse": ("RuntimeError: rank 1 failed (OSError: disk)", "OSError: disk")[rank],
            "none": "none",
        }


# ------------------------------------------------------------------------- the same as one process


RUNS = [f"{name}-{precision}" for name in two_processes.SAME for precision in ("fp64", "fp32")]
RUNS += [f"{name}-fp64" for name in two_processes.CLIPS]
RUNS += ["dataset-fp64", "dataset-window-fp64", "by-hand-fp64"]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same runs on one process, on the joined batches."""
    return two_processes.same_as_one()


@pytest.mark.parametrize("name", RUNS)
def test_ends_as_one_process_on_the_joined_batch(
    results: Results, alone: dict[str, Any], name: str
) -> None:
    one = alone[name]
    two = only([ranks[name] for ranks in results("same_as_one")])
    bound = 1e-12 if name.endswith("64") else 1e-6
    assert two["steps"] == one["steps"] > 2
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=bound)
    assert len(two["losses"]) == len(one["losses"]) == 2
    for ours, theirs in zip(two["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=bound)


@pytest.mark.parametrize("name", two_processes.CLIPS)
def test_what_a_clipper_has_learnt_is_equal_on_all_ranks(results: Results, name: str) -> None:
    first, second = (ranks[f"{name}-fp64"]["clip"] for ranks in results("same_as_one"))
    assert same(first, second)
    assert first.keys() == {"main"}


@pytest.mark.parametrize("name", RUNS)
def test_what_no_loss_reaches_does_not_move(results: Results, name: str) -> None:
    torch.manual_seed(10)
    start = two_processes.make().modules.never.weight
    for ranks in results("same_as_one"):
        torch.testing.assert_close(
            ranks[name]["never"], start.to(ranks[name]["never"].dtype), rtol=0, atol=0
        )


# ----------------------------------------------------------------------------------- agreed skips


@pytest.mark.parametrize("name", two_processes.SKIPS)
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(results: Results, name: str) -> None:
    ranks = [each[name] for each in results("skips")]
    both = only(ranks)
    settings = two_processes.SKIPS[name]
    for found in ranks:
        before, after = found["before"], found["after"]
        assert found["counts"] == {"skipped": 1, "overflowed": 0}
        assert found["patience"] == 1
        assert found["finite"]
        if settings.get("players"):  # The other player has gone on.
            assert after["updates"]["d"]["optimizer"]["state"][0]["step"] == (
                1 + before["updates"]["d"]["optimizer"]["state"].get(0, {"step": 0})["step"]
            )
            assert not same(before["modules"]["branch.weight"], after["modules"]["branch.weight"])
            assert same(before["updates"]["g"], after["updates"]["g"])
            parts = [name for name in before["modules"] if not name.startswith("branch")]
            assert all(same(before["modules"][part], after["modules"][part]) for part in parts)
        else:
            changed = [key for key in before if not same(before[key], after[key])]
            assert changed == []
    for moment in ("before", "after"):
        for part in ("modules", "updates", "weight_average"):
            assert same(ranks[0][moment][part], ranks[1][moment][part])
    assert both["weights"].isfinite().all()


def test_patience_ends_with_the_same_sentence_on_both(results: Results) -> None:
    ranks = results("patience")
    only(ranks)
    assert ranks[0]["message"] == ranks[1]["message"]
    assert ranks[0]["message"].startswith(
        "Loss or gradients were not finite 3 times in epoch 1 (nonfinite_patience is 2); the last "
        "time at step 5, optimizer 'main', batch rank 0 batch 5, rank 1 batch 5."
    )
    for found in ranks:
        assert found["seconds"] < 5
        assert found["step"] == 5
        assert found["weights"].isfinite().all()


def test_masked_gradients_are_the_same_on_both(results: Results) -> None:
    both = only(results("masked"))
    assert both["steps"] == two_processes.ROUNDS
    names = {"net.0.weight": False, "net.0.bias": True, "net.2.weight": True, "net.2.bias": True,
             "never.weight": False, "never.bias": False}  # fmt: skip
    assert {name: both["moved"][name] for name in names} == names


def test_the_fp16_scale_is_the_same_on_both(results: Results) -> None:
    ranks = results("half")
    both = only(ranks)
    for found in ranks:
        assert found["counts"] == {"skipped": 0, "overflowed": 1}
        assert found["scale"] == 32768.0
        assert found["patience"] == 0
    assert both["steps"] == both["schedule"] == two_processes.ROUNDS - 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("every", "found_at"), [(1, 3), (3, 3), (5, 5), (0, None)])
def test_a_rank_that_drifts_by_one_bit_is_found_at_the_next_check(
    results: Results, every: int, found_at: int | None, dtype: str
) -> None:
    for found in results("drifting"):
        message, step = found[f"{every}-{dtype}"]["message"], found[f"{every}-{dtype}"]["step"]
        if found_at is None:
            assert (message, step) == ("", two_processes.ROUNDS)
            continue
        assert step == found_at
        assert message.startswith(
            f"epoch 1, batch {found_at}: the ranks have different weights: net."
        )
        assert "Something moved them on one rank alone" in message


# ------------------------------------------------------------------------- what decides the run


def test_ranks_stop_early_together(results: Results) -> None:
    ranks = results("stopping")
    only(ranks)
    for found in ranks:
        assert found["epoch"] == 5  # On rank 1 alone it would have been 3.
        assert found["best"] == 5.0
        (said, *more) = found["warnings"]
        assert said.startswith("on_stage_end returned another 'own' on each rank: every rank sees")
        assert set(more) <= {said}


def test_limits_and_saves_are_agreed(results: Results) -> None:
    ranks = results("limits")
    only(ranks)
    for found in ranks:
        assert found["steps"] == 10
        # The last two are of one step: where the limit came, and the end of that epoch.
        assert found["names"] == [
            "step-00000003", "step-00000006", "step-00000007", "step-00000010", "step-00000010-2",
        ]  # fmt: skip
        assert found["clock"] == ["step-00000001", "step-00000007"]


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("name", "items"), [("dataset", 11), ("one-batch", 3), ("list", 15)])
def test_every_item_is_evaluated_once(results: Results, name: str, items: int) -> None:
    ranks = [each[name] for each in results("evaluations")]
    alone = two_processes.evaluations()[name]
    for found in ranks:
        assert (found["items"], found["distinct"]) == (items, items)
        assert found["loss"] == ranks[0]["loss"] == pytest.approx(alone["loss"], rel=1e-14)
        assert found["same_rng"]
        assert found["training"]
    assert sorted(ranks[0]["ids"] + ranks[1]["ids"]) == sorted(alone["ids"])


def test_batch_statistics_are_rank_zeros_after_an_epoch(results: Results) -> None:
    ranks = results("statistics")
    both = only(ranks)
    for found in ranks:
        assert torch.equal(found["mean"], both["mean"])
        assert torch.equal(found["average"], both["mean"])
        assert found["losses"] == both["losses"]


# --------------------------------------------------------------------------------- going on later


@pytest.mark.parametrize("name", two_processes.RESUMED)
def test_two_go_on_exactly(results: Results, name: str) -> None:
    ranks = [each[name] for each in results("resumptions")]
    only(ranks)
    stops = two_processes.RESUMED[name][1]
    for found in ranks:
        assert found["found"] == {stop: [] for stop in stops}
    traces = [found["trace"] for found in ranks]
    assert len(traces[0]) == len(traces[1])
    # Each has its own data and its own random numbers.
    assert all(a[2] != b[2] and a[4] != b[4] for a, b in zip(*traces, strict=True))


@pytest.mark.parametrize("moment", ["training", "validation"])
def test_one_that_is_told_to_stop_takes_the_other_along(results: Results, moment: str) -> None:
    for found in results("interruptions"):
        assert found[moment]["code"] == 143
        assert found[moment]["saved"] == 1
        assert found[moment]["seen"] == {"training": 2, "validation": 6}[moment]
        assert found[moment]["found"] == []


def test_what_only_one_cannot_read_neither_uses(results: Results) -> None:
    ranks = results("disagreements")
    for found in ranks:
        assert "every checkpoint in" in found["error"]
        assert "on rank 1: " in found["error"] or "rank-1.pt is broken" in found["error"]
    assert [len(found["warnings"]) for found in ranks] == [1, 0]


def test_two_go_on_where_one_was_stopped(results: Results, tmp_path: Path) -> None:
    """With a batch more than needed rather than with one too few: five do not divide by two."""
    ranks = results("widened")
    only(ranks)
    before = resuming.run(two_processes.ONE, tmp_path, (), resuming.Setting.fit).test.trace[:4]
    seen = [id for entry in before for id in entry[2]] + [
        id for each in ranks for id in each["ids"]
    ]
    assert sorted(seen) == sorted(f"s{i}" for i in range(48))
    assert [found["steps"] for found in ranks] == [[3, 4, 5, 6]] * 2


def test_both_test_the_best_weights(results: Results) -> None:
    ranks = results("tests_of_the_best")
    both = only(ranks)
    assert both["loss"] == max(both["losses"]) > min(both["losses"])
    for found in ranks:
        assert found["unchanged"]
        assert torch.equal(found["tested"], both["tested"])
        assert not torch.equal(found["tested"], both["weights"])
        assert (found["loss"], found["losses"]) == (both["loss"], both["losses"])


def test_one_goes_on_where_two_were_stopped(folder: Path, results: Results, tmp_path: Path) -> None:
    """With the same weights and optimizer, and with what is left of the epoch."""
    results("resumptions")
    setting, _ = two_processes.RESUMED["default"]
    resuming.stopped(folder / "resumptions" / "default", "stop-3", tmp_path)
    brain = setting.make(tmp_path, seed=9)
    seen: list[int] = []

    def look(brain: resuming.Learner) -> None:
        if not seen:
            saved = brain.checkpointer.read(checkpoint)["brain"]
            seen.append(brain.step)
            assert saved["position"]["step"] == 3

    brain.test.after = look
    (checkpoint,) = brain.checkpointer.list_checkpoints()
    with pytest.warns(UserWarning, match="was saved by 2 processes and is restored by 1"):
        setting.fit(brain)
    assert seen == [7]  # Three batches of each of two are six of one.
    two = [found["default"]["trace"] for found in results("resumptions")]
    before = [id for trace in two for t in trace[:3] for id in t[2]]
    after = [id for t in brain.test.trace if t[0] == 1 for id in t[2]]
    assert sorted(before + after) == sorted(f"s{i}" for i in range(44))
