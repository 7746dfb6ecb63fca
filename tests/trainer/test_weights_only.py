"""The best checkpoints are kept as weights alone: all that evaluation needs, and no training."""

import contextlib
import itertools
import os
import random
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from tests.processes import TwoRanks
from trainer import Brain, Stage, distributed
from trainer.checkpoint import BrokenCheckpoint, Checkpointer, storage
from trainer.cli.commands import main
from trainer.diagnostics.replay import load_nearest
from trainer.evaluation import load_weights
from trainer.options import RunOptions
from trainer.untrusted import bytes_on_disk

from .checkpoint_torture import Uniform, fault, leftovers
from .small import batches, everything, same, snapshot

ALONE = {"mode": "min", "weights_only": True}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def steps(checkpointer: Checkpointer, complete: bool) -> set[int | None]:
    return {each.step for each in checkpointer.list_checkpoints() if each.complete == complete}


def saved(folder: Path, wers: Any, keep_best: Any, **given: Any) -> tuple[Checkpointer, Uniform]:
    """Saves 0, 1, 2 … with these metrics, each with its number in all of its tensors."""
    thing = Uniform()
    checkpointer = Checkpointer(folder, keep_best=keep_best, recoverables={"brain": thing}, **given)
    for thing.value, wer in enumerate(wers):
        checkpointer.save_and_keep_only({"optimizer_step": thing.value, "wer": wer})
    return checkpointer, thing


# Which ones stay


@pytest.mark.parametrize("seed", range(4))
def test_the_newest_stay_complete_and_the_best_as_weights(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    last, n, whole = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 2)
    best = {"wer": {**ALONE, "n": n}, "acc": {"mode": "max", "n": whole}}
    thing = Uniform()
    checkpointer = Checkpointer(tmp_path, last, best, {"brain": thing})
    metas: list[dict[str, float]] = []
    cut = set()
    for thing.value in range(12):
        metas.append({"wer": draw.random(), "acc": draw.random()})
        checkpointer.save_and_keep_only({"optimizer_step": thing.value, **metas[-1]})
        number = range(len(metas))
        by_wer = sorted(number, key=lambda each: metas[each]["wer"])[:n]
        by_acc = sorted(number, key=lambda each: -metas[each]["acc"])[:whole]
        # One that was cut before it came to be the best by the other metric stays cut.
        assert steps(checkpointer, True) | steps(checkpointer, False) == {
            *number[-last:], *by_wer, *by_acc,
        }  # fmt: skip
        assert steps(checkpointer, True) >= set(number[-last:])
        assert steps(checkpointer, False) <= set(by_wer) | set(by_acc)
        cut |= steps(checkpointer, False)
        assert leftovers(tmp_path) == []
        for each in checkpointer.list_checkpoints():
            assert checkpointer.average([each])["weight"].unique().tolist() == [each.step]
            rest = {"brain.pt", "brain.modules.pt"}
            assert each.complete or each.files.keys() == rest
    assert cut


def test_one_complete_checkpoint_stays_whatever_the_rules_say(tmp_path: Path) -> None:
    checkpointer, thing = saved(tmp_path, [1.0, 2.0], {"wer": ALONE})
    for thing.value, wer in ((2, 0.1), (3, 0.2)):
        meta = {"optimizer_step": thing.value, "wer": wer}
        checkpointer.save_and_keep_only(meta, keep_recent=False)
    assert steps(checkpointer, True) == {3}
    assert steps(checkpointer, False) == {2}
    checkpointer.save_and_keep_only({"optimizer_step": 4}, ckpt_predicate=lambda each: False)
    assert steps(checkpointer, True) == {3, 4}  # What may not be deleted is not cut.
    checkpointer.delete_checkpoints(num_to_keep=1)
    assert (steps(checkpointer, True), steps(checkpointer, False)) == ({4}, set())


def test_named_checkpoints_and_those_within_epochs_are_counted_apart(tmp_path: Path) -> None:
    checkpointer, thing = saved(tmp_path, [], {"wer": ALONE})
    checkpointer.save_checkpoint({"optimizer_step": 90, "wer": 0.0}, name="mine")
    for thing.value, end in enumerate([True, False, True, False, True]):
        meta = {"optimizer_step": thing.value, "wer": thing.value}
        checkpointer.save_and_keep_only(meta, end_of_epoch=end)
    assert steps(checkpointer, True) == {90, 3, 4}
    assert steps(checkpointer, False) == {0, 1}


