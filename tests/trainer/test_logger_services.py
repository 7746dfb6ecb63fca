"""Loggers of other packages, by what is read back: W&B offline, MLflow in a database, TensorBoard.

The runs are killed for real, so that what these packages keep in their own memory is lost.
"""

import json
import logging
import os
import re
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.logged_program import PICTURE, run
from tests.trainer.test_loggers import records
from trainer.loggers.mlflow import MlflowLogger
from trainer.loggers.protocol import RunInfo
from trainer.loggers.wandb import KINDS, SETTINGS, WandbLogger, history, log_records

wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")
pytest.importorskip("PIL")
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("default"),  # Of the packages themselves.
    pytest.mark.usefixtures("alone"),
]
KEY = "0123456789abcdef" * 3


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither credentials nor a home; what the packages keep lies in the temporary folder."""
    for name in [each for each in os.environ if each.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # For the artifacts of a database that the tests choose.


def process(folder: Path, loggers: str, place: str = "") -> None:
    """Run the program in a process of its own, which is killed at a place."""
    program = [sys.executable, "-m", "tests.trainer.logged_program", str(folder), loggers, place]
    done = subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == (-9 if place else 0), done.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that the run has in W&B's files, which are all of one run."""
    id = (folder / "loggers" / "WandbLogger").read_text().strip()
    files = sorted((folder / "wandb").glob("*run-*/run-*.wandb"))
    assert {each.name for each in files} == {f"run-{id}.wandb"}
    return [row for path in files for row in history(path)]


def wandb_records(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    groups = [
        ({name.partition("/")[0] for name in row if "/" in name}, row["step"]) for row in found
    ]
    return sorted((name, step) for names, step in groups for name in names - {*KINDS})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.name == "trainer" and each.levelno > 20]


