"""The command `cortex`: run, ls, compare, average, clean and sweep, on runs in any state."""

import argparse
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from tests.trainer.small import Regressor
from trainer import Checkpointer, report
from trainer.cli import launch, recipe, sweep, upkeep
from trainer.cli.arguments import configure
from trainer.cli.commands import COMMANDS, main
from trainer.cli.ending import end_lines
from trainer.cli.folder import RunFolder
from trainer.cli.runs import read_run
from trainer.cli.sweep import parse_values
from trainer.config import registry
from trainer.run_files import HEADER

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import functools, time, torch, trainer

class Line(trainer.Brain):
    def compute_forward(self, batch, stage):
        time.sleep(self.hparams.pause)
        return self.modules.net(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return torch.nn.functional.mse_loss(predictions, batch[1])

def train(run):
    lr = run.hparams["lr"]
    if lr > 10:
        raise RuntimeError("the rate is too high")
    x = torch.randn(32, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    adam = functools.partial(torch.optim.SGD, lr=lr)
    net = torch.nn.Linear(4, 1)
    brain = Line({"net": net}, adam, run.hparams, run.options, run.checkpointer)
    load = {"batch_size": 8}
    brain.fit(range(1, run.hparams["epochs"] + 1), data, train_loader_kwargs=load)
    return {"mse": brain.evaluate(data, test_loader_kwargs=load)}

if __name__ == "__main__":
    trainer.main(train)
"""
YAML = """\
# A line through points:
#
#     python train.py mine.yaml

lr: 0.1
epochs: 2
pause: 0.0
resumable_keys: [epochs]
neutral_keys: [pause]
checkpoint_every_steps: 1
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program and its YAML in the current folder."""
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "mine.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cortex"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def made_run(
    folder: Path,
    state: str | None = "finished",
    records: Any = ({"kind": "stage", "stage": "test", "step": 7, "loss": 1.0, "wer": 3.25},),
    yaml: str = "lr: 0.1\n",
    **facts: Any,
) -> Path:
    """Write the files of a run that nothing has trained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.yaml").write_text(f"{HEADER}\n{yaml}")
    if state is not None:
        (folder / "state.json").write_text(json.dumps({"state": state, **facts}))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    return folder


def hold(folder: str, ready: Any, done: Any) -> None:
    run = RunFolder(Path(folder))
    run.open()
    ready.set()
    done.wait(60)


@pytest.fixture
def in_use() -> Iterator[Callable[[Path], Any]]:
    """Have another process use a run folder until the end."""
    forks = multiprocessing.get_context("fork")
    ended, processes = forks.Event(), []

    def start(folder: Path) -> Any:
        ready = forks.Event()
        processes.append(forks.Process(target=hold, args=(str(folder), ready, ended)))
        processes[-1].start()
        assert ready.wait(60)
        return processes[-1]

    yield start
    ended.set()
    for each in processes:
        each.join(60)
        assert each.exitcode == 0


# ------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cortex {name}")
    examples = text.partition("Examples:\n")[2].splitlines()
    assert examples
    assert all(each.startswith(f"  cortex {name}") for each in examples)
    assert max(map(len, text.splitlines())) <= 100
    main([])
    assert f"  {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sweep", "ls", "report", "average", "export", "replay", "clean"])
