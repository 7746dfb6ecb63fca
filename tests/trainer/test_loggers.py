"""The option `logger`: what may be chosen, and that a resumed run has each step once."""

import csv
import importlib.util
import json
import logging
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.logged_program import run
from tests.trainer.small import batches, make
from trainer import Checkpointer, RunOptions, StageReport
from trainer.cli.arguments import configure
from trainer.config.hyperparameters import Configuration
from trainer.loggers import CsvLogger, JsonlLogger, Logger, LoggerCallback, loggers_of
from trainer.loggers.choice import chosen_loggers, configuration, name_of
from trainer.loggers.marks import StepMarks
from trainer.loggers.protocol import series
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.progress import Progress

FOLDERS = {"figure": "figures/", "audio": "audio/", "text": "text/"}  # of series
PAGE = Path(__file__).parents[2] / "docs" / "loggers.md"


class Kept(Logger):
    """Keeps what it is given as (method, name, step), on a disk that survives the process."""

    def __init__(self, disk: list[tuple[str, str, int]]) -> None:
        self.disk = disk
        self.runs: list[Any] = []
        self.files: list[tuple[str, Path]] = []
        self.events: list[str] = []

    def open(self, run: Any) -> None:
        self.runs.append(run)
        self.events.append("open")

    def scalars(self, kind: str, values: Any, step: int) -> None:
        self.disk.append(("scalars", series(kind, values), step))

    def figure(self, name: str, png: bytes, step: int) -> None:
        self.disk.append(("figure", name, step))

    def audio(self, name: str, samples: Any, rate: int, step: int) -> None:
        self.disk.append(("audio", name, step))

    def text(self, name: str, text: str, step: int) -> None:
        self.disk.append(("text", name, step))

    def artifact(self, name: str, path: Path) -> None:
        self.files.append((name, path))
        self.events.append(name)

    def close(self) -> None:
        self.events.append("close")


class Cut(Kept):
    """One that can delete."""

    def resume(self, step: int) -> None:
        self.disk[:] = [each for each in self.disk if each[2] <= step]


class Lossy(Kept):
    """One whose backend had not written its last records when the process was killed."""

    def recorded(self) -> dict[str, tuple[int, int]]:
        names = [(f"{FOLDERS.get(what, '')}{name}", step) for what, name, step in self.disk]
        counts = Counter(names)
        return {name: (step, counts[name, step]) for name, step in names}