def test_modules_of_a_bare_checkpointer_are_its_weights(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    adam.step()
    parts = {"model": net, "adam": adam}
    checkpointer = Checkpointer(tmp_path, keep_best={"wer": ALONE}, recoverables=parts)
    for wer in (1.0, 2.0):
        checkpointer.save_and_keep_only({"wer": wer})
    best = checkpointer.find(min_key="wer")[0]
    assert list(best.paramfiles) == ["model"]
    assert same(torch.load(best.paramfiles["model"], weights_only=True), dict(net.state_dict()))
    other = Checkpointer(tmp_path, keep_best={"wer": ALONE}, recoverables={"adam": adam})
    with pytest.raises(ValueError, match=r"weights alone by 'wer', and none of the .* \(adam\) is"):
        other.save_and_keep_only({"wer": 1.0})


# Nothing goes on from them


def test_a_resume_takes_the_newest_complete_one_and_no_other(tmp_path: Path) -> None:
    checkpointer, thing = saved(tmp_path, [3.0, 1.0, 2.0, 4.0], {"wer": {**ALONE, "n": 2}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpointer.recover_if_possible()
    assert found is not None
    assert (found.step, thing.value) == (3, 3)
    with pytest.warns(UserWarning, match="step-00000001 is not restored, since it has weights al"):
        found = checkpointer.recover_if_possible(min_key="wer")
    assert found is not None
    assert found.step == 3
    best = checkpointer.find(min_key="wer")[0]
    with pytest.raises(BrokenCheckpoint, match="00001 has weights alone, and no run resumes from"):
        checkpointer.load_checkpoint(best)
    load_nearest(checkpointer, 1)  # As a replay does.
    assert thing.value == 3
    shutil.rmtree(found.path)
    before = sorted(os.listdir(tmp_path))
    for again in (checkpointer, Checkpointer(tmp_path, recoverables={"brain": Uniform()})):
        with pytest.raises(BrokenCheckpoint, match="has nothing to go on from: .* init_from"):
            again.recover_if_possible()
    assert sorted(os.listdir(tmp_path)) == before
    assert thing.value == 3


def test_a_checkpoint_that_was_cut_meanwhile_is_told_or_looked_for_again(tmp_path: Path) -> None:
    checkpointer, thing = saved(tmp_path, [1.0], {"wer": ALONE})
    (old,) = checkpointer.list_checkpoints()
    reader = Checkpointer(tmp_path, recoverables={"brain": Uniform()})
    thing.value = 1
    read = storage.read_verified

    def and_save(*given: Any) -> bytes:  # As another process may at any time.
        if len(checkpointer.list_checkpoints()) == 1:
            checkpointer.save_and_keep_only({"optimizer_step": 1, "wer": 2.0})
        return read(*given)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(storage, "read_verified", and_save)
        warnings.simplefilter("error")
        found = reader.recover_if_possible()
    assert found is not None
    assert found.step == 1
    with pytest.raises(BrokenCheckpoint, match=r"updates\.pt does not exist any more: the run tha"):
        reader.read(old)
    assert reader.average([old])["weight"].unique().tolist() == [0]


def test_a_list_has_the_one_for_which_another_was_cut(tmp_path: Path) -> None:
    checkpointer, thing = saved(tmp_path, [], {"wer": ALONE})
    for thing.value, end in enumerate((False, True)):
        meta = {"optimizer_step": thing.value, "wer": 1.0}
        checkpointer.save_and_keep_only(meta, end_of_epoch=end)
    read, scans = storage.read_manifest, iter([1])

    def after_a_save(path: Path) -> storage.Checkpoint:  # The folder's names are read by now.
        for _ in scans:
            thing.value = 2
            checkpointer.save_and_keep_only({"optimizer_step": 2, "wer": 2.0})
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_manifest", after_a_save)
        found = Checkpointer(tmp_path).list_checkpoints()
    assert [(each.step, each.complete) for each in found] == [(2, True), (1, False), (0, True)]


@pytest.mark.parametrize("contents", ["weight", "", "run\n"])
def test_other_contents_are_refused(contents: str, tmp_path: Path) -> None:
    checkpointer, _ = saved(tmp_path, [1.0], None)
    fields = storage.manifest_content(checkpointer.find()[0])
    data = storage.encode_manifest({**fields, "contents": contents})
    (tmp_path / "step-00000000" / "manifest.json").write_bytes(data)
    with pytest.warns(UserWarning, match="'contents' are neither run nor weights"):
        assert Checkpointer(tmp_path).list_checkpoints() == []


# Faults


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_in_any_operation_of_a_cut_leaves_what_loads(
    tmp_path: Path, error: BaseException
) -> None:
    def strike(name: str) -> None:
        raise error

    for at in itertools.count():
        place = tmp_path / str(at)
        checkpointer, _ = saved(place, [1.0], {"wer": ALONE})
        (whole,) = checkpointer.list_checkpoints()
        with fault(at, strike) as operations, contextlib.suppress(type(error)):
            storage.cut_to_weights(whole, ["brain.pt", "brain.modules.pt"])
        (now,) = Checkpointer(place).list_checkpoints()
        assert now.complete == ("rename" not in operations[:at])
        for file in now.files:
            storage.read_verified(now, file)
        with contextlib.suppress(BrokenCheckpoint):  # There is nothing to go on from.
            Checkpointer(place, recoverables={"brain": Uniform()}).recover_if_possible()
        assert os.listdir(place) == ["step-00000000"]
        assert leftovers(place, complete=now.complete) == []
        if at == len(operations):
            break
    assert at >= 10


def test_a_damaged_one_is_named_and_the_next_best_is_tested(tmp_path: Path) -> None:
    checkpointer, _ = saved(tmp_path, [1.0, 2.0, 3.0], {"wer": {**ALONE, "n": 2}})
    for file in ("brain.modules.pt", "manifest.json"):
        path = tmp_path / "step-00000000" / file
        data = path.read_bytes()
        path.write_bytes(data[:-3] + b"x" + data[-2:])
        reader = Checkpointer(tmp_path)
        with pytest.warns(UserWarning, match="is left out|no checkpoint to average") as seen:
            weights = load_weights(reader, RunOptions(), None, "wer")
        said = f"step-00000000 is left out: {path} is broken"
        assert any(said in str(each.message) for each in seen)
        assert weights["weight"].unique().tolist() == [1]
        path.write_bytes(data)


def cut_on_two_ranks(folder: str) -> dict[str, Any]:
    thing = Uniform()
    checkpointer = Checkpointer(folder, keep_best={"wer": ALONE}, recoverables={"brain": thing})
    for thing.value in (0, 1, 2):
        checkpointer.save_and_keep_only({"optimizer_step": thing.value, "wer": thing.value})
    distributed.barrier()
    found = checkpointer.recover_if_possible()
    assert found is not None
    best = checkpointer.find(min_key="wer")[0]
    mean = checkpointer.average([best])["weight"].unique().tolist()
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(found.path)
    distributed.barrier()
    try:
        checkpointer.recover_if_possible()
    except BrokenCheckpoint as error:
        return {"from": found.step, "files": list(best.files), "mean": mean, "said": str(error)}
    return {}


def test_two_ranks_cut_resume_and_refuse_as_one(two_ranks: TwoRanks, tmp_path: Path) -> None:
    for seen in two_ranks(cut_on_two_ranks, tmp_path):
        assert seen["files"] == ["brain.modules.pt", "brain.pt"]
        assert (seen["from"], seen["mean"]) == (2, [0.0])
        assert "has nothing to go on from" in seen["said"]


# A Brain


class Scored(Brain):
    """A network of some size; its metric is the best in the first epoch."""

    best_checkpoint = {"min_key": "wer"}

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch["x"])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return (predictions - batch["y"]).square().mean()

    def on_stage_end(self, stage: Stage, loss: Any, epoch: int | None = None) -> Any:
        return {"wer": float(epoch or 0)} if stage is Stage.VALID else None


def made(folder: Path, weights_only: bool, **options: Any) -> Any:
    torch.manual_seed(3)
    parts = [nn.Linear(4, 200), nn.Linear(200, 200), nn.Linear(200, 2)]
    parts[0].requires_grad_(False)
    rule = {"mode": "min", "weights_only": weights_only}
    given = {"device": "cpu", "progressbar": False, "nonfinite_reports": 0, **options}
    saver = Checkpointer(folder / str(weights_only), keep_best={"wer": rule})
    adam = partial(torch.optim.Adam, lr=0.01)
    return Scored({"net": nn.Sequential(*parts)}, adam, None, given, saver)


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 1 / 3), ({"ema_decay": 0.9}, 1 / 2), ({"save": "trainable"}, 1 / 3)],
)
def test_it_is_a_third_and_tests_as_the_whole_one(
    options: dict[str, Any], share: float, tmp_path: Path
) -> None:
    tested = []
    for weights_only in (True, False):
        brain = made(tmp_path, weights_only, **options)
        brain.fit(range(1, 4), batches(3), batches(2))
        before = everything(brain)
        with brain.best_weights(min_key="wer"):
            tested.append(snapshot(brain.modules))
        assert same(everything(brain), before)
        brain.evaluate(batches(2), min_key="wer")
        alone = made(tmp_path, weights_only, **options)  # As `--test_only` has it.
        alone.evaluate(batches(2), min_key="wer")
        assert alone.test_metrics == brain.test_metrics
        (best,), (newest,) = brain.checkpointer.find(min_key="wer"), brain.checkpointer.find()
        assert (best.step, best.complete, newest.step) == (3, not weights_only, 9)
        if weights_only:
            ratio = bytes_on_disk(best.path) / bytes_on_disk(newest.path)
            assert ratio == pytest.approx(share, abs=0.02)
            assert not any("optim" in file or "rank" in file for file in best.files)
    assert same(*tested)