def end(log: WandbLogger) -> None:
    """End the run of a logger; W&B writes the rest of its file a little later."""
    run = log._session.run
    (path,) = (Path(run.dir).parent).glob("*.wandb")
    run.finish()
    deadline = time.monotonic() + 20
    while not ended(path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(path: Path) -> bool:
    """Return True if the file of a run has the record of its end."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = map(Record.FromString, log_records(path.read_bytes()))
    return "exit" in [each.WhichOneof("record_type") for each in found]


def client(folder: Path, database: str = "mlflow.db") -> tuple[Any, str]:
    made = mlflow.MlflowClient(f"sqlite:///{folder.resolve()}/{database}")
    return made, (folder / "loggers" / "MlflowLogger").read_text().strip()


def mlflow_records(folder: Path, database: str = "mlflow.db") -> list[tuple[str, int]]:
    made, id = client(folder, database)
    found = set()
    for name in made.get_run(id).data.metrics:
        steps = [each.step for each in made.get_metric_history(id, name)]
        assert len(steps) == len(set(steps)), name
        found |= {(name.partition("/")[0], step) for step in steps}
    return sorted(found)


def files_of(made: Any, id: str, folder: str) -> list[str]:
    found: list[str] = []
    for each in made.list_artifacts(id, folder):
        found += files_of(made, id, each.path) if each.is_dir else [each.path]
    return sorted(found)


@pytest.mark.faults
def test_a_run_that_is_killed_twice_and_resumed_has_each_step_once(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "1234"
    for place in ("step:3", "step:14", "valid:20", ""):
        process(folder, "wandb,mlflow,tensorboard,csv", place)
    expected = records(folder)
    assert len(expected) == len(set(expected)) == 44
    found = rows(folder)
    assert wandb_records(found) == expected
    native = [row["_step"] for row in found]
    assert native == sorted(set(native))  # W&B drops what does not rise.
    assert mlflow_records(folder) == expected
    read = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    read.Reload()
    for tag in read.Tags()["scalars"]:
        steps = [event.step for event in read.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
    assert [event.step for event in read.Scalars("train_step/loss")] == list(range(1, 31))
    assert [event.step for event in read.Scalars("valid_stage/wer")] == [10, 20, 30]
    assert [event.step for event in read.Images("attention/valid")] == [10, 20, 30]

    # One of each kind of record in MLflow, and the files at the end.
    made, id = client(folder)
    assert made.get_run(id).info.status == "FINISHED"
    assert made.get_run(id).info.run_name == "demo-1234"
    assert made.get_run(id).data.params["lr"] == "0.01"
    steps = [10, 20, 30]
    for kind, name, end in (("figures", "attention", "png"), ("audio", "speech", "wav")):
        expected_files = [f"{kind}/{name}/valid/{step:08d}.{end}" for step in steps]
        assert files_of(made, id, f"{kind}/{name}/valid") == expected_files
    picture = folder / "mlartifacts" / id / "artifacts" / "figures/attention/valid/00000010.png"
    assert picture.read_bytes() == PICTURE
    names = {each.path for each in made.list_artifacts(id)}
    assert names == {"audio", "checkpoint", "figures", "report.html", "text"}
    assert "checkpoint/manifest.json" in files_of(made, id, "checkpoint")


def test_everything_arrives_offline_without_a_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = run(tmp_path / "run", [WandbLogger(project="digits", tags=["small"]), "mlflow"])
    (warning,) = [
        each.message for each in caplog.records if each.name == "trainer" and each.levelno > 20
    ]
    assert re.search(r"W&B has no credentials: .*run/wandb, which wandb sync uploads", warning)
    loggers = made.options.logger
    end(loggers[0])
    found = rows(tmp_path / "run")
    assert wandb_records(found) == records(tmp_path / "run")
    media = Counter(name for row in found for name in row if name.partition("/")[0] in KINDS)
    kinds = {"figures/attention": 1, "audio/speech": 1, "text/words": 1}
    expected = {f"{kind}/{stage}": n for kind in kinds for stage, n in (("valid", 3), ("test", 1))}
    assert {name: n for name, n in media.items() if "histograms" not in name} == expected
    assert (
        media["histograms/weights/net.0.weight"] == media["histograms/gradients/net.0.weight"] == 7
    )
    (place,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    pictures = list((place / "files" / "media" / "images" / "figures" / "attention").iterdir())
    assert {each.read_bytes() for each in pictures} == {PICTURE}
    text = (place / f"run-{loggers[0]._session.run.id}.wandb").read_bytes()
    for word in (b"digits", b"small", b"report.html", b"manifest.json", b"log_interval"):
        assert word in text
    assert not any(KEY.encode() in each.read_bytes() for each in place.rglob("*") if each.is_file())


def test_without_a_network_it_goes_offline_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("WANDB_API_KEY", KEY[:40])
    started = time.monotonic()
    made = run(tmp_path / "run", log := WandbLogger())
    assert made.options.logger is log
    assert time.monotonic() - started < 60
    (warning,) = [
        each.message for each in caplog.records if each.name == "trainer" and each.levelno > 20
    ]
    assert re.search(r"W&B cannot be reached \(no route to host\): the run is recorded", warning)
    end(log)
    assert wandb_records(rows(tmp_path / "run")) == records(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY[:40].encode() not in path.read_bytes(), path


def test_a_server_of_wandb_that_refuses_is_left_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B's own process keeps the identifier of a run that did not start."""
    monkeypatch.setattr("trainer.loggers.wandb._reach", lambda address: None)
    monkeypatch.setitem(SETTINGS, "init_timeout", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY[:40])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run(tmp_path / "run", log := WandbLogger())
    (warning,) = warnings_of(caplog)
    assert "W&B cannot be reached" in warning
    end(log)
    assert wandb_records(rows(tmp_path / "run")) == records(tmp_path / "run")


def test_a_server_of_mlflow_that_is_not_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run(tmp_path / "run", ["mlflow", "csv"])
    (warning,) = [
        each.message for each in caplog.records if each.name == "trainer" and each.levelno > 20
    ]
    assert "MlflowLogger failed and is not used any more" in warning
    assert len(records(tmp_path / "run")) == 44
    assert not (tmp_path / "run" / "mlflow.db").exists()


def info(folder: Path, **config: Any) -> RunInfo:
    folder.mkdir(parents=True, exist_ok=True)
    return RunInfo(folder, "name", config, folder / "memory")


def test_mlflow_takes_any_name_and_changed_parameters_of_a_resumed_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/other.db"
    log = MlflowLogger(tracking_uri=uri, experiment="digits", tags={"who": 1})
    log.open(info(tmp_path / "run", lr=1, **{f"a[{n}]": "x" * 9000 for n in range(150)}))
    values = {f"n{n}": float(n) for n in range(1500)}
    values |= {"..": 1.0, "/a//ü:": 2.0, "no": None, "x" * 300: 1.0}
    log.scalars("stage", {"stage": "valid", **values}, 3)
    log.text("../up", "text", 1)
    log.close()
    again = MlflowLogger(tracking_uri=uri, experiment="digits")
    again.open(info(tmp_path / "run", lr=2, new="y"))
    again.close()
    made = mlflow.MlflowClient(uri)
    (found,) = made.search_runs([made.get_experiment_by_name("digits").experiment_id])
    assert found.data.params["lr"] == "1"
    assert found.data.tags["resumed.lr"] == "2"
    assert found.data.tags["who"] == "1"
    assert found.data.params["new"] == "y"
    assert len(found.data.params) == 152
    assert len(found.data.metrics) == 1503
    assert not (tmp_path / "run" / "mlflow.db").exists()


def test_the_artifacts_of_mlflow_move_with_the_run_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    log = MlflowLogger()
    log.open(info(old))
    log.figure("f", PICTURE, 1)
    log.close()
    id = (old / "memory").read_text().strip()
    old.rename(new)
    again = MlflowLogger()
    again.open(info(new))
    again.close()
    made = mlflow.MlflowClient(f"sqlite:///{new}/mlflow.db")
    found = made.get_run(id).info
    assert found.artifact_uri == f"{(new / 'mlartifacts').as_uri()}/{id}/artifacts"
    experiment = made.get_experiment(found.experiment_id)
    assert experiment.artifact_location == (new / "mlartifacts").as_uri()
    assert files_of(made, id, "figures") == ["figures/f/00000001.png"]


def test_another_server_of_mlflow_is_given_the_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "mlflow", epochs=1)
    run(folder, MlflowLogger(tracking_uri=f"sqlite:///{folder}/other.db"))
    assert mlflow_records(folder, "other.db") == records(folder)


