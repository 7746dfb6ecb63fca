"""Files from elsewhere: paths stay in their folder, memory in proportion, modules elsewhere."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from trainer import untrusted
from trainer.untrusted import (
    bytes_on_disk,
    confined,
    memory_in_proportion,
    no_modules_from,
    read_text,
)


def test_a_path_stays_in_its_folder_whatever_leads_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "run2"
    folder.mkdir()
    outside.mkdir()
    (outside / "file").write_text("secret")
    (folder / "file").write_text("known")
    (folder / "out").symlink_to(outside)
    (folder / "chain").symlink_to("out")
    (folder / "within").symlink_to(folder / "file")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    for good in ("file", "within", "missing", "missing/below", ".", "x/../file"):
        assert confined(folder, folder / good) == folder / good
    assert read_text(folder, "within") == "known"
    bad = [
        "../run2/file", "../run2", "..", "out", "out/file", "chain/file", "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ", "x/../../run2/file", "pipe", "file\0", "loop/../../run2",
    ]  # fmt: skip
    for name in bad:
        with pytest.raises(ValueError, match=r"lies outside of|neither a file nor|null byte"):
            confined(folder, folder / name)
    link = tmp_path / "link"
    link.symlink_to(folder)  # The user's own link to the folder is followed.
    assert confined(link, link / "file")
    (folder / "long").write_bytes(b"x" * 11)
    (folder / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        read_text(folder, "long", 10)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_text(folder, "bytes")


def test_memory_is_limited_in_proportion_and_the_limit_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "SPARE_BYTES", 1 << 26)
    monkeypatch.setattr(untrusted, "BYTES_PER_CORE", 0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # Far above the limit: what other tests left behind may be freed meanwhile.
    far, near = 1 << 32, 1 << 29
    for allocate in (lambda: bytearray(far), lambda: torch.zeros(far, dtype=torch.uint8)):
        with pytest.raises((MemoryError, RuntimeError)), memory_in_proportion(tmp_path):
            allocate()
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)  # Takes nothing on the disk.
    assert bytes_on_disk(tmp_path) < 1 << 20
    with pytest.raises(MemoryError), memory_in_proportion(tmp_path):
        bytearray(far)
    (tmp_path / "full").write_bytes(os.urandom(1 << 20) * 70)
    with memory_in_proportion(tmp_path), memory_in_proportion(tmp_path):
        bytearray(near)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_no_module_comes_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "from_elsewhere.py").write_text("raise AssertionError")
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    path = ["", str(tmp_path), *sys.path, ".", str(tmp_path / "link"), "../run", "../link"]
    monkeypatch.setattr(sys, "path", list(path))
    with no_modules_from("."):
        assert str(tmp_path) in sys.path
        with pytest.raises(ModuleNotFoundError):
            import from_elsewhere  # noqa: F401
    assert sys.path == path
    meta_path = [*sys.meta_path]
    # The second is one of Python's own, and the third has no file.
    for library in ("hidden_library", "colorsys", "_symtable"):
        (tmp_path / library / "run").mkdir(parents=True)
        (tmp_path / library / "__init__.py").write_text("raise AssertionError")
        for folder in (tmp_path / library, tmp_path / library / "run"):
            monkeypatch.chdir(tmp_path)
            with no_modules_from(tmp_path / "run"), no_modules_from(folder):
                if library != "hidden_library":
                    monkeypatch.delitem(sys.modules, library, raising=False)
                    assert importlib.util.find_spec(library) is not None
                    assert importlib.import_module(library).__name__ == library
                else:
                    with pytest.raises(ModuleNotFoundError, match="No module named 'hidden_lib"):
                        importlib.import_module(library)
                    assert importlib.util.find_spec("trainer") is not None
    assert (sys.path, sys.meta_path) == (path, meta_path)
    with no_modules_from("/"):  # A project with its environment in it.
        assert sys.path
        assert all("lib/python" in each for each in sys.path)
