"""A SEGAN of a few hundred weights on clips of noise, for tests that train it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.common.judges import Judges
from recipes.common.pairs import Pairs, mix
from recipes.common.scoreboard import Scoreboard
from recipes.common.streaming import Chunks
from recipes.segan.model import Discriminator, Generator
from recipes.segan.train import Enhancer, reference_pairs
from trainer.checkpoint import Checkpointer
from trainer.schedules import WarmupDecay

CHANNELS, SAMPLES, RATE = (3, 5), 64, 16000
SIZE = {"channels": CHANNELS, "kernel": 5, "stride": 2, "samples": SAMPLES}


@dataclass(frozen=True)
class Wave:
    """A clip whose speech is a tone of its own."""

    id: str
    duration: float = 200 / RATE

    def load(self, sample_rate: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        time = torch.arange(200.0)
        clean = 0.3 * torch.sin(time * (0.1 + 0.02 * int(self.id)))
        numbers = torch.Generator().manual_seed(rng.getrandbits(32))
        return mix(clean, torch.randn(200, generator=numbers), 5.0, sample_rate)


def clips(number: int = 12) -> Pairs:
    """So many of them to train on."""
    return Pairs([Wave(str(n)) for n in range(number)], RATE, SAMPLES)


def make(
    kind: type[Enhancer],
    folder: Path,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """An enhancer of this kind with new weights, and a board that measures SI-SNR alone."""
    torch.manual_seed(seed)
    modules = {"generator": Generator(**SIZE), "discriminator": Discriminator(**SIZE, references=3)}
    modules["discriminator"].remember(reference_pairs(clips(), 3, 0.95, 0.1))
    own = {
        "opt_g": partial(torch.optim.RMSprop, lr=1e-3),
        "opt_d": partial(torch.optim.RMSprop, lr=2e-3),
        "schedule": {
            "generator": partial(WarmupDecay, warmup_steps=2, total_steps=20),
            "discriminator": partial(WarmupDecay, warmup_steps=3, total_steps=30),
        },
        "pre_emphasis": 0.95,
        "l1_weight": 100.0,
        "level": 0.1,
        "chunks": Chunks(SAMPLES, 16, 2),
        "valid_measures": ["si_snr"],
        "extremes": 0,
        **(hparams or {}),
    }
    settings = {
        "device": "cpu", "progressbar": False, "seed": 3, "log_interval": 1,
        "max_grad_norm": {"generator": 2.0, "discriminator": 0.1},
        "output_folder": str(folder), **options,
    }  # fmt: skip
    brain = kind(
        modules, hparams=own, run_opts=settings, checkpointer=Checkpointer(folder / "saved")
    )
    brain.board = Scoreboard(Judges(["si_snr"], RATE, workers=0), folder)
    return brain


def fit(brain: Enhancer, epochs: int = 2, batch_size: int = 4, valid: bool = True) -> Enhancer:
    """Train it on twelve clips, three batches an epoch."""
    brain.fit(
        range(1, epochs + 1),
        clips(),
        Pairs([Wave(str(n)) for n in range(20, 23)], RATE, fixed=True) if valid else None,
        train_loader_kwargs={"batch_size": batch_size},
        valid_loader_kwargs={"batch_size": 2},
    )
    return brain
