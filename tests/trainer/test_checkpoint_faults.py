"""After errors, damage and attacks, the previous checkpoint loads, and no code runs."""

import os
import pickle
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import BrokenCheckpoint, Checkpointer, storage

from .checkpoint_torture import Uniform, fault, save, two_checkpoints


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not sync: only a power cut could tell the difference."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# Operations that fail


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_in_any_operation_leaves_a_checkpoint_that_loads(
    tmp_path: Path, error: BaseException
) -> None:
    def strike(name: str) -> None:
        raise error

    checkpointer, thing = two_checkpoints(tmp_path / "count")
    with fault(-1, strike) as operations:
        save(checkpointer, thing, 3)
    published = operations.index("rename")
    for at, name in enumerate(operations):
        place = tmp_path / str(at)
        checkpointer, thing = two_checkpoints(place)
        with fault(at, strike), pytest.raises(type(error)):
            save(checkpointer, thing, 3)
        fresh = Uniform()
        again = Checkpointer(place, keep_last=2, recoverables={"brain": fresh})
        if at <= published:  # Nothing of the failed save is left, even before the next start.
            assert sorted(os.listdir(place)) == ["step-00000001", "step-00000002"], (at, name)
        again.recover_if_possible()
        assert fresh.value == (3 if at > published else 2), (at, name)
        save(again, fresh, 4)
        assert len(os.listdir(place)) == 2, (at, name)
    assert len(operations) >= 25


# Bytes that change


class Damage:
    """Two checkpoints; the newer one is damaged, looked at, and made whole again."""

    def __init__(self, folder: Path) -> None:
        two_checkpoints(folder)
        self.folder, self.newest = folder, folder / "step-00000002"
        self.whole = {file.name: file.read_bytes() for file in sorted(self.newest.iterdir())}

    def is_noticed(self, changed: dict[str, bytes | None], *named: str) -> None:
        """Assert that the damaged file is named, and the older checkpoint used, alone."""
        for name, data in changed.items():
            if data is None:
                (self.newest / name).unlink()
            else:
                (self.newest / name).write_bytes(data)
        thing = Uniform()
        again = Checkpointer(self.folder, recoverables={"brain": thing})
        with warnings.catch_warnings(record=True) as caught:  # torch warns of odd pickles as well
            warnings.simplefilter("always")
            found = again.recover_if_possible()
        assert found is not None
        assert (found.name, thing.loaded) == ("step-00000001", [1])
        (said,) = [text for each in caught if " is left out: " in (text := str(each.message))]
        assert "step-00000002" in said
        assert any(str(self.newest / name) in said for name in named or changed), said
        for name in changed:
            (self.newest / name).write_bytes(self.whole[name])


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    return Damage(tmp_path)


def test_every_flipped_bit_is_noticed(damage: Damage) -> None:
    draw = random.Random(0)
    files = sorted(damage.whole)
    assert len(files) == 5
    for index in range(200):
        name = files[index % len(files)]
        data = bytearray(damage.whole[name])
        position = draw.randrange(len(data))
        data[position] ^= 1 << draw.randrange(8)
        damage.is_noticed({name: bytes(data)})


def test_every_cut_empty_missing_or_swapped_file_is_noticed(damage: Damage) -> None:
    draw = random.Random(1)
    files = sorted(damage.whole)
    for index in range(50):
        name = files[index % len(files)]
        damage.is_noticed({name: damage.whole[name][: draw.randrange(len(damage.whole[name]))]})
    for name in files:
        damage.is_noticed({name: b""})
        damage.is_noticed({name: None})
        damage.is_noticed({name: damage.whole[name] + b"\0"})
    for one in files:
        for two in files:
            if one < two:
                swapped = {one: damage.whole[two], two: damage.whole[one]}
                damage.is_noticed(swapped, one, two)
    older = {name: (damage.folder / "step-00000001" / name).read_bytes() for name in files[:-1]}
    for name in set(older) - {"manifest.json"}:
        if older[name] != damage.whole[name]:
            damage.is_noticed({name: older[name]})


def test_falling_back_takes_less_than_a_second(tmp_path: Path) -> None:
    thing = Uniform(0, (8 << 20) // 16)
    checkpointer = Checkpointer(tmp_path, keep_last=2, recoverables={"brain": thing})
    for value in (1, 2):
        save(checkpointer, thing, value)
    broken = tmp_path / "step-00000002" / "rank-0.pt"
    broken.write_bytes(broken.read_bytes()[:-1])
    again = Checkpointer(tmp_path, recoverables={"brain": thing})
    began = time.perf_counter()
    with pytest.warns(UserWarning, match=r"rank-0\.pt is broken"):
        assert again.recover_if_possible() is not None
    assert time.perf_counter() - began < 1
    assert thing.loaded == [1]


def test_only_broken_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name / "brain.pt").write_bytes(b"")
    thing = Uniform()
    again = Checkpointer(tmp_path, recoverables={"brain": thing})
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(BrokenCheckpoint, match="to start over") as caught,
    ):
        again.recover_if_possible()
    assert str(caught.value).count("brain.pt is broken") == 2
    assert thing.loaded == []
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name / "manifest.json").unlink()
    again = Checkpointer(tmp_path, recoverables={"brain": thing})
    with (
        pytest.warns(UserWarning, match="left"),
        pytest.raises(BrokenCheckpoint, match="json is missing"),
    ):
        again.recover_if_possible()


# Files that lie: whoever can write a file can also seal a manifest


