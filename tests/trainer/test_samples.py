"""Samples are kept bounded and whole, shown as they are, and go to every logger."""

import json
import math
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.shown import EVIL, RATE, every_cell, make_run, noise, show, tone
from tests.trainer.small import Regressor, batches, make
from tests.trainer.test_page import read
from trainer import Checkpointer, RunOptions, Stage, distributed, launch
from trainer.loggers import LoggerCallback, SampleLogger
from trainer.loggers.files import MAX_ROWS, MAX_SETS, slug
from trainer.loggers.protocol import Logger
from trainer.report import compare, render, write_html
from trainer.samples import (
    LEVELS,
    MAX_PIXELS,
    MAX_SECONDS,
    Aligned,
    Audio,
    Histogram,
    Image,
    Matrix,
    Samples,
    align,
    encode,
    png,
    spectrogram,
)  # fmt: skip

TOKENS = st.lists(st.sampled_from("abc"), max_size=5)


def table(folder: Path, title: str = "test") -> dict[str, Any]:
    return json.loads((folder / "samples" / title / "samples.json").read_text())


def pixels(data: bytes) -> Tensor:
    """The levels of a PNG file of one byte a pixel, without filters, its check sums verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert len(chunks[b"PLTE"]) == 3 * LEVELS
    lines = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


# --- the cells ------------------------------------------------------------------------------------


@given(said=TOKENS, heard=TOKENS)
@settings(max_examples=200, deadline=None)
def test_an_alignment_has_both_texts_and_the_fewest_errors(
    said: list[str], heard: list[str]
) -> None:
    pairs = align(said, heard)
    assert [one for one, _ in pairs if one is not None] == said
    assert [other for _, other in pairs if other is not None] == heard

    def fewest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        rest = fewest(a[1:], b[1:]) + (a[0] != b[0])
        return min(rest, fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1)

    errors = sum(one != other for one, other in pairs)
    assert errors == fewest(tuple(said), tuple(heard))


@pytest.mark.parametrize("kind", [".flac", ".wav"])
def test_a_sound_keeps_its_rate_and_its_samples(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    soundfile = pytest.importorskip("soundfile")
    signal = noise(0.1, rate=22050)
    if kind == ".wav":
        monkeypatch.setitem(sys.modules, "soundfile", None)
    suffix, content = encode(signal, 22050)
    assert suffix == kind
    (tmp_path / f"a{suffix}").write_bytes(content)
    found, rate = soundfile.read(tmp_path / f"a{suffix}", dtype="float32")
    assert rate == 22050
    assert torch.allclose(torch.from_numpy(found), signal, atol=1 / 32000)


def test_a_rate_that_flac_cannot_have_is_kept_all_the_same() -> None:
    assert encode(torch.zeros(10), 1_000_000)[0] == ".wav"


def test_a_sound_is_cut_clipped_and_told_of(tmp_path: Path) -> None:
    long = torch.full((1, int(31 * 8000)), 2.0)
    long[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    show(tmp_path, "test", [{"id": "a", "sound": Audio(long, 8000)}])
    cell = table(tmp_path)["rows"][0]["sound"]
    assert (cell["seconds"], cell["shown"], cell["not_finite"]) == (31.0, MAX_SECONDS, 3)
    text = " ".join(read(render(tmp_path)).words)
    assert "the first 30 s of 31 s, 3 samples not finite" in text


@pytest.mark.parametrize(
    ("make_cell", "message"),
    [
        (lambda: Audio(torch.zeros(2, 100), 8000), r"\[2, 100\]; allowed: \(T,\) or \(1, T\)"),
        (lambda: Audio(torch.zeros(0), 8000), r"\[0\]; allowed"),
        (lambda: Audio(torch.zeros(()), 8000), r"\[\]; allowed"),
        (lambda: Audio(torch.zeros(9), 0), "the rate 0; allowed: whole numbers above 0"),
        (lambda: Audio(memoryview(b"12"), 8000), "samples of type memoryview; allowed: a tensor"),
        (lambda: Image([[0.0]]), "values of type list; allowed: a tensor"),
        (lambda: Image(torch.zeros(3)), r"\[3\]; allowed: \(rows, columns\)"),
        (lambda: Matrix([[1, 2]], ["a"]), r"\[1, 2\] and 1 labels"),
    ],
)
def test_a_cell_that_cannot_be_shown_is_a_sentence(make_cell: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cell()


def test_a_picture_has_its_first_row_below_and_its_ends_dark_and_light() -> None:
    values = torch.zeros(4, 6)
    values[0, 0], values[3, 5] = 1.0, math.nan
    levels = pixels(Image(values).png())
    assert levels.shape == (4, 6)
    assert levels[3, 0] == LEVELS - 1
    assert levels.sum() == LEVELS - 1
    big = pixels(Image(torch.rand(700, 3000)).png())
    assert big.shape == MAX_PIXELS
    assert not pixels(Image(torch.full((2, 2), math.nan)).png()).any()
    assert pixels(png(torch.arange(4, dtype=torch.uint8)[None])).tolist() == [[0, 1, 2, 3]]


def test_a_spectrogram_shows_a_tone_at_its_frequency_and_level() -> None:
    rate = 16000
    for amplitude, expected in ((1.0, 0.0), (0.01, -40.0)):
        levels = spectrogram(amplitude * tone(1.0, 2000.0, rate) / 0.3, rate).values
        row = int(levels.mean(1).argmax())
        assert row * rate / 2 / (levels.shape[0] - 1) == pytest.approx(2000, rel=0.01)
        assert float(levels.max()) == pytest.approx(expected, abs=0.5)
    assert spectrogram(torch.zeros(3), rate).values.shape[1] == 1


def test_a_histogram_counts_each_group_by_itself() -> None:
    record = Histogram({"a": [0.0, 1.0, math.nan], "b": [0.25] * 8, "c": []}).record(lambda *_: "")
    assert (record["low"], record["high"]) == (0.0, 1.0)
    for name, total in (("a", 1.0), ("b", 1.0), ("c", 0.0)):
        assert sum(record["shares"][name]) == pytest.approx(total)
    assert max(record["shares"]["b"]) == 1.0


# --- the folder -----------------------------------------------------------------------------------


def test_the_latest_rows_of_a_title_stay_and_no_file_of_others(tmp_path: Path) -> None:
    for step in (10, 20):
        rows = [{"id": n, "sound": Audio(tone(0.05), RATE, True)} for n in range(MAX_ROWS + 5)]
        show(tmp_path, "valid", rows, step)
    folder = tmp_path / "samples" / "valid"
    found = table(tmp_path, "valid")
    assert found["step"] == 20
    assert len(found["rows"]) == MAX_ROWS
    assert found["left_out"] == 5
    names = {cell[key] for row in found["rows"] for cell in row.values() for key in ("file",
             "picture") if key in cell}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"samples.json", *names}
    assert "5 more are left out" in render(tmp_path)
    for number in range(MAX_SETS + 3):
        show(tmp_path, f"epoch {number}", [{"id": "a"}], number)
    assert len(list((tmp_path / "samples").iterdir())) == MAX_SETS


def test_a_resumed_run_forgets_what_it_will_show_again(tmp_path: Path) -> None:
    show(tmp_path, "valid", [{"id": "a"}], 20)
    show(tmp_path, "test", [{"id": "a"}], 30)
    (tmp_path / "samples" / "broken").mkdir()
    (tmp_path / "samples" / "broken" / "samples.json").write_text("{")
    SampleLogger(tmp_path).resume(20)
    assert sorted(each.name for each in (tmp_path / "samples").iterdir()) == ["broken", "valid"]


def test_a_set_that_cannot_be_written_whole_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(tmp_path, "test", [{"id": "before", "sound": Audio(tone(), RATE)}], 10)

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.samples.encode", fail)
    with pytest.raises(OSError, match=r"samples could not be written .* free some space"):
        show(tmp_path, "test", [{"id": "x"}, {"id": "y", "sound": Audio(tone(), RATE)}], 20)
    assert table(tmp_path)["rows"][0]["id"]["text"] == "before"
    assert read(render(tmp_path)).count["audio"] == 1


@given(one=st.text(max_size=80), other=st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_titles_have_folders_of_their_own(one: str, other: str) -> None:
    for name in (slug(one), slug(other)):
        assert name == Path(name).name
        assert name not in ("", ".", "..")
        assert len(name) <= 80
    assert (slug(one) == slug(other)) == (one == other)


# --- a run ----------------------------------------------------------------------------------------


class Recorder(Logger):
    """Notes what it is given."""

    found: list[tuple[str, str]] = []

    def __init__(self, folder: Path) -> None:
        type(self).found = []

    def audio(self, name: str, samples: Tensor, rate: int, step: int) -> None:
        assert samples.dim() == 1
        self.found.append(("audio", name))

    def figure(self, name: str, png: bytes, step: int) -> None:
        pixels(png)
        self.found.append(("figure", name))

    def text(self, name: str, text: str, step: int) -> None:
        self.found.append(("text", name))

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.found.append(("histogram", name))


class Showing(Regressor):
    """Shows a row at the end of each evaluation."""

    def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> Any:
        if stage is not Stage.TRAIN:
            self.show(stage.value, [every_cell()], "A note.")
        return super().on_stage_end(stage, stage_loss, epoch)


def test_what_a_recipe_shows_is_in_the_folder_the_report_and_the_loggers(tmp_path: Path) -> None:
    brain = make(Showing, output_folder=str(tmp_path))
    brain.callbacks.append(LoggerCallback(brain.options, [Recorder]))
    brain.fit([1, 2], batches(3), batches(1))
    brain.evaluate(batches(1))
    assert (table(tmp_path, "valid")["epoch"], table(tmp_path)["epoch"]) == (2, None)
    assert table(tmp_path)["note"] == "A note."
    outline = read((tmp_path / "report.html").read_text())
    assert outline.headings.index("Samples: test") < outline.headings.index("Samples: valid")
    assert outline.count["audio"] == 4
    kinds = {kind for kind, name in Recorder.found if name.startswith("test/a-1/")}
    assert kinds == {"audio", "figure", "text", "histogram"}
    assert ("text", "test/a-1/id") not in Recorder.found


def test_a_resumed_run_keeps_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    class Predicting(Regressor):
        def on_stage_end(self, stage: Any, stage_loss: Any, epoch: int | None = None) -> Any:
            weights = torch.cat([each.detach().flatten() for each in self.modules.parameters()])
            self.show(
                stage.value, [{"id": epoch, "loss": stage_loss, "weights": Audio(weights, 9)}]
            )

    def run(folder: Path, *parts: list[int]) -> dict[str, bytes]:
        for epochs in parts:
            saves = Checkpointer(folder / "checkpoints")
            brain = make(Predicting, output_folder=str(folder), checkpointer=saves)
            brain.fit(epochs, batches(3), batches(1))
            SampleLogger(folder).samples(Samples("later", [{"id": "lost"}], 99))
        SampleLogger(folder).resume(6)
        kept = folder / "samples"
        return {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()}

    whole = run(tmp_path / "whole", [1, 2])
    assert len(whole) == 4
    assert run(tmp_path / "parts", [1], [1, 2]) == whole


@pytest.mark.parametrize("why", ["folder", "rank", "debug"])
def test_nothing_is_kept_without_a_folder_and_off_the_main_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "rank":
        monkeypatch.setattr(distributed, "is_main", lambda: False)
    folder = None if why == "folder" else str(tmp_path)
    options = RunOptions(output_folder=folder, debug=why == "debug")
    brain = make(Showing)
    brain.callbacks.append(LoggerCallback(options, [SampleLogger]))
    brain.show("test", [every_cell()])
    assert not list(tmp_path.iterdir())


# --- the page -------------------------------------------------------------------------------------


def test_every_cell_is_in_the_page_and_hostile_text_is_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("<b>", EVIL):
        row = {name: name, "id": name, "words": Aligned(EVIL, f"{EVIL} x")}
        row["matrix"] = Matrix([[1, 0], [0, 1]], [EVIL, "b"])
        row["shares"] = Histogram({EVIL: [1.0, 2.0]}, EVIL)
        show(folder, name, [row])
    page = write_html(folder).read_text(encoding="utf-8")
    outline = read(page)
    text = " ".join(outline.words)
    assert outline.count["audio"] == 7
    assert outline.count["img"] == 6
    assert "owned" in text
    assert "\u202e" not in page
    assert page.count("<script") == 2
    assert "<b>" not in page
    assert "PESQ 2.31" in text
    assert "lost lost" in text
    assert 'href="#step-56"' in page
    assert 'id="step-56"' in page
    assert "Mean of a step" in text
    assert "--lr=0.1" in text
    assert "from optimizer step 100 on: lr: 0.2 -> 0.1" in text


def test_a_page_with_many_long_sounds_is_below_10_mb(tmp_path: Path) -> None:
    rows = [
        {"id": n, **{name: Audio(noise(6.0, n), RATE, True) for name in ("noisy", "clean")}}
        for n in range(20)
    ]
    show(tmp_path, "test", rows)
    page = write_html(tmp_path)
    assert 8e6 < page.stat().st_size < 10e6
    outline = read(page.read_text())
    assert 20 <= outline.count["audio"] < 40
    assert "sounds and pictures are not in this page" in " ".join(outline.words)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../secret.flac"},
        {"file": "/etc/passwd"},
        {"file": None},
        {"file": "a\0b"},
        {"file": "gone.flac"},
        {"file": "text.flac"},
        {"seconds": "x"},
        {"seconds": None},
        {"picture": ["x"]},
        {"kind": "aligned", "pairs": [[1]]},
        {"kind": "aligned", "pairs": 7},
        {"kind": "matrix", "labels": ["a"], "values": [["x"]]},
        {"kind": "matrix", "labels": ["a"], "values": []},
        {"kind": "histogram", "low": 1e308, "high": -1e308, "shares": {"a": [1e308, None]}},
        {"kind": "histogram", "low": 0, "high": 1, "shares": {"a": []}, "label": "x"},
        {"kind": "number", "value": "x"},
        {"kind": ["odd"]},
    ],
)
def test_a_cell_of_any_content_leaves_the_rest_of_the_page(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = make_run(tmp_path / "run", rows=1)
    (tmp_path / "run" / "samples" / "secret.flac").write_bytes(b"fLaC secret")
    place = folder / "samples" / "test"
    (place / "text.flac").write_text("no sound")
    found = table(folder)
    found["rows"][0]["clean"] |= change
    (place / "samples.json").write_text(json.dumps(found))
    page = render(folder)
    outline = read(page)
    assert outline.count["audio"] == (3 if change.keys() == {"picture"} else 2)
    assert "secret" not in page
    assert "Throughput" in outline.headings


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", '{"rows": 3}', '{"rows": [3, null, {"a": 3}]}', '{"title": 3, "rows": [{}]}',
     '{"rows": [{"id": {"text": ["x"]}}], "epoch": "x", "left_out": "y", "note": 4}'],
)  # fmt: skip
def test_a_table_of_any_content_leaves_the_rest_of_the_page(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "run", rows=1)
    (folder / "samples" / "test" / "samples.json").write_text(content)
    assert read(render(folder)).count["audio"] == 1


def test_a_few_words_stand_beside_numbers_and_small_rows_beside_each_other(tmp_path: Path) -> None:
    row = {"id": "a", "said": "<one>", "loss": 0.5, "sound": Audio(tone(), RATE)}
    show(tmp_path, "test", [row, {**row, "id": "b"}])
    page = render(tmp_path)
    assert page.count("<div><dt>said</dt><dd>&lt;one&gt;</dd></div>") == 2
    assert page.count('<div class="samples small">') == 1
    show(tmp_path, "test", [{**row, "said": "a word " * 9}, row])  # A text, as wide as the page.
    page = render(tmp_path)
    assert page.count("<dt>said</dt>") == 1
    assert '<div class="samples small">' not in page


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    show(tmp_path / "secret", "test", [{"id": "secret", "sound": Audio(tone(), RATE)}])
    folder = make_run(tmp_path / "run", rows=1)
    (folder / "samples" / "other").symlink_to(tmp_path / "secret" / "samples" / "test")
    page = render(folder)
    assert "secret" not in page
    show(folder, "other 2", [{"id": "a"}])  # Which looks at the other sets, too.
    assert (tmp_path / "secret" / "samples" / "test" / "samples.json").exists()


def test_a_run_that_an_error_has_ended_shows_its_last_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=1)
    lines = [f"2026-01-01 10:00:00 epoch {n} train: loss 1" for n in range(100)]
    lines += ["Traceback (most recent call last):", f"ValueError: {EVIL}"]
    log = folder / "train.log"
    log.write_text("\n".join(lines[:-2] + [f"2026-01-01 10:00:01 {each}" for each in lines[-2:]]))
    outline = read(render(folder))
    assert "The run has ended with an error" in outline.headings
    assert "ValueError" in " ".join(outline.words)
    with log.open("a") as file:
        file.write("\n2026-01-01 11:00:00 resuming after epoch 3\n")
    assert "The run has ended with an error" not in read(render(folder)).headings


# --- several runs ---------------------------------------------------------------------------------


def test_runs_are_compared_with_their_spread_over_seeds(tmp_path: Path) -> None:
    shifts = {0.1: (0.0, 0.2), 0.5: (1.0, 1.4)}
    folders = [
        make_run(tmp_path / f"lr={lr}" / str(n), shift, rows=2, lr=lr)
        for lr, two in shifts.items()
        for n, shift in enumerate(two)
    ]
    page = compare(folders, tmp_path / "out.html").read_text()
    outline = read(page)
    text = " ".join(outline.words)
    for lr, (one, other) in shifts.items():
        mean, spread = 19 + (one + other) / 2, abs(other - one) / math.sqrt(2)
        assert f"lr={lr} 2 {mean:.4g} ± {spread:.4g}" in text
    assert outline.headings[0] == "4 runs"
    assert "lr=0.1/0" in text
    assert page.count('class="runs"') == 3  # Two clips of the test, one of the validation.
    assert outline.count["audio"] == 4 * 5
    chart = next(f for f in page.split("<figure>") if "Training loss" in f)
    assert chart.count('<g class="series"') == 4
    assert "width" not in outline.words  # It is the same in all.


def test_runs_of_different_tasks_and_broken_ones_are_compared(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", rows=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = make_run(tmp_path / "<b>cut", 0.5, rows=1)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stage", "stage": "test", "pesq": 2.')
    (cut / "hyperparams.yaml").write_text("lr: [")
    (cut / "environment.json").write_text("{")
    (cut / "train.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
    other = make_run(tmp_path / "other", 2.0, rows=1)
    lines = (other / "metrics.jsonl").read_text().replace('"wer"', '"pesq"')
    (other / "metrics.jsonl").write_text(lines)
    outline = read(compare([good, empty, cut, other], tmp_path / "out.html").read_text())
    text = " ".join(outline.words)
    assert "none logged" in text
    assert "its settings cannot be read" in text
    assert "KeyError: 'x'" in text
    assert {"test wer", "test pesq"} <= set(outline.words)
    assert outline.count["audio"] == 3 * 3
    read(compare([empty], tmp_path / "out.html").read_text())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is nothing to compare"),
        (["gone"], "gone is no folder; allowed: folders of runs"),
        ([str(n) for n in range(30)], "30 runs are too many for a page; allowed: up to 24"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare([tmp_path / name for name in names], tmp_path / "out.html")
    assert not list(tmp_path.iterdir())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_no_bytes_in_the_files_of_a_run_break_a_page(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draws = random.Random(seed)
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", rows=1)
    for path in [*folder.rglob("*.json*"), *folder.glob("*.txt"), *folder.glob("*.yaml")]:
        data = bytearray(path.read_bytes())
        for _ in range(draws.randrange(4)):
            data[draws.randrange(len(data))] = draws.randrange(256)
        path.write_bytes(data[: draws.randrange(len(data) // 2, len(data) + 1)])
    read(render(folder))
    read(compare([folder, folder.parent], folder / "out.html").read_text())


def test_the_program_of_the_documentation_shows_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "reports.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert program is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(program[1], str(page), "exec"), {"__name__": "program"})
    outline = read((tmp_path / "runs" / "halver" / "report.html").read_text(encoding="utf-8"))
    assert "Samples: valid" in outline.headings
    assert (outline.count["audio"], outline.count["img"]) == (2, 1)


def test_a_run_that_fails_has_its_error_in_the_report(tmp_path: Path) -> None:
    def train(run: Any) -> None:
        brain = make(Showing, output_folder=str(run.folder))
        brain.fit([1], batches(2), batches(1))
        raise RuntimeError("the end & more")

    with pytest.raises(RuntimeError):
        launch(train, {"progressbar": False}, tmp_path / "run")
    text = " ".join(read((tmp_path / "run" / "report.html").read_text()).words)
    assert "The run has ended with an error" in text
    assert "RuntimeError: the end & more" in text