def test_a_run_resumes_as_one_that_keeps_whole_checkpoints(tmp_path: Path) -> None:
    ends = []
    for weights_only in (True, False):
        made(tmp_path, weights_only).fit([1, 2], batches(3), batches(2))
        brain = made(tmp_path, weights_only)
        brain.fit(range(1, 4), batches(3), batches(2))
        ends.append(everything(brain))
    assert same(*ends)
    shutil.rmtree(tmp_path / "True" / "step-00000009")
    brain = made(tmp_path, True)
    before = snapshot(brain.modules)
    with pytest.raises(ValueError, match="has nothing to go on from: .* in another folder"):
        brain.fit(range(1, 6), batches(3), batches(2))
    assert same(snapshot(brain.modules), before)
    assert os.listdir(tmp_path / "True") == ["step-00000003"]


YAML = """
# python train.py task.yaml
seed: 3
net: !new:torch.nn.Linear [4, 2]
modules: {net: !ref <net>}
output_folder: OUT
checkpointer: !new:trainer.Checkpointer
  folder: !ref <output_folder>/checkpoints
  keep_best: {wer: {mode: min, weights_only: true}}
"""


def test_commands_take_a_run_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(given: trainer.Run) -> None:
        hparams = given.hparams
        adam = partial(torch.optim.Adam, lr=0.01)
        brain = Scored(hparams["modules"], adam, hparams, given.options, hparams["checkpointer"])
        brain.fit(range(1, 4), batches(3), batches(2))

    run, yaml = tmp_path / "run", tmp_path / "task.yaml"
    yaml.write_text(YAML.replace("OUT", str(run)))
    more = ["--device", "cpu", "--progressbar", "false"]
    trainer.main(train, [str(yaml), *more])
    assert f"best checkpoint: wer 1, {run}/checkpoints/step-00000003" in capsys.readouterr().err
    (best,) = Checkpointer(run / "checkpoints").find(min_key="wer")
    weights = Checkpointer(run / "checkpoints").average([best])
    model = trainer.load(run, "cpu", brain=Scored)
    assert same(dict(model.modules.state_dict()), dict(weights))

    assert main(["clean", str(run)]) == 0
    (best.path / "brain.optimizers.main.pt").write_bytes(b"")  # Left by a killed process.
    assert main(["clean", str(run)]) == 0
    assert capsys.readouterr().out == "there is nothing to delete\n" * 2
    assert main(["average", str(run), "-n", "1", "--min", "wer"]) == 0
    mean = trainer.load(f"{run}-average", "cpu", brain=Scored)
    assert same(mean.modules.state_dict(), model.modules.state_dict())
    averages = Checkpointer(f"{run}-average/checkpoints", recoverables={"brain": Uniform()})
    with pytest.raises(BrokenCheckpoint, match="has nothing to go on from"):
        averages.recover_if_possible()

    for rule, words in {"3": "weights_only is 3", "true, top: 1": "'top' is unknown"}.items():
        yaml.write_text(yaml.read_text().replace("only: true", f"only: {rule}"))
        with pytest.raises(SystemExit) as end:
            trainer.main(train, [str(yaml), *more, "--output_folder", str(tmp_path / "other")])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
        yaml.write_text(YAML)
