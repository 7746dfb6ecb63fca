"""States are restored exactly, the right checkpoints stay, and errors say what is wrong."""

import itertools
import math
import os
import random
import re
import tracemalloc
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import BrokenCheckpoint, Checkpointer, storage

from .checkpoint_torture import Uniform


class Holder:
    """A recoverable that holds any state, and remembers what it was given back."""

    def __init__(self, state: Any = None) -> None:
        self.state: Any = {} if state is None else state
        self.loaded: list[Any] = []

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.loaded.append(state)


def make(folder: Path, **options: Any) -> Checkpointer:
    return Checkpointer(folder, recoverables={"brain": Uniform(1)}, **options)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not sync: crashes are tested in other files, and syncing only costs time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# What is saved comes back


def test_modules_and_optimizers_come_back_bit_for_bit(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return module, torch.optim.Adam(module.parameters(), lr=0.1)

    module, optimizer = build(0)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    saved = Checkpointer(tmp_path, recoverables={"model": module, "adam": optimizer})
    saved.save_checkpoint()

    other, adam = build(1)
    found = Checkpointer(tmp_path, recoverables={"model": other, "adam": adam})
    assert found.recover_if_possible() is not None
    assert module.state_dict().keys() == other.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert adam.state[two].keys() == optimizer.state[one].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, adam.state[two][key]), key
    assert adam.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_every_plain_value_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tensors": {"half": torch.ones(2, dtype=torch.bfloat16), 3: [torch.tensor(1j)]},
        "scalars": [1, 2.5, float("inf"), "text", True, None, (1, (2,)), {"a": {4: "b"}}, 2**70],
        "step": 7,
        "odd / key": {"weight": torch.arange(3)},
        "counter": torch.optim.lr_scheduler.MultiStepLR(
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]), [2, 2, 5]
        ).state_dict(),
    }
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": Holder(state)})
    saved = checkpointer.save_checkpoint()
    assert saved is not None
    back = checkpointer.read(saved)["brain"]
    assert back["scalars"] == state["scalars"]
    assert type(back["scalars"][6]) is tuple
    assert back["counter"] == state["counter"]
    assert back["step"] == 7
    assert torch.equal(back["tensors"]["half"], state["tensors"]["half"])
    assert back["tensors"]["half"].dtype is torch.bfloat16
    assert torch.equal(back["tensors"][3][0], torch.tensor(1j))
    assert torch.equal(back["odd / key"]["weight"], torch.arange(3))
    assert set(back) == set(state)


def test_a_folder_reads_like_its_content(tmp_path: Path) -> None:
    checkpointer = make(tmp_path / "checkpoints")
    saved = checkpointer.save_checkpoint({"optimizer_step": 123, "wer": 3.5, "epoch": 2})
    assert saved is not None
    assert saved.path == tmp_path / "checkpoints" / "step-00000123"
    assert names(saved.path) == [
        "brain.modules.pt", "brain.pt", "brain.updates.pt", "manifest.json", "rank-0.pt",
    ]  # fmt: skip
    assert (saved.step, saved.meta["wer"], saved.processes) == (123, 3.5, 1)
    assert '"wer": 3.5' in (saved.path / "manifest.json").read_text()
    assert checkpointer.find() == [saved]
    assert set(checkpointer.read(saved, ["brain"])["brain"]) == {"modules", "updates", "epoch"}
    with pytest.raises(ValueError, match=r"holds no head\.pt; it holds brain$"):
        checkpointer.read(saved, ["head"])


def test_meta_is_plain_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    meta = {"a": torch.tensor(2.5), "b": float("nan"), "c": [math.inf, True], "d": {"é": None}}
    saved = make(tmp_path).save_checkpoint(meta)
    assert saved is not None
    assert saved.meta == {"a": 2.5, "b": None, "c": [None, True], "d": {"é": None}}
    with pytest.raises(ValueError, match=r"meta\['x'\]\[1\] of a checkpoint is a set; it can hold"):
        make(tmp_path).save_checkpoint({"x": [1, {2}]})
    endless: list[Any] = []
    endless.append(endless)
    for value, said in (
        (endless, "nested too deeply"),
        ({1: 2, "1": 3}, "equal as text: .*1, '1'"),
    ):
        with pytest.raises(ValueError, match=said):
            make(tmp_path).save_checkpoint({"x": value})


