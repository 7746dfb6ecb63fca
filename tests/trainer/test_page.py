"""The report of a run shows what was logged, in whatever state that is, complete in one file."""

import json
import math
import random
import re
import resource
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer import RunOptions, StageReport, distributed
from trainer.loggers import JsonlLogger, LoggerCallback
from trainer.progress import Progress
from trainer.report import ReportLogger, compare, render, write_html
from trainer.report.axis import Axis, count, number
from trainer.report.chart import BUCKETS, Chart, Series, decimate, draw, running_mean
from trainer.report.history import read_history
from trainer.report.html import SCRIPT

FINITE = st.floats(-1e12, 1e12)
VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Reads a page strictly: every element is closed in its place, nothing is fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in {"link", "iframe", "object", "base"}
        for name, value in attributes:
            assert not name.startswith("on")
            assert name != "href" or str(value).startswith("#"), f"{tag} leads to {value}"
            assert name != "src" or str(value).startswith("data:"), f"{tag} fetches {value}"
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            return
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.headings.append(data)
        self.words.append(data)


def read(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    for numbers in scripts[:-1]:
        json.loads(numbers, parse_constant=pytest.fail)
    if scripts:
        assert scripts[-1] == SCRIPT
        assert page.index("Content-Security-Policy") < page.index("<title>")
    assert "url(" not in page
    assert "@import" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)
        assert "nan" not in re.sub(r'aria-label="[^"]*"|<title>.*?</title>', "", drawing).lower()
    return outline


def optimizer(**changes: Any) -> dict[str, Any]:
    return {
        "lr": 1e-3,
        "norm": 2.0,
        "norm_max": 9.0,
        "limit": 5.0,
        "clipped": 0.25,
        "stepped": 50,
        "skipped": 0,
        "overflowed": 0,
        "scale": 1.0,
    } | changes


def step(n: int, loss: Any = 1.0, **optimizers: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": n,
        "epoch": 1,
        "stage": "train",
        "loss": loss,
        "seconds": n * 0.1,
        "examples_per_second": 100.0 + n,
        "optimizers": optimizers or {"main": optimizer()},
    }


def stage(name: str, epoch: int | None, loss: Any, **metrics: Any) -> dict[str, Any]:
    counts = {"steps": 5, "examples": 50.0, "seconds": 1.5, "skipped": 0, "overflowed": 0}
    return {"stage": name, "epoch": epoch, "step": 100, "loss": loss} | metrics | counts


def logged(folder: Path, *records: dict[str, Any]) -> Path:
    log = JsonlLogger(folder)
    for record in records:
        log.write({"kind": "step" if "optimizers" in record else "stage", **record})
    log.close()
    return folder


# --- the page -------------------------------------------------------------------------------------


def test_one_loss_has_its_curves_its_test_and_its_limit(tmp_path: Path) -> None:
    records = [step(n * 10, loss=5.0 / n) for n in range(1, 11)]
    for epoch in (1, 2):
        records += [
            stage("train", epoch, 2.0 / epoch),
            stage("valid", epoch, 2.5 / epoch, wer=9.0 / epoch),
        ]
    folder = logged(tmp_path / "asr" / "demo" / "7", *records, stage("test", None, 1.3, wer=4.75))
    outline = read(write_html(folder).read_text(encoding="utf-8"))
    assert outline.headings == [
        "asr / demo / 7",
        "Losses and metrics",
        *("Training loss", "Loss by epoch", "wer by epoch"),
        "Optimization",
        *("Learning rate", "Gradient norm", "Clipped gradients"),
        "Speed",
        "Throughput",
        "Where the time goes",
        "Stages",
    ]
    text = " ".join(outline.words)
    assert "Trained and tested: 2 epochs, 100 optimizer steps, 10.0 s." in text
    assert "test wer 4.75" in text
    assert "lowest valid loss 1.25 epoch 2" in text
    assert "25.0 % of 500 logged steps were clipped." in text
    assert "limit 5" in text
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]


