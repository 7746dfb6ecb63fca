"""The head of a recipe: command line, YAML, folder with its log, processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from tests.trainer.small import batches, make
from trainer.compat import speechbrain as head
from trainer.compat.toolkit import SEEDING

YAML = """
seed: 3
lr: 0.1  # learning rate
output_folder: out
net: !new:torch.nn.Linear {in_features: 2, out_features: 1}
"""


@pytest.fixture
def yaml(tmp_path: Path) -> Any:
    path = tmp_path / "h.yaml"
    path.write_text(YAML)
    yield path
    head.close()


def test_options_of_the_command_line_and_those_in_force(yaml: Path) -> None:
    _, run_opts, overrides = trainer.parse_arguments([str(yaml), "--lr=0.2", "--precision=bf16"])
    assert overrides == {"lr": 0.2}
    assert run_opts == {"precision": "bf16"}
    assert run_opts["precision"] == "bf16"
    assert run_opts["debug"] is False
    assert torch.device(run_opts["device"]).type in ("cpu", "cuda")
    assert run_opts["distributed_backend"] in ("gloo", "nccl")
    assert run_opts["noprogressbar"] is False
    with pytest.raises(KeyError):
        run_opts["nothing"]


@pytest.mark.parametrize("overrides", [{"lr": 0.2}, "lr: 0.2", "lr: 0.2\n", StringIO("lr: 0.2")])
def test_a_yaml_and_its_overrides_in_every_form(yaml: Path, overrides: Any) -> None:
    with yaml.open() as file:
        assert trainer.load_hyperpyyaml(file, overrides)["lr"] == 0.2
    if isinstance(overrides, StringIO):
        overrides.seek(0)
    found = trainer.load_hyperpyyaml(YAML, overrides)
    assert found["lr"] == 0.2
    assert found["net"].in_features == 2
    assert trainer.load_hyperpyyaml(YAML, "")["lr"] == 0.1


def test_overrides_that_do_not_match(yaml: Path) -> None:
    with pytest.raises(ValueError, match="there is no key or run option 'rate'"):
        trainer.load_hyperpyyaml(YAML, {"rate": 1})
    assert "rate" not in trainer.load_hyperpyyaml(YAML, {"rate": 1}, overrides_must_match=False)
    with pytest.raises(ValueError, match="the overrides are no mapping"):
        trainer.load_hyperpyyaml(YAML, "- 1")


def test_plain_values_are_dumped() -> None:
    stream = StringIO()
    trainer.dump_hyperpyyaml({"lr": 0.1, "sizes": [1, 2]}, stream)
    assert trainer.load_hyperpyyaml(stream.getvalue()) == {"lr": 0.1, "sizes": [1, 2]}


@pytest.mark.parametrize("name", ["torch.manual_seed", "torch.random.manual_seed"])
def test_a_key_that_seeds_is_the_seed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    path.write_text(f"__set_seed: !apply:{name} [11]\nnet: !new:torch.nn.Linear [2, 2]\n")
    found = [trainer.load_hparams(path) for _ in range(2)]
    assert found[0]["seed"] == 11
    assert torch.equal(found[0]["net"].weight, found[1]["net"].weight)
    torch.manual_seed(11)
    assert torch.equal(found[0]["net"].weight, torch.nn.Linear(2, 2).weight)
    path.write_text(f"seed: 5\n__set_seed: !apply:{name} [!ref <seed>]\n")
    assert trainer.load_hparams(path)["seed"] == 5
    path.write_text(f"__set_seed: !apply:{name} [soon]\n")
    with pytest.raises(ValueError, match="seed must be a whole number"):
        trainer.load_hparams(path)


@pytest.mark.parametrize("name", SEEDING)
@pytest.mark.parametrize("key", ["x", "__x", "seed"])
@pytest.mark.parametrize("given", ["[7]", "{seed: 7}", "[!ref <first>]", "{seed: !ref <first>}"])
def test_a_function_that_seeds_is_the_option_under_any_key(
    name: str, key: str, given: str, tmp_path: Path
) -> None:
    path = tmp_path / "h.yaml"
    path.write_text(f"first: 7\n{key}: !apply:{name} {given}\n")
    before = torch.get_rng_state()
    found = trainer.load_hparams(path)
    assert found["seed"] == 7
    assert torch.equal(torch.get_rng_state(), before) == (key != "__x")
    assert {"x": 7, "seed": 7}.get(key) == found.get(key if key != "__x" else None)
    changed = trainer.load_hparams(path, {"seed": 9})
    assert changed["seed"] == changed.get("x", 9) == 9
    with pytest.raises(ValueError, match="not allowed"):
        trainer.load_hparams(path, run_folder=True)
    path.write_text(f"seed: 3\nfirst: 7\n{key}: !apply:{name} {given}\n")
    if key != "seed":
        with pytest.raises(ValueError, match=f"line 3: {key} seeds with 7, and the key seed is 3"):
            trainer.load_hparams(path)


@pytest.mark.parametrize("given", ["[soon]", "[-1]", "[1.5]", "[[1]]", "[null]"])
def test_a_seed_that_is_no_whole_number_is_told(given: str, tmp_path: Path) -> None:
    path = tmp_path / "h.yaml"
    path.write_text(f"x: !apply:torch.manual_seed {given}\n")
    with pytest.raises(ValueError, match=r"h.yaml, line 1: a seed must be a whole number of 0"):
        trainer.load_hparams(path)


def test_the_folder_has_the_log_of_the_run(yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call = "create(folder, yaml, {'lr': 0.3})"  # As a program does.
    names = {"create": trainer.create_experiment_directory, "folder": folder, "yaml": yaml}
    exec(call, {"__name__": "__main__", **names})
    logging.getLogger("__main__").info("a message of the recipe")
    brain = make(hparams={"output_folder": str(folder)})
    brain.fit([1, 2], batches(2))
    head.close()
    log = (folder / "train.log").read_text()
    assert "a message of the recipe" in log
    assert log.count("train:") == 2 or log.count("epoch") >= 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert trainer.load_hparams(folder / "hyperparams.yaml")["lr"] == 0.3
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not a run folder"):
        trainer.create_experiment_directory(tmp_path / "other")


def test_run_on_main_returns_and_calls_what_follows() -> None:
    calls: list[Any] = []
    result = trainer.run_on_main(
        lambda a, b: a + b, [1], {"b": 2}, post_func=calls.append, post_args=["post"]
    )
    assert (result, calls) == (3, [])
    trainer.run_on_main(print, post_func=calls.append, post_args=["post"], run_post_on_main=True)
    assert calls == ["post"]
    assert trainer.if_main_process()


SCRIPT = """
import sys, torch, trainer
from trainer import Brain, distributed
class Recipe(Brain):
    def compute_forward(self, batch, stage): return self.modules.net(batch[0])
    def compute_objectives(self, out, batch, stage): return out.square().mean()
    def on_fit_batch_end(self, *_):
        if {action!r} == "die" and distributed.rank() == 1: raise ValueError("that is enough")
        if {action!r} == "wait": print("training", flush=True); __import__("time").sleep(0.05)