def records(folder: Path) -> list[tuple[str, int]]:
    """Return series and step of every line of metrics.jsonl, sorted."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return sorted((series(line["kind"], line), line["step"]) for line in lines)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def callback(folder: Path, *chosen: Logger) -> LoggerCallback:
    def constant(logger: Logger) -> Any:
        return lambda folder: logger

    options = RunOptions(output_folder=str(folder))
    return LoggerCallback(options, [JsonlLogger], [constant(each) for each in chosen])


def brain(step: int = 0) -> Any:
    return SimpleNamespace(progress=Progress(optimizer_step=step), updates={}, checkpointer=None)


# --- what may be chosen ---------------------------------------------------------------------------


def test_a_name_a_list_and_objects_are_taken_and_the_old_option_means_tensorboard() -> None:
    own = Kept([])
    made = chosen_loggers(RunOptions(logger=["csv", own], tensorboard=True))
    assert made[0] is CsvLogger
    assert made[1](Path()) is own
    assert made[2] is TensorBoardLogger
    assert chosen_loggers(RunOptions(logger="csv")) == [CsvLogger]
    both = RunOptions(logger="tensorboard", tensorboard=True)
    assert chosen_loggers(both) == chosen_loggers(RunOptions(tensorboard=True))
    assert chosen_loggers(RunOptions()) == []


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("tensorbord", "no logger 'tensorbord'; did you mean 'tensorboard'.*allowed: tensorboard,"),
        (["csv", "jsonl"], "no logger 'jsonl'.*allowed: tensorboard, wandb, mlflow, csv"),
        (["csv", "csv"], "logger names 'csv' twice"),
        (5, "logger holds 5, which is no logger; allowed"),
        ({"wandb": {}}, "logger holds {'wandb': {}}, which is no logger"),
        (Kept, "logger holds <class '.*Kept'>, which is no logger"),
    ],
)
def test_anything_else_is_a_sentence_before_the_run(
    tmp_path: Path, value: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(logger=value, output_folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "log"), ("wandb", "log"), ("mlflow", "mlflow")]
)
def test_a_package_that_is_missing_is_a_sentence_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda each, *more: None if each == name else find(each, *more)
    )
    with pytest.raises(ValueError, match=rf"{name} was asked for.*'cortex-speech\[{extra}\]'"):
        make(logger=name)


def test_a_yaml_holds_objects_and_the_command_line_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loggers.wandb.require", lambda *_: None)
    yaml = tmp_path / "demo.yaml"
    yaml.write_text(
        "logger: [csv, !new:trainer.loggers.WandbLogger {project: x, tags: [a]}]\n"
        f"output_folder: {tmp_path}/run\n"
    )
    made, options = configure([str(yaml)])
    options = RunOptions.build(made.build(), options)
    assert options.logger[0] == "csv"
    assert type(options.logger[1]).__name__ == "WandbLogger"
    for text, value in (("csv", "csv"), ("[tensorboard, csv]", ["tensorboard", "csv"])):
        made, options = configure([str(yaml), "--logger", text])
        assert RunOptions.build(made.build(), options).logger == value
    for name in ("JsonlLogger", "TensorBoardLogger"):  # They would write into any folder.
        yaml.write_text(f"logger: !new:trainer.loggers.{name} {{folder: {tmp_path}/other}}\n")
        made, _ = configure([str(yaml)])
        with pytest.raises(ValueError, match="not allowed: trainer does not list it"):
            made.build()


@pytest.mark.parametrize("logger", ["[wandb]", "!new:mine.Logger {x: 1}", "[!new:os.system [x]]"])
def test_a_run_folder_is_opened_without_its_loggers(tmp_path: Path, logger: str) -> None:
    (tmp_path / "hyperparams.yaml").write_text(f"logger: {logger}\nsize: 3\n")
    found = Configuration(tmp_path / "hyperparams.yaml", run_folder=True).build()
    assert found == {"size": 3}


def test_no_logger_package_is_imported_before_it_is_used() -> None:
    program = (
        "import sys; from tests.trainer.small import make; import trainer.loggers; make();"
        "print(sorted({'wandb', 'mlflow', 'tensorboard', 'PIL'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- what a logger is told ------------------------------------------------------------------------


def test_a_logger_is_told_of_the_run_and_gets_its_files_at_the_end(tmp_path: Path) -> None:
    own = Kept([])
    folder = tmp_path / "demo" / "1234"
    made = run(folder, [own], run_name=None)
    told = own.runs[0]
    assert (told.folder, told.name, told.taken) == (folder, "demo-1234", 0)
    assert told.memory.parent == folder / "loggers"
    expected = {"lr": 0.01, "sizes.0": 4, "log_interval": 1, "seed": 1234}
    assert expected.items() <= told.config.items()
    assert own.events[:4] == ["open", "report.html", "checkpoint", "close"]
    assert own.events[-1] == "close"
    files = dict(own.files)
    assert files["checkpoint"] == made.checkpointer.find(min_key="wer")[0].path
    assert "valid" in files["report.html"].read_text()
    other = Kept([])
    run(tmp_path / "other", other, run_name="mine")
    assert other.runs[0].name == "mine"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("results/asr/demo/1234", "demo-1234"),
        ("results/asr/demo/1234-lr=0.1", "demo-1234-lr=0.1"),
        ("runs/x", "x"),
        ("runs/2nd", "2nd"),
    ],
)
def test_a_run_is_called_as_its_folder(folder: str, name: str) -> None:
    assert name_of(Path(folder)) == name


def test_the_configuration_is_resolved_and_has_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    (tmp_path / "hyperparams.yaml").write_text(
        "lr: 0.5\nhalf: !ref <lr> / 2\nopt: !name:torch.optim.Adam\n  lr: !ref <half>\n"
    )
    found = configuration(tmp_path, {}, RunOptions())
    expected = {"lr": 0.5, "half": 0.25, "opt.lr": 0.25, "opt": "!name:torch.optim.Adam"}
    assert expected.items() <= found.items()
    assert found["precision"] == "fp32"
    assert "hidden" not in map(str, found.values())


@pytest.mark.parametrize("text", ["x: !applyref:mine.f [1]\n", "x: !ref <nothing>\n", "a: [\n"])
def test_a_configuration_that_cannot_be_resolved_is_that_of_the_brain(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "hyperparams.yaml").write_text(text)
    words = {f"word{n}": n for n in range(30_000)}
    hparams = {"lr": 0.5, "net": object(), "place": Path("a"), "words": [*words], "ids": words}
    hparams["letters"] = "a" * 100_000
    found = configuration(tmp_path, hparams, RunOptions())
    assert len(found) < 400
    assert len(str(found)) < 50_000
    assert (found["lr"], found["place"], found["precision"]) == (0.5, "a", "fp32")
    assert "net" not in found


def test_a_failing_run_closes_and_sends_no_files(tmp_path: Path) -> None:
    own = Kept([])
    made = make(logger=own, output_folder=str(tmp_path))
    with pytest.raises(RuntimeError, match="of the data"):
        made.fit([1], iter_that_fails())
    assert own.events == ["open", "close"]


def iter_that_fails() -> Any:
    yield from batches(2)
    raise RuntimeError("of the data")


@pytest.mark.parametrize("method", ["open", "scalars", "figure", "artifact", "recorded", "close"])
def test_a_chosen_logger_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no network")  # Also where others raise it for a wrong setting.

    failing = type("Failing", (Kept,), {method: fail})([])
    other = Kept([])
    for _ in range(2):
        run(tmp_path, [failing, other])
    warnings = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert [each for each in warnings if "Failing" in each and "no network" in each] == warnings
    assert len(warnings) == 2  # One for each Brain.
    assert sorted(each[1:] for each in other.disk if each[0] == "scalars") == records(tmp_path)


def test_a_chosen_logger_goes_on_where_the_file_of_numbers_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    own = Kept([])
    for epochs in ([1], [1, 2]):
        options = {"logger": own, "output_folder": str(tmp_path)}
        make(checkpointer=Checkpointer(tmp_path / "saved"), **options).fit(epochs, batches(2))
    assert [each for each in own.disk if each[0] == "scalars"] == [
        ("scalars", "train", 2), ("scalars", "train", 4),
    ]  # fmt: skip
    found = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert [each.partition(" failed")[0] for each in found][::2] == ["JsonlLogger"] * 2
    assert all("the report of the run is not up to date" in each for each in found[1::2])


def test_without_a_run_folder_a_chosen_logger_is_warned_of_and_recipes_may_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loggers_of(make()).figure("f", b"", 1)
    assert not caplog.messages
    own = Kept([])
    loggers_of(make(logger=own)).figure("f", b"", 1)
    (warning,) = caplog.messages
    assert warning.startswith("logger has no effect: there is no run folder")
    assert not own.disk
    loggers_of(SimpleNamespace(callbacks=[])).audio("a", torch.zeros(1), 8000, 1)  # type: ignore[arg-type]


# --- each step once -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kept, Cut, Lossy])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_run_that_is_killed_again_and_again_has_each_record_once(
    kind: type[Kept], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    whole: list[Any] = [("step", {"stage": "train"}, step) for step in range(1, 9)]
    for step in (4, 8):
        place = next(n for n, each in enumerate(whole) if each[2] == step) + 1
        stages = [("stage", {"stage": stage}, step) for stage in ("train", "valid")]
        media = [(what, {}, step) for what in ("figure", "audio", "text")]  # Of the same name.
        monitors = [("monitor", {}, step)] * 2  # Of two optimizers.
        whole[place:place] = [media[0], *stages, *media[1:], *monitors]
    whole += [("stage", {"stage": "test"}, 8), media[1]] * 2  # Two test sets.
    disk: list[Any] = []
    start, saved = 0, None  # The place that a process begins at, and the state of its checkpoint.
    for _ in range(data.draw(st.integers(0, 3))):
        killed = data.draw(st.integers(start, len(whole)))
        saving = data.draw(st.integers(start, killed))
        start, saved = process(folder, kind(disk), whole, start, saved, saving, killed)
        lost = data.draw(st.integers(0, 3)) if kind is Lossy else 0
        while lost and disk and disk[-1][0] == "scalars":  # Of pictures there is no copy.
            disk.pop()
            lost -= 1
    process(folder, kind(disk), whole, start, saved, len(whole), len(whole))
    expected = [
        (what, "valid", step) if what in FOLDERS else ("scalars", series(what, values), step)
        for what, values, step in whole
    ]
    assert Counter(disk) == Counter(expected)
    assert records(folder) == sorted(each[1:] for each in expected if each[0] == "scalars")


def process(
    folder: Path, logger: Kept, whole: Any, start: int, saved: Any, saving: int, killed: int
) -> tuple[int, Any]:
    """Run from a checkpoint to where the process is killed; return its own checkpoint, or that."""
    loggers = callback(folder, logger)
    step = whole[start - 1][2] if start else 0
    if saved is not None:
        loggers.load_state_dict(saved)
    loggers.on_fit_start(brain(step))
    if saved is not None:
        loggers.on_resume(brain(step))
    for place in range(start, killed + 1):
        if place == saving:
            start, saved = place, loggers.state_dict()
        if place == killed:
            break
        what, values, at = whole[place]
        if what == "figure":
            loggers.figure("valid", b"", at)
        elif what == "audio":
            loggers.audio("valid", torch.zeros(1), 8000, at)
        elif what == "text":
            loggers.text("valid", "", at)
        else:
            loggers.scalars(what, values | {"loss": 1.0}, at)
    return start, saved


class Killed(BaseException):
    """Raised in place of an end of the process."""


def kill(*_: Any) -> None:
    raise Killed


def test_a_brain_that_resumes_gives_its_loggers_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk: list[Any] = []
    monkeypatch.setattr("os.kill", kill)
    for place in ("step:14", "valid:20", "test:30"):
        with pytest.raises(Killed):
            run(tmp_path, ["csv", Kept(disk)], killed_at=place)
    run(tmp_path, ["csv", Kept(disk)])
    found = records(tmp_path)
    assert len(found) == len(set(found)) == 44
    assert sorted(each[1:] for each in disk if each[0] == "scalars") == found
    figures = [each[1:] for each in disk if each[0] == "figure"]
    assert sorted(figures) == [
        ("attention/test", 30),
        *(("attention/valid", n) for n in (10, 20, 30)),
    ]
    tables = {path.stem: table(path) for path in (tmp_path / "csv").glob("*.csv")}
    rows = [(name, int(row["step"])) for name, rows in tables.items() for row in rows]
    assert sorted(rows) == found
    whole = tmp_path / "whole"
    run(whole, "csv")
    for name in ("valid", "train", "test"):
        expected = [(row["step"], row["loss"]) for row in table(whole / "csv" / f"{name}.csv")]
        assert [(row["step"], row["loss"]) for row in tables[name]] == expected


def test_a_start_killed_before_its_first_checkpoint_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks: list[list[Any]] = [[], []]
    chosen = ["csv", Kept(disks[0]), Cut(disks[1])]
    monkeypatch.setattr("os.kill", kill)
    for place in ("step:3", "step:4"):
        with pytest.raises(Killed):
            run(tmp_path, chosen, killed_at=place)
    run(tmp_path, chosen)
    found = records(tmp_path)
    assert len(found) == len(set(found)) == 44
    for disk in disks:
        assert sorted(each[1:] for each in disk if each[0] == "scalars") == found
    assert [row["step"] for row in table(tmp_path / "csv" / "train_step.csv")] == [
        str(step) for step in range(1, 31)
    ]


@pytest.mark.parametrize("kind", [Kept, Cut])
def test_a_logger_that_failed_for_a_while_has_each_number_once_when_the_run_resumes(
    tmp_path: Path, kind: type[Kept]
) -> None:
    disk: list[Any] = []

    def scalars(self: Kept, what: str, values: Any, step: int) -> None:
        if step > 6:
            raise OSError("no network")
        kind.scalars(self, what, values, step)

    run(tmp_path, type(kind.__name__, (kind,), {"scalars": scalars})(disk), epochs=1)
    for epochs in (2, 3):
        run(tmp_path, kind(disk), epochs=epochs)
    expected = [*records(tmp_path), ("test", 20)]  # metrics.jsonl has the last test only.
    assert ("test", 30) in expected
    assert Counter(each[1:] for each in disk if each[0] == "scalars") == Counter(expected)


@pytest.mark.parametrize("before", ["record", "brain", "brain of another process"])
def test_a_start_keeps_what_others_have_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    def made(name: str) -> Any:
        checkpointer = Checkpointer(tmp_path / name)
        return make(checkpointer=checkpointer, output_folder=str(tmp_path), log_interval=1)

    brain = made("second")
    if before == "record":
        loggers_of(brain).scalars("stage", {"stage": "test", "loss": 1.0}, 0)
    else:
        made("first").fit([1], batches(3))
    if before == "brain of another process":
        monkeypatch.setattr(LoggerCallback, "_complete", set())
    had = records(tmp_path)
    assert had
    brain.fit([1], batches(2))
    assert Counter(had) < Counter(records(tmp_path))


def test_a_call_that_repeats_a_failed_one_sends_its_files(tmp_path: Path) -> None:
    own = Kept([])
    made = make(logger=own, output_folder=str(tmp_path))
    try:
        made.fit([1], iter_that_fails())
    except RuntimeError:
        made.fit([2], batches(2))
    assert own.events == ["open", "close", "open", "report.html", "close"]


def test_texts_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    disk: list[Any] = []
    texts: list[str] = []
    own = Kept(disk)
    own.text = lambda name, text, step: texts.append(name + text)  # type: ignore[method-assign]
    loggers = callback(tmp_path, own)
    loggers.text("a\udc80", "\udcff\N{SNOWMAN}", 1)
    loggers.figure("\udc80", b"", 1)
    assert texts == ["a\\udc80\\udcff\N{SNOWMAN}"]
    assert disk == [("figure", "\\udc80", 1)]


def test_marks_survive_a_killed_process_and_stay_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "marks"
    marks = StepMarks(path)
    for step in range(20):
        marks.note("valid", step)
    marks.note("train", 3)
    with path.open("ab") as file:
        file.write(b'{"a": 1}\nnot json\n[1]\n[99, "valid", 1')
    monkeypatch.setattr("trainer.loggers.marks.MAX_LINES", 10)
    again = StepMarks(path)
    assert (again.taken, again.places.last) == (21, {"valid": (19, 1), "train": (3, 1)})
    assert len(path.read_text().splitlines()) == 2
    again.note("valid", 20)
    assert StepMarks(path).taken == 22


def test_a_logger_that_was_not_chosen_costs_no_record(tmp_path: Path) -> None:
    run(tmp_path, None)
    names = {each.name for each in tmp_path.iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "report.html"}


# --- tables ---------------------------------------------------------------------------------------


def test_a_column_that_appears_later_is_added_and_lost_numbers_are_empty(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path)
    log.scalars("stage", {"stage": "valid", "loss": 1.5, "ok": True}, 1)
    log.scalars("stage", {"stage": "valid", "loss": float("nan"), "a,b\n": {"c": 2}}, 2)
    log.close()
    log = CsvLogger(tmp_path)
    log.scalars("stage", {"stage": "valid", "loss": torch.tensor(3.0), "step": 3}, 3)
    log.scalars("step", {"loss": 1.0}, 3)
    log.close()
    assert table(tmp_path / "csv" / "valid.csv") == [
        {"step": "1", "loss": "1.5", "a,b .c": ""},
        {"step": "2", "loss": "", "a,b .c": "2"},
        {"step": "3", "loss": "3.0", "a,b .c": ""},
    ]
    assert len(table(tmp_path / "csv" / "train_step.csv")) == 1


@pytest.mark.parametrize("left", [b"", b"4,", b"4,0.5,x,y,z\n\xff\n"])
def test_a_table_is_cut_at_the_checkpoint(tmp_path: Path, left: bytes) -> None:
    log = CsvLogger(tmp_path)
    for step in range(1, 4):
        log.scalars("step", {"loss": 1.0 / step}, step)
    path = tmp_path / "csv" / "train_step.csv"
    with path.open("ab") as file:
        file.write(left)
    again = CsvLogger(tmp_path)
    again.resume(2)
    again.scalars("step", {"loss": 9.0}, 3)
    again.close()
    assert [(row["step"], row["loss"]) for row in table(path)] == [
        ("1", "1.0"), ("2", "0.5"), ("3", "9.0"),
    ]  # fmt: skip
    assert [each.name for each in path.parent.iterdir()] == ["train_step.csv"]


# --- the page -------------------------------------------------------------------------------------


def test_the_logger_of_the_documentation_records_and_resumes(tmp_path: Path) -> None:
    *_, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 25
    names: dict[str, Any] = {}
    exec(code, names)
    (tmp_path / "run").mkdir()
    made: Logger = names["SqliteLogger"]()
    make(
        logger=made, output_folder=str(tmp_path / "run"), log_interval=1,
    ).fit([1], batches(3), batches(2))  # fmt: skip
    database = sqlite3.connect(tmp_path / "run" / "numbers.db")
    rows = database.execute("SELECT kind, step FROM numbers WHERE name = 'loss'").fetchall()
    database.close()
    assert rows == [("train", 1), ("train", 2), ("train", 3), ("train", 3), ("valid", 3)]


def test_a_stage_without_a_loss_is_recorded(tmp_path: Path) -> None:
    loggers = callback(tmp_path, CsvLogger(tmp_path))
    loggers.on_stage_end(brain(), StageReport("test", None, None, {"wer": 1.0}, 4))
    loggers.close()
    assert table(tmp_path / "csv" / "test.csv")[0]["wer"] == "1.0"
