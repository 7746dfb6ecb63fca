"""The demo: pretraining by masked prediction, and parts that are done once whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from recipes.finetune import demo
from recipes.finetune.demo import Part, Parts, Study
from recipes.finetune.model import PretrainedEncoder
from recipes.finetune.pretrain import MaskedPrediction, export
from recipes.finetune.train import train
from tests.recipes.common.speakers import voice
from tests.recipes.finetune.small import SMALL
from trainer import RunOptions, cli

ROOT = Path(__file__).parents[3]
HPARAMS = ROOT / "hparams" / "finetune"
SETTINGS: dict[str, Any] = {
    "study": {"pretrain": {"steps": 2}, "few": {"steps": 3}},
    "rates": [0.1, 0.2, 0.3], "seeds": [1, 2, 3], "workers": 2,
}  # fmt: skip


def network() -> dict[str, Any]:
    return {"model_type": "wav2vec2", "feat_extract_norm": "layer", **SMALL}


# -------------------------------------------------------------------------------- masked prediction


class Signals(list[Any]):
    sample_rate = 16000


def test_clusters_are_those_of_the_middle_of_each_frame_padded_or_not() -> None:
    torch.manual_seed(0)
    model = MaskedPrediction(PretrainedEncoder(network()), clusters=8, bands=16).eval()
    data: Any = Signals({"sig": voice(1.0, seed)} for seed in range(4))
    model.find_clusters(data, 0)
    found = model.centres.clone()
    model.find_clusters(data, 0)
    assert torch.equal(model.centres, found)
    assert len(found.unique(dim=0)) == 8
    long, short = voice(1.0), voice(0.6, 1)
    padded = torch.stack([long, torch.cat([short, torch.zeros(len(long) - len(short))])])
    with torch.inference_mode():
        both = model(padded, torch.tensor([len(long), len(short)]))
        alone = model(short[None], torch.tensor([len(short)]))
    frames = model.encoder.frames(len(short))
    assert torch.equal(both.clusters[1, :frames], alone.clusters[0])
    assert both.valid.sum(1).tolist() == [model.encoder.frames(len(long)), frames]
    assert not (both.masked & both.valid.logical_not()).any()
    # A click in frame 20 is heard there, and not 3 frames before.
    click = torch.zeros(1, 16000)
    click[0, 20 * 320 + 200] = 1.0
    loud = model.features(click, torch.tensor([16000]))[0, :, 16:32].sum(1)
    assert int(loud.argmax()) == 20


@pytest.mark.usefixtures("empty_speech_cache")
def test_pretraining_and_fine_tuning_from_it_as_runs(tmp_path: Path) -> None:
    few = [
        "--corpus.train=12", "--corpus.valid=3", "--corpus.test=3", "--steps=2", "--width=16",
        "--schedule.warmup_steps=1", "--device=cpu", "--no-progressbar", "--precision=fp32",
    ]  # fmt: skip
    made = tmp_path / "pretrain"
    given = [str(HPARAMS / "pretrain.yaml"), f"--output_folder={made}", "--model.clusters=8"]
    assert cli.main(train, [*given, *few]) == {}
    assert {"config.json", "model.safetensors"} <= {
        each.name for each in (made / "encoder").iterdir()
    }
    first = PretrainedEncoder(str(made / "encoder")).model.state_dict()
    given = [str(HPARAMS / "few.yaml"), f"--source={made / 'encoder'}", "--opt_class.lr=0"]
    found = cli.main(train, [*given, *few, f"--output_folder={tmp_path / 'few'}"])
    assert set(found) == {"wer", "cer"}
    import trainer

    model = trainer.load(tmp_path / "few", "cpu").modules.model.encoder.model
    assert all(each.equal(first[name]) for name, each in model.state_dict().items())
    given = [str(HPARAMS / "few.yaml"), f"--output_folder={tmp_path / 'scratch'}", "--tested=false"]
    assert cli.main(train, [*given, *few]) == {}
    lines = (tmp_path / "scratch" / "metrics.jsonl").read_text()
    assert '"test"' not in lines


# --------------------------------------------------------------------------------------------- demo


class World:
    """Parts that take no time: an error of valid by arm and rate, and of test by seed as well."""

    def __init__(self, folder: Path, deaths: int = 0) -> None:
        self.folder, self.deaths = folder, deaths
        self.started: list[Part] = []
        self.threads: list[threading.Thread] = []

    def start(self, part: Part, folder: Path) -> None:
        self.started.append(part)
        self.threads.append(threading.current_thread())
        if len(self.started) == self.deaths:
            raise KeyboardInterrupt
        folder.mkdir(exist_ok=True)
        if part.yaml == "pretrain.yaml":
            export(PretrainedEncoder(network()), folder / "encoder")
        rate = part.values.get("opt_class.lr", 0.0)
        worst = 50.0 if "source" in part.values else 90.0
        rows = [{"stage": "valid", "wer": worst, "cer": worst + abs(rate - 0.2)}]
        if part.values.get("tested"):
            rows.append({"stage": "test", "wer": worst, "cer": worst + part.values["seed"]})
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"kind": "stage", **row}) + "\n" for row in rows)

    def work(self) -> tuple[str, dict[str, float]]:
        study = Study(SETTINGS, self.folder)
        parts = Parts(self.folder, self.start)
        demo.work(parts, study, SETTINGS["workers"])
        return study.table(parts.done)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORTEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_test_speaks_only_at_the_rate_that_valid_chose(tmp_path: Path) -> None:
    world = World(tmp_path)
    table, errors = world.work()
    fine = [each for each in world.started if each.yaml == "few.yaml"]
    tested = [each for each in fine if each.values["tested"]]
    assert len(world.started) == 13
    assert Counter((each.values["opt_class.lr"], each.values["seed"]) for each in tested) == {
        (0.2, 1): 2, (0.2, 2): 2, (0.2, 3): 2,
    }  # fmt: skip
    assert all(each.values["test_only"] for each in tested if each.values["seed"] == 1)
    untested = [each for each in fine if not each.values["tested"]]
    assert {each.values["seed"] for each in untested} == {1}
    assert fine.index(tested[0]) >= 3
    assert errors == {
        "pretrained_wer": 50.0, "pretrained_cer": 52.0, "scratch_wer": 90.0, "scratch_cer": 92.0,
    }  # fmt: skip
    assert [line.split()[0] for line in table.splitlines()] == ["start", "pretrained", "scratch"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("deaths", [1, 2, 5, 9, 13])
def test_a_demo_that_is_killed_goes_on_and_a_second_one_finds_the_encoder(
    tmp_path: Path, deaths: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    killed = World(tmp_path / "a", deaths)
    with pytest.raises(KeyboardInterrupt):
        killed.work()
    for thread in killed.threads:  # A part runs in a process that ends with the demo.
        thread.join()
    again = World(tmp_path / "a")
    found = again.work()
    assert len(again.started) <= 13 - (deaths - 2)  # Two are done at a time.
    assert again.work() == found
    whole = World(tmp_path / "b")
    assert whole.work() == found
    assert not any(each.yaml == "pretrain.yaml" for each in whole.started)  # It is cached.


def test_a_part_gives_the_best_valid_and_the_last_test_and_overwrite_does_it_anew(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "valid", "epoch": n, "wer": 9.0, "cer": cer}
        for n, cer in enumerate([5.0, 2.0, 2.0])
    ]
    rows[2]["wer"] = 7.0  # The later one of equals.
    tests = [{"stage": "test", "epoch": None, "wer": wer, "loss": 1.0} for wer in (4.0, 3.0)]
    lines = [json.dumps({"kind": "stage", **row}) for row in rows + tests]
    started: list[str] = []

    def start(part: Part, folder: Path) -> None:
        started.append(part.name)
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    part = Part("one", "x.yaml", {})
    for anew, starts in ((False, 1), (False, 1), (True, 2)):
        parts = Parts(tmp_path, start, anew)
        found = parts.do(part)
        assert found == {"valid": {"wer": 7.0, "cer": 2.0}, "test": {"wer": 3.0}}
        parts.keep(part, found)
        assert len(started) == starts


PART = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(1)
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "up").touch()
time.sleep(60)
"""


