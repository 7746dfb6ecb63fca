"""Pieces of long sounds: of equal length, those of the whole, and read as they are needed."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from recipes.common.audio import BLOCK
from recipes.common.hearing import Source
from recipes.finetune.embedder import equal_pieces
from trainer.data import BadItem


@pytest.fixture
def recording(tmp_path: Path) -> Any:
    def record(samples: int, rate: int, channels: int = 2, name: str = "x.wav") -> Source:
        noise = np.random.default_rng(samples).normal(0, 0.1, (samples, channels))
        soundfile.write(tmp_path / name, noise, rate)
        return Source(str(tmp_path / name))

    return record


@pytest.mark.parametrize("own", [8000, 16000, 44100])
@pytest.mark.parametrize("seconds", [0.9, 4.0, 100.0])
@pytest.mark.parametrize("samples", [1000, BLOCK, 5 * BLOCK + 7])
def test_pieces_are_those_of_the_whole(
    own: int, seconds: float, samples: int, recording: Any
) -> None:
    source = recording(samples, own)
    whole = source.read(16000)
    count = math.ceil(len(whole) / (seconds * 16000))
    size = len(whole) // count
    found = list(equal_pieces([source, source], 16000, seconds))
    assert [each.source for each in found] == [0] * count + [1] * count
    for place, piece in enumerate(found[:count]):
        assert piece.start == place * size / 16000
        expected = whole[place * size : (place + 1) * size]
        assert torch.allclose(piece.signal, expected, atol=1e-6)


def test_a_long_file_is_read_as_its_pieces_are_used(
    recording: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = recording(40 * BLOCK, 44100), 0
    blocks = Source.blocks

    def counted(self: Source) -> Iterator[Tensor]:
        nonlocal read
        for block in blocks(self):
            read += block.shape[1]
            yield block

    monkeypatch.setattr(Source, "blocks", counted)
    used = 0
    for piece in equal_pieces([source], 16000, 3.0):
        used += round(len(piece.signal) * 44100 / 16000)
        assert read <= used + 3 * BLOCK
        assert piece.signal.untyped_storage().nbytes() <= 4 * 3 * BLOCK
    assert used > 39 * BLOCK


def test_a_file_that_is_too_short_or_cut_is_named(recording: Any) -> None:
    short = recording(100, 16000)
    with pytest.raises(BadItem, match="x.wav: it has 100 samples at 16000 Hz; the encoder needs 4"):
        list(equal_pieces([short], 16000, 3.0, 400))
    cut = recording(9000, 16000, 1, "cut.flac")
    content = Path(cut.name).read_bytes()
    Path(cut.name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadItem, match="cut.flac: its data are cut"):
        list(equal_pieces([cut], 16000, 0.1))
