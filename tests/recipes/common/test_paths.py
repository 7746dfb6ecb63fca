"""Names in manifests stay inside their folder."""

from pathlib import Path

import pytest

from recipes.common.paths import inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "clips").mkdir(parents=True)
    (data / "clips" / "one.wav").touch()
    (data / "near.wav").symlink_to("clips/one.wav")
    (tmp_path / "secret.wav").touch()
    (data / "far.wav").symlink_to(tmp_path / "secret.wav")
    (data / "up").symlink_to(tmp_path)
    return data


@pytest.mark.parametrize("name", ["clips/one.wav", "clips/./one.wav", "near.wav", "clips/new …"])
def test_names_inside_are_files_of_the_folder(folder: Path, name: str) -> None:
    assert inside(folder, name).is_relative_to(folder.resolve())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../secret.wav", r"the name '\.\./secret\.wav' in a manifest contains '\.\.'"),
        ("clips/../../secret.wav", "contains '..'; it must stay inside the data folder"),
        ("clips\\..\\..\\secret.wav", "contains '..'"),
        ("/etc/passwd", "is an absolute path; it must be relative to the data folder"),
        ("C:\\secret.wav", "is an absolute path"),
        ("C:secret.wav", "is an absolute path"),
        ("\\\\host\\share\\a.wav", "is an absolute path"),
        ("one\0.wav", "contains a NUL character"),
        ("n" * 300 + ".wav", "has a part of more than 255 bytes"),
        ("é" * 150 + ".wav", "has a part of more than 255 bytes"),
        ("far.wav", "leads out of .*, to .*secret.wav"),
        ("up/secret.wav", "leads out of"),
        ("", "is empty"),
        (" ", "is empty"),
        (".", "names no file"),
        ("..", "names no file"),
        ("clips/..", "names no file"),
        ("clips/", "names no file"),
        ("~/one.wav", "begins with '~'; it must be relative to the data folder"),
        ("one\n.wav", "contains a control character, such as a line break"),
        ("x/" * 600 + "one.wav", "has more than 1024 bytes"),
        ("\ud800.wav", "contains half of a character"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str, sentence: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=sentence):
        inside(folder, name)
    assert sorted(folder.parent.rglob("*")) == before