def test_the_help_of_a_command_lists_its_options(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: list[str] = []
    add = argparse.ArgumentParser.add_argument

    def record(self: argparse.ArgumentParser, *names: str, **more: Any) -> argparse.Action:
        options.extend(each for each in names if each.startswith("--"))
        return add(self, *names, **more)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", record)
    monkeypatch.chdir(tmp_path)
    main([name])  # Builds the parser; most commands then refuse to run without arguments.
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert options
    assert [each for each in options if each not in text.partition("Examples:")[0]] == []


def test_the_help_of_a_recipe_shows_its_keys_and_calls_that_work(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "mine.yaml", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: cortex run mine.yaml [--key value")
    assert "  --lr " in text
    calls = text.partition("Examples:\n")[2].splitlines()
    assert any(each.startswith("  cortex run mine.yaml --") for each in calls)
    assert calls[-1] == "  torchrun --standalone --nproc_per_node=2 -m trainer run mine.yaml"
    assert "train.py" not in text
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rnu"], "there is no command 'rnu'; did you mean 'run'?"),
        (["run", "asr/dmo"], "did you mean asr/demo or"),
        (["run", "librispeech"], "did you mean asr/librispeech?"),
        (["run", "nothing.yaml"], "there is no file nothing.yaml"),
        (["run", "--seed"], "the name of a recipe comes first"),
        (["ls", "nowhere"], "nowhere is no folder"),
        (["ls", "--srot", "x"], "unrecognized arguments: --srot"),
        (["compare"], "required: runs"),
        (["average", "."], ". is no run folder"),
        (["sweep", "asr/demo"], "a sweep needs a recipe and values"),
        (["sweep", "asr/demo", "widht=1,2"], "did you mean 'width'?"),
        (["sweep", "asr/demo", "threads=1,2"], "have the same folder"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


# ------------------------------------------------------------------------------------------- run


def test_recipes_are_found_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = recipe.recipes()
    yamls = {each.resolve() for each in (ROOT / "hparams").glob("*/*.yaml")}
    assert {each.file.resolve() for each in found.values()} == yamls
    assert len(found) >= 20
    for name, each in found.items():
        task, _, stem = name.partition("/")
        assert (each.file.parent.name, each.file.stem) == (task, stem)
        line = re.search(r"recipes/\w+/(\w+\.py) hparams", each.file.read_text())
        assert line is not None
        assert each.program == each.program.parent / line[1]
        assert each.program.is_file()
        assert recipe.find_recipe(name) == recipe.find_recipe(str(each.file)) == each
    main(["run"])
    lines = capsys.readouterr().out.splitlines()
    assert [each.split()[0] for each in lines] == list(found)
    assert all(len(each.split()) > 3 for each in lines)


def test_a_recipe_of_another_distribution_brings_its_yamls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (
        ("a/spotter", "a/spotter/hparams"),
        ("b/spotter", "b/hparams/spotter"),
        ("c/pack/spotter", "c/hparams/spotter"),
    ):
        package = tmp_path / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "train.py").write_text("")
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "small.yaml").write_text("# small\n")
        module = type(sys)("a_package")
        module.__path__ = [str(package)]
        monkeypatch.setitem(sys.modules, "a_package", module)
        monkeypatch.setattr(recipe, "recipe_packages", lambda: ["a_package"])
        assert list(recipe.recipes()) == ["spotter/small"], place


def test_an_installed_recipe_that_cannot_be_imported_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {
        "sound_one.task": "", "with_extra": "", "syntax": "x = (", "raises": "1 / 0",
        "needs_more": "import a_package_that_is_not_installed", "lacks": "from os import nothing",
    }  # fmt: skip
    for name, source in sources.items():
        package = tmp_path.joinpath(*name.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
    (tmp_path / "a_module.py").write_text("")
    values = [*sources, "a_module", "not_there.task"]
    values[values.index("with_extra")] = "with_extra:attribute [extra]"
    info = tmp_path / "pack-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1\n")
    lines = (f"{number} = {value}\n" for number, value in enumerate(values))
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{''.join(lines)}")
    before = registry.recipe_packages()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = registry.recipe_packages.__wrapped__()
    assert set(found) - set(before) == {"sound_one.task", "with_extra"}
    told = re.findall(r"the recipe (\w+) is left out, since its import fails: ", caplog.text)
    assert sorted(told) == ["a_module", "lacks", "needs_more", "raises", "syntax"]


def test_run_does_what_the_program_does_with_the_yaml(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "mine.yaml", "--lr", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("test: mse=")
    folder = Path("results") / program.name / "mine" / "1234-lr=0.2"
    command = shlex.split((folder / "command.txt").read_text())
    assert command[3:] == ["train.py", "mine.yaml", "--lr", "0.2"]
    # The last lines are the commands that come next.
    *_, report_line, on, test = err.splitlines()
    assert report_line == f"report: {folder}/report.html"
    assert on.endswith(f" train.py {folder}/hyperparams.yaml")
    assert test == f"{on.replace('go on', 'test')} --test_only"
    assert re.search(rf"^newest checkpoint: {folder}/checkpoints/step-", err, re.MULTILINE)
    assert "Traceback" not in err
    assert main(["run", "mine.yaml", "--lr", "20"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: the rate is too high" in error
    assert "trainer/cli" not in error


def test_the_last_lines_name_the_best_checkpoint_and_infer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path / "c", keep_last=9, keep_best={"wer": "min", "x": "max"})
    for step, wer in enumerate([3.0, 1.5, 2.0]):
        checkpointer.save_and_keep_only({"optimizer_step": step, "wer": wer})
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/tacotron2/train.py")])
    source = ROOT / "recipes/tacotron2/train.py"
    best, on, test, use = end_lines(tmp_path / "a b", checkpointer, source, ["--allow", "mine"])
    assert best == f"best checkpoint: wer 1.5, {tmp_path}/c/step-00000001"
    assert shlex.split(on)[-2:] == [f"{tmp_path}/a b/hyperparams.yaml", "--allow=mine"]
    assert shlex.split(test)[-1] == "--test_only"
    words = shlex.split(use.partition("to use it: ")[2])
    assert words[1:3] == [os.path.relpath(source.with_name("infer.py")), f"{tmp_path}/a b"]
    assert words[3:] == ["--text", "Turn left.", "-o", "out.wav"]
    assert end_lines(tmp_path / "a b", None, source, ["--allow", "mine"]) == [on]
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher"])
    assert end_lines(tmp_path, checkpointer, None, None) == [best]


# ------------------------------------------------------------------------------------- the state


def test_a_run_that_looks_at_its_own_folder_keeps_its_lock(tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)

    def locked() -> bool:
        code = "import sys; from trainer.cli.runs import *; print(is_locked(Path(sys.argv[1])))"
        told = subprocess.check_output([sys.executable, "-c", code, str(folder)], text=True)
        return told == "True\n"

    def train(run: Any) -> None:
        for place in (folder, link):
            assert read_run(place).state == "running"
            with pytest.raises(ValueError, match="is in use by this process"):
                launch(lambda run: None, {}, place)
        main(["clean", "-y", str(folder)])
        assert locked()

    launch(train, {}, folder)
    assert not locked()
    launch(lambda run: None, {}, folder)


def ends(how: str) -> Callable[[Any], None]:
    def train(run: Any) -> None:
        assert read_run(run.folder).state == "running"
        if how == "crashed":
            raise RuntimeError("out\nof luck \x1b[2J")
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    return train


@pytest.mark.parametrize("how", ["finished", "crashed", "stopped"])
def test_a_run_records_how_it_ended(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        try:
            launch(ends(how), {}, folder)
        except (RuntimeError, KeyboardInterrupt):
            assert how != "finished"
        found = read_run(folder)
        assert found.state == how
        assert found.error == ("RuntimeError: out" if how == "crashed" else "")
    # A test and a search are no training.
    launch(lambda run: {"wer": 2.0}, {"test_only": True}, folder)
    assert read_run(folder).state == how
    main(["ls", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.search(rf"/run  +{how} +test wer 2 +0 s$", out, re.MULTILINE)
    assert ("RuntimeError: out" in out) == (how == "crashed")


def test_ls_tells_the_state_of_any_run_and_changes_nothing(
    tmp_path: Path, in_use: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(tmp_path / "a" / "finished")
    made_run(tmp_path / "a" / "stopped", "stopped", [{"kind": "step", "step": 3, "loss": 1.0}])
    made_run(tmp_path / "crashed", "crashed", [], error="ValueError: \x1b[2J no")
    made_run(tmp_path / "killed", "running")
    made_run(tmp_path / "old", None)
    cut = made_run(tmp_path / "cut", "stopped")
    valid = [{"kind": "stage", "stage": "valid", "step": n, "acc": n / 8} for n in range(3)]
    made_run(tmp_path / "cut", "stopped", valid)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stage", "stage": "test", "step": 99, "wer')
    (tmp_path / "cut" / "state.json").write_text('{"state": "fini')
    broken = made_run(tmp_path / "broken")
    (broken / "metrics.jsonl").unlink()
    os.mkfifo(broken / "metrics.jsonl")
    (broken / "checkpoints" / "step-1").mkdir(parents=True)
    (broken / "checkpoints" / "step-1" / "manifest.json").write_text("{}")
    made_run(tmp_path / "going on", "running")
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "hyperparams.yaml").write_text("lr: 1\n")
    (tmp_path / "link").symlink_to(tmp_path)
    in_use(tmp_path / "going on")
    before = sorted(each.name for each in tmp_path.rglob("*"))
    for _ in range(2):  # The lock of the run that goes on is still held.
        assert main(["ls", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
        rows = [re.split(r"  +", each) for each in lines[1 : lines.index("")]]
        assert [row[:2] for row in rows] == [
            ["a/finished", "finished"], ["a/stopped", "stopped"], ["broken", "finished"],
            ["crashed", "crashed"], ["cut", "unknown"], ["going on", "running"],
            ["killed", "crashed"], ["old", "finished"],
        ]  # fmt: skip
        assert rows[0][2:4] == ["7", "test wer 3.25"]
        assert rows[1][2:] == ["3", "0 s"]
        assert rows[4][2:4] == ["2", "valid acc 0.25"]
        said = "\n".join(lines[lines.index("") :])
        assert "crashed: ValueError: \N{REPLACEMENT CHARACTER}[2J no" in said
        assert "killed: killed, or the machine went down" in said
        assert "is neither a file nor a folder" in said
        assert "cut/state.json: it is not JSON" in said
    assert sorted(each.name for each in tmp_path.rglob("*")) == before
    assert main(["ls", str(tmp_path), "--sort", "acc"]) == 0
    assert "cut " in capsys.readouterr().out.splitlines()[1]
    assert main(["ls", str(tmp_path), "--sort", "wre"]) == 2
    assert "no run has the metric 'wre'; did you mean 'wer'?" in capsys.readouterr().err


def test_compare_shows_what_differs_and_the_spread_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for lr, seed, wer in ((0.1, 1, 3.0), (0.1, 2, 5.0), (0.2, 1, 9.0)):
        yaml = f"lr: {lr}\nseed: {seed}\nthreads: {seed}\nnet:\n  width: !ref <lr>\n"
        record = {"kind": "stage", "stage": "test", "loss": 2.0, "wer": wer}
        made_run(tmp_path / f"{lr}-{seed}", records=[record], yaml=yaml)
    bad = made_run(tmp_path / "bad", yaml="lr: !apply:os.system [echo]\nx: [\n")
    other = made_run(
        tmp_path / "other", records=[{"kind": "stage", "stage": "valid", "sdr": 8.0}], yaml="a: 1\n"
    )
    runs = [*map(str, sorted(tmp_path.glob("0*"))), str(bad), str(other)]
    assert main(["compare", *runs, str(tmp_path), str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    lines = out.replace(f"{tmp_path}/", "").splitlines()
    rows = {row[0]: row for row in (re.split(r"  +", line) for line in lines)}
    assert rows["run"][4:] == ["wer", "sdr", "lr", "seed", "a"]
    assert rows["0.1-1"][1:] == ["finished", "test", "3", "0.1", "1"]
    assert rows["mean of 2"] == ["mean of 2", "test", "4 ± 1.414", "0.1", "any"]
    assert len([each for each in lines if each.startswith("mean")]) == 1
    assert rows["other"][1:4] == ["finished", "valid", "8"]
    assert any(each.startswith("bad: ") for each in lines)
    assert err.splitlines() == [
        f"{tmp_path} is no run folder: it has no hyperparams.yaml of a run",
        f"{tmp_path}/none does not exist",
    ]


def test_metrics_of_any_size_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers near the largest float have no mean that is one."""
    for seed, wer in ((1, 1.7e308), (2, 1.6e308)):
        record = {"kind": "stage", "stage": "test", "wer": wer}
        made_run(tmp_path / str(seed), records=[record], yaml=f"seed: {seed}\n")
    runs = [str(tmp_path / each) for each in "12"]
    assert main(["compare", *runs]) == 0
    assert "too large" in capsys.readouterr().out
    assert main(["report", *runs, "-o", str(tmp_path / "page.html")]) == 0


def test_a_report_is_of_one_run_or_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    compared: list[Any] = []
    monkeypatch.setattr(
        report, "compare", lambda folders, out: compared.append((folders, out)), raising=False
    )
    assert main(["report", str(first)]) == 0
    assert (first / "report.html").is_file()
    assert main(["report", str(first), str(second), str(tmp_path), "-o", "x.html"]) == 2
    assert compared == [([first, second], Path("x.html"))]
    assert capsys.readouterr().out.splitlines() == [f"{first}/report.html", "x.html"]


# ---------------------------------------------------------------------------------------- upkeep


class Value:
    def __init__(self, value: float) -> None:
        self.weight = torch.tensor([value])

    def state_dict(self) -> dict[str, Any]:
        return {"modules": {"weight": self.weight, "count": torch.tensor(3)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["modules"]["weight"]


def saved(folder: Path, metas: Any, epoch_ends: Any = (True,) * 9, **given: Any) -> Checkpointer:
    """A run whose checkpoints have these values in their meta, and weights 0, 1, 2 …"""
    made_run(folder, yaml="checkpointer:\n  keep_best: {wer: min}\n", **given)
    for number, (meta, end) in enumerate(zip(metas, epoch_ends, strict=False)):
        saver = Checkpointer(folder / "checkpoints", recoverables={"brain": Value(float(number))})
        saver.save_checkpoint({"optimizer_step": number, "epoch": number, **meta}, end_of_epoch=end)
    return Checkpointer(folder / "checkpoints")


@pytest.mark.parametrize("seed", range(3))
def test_clean_never_deletes_the_best_or_the_last(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    run = tmp_path / "run"
    metas = [{"wer": draw.random(), "loss": draw.random()} for _ in range(8)]
    checkpointer = saved(run, metas, [draw.random() < 0.5 for _ in range(7)] + [False])
    every = checkpointer.list_checkpoints()
    kept = {
        every[0].name,
        next(each.name for each in every if each.end_of_epoch),
        min(every, key=lambda each: each.meta["wer"]).name,
        min(every, key=lambda each: each.meta["loss"]).name,
    }
    assert main(["clean", str(tmp_path), "--yes"]) == 0
    assert {each.name for each in checkpointer.list_checkpoints()} == kept
    assert checkpointer.read(every[0])


def test_clean_asks_first_and_leaves_what_is_not_its_own(
    tmp_path: Path, in_use: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, busy = tmp_path / "run", tmp_path / "busy"
    metas = [{"wer": 9.0 - n} for n in range(5)]
    saved(run, metas)
    saved(busy, metas)
    in_use(busy)
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000001" / "notes.txt").write_text("mine")
    manifest = checkpoints / "step-00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-2])
    (checkpoints / ".saving-77@host-step-00000009").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (checkpoints / "step-00000007").symlink_to(tmp_path / "elsewhere")
    (run / "mine").mkdir()

    def files() -> set[str]:
        return {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")}

    before = files()
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert main(["clean", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"kB +\S+/step-00000000 +neither the newest nor the best", out)
    assert "left by a save that was killed" in out
    assert out.endswith("nothing was deleted\n")
    for words in ("busy is going on", "'notes.txt'", "manifest.json is broken"):
        assert words in err
    assert files() == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["clean", str(tmp_path)]) == 0
    gone = {each.split("/")[2] for each in before - files() if each.startswith("run/checkp")}
    assert gone == {"step-00000000", "step-00000003", ".saving-77@host-step-00000009"}
    assert {each for each in before if not each.startswith("run/checkpoints/")} <= files()
    capsys.readouterr()
    assert main(["clean", str(run)]) == 0
    assert capsys.readouterr().out == "there is nothing to delete\n"


def test_a_run_below_another_keeps_its_checkpoints_to_itself(tmp_path: Path) -> None:
    """Neither --overwrite nor `clean` of the outer run deletes them, and they are no progress."""
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "task" / "inner"
    saved(outer, [{"sdr": 1.0}, {"sdr": 2.0}])
    metas = [{"wer": 9.0 - n, "sdr": 5.0} for n in range(5)]
    own = saved(inner, metas)
    before = [each.name for each in own.list_checkpoints()]
    assert RunFolder(outer).progress() == (1, 1)
    assert RunFolder(inner).progress() == (4, 4)
    beside = Checkpointer(outer / "models" / "a" / "b" / "save").save_checkpoint({"epoch": 1})
    assert beside is not None
    assert not [each for each in upkeep.removable(outer)[0] if inner in each.path.parents]
    assert len(upkeep.removable(inner)[0]) == 4
    folder = RunFolder(outer)
    folder.open(overwrite=True)
    folder.close()
    assert not (outer / "checkpoints").exists()
    assert not beside.path.exists()
    assert [each.name for each in own.list_checkpoints()] == before


def test_an_average_is_a_run_that_can_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    saved(run, [{"wer": wer} for wer in (1.0, 7.0, 2.0, 9.0)])
    kinds = {"": 1.5, "-n 2": 2.5, "-n 2 --min wer": 1.0, "-n 3 --max wer": 2.0}
    for number, (arguments, mean) in enumerate(kinds.items()):
        out = tmp_path / f"out{number}"
        assert main(["average", str(run), *arguments.split(), "-o", str(out)]) == 0
        averaged = Checkpointer(out / "checkpoints")
        (checkpoint,) = averaged.list_checkpoints()
        weights = averaged.average([checkpoint])
        assert (weights["weight"].item(), weights["count"].item()) == (mean, 3)
        assert len(checkpoint.meta["average_of"]) == int(arguments[3:4] or 4)
        assert "wer" in checkpoint.meta  # by which a recipe looks for it
        assert f"output_folder: {out}" in (out / "hyperparams.yaml").read_text()
    assert main(["average", str(run)]) == 0
    assert (tmp_path / "run-average").is_dir()
    assert main(["average", str(run)]) == 2
    assert main(["average", str(run), "-n", "5", "-o", str(tmp_path / "x")]) == 2
    assert main(["average", str(run), "--min", "cer", "-o", str(tmp_path / "x")]) == 2
    assert main(["average", str(run), "-n", "0", "-o", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    for words in ("exists already", "has 4 checkpoints and not 5", "with a finite 'cer'", "1 or m"):
        assert words in err
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))
    # A broken checkpoint is named, and the others are averaged.
    file = run / "checkpoints" / "step-00000003" / "brain.modules.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["average", str(run), "-o", str(tmp_path / "x")]) == 0
    assert "step-00000003 is left out" in capsys.readouterr().err
    (kept,) = Checkpointer(tmp_path / "x" / "checkpoints").list_checkpoints()
    assert Checkpointer(tmp_path / "x" / "checkpoints").average([kept])["weight"].item() == 1.0
    assert len(kept.meta["average_of"]) == 3


@pytest.mark.parametrize(("place", "given"), [("run", "."), ("run/inside", "..")])
def test_the_folder_that_one_is_in_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, given: str
) -> None:
    saved(tmp_path / "run", [{"wer": 1.0}, {"wer": 2.0}])
    (tmp_path / place).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    assert main(["average", given]) == 0
    assert (tmp_path / "run-average" / "hyperparams.yaml").is_file()


def test_the_average_of_a_program_is_loaded_by_it(program: Path) -> None:
    assert main(["run", "mine.yaml", "--checkpoint_every_steps", "2"]) == 0
    folder = next((program / "results").glob("*/mine/*"))
    assert main(["average", str(folder)]) == 0
    net = nn.Linear(4, 1)
    model = trainer.load(f"{folder}-average", brain=Regressor, modules={"net": net})
    assert model.modules.net.weight.abs().sum() > 0


# ----------------------------------------------------------------------------------------- sweep


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("lr=1e-3,3e-4", [("lr", ["1e-3", "3e-4"])]),
        ("betas=[0.9, 0.98],[0.8,0.9]", [("betas", ["[0.9, 0.98]", "[0.8,0.9]"])]),
        ("name='a,b',\"c\"", [("name", ["'a,b'", '"c"'])]),
        ("x.y={a: 1, b: 2},null", [("x.y", ["{a: 1, b: 2}", "null"])]),
        ("path=a=b", [("path", ["a=b"])]),
        ("lr", "is no list of values"),
        ("=1", "is no list of values"),
        ("lr=1,,2", "is no list of values"),
        ("lr=1,1", "names '1' twice"),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(given: str, values: Any) -> None:
    if isinstance(values, str):
        with pytest.raises(ValueError, match=values):
            parse_values([given, "seed=1"])
    else:
        assert parse_values([given]) == values
        with pytest.raises(ValueError, match="twice"):
            parse_values([given, given])


def test_a_sweep_trains_what_is_not_finished_and_no_failure_ends_it(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    class Process:
        """Runs the program in this process."""

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[1:])

        def wait(self) -> int:
            return main(["run", *started[-1][1:]])

    compared: list[Any] = []
    monkeypatch.setattr(
        report, "compare", lambda folders, out: compared.append((folders, out)), raising=False
    )
    processes = SimpleNamespace(Popen=Process, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(sweep, "subprocess", processes)
    command = ["sweep", "mine.yaml", "lr=0.1,20,0.05", "seed=1,2"]
    assert main(command) == 1
    base = Path("results") / program.name / "mine"
    folders = [base / f"{seed}-lr={lr}" for lr in ("0.1", "20", "0.05") for seed in (1, 2)]
    assert [each[:2] for each in started] == [["train.py", "mine.yaml"]] * 6
    assert [read_run(each).state == "finished" for each in folders] == [
        True, True, False, False, True, True,
    ]  # fmt: skip
    assert compared == [(folders, base.absolute() / "sweep-lr-seed.html")]
    out = capsys.readouterr().out
    assert f"{folders[2]}: exit code 1" in out

    started.clear()
    command[2] = "lr=0.1,0.05"
    assert main(command) == 0
    assert started == []
    assert capsys.readouterr().err.count("finished already") == 4
    # More epochs extend what is finished.
    assert main([*command, "--epochs", "3", "--page", "p.html"]) == 0
    assert len(started) == 4
    assert {read_run(each).step for each in (*folders[:2], *folders[4:])} == {12}
    assert compared[-1][1] == Path("p.html")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("!ref runs/<seed>", ["runs/1234-lr=0.1", "runs/1234-lr=0.05"]),
        ("!ref runs/<lr>", ["runs/0.1", "runs/0.05"]),
        ("runs/x/", ["runs/x-lr=0.1", "runs/x-lr=0.05"]),
        ("null", ["results/{}/mine/1234-lr=0.1", "results/{}/mine/1234-lr=0.05"]),
    ],
)
def test_a_sweep_tells_runs_apart_in_the_folder_that_the_yaml_names(
    program: Path, folder: str, expected: list[str]
) -> None:
    (program / "mine.yaml").write_text(f"{YAML}\noutput_folder: {folder}\n")
    planned = sweep.trials(recipe.find_recipe("mine.yaml"), ["lr=0.1,0.05"], ["--threads=1"])
    assert [str(each.folder) for each in planned] == [e.format(program.name) for e in expected]
    for each in planned:  # The program finds the same folder.
        _, options = configure(["mine.yaml", *each.arguments], ["train"])
        assert str(options.output_folder) == str(each.folder)
    with pytest.raises(ValueError, match="have the same folder"):
        sweep.trials(recipe.find_recipe("mine.yaml"), ["lr=0.1,0.05"], ["--output_folder=x"])


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_goes_on(program: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "trainer", "sweep", "mine.yaml", "lr=0.1,0.05", "--epochs=6"]
    log = program / "log"
    with log.open("w") as said:
        process = subprocess.Popen([*words, "--pause=0.2"], env=environment, stderr=said)
    base = program / "results" / program.name / "mine"
    first, second = base / "1234-lr=0.1", base / "1234-lr=0.05"
    deadline = time.monotonic() + 60
    while not list(first.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(30) == (143 if number is signal.SIGTERM else 130)
    assert "the same command continues the sweep" in log.read_text()
    step = read_run(first).step
    assert (read_run(first).state, second.exists()) == ("stopped", False)
    assert step is not None
    assert 0 < step < 24
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [read_run(each).step for each in (first, second)] == [24, 24]
    records = [json.loads(each) for each in (first / "metrics.jsonl").read_text().splitlines()]
    epochs = [each["epoch"] for each in records if each.get("stage") == "train"]
    assert len([each for each in epochs if each == 6]) >= 1
    assert (first.parent / "sweep-lr.html").is_file()


@pytest.mark.faults
def test_the_commands_that_a_run_ends_with_work_when_pasted(program: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done

    first = run(f"{shlex.quote(sys.executable)} train.py mine.yaml --output_folder 'runs/a b'")
    for kind in ("to go on", "to test"):
        (command,) = re.findall(rf"^{kind}: (.*)$", first.stderr, re.MULTILINE)
        again = run(command)
        assert again.stdout == first.stdout
        assert "other hyperparameters" not in again.stderr
    longer = run(f"{command.removesuffix(' --test_only')} --epochs 3")
    assert "epoch 3 train" in longer.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import torchaudio", "import of torchaudio .*: pip install 'cortex-speech.recipes.'"),
        ("raise ImportError('sounds need x: pip install x')", "sounds need x: pip install x"),
    ],
)
def test_a_recipe_whose_packages_are_missing_is_a_sentence(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    line: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    (program / "train.py").write_text(f"{line}\n{PROGRAM}")
    assert main(["run", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: mine.yaml cannot be run: {said}\n", error)


@pytest.mark.parametrize("words", [[], ["ls", "--help"], ["run"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