trainer.create_experiment_directory("run")
brain = Recipe({{"net": torch.nn.Linear(1, 1)}}, lambda p: torch.optim.SGD(p, 0.1),
    {{"output_folder": "run"}}, {{"device": "cpu"}}, trainer.Checkpointer("run/checkpoints"))
data = torch.utils.data.TensorDataset(torch.randn(64, 1))
brain.fit(range({epochs}), data, progressbar=False, train_loader_kwargs={{"batch_size": 4}})
weight = round(brain.modules.net.weight.item(), 6)
told = f"ranks {{distributed.world_size()}} steps {{brain.optimizer_step}} weight {{weight}}"
sys.stdout.write(told + "\\n")  # In one piece: ranks share the terminal.
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def script(folder: Path, action: str = "", epochs: int = 1) -> Path:
    path = folder / "recipe.py"
    path.write_text(SCRIPT.format(action=action, epochs=epochs))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.faults
def test_a_script_of_ones_own_is_one_training_under_torchrun(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, script(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
        env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ranks")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("ranks 2 steps 8 weight")
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["ranks"] == 2


@pytest.mark.faults
def test_an_error_on_one_rank_ends_both_and_is_logged(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TORCHRUN, script(tmp_path, "die")], capture_output=True, text=True, cwd=tmp_path,
        env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "that is enough" in done.stderr
    assert "that is enough" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.faults
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, script(tmp_path, "wait", epochs=20)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    ) as process:
        assert process.stdout is not None
        while "training" not in process.stdout.readline():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    log = (tmp_path / "run" / "train.log").read_text()
    assert "saved and stopping (SIGTERM)" in log
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
