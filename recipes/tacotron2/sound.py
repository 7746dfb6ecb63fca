"""Log-mel spectrograms to sound files: by Griffin and Lim's algorithm, or by a trained vocoder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from recipes.common.griffin_lim import GriffinLim
from recipes.common.mel import LogMel
from recipes.common.vocoder import Vocoder, load_vocoder
from recipes.common.writing import kind_for, written


def make_sound(
    mel: LogMel, vocoder: str | Path | None = None, device: str = "cpu"
) -> GriffinLim | Vocoder:
    """Build the vocoder of log-mels (M, F): to samples (F * hop,).

    It is that of a HiFi-GAN's run folder, or Griffin and Lim's algorithm where there is none.

    Raises ValueError for a folder that is no vocoder's, or whose mels are made otherwise.
    """
    if vocoder is None:
        return GriffinLim(mel)
    found = load_vocoder(vocoder, device)
    for name, own in mel.config.items():
        if found.mel.config[name] != own:
            raise ValueError(
                f"the vocoder {vocoder} takes mels with {name}={found.mel.config[name]!r}; those "
                f"that are synthesised have {own!r}"
            )
    return found


def write_sound(path: Path, wave: Tensor, sample_rate: int) -> None:
    """A 16-bit file of samples (S,), of the format of its suffix; its folder is made."""
    with written(path, sample_rate, 1, kind_for(path)) as file:
        file.write(wave.clamp(-1, 1).numpy())
