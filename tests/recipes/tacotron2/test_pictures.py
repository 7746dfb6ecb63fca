"""Pictures show what they say."""

from pathlib import Path

import pytest
import torch

from recipes.tacotron2.pictures import GAP, HEIGHT, LINE, Picture, write_picture

Image = pytest.importorskip("PIL.Image", reason="needs the extra tts")


def test_attention_and_spectrograms_are_seen(tmp_path: Path) -> None:
    loud_below = torch.full((30, 8), -9.0)
    loud_below[:, :4] = 1.0
    each = Picture("a", "a text", loud_below, loud_below, loud_below[:20], torch.eye(20, 10))
    each.attention[10:, 9] = 1.0
    write_picture(tmp_path / "new" / "one.png", [each, each])
    with Image.open(tmp_path / "new" / "one.png") as sheet:
        assert sheet.size == (60 + 60 + 40 + 40 + 5 * GAP, 2 * (HEIGHT + 2 * LINE + GAP) + GAP)
        top, left = GAP + LINE, GAP
        light = sheet.convert("L")
        assert light.getpixel((left + 30, top + 10)) < 10  # high bands are silent
        assert light.getpixel((left + 30, top + HEIGHT - 10)) > 200
        start = left + 60 + 60 + 40 + 3 * GAP
        assert (
            light.getpixel((start + 1, top + HEIGHT - 2)) > 200
        )  # text goes up, time to the right
        assert light.getpixel((start + 1, top + 2)) < 10
        assert light.getpixel((start + 38, top + 2)) > 200


def test_nothing_drawn_is_no_file(tmp_path: Path) -> None:
    write_picture(tmp_path / "none.png", [])
    assert not list(tmp_path.iterdir())
