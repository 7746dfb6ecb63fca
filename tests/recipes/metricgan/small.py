"""A MetricGAN+ of a few hundred weights, with pairs and judges to match."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.metricgan.discriminator import Discriminator
from recipes.metricgan.history import History
from recipes.metricgan.model import Generator, Spectrum
from recipes.metricgan.phases import Drawn, Passes, Phase
from recipes.metricgan.train import Enhancer
from tests.trainer.resuming import brain_state, log
from trainer import Checkpointer, EpochCounter, distributed
from trainer.data import item_generator

METRIC = Phase("metric", 3, items=6, batch_size=2)
PHASES = (Phase("warm_up", 1, items=5, batch_size=2, passes=["spectral"]), METRIC)


class Tones(Dataset[dict[str, Any]]):
    """Short tones in noise that is drawn anew each time; of unlike lengths unless ``length``."""

    def __init__(self, items: int = 8, length: int | None = None, fixed: bool = False) -> None:
        self.items, self.length, self.fixed = items, length, fixed

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = self.length or 900 + 77 * index
        clean = 0.3 * torch.sin(torch.arange(length) * (0.1 + 0.05 * index))
        numbers = torch.Generator().manual_seed(index) if self.fixed else item_generator(index)
        noise = 0.1 * torch.randn(length, generator=numbers)
        return {"id": f"tone{index}", "noisy": clean + noise, "clean": clean}

    def name_of(self, index: int) -> str:
        return f"tone{index}"


class Ears:
    """Judges that measure at once; what is in ``bad`` cannot be measured."""

    measures, sample_rate = ("pesq",), 16000

    def __init__(self, bad: Collection[str] = ()) -> None:
        self.bad, self.failed = frozenset(bad), dict[str, str]()
        self.submitted: list[str] = []
        self._done: dict[str, dict[str, float]] = {}

    def submit(
        self, id: str, clean: Tensor, heard: Tensor, measures: Sequence[str] | None = None
    ) -> None:
        assert clean.shape == heard.shape
        self.submitted.append(id)
        if id not in self.bad:
            distance = float((clean - heard).abs().mean())
            self._done[id] = {"pesq": 4.5 / (1 + 20 * distance) - 0.5}

    def collect(self, wait: bool = True, until: Any = None) -> dict[str, dict[str, float]]:
        done, self._done = self._done, {}
        return done

    def forget(self) -> None:
        self._done = {}


def make(
    folder: Path | None = None,
    phases: Sequence[Phase] = PHASES,
    seed: int = 0,
    brain: type[Enhancer] = Enhancer,
    hparams: dict[str, Any] | None = None,
    bad: Collection[str] = (),
    **options: Any,
) -> Enhancer:
    """An enhancer on the CPU whose weights follow from ``seed``, with its judges."""
    torch.manual_seed(seed)
    modules = {
        "generator": Generator(bins=33, units=4, layers=1, width=5),
        "discriminator": Discriminator(channels=2),
    }
    own = {
        "phases": list(phases), "history": History(10, 0.5), "spectrum": Spectrum(16000, 4.0, 2.0),
        "hearing": Spectrum(16000, 4.0, 2.0, gain=30.0),
        "target": "pesq", "valid_measures": ["pesq"], "extremes": 0,
        "adversarial_weight": 1.0, "spectral_weight": 0.0, "variations": 0,
        "within_weight": 0.0, "opt_metric": None, "metric_layers": [],
        "opt_d": partial(torch.optim.Adam, lr=0.01), "opt_g": partial(torch.optim.Adam, lr=0.01),
        **(hparams or {}),
    }  # fmt: skip
    run = {"device": "cpu", "progressbar": False, "seed": 5, "log_interval": 2, **options}
    if folder is not None:
        run["output_folder"] = str(folder)
    saved = None if folder is None else Checkpointer(folder / "saved", keep_last=1)
    made = brain(modules, hparams=own, run_opts=run, checkpointer=saved)
    made.hparams.output_folder = str(folder or "")  # Of the tables of scores.
    made.judged_by(Ears(bad))
    return made


def fit(brain: Enhancer, pairs: Any = None, valid: Any = None) -> Enhancer:
    """Train it to its end, unless told otherwise on signals of one length: a CPU prepares for each
    shape, which takes longer than these small networks do.
    """
    pairs = Tones(8, 800) if pairs is None else pairs
    batches = Passes(
        brain.phases, len(pairs), brain.history, brain.options.seed,
        distributed.rank(), distributed.world_size(),
    )  # fmt: skip
    brain.fit(
        EpochCounter(brain.phases.epochs),
        Drawn(pairs),
        valid,
        train_loader_kwargs={"batch_sampler": batches},
        valid_loader_kwargs=None if valid is None else {"batch_size": 2},
    )
    return brain


def final_state(brain: Enhancer) -> dict[str, Any]:
    """Return everything that a run ends with: what every Brain has, the history and the log."""
    return {
        **brain_state(brain),
        "history": copy.deepcopy(brain.history.state_dict()),
        "log": log(brain) if distributed.is_main() else [],
    }
