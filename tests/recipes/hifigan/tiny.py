"""A HiFi-GAN of a few hundred weights on clips of noise, for tests that train it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.mel import LogMel
from recipes.common.vocoder import Generator
from recipes.hifigan.model import Discriminators
from recipes.hifigan.train import HiFiGAN
from trainer.checkpoint import Checkpointer
from trainer.data import item_generator
from trainer.schedules import WarmupDecay

RATE, HOP, SAMPLES = 8000, 16, 256
MEL = {"sample_rate": RATE, "bands": 5, "n_fft": 64, "hop": HOP}
PLAYERS = ("discriminator", "generator")


class Waves(Dataset[dict[str, Any]]):
    """Tones in noise that is drawn anew each time."""

    def __init__(self, number: int = 12) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        tone = torch.sin(torch.arange(SAMPLES) * (0.1 + 0.05 * index))
        noise = 0.1 * torch.randn((), generator=item_generator(index))
        return {"id": f"w{index}", "wav": 0.3 * tone + noise}


def generator() -> Generator:
    return Generator(
        bands=5, channels=8, rates=(4, 4), rate_kernels=(8, 8), kernels=(3,), dilations=((1,),),
        depth=1,
    )  # fmt: skip


def discriminators(scales: int = 2) -> Discriminators:
    layers = ((4, 5, 2, 1), (4, 5, 1, 2))
    return Discriminators((2, 3), (2, 4), scales, layers)


def make(
    kind: type[HiFiGAN],
    folder: Path,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    scales: int = 2,
    **options: Any,
) -> Any:
    """A trainer of this kind with new weights, on the CPU and without a bar."""
    torch.manual_seed(seed)
    modules = {
        "generator": generator(), "discriminator": discriminators(scales),
        "mel": LogMel(**MEL, f_max=3000.0), "loss_mel": LogMel(**MEL),
    }  # fmt: skip
    schedule = partial(WarmupDecay, warmup_steps=2)
    own = {
        "opt_g": partial(torch.optim.AdamW, lr=0.003, betas=(0.8, 0.99)),
        "opt_d": partial(torch.optim.AdamW, lr=0.002, betas=(0.8, 0.99)),
        "schedule": {
            "generator": partial(schedule, total_steps=20),
            "discriminator": partial(schedule, total_steps=30),
        },
        "mel_weight": 45.0,
        "feature_weight": 2.0,
        "adversarial_from": 0,
        **(hparams or {}),
    }
    settings = {
        "device": "cpu", "progressbar": False, "seed": 3, "log_interval": 1,
        "max_grad_norm": {"generator": 20.0, "discriminator": 0.1},
        "output_folder": str(folder), **options,
    }  # fmt: skip
    return kind(
        modules, hparams=own, run_opts=settings, checkpointer=Checkpointer(folder / "saved")
    )


def fit(brain: HiFiGAN, epochs: int = 2, batch_size: int = 4, valid: bool = True) -> HiFiGAN:
    """Train it on twelve clips, three batches an epoch."""
    brain.fit(
        range(1, epochs + 1),
        Waves(),
        Waves(3) if valid else None,
        train_loader_kwargs={"batch_size": batch_size},
    )
    return brain


def weights(brain: HiFiGAN, player: str) -> Tensor:
    """All of a player's, as one vector."""
    return torch.cat([p.detach().flatten() for p in brain.modules[player].parameters()])
