"""Inputs of models: sounds in any form, and the pieces of long ones."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes.common.hearing import Piece, batched, given_sounds, pieces, read_sound
from trainer.inference.results import Sound


def test_a_long_file_is_cut_where_it_is_quiet(tmp_path: Path) -> None:
    rate = 8000
    signal = np.random.default_rng(0).normal(0.0, 0.1, 45 * rate).astype(np.float32)
    quiet = [(18.0, 18.3), (35.0, 35.3)]  # each in the last four of 20 s from the cut before
    for start, end in quiet:
        signal[round(start * rate) : round(end * rate)] *= 1e-3
    soundfile.write(tmp_path / "long.wav", signal, rate, subtype="FLOAT")
    parts = list(pieces(given_sounds(tmp_path / "long.wav")[0], rate))
    assert torch.equal(torch.cat([part.signal for part in parts]), torch.from_numpy(signal))
    ends = np.cumsum([len(part.signal) for part in parts]) / rate
    assert [part.start for part in parts] == [0.0, *ends[:-1]]
    assert len(ends) == 3
    for end, (start, stop) in zip(ends, quiet, strict=False):
        assert start < end < stop


def test_pieces_have_the_rate_that_is_asked_for() -> None:
    sound = Sound(torch.randn(2, 50 * 11025), 11025)
    parts = list(pieces(given_sounds([sound, sound])[0], 8000))
    assert [part.source for part in parts] == [0] * 3 + [1] * 3
    count = sum(len(part.signal) for part in parts)
    assert count == pytest.approx(2 * 50 * 8000, abs=6)


def test_batches_hold_all_pieces_in_order_and_no_more_than_is_allowed() -> None:
    lengths = [3, 5, 4, 1, 1, 1, 20, 2, 7, 7, 7]
    parts = [Piece(n, 0.0, torch.zeros(length)) for n, length in enumerate(lengths)]
    batches = list(batched(iter(parts), 12))
    assert [part.source for batch in batches for part in batch] == list(range(len(parts)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(part.signal) for part in batch) <= 12
    assert [len(batch) for batch in batches] == [2, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "int64", "float16", "float64"])
def test_samples_of_every_type_mean_the_same(kind: str) -> None:
    wanted = torch.tensor([[-1.0, -0.5, 0.0, 0.5]])
    if kind.startswith("float"):
        given = wanted.numpy().astype(kind)
    else:
        limits = np.iinfo(kind)
        given = np.array([limits.min, limits.min // 2 if limits.min else 64, 0, 0], kind)
        given[2] = 0 if limits.min else 128
        given[3] = limits.max // 2 + (1 if limits.min else 65)
    for samples in (given, torch.from_numpy(given)):
        (source,), several = given_sounds(samples, 8000)
        assert not several
        torch.testing.assert_close(source.read(8000, "all"), wanted, rtol=0, atol=1e-6)


def test_one_sound_is_read_at_a_rate_from_a_file_and_from_samples(tmp_path: Path) -> None:
    signal = np.random.default_rng(0).normal(0.0, 0.1, (900, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", signal, 8000, subtype="FLOAT")
    heard = read_sound(tmp_path / "a.wav", at=16000)
    assert heard.shape == (1800,)
    assert torch.equal(heard, read_sound(signal.T, 8000, at=16000))
    assert torch.equal(read_sound(signal.T, 8000, at=8000), torch.from_numpy(signal).mean(1))
    with pytest.raises(TypeError, match="takes one sound, not a list of 1"):
        read_sound([tmp_path / "a.wav"], at=8000)  # type: ignore[arg-type]
