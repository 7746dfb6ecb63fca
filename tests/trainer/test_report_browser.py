"""A browser draws every chart of a report, plays every sound, and finds nothing to complain of.

Needs playwright and Chromium: that of the system, as `apt-get install chromium` gives, or that of
`playwright install chromium`. With SCREENSHOTS=FOLDER the pages are kept as pictures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.shown import EVIL, make_run
from trainer.report import compare, write_html

playwright = pytest.importorskip("playwright.sync_api")

WIDTHS = (390, 1280)
PLAYED = """async () => {
  const found = [];
  for (const each of document.querySelectorAll("audio")) {
    each.muted = true;
    await each.play();
    for (let n = 0; n < 100 && !each.currentTime; n += 1) {
      await new Promise((done) => setTimeout(done, 20));
    }
    found.push([each.readyState, each.duration, each.currentTime > 0, each.error === null]);
    each.pause();
  }
  return found;
}"""
DRAWN = """() => [...document.querySelectorAll("figure > svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const lines = [...svg.querySelectorAll("g.series path.line:not(.event)")];
  const sizes = lines.map((line) => line.getBBox()).filter((each) => each.width + each.height > 0);
  const inside = sizes.every((each) => each.x > 0 && each.y > 0 && each.x + each.width < 641
    && each.y + each.height < 291);
  return [box.width > 100 && box.height > 50, sizes.length > 0, inside];
})"""
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, n) => sum + each * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (element) => {
    let seen = [0, 0, 0, 0];  // Layers from the front to the back, premultiplied.
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(at).backgroundColor);
      const rest = (1 - seen[3]) * a;
      seen = [seen[0] + r * rest, seen[1] + g * rest, seen[2] + b * rest, seen[3] + rest];
    }
    return seen;
  };
  const poor = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || each.closest("script") || !each.getClientRects().length) continue;
    const style = getComputedStyle(each);
    const ink = light(rgb(each.closest("svg") ? style.fill : style.color));
    const paper = light(behind(each));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) poor.push([each.textContent.slice(0, 30), each.className, ratio]);
  }
  return poor;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with playwright.sync_playwright() as running:
        try:
            found = running.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, n / 10, rows=2) for n, name in enumerate(("one", "two"))]
    return {"report": write_html(runs[0]), "comparison": compare(runs, folder / "out.html")}


class Complaints(list[str]):
    """Faults of a page: errors, and anything that it asks the network for."""

    def watch(self, page: Any) -> Any:
        page.on("console", lambda message: self.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("request", lambda asked: self.ask(asked.url))
        return page

    def ask(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.append(url)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_everything_is_drawn_and_plays(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    complaints = Complaints()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints.watch(page).goto(pages[name].as_uri())
    drawn = page.evaluate(DRAWN)
    assert len(drawn) >= 10
    assert all(all(each) for each in drawn)
    played = page.evaluate(PLAYED)
    assert len(played) == (5 if name == "report" else 10)
    assert all(
        state == 4 and 0.2 < seconds < 1 and runs and fine for state, seconds, runs, fine in played
    )
    images = page.evaluate("[...document.images].map((each) => [each.complete, each.naturalWidth])")
    assert images
    assert all(done and size for done, size in images)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    assert "owned" not in page.title()
    assert EVIL[:20] in page.inner_text("main")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
    assert complaints == []
    page.close()


def test_values_legend_and_time_are_at_hand_by_mouse_and_keyboard(
    browser: Any, pages: dict[str, Path]
) -> None:
    complaints = Complaints()
    page = complaints.watch(browser.new_page(viewport={"width": 1280, "height": 900}))
    page.goto(pages["comparison"].as_uri())
    figure = page.locator("figure", has=page.get_by_text("Training loss", exact=True))
    chart, readout = figure.locator("> svg"), figure.locator("output")
    chart.hover(position={"x": 200, "y": 80})
    first = readout.inner_text()
    assert first.startswith("optimizer step ")
    assert "one " in first
    assert "two " in first
    step = int(first.split(":")[0].split()[-1])
    expected = 3 / step**0.5
    assert float(first.split("one ")[1].split(",")[0]) == pytest.approx(expected, abs=0.01)
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith(f"optimizer step {step + 10}:")
    button = figure.get_by_role("button", name="one")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert not figure.locator("g.series").first.is_visible()
    chart.hover(position={"x": 210, "y": 80})
    assert "one " not in readout.inner_text()
    button.click()
    assert figure.locator("g.series").first.is_visible()
    before = chart.locator("path.line").first.get_attribute("d")
    timed = page.get_by_role("button", name="Draw charts over time")
    timed.click()
    assert "seconds of training" in chart.text_content()
    after = chart.locator("path.line").first.get_attribute("d")
    assert after != before
    chart.hover(position={"x": 300, "y": 80})
    assert readout.inner_text().startswith("seconds of training ")
    # 30 of 80 seconds pass between the steps 100 and 110, at 10 and 11 of 20 points.
    xs = [float(each) for each in re.findall(r"[ML](\S+)", after)]
    assert (xs[10] - xs[9]) / (xs[-1] - xs[0]) == pytest.approx(32.5 / 77.5, abs=0.01)
    page.get_by_role("button", name="Draw charts over steps").click()
    assert chart.locator("path.line").first.get_attribute("d") == before
    page.goto(pages["report"].as_uri())
    page.locator('a[href="#step-56"]').first.press("Enter")
    assert page.url.endswith("#step-56")
    page.close()
    assert complaints == []


def test_a_page_is_complete_without_its_script(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["report"].as_uri())
    assert page.locator("button").count() == 0
    assert page.locator("figure > svg").count() >= 10
    assert page.locator("audio").count() == 5
    assert page.get_by_text("lowest").first.is_visible()
    context.close()


def test_a_table_of_layers_with_long_names_fits_or_shows_that_it_scrolls(
    browser: Any, tmp_path: Path
) -> None:
    norms = {"grad": 1.234e-3, "weight": 12.34, "update": 1.234e-5, "ratio": 1.234e-6}
    layer = "model.encoder.transformer.layers.23.feed_forward.intermediate_dense.lora_A.default"
    records = [
        {"kind": "monitor", "step": step, "optimizers": {}, "layers": {layer: norms}}
        for step in (100, 200, 300)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    path, room = write_html(tmp_path), {}
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(path.as_uri())
        table = page.locator("#section-layers .wide")
        room[width] = table.evaluate("(each) => each.clientWidth - each.scrollWidth")
        assert "scroll" in table.evaluate("(each) => getComputedStyle(each).backgroundAttachment")
        page.close()
    assert room[1280] >= 0 > room[390]