def test_every_section_has_a_link_at_the_top(tmp_path: Path) -> None:
    records = [step(n * 10) for n in range(1, 11)] + [stage("train", 1, 2.0)]
    page = write_html(logged(tmp_path / "run", *records)).read_text(encoding="utf-8")
    links = re.findall(r'<li><a href="#([^"]*)">([^<]*)</a>', page)
    sections = re.findall(r'<section id="([^"]*)"><h2>([^<]*)</h2>', page)
    assert len(sections) >= 4
    assert links == sections
    assert len({name for name, _ in sections}) == page.count("<section")


def test_two_players_have_a_line_each_and_a_norm_chart_each(tmp_path: Path) -> None:
    players = {
        "generator": optimizer(lr=2e-4, skipped=2, scale=8.0),
        "discriminator": optimizer(limit=math.inf, clipped=0.0, overflowed=3),
    }
    records = [step(n, {"generator": 40.0, "discriminator": 2.0}, **players) for n in (1, 2)]
    records.append(step(3, {"generator": None, "discriminator": math.nan}, **players))
    records.append(stage("valid", 1, {"generator": 30.0, "discriminator": None}, pesq=2.5))
    folder = logged(tmp_path, *records)
    page = render(folder)
    outline = read(page)
    for heading in (
        "Gradient norm of generator",
        "Gradient norm of discriminator",
        "Loss of generator by epoch",
        "pesq by epoch",
        "Steps not taken, so far",
    ):
        assert heading in outline.headings
    assert "Loss of discriminator by epoch" not in outline.headings  # it has no number to show
    assert page.count("<b>") == 0
    text = " ".join(outline.words)
    assert "Not tested yet" in text
    assert "steps skipped 6 generator 6" in text
    assert "steps overflowed 9 discriminator 9" in text
    training = next(f for f in re.findall(r"<figure>.*?</figure>", page) if "Training loss" in f)
    assert re.search(r"c0.*generator.*>lost<.*c1.*discriminator.*>lost<", training)
    norms = next(
        f for f in re.findall(r"<figure>.*?</figure>", page) if "of discriminator</h3>" in f
    )
    assert "limit" not in re.sub(r"class=\"[^\"]*\"", "", norms)  # infinite: nothing was limited


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\n\n",
        b'{"kind": "step", "st',
        b"\xff\xfe\x00 not a log \n[1, 2]\n7\nnull\n",
        b'{"kind": "step"}\n{"kind": "step", "step": "x"}\n{"kind": "step", "step": NaN}\n',
        b'{"stage": "test", "wer": 3.5}\n',
        b'{"stage": ["odd"], "epoch": {"a": 1}, "step": "x", "loss": [1], "seconds": "y"}\n',
        b'{"kind": "step", "step": 5, "loss": 1.5}\n',
        b'{"kind": "step", "step": 5, "loss": null, "optimizers": {"main": null}}\n',
        b'{"kind": "step", "step": 5, "loss": 0, "optimizers": {"a.b": {"lr": 0, "norm": 0}}}\n',
        b'{"kind": "step", "step": 1e300, "loss": -1e300}\n'
        b'{"kind": "step", "step": 1, "loss": 1e308}\n',
        b'{"kind": "step", "step": 1, "loss": -1e308}\n'
        b'{"kind": "step", "step": 2, "loss": 1e308}\n',
        b'{"kind": "step", "step": 1, "loss": 5e-324}\n'
        b'{"kind": "step", "step": 2, "loss": 1e308}\n',
        b'{"stage": "valid", "epoch": 1.5, "loss": ' + b"9" * 400 + b"}\n" + b"[" * 5000 + b"\n",
    ],
)
def test_a_log_in_any_state_has_a_report(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    outline = read(write_html(tmp_path).read_text(encoding="utf-8"))
    assert outline.headings
    text = " ".join(outline.words)
    if not content:
        assert "Nothing has been logged yet." in text
    if content and b"3.5" in content:
        assert "test wer 3.5" in text


@given(
    records=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["kind", "stage", "epoch", "step", "loss", "wer", "optimizers", "seconds"]
            ),
            st.none()
            | st.floats()
            | st.integers()
            | st.sampled_from(["step", "stage", "valid", "<b>", True])
            | st.dictionaries(st.sampled_from("ab"), st.floats() | st.none(), max_size=2),
        ),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_record_breaks_the_report(
    records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read(render(folder))


def test_everything_from_outside_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script>&amp;'<!--"
    players = {evil: optimizer(skipped=1), "other": optimizer()}
    folder = logged(
        tmp_path / "<b>run",
        *(step(n, {evil: 1.0 * n, "other": 2.0}, **players) for n in (1, 2)),
        stage(evil, 1, {evil: 1.0}, **{evil: 2.0}),
        stage("test", None, 1.0, **{evil: 3.0, "words": evil}),
    )
    for name in ("command.txt", "hyperparams.yaml", "environment.json"):
        (folder / name).write_bytes(f"{name} {evil} ".encode() + b"\xff")
    page = render(folder)
    outline = read(page)  # refuses any script but that of the page
    assert page.count("<script") == 2
    assert "<b>" not in page
    assert "".join(outline.words).count(evil) >= 10
    assert outline.count["details"] == 3


def test_the_files_that_repeat_the_run_are_in_it(tmp_path: Path) -> None:
    logged(tmp_path, step(1))
    (tmp_path / "command.txt").write_text("python recipes/asr/train.py hparams/asr/demo.yaml")
    outline = read(render(tmp_path))
    assert "python recipes/asr/train.py hparams/asr/demo.yaml" in outline.words
    assert outline.count["details"] == 1


def test_a_repeated_stage_and_a_repeated_step_count_once(tmp_path: Path) -> None:
    folder = logged(tmp_path, step(10, 4.0), step(20, 3.0), stage("valid", 1, 3.0, wer=50.0))
    logged(folder, step(20, 2.0), step(30, 1.0), stage("valid", 1, 2.0, wer=40.0))
    history = read_history(folder / "metrics.jsonl")
    assert list(history.steps["loss"].xs) == [10, 20, 30]
    assert list(history.steps["loss"].ys) == [4.0, 2.0, 1.0]
    assert [record["wer"] for record in history.stages] == [40.0]


def test_a_summary_of_the_test_does_not_hide_its_loss(tmp_path: Path) -> None:
    logged(tmp_path, stage("test", None, 1.25, wer=4.0), {"stage": "test", "wer": 3.5})
    text = " ".join(read(render(tmp_path)).words)
    assert "test wer 3.5" in text
    assert "test loss 1.25" in text


def test_a_full_disk_is_a_sentence_and_keeps_the_old_report(tmp_path: Path) -> None:
    folder = logged(tmp_path, step(1))
    old = write_html(folder).read_text()
    logged(folder, step(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"report could not be written \(File too large\); free"):
            write_html(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "report.html").read_text() == old
    assert not [path for path in folder.iterdir() if path.name.endswith(".new")]


def test_a_report_is_written_again_when_that_is_cheap_and_in_the_end(tmp_path: Path) -> None:
    report = logged(tmp_path, step(1, 1.5)) / "report.html"
    page = ReportLogger(tmp_path)
    page.scalars("step", {}, 1)
    page.close()
    assert not report.exists()  # No stage was logged since it began.
    page.scalars("stage", {}, 1)
    first = report.stat().st_mtime_ns
    logged(tmp_path, step(2, 2.5))
    page.scalars("stage", {}, 2)  # At once, which would be too often.
    assert report.stat().st_mtime_ns == first
    page.close()
    assert "2.5" in report.read_text()
    last = report.stat().st_mtime_ns
    page.close()
    assert report.stat().st_mtime_ns == last
    logged(tmp_path, step(3, 9.875))
    page.artifact("nonfinite/3", tmp_path / "nonfinite" / "3")
    page.close()
    assert "9.875" in report.read_text()


def test_a_run_has_a_report_after_its_outermost_fit_its_test_and_an_error(tmp_path: Path) -> None:
    report, brain = tmp_path / "report.html", SimpleNamespace(updates={}, progress=Progress())
    loggers = LoggerCallback(RunOptions(output_folder=str(tmp_path)), [JsonlLogger, ReportLogger])
    for _ in range(2):  # A fit within a hook of a fit.
        loggers.on_fit_start(brain)
    loggers.on_stage_end(brain, StageReport("train", 1, 1.5))
    first = report.stat().st_mtime_ns
    loggers.on_stage_end(brain, StageReport("valid", 1, 2.5))
    loggers.on_fit_end(brain)
    assert report.stat().st_mtime_ns == first
    loggers.on_fit_end(brain)
    assert "2.5" in report.read_text()
    loggers.on_evaluate_start(brain)
    loggers.on_stage_end(brain, StageReport("test", None, 7.125))
    loggers.on_evaluate_end(brain)
    assert "7.125" in report.read_text()
    loggers.on_fit_start(brain)
    for loss in (8.625, 9.875):
        loggers.on_stage_end(brain, StageReport("train", 2, loss))
    loggers.on_exception(brain, RuntimeError())
    assert "9.875" in report.read_text()


@pytest.mark.parametrize("why", ["folder", "rank", "debug", "replay"])
def test_without_a_folder_and_off_the_main_rank_there_is_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = None if why == "folder" else str(tmp_path)
    if why == "rank":
        monkeypatch.setattr(distributed, "is_main", lambda: False)
    options = RunOptions(
        output_folder=folder, debug=why == "debug", replay="step" if why == "replay" else None
    )
    loggers = LoggerCallback(options, [ReportLogger])
    loggers.on_stage_end(SimpleNamespace(updates={}), StageReport("test"))
    loggers.close()
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_one_warning_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = ReportLogger(tmp_path / "gone")
    for _ in range(2):
        page.scalars("stage", {}, 1)
        page.close()
    (warning,) = caplog.messages
    assert str(tmp_path / "gone" / "report.html") in warning
    assert "free some space or choose another output_folder" in warning
    logged(tmp_path / "gone", step(1))  # There is space again.
    page.scalars("stage", {}, 2)
    page.close()
    assert (tmp_path / "gone" / "report.html").exists()


def test_a_long_run_has_a_small_report_soon(tmp_path: Path) -> None:
    lines = (json.dumps({"kind": "step"} | step(n, math.sin(n))) for n in range(20_000))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    started = time.perf_counter()
    page = render(tmp_path)
    read(page)
    assert len(page) < 400_000
    assert time.perf_counter() - started < 30  # a wide margin: the point is that it is not minutes


# --- the drawing ----------------------------------------------------------------------------------


@given(
    values=st.lists(FINITE | st.floats(1e-9, 1e9), min_size=1, max_size=20),
    from_zero=st.booleans(),
    whole=st.booleans(),
)
@example([0.0], True, False)
@example([1e-300, 2e-300], False, False)
@example([1.0, 1.0000000001], False, False)
@example([0.3, 20.0], False, False)
@settings(max_examples=300, deadline=None)
def test_an_axis_holds_its_values_and_has_a_few_different_round_ticks(
    values: list[float], from_zero: bool, whole: bool
) -> None:
    axis = Axis(values, (100.0, 500.0), from_zero, whole)
    assert all(99.9 <= axis.at(value) <= 500.1 for value in values)
    ticks = axis.ticks(5)
    places = [axis.at(value) for value, _ in ticks]
    assert 1 <= len(ticks) <= 12
    assert all(99.9 <= place <= 500.1 for place in places)
    assert places == sorted(set(places))
    assert len({label for _, label in ticks}) == len(ticks)
    assert all(len(label) <= (16 if whole else 11) for _, label in ticks)


def test_an_axis_is_logarithmic_where_positive_values_span_decades() -> None:
    assert [label for _, label in Axis([1e-5, 1e-2], (0, 1)).ticks(5)] == [
        *("1e−5", "1e−4", "0.001", "0.01"),
    ]
    assert not Axis([1.0, 40.0], (0, 1)).log
    assert not Axis([0.0, 1e4], (0, 1)).log
    assert math.isnan(Axis([1e-5, 1e-2], (0, 1)).at(0.0))


@pytest.mark.parametrize(
    ("value", "tick", "expected"),
    [
        (0.0, None, "0"),
        (3.21, None, "3.21"),
        (1234.0, None, "1234"),
        (12345.0, None, "12.35k"),
        (-0.00012345, None, "−1.234e−4"),
        (2e6, 5e5, "2M"),
        (12000.0, 2000.0, "12k"),
        (0.25, 0.05, "0.25"),
        (1.0, 0.2, "1.0"),
        (math.nan, None, "–"),
        (99999.0, None, "100k"),
        (1e20, None, "1e20"),
    ],
)
def test_numbers_are_short(value: float, tick: float | None, expected: str) -> None:
    assert number(value, tick) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12345, "12,345"),
        (12345.0, "12,345"),
        (12345.6, "12.35k"),
        (10**400, f"{10**400:,}"),
        (math.nan, "–"),
    ],
)
def test_whole_numbers_are_in_full(value: float, expected: str) -> None:
    assert count(value) == expected


