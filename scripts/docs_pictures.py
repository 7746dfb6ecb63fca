"""Draw the pictures of the documentation: python scripts/docs_pictures.py RUN.

`RUN` is a run folder of a demo, whose report is shown. Needs playwright and Chromium; Pillow, if it
is there, makes the files smaller. Look at what it has made.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn

import trainer
from trainer.clipping import AutoClip
from trainer.report import write_html
from trainer.report.chart import Chart, Series, draw

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST = 100_000  # bytes of a picture


class Regression(trainer.Brain):
    """Fits random targets, and keeps the report of every step."""

    def compute_forward(self, batch: Any, stage: trainer.Stage) -> Any:
        return self.modules.net(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: trainer.Stage) -> Any:
        return nn.functional.mse_loss(predictions, batch[1])


class Reports(trainer.Callback):
    """Keeps the report of each loss."""

    def __init__(self) -> None:
        self.found: list[trainer.StepReport] = []

    def on_loss(self, brain: trainer.Brain, report: trainer.StepReport) -> None:
        self.found.append(report)


def clipping() -> str:
    """Return a chart of gradient norms, some of broken batches, and of AutoClip's limit."""
    torch.manual_seed(1)
    inputs, truth = torch.randn(300, 16, 8), torch.randn(8, 1)
    targets = inputs @ truth + 0.3 * torch.randn(300, 16, 1)
    inputs[40::60] *= 6
    kept = Reports()
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    options = {"device": "cpu", "progressbar": False}
    hparams = {"clip": AutoClip(percentile=50)}
    brain = Regression({"net": net}, torch.optim.Adam, hparams, options, callbacks=[kept])
    brain.fit([1], list(zip(inputs, targets, strict=True)))
    steps = [float(n + 1) for n in range(len(kept.found))]
    norms = [float(each.norm or 0) for each in kept.found]
    limits = [float(each.limit or 0) for each in kept.found]
    lines = [Series("norm", steps, norms), Series("limit", steps, limits, 1, "limit")]
    title = "AutoClip, percentile 50: norms above the dashed line are clipped"
    return draw(Chart(title, "optimizer step", "gradient norm", lines))


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Open Chromium."""
    system = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as running:
        found = running.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield found
        found.close()


def keep(name: str, picture: bytes) -> None:
    """Write a picture, in 48 colours where Pillow is installed."""
    path = IMAGES / name
    path.write_bytes(picture)
    with contextlib.suppress(ImportError):
        from PIL import Image

        Image.open(path).quantize(48).save(path, optimize=True)
    print(path, path.stat().st_size)
    assert path.stat().st_size < MOST


def main(run: Path) -> None:
    """Draw all pictures."""
    IMAGES.mkdir(exist_ok=True)
    with browser() as chromium, tempfile.TemporaryDirectory() as scratch:
        name = Path(*run.absolute().parts[-3:])  # As in results/TASK/NAME/SEED.
        copy = Path(shutil.copytree(run, Path(scratch, name)))
        page: Page = chromium.new_page(viewport={"width": 1000, "height": 860})
        page.goto(write_html(copy).as_uri())
        page.get_by_role("button").first.wait_for()
        keep("report.png", page.screenshot())
        html = Path(copy, "report.html").read_text(encoding="utf-8")
        head = html[: html.index("<body")]
        Path(scratch, "chart.html").write_text(
            f"{head}<body><main>{clipping()}</main></body></html>"
        )
        page.set_viewport_size({"width": 800, "height": 600})
        page.goto(Path(scratch, "chart.html").as_uri())
        keep("clipping.png", page.locator("figure").screenshot())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