class Canary:
    """Object whose pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    checkpoint = storage.read_manifest(folder)
    content = {**storage.manifest_content(checkpoint), **changes}
    for name in content["files"].keys() & set(os.listdir(folder)):
        data = (folder / name).read_bytes()
        digest = storage.hashlib.sha256(data).hexdigest()
        content["files"][name] = {"size": len(data), "sha256": digest}
    (folder / "manifest.json").write_bytes(storage.encode_manifest(content))


def test_pickles_in_any_tensor_file_are_refused_and_do_not_run(
    damage: Damage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    canary = tmp_path_factory.mktemp("outside") / "canary"
    source = tmp_path_factory.mktemp("source") / "x.pt"
    payloads = [pickle.dumps(Canary(canary)), pickle.dumps({"modules": Canary(canary)}, protocol=0)]
    for zipped in (True, False):
        torch.save([Canary(canary)], source, _use_new_zipfile_serialization=zipped)
        payloads.append(source.read_bytes())
    tensor = torch.zeros(2)
    tensor.payload = Canary(canary)  # type: ignore[attr-defined]
    torch.save({"modules": tensor}, source)
    payloads.append(source.read_bytes())
    tried = 0
    for name in set(damage.whole) - {"manifest.json"}:
        for payload in payloads:
            (damage.newest / name).write_bytes(payload)
            reseal(damage.newest)
            sealed = (damage.newest / "manifest.json").read_bytes()
            damage.is_noticed({name: payload, "manifest.json": sealed}, name)
            assert not canary.exists(), (name, payload)
            tried += 1
    assert tried == 20
    pickle.loads(payloads[0]).close()  # The payloads do run where nobody looks after them.
    assert canary.exists()


def test_a_pickle_is_named_with_what_it_asked_for(damage: Damage, tmp_path: Path) -> None:
    torch.save([Canary(tmp_path / "canary")], damage.newest / "brain.pt")
    reseal(damage.newest)
    again = Checkpointer(tmp_path)
    with pytest.raises(
        BrokenCheckpoint,
        match=r"brain\.pt is refused: it does not read as tensors and plain values \(.*io\.open",
    ):
        again.read(again.find()[0])


def test_yaml_in_the_manifest_is_refused_and_does_not_run(damage: Damage, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    tag = f'!!python/object/apply:os.system ["touch {canary}"]'
    text = damage.whole["manifest.json"].decode()
    damage.is_noticed({"manifest.json": f"{tag}\n".encode()})
    damage.is_noticed(
        {"manifest.json": text.replace('"meta": {', f'"meta": {{"x": {tag},').encode()}
    )
    damage.is_noticed({"manifest.json": b"[" * 100_000})
    damage.is_noticed({"manifest.json": b" " * (17 << 20)})
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../secret.pt", "/etc/passwd", "a/b.pt", "a\0.pt", "x" * 300 + ".pt", "", "..", ".pt"]
)
def test_listed_names_that_leave_the_folder_are_refused(damage: Damage, name: str) -> None:
    (damage.folder / "secret.pt").write_bytes(damage.whole["brain.pt"])
    content = storage.manifest_content(storage.read_manifest(damage.newest))
    content["files"] = {**content["files"], name: content["files"]["brain.pt"]}
    damage.is_noticed({"manifest.json": storage.encode_manifest(content)})
    assert (damage.folder / "secret.pt").read_bytes() == damage.whole["brain.pt"]


def test_sealed_nonsense_is_refused(damage: Damage) -> None:
    content = storage.manifest_content(storage.read_manifest(damage.newest))
    nonsense: list[dict[str, Any]] = [
        {"format": 3}, {"format": 0}, {"format": True}, {"number": "1"}, {"number": True},
        {"meta": []}, {"files": []},
        {"files": {"brain.pt": {"size": 1}}}, {"files": {"brain.pt": {"size": "1", "sha256": ""}}},
        {"path": "/etc"}, {"time": None}, {"surprise": 1},
        {"contents": None}, {"base": "x"}, {"shards": "1"},
    ]  # fmt: skip
    for each in nonsense:
        damage.is_noticed({"manifest.json": storage.encode_manifest({**content, **each})})
    fields = {key: value for key, value in content.items() if key != "number"}
    damage.is_noticed({"manifest.json": storage.encode_manifest(fields)})


def test_links_and_pipes_are_not_followed(damage: Damage, tmp_path: Path) -> None:
    for name in sorted(damage.whole):
        target = tmp_path / "elsewhere"
        target.write_bytes(damage.whole[name])
        for make in (lambda path: path.symlink_to(target), os.mkfifo):  # noqa: B023
            (damage.newest / name).unlink()
            make(damage.newest / name)
            again = Checkpointer(damage.folder, recoverables={"brain": Uniform()})
            with pytest.warns(UserWarning, match=f"{name} is broken: it is not a regular file"):
                found = again.recover_if_possible()
            assert found is not None
            assert found.name == "step-00000001"
        (damage.newest / name).unlink()
        (damage.newest / name).write_bytes(damage.whole[name])
    outside = tmp_path / "outside"
    shutil.move(damage.newest, outside)
    damage.newest.symlink_to(outside)
    again = Checkpointer(damage.folder, recoverables={"brain": Uniform()})
    assert [each.name for each in again.list_checkpoints()] == ["outside", "step-00000001"]
    for _ in range(3):
        again.save_and_keep_only()
    assert damage.newest.is_symlink()
