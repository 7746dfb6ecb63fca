"""Log-mel spectrograms to waveforms without training: what a trained vocoder is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.functional import griffinlim

from recipes.common.mel import LogMel


class GriffinLim:
    """Griffin and Lim's algorithm, from log-mel spectrograms to waveforms.

    The magnitudes are those of a non-negative factorisation with known filters (Lee and Seung 2001,
    multiplicative updates), the phases those of the fast algorithm of Perraudin et al. 2013 after
    Griffin and Lim 1984, from zero phase, so that the same mels always sound the same.

    Args:
        mel: the front end whose spectrograms these are.
        iterations: of the phases.
        momentum: of the phases; 0 is the algorithm of 1984.
    """

    def __init__(self, mel: LogMel, iterations: int = 60, momentum: float = 0.99) -> None:
        self.mel, self.iterations, self.momentum = mel, iterations, momentum
        self.sample_rate = mel.sample_rate

    @torch.inference_mode()
    def __call__(self, mel: Tensor) -> Tensor:
        """Turn a log-mel spectrogram into sound.

        Args:
            mel: log-mels (M, F), as the front end makes them.

        Returns:
            Samples (F * hop,), within -1 and 1, on the CPU.
        """
        front = self.mel
        magnitude = self._magnitude(mel.detach().cpu().float())
        # The algorithm pads by mirrors that must be shorter than the signal.
        least = front.n_fft // 2 // front.hop + 2
        short = max(0, least - magnitude.shape[1])
        magnitude = torch.nn.functional.pad(magnitude, (0, short))
        # Its frame f is centred at sample f * hop, ours half a hop later.
        wave = griffinlim(
            magnitude,
            window=front.window.cpu(),
            n_fft=front.n_fft,
            hop_length=front.hop,
            win_length=front.n_fft,
            power=1.0,
            n_iter=self.iterations,
            momentum=self.momentum,
            length=(magnitude.shape[1] - 1) * front.hop,
            rand_init=False,
        )
        wave = torch.nn.functional.pad(wave, (front.hop // 2, front.hop - front.hop // 2))
        wave = wave[: mel.shape[1] * front.hop]
        return wave / max(1.0, float(wave.abs().max()))

    def _magnitude(self, mel: Tensor, updates: int = 50) -> Tensor:
        """Log-mels (M, F) to magnitudes (n_fft / 2 + 1, F)."""
        filters, bands = self.mel.filters.cpu(), mel.exp()  # (M, K), (M, F)
        share = filters.T / filters.sum(1)  # where a band's energy lies: the first guess
        found = share @ bands + 1e-8
        for _ in range(updates):
            found *= (filters.T @ bands) / (filters.T @ (filters @ found)).clamp(min=1e-8)
        return found
