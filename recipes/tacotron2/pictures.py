"""Pictures of a synthesiser: attention and spectrograms in one PNG.

A row an utterance: the text above, then its true spectrogram, what teacher forcing and free-running
synthesis make of it, and the attention of the latter. Time goes to the right, in the same scale in
all four; mel bands and symbols of the text go up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trainer import samples

if TYPE_CHECKING:
    from PIL import Image

HEIGHT, GAP, LINE = 160, 10, 16  # pixels of a panel, between panels, of a line of text
ZOOM = 2  # pixels to a frame
LOW, HIGH = -9.0, 1.0  # natural logarithm of a mel band: black, white
# Black through violet and orange to pale yellow, of equal steps in lightness (after "inferno").
COLOURS = torch.tensor(
    [
        [0, 0, 4], [49, 10, 93], [120, 28, 109], [188, 55, 84], [237, 105, 37], [251, 180, 26],
        [252, 255, 164],
    ],
    dtype=torch.float32,
)  # fmt: skip


class Picture(NamedTuple):
    """Data drawn of one utterance; spectrograms (F, M), attention (T, L)."""

    id: str
    text: str
    true: Tensor
    forced: Tensor
    free: Tensor
    attention: Tensor

    def cells(self) -> dict[str, samples.Cell]:
        """A row for `Brain.show`."""
        mels = {"true": self.true, "teacher-forced": self.forced, "free": self.free}
        return {
            "id": self.id,
            "text": self.text,
            **{name: samples.Image(mel.T, LOW, HIGH) for name, mel in mels.items()},
            "attention (up: text)": samples.Image(self.attention.T, 0.0, 1.0),
        }


class Gallery:
    """The first so many utterances of a stage."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drawn: list[Picture] = []

    @property
    def room(self) -> int:
        """Return the number of utterances it still takes."""
        return self.most - len(self.drawn)


def write_picture(path: Path, drawn: Sequence[Picture]) -> None:
    """Draw utterances under each other into a PNG, where there are any; its folder is made."""
    if not drawn:
        return
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("pictures need pillow: pip install 'cortex-speech[tts]'") from error
    rows = [_panels(each) for each in drawn]
    widths = [max(row[n][1].shape[1] for row in rows) for n in range(4)]
    high = LINE + HEIGHT + LINE + GAP
    sheet = Image.new("RGB", (sum(widths) + 5 * GAP, high * len(rows) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (each, row) in enumerate(zip(drawn, rows, strict=True)):
        left, top = GAP, GAP + number * high
        pen.text((left, top), each.text, fill="black")
        for (title, pixels), width in zip(row, widths, strict=True):
            sheet.paste(_image(pixels), (left, top + LINE))
            pen.text((left, top + LINE + HEIGHT), title, fill="grey")
            left += width + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _panels(each: Picture) -> list[tuple[str, Tensor]]:
    """Titles and values from 0 to 1, (HEIGHT, width)."""
    spectrograms = [("true", each.true), ("teacher-forced", each.forced), ("free", each.free)]
    panels = [
        (title, _grown(((mel.T - LOW) / (HIGH - LOW)).clamp(0, 1), mel.shape[0] * ZOOM))
        for title, mel in spectrograms
    ]
    width = each.free.shape[0] * ZOOM
    return [*panels, ("attention (up: text)", _grown(each.attention.T, width))]


def _grown(values: Tensor, width: int) -> Tensor:
    """(rows from below, columns) to (HEIGHT, width) from above, each value a rectangle."""
    image = values.detach().cpu().float().flip(0)[None, None]
    return torch.nn.functional.interpolate(image, (HEIGHT, width), mode="nearest")[0, 0]


def _image(values: Tensor) -> Image.Image:
    """Values from 0 to 1 in colours."""
    from PIL import Image

    place = values.nan_to_num().clamp(0, 1) * (len(COLOURS) - 1)
    below = place.floor().long().clamp(max=len(COLOURS) - 2)
    share = (place - below).unsqueeze(-1)
    colours = COLOURS[below] * (1 - share) + COLOURS[below + 1] * share
    return Image.fromarray(colours.round().to(torch.uint8).numpy(), "RGB")