def test_a_demo_that_is_stopped_waits_until_its_parts_have_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = subprocess.Popen

    def begin(command: list[str], **options: Any) -> Any:
        return own([sys.executable, "-c", PART, str(tmp_path)], **options)

    def work(parts: Parts, study: Study, workers: int) -> None:
        pool = ThreadPoolExecutor(1)
        pool.submit(parts.start, study.pretraining, tmp_path)
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        pool.shutdown(wait=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.subprocess, "Popen", begin)
    monkeypatch.setattr(demo, "work", work)
    with pytest.raises(KeyboardInterrupt):
        demo.run(SimpleNamespace(hparams=SETTINGS, folder=tmp_path, options=RunOptions()))
    assert (tmp_path / "saved").exists()


def test_a_broken_encoder_in_the_cache_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    made, cached = tmp_path / "made", tmp_path / "cache" / "encoder"
    export(PretrainedEncoder(network()), made)
    demo.publish(made, cached)
    demo.publish(made, cached)
    assert [each.name for each in cached.parent.iterdir()] == ["encoder"]
    PretrainedEncoder(str(cached))


@pytest.mark.long
def test_the_real_demo_ends_its_parts_when_it_is_killed_and_goes_on(tmp_path: Path) -> None:
    sizes = {"corpus.train": 30, "corpus.valid": 6, "corpus.test": 6, "schedule.warmup_steps": 1}
    study = {"pretrain": {**sizes, "steps": 2}, "few": {**sizes, "steps": 3}}
    command = [
        sys.executable, str(ROOT / "recipes/finetune/train.py"), str(HPARAMS / "demo.yaml"),
        f"--output_folder={tmp_path / 'run'}", f"--study={json.dumps(study)}",
    ]  # fmt: skip
    environment = {**os.environ, "CORTEX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for seconds in (15, 40):
        process = subprocess.Popen(command, env=environment)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(5)
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
        assert not left.stdout
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "test: pretrained_wer=" in done.stdout