@given(seed=st.integers(), length=st.integers(1, 5000), gaps=st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_fewer_points_keep_every_extreme_and_every_gap(seed: int, length: int, gaps: float) -> None:
    draws = random.Random(seed)
    values = (math.nan if draws.random() < gaps else draws.gauss(0, 1) for _ in range(length))
    points = [(float(x), y) for x, y in enumerate(values)]
    kept = decimate(points)
    assert len(kept) <= 3 * BUCKETS
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    for n in range(BUCKETS if length > 3 * BUCKETS else 0):
        low, high = n * len(points) // BUCKETS, (n + 1) * len(points) // BUCKETS
        part = [y for _, y in points[low:high]]
        left = [y for x, y in kept if low <= x < high]
        known = [y for y in part if not math.isnan(y)]
        if known:
            assert min(known) in left
            assert max(known) in left
        assert any(map(math.isnan, part)) == any(map(math.isnan, left))


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    ys = [1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0]
    drawing = draw(Chart("Loss", "epoch", "loss", [Series("train", range(7), ys)]))
    path = re.search(r'class="line c0" d="([^"]*)"', drawing)
    assert path is not None
    assert re.sub(r"[\d. ]+", "", path[1].replace("h0", "h")) == "MhLMhMhL"
    assert drawing.count("<title>") == 5


def test_a_running_mean_is_the_mean_around_and_leaves_gaps() -> None:
    points = [(float(x), math.nan if x == 500 else float(x % 2)) for x in range(1001)]
    mean = running_mean(points)
    assert math.isnan(mean[500][1])
    assert all(abs(y - 0.5) < 0.06 for x, y in mean if x != 500)
    assert [x for x, _ in mean] == [x for x, _ in points]


LINKED = ("command.txt", "hyperparams.yaml", "environment.json", "train.log")


@pytest.mark.parametrize("name", LINKED)
def test_a_file_elsewhere_that_a_run_folder_links_is_not_shown(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "elsewhere.txt"
    secret.write_text('{"revision": "s3cr3t"}\nTraceback (most recent call last):\nkey: s3cr3t\n')
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()
        (run / name).symlink_to(secret)
    page = render(runs[0])
    assert "s3cr3t" not in page
    assert ("lies outside of" in page) == (name != "train.log")
    assert "s3cr3t" not in compare(runs, tmp_path / "page.html").read_text()


def test_records_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere.jsonl").write_text('{"kind": "step", "step": 1}\n')
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl' lies outside of"):
        render(tmp_path / "run")