@pytest.mark.parametrize(
    "value",
    [10**400, "caf\udce9.wav", reduce(lambda inner, _: [inner], range(60), 1.0), "x" * 2**24],
)
def test_meta_that_would_break_the_checkpoint_is_refused(tmp_path: Path, value: Any) -> None:
    keep = Checkpointer(tmp_path)
    for meta in ({"m": value}, {"m": {"by": [value]}}):
        with pytest.raises(ValueError, match="meta of a checkpoint cannot be read back: "):
            keep.save_checkpoint(meta)
    assert keep.find_checkpoint() is None


def test_saving_takes_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": Uniform(1, 4 << 20)})
    tracemalloc.start()
    checkpointer.save_checkpoint()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # bytes; the tensors have 64 MB


# Which ones stay


def expected(metas: list[dict[str, Any]], last: int, best: list[tuple[str, str, int]]) -> set[int]:
    kept = set(range(len(metas))[-last:])
    for metric, mode, n in best:
        candidates = [
            (each[metric] if mode == "min" else -each[metric], -index)
            for index, each in enumerate(metas)
            if math.isfinite(each.get(metric, math.nan))
        ]
        kept |= {-index for _, index in sorted(candidates)[:n]}
    return kept


@pytest.mark.parametrize(
    ("last", "best"),
    [
        (1, {}),
        (3, {"wer": "min"}),
        (1, {"wer": {"mode": "min", "n": 3}}),
        (2, {"accuracy": "max", "wer": {"mode": "min", "n": 2}, "absent": "min"}),
        (1, {"wer": "max", "accuracy": {"mode": "max", "n": 1}}),
    ],
)
def test_the_union_of_the_last_and_the_best_stays(
    tmp_path: Path, last: int, best: dict[str, Any]
) -> None:
    rules = [
        (metric, rule["mode"], rule["n"]) if isinstance(rule, dict) else (metric, rule, 1)
        for metric, rule in best.items()
    ]
    draw = random.Random(last)
    checkpointer = make(tmp_path, keep_last=last, keep_best=best)
    metas: list[dict[str, Any]] = []
    for index in range(20):
        values = [draw.randint(-3, 3), -math.inf, math.nan, draw.random()]
        meta = {name: draw.choice(values) for name in ("wer", "accuracy") if draw.random() < 0.8}
        metas.append(meta)
        checkpointer.save_and_keep_only({"optimizer_step": index, **meta})
        kept = {each.step for each in checkpointer.list_checkpoints()}
        # What was deleted before cannot come back: only survivors compete.
        survivors = expected(metas, last, rules)
        assert kept == survivors, index


def test_retention_reads_no_more_manifests_after_many_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make(tmp_path, keep_last=2, keep_best={"wer": "min"})
    read, counts = storage.read_manifest, []
    monkeypatch.setattr(
        storage, "read_manifest", lambda path: counts.__setitem__(-1, counts[-1] + 1) or read(path)
    )
    for index in range(25):
        counts.append(0)
        checkpointer.save_and_keep_only({"wer": -index})
    assert max(counts) == counts[5] == counts[-1] <= 6


