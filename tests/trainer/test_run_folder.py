"""A run folder never lies: what it records was in force, and what is printed is its result."""

import copy
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.small import Regressor, batches, net
from trainer import Checkpointer
from trainer.cli import Run, launch, main
from trainer.config.hyperparameters import load_hparams

YAML = """\
    lr: 0.1
    epochs: 2
    scale: 1.0
    valid_batch_size: 3
    schedule: !name:torch.optim.lr_scheduler.LinearLR {total_iters: !ref <epochs>}
    epoch_counter: !new:trainer.EpochCounter {limit: !ref <epochs>}
    early_stopping: !new:trainer.schedules.EarlyStopping {patience: 4, min_delta: 1.0e+6}
    opt: !name:torch.optim.SGD {lr: !ref <lr>, momentum: 0.5}
    device: cpu
    progressbar: false
"""


def train(run: Run) -> dict[str, float]:
    """Train a small network; return its loss, and settings in force."""
    hparams = run.hparams
    brain = Regressor({"net": net()}, hparams["opt"], hparams, run.options, run.checkpointer)
    brain.fit(hparams["epoch_counter"], batches(3), batches(1))
    group = {"initial_lr": 0.0} if not brain.updates else brain.optimizer.param_groups[0]
    return {
        "loss": brain.evaluate(batches(1)),
        "steps": brain.optimizer_step,
        "lr": group["initial_lr"],
        "weight_decay": group.get("weight_decay", 0.0),
        "scale": hparams["scale"],
    }


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a small YAML; return its path, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    Path("toy").mkdir()
    Path("toy/demo.yaml").write_text(textwrap.dedent(YAML))
    return "toy/demo.yaml"


def run(*argv: str) -> dict[str, Any]:
    """Run the command line in the folder x."""
    return main(train, [*argv, "--output_folder=x"])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the sentence of a command in the folder x that is refused and changes nothing."""
    before = contents(Path("x"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    assert contents(Path("x")) == before
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    for way in ("--output_folder", "--overwrite", "--change_hparams"):
        assert way in line
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder but its lock."""
    files = (each for each in folder.rglob("*") if each.is_file() and each.name != ".lock")
    return {str(each): each.read_bytes() for each in files}


def commands() -> list[str]:
    return Path("x/command.txt").read_text().splitlines()


