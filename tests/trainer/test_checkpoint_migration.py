"""States of format 1 are read in the layout of format 2, whole and in part, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import BrokenCheckpoint, Checkpoint, Checkpointer, storage
from trainer.checkpoint.migrate import complete, migrate

WINDOW = Path(__file__).parent / "data" / "checkpoint-v1" / "window"
PLAYERS = ("discriminator", "generator")


def raw(name: str) -> Any:
    return torch.load(WINDOW / f"{name}.pt", weights_only=True)


@pytest.fixture
def old(tmp_path: Path) -> Checkpoint:
    """The kept checkpoint of format 1."""
    shutil.copytree(WINDOW, tmp_path / "window")
    (checkpoint,) = Checkpointer(tmp_path).find()
    assert checkpoint.format == 1
    return checkpoint


def test_the_shared_state_has_flat_keys(old: Checkpoint) -> None:
    state = storage.load_state(old, "brain")
    optimizers = {f"optimizers.{name}" for name in PLAYERS}
    assert set(state) == {"progress", "modules", "trainable", "ema"} | optimizers
    seconds = raw("rank-0")["brain"]["journal"]["seconds"]
    assert state["progress"] == {
        "epoch": 4, "step": 3, "optimizer_step": 2, "phase": "train", "stopped": False, "fits": 1,
        "epoch_batches": 7, "processes": 1, "seconds": seconds, "joint": None, "averaged": None,
        "nonfinite_count": 0,
    }  # fmt: skip
    for name in PLAYERS:
        assert repr(state[f"optimizers.{name}"]) == repr(raw("brain.updates")[name])
    assert state["modules"].keys() == raw("brain.modules").keys()
    assert state["ema"]["count"] == 2


def test_the_local_state_has_flat_keys(old: Checkpoint) -> None:
    saved = raw("rank-0")["brain"]
    state = storage.load_local(old, 0, 1)["brain"]
    windows = {f"windows.{name}" for name in PLAYERS}
    assert set(state) == {"rng", "guard", "metrics", "attributes", "callbacks.LoggerCallback"} | (
        windows
    )
    for name in PLAYERS:
        assert repr(state[f"windows.{name}"]) == repr(saved["windows"][name])
    assert state["guard"]["buffers"].keys() == saved["statistics"].keys() != set()
    assert state["metrics"] == {
        "average": saved["average"],
        "interval": saved["journal"]["mean"],
        "counts": {"skipped": 0, "overflowed": 0},
        "tallies": saved["journal"]["tallies"],
        "examples": 0.0,
        "logged": {"train": {}},
    }
    assert state["attributes"] == saved["attributes"]
    assert state["callbacks.LoggerCallback"] == {"jsonl_lines": 6}
    assert storage.load_local(old, 0, 2) == {}  # Another number of processes.


def test_averages_are_read_from_either_format(old: Checkpoint) -> None:
    checkpointer = Checkpointer(old.path.parent)
    modules = checkpointer.average([old])
    assert all(torch.equal(modules[key], value) for key, value in raw("brain.modules").items())
    average = checkpointer.average([old], "brain", ("ema", "average"))
    expected = raw("brain.weight_average")["average"]
    assert average.keys() == expected.keys() != set()
    assert all(torch.equal(average[key], value) for key, value in expected.items())


def test_what_only_some_runs_have_is_moved_as_well() -> None:
    shared = {
        **raw("brain"), "modules": raw("brain.modules"), "updates": raw("brain.updates"),
        "weight_average": {}, "objects": {"hparams.stopping": {"waited": 2}},
    }  # fmt: skip
    local = {
        **raw("rank-0")["brain"], "joint": ["generator"], "monitor": {"line": 1},
        "objects": {"wer": {"total": 3}}, "buffers": {"mean": torch.zeros(2)},
    }  # fmt: skip
    state, own = migrate(1, shared, local)
    assert "ema" not in state
    assert state["objects.hparams.stopping"] == {"waited": 2}
    assert state["progress"]["joint"] == ["generator"]
    assert own["callbacks.LayerMonitor"] == {"line": 1}
    assert own["objects.wer"] == {"total": 3}
    assert own["buffers"] is local["buffers"]
    assert migrate(2, state, own) == (state, own)


def test_what_the_first_saves_of_format_2_lacked_is_as_at_the_start() -> None:
    old = {"windows.main": {"count": 1}, "guard": {"spoilt": True}, "metrics": {}, "mine": [3]}
    assert complete(old) == {
        "windows.main": {"count": 1, "lead": ""}, "guard": {"spoilt": True, "counted": False},
        "metrics": {"waiting": []}, "mine": [3],
    }  # fmt: skip
    assert old["metrics"] == {}
    new = complete(old)
    assert complete(new) == new


def test_a_state_of_another_object_named_brain_stays_as_it_is() -> None:
    for shared in ({"modules": {}}, [1]):
        assert migrate(1, shared, {}) == (shared, {})  # type: ignore[arg-type]


def test_a_state_that_format_1_never_wrote_is_refused(old: Checkpoint) -> None:
    torch.save({"position": {"epoch": 1}}, old.path / "brain.pt")
    content = json.loads((old.path / storage.MANIFEST).read_text())
    data = (old.path / "brain.pt").read_bytes()
    digest = storage.hashlib.sha256(data).hexdigest()
    content["files"]["brain.pt"] = {"size": len(data), "sha256": digest}
    (old.path / storage.MANIFEST).write_bytes(storage.encode_manifest(content))
    (resealed,) = Checkpointer(old.path.parent).find()
    with pytest.raises(BrokenCheckpoint, match="its state 'brain' is not of format 1"):
        storage.load_state(resealed, "brain")
    with pytest.raises(BrokenCheckpoint, match="its state 'brain' is not of format 1"):
        storage.load_local(resealed, 0, 1)
