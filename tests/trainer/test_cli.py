"""Command line, `main` and `launch`: grammar, run folder, error messages."""

import importlib.util
import json
import logging
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.common.quality import require
from tests import processes
from tests.processes import Forks
from tests.trainer.small import Regressor, batches, net
from trainer import Checkpointer, distributed
from trainer.cli import Run, arguments, configure, launch, main
from trainer.cli.environment import environment, git
from trainer.cli.folder import RUN_FILES, RunFolder
from trainer.cli.replay import command as replay_command
from trainer.compat.speechbrain import create_experiment_directory, parse_arguments
from trainer.config.hyperparameters import Configuration, Text, load_hparams
from trainer.options import RunOptions
from trainer.signals import TIME_LIMIT, Interrupted, KeyboardInterrupted

DEMO = """\
    # python train.py hparams/toy/demo.yaml

    # Of everything random.
    seed: 7
    width: 2  # channels
    model: !new:torch.nn.Linear
      in_features: 3
      out_features: !ref <width>
    shuffle: true
    precision: bf16
    name: demo
    inner: {flag: false, rate: 0.5}
    sizes: [1, 2]
    folder: !ref <output_folder>/checkpoints
"""


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a small YAML; return its path, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    path = tmp_path / "hparams" / "toy" / "demo.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(DEMO))
    return "hparams/toy/demo.yaml"


def keep(runs: list[Run]) -> Callable[[Run], dict[str, Any]]:
    """Return a `train` that appends its argument to `runs`."""

    def train(run: Run) -> dict[str, Any]:
        runs.append(run)
        return {"wer": 3.2149, "cer": 0.123456, "words": torch.tensor(12)}

    return train