# ---------------------------------------------------------------- a second start


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--lr=0.2", "lr: 0.1 -> 0.2"),
        ("--opt.momentum=0.9", "opt.momentum: 0.5 -> 0.9"),
        ("--opt=!name:torch.optim.Adam", "opt: !name:torch.optim.SGD -> !name:torch.optim.Adam"),
        ("--precision=bf16", "precision: fp32 -> bf16"),
        ("--seed=5", "seed: 1234 -> 5"),
        ("--early_stopping.min_delta=3", "early_stopping.min_delta: 1.0e+6 -> 3"),
    ],
)
def test_another_training_value_is_refused_and_nothing_changes(
    demo: str, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    run(demo)
    line = refused(capsys, demo, change)
    assert said.replace("1.0e+6", "1000000.0") in line
    assert " x " in line
    assert refused(capsys, demo, change, "--epochs=9") == line  # A refused start is no start.


def test_the_three_ways_on(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(demo)
    refused(capsys, demo, "--lr=0.2")
    other = main(train, [demo, "--lr=0.2", "--output_folder=y"])
    assert (other["steps"], other["lr"]) == (6, 0.2)
    assert run(demo) == first  # Its results are still those of its values.
    anew = run(demo, "--lr=0.2", "--overwrite")
    assert anew == other
    assert not any(each.startswith("#") for each in commands())

    changes = ["--lr=0.3", "--opt.weight_decay=0.1", "--scale=2", "--epochs=4", "--change_hparams"]
    changed = run(demo, *changes)
    assert (changed["steps"], changed["lr"]) == (12, 0.3)
    assert (changed["weight_decay"], changed["scale"]) == (0.1, 2)
    notes = [each for each in commands() if each.startswith("#")]
    assert "# from optimizer step 6 on: lr: 0.2 -> 0.3" in notes
    assert "# from optimizer step 6 on: opt.weight_decay: absent -> 0.1" in notes
    assert "lr: 0.2 -> 0.3" in Path("x/train.log").read_text()

    again = main(train, ["x/hyperparams.yaml"])  # It reloads as the same run.
    assert again == changed
    assert "change_hparams" not in Path("x/hyperparams.yaml").read_text()
    line = refused(capsys, demo, "--lr=0.2", "--opt.weight_decay=0.1", "--scale=2", "--epochs=4")
    assert "lr: 0.3 -> 0.2" in line


def test_every_refused_key_is_named_up_to_a_limit(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = "".join(f"    own{n}: {n}\n" for n in range(20))
    Path(demo).write_text(textwrap.dedent(YAML + keys))
    run(demo)
    line = refused(capsys, demo, *(f"--own{n}=77" for n in range(20)), "--scale=3")
    assert "own0: 0 -> 77" in line
    assert "and 13 more" in line


def test_a_finished_run_prints_its_results_again(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(demo)
    first = capsys.readouterr().out
    for same in ([], ["--lr=1e-1", "--max_grad_norm=5"]):
        run(demo, *same)
        said = capsys.readouterr()
        assert said.out == first
        assert "other" not in said.err


def test_extending_and_neutral_keys_take_effect_and_are_recorded(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(demo)["steps"] == 6
    assert run(demo, "--epochs=4", "--valid_batch_size=1", "--log_interval=1")["steps"] == 12
    record = load_hparams("x/hyperparams.yaml")
    assert (record["epochs"], record["valid_batch_size"], record["log_interval"]) == (4, 1, 1)
    assert record["epoch_counter"].limit == 4
    assert run(demo, "--epochs=9")["steps"] == 15  # stopped early
    assert run(demo, "--epochs=9", "--early_stopping.patience=6")["steps"] == 21
    assert (
        run(demo, "--epochs=9", "--optimizer_step_limit=22", "--early_stopping.patience=8")["steps"]
        == 22
    )
    assert refused(capsys, demo, "--epochs=30", "--lr=0.3").count(" -> ") == 1


def test_a_run_cannot_end_before_what_it_has_trained(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(demo, "--epochs=9", "--optimizer_step_limit=4")["steps"] == 4
    line = refused(capsys, demo, "--epochs=9", "--optimizer_step_limit=3")
    assert "optimizer_step_limit: 4 -> 3" in line
    assert run(demo, "--epochs=3")["steps"] == 7  # Both are ahead of what is trained.
    for change in ("--epochs=2", "--epochs=3 --epoch_counter.limit=1", "--optimizer_step_limit=6"):
        line = refused(capsys, demo, *change.split())
        assert ", but step 7 of epoch 3 is trained already" in line
    assert run(demo, "--epochs=3", "--optimizer_step_limit=7")["steps"] == 7


def test_a_yaml_lists_keys_that_may_change(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = "    resumable_keys: [scale]\n    neutral_keys: [opt.momentum]\n"
    Path(demo).write_text(textwrap.dedent(YAML + own))
    run(demo)
    for scale in (5, 0.5):
        assert run(demo, f"--scale={scale}", "--opt.momentum=0.9")["scale"] == scale
    refused(capsys, demo, "--scale=5", "--opt.momentum=0.9", "--lr=5")
    Path(demo).write_text(textwrap.dedent(YAML + own.replace("scale", "scael")))
    with pytest.raises(SystemExit):
        run(demo)
    assert "resumable_keys names 'scael', which is no key of the YAML; did" in (
        capsys.readouterr().err
    )


def test_a_record_that_was_edited_is_another_start(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(demo)
    path = Path("x/hyperparams.yaml")
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.3"))
    assert "lr: 0.1 -> 0.3" in refused(capsys, "x/hyperparams.yaml")
    path.write_text(path.read_text().replace("lr: 0.3", "lr: 0.1").replace("limit: ", "limit: 1"))
    path.write_text(path.read_text().replace("limit: 1!ref <epochs>", "limit: 3"))
    extended = run("x/hyperparams.yaml")
    assert (first["steps"], extended["steps"]) == (6, 9)


def test_what_was_edited_by_hand_is_no_value_that_was_trained_with(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(demo)
    path = Path("x/hyperparams.yaml")
    written = path.read_bytes()

    def fail(_run: Run) -> None:
        raise ValueError("no data")

    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.3"))
    with pytest.raises(ValueError, match="no data"):
        main(fail, ["x/hyperparams.yaml", "--change_hparams"])
    assert "lr: 0.1 -> 0.3" in refused(capsys, "x/hyperparams.yaml")
    assert run(demo) == first
    assert "x/hyperparams.yaml was edited by hand: it is rewritten" in capsys.readouterr().err
    assert path.read_bytes() == written
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.3"))
    assert main(train, ["x/hyperparams.yaml", "--change_hparams"])["lr"] == 0.3


@pytest.mark.parametrize("damage", ["lost", "empty", "zeros", "cut", "no YAML"])
def test_a_record_that_is_lost_lets_no_other_value_pass(
    demo: str, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    first = run(demo)
    path = Path("x/hyperparams.yaml")
    text = path.read_bytes()
    damaged = {"empty": b"", "zeros": b"\0" * 9, "cut": text[:90], "no YAML": text + b"opt: [\n"}
    path.unlink() if damage == "lost" else path.write_bytes(damaged[damage])
    assert "lr: 0.1 -> 0.2" in refused(capsys, demo, "--lr=0.2")
    assert run(demo) == first
    assert path.read_bytes() == text


# ---------------------------------------------------------------- starts that fail


def test_a_start_that_trained_nothing_binds_nobody(demo: str) -> None:
    def fail(_run: Run) -> None:
        raise OSError("no data")

    with pytest.raises(SystemExit):
        main(fail, [demo, "--output_folder=x", "--lr=0.7"])
    assert run(demo)["lr"] == 0.1
    assert load_hparams("x/hyperparams.yaml")["lr"] == 0.1


@pytest.mark.parametrize("change", ["--lr=0.7", "--epochs=7", "--valid_batch_size=7"])
def test_a_later_start_that_fails_leaves_the_record(demo: str, change: str) -> None:
    first = run(demo)
    before = Path("x/hyperparams.yaml").read_bytes()

    def fail(_run: Run) -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        main(fail, [demo, "--output_folder=x", change, "--change_hparams"])
    assert Path("x/hyperparams.yaml").read_bytes() == before
    assert run(demo) == first


def test_a_network_of_another_size_is_refused_with_the_record_as_it_was(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def sized(run: Run) -> None:
        size = int(run.hparams["scale"])
        opt = run.hparams["opt"]
        small = Regressor(
            {"net": torch.nn.Linear(4, 2 * size)}, opt, run.hparams, run.options, run.checkpointer
        )
        data = [{**each, "y": each["y"].repeat(1, size)} for each in batches(3)]
        small.fit(run.hparams["epoch_counter"], data)

    argv = [demo, "--output_folder=x"]
    main(sized, argv)
    before = Path("x/hyperparams.yaml").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(sized, [*argv, "--scale=3", "--change_hparams"])
    assert stopped.value.code == 2
    assert "made with other settings" in capsys.readouterr().err
    assert Path("x/hyperparams.yaml").read_bytes() == before
    main(sized, argv)


# ---------------------------------------------------------------- folders


def test_a_sweep_by_hand_keeps_every_run(demo: str) -> None:
    rates = ["0.1", "0.2", "0.4"]
    metrics = [main(train, [demo, "--lr", rate]) for rate in rates]
    folders = [Path(f"results/toy/demo/1234-lr={rate}") for rate in rates]
    for folder, own in zip(folders, metrics, strict=True):
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["loss"] == own["loss"]
        assert load_hparams(folder / "hyperparams.yaml")["output_folder"] == str(folder)
        assert main(train, [str(folder / "hyperparams.yaml")]) == own
    assert sorted(os.listdir("results/toy/demo")) == [each.name for each in folders]
    assert main(train, [demo, "--lr=0.2", "--epochs=3"])["steps"] == 9  # goes on
    assert sorted(os.listdir("results/toy/demo")) == [each.name for each in folders]


def test_the_suffix_is_for_the_default_folder_alone(demo: str) -> None:
    text = textwrap.dedent(YAML)
    for own, expected in [
        ("", "results/toy/demo/1234-lr=0.3"),
        ("output_folder: null", "results/toy/demo/1234-lr=0.3"),
        ("output_folder: !ref results/toy/demo/<seed>", "results/toy/demo/1234-lr=0.3"),
        ("output_folder: !ref runs/<seed>", "runs/1234"),
        ("output_folder: mine", "mine"),
    ]:
        Path(demo).write_text(f"{text}{own}\nseed: 1234\n")
        main(train, [demo, "--lr=0.3"])
        assert Path(expected, "hyperparams.yaml").exists(), own
    main(train, [demo, "--lr=0.3", "--output_folder", "!ref results/toy/demo/<seed>"])
    assert Path("results/toy/demo/1234/hyperparams.yaml").exists()


def test_changed_hyperparameters_go_on_in_the_folder_without_a_suffix(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(train, [demo, "--lr=0.3", "--change_hparams"])
    assert "there is none in results/toy/demo/1234: name" in capsys.readouterr().err
    assert not Path("results").exists()
    main(train, [demo])
    changed = main(train, [demo, "--lr=0.3", "--epochs=3", "--change_hparams"])
    assert (changed["lr"], changed["steps"]) == (0.3, 9)
    assert os.listdir("results/toy/demo") == ["1234"]


def test_home_is_home(demo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    text = textwrap.dedent(YAML)
    for number, own in enumerate(["~/runs/0", "!ref ~/runs/<lr>"]):
        Path(demo).write_text(f"{text}output_folder: {own}\nsaves: !ref <output_folder>/s\n")
        main(train, [demo])
        folder = home / "runs" / ["0", "0.1"][number]
        assert load_hparams(folder / "hyperparams.yaml")["saves"] == f"{folder}/s"
    main(train, [demo, "--output_folder=~/runs/2"])
    launch(lambda run: None, {}, "~/runs/3")
    assert sorted(os.listdir(home / "runs")) == ["0", "0.1", "2", "3"]
    assert not Path("~").exists()


def test_a_test_leaves_the_record_and_is_refused_by_other_values(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(demo)
    before = Path("x/hyperparams.yaml").read_bytes()
    run(demo, "--test_only", "--valid_batch_size=1", "--average_checkpoints=2")
    assert Path("x/hyperparams.yaml").read_bytes() == before
    assert "--test_only" in commands()[-1]
    refused(capsys, demo, "--test_only", "--scale=3")
    assert run(demo, "--test_only", "--scale=3", "--change_hparams")["scale"] == 3
    assert Path("x/hyperparams.yaml").read_bytes() == before


# ---------------------------------------------------------------- records of earlier versions


def test_a_folder_of_an_earlier_version_goes_on(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(demo)
    Path("x/.hyperparams.yaml").unlink()
    path = Path("x/hyperparams.yaml")
    old = path.read_text().replace("on_bad_item", "on_bad_audio")
    path.write_text(re.sub(r"seed: 1234\n", "on_bad_audio: skip\nseed: 1234\n", old))
    assert run(demo) == first
    refused(capsys, demo, "--lr=3")


def test_a_record_that_cannot_be_read_is_told(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(demo)
    Path("x/.hyperparams.yaml").unlink()
    path = Path("x/hyperparams.yaml")
    path.write_text(path.read_text() + "opt: [\n")
    capsys.readouterr()
    assert run(demo) == first
    assert "warning: cannot compare with the last start: x/hyperparams.yaml, line" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------- launch


class Noise:
    """An object without a repr."""

    def __init__(self, scale: float, folder: str = "") -> None:
        self.scale, self.folder = scale, folder
        self.calls = 0


def objects(rate: float = 0.1, **changes: Any) -> dict[str, Any]:
    """Return hyperparameters with objects, which are others at each call."""
    made = {
        "opt": partial(torch.optim.SGD, lr=rate),
        "noise": Noise(0.5),
        "names": {"a", "b", "c"},
        "function": lambda x: x,
        "net": torch.nn.Linear(1, 2),
        "generator": torch.Generator(),
        "epochs": 2,
        "progressbar": False,
        "device": "cpu",
        "resumable_keys": ["epochs"],
        "neutral_keys": ["generator"],
    }
    return made | changes


def fit(run: Run) -> dict[str, float]:
    """Train for the epochs of the hyperparameters."""
    brain = Regressor({"net": net()}, run.hparams["opt"], {}, run.options, run.checkpointer)
    brain.fit(range(1, run.hparams["epochs"] + 1), batches(3))
    return {"steps": brain.optimizer_step, "lr": brain.optimizer.param_groups[0]["lr"]}


def test_launch_compares_objects_by_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    first = launch(fit, objects(), folder)
    assert launch(fit, objects(), folder) == first
    used = objects()
    used["noise"].calls = 7
    assert launch(fit, used, folder) == first
    assert launch(fit, objects(noise=Noise(0.5, "/elsewhere")), folder) == first
    assert launch(fit, objects(epochs=3), folder) == {"steps": 9, "lr": 0.1}
    before = contents(folder)
    for changes, said in [
        ({"opt": partial(torch.optim.SGD, lr=0.2)}, r"lr=0\.1\) -> .*lr=0\.2\)"),
        ({"noise": Noise(0.25)}, r"scale=0\.5 -> .*scale=0\.25"),
        ({"names": {"a", "b", "d"}}, r"names\.2: c -> d"),
        ({"net": torch.nn.Linear(1, 3)}, r"out_features=2.* -> .*out_features=3"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            launch(fit, objects(epochs=3, **changes), folder)
        assert "overwrite to start anew, or change_hparams to go on" in str(error.value)
        assert contents(folder) == before
    changed = launch(fit, objects(0.2, epochs=4, change_hparams=True), folder)
    assert changed == {"steps": 12, "lr": 0.2}
    anew = launch(fit, objects(0.3, overwrite=True), folder)
    assert anew == {"steps": 6, "lr": 0.3}


def test_long_descriptions_differ_where_only_their_ends_do(tmp_path: Path) -> None:
    def layers(last: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(*[torch.nn.Linear(1, 1)] * 40, torch.nn.Linear(1, last))

    launch(fit, objects(net=layers(1)), tmp_path)
    launch(fit, objects(net=layers(1)), tmp_path)
    with pytest.raises(ValueError, match="net: "):
        launch(fit, objects(net=layers(2)), tmp_path)


class Own(torch.nn.Module):
    """A network whose repr does not show what it was given."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate


def changed_in_the_middle(kind: Callable[[list[int]], Any]) -> tuple[Any, Any]:
    many = list(range(6000))
    return kind(many), kind([*many[:3000], -1, *many[3001:]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Own(0.1), Own(0.2)),
        (torch.nn.Sequential(Own(0.1), Own(0.1)), torch.nn.Sequential(Own(0.1), Own(0.2))),
        (np.int64(3), np.int64(4)),
        (b"abc", b"abd"),
        *map(
            changed_in_the_middle,
            [list, tuple, set, np.array, torch.tensor, np.float32, str, dict.fromkeys,
             lambda many: {"deep": [{"names": many}]}, lambda many: np.array(many)[::-1]],
        ),
    ],
)  # fmt: skip
def test_values_of_any_size_are_compared(tmp_path: Path, old: Any, new: Any) -> None:
    first = launch(fit, objects(value=old), tmp_path)
    assert launch(fit, objects(value=copy.deepcopy(old)), tmp_path) == first
    with pytest.raises(ValueError, match="trained with other hyperparameters .value"):
        launch(fit, objects(value=new), tmp_path)


def test_a_number_of_numpy_is_a_number(tmp_path: Path) -> None:
    values = {"whole": np.int32(3), "part": np.float32(0.5), "list": [np.int64(1)]}
    first = launch(fit, objects(**values), tmp_path)
    assert launch(fit, objects(whole=3, part=0.5, list=[1]), tmp_path) == first
    assert load_hparams(tmp_path / "hyperparams.yaml")["list"] == [1]


def test_a_large_mapping_is_compared_key_by_key(tmp_path: Path) -> None:
    config = {"lr": 0.1, "num_workers": 1} | {f"layer_{n}": {"width": n} for n in range(200)}
    launch(fit, objects(config=config), tmp_path)
    launch(fit, objects(config=config | {"num_workers": 2}), tmp_path)
    with pytest.raises(ValueError, match=r"\(config\.lr: 0\.1 -> 0\.2\)"):
        launch(fit, objects(config=config | {"lr": 0.2}), tmp_path)


def test_hyperparameters_of_launch_are_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hparams must be a mapping of keys to values, not 'lr"):
        launch(fit, "lr: 0.1", tmp_path)  # type: ignore[arg-type]


def test_a_record_of_launch_by_an_earlier_version_goes_on(tmp_path: Path) -> None:
    launch(fit, objects(), tmp_path)
    path = tmp_path / "hyperparams.yaml"
    path.write_text(path.read_text().replace(", scale=0.5", ""))
    (tmp_path / ".hyperparams.yaml").unlink()
    launch(fit, objects(), tmp_path)


def test_main_and_launch_share_a_folder(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text("rate: 0.1\ndevice: cpu\nprogressbar: false\n")

    def plain(run: Run) -> dict[str, float]:
        hparams = {"opt": partial(torch.optim.SGD, lr=run.hparams["rate"]), "epochs": 1}
        return fit(Run(hparams, run.options, run.folder))

    main(plain, ["plain.yaml", "--output_folder=x"])
    values = {"rate": 0.1, "device": "cpu", "progressbar": False}
    assert launch(plain, values, "x")["steps"] == 3
    with pytest.raises(ValueError, match=r"rate: 0\.1 -> 0\.2"):
        launch(plain, values | {"rate": 0.2}, "x")


def test_a_folder_with_checkpoints_elsewhere_counts_as_trained(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(run: Run) -> None:
        keep = Checkpointer(run.folder / "save" / "deep")
        brain = Regressor({"net": net()}, run.hparams["opt"], {}, {"device": "cpu"}, keep)
        brain.fit(range(1, 2), batches(2), progressbar=False)

    main(own, [demo, "--output_folder=x"])
    Path("x/metrics.jsonl").unlink(missing_ok=True)
    refused(capsys, demo, "--lr=3")


Train = Callable[[Run], Any]