def test_epoch_ends_and_saves_within_epochs_do_not_push_each_other_out(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    for step in range(6):
        end = step % 3 == 2
        checkpointer.save_and_keep_only({"optimizer_step": step}, end_of_epoch=end)
    assert [each.step for each in checkpointer.list_checkpoints()] == [5, 4]


def test_speechbrains_arguments_do_what_they_did(tmp_path: Path) -> None:
    checkpointer = Checkpointer(checkpoints_dir=tmp_path, recoverables={"brain": Uniform()})
    values = [(5.0, 0.1), (3.0, 0.9), (4.0, 0.2), (9.0, 0.3), (8.0, 0.4)]
    for step, (wer, accuracy) in enumerate(values):
        checkpointer.save_and_keep_only(
            meta={"step": step, "WER": wer, "ACC": accuracy}, min_keys=["WER"], max_keys=["ACC"]
        )
    assert [each.step for each in checkpointer.find_checkpoints()] == [4, 1]
    best = checkpointer.find_checkpoint(min_key="WER")
    assert best is not None
    assert best.step == 1
    checkpointer.save_and_keep_only({"step": 5, "WER": 7.0}, min_keys=["WER"], keep_recent=False)
    assert [each.step for each in checkpointer.list_checkpoints()] == [1]
    for step in range(6, 9):
        checkpointer.save_and_keep_only({"step": step}, num_to_keep=3)
    assert [each.step for each in checkpointer.find_checkpoints(max_num_checkpoints=2)] == [8, 7]
    assert len(checkpointer.list_checkpoints()) == 3


def test_a_save_never_deletes_the_last_checkpoint(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    for step in range(3):
        checkpointer.save_and_keep_only(
            {"step": step, "wer": math.nan}, min_keys=["wer"], keep_recent=False
        )
        assert [each.step for each in checkpointer.list_checkpoints()] == [step]


def test_a_named_checkpoint_stays_until_it_is_saved_again(tmp_path: Path) -> None:
    checkpointer = make(tmp_path)
    checkpointer.save_checkpoint({"wer": 1}, name="milestone")
    for step in range(3):
        checkpointer.save_and_keep_only({"step": step})
    assert names(tmp_path) == ["milestone", "step-00000002"]
    checkpointer.save_checkpoint({"wer": 2}, name="milestone")
    assert names(tmp_path) == ["milestone-2", "step-00000002"]
    assert checkpointer.find()[0].meta == {"wer": 2}
    checkpointer.save_checkpoint(name="milestone")
    assert names(tmp_path) == ["milestone", "step-00000002"]


def test_two_saves_at_one_step_do_not_collide(tmp_path: Path) -> None:
    checkpointer = make(tmp_path, keep_last=3)
    for _ in range(3):
        checkpointer.save_and_keep_only({"optimizer_step": 4})
    assert names(tmp_path) == ["step-00000004", "step-00000004-2", "step-00000004-3"]
    assert [each.name[13:] for each in checkpointer.find(n=3)] == ["-3", "-2", ""]


def test_the_newest_is_the_last_saved_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make(tmp_path, keep_last=3)
    checkpointer.save_and_keep_only({"step": 1})
    content = storage.manifest_content(checkpointer.find()[0])
    ahead = storage.encode_manifest({**content, "time": "2999-01-01T00:00:00+00:00"})
    (tmp_path / "step-00000001" / "manifest.json").write_bytes(ahead)
    checkpointer.save_and_keep_only({"step": 0})
    assert [each.step for each in checkpointer.find(n=None)] == [0, 1]


# Finding and recovering


def test_the_best_is_found_and_restored(tmp_path: Path) -> None:
    thing = Uniform()
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": thing})
    for thing.value, wer in enumerate([4.0, 2.0, math.nan, 3.0]):
        checkpointer.save_checkpoint({"wer": wer})
    checkpointer.save_checkpoint()
    assert [each.meta["wer"] for each in checkpointer.find(min_key="wer", n=None)] == [2, 3, 4]
    assert [each.meta["wer"] for each in checkpointer.find(max_key="wer", n=2)] == [4, 3]
    assert checkpointer.recover_if_possible(min_key="wer") is not None
    assert thing.value == 1
    assert checkpointer.recover_if_possible(max_key="wer") is not None
    assert thing.value == 0
    assert checkpointer.recover_if_possible() is not None
    assert thing.value == 3
    with pytest.warns(UserWarning, match=r"has a finite 'cer'; they have wer$"):
        assert checkpointer.recover_if_possible(min_key="cer") is None
    with pytest.raises(ValueError, match=r"give min_key \('a'\) or max_key \('b'\), not both"):
        checkpointer.find("a", "b")


def test_nothing_to_recover_is_no_error_and_writes_nothing(tmp_path: Path) -> None:
    checkpointer = make(tmp_path / "none")
    assert checkpointer.recover_if_possible() is None
    assert checkpointer.find() == checkpointer.list_checkpoints() == []
    assert not (tmp_path / "none").exists()


def test_other_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("plots", "lost+found", ".git", ".saving-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plots" / "loss.png").write_bytes(b"")
    before = names(tmp_path)
    checkpointer = make(tmp_path)
    assert checkpointer.recover_if_possible() is None
    for _ in range(2):
        checkpointer.save_and_keep_only()
    assert names(tmp_path) == sorted([*before, "save-00000002"])


def test_recovering_is_strict_about_names(tmp_path: Path) -> None:
    saved = Checkpointer(tmp_path, recoverables={"brain": Holder(), "head": Holder()})
    saved.save_checkpoint()
    brain = Holder()
    lacking = Checkpointer(tmp_path, recoverables={"brain": brain, "tail": Holder()})
    with pytest.raises(
        ValueError, match="of the states, it lacks tail and this run does not know head"
    ):
        lacking.recover_if_possible()
    local = Checkpointer(tmp_path, recoverables={"brain": Uniform(), "head": Holder()})
    with pytest.raises(
        ValueError, match="of the local states, it lacks brain and this run does not"
    ):
        local.recover_if_possible()
    assert brain.loaded == []


def test_a_state_that_does_not_fit_names_checkpoint_recoverable_and_parameter(
    tmp_path: Path,
) -> None:
    Checkpointer(tmp_path, recoverables={"net": torch.nn.Linear(3, 2)}).save_checkpoint()
    other = Checkpointer(tmp_path, recoverables={"net": torch.nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"(?s)save-00000001: 'net' \(Linear\) cannot.*weight"):
        other.recover_if_possible()


def test_a_state_of_another_kind_names_what_it_lacks(tmp_path: Path) -> None:
    Checkpointer(tmp_path, {"part": torch.nn.Linear(1, 1)}).save_checkpoint()
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"'part' \(SGD\) cannot .*: it has no 'param_groups'"):
        Checkpointer(tmp_path, {"part": other}).recover_if_possible()


def test_local_states_of_another_number_of_processes_are_not_used(
    tmp_path: Path,
) -> None:
    checkpointer = make(tmp_path)
    saved = checkpointer.save_checkpoint()
    assert saved is not None
    content = storage.manifest_content(saved)
    (saved.path / "manifest.json").write_bytes(storage.encode_manifest({**content, "processes": 2}))
    thing = Uniform(5)
    thing.load_local_state_dict = pytest.fail  # type: ignore[method-assign, assignment]
    with pytest.warns(UserWarning, match="saved by 2 processes and is restored by 1: what differs"):
        Checkpointer(tmp_path, recoverables={"brain": thing}).recover_if_possible()
    assert thing.value == 1


# Averages


def test_the_average_is_the_float64_mean_and_counters_are_the_newests(tmp_path: Path) -> None:
    torch.manual_seed(0)
    holder = Holder()
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": holder})
    given = []
    for step in range(5):
        modules = {
            "weight": torch.randn(7) * 10 ** (2 * step),
            "half": torch.randn(7).half(),
            "wave": torch.randn(3, dtype=torch.complex64),
            "count": torch.tensor(step),
            "list": [torch.randn(2)],
        }
        given.append(modules)
        holder.state = {"modules": modules, "epoch": step}
        checkpointer.save_checkpoint({"step": step})
    chosen = [checkpointer.find(n=None)[index] for index in (3, 0, 2)]  # steps 1, 4, 2
    mean = checkpointer.average(chosen)
    for key in ("weight", "half"):
        exact = sum(given[step][key].double() for step in (1, 2, 4)) / 3
        assert torch.equal(mean[key], exact.to(given[0][key].dtype)), key
    assert torch.allclose(mean["wave"], sum(given[step]["wave"] for step in (1, 2, 4)) / 3)
    assert torch.allclose(mean["list"][0], sum(given[step]["list"][0] for step in (1, 2, 4)) / 3)
    assert mean["count"] == 4
    deep = checkpointer.average(chosen[:1], "brain", ("modules", "weight"))
    assert torch.equal(deep, given[1]["weight"])
    assert checkpointer.average(chosen, "brain", ())["epoch"] == 4


def test_the_average_refuses_what_does_not_fit_and_leaves_out_what_is_broken(
    tmp_path: Path,
) -> None:
    holder = Holder({"modules": {"weight": torch.zeros(2)}})
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": holder})
    for value in (1.0, 2.0, 4.0):
        holder.state = {"modules": {"weight": torch.full((2,), value)}}
        checkpointer.save_checkpoint()
    (tmp_path / "save-00000001" / "brain.modules.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"save-00000001/brain\.modules\.pt is broken: it has 0 "):
        mean = checkpointer.average(Checkpointer(tmp_path).find(n=None))
    assert mean["weight"].tolist() == [3, 3]
    holder.state = {"modules": {"weight": torch.zeros(3)}}
    checkpointer.save_checkpoint()
    with pytest.raises(
        ValueError, match=r"weight has shape \[3\] in the newest .* \[2\] in .*0003"
    ):
        checkpointer.average(checkpointer.find(n=2))
    with pytest.raises(ValueError, match=r"has no brain\.modules\.bias \(no 'bias'\)"):
        checkpointer.average(checkpointer.find(), path=("modules", "bias"))
    with pytest.raises(BrokenCheckpoint, match="no checkpoint to average in .* is sound"):
        checkpointer.average([])


# Holding


def test_held_saves_wait_and_take_the_state_of_the_release(tmp_path: Path) -> None:
    thing = Uniform(1)
    checkpointer = Checkpointer(tmp_path, recoverables={"brain": thing})
    checkpointer.hold()
    meta = {"step": 1}
    assert checkpointer.save_and_keep_only(meta) is None
    assert checkpointer.save_checkpoint(name="final") is None
    assert not list(tmp_path.iterdir())
    thing.value = meta["step"] = 2
    saved = [checkpointer.save(each).name for each in checkpointer.release()]
    assert saved == ["step-00000001", "final"]
    assert checkpointer.release() == []
    assert checkpointer.save_checkpoint() is not None
    fresh = Checkpointer(tmp_path, recoverables={"brain": Uniform()})
    assert fresh.read(fresh.find(n=3)[-1])["brain"]["epoch"] == 2
    checkpointer.hold()
    checkpointer.save_checkpoint(name="never")
    assert len(checkpointer.release()) == 1
    assert checkpointer.save_checkpoint(name="now") is not None
    assert not (tmp_path / "never").exists()


def test_a_disabled_checkpointer_writes_nothing(tmp_path: Path) -> None:
    checkpointer = make(tmp_path / "none")
    checkpointer.enabled = False
    assert checkpointer.save_checkpoint() is None
    checkpointer.hold()
    assert checkpointer.save_and_keep_only() is None
    assert checkpointer.release() == []
    assert not (tmp_path / "none").exists()


# Refusals


def test_states_that_could_not_be_read_back_are_refused_with_their_place(tmp_path: Path) -> None:
    class Odd(int):
        pass

    bad = {
        "brain.x[1].y is a tests": {"x": [0, {"y": Odd(3)}]},
        "brain.f is a builtins.function": {"f": lambda: None},
        "brain.s is a builtins.set": {"modules": {"w": torch.zeros(1)}, "s": {1}},
    }
    numpy = pytest.importorskip("numpy")
    bad["brain.updates.names is a numpy.ndarray"] = {"updates": {"names": numpy.array(["a"])}}
    for sentence, state in bad.items():
        checkpointer = Checkpointer(tmp_path, recoverables={"brain": Holder(state)})
        with pytest.raises(ValueError, match="which a checkpoint cannot hold; a state") as caught:
            checkpointer.save_checkpoint()
        assert str(caught.value).startswith(sentence.split(" is ")[0]), caught.value
        assert names(tmp_path) == []
    assert "numpy.ndarray" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../out", "/abs", "a/b", "a\0b", "", ".hidden", "..", "x" * 81, "ü", "a\n", "-f"]
)
def test_names_that_are_no_plain_names_are_refused(tmp_path: Path, name: str) -> None:
    checkpointer = make(tmp_path / "in")
    with pytest.raises(ValueError, match="cannot name a checkpoint: it becomes a folder's name"):
        checkpointer.save_checkpoint(name=name)
    with pytest.raises(ValueError, match="cannot name a recoverable: it becomes a file name"):
        checkpointer.add_recoverable(name, Holder())
    assert names(tmp_path) == []


def test_recoverables_that_would_mix_up_their_files_are_refused(tmp_path: Path) -> None:
    for name in ("rank-0", "brain.modules"):
        with pytest.raises(ValueError, match=f"'{name}' cannot name a recoverable"):
            make(tmp_path).add_recoverable(name, Holder())
    with pytest.raises(ValueError, match="'x' is a int, which has no state_dict"):
        make(tmp_path).add_recoverable("x", 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_last": 0}, "keep_last is 0; it must be a whole number of at least 1"),
        ({"keep_last": {"brain": 1}}, "keep_last is {'brain': 1}; it must be a whole number"),
        ({"keep_best": "wer"}, "keep_best is 'wer'; it must map metrics to min or max"),
        ({"keep_best": {"wer": "low"}}, "keep_best has 'wer': 'low', where mode is 'low'; a "),
        ({"keep_best": {"wer": {"mode": "min", "k": 1}}}, "where 'k' is unknown; a metric's rule "),
        ({"keep_best": {"wer": {"mode": "min", "n": 0}}}, "where n is 0; a metric's rule is min,"),
        ({"keep_best": {"wer": {"weights_only": 3}}}, "weights_only is 3 and mode is missing; a "),
        ({"keep_best": {"wer": {"mode": "min", "weights_only": "yes"}}}, "weights_only is 'yes';"),
        ({"keep_best": {3: "min"}}, "keep_best has 3: 'min', where the metric's name is no text;"),
    ],
)
def test_rules_that_mean_nothing_are_refused(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Checkpointer(tmp_path, **options)


def test_the_rest_of_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Checkpointer needs a folder"):
        Checkpointer()
    with pytest.raises(ValueError, match="num_to_keep is 0; at least 1 checkpoint must be kept"):
        make(tmp_path).save_and_keep_only(num_to_keep=0)


def test_a_place_where_nothing_can_be_saved_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be saved in .*file: it is not a folder"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"file/below: it does not exist and cannot be made \(Not a"
    ):
        make(tmp_path / "file" / "below").prepare()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be saved in .*: it is not writable"):
        make(tmp_path).save_checkpoint()
    with pytest.raises(ValueError, match="cannot be made .Permission denied"):
        make(tmp_path / "below").save_checkpoint()
    tmp_path.chmod(0o300)
    with pytest.raises(ValueError, match="cannot be saved in .*: it is not readable"):
        make(tmp_path).save_checkpoint()
    tmp_path.chmod(0o700)


def test_nothing_is_read_or_warned_when_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpointer = make(tmp_path)
        for _ in itertools.repeat(None, 3):
            checkpointer.save_and_keep_only()
            assert checkpointer.recover_if_possible() is not None