def fails(capsys: pytest.CaptureFixture[str], train: Any, *argv: str) -> str:
    """Return what a run that ends with exit code 2 writes to stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(train, argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


# ---------------------------------------------------------------- a run and its folder


def test_a_run_leaves_its_records_and_its_metrics(
    demo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    argv = [demo, "--model.bias", "false", "--width=5", "--name", "it's", "--device=cpu"]
    assert main(keep(runs), argv) == {"wer": 3.2149, "cer": 0.123456, "words": 12}
    assert capsys.readouterr().out == "test: wer=3.21 cer=0.12 words=12\n"

    (run,) = runs
    folder = Path("results/toy/demo/7-model.bias=false-name=it%27s-width=5")
    assert (run.folder, run.options.output_folder, run.argv) == (folder, str(folder), argv)
    assert run.hparams["model"].weight.shape == (5, 3)
    assert run.hparams["folder"] == f"{folder}/checkpoints"
    assert (run.options.seed, run.options.precision) == (7, "bf16")

    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"kind": "stage", "stage": "test", "wer": 3.2149, "cer": 0.123456, "words": 12}
    command = (folder / "command.txt").read_text()
    assert command.endswith(
        "hparams/toy/demo.yaml --model.bias false --width=5 --name 'it'\"'\"'s' --device=cpu\n"
    )
    record = json.loads((folder / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["packages"]["torch"]
    assert record["ranks"] == len(record["machines"]) == 1
    assert (folder / "train.log").exists()

    alone = load_hparams(folder / "hyperparams.yaml")
    assert alone["model"].weight.shape == (5, 3)
    assert alone["model"].bias is None
    assert (alone["output_folder"], alone["name"]) == (str(folder), "it's")


def test_the_same_command_builds_the_same_weights(demo: str) -> None:
    runs: list[Run] = []
    for _ in range(2):
        main(keep(runs), [demo])
    assert torch.equal(runs[0].hparams["model"].weight, runs[1].hparams["model"].weight)
    main(keep(runs), [demo, "--seed", "8"])
    assert runs[2].folder == Path("results/toy/demo/8")
    assert not torch.equal(runs[0].hparams["model"].weight, runs[2].hparams["model"].weight)


def test_a_second_start_keeps_everything_and_says_what_changed(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    main(keep(runs), [demo])
    folder = runs[0].folder
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "one").write_text("weights")
    capsys.readouterr()
    main(keep(runs), [demo])
    assert capsys.readouterr().err == ""
    main(keep(runs), [demo, "--log_interval", "4", "--device=cpu"])
    said = (
        "other hyperparameters than at the last start: device: auto -> cpu; log_interval: 50 -> 4"
    )
    assert said in capsys.readouterr().err
    assert said in (folder / "train.log").read_text()
    assert (folder / "checkpoints" / "one").read_text() == "weights"
    commands = (folder / "command.txt").read_text().splitlines()
    assert len([each for each in commands if not each.startswith("#")]) == 3
    assert commands[3:] == [
        "# from optimizer step 0 on: device: auto -> cpu",
        "# from optimizer step 0 on: log_interval: 50 -> 4",
    ]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(demo: str, tmp_path: Path) -> None:
    runs: list[Run] = []
    main(keep(runs), [demo])
    folder = runs[0].folder
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (folder / "checkpoints").symlink_to(outside.resolve())
    for name in ("tensorboard", "prepared"):
        (folder / name).mkdir()
        (folder / name / "contents").write_text("x")
    (folder / "notes.txt").write_text("mine")
    saved = Checkpointer(folder / "save").save_checkpoint({"epoch": 1})
    assert saved is not None
    (folder / "save" / "labels.txt").write_text("mine")
    main(keep(runs), [demo, "--overwrite"])
    assert not saved.path.exists()
    assert (folder / "save" / "labels.txt").read_text() == "mine"
    assert (outside / "precious").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoints").exists()
    assert not (folder / "tensorboard").exists()
    assert not (folder / "prepared").exists()
    assert len((folder / "command.txt").read_text().splitlines()) == 1
    assert "overwrite" not in (folder / "hyperparams.yaml").read_text()


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_that_is_not_a_runs_is_left_alone(
    demo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str], name: str
) -> None:
    folder = tmp_path / "theses"
    folder.mkdir()
    (folder / name).write_text("the work of years")
    said = fails(capsys, keep([]), demo, "--output_folder", str(folder), *flag)
    assert f"{folder} is not a run folder, but holds {name}" in said
    assert (folder / name).read_text() == "the work of years"
    assert sorted(each.name for each in folder.iterdir()) == sorted([".lock", name])


def test_a_folder_that_was_refused_once_is_refused_again(
    demo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theses"
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text("")
    (folder / "train.log").write_text("the work of years")
    for _ in range(2):
        assert "is not a run folder" in fails(
            capsys, keep([]), demo, "--output_folder", str(folder), "--overwrite"
        )
    assert (folder / "train.log").read_text() == "the work of years"


OWN_FILES = (
    "hyperparams.yaml", "command.txt", "environment.json", "train.log", "metrics.jsonl", ".lock",
)  # fmt: skip


def damaged(path: Path, how: str) -> None:
    """Damage a file as a power cut may."""
    content = path.read_bytes() if path.exists() else b""
    part = {"empty": b"", "cut": content[: len(content) // 2], "byte": content[:1]}
    path.write_bytes(part.get(how, bytes(len(content))))


@pytest.mark.parametrize("how", ["empty", "cut", "byte", "zeros"])
@pytest.mark.parametrize("name", [*OWN_FILES, "all but the lock"])
def test_a_run_starts_again_beside_its_own_files_that_are_empty_or_cut(
    demo: str, tmp_path: Path, name: str, how: str
) -> None:
    folder = tmp_path / "run"
    main(keep([]), [demo, "--output_folder", str(folder)])
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    for each in OWN_FILES[:-1] if name.startswith("all") else [name]:
        damaged(folder / each, how)
    for _ in range(2):
        main(keep([]), [demo, "--output_folder", str(folder)])
    assert (folder / "hyperparams.yaml").read_text().startswith("# The resolved")
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    commands = (folder / "command.txt").read_text().rstrip("\n").split("\n")
    assert [each.endswith(str(folder)) for each in commands[-2:]] == [True, True]


@pytest.mark.parametrize("content", [b"", b"# The resolved", b"\0" * 300])
def test_a_start_that_was_killed_before_it_wrote_blocks_no_folder(
    demo: str, tmp_path: Path, content: bytes
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / ".saving-7@host-step-00000001").mkdir(parents=True)
    (folder / "hyperparams.yaml").write_bytes(content)
    (folder / "train.log").write_bytes(b"")
    main(keep([]), [demo, "--output_folder", str(folder)])
    assert (folder / "hyperparams.yaml").read_text().startswith("# The resolved")


def test_a_debug_run_keeps_nothing(demo: str, tmp_path: Path) -> None:
    runs: list[Run] = []
    main(keep(runs), [demo, "--debug"])
    assert runs[0].options.debug is True
    assert runs[0].hparams["folder"] == f"{runs[0].folder}/checkpoints"
    assert not runs[0].folder.exists()
    assert not (tmp_path / "results").exists()


def hold(folder: str, seconds: float) -> None:
    RunFolder(Path(folder)).open()
    print("held", flush=True)
    time.sleep(seconds)


def test_a_run_folder_is_for_one_command_at_a_time(
    demo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], forks: Forks
) -> None:
    folder = tmp_path / "run"
    other = forks.start(hold, folder, 600)
    other.wait_for("held")
    said = fails(capsys, keep([]), demo, "--output_folder", str(folder))
    assert f"the run folder {folder} is in use by process {other.pid} on" in said
    other.kill()
    main(keep([]), [demo, "--output_folder", str(folder)])
    main(keep([]), [demo, "--output_folder", str(folder)])


def test_a_start_removes_what_killed_processes_left_half_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.record("a: 1\n", ["train.py"], {})
    kept = folder.path / "nonfinite" / "3"
    for left in ("nonfinite/.12.new", "nonfinite/3/.rank1.new"):
        (folder.path / left).mkdir(parents=True)
        (folder.path / left / "batch.pt").write_bytes(b"half")
    (folder.path / ".report.html.new").write_bytes(b"half")
    (folder.path / ".notes.new").write_text("the user's")
    folder.close()
    folder.open()
    folder.close()
    assert sorted(each.name for each in folder.path.rglob("*.new")) == [".notes.new"]
    assert kept.is_dir()


def test_a_restarted_rank_waits_for_the_folder_and_goes_on(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    folder = tmp_path / "run"
    main(keep([]), [demo, "--output_folder", str(folder)])
    monkeypatch.setattr(distributed, "restarts", lambda: 1)
    forks.start(hold, folder, 1).wait_for("held")
    main(keep([]), [demo, "--output_folder", str(folder), "--overwrite"])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # Nothing was deleted.


def test_a_folder_that_cannot_be_written_is_a_sentence(
    demo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        said = fails(capsys, keep([]), demo, "--output_folder", str(folder))
        assert f"the run folder {folder} cannot be written: {tmp_path / 'file'} is a file" in said
    if Path("/proc/self").exists():
        said = fails(capsys, keep([]), demo, "--output_folder", "/proc/nowhere")
        assert "the run folder /proc/nowhere cannot be written: " in said
        assert "choose another output_folder" in said


def test_a_full_disk_is_a_sentence_and_spoils_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.record("a: 1\n", ["train.py"], {})
    before = (folder.path / "hyperparams.yaml").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what a full disk looks like
    try:
        with pytest.raises(OSError, match=r"hyperparams\.yaml could not be written \(.*\); free"):
            folder.record("a: 1\n" + "# \n" * 1000, ["train.py"], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folder.close()
    assert (folder.path / "hyperparams.yaml").read_bytes() == before
    assert not list(folder.path.glob(".*.new"))


# ---------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ("--width 3", [("width", "3")]),
        ("--width=3", [("width", "3")]),
        ("--width -3", [("width", "-3")]),
        ("--name=a=b", [("name", "a=b")]),
        ("--name a=b", [("name", "a=b")]),
        ("--auto_mix_prec", [("precision", "fp16")]),
        ("--auto_mix_prec=false --width 3", [("width", "3")]),
        ("--ckpt_interval_steps 9", [("checkpoint_every_steps", 9)]),
        ("--name=--x", [("name", "--x")]),
        ("--model.bias=false", [("model.bias", "false")]),
        ("--inner.flag", [("inner.flag", True)]),
        ("--no-inner.flag", [("inner.flag", False)]),
        ("--shuffle", [("shuffle", True)]),
        ("--no-shuffle", [("shuffle", False)]),
        ("--shuffle false --width 3", [("shuffle", "false"), ("width", "3")]),
        ("--debug --no-progressbar", [("debug", True), ("progressbar", False)]),
        ("--sizes [3,4]", [("sizes", "[3,4]")]),
        ("--width 3 --width 4", [("width", "3"), ("width", "4")]),
        ("--on_bad_audio raise", [("on_bad_item", "raise")]),
    ],
)
def test_arguments_say_what_to_change(demo: str, argv: str, changes: list[Any]) -> None:
    assert arguments.parse(argv.split(), Configuration(demo)) == changes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--widht 3", "there is no key or run option 'widht'; did you mean 'width'?"),
        ("--prec fp16", "there is no key or run option 'prec'"),
        (
            "--output-folder x",
            "no key or run option 'output-folder'; did you mean 'output_folder'?",
        ),
        ("--gradient_clip_val=1", "run option 'gradient_clip_val'; the option is 'max_grad_norm'"),
        ("--name=", "--name needs a value; null is written null, and an empty text in quotes: '"),
        ("--rate 1", "there is no key or run option 'rate'; did you mean 'inner.rate'?"),
        ("--model.rate 1", "has no argument 'rate'; did you mean 'inner.rate'?"),
        ("--model.xyz 1", "has no argument 'xyz'; its arguments are: in_features, out_features"),
        ("--model.biass 1", "torch.nn.Linear has no argument 'biass'; did you mean 'bias'?"),
        ("--inner.rat 1", "there is no key 'inner.rat' below inner"),
        ("--no-width", "--no-width: width is not a key that is true or false"),
        ("--no-shufle", "there is no key or run option 'no-shufle'"),
        ("--no-shuffle=true", "there is no key or run option 'no-shuffle'"),
        ("--width", "--width needs a value; one that begins with -- is given as --width=…"),
        ("--width --debug", "--width needs a value"),
        ("stray", "unexpected argument 'stray': a value follows its key, as in --key value"),
        ("--shuffle 3", "unexpected argument '3': a value"),
        ("-w 3", "unexpected argument '-w': a value"),
        ("--", "unexpected argument '--': a value"),
        ("--width many", "width must be a number, as its default 2 is ({}, line 5), not 'many'"),
        ("--shuffle=1", "shuffle must be true or false, as its default true is"),
        ("--sizes 3", "sizes must be a list, as its default [1, 2] is"),
        ("--precision fp8", "precision must be one of fp32, fp16, bf16, not 'fp8'"),
        ("--optimizer_step_limit three", "optimizer_step_limit must be a whole number of at leas"),
        ("--debug=1", "debug must be true or false, not 1"),
        ("--sizes [3", "--sizes: not valid YAML: "),
        ("--device cuda:99", "device 'cuda:99' asks for GPU 99, but this machine has"),
        ("--device gpu", "device is 'gpu'; allowed: "),
    ],
)
def test_wrong_arguments_get_a_sentence_and_exit_code_2(
    demo: str, capsys: pytest.CaptureFixture[str], argv: str, said: str
) -> None:
    assert said.replace("{}", demo) in fails(capsys, keep([]), demo, *argv.split())
    assert not Path("results").exists()


def test_a_gpu_where_there_is_none_is_a_sentence(
    demo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = fails(capsys, keep([]), demo, "--device", "cuda")
    assert "but this machine has no GPUs that torch can use; use --device cpu" in said


def test_the_first_argument_is_the_yaml(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the first argument must be the YAML file; --help" in fails(capsys, keep([]))
    assert "must be the YAML file, not '--seed'" in fails(capsys, keep([]), "--seed", "3", demo)
    assert "gone.yaml: No such file or directory" in fails(capsys, keep([]), "gone.yaml")


def test_values_take_the_types_of_their_keys(demo: str) -> None:
    configuration, options = configure(
        [
            *(demo, "--optimizer_step_limit", "3", "--max_grad_norm", "{g: 1, d: null}"),
            *(
                "--output_folder",
                "2024",
                "--device",
                "cpu",
                "--name",
                "007",
                "--inner.rate",
                "-1e-3",
            ),
            *("--sizes", "[3, 4]", "--no-shuffle", "--inner.flag", "--eval_precision", "null"),
        ]
    )
    assert options.optimizer_step_limit == 3
    assert options.max_grad_norm == {"g": 1.0, "d": None}
    assert (options.output_folder, options.device, options.eval_precision) == ("2024", "cpu", None)
    built = configuration.build()
    assert (built["name"], built["sizes"], built["shuffle"]) == ("007", [3, 4], False)
    assert built["inner"] == {"flag": True, "rate": -1e-3}
    assert configure([demo, "--max_grad_norm=inf"])[1].max_grad_norm == float("inf")


def test_precedence_is_default_then_yaml_then_command_line(demo: str) -> None:
    assert RunOptions().precision == "fp32"
    assert configure([demo])[1].precision == "bf16"
    assert configure([demo, "--precision", "fp16"])[1].precision == "fp16"
    assert configure([demo, "--precision", "fp16"])[0].build()["precision"] == "fp16"
    assert configure([demo, "--log_interval", "9"])[0].build()["log_interval"] == 9


def test_a_wrong_option_in_the_yaml_is_named_with_its_line(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.yaml").write_text("width: 3\nlog_interval: often\n")
    said = fails(capsys, keep([]), "wrong.yaml")
    assert (
        "wrong.yaml, line 2: log_interval must be a whole number of at least 1, not 'often'" in said
    )


def test_former_names_of_options_work_in_yaml_and_on_the_command_line(demo: str) -> None:
    Path("base.yaml").write_text("on_bad_audio: raise\nkinds: {a: !ref <on_bad_audio>}\n")
    Path("old.yaml").write_text(
        "base: base.yaml\nmax_bad_audio: 0.5\nhalf: !ref <max_bad_audio>/2\n"
    )
    configuration, options = configure(["old.yaml"])
    assert (options.on_bad_item, options.max_bad_item) == ("raise", 0.5)
    assert configuration.build()["kinds"] == {"a": "raise"}
    assert configuration.build()["half"] == 0.25
    for name in ("on_bad_audio", "on_bad_item"):
        configuration, options = configure(["old.yaml", f"--{name}", "skip"])
        assert options.on_bad_item == configuration.build()["on_bad_item"] == "skip"
        assert configuration.build()["kinds"] == {"a": "skip"}
        assert load_hparams("old.yaml", {name: "skip"})["kinds"] == {"a": "skip"}
    Path("both.yaml").write_text("on_bad_audio: raise\non_bad_item: skip\n")
    with pytest.raises(ValueError, match="line 1: on_bad_audio is the former name of on_bad_item"):
        load_hparams("both.yaml")


def test_a_test_of_a_run_does_not_delete_its_checkpoints(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    main(keep(runs), [demo])
    saved = Checkpointer(runs[0].folder / "checkpoints").save_checkpoint({"epoch": 1})
    said = fails(capsys, keep([]), demo, "--test_only", "--overwrite")
    assert "overwrite deletes the checkpoint that test_only tests: leave out one" in said
    assert saved is not None
    assert saved.path.exists()


def test_options_of_one_command_are_not_written_down(demo: str) -> None:
    configuration, options = configure([demo, "--debug", "--no-progressbar", "--overwrite=true"])
    assert (options.debug, options.progressbar, options.overwrite) == (True, False, True)
    assert "debug" not in configuration.build()


def test_seed_and_output_folder_are_in_every_yaml(demo: str) -> None:
    Path("plain.yaml").write_text("file: !ref <output_folder>/<seed>.txt\n")
    configuration, options = configure(["plain.yaml", "--seed", "5"])
    name = f"results/{Path.cwd().name}/plain/5"
    assert configuration.build() == {"file": f"{name}/5.txt", "seed": 5, "output_folder": name}
    assert (options.seed, options.output_folder) == (5, name)
    Path("again.yaml").write_text(configuration.dump())
    assert configure(["again.yaml", "--seed", "6"])[1].output_folder == name.replace("/5", "/6")


def test_help_lists_options_and_keys_without_building(
    demo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Path(demo).open("a") as file:
        file.write("other: !new:not.there.AtAll\nopen: !PLACEHOLDER  # a folder\n")
    assert main(keep([]), [demo, "--help"]) == {}
    shown = capsys.readouterr().out
    assert shown.startswith("usage: train.py FILE [--key value | --key=value")
    assert all(re.search(rf"^  --{name} ", shown, re.M) for name in RunOptions.names())
    assert re.search(r"^  --width 2 +channels$", shown, re.M)
    assert re.search(r"^  --seed 7 +Of everything random\.$", shown, re.M)
    assert re.search(r"^  --precision bf16 +precision of the forward pass", shown, re.M)
    assert re.search(r"^  --model\.out_features !ref <width>$", shown, re.M)
    assert re.search(r"^  --open !PLACEHOLDER +a folder$", shown, re.M)
    assert "not.there.AtAll" in shown
    main(keep([]), ["-h"])
    assert "train.py FILE --help lists the keys of a YAML too." in capsys.readouterr().out
    assert not Path("results").exists()


def test_help_is_grouped_and_ends_with_examples(
    demo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(keep([]), [demo, "--help"])
    shown = capsys.readouterr().out
    headings = re.findall(r"^([A-Z].*):$", shown, re.M)
    assert headings == [
        "Training",
        "Precision and compilation",
        "Clipping and non-finite steps",
        "Checkpoints",
        "Logging",
        "Data",
        "Tuning",
        "Debugging",
        f"Keys of {demo}",
        "Examples",
    ]
    assert re.search(
        r"^  --eval_precision null .*\(null: same as training\) {fp32,fp16,bf16}$", shown, re.M
    )
    examples = [line.split() for line in shown.partition("Examples:\n")[2].splitlines()]
    assert len(examples) >= 2
    for words in examples[:-1]:
        assert words[:2] == ["train.py", demo]
        if "cuda" not in words:
            configure(words[1:])


# ---------------------------------------------------------------- how a run ends


def test_a_mistake_in_the_yaml_is_a_sentence_and_its_traceback_is_in_the_log(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, keep([]), demo, "--model.in_features", "-1.5")
    assert "model (hparams/toy/demo.yaml, line 6): torch.nn.Linear could not be built" in said
    folder = "results/toy/demo/7-model.in_features=-1.5"
    assert f"(its traceback is in {folder}/train.log)" in said
    log = Path(f"{folder}/train.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "BuildError" in log


def test_a_missing_placeholder_is_a_sentence(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("open.yaml").write_text("data_folder: !PLACEHOLDER\n")
    said = fails(capsys, keep([]), "open.yaml")
    assert "no value for data_folder (open.yaml, line 1)" in said
    assert "give it as --data_folder …" in said


def test_an_error_of_the_system_is_a_sentence(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(_run: Run) -> None:
        Path("gone/data.wav").read_bytes()

    assert "gone/data.wav: No such file or directory" in fails(capsys, train, demo)


def test_a_package_to_be_installed_is_a_sentence_and_a_missing_module_a_bug(
    demo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(_run: Run) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda _name: None)
            require(["pesq"], 16000)

    assert "PESQ needs the package pesq" in fails(capsys, train, demo)

    def import_(_run: Run) -> None:
        importlib.import_module("not_there")

    with pytest.raises(ModuleNotFoundError, match="not_there"):
        main(import_, [demo])


def test_an_error_of_a_recipe_that_runs_as_a_script_is_a_sentence(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "recipes" / "asr" / "train.py"
    code = compile("def train(run):\n    raise ValueError('no speech')\n", str(script), "exec")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)
    assert "error: no speech" in fails(capsys, names["train"], demo)


def test_a_bug_keeps_its_traceback_and_is_in_the_log(demo: str) -> None:
    def train(_run: Run) -> None:
        int("three")

    with pytest.raises(ValueError, match="invalid literal"):
        main(train, [demo])
    log = Path("results/toy/demo/7/train.log").read_text()
    assert "invalid literal for int()" in log
    assert 'int("three")' in log


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([3.2], "train must return test metrics by name, as in {'wer': 3.2}, not [3.2]"),
        ({"wer": "low"}, "the test metric 'wer' must be a number, not 'low'"),
    ],
)
def test_metrics_that_are_none_get_a_sentence(
    demo: str, capsys: pytest.CaptureFixture[str], result: Any, said: str
) -> None:
    assert said in fails(capsys, lambda _run: result, demo)


def test_a_run_without_a_test_says_nothing(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(lambda _run: None, [demo]) == {}
    assert capsys.readouterr().out == ""


def test_interrupts_end_with_the_code_of_their_signal(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in handled]

    def polite(_run: Run) -> None:
        signal.raise_signal(signal.SIGTERM)

    def hung_up(_run: Run) -> None:
        signal.raise_signal(signal.SIGHUP)

    def warned(_run: Run) -> None:
        signal.raise_signal(signal.SIGUSR1)

    def late(_run: Run) -> None:
        raise Interrupted(TIME_LIMIT)

    def impatient(_run: Run) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    codes = ((polite, 143), (hung_up, 75), (warned, 75), (late, 75), (impatient, 130))
    for train, code in codes:
        with pytest.raises(SystemExit) as stopped:
            main(train, [demo])
        assert stopped.value.code == code
    assert "stopped with exit code 143" in Path("results/toy/demo/7/train.log").read_text()
    assert [signal.getsignal(number) for number in handled] == before
    main(keep([]), [demo])  # The lock and the request are gone.


def test_a_signal_that_the_program_handles_or_ignores_is_left_to_it(demo: str) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def train(_run: Run) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGHUP)

    try:
        main(train, [demo])
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGHUP, ignored)
    assert heard == [signal.SIGUSR1]


USERS = """\
    import torch
    import trainer

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            if "{place}" == "item":
                {error}
            return {"x": torch.ones(3)}

    class Net(trainer.Brain):
        def compute_forward(self, batch, stage):
            {error}
        def compute_objectives(self, predictions, batch, stage):
            return predictions.sum()

    def train(run):
        net = {"net": torch.nn.Linear(3, 1)}
        brain = Net(net, torch.optim.Adam, run.hparams, run.options)
        brain.fit(range(2), Items(), train_loader_kwargs={"num_workers": {workers}})

    if __name__ == "__main__":
        trainer.main(train)
