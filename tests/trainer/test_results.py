"""Results of trained models."""

import math
import resource
import signal
from pathlib import Path

import pytest
import torch

from trainer.inference import Classification, Sound


def test_a_classification_is_ranked_by_probability() -> None:
    found = Classification.ranked(["a", "b", "c"], torch.tensor([0.25, 0.5, 0.25]))
    assert (found.label, found.probability, str(found)) == ("b", 0.5, "b")
    assert list(found.probabilities.items()) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    with pytest.raises(ValueError, match="shorter"):
        Classification.ranked(["a", "b", "c"], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "AIFF"])
def test_a_sound_is_written_whole_or_not_at_all(suffix: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / f"a.{suffix}"
    Sound(0.1 * torch.randn(2, 500), 16000).save(path)
    before = path.read_bytes()
    assert soundfile.info(path).channels == 2
    for wrong in (
        Sound(torch.full((1, 9), math.nan), 16000),
        Sound(torch.zeros(9), 16000),
        Sound(torch.zeros(2000, 9), 16000),
    ):
        with pytest.raises((ValueError, OSError), match=r"a\.\w+ cannot be written: "):
            wrong.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # As on a full disk.
    try:
        with pytest.raises(OSError, match=r"a\.\w+ cannot be written: System error"):
            Sound(0.1 * torch.randn(1, 200_000), 16000).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_sound_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    sound = Sound(torch.zeros(1, 9).requires_grad_(), 16000)
    (tmp_path / "file").touch()
    for path, kind, message in (
        ("none/a.wav", OSError, r"none/a\.wav cannot be written: No such file"),
        ("file/a.wav", OSError, r"file/a\.wav cannot be written: Not a directory"),
        ("a.opus", ValueError, "has no suffix of a sound file that soundfile writes"),
        ("a.raw", ValueError, "has no suffix of a sound file that soundfile writes"),
    ):
        with pytest.raises(kind, match=message):
            sound.save(tmp_path / path)
    assert sound.save(tmp_path / "a.wav").exists()
