"""A run folder with all that a report can show, made in a second."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from trainer.loggers import JsonlLogger, SampleLogger
from trainer.samples import Aligned, Audio, Histogram, Image, Matrix, Samples

RATE = 16000
EVIL = "\"><script>document.title='owned'</script>&amp;'<!--\u202e"


def tone(seconds: float = 0.5, pitch: float = 440.0, rate: int = RATE) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * pitch / rate * torch.arange(int(seconds * rate)))


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(int(seconds * rate), generator=generator)).clamp(-1, 1)


def every_cell(name: str = "a-1") -> dict[str, Any]:
    return {
        "id": name,
        "text": Aligned("the cat sat on the mat", "a cat sat the mad mat"),
        "noisy": Audio(tone() + noise(0.5) / 10, RATE, spectrogram=True),
        "clean": Audio(tone(0.7), RATE),
        "attention": Image(torch.eye(40)),
        "confusion": Matrix([[8, 2], [1, 9]], ["yes", "no"]),
        "scores": Histogram({"same": torch.randn(200) + 2, "other": torch.randn(200)}, "score"),
        "remark": "said twice",
        "PESQ": 2.31,
        "lost": math.nan,
    }


def show(
    folder: Path, title: str, rows: list[dict[str, Any]], step: int = 120, **more: Any
) -> None:
    SampleLogger(folder).samples(Samples(title, rows, step, **more))


def kinds_shown(folder: Path, title: str = "test") -> dict[str, str]:
    """The kinds of the cells of the first row that a run has kept, in their order."""
    found = json.loads((folder / "samples" / title / "samples.json").read_text())
    return {name: cell["kind"] for name, cell in found["rows"][0].items()}


def step_record(
    n: int, shift: float = 0.0, skipped: int = 0, overflowed: int = 0
) -> dict[str, Any]:
    return {
        "kind": "step", "step": n, "epoch": 1 + n // 100, "stage": "train",
        "loss": 3.0 / math.sqrt(n) + shift, "seconds": n * 0.25 + (n > 100) * 30.0,
        "examples_per_second": 90.0 + n % 7,
        "times": {"data": 0.002, "forward": 0.03, "backward": 0.05, "step": 0.01},
        "padding": 0.125,
        "memory": 1.5e9 + n,
        "optimizers": {"main": {
            "lr": 1e-3, "norm": 2.0 + math.sin(n), "norm_max": 4.0, "limit": 5.0, "clipped": 0.25,
            "stepped": 10, "skipped": skipped, "overflowed": overflowed, "scale": 1.0,
        }},
    }  # fmt: skip


def make_run(
    folder: Path, shift: float = 0.0, rows: int = 3, evil: bool = True, lr: float = 0.1
) -> Path:
    """Write a run folder: metrics, samples, a skipped step with its report, commands."""
    log = JsonlLogger(folder)
    for n in range(10, 210, 10):
        log.write(step_record(n, shift, skipped=int(n == 60), overflowed=2 * (n == 120)))
        if n % 100 == 0:
            for stage in ("train", "valid"):
                log.write({
                    "kind": "stage", "stage": stage, "epoch": n // 100, "step": n,
                    "loss": 300 / n + shift, "wer": 4000 / n + shift, "steps": 10,
                    "examples": 100.0, "seconds": 25.0, "skipped": 0, "overflowed": 0,
                })  # fmt: skip
    log.write({"kind": "stage", "stage": "test", "epoch": None, "step": 200, "wer": 19.0 + shift})
    log.close()
    named = [EVIL if evil and not n else f"clip-{n}" for n in range(rows)]
    show(folder, "test", [every_cell(name) for name in named], 200, note="The worst first.")
    show(folder, "valid", [{"id": "a", "heard": Audio(tone(0.3), RATE)}], 200, epoch=2)
    report = folder / "nonfinite" / "56"
    report.mkdir(parents=True)
    facts = {"step": 56, "first": f"loss {EVIL}", "causes": ["a label is empty"]}
    (report / "report.json").write_text(json.dumps(facts))
    command = "2026-01-01 10:00:00 python recipes/asr/train.py hparams/asr/demo.yaml --lr=0.1\n"
    (folder / "command.txt").write_text(f"{command}# from optimizer step 100 on: lr: 0.2 -> 0.1\n")
    (folder / "hyperparams.yaml").write_text(f"seed: {int(10 * shift)}\nlr: {lr}\nwidth: 8\n")
    machine = {"python": "3.11", "gpus": [], "ranks": 1}
    (folder / "environment.json").write_text(json.dumps(machine))
    return folder
