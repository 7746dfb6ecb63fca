"""A file as a cut: its samples, its name, and what is known of it."""

from pathlib import Path

import torch

from recipes.common.audio import read_header
from recipes.common.cuts import cut_of
from recipes.common.loading import load
from tests.recipes.common.speakers import RATE, noise, write


def test_a_cut_is_the_whole_file_and_what_is_known_of_it(tmp_path: Path) -> None:
    wav = 0.1 * noise(1001)
    path = write(tmp_path / "a.wav", wav)
    cut = cut_of(path, read_header(path), "b/a", speaker="ann", text="so it is")
    torch.testing.assert_close(load(cut, RATE), wav, atol=1e-4, rtol=0)
    assert (cut.id, cut.num_samples, cut.sampling_rate) == ("b/a", 1001, RATE)
    (said,) = cut.supervisions
    assert (said.speaker, said.text, said.gender) == ("ann", "so it is", None)
    assert said.duration == cut.duration == 1001 / RATE


def test_of_several_channels_the_first_is_taken(tmp_path: Path) -> None:
    both = 0.1 * noise(2 * 800).view(2, -1)
    path = write(tmp_path / "a.flac", both)
    cut = cut_of(path, read_header(path), "a")
    torch.testing.assert_close(load(cut, RATE), both[0], atol=1e-4, rtol=0)
    assert cut.supervisions == []