def test_a_server_of_mlflow_that_is_away_gets_no_second_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/other.db"
    log = MlflowLogger(tracking_uri=uri)
    log.open(told := info(tmp_path / "run"))
    log.close()
    id = told.memory.read_text()

    class Away:
        def get_run(self, id: str) -> None:
            raise mlflow.exceptions.MlflowException("no answer")

    log._client = Away()
    with pytest.raises(mlflow.exceptions.MlflowException, match="no answer"):
        log.open(told)
    assert told.memory.read_text() == id


def test_a_run_that_repeats_a_failed_one_is_finished_in_mlflow(tmp_path: Path) -> None:
    log = MlflowLogger()
    try:
        raise RuntimeError
    except RuntimeError:
        log.open(info(tmp_path))
        log.close()
    made = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert made.get_run((tmp_path / "memory").read_text().strip()).info.status == "FINISHED"


def test_a_failed_run_is_failed_in_mlflow(tmp_path: Path) -> None:
    log = MlflowLogger()
    for error, status in ((RuntimeError(), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        log.open(info(tmp_path))
        try:
            raise error
        except BaseException:
            log.close()
        made = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        assert made.get_run((tmp_path / "memory").read_text().strip()).info.status == status


def test_two_brains_of_one_process_go_on_in_the_same_run(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path / "run", WandbLogger(mode="offline"))
    again = WandbLogger(mode="offline")
    again.open(RunInfo(tmp_path / "run", "name", {}, tmp_path / "run" / "loggers" / "WandbLogger"))
    end(again)
    deadline = time.monotonic() + 20  # Runs whose loggers are gone have ended as well.
    while wandb_records(rows(tmp_path / "run")) != records(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"mode": "of"},
            "mode of a WandbLogger must be one of online, offline, disabled; got 'of'",
        ),
        ({"tags": "small"}, "tags of a WandbLogger must be a list of texts; got 'small'"),
    ],
)
def test_wrong_settings_of_wandb_are_a_sentence(arguments: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WandbLogger(**arguments)


def test_wrong_settings_of_mlflow_are_a_sentence() -> None:
    with pytest.raises(ValueError, match="tags of an MlflowLogger must be a mapping from names"):
        MlflowLogger(tags=["a"])  # type: ignore[arg-type]


def test_a_file_of_wandb_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    made = WandbLogger(mode="offline")
    made.open(info(tmp_path))
    for step in range(300):
        made.scalars("step", {"loss": 1.0, "name": step, "x" * 200: 2.0}, step)
    end(made)
    (path,) = tmp_path.glob("wandb/*run-*-*/*.wandb")
    data = path.read_bytes()
    assert len(data) > 2 * 32768
    assert [row["step"] for row in history(path)] == list(range(300))
    for cut in range(len(data) - 40_000, len(data), 997):
        path.write_bytes(data[:cut])
        steps = [row["step"] for row in history(path)]
        assert steps == list(range(len(steps)))


def test_a_full_disk_does_not_cost_the_identifier_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = WandbLogger(mode="disabled")
    made.open(told := info(tmp_path))
    id = told.memory.read_text()
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("the file was cut"))
    made.open(told)
    assert told.memory.read_text() == id


