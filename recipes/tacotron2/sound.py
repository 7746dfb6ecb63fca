"""Log-mel spectrograms to sound files: by Griffin and Lim's algorithm, or by a trained vocoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

import trainer
from recipes.common.griffin_lim import GriffinLim
from recipes.common.mel import LogMel
from recipes.common.writing import kind_for, written
from trainer.inference.model import Model

Sounding: TypeAlias = Callable[[Tensor], Tensor]  # log-mels (M, F) to samples (S,)


def make_sound(
    mel: LogMel,
    vocoder: Sounding | Model | str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Sounding:
    """Return what turns log-mels (M, F) into samples (F * hop,).

    Args:
        mel: front end whose mels these are.
        vocoder: a run folder of a HiFi-GAN, or the model that `trainer.load` makes of it; another
            function from mels to samples; None for Griffin and Lim's algorithm.
        device: where the vocoder of a run folder computes.

    Raises:
        ValueError: the run is not of a vocoder, or of one whose mels are made otherwise.
        TypeError: something else was given.
    """
    if vocoder is None:
        return GriffinLim(mel)
    name = "the vocoder"
    if isinstance(vocoder, str | os.PathLike):
        name = f"the vocoder {vocoder}"
        vocoder = trainer.load(vocoder, device)
    if not isinstance(vocoder, Model):
        if not callable(vocoder):
            raise TypeError(
                f"vocoder is a {type(vocoder).__name__}; allowed: a run folder or model of "
                "recipes.hifigan, or a function from log-mels (M, F) to samples (S,)"
            )
        return vocoder
    if "vocode" not in vocoder.tasks():
        tasks = " and ".join(vocoder.tasks()) or "no task"
        raise ValueError(f"{name} is a model of another kind: it has {tasks}, not vocode")
    model = vocoder
    for parameter, own in mel.config.items():
        if model.mel.config[parameter] != own:
            raise ValueError(
                f"{name} takes mels with {parameter}={model.mel.config[parameter]!r}; those that "
                f"are synthesised have {own!r}"
            )

    def sound(mel: Tensor) -> Tensor:
        wave: Tensor = model.vocode(mel).samples[0]
        return wave

    return sound


def write_sound(path: Path, wave: Tensor, sample_rate: int) -> None:
    """Write samples (S,) as a 16-bit file of the format of its suffix; its folder is made."""
    with written(path, sample_rate, 1, kind_for(path)) as file:
        file.write(wave.clamp(-1, 1).numpy())