"""


@pytest.mark.parametrize(
    ("place", "workers", "error", "said"),
    [
        ("forward", 0, "raise ValueError('an odd number')", "ValueError: an odd number"),
        ("item", 1, "torch.ones(2) @ torch.ones(3)", "RuntimeError: inconsistent tensor size"),
    ],
)
def test_an_error_of_the_user_shows_the_frames_of_the_user(
    demo: str, tmp_path: Path, forks: Forks, place: str, workers: int, error: str, said: str
) -> None:
    program = textwrap.dedent(USERS).replace("{place}", place).replace("{error}", error)
    (tmp_path / "train.py").write_text(program.replace("{workers}", str(workers)))
    done = forks.program(["train.py", demo, "--no-progressbar"], tmp_path, os.environ)
    assert done.returncode == 1
    shown = done.stderr.partition("Traceback")[2]
    files = re.findall(r'File "(.+?)", line', shown)
    files = [file for file in files if file != processes.__file__]
    others = [file for file in files if not file.endswith("/train.py")]
    assert len(files) - len(others) >= 3
    assert len(others) <= 2  # Where the error was raised, in the process and in its worker.
    assert not [file for file in others if "/trainer/" in file]
    assert error in shown
    assert said in shown
    assert shown.rstrip().endswith("(its traceback is in results/toy/demo/7/train.log)")
    log = (tmp_path / "results" / "toy" / "demo" / "7" / "train.log").read_text()
    assert "/trainer/brain.py" in log
    assert said in log


def test_messages_reach_the_terminal_and_the_log(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(_run: Run) -> None:
        logging.getLogger("trainer").info("epoch 1 valid: wer 3.21")
        logging.getLogger("recipes.asr").warning("two\nlines")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("careful", stacklevel=1)

    main(train, [demo])
    said, log = capsys.readouterr().err, Path("results/toy/demo/7/train.log").read_text()
    for each in ("epoch 1 valid: wer 3.21", "two", "lines", "careful"):
        assert said.count(each) >= 1
        assert log.count(each) >= 1
    assert "warning: two" in said
    assert logging.getLogger("trainer").handlers == []


def test_modules_beside_train_py_may_be_named(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toymodel.py").write_text("class Net:\n    width = 3\n")
    (tmp_path / "train.py").write_text(
        "import trainer.cli\n"
        "def train(run):\n    return {'width': run.hparams['net'].width}\n"
        "if __name__ == '__main__':\n    METRICS = trainer.cli.main(train)\n"
    )
    (tmp_path / "os.py").write_text("raise SystemExit('not Python\\'s own')\n")
    Path("toy.yaml").write_text("net: !new:toymodel.Net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "toy.yaml"])
    assert runpy.run_path("train.py", run_name="__main__")["METRICS"] == {"width": 3}
    Path("toy.yaml").write_text("net: !apply:os.getcwd\n")
    with pytest.raises(SystemExit):
        runpy.run_path("train.py", run_name="__main__")


def test_a_package_of_ones_own_is_allowed_by_main(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ownnets.py").write_text("class Net:\n    width = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("toy.yaml").write_text("net: !new:ownnets.Net\n")
    assert "ownnets.Net is not allowed" in fails(capsys, keep([]), "toy.yaml")
    runs: list[Run] = []
    main(keep(runs), ["toy.yaml"], allow=["ownnets"])
    main(keep(runs), ["toy.yaml"], allow="ownnets")
    assert [run.hparams["net"].width for run in runs] == [3, 3]
    with pytest.raises(SystemExit):
        main(keep(runs), ["toy.yaml"], allow=[sys])  # type: ignore[list-item]
    assert "allow must hold names such as 'mypackage'" in capsys.readouterr().err


# A builtin, compiled modules, modules under another name, classes, methods, values, private names.
SPELLED = {
    "!new:zip [[1], [2]]": lambda x: [*x] == [(1, 2)],
    "!apply:builtins.hash [7]": lambda x: x == 7,
    "!apply:divmod [7, 2]": lambda x: x == (3, 1),
    "!apply:operator.add [1, 2]": lambda x: x == 3,
    "!apply:os.path.join [a, b]": lambda x: x == os.path.join("a", "b"),
    "!apply:os.getpid": lambda x: x == os.getpid(),
    "!apply:logging.os.getpid": lambda x: x == os.getpid(),
    "!new:pathlib.Path [a]": lambda x: x == Path("a"),
    "!new:collections.defaultdict [!name:list ]": lambda x: x["a"] == [],
    "!new:functools.partial [!name:max , 3]": lambda x: x(4) == 4,
    "!name:string.ascii_letters": lambda x: x[0] == "a",
    "!name:os.sep": lambda x: x == os.sep,
    "!module:operator": lambda x: x.add(1, 2) == 3,
    "!module:os.path": lambda x: x is os.path,
    "!apply:dict.fromkeys [[a], 1]": lambda x: x == {"a": 1},
    "!apply:str.upper [a]": lambda x: x == "A",
    "!apply:datetime.datetime.fromtimestamp [0]": lambda x: x.year in (1969, 1970),
    "!apply:torch.get_num_threads": lambda x: x == torch.get_num_threads(),
    "!name:torch.nn.Linear.forward": lambda x: x is torch.nn.Linear.forward,
    "!name:torch.hub.load": lambda x: x is torch.hub.load,
    "!name:recipes.asr.scoring.Scores": lambda x: x.__name__ == "Scores",
    "!name:trainer.data.make_loader": lambda x: x.__name__ == "make_loader",
    "!name:torch.nn.modules.module._addindent": lambda x: x.__name__ == "_addindent",
    "!name:ownlib.__version__": lambda x: x == "1",
    "!new:ownlib.Net": lambda x: x.width == 3,
    "!apply:ownlib.deep.code.make": lambda x: x == 5,
    "!applyref:operator.mul [2, 3]": lambda x: x == 6,
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_a_refusal_names_the_spelling_that_allows_it(
    text: str,
    demo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ownlib" / "deep").mkdir(parents=True)
    (tmp_path / "ownlib/__init__.py").write_text("__version__ = '1'\nclass Net:\n    width = 3\n")
    (tmp_path / "ownlib/deep/code.py").write_text("def make():\n    return 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("toy.yaml").write_text(f"x: {text}\ny: [1, {text} ]\n")
    said = fails(capsys, keep([]), "toy.yaml")
    assert "x (toy.yaml, line 1)" in said or "toy.yaml, line 1: " in said
    spelling = re.search(r"--allow \S+", said)
    assert spelling
    in_python = re.search(r"allow=\['(.*?)'\]", said)
    assert in_python
    runs: list[Run] = []
    main(keep(runs), ["toy.yaml", *spelling[0].split()])
    main(keep(runs), ["toy.yaml"], allow=[in_python[1]])
    for run in runs:
        assert SPELLED[text](run.hparams["x"])
        assert SPELLED[text](run.hparams["y"][1])


def test_names_are_allowed_one_by_one_and_not_for_the_run_folder(
    demo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("toy.yaml").write_text(
        "x: !new:zip [[1], [2]]\ny: !apply:os.getpid\nz: !apply:operator.add [1, 2]\nallow: [os]\n"
    )
    Path("netlib.py").write_text("class Net: pass\nclass Other: pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path])  # That of a recipe which is installed elsewhere.
    Path("own.yaml").write_text("x: !new:netlib.Net\ny: !new:netlib.Other\n")
    assert main(keep([]), ["own.yaml", "--allow", "netlib"])
    assert "netlib.Net is not allowed" in fails(capsys, keep([]), "own.yaml")
    allow = ["--allow=builtins.zip, os.getpid", "--allow", "operator.add"]
    runs: list[Run] = []
    main(keep(runs), ["toy.yaml", *allow, "--output_folder", "run"])
    assert runs[0].hparams["z"] == 3
    assert runs[0].hparams["allow"] == ["os"]  # a key like any other
    assert "os.getpid is not allowed" in fails(
        capsys, keep([]), "toy.yaml", "--allow", "builtins.zip,operator.add"
    )
    for run_folder in (False, True):
        with pytest.raises(ValueError, match="is not allowed"):
            load_hparams("run/hyperparams.yaml", run_folder=run_folder)
    for wrong in (["--allow"], ["--allow="], ["--allow", "--debug"], ["--allow", "a,,b"]):
        assert "--allow needs names" in fails(capsys, keep([]), "toy.yaml", *wrong)
    assert "--allow needs names" in fails(capsys, keep([]), "toy.yaml", "--allow=../x")
    with pytest.raises(ValueError, match=r"load_hparams\(path, overrides, allow=\['os'\]\)"):
        parse_arguments([demo, "--allow", "os"])
    main(keep([]), [demo, "--help"])
    assert re.search(r"^  --allow NAME +package or", capsys.readouterr().out, re.M)


def test_a_package_that_lists_its_names_is_open_to_these_alone(
    demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "mytask"
    package.mkdir()
    (package / "__init__.py").write_text("YAML_NAMES = ('nets.Net',)\nRUN_NAMES = ()\n")
    (package / "nets.py").write_text("class Net:\n    width = 3\nclass Other(Net):\n    pass\n")
    (package / "train.py").write_text(
        "def train(run):\n    return {'width': run.hparams['net'].width}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    train = importlib.import_module("mytask.train").train
    Path("toy.yaml").write_text("net: !new:mytask.nets.Net\n")
    assert main(train, ["toy.yaml"]) == {"width": 3}
    Path("other.yaml").write_text("net: !new:mytask.nets.Other\n")
    said = fails(capsys, train, "other.yaml")
    assert "mytask.nets.Other is not allowed: mytask does not list it" in said
    assert "YAML_NAMES of mytask/__init__.py" in said


# ---------------------------------------------------------------- runs from Python


def regress(run: Run) -> dict[str, float]:
    """Train a small network for the epochs of the hyperparameters, and test it."""
    brain = Regressor(
        {"net": net()},
        lambda params: torch.optim.SGD(params, run.hparams["lr"]),
        run.hparams,
        run.options,
        run.checkpointer,
    )
    brain.fit(range(1, run.hparams["epochs"] + 1), batches(3), batches(1))
    return {
        "loss": brain.evaluate(batches(1)),
        "epochs": brain.epoch,
        "steps": brain.optimizer_step,
    }


def test_launch_leaves_a_run_folder_and_returns_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    folder = tmp_path / "runs" / "x"
    hparams = {
        "lr": 0.1,
        "epochs": 2,
        "seed": 7,
        "progressbar": False,
        "net": torch.nn.Linear(1, 2),
        "nested": {"path": tmp_path, "act": torch.relu, "sizes": (1, 2)},
    }
    metrics = launch(regress, hparams, output_folder=folder)
    assert metrics["steps"] == 6
    assert capsys.readouterr().out.startswith("test: loss=")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert logging.getLogger("trainer").handlers == []
    assert {each.name for each in folder.iterdir()} >= {
        *("hyperparams.yaml", "command.txt", "environment.json", "train.log", "metrics.jsonl"),
        "checkpoints",
    }
    record = load_hparams(folder / "hyperparams.yaml")
    assert record == {
        "lr": 0.1,
        "epochs": 2,
        "seed": 7,
        "net": "repr: Linear(in_features=1, out_features=2, bias=True)",
        "nested": {
            "path": str(tmp_path),
            "act": "repr: <built-in method relu of type object>",
            "sizes": [1, 2],
        },
        "output_folder": str(folder),
    }
    assert "stands for an object" in (folder / "hyperparams.yaml").read_text().splitlines()[0]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "test"
    assert last["steps"] == 6


def test_launch_warns_of_run_options_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--debug", "--seed=3", "--mine", "4"])
    hparams = {"lr": 0.1, "epochs": 1, "progressbar": False, "seed": 3}
    launch(regress, hparams, tmp_path / "run")
    said = "launch reads no command line: --debug has no effect; give {'debug': …} in hparams"
    assert [each for each in caplog.messages if "command line" in each] == [said]


def test_launch_again_resumes_and_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"act": torch.nn.ReLU(), "resumable_keys": ["epochs"]}
    hparams = {"lr": 0.1, "epochs": 2, "progressbar": False, **own}
    launch(regress, hparams, tmp_path / "half")
    assert launch(regress, hparams | {"epochs": 4}, tmp_path / "half")["steps"] == 12
    whole = launch(regress, hparams | {"epochs": 4}, tmp_path / "whole")
    resumed = launch(regress, hparams | {"epochs": 4}, tmp_path / "half")
    assert resumed == whole
    assert "at the last start: epochs: 2 -> 4\n" in capsys.readouterr().err
    fresh = launch(regress, hparams | {"epochs": 1, "overwrite": True}, tmp_path / "half")
    assert fresh["steps"] == 3


def test_launch_and_main_train_the_same(demo: str, tmp_path: Path) -> None:
    Path("toy.yaml").write_text("lr: 0.1\nepochs: 2\nprogressbar: false\n")
    assert main(regress, ["toy.yaml", "--seed=5"]) == launch(
        regress, {"lr": 0.1, "epochs": 2, "progressbar": False, "seed": 5}, tmp_path / "x"
    )


def test_launch_raises_what_train_raises_and_releases_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"

    def train(run: Run) -> None:
        raise RuntimeError("too warm")

    with pytest.raises(RuntimeError, match="too warm"):
        launch(train, {}, folder)
    log = (folder / "train.log").read_text()
    assert "RuntimeError: too warm" in log
    assert "Traceback" in log
    assert launch(lambda run: {"seed": run.options.seed}, {}, folder) == {"seed": 1234}


def test_launch_is_interrupted_by_exceptions(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):

        def train(_run: Run, number: int = number) -> None:
            raise Interrupted(number)

        with pytest.raises(kind):
            launch(train, {}, tmp_path / "x")
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_in_a_program_that_launches_is_exit_code_130(tmp_path: Path) -> None:
    def train(_run: Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupted) as stopped:
        launch(train, {}, tmp_path / "x")
    assert isinstance(stopped.value, SystemExit)
    assert stopped.value.code == 130


@pytest.mark.parametrize(
    ("hparams", "folder", "said"),
    [
        ({}, None, "launch needs a run folder"),
        ({"precision": "fp8"}, "x", "precision must be one of fp32, fp16, bf16, not 'fp8'"),
        ({"device": "cuda:99"}, "x", "asks for GPU 99"),
        ({"on_bad_item": "raise", "on_bad_audio": "skip"}, "x", "on_bad_audio is the former name"),
        ({"output_folder": 5}, None, "output_folder must be text or null, not 5"),
        ({"output_folder": b"x"}, None, "output_folder must be text or null, not b'x'"),
        ({"output_folder": ""}, None, "output_folder must be text or null, not ''"),
        ({"output_folder": "x\0y"}, None, "output_folder must be text or null, not "),
    ],
)
def test_launch_refuses_wrong_options(
    tmp_path: Path, hparams: dict[str, Any], folder: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        launch(regress, hparams, folder and tmp_path / folder)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("train", [None, "train", {}])
def test_launch_refuses_what_cannot_be_called(tmp_path: Path, train: Any) -> None:
    with pytest.raises(ValueError, match="train must be a function that takes a Run, not "):
        launch(train, {}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_launch_takes_options_among_the_hyperparameters(tmp_path: Path) -> None:
    runs: list[Run] = []
    mine = Checkpointer(tmp_path / "mine")
    hparams = {"precision": "bf16", "on_bad_audio": "raise", "checkpointer": mine, "debug": True}
    launch(keep(runs), hparams, tmp_path / "x")
    (run,) = runs
    assert (run.options.precision, run.options.on_bad_item) == ("bf16", "raise")
    assert run.checkpointer is mine
    assert run.hparams["output_folder"] == run.options.output_folder == str(run.folder)
    assert not (tmp_path / "x").exists()
    assert not run.folder.exists()
    launch(keep(runs), {"output_folder": str(tmp_path / "y")})
    assert runs[1].checkpointer is runs[1].checkpointer
    assert runs[1].checkpointer.folder == tmp_path / "y" / "checkpoints"


def test_a_step_of_a_launched_run_is_replayed_by_launch(tmp_path: Path) -> None:
    launch(keep([]), {}, tmp_path / "x")
    with pytest.raises(ValueError, match="is a run by trainer.launch: .* replay='.*/nonfinite/3'"):
        replay_command([str(tmp_path / "x"), "3"])


# ---------------------------------------------------------------- environment, SpeechBrain's names


def test_the_environment_knows_the_code(tmp_path: Path) -> None:
    assert git(tmp_path) is None
    for command in (
        "init -q",
        "-c user.name=a -c user.email=a@b commit -q --allow-empty -m start",
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    clean = git(tmp_path)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean["revision"])
    assert clean["dirty"] is False
    (tmp_path / "train.py").write_text("")
    subprocess.run(["git", "-C", str(tmp_path), "add", "train.py"], check=True)
    assert environment(tmp_path / "train.py")["git"] == {**clean, "dirty": True}


def test_speechbrains_head_of_a_recipe(demo: str) -> None:
    argv = [demo, "--width=4", "--precision", "fp16", "--model.bias", "false", "--log_interval=9"]
    path, run_opts, overrides = parse_arguments([*argv, "--name", "007"])
    assert path == demo
    assert run_opts == {"precision": "fp16", "log_interval": 9}
    assert overrides == {
        "width": 4,
        "precision": "fp16",
        "model": {"bias": False},
        "name": "007",
    }
    create_experiment_directory("results/sb", demo, overrides={"width": 4})
    create_experiment_directory("results/sb", demo, overrides={"width": 5})
    assert load_hparams("results/sb/hyperparams.yaml", {"output_folder": "x"})["width"] == 5
    assert len(Path("results/sb/command.txt").read_text().splitlines()) == 2
    assert Configuration(demo).is_flag("shuffle")
    assert Text("x") == "x"


@pytest.mark.long
def test_launch_joins_the_processes_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(
        "import trainer\nfrom trainer import distributed\n"
        "def train(run):\n"
        "    return {'ranks': distributed.world_size(), 'lr': run.hparams['lr']}\n"
        "for lr in (1, 2):\n"
        "    trainer.launch(train, {'lr': lr, 'device': 'cpu'}, f'runs/{lr}')\n"
        "assert distributed.world_size() == 2\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "test: ranks=2 lr=1\ntest: ranks=2 lr=2\n"


@pytest.mark.long
def test_two_processes_share_one_folder_and_one_sentence(demo: str, tmp_path: Path) -> None:
    Path("train.py").write_text(
        "import trainer.cli\nfrom trainer import distributed\n"
        "def train(run):\n"
        "    return {'ranks': distributed.world_size(), 'seed': run.options.seed}\n"
        "trainer.cli.main(train)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "train.py", demo], capture_output=True, text=True)
    assert done.stdout == "test: ranks=2 seed=7\n"
    record = json.loads(Path("results/toy/demo/7/environment.json").read_text())
    assert record["ranks"] == len(record["machines"]) == 2
    Path("file").write_text("")
    done = subprocess.run(
        [*command, "train.py", demo, "--output_folder", "file"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "error: the run folder file cannot be written: file is a file" in done.stderr