def test_tags_that_are_not_given_are_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(wandb, "init", lambda tags, **_: given.append(tags))
    for tags in ((), ("a",)):
        with pytest.raises(AttributeError):  # There is no run.
            WandbLogger(mode="offline", tags=tags).open(info(tmp_path))
    assert given == [None, ["a"]]


def test_a_network_that_is_away_ends_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = WandbLogger(mode="offline"), WandbLogger()
    first.open(info(tmp_path / "first"))
    monkeypatch.setenv("WANDB_API_KEY", KEY[:40])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    second.open(info(tmp_path / "second"))
    for made, folder in ((first, "first"), (second, "second")):
        made.scalars("step", {"loss": 1.0}, 1)
        end(made)
        (path,) = (tmp_path / folder).glob("wandb/*run-*-*/*.wandb")
        assert [row["step"] for row in history(path)] == [1]


def test_files_of_wandb_in_another_format_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = info(tmp_path)
    told.memory.write_text("abc\n")
    (tmp_path / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    header = struct.pack("<IHB", 0, 4, 1)
    (tmp_path / "wandb" / "offline-run-1-abc" / "run-abc.wandb").write_bytes(
        b"7 bytes" + header + b"\xff\xff\xff\xff"
    )
    made = WandbLogger(mode="offline")
    made.open(told)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("W&B's files of this run cannot be read (DecodeError")
    assert made.recorded() is None
    end(made)


def test_a_row_has_numbers_of_one_series(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = WandbLogger(mode="offline")
    made.open(info(tmp_path, lr=0.5))
    nested = {"optimizers": {"main": {"lr": 0.1, "none": None}}, "stage": "train", "step": 7}
    made.scalars("step", nested, 7)
    end(made)
    (row,) = history(next(tmp_path.glob("wandb/*run-*-*/*.wandb")))
    assert {name: value for name, value in row.items() if name[0] != "_"} == {
        "train_step/optimizers.main.lr": 0.1, "step": 7,
    }  # fmt: skip
    assert json.loads(json.dumps(row)) == row
