"""The study runs, goes on where it was, tunes fairly, and says what its numbers say."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.clipping_study.cells import TRAININGS, Cell, about_spikes, clipper, finish
from recipes.clipping_study.experiments import TUNING, Experiment, experiments
from recipes.clipping_study.findings import Finding, Row, steps_to
from recipes.clipping_study.learner import Lesson, shortened
from recipes.clipping_study.strip import Plot, Strip, draw_strips
from recipes.clipping_study.study import Results, choose, do
from recipes.clipping_study.train import train
from recipes.clipping_study.verdicts import KINDS, RULES, better, verdict
from tests.trainer.test_page import read
from trainer.cli import main
from trainer.clipping import NormClip
from trainer.config.hyperparameters import load_hparams

ROOT = Path(__file__).parents[3]
FULL = experiments(load_hparams(str(ROOT / "hparams/clipping_study/full.yaml"))["experiments"])


def test_the_quick_study_runs_once_and_then_has_nothing_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = [str(ROOT / "hparams/clipping_study/quick.yaml"), "--output_folder", str(folder)]
    first = main(train, command)
    lines = (folder / "cells.jsonl").read_text().splitlines()
    assert first["trainings"] == len(lines) > 200
    assert f"test: trainings={len(lines)} " in capsys.readouterr().out
    page = read((folder / "study.html").read_text())
    assert page.count["section"] == 6
    assert page.count["figure"] >= 15
    table = (folder / "study.md").read_text()
    assert table.count("## ") == 6
    rows = json.loads((folder / "study.json").read_text())
    assert sorted(rows) == sorted(TRAININGS)
    assert table.count("| ") > sum(map(len, rows.values()))
    assert all(len(row["values"]) == 1 for each in rows.values() for row in each)
    # One line breaks off, one is lost: two trainings are done again, with the same result.
    (folder / "cells.jsonl").write_text("\n".join([*lines[:-2], lines[-2][:40]]))
    assert main(train, command)["trainings"] == len(lines)
    again = (folder / "cells.jsonl").read_text().splitlines()

    def results(texts: list[str]) -> set[str]:
        found = (json.loads(text) for text in texts)
        return {json.dumps({k: v for k, v in each.items() if k != "seconds"}) for each in found}

    assert results(again) == results(lines)
    assert again[:-2] == lines[:-2]


@pytest.mark.parametrize(
    "line", [b"", b"[" * 90_000, b"1", b"{}", b'{"cell": 1}', b"\xff", b'{"cell": {}}', b"NaN"]
)
def test_a_line_that_is_no_result_is_left_out(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "cells.jsonl"
    good = b'{"cell": {"name": "x"}, "seconds": 1.0, "loss": Infinity}\n'
    path.write_bytes(line + b"\n" + good + line)
    assert len(Results(path)) == 1
    assert path.read_bytes() == good


@pytest.mark.long
def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    cells = [Cell("half", "fp32", "none", {"lr": 0.1}, seed, {"steps": 2}) for seed in (1, 2)]
    found = []
    for workers in (0, 1):
        results = Results(tmp_path / f"{workers}.jsonl")
        do(cells, results, workers)
        found.append([results.of(cell) for cell in cells])
        assert all(each and each["steps"] == 2 for each in found[-1])
    for one, other in zip(*found, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert found[0][0]["loss"] != found[0][1]["loss"]


def test_every_kind_has_as_many_settings_to_choose_from() -> None:
    assert [each.name for each in FULL] == list(TRAININGS) == list(RULES)
    counted = 0
    for experiment in FULL:
        for kinds in experiment.arms.values():
            assert set(kinds) <= set(KINDS)
            if not experiment.grid:
                assert {len(settings) for settings in kinds.values()} == {4}
            counted += len(kinds)
            for kind, settings in kinds.items():
                for setting in settings:
                    assert (clipper(kind, setting) is None) == (kind == "none")
    assert counted > 80


def test_measuring_uses_no_seed_of_tuning() -> None:
    for experiment in FULL:
        tuning = experiment.cells(None, 0)
        chosen = {(cell.arm, cell.kind): dict(cell.setting) for cell in tuning}
        measured = experiment.cells(chosen, 5)
        assert {cell.seed for cell in measured} == {1, 2, 3, 4, 5}
        assert {cell.seed for cell in tuning} <= {TUNING}
        assert len({cell.key for cell in (*tuning, *measured)}) == len(tuning) + len(measured)


def test_the_best_of_the_tuning_is_chosen() -> None:
    experiment = next(each for each in FULL if each.name == "spikes")

    def result(cell: Cell) -> dict[str, Any]:
        if cell.kind == "none":
            return {"loss": math.inf}
        return {"loss": abs(cell.setting["lr"] - 0.1) + max(cell.setting.values())}

    chosen = choose(experiment, result)
    assert chosen["SGD", "NormClip"]["limit"] == 0.5
    assert chosen["SGD", "NormClip"]["lr"] == 0.1
    assert chosen["SGD", "none"] == {"lr": 0.01}  # All failed alike: the first.


def test_a_training_that_cannot_go_on_is_a_result() -> None:
    found = finish(Cell("half", "fp32", "none", {"lr": 1e30}, 1, {"steps": 12}))
    assert found["loss"] == math.inf
    assert found["skipped"] == 4
    assert found["accuracy"] == 0.0


def test_a_cell_trains_with_its_own_clipper() -> None:
    cell = Cell("half", "fp32", "NormClip", {"lr": 0.1, "limit": 1e-3}, 1, {"steps": 4})
    assert isinstance(clipper(cell.kind, cell.setting), NormClip)
    levels = [logging.getLogger(name).level for name in ("trainer", "py.warnings")]
    found = finish(cell)
    assert [logging.getLogger(name).level for name in ("trainer", "py.warnings")] == levels
    assert found["clipped"] == 1.0
    wrong = finish(
        Cell("half", "fp16, scaled gradients clipped", "NormClip", cell.setting, 1, cell.sizes)
    )
    assert abs(wrong["loss"] - found["loss"]) < 0.2
    assert wrong["clipped"] == 1.0


def test_what_is_told_of_spikes() -> None:
    losses = [1.0] * 10 + [9.0] + [3.0] * 9
    lesson = Lesson(losses, [1.0] * 20, [step in (3, 10) for step in range(20)])
    told = about_spikes(lesson, [10])
    assert told == {"caught": 1.0, "disturbed": 1 / 19, "hurt": 2.0}
    assert about_spikes(Lesson(losses, skipped=1), [10])["hurt"] == math.inf


def test_steps_to_a_target() -> None:
    falling = [10.0 - 0.1 * step for step in range(100)]
    assert steps_to(falling, 5.0) == (56, True)
    assert steps_to(falling, -1.0) == (100, False)
    assert shortened(falling)[0] == pytest.approx(9.95)
    assert len(shortened(falling)) == 50
    assert shortened([]) == []


def row(
    kind: str, values: list[float], arm: str = "SGD", failures: int = 0, **others: float
) -> Row:
    return Row(arm, kind, {"lr": 0.1}, values, failures, others)


def test_better_means_more_than_two_standard_errors() -> None:
    low, high = row("none", [1.0, 1.1, 0.9]), row("none", [2.0, 2.1, 1.9])
    near = row("none", [1.05, 1.15, 0.95])
    assert better(low, high)
    assert not better(high, low)
    assert better(high, low, high=True)
    assert not better(low, near)
    assert not better(near, low)
    assert better(row("none", [9.0] * 3), row("none", [1.0] * 3, failures=1))


@pytest.mark.parametrize(
    ("adaptive", "word"),
    [([0.5, 0.51, 0.52], "holds"), ([1.0, 1.1, 0.9], "not found here")],
)
def test_a_verdict_follows_the_rows(adaptive: list[float], word: str) -> None:
    experiment = Experiment("spikes", "", "", "", {})
    rows = [row("none", [3.0] * 3), row("NormClip", [1.0, 1.1, 0.9]), row("AutoClip", adaptive)]
    said = verdict(Finding(experiment, rows))
    assert said.word == word
    assert any("AutoClip" in fact for fact in said.facts)


def test_dots_are_drawn_for_finished_trainings_and_failures_are_told() -> None:
    plot = Plot(
        "A title", "loss", [Strip("norm", [1.0, 2.0, math.inf], 1), Strip("<b>", [3.0])], 2.5
    )
    drawn = read(f"<!DOCTYPE html><html><body>{draw_strips(plot)}</body></html>")
    assert drawn.count["circle"] == 3
    assert "1 of 3" in drawn.words
    assert "<b>" in drawn.words
