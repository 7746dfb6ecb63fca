"""Log-mel spectrograms as neural vocoders use them, and files of them that say how they were made.

One convention for whoever makes mels and whoever turns them into sound: the magnitude of an STFT
under a Hann window, triangular bands of equal area on Slaney's mel scale, clamped at 1e-5, natural
logarithm (the setting of Kong et al. 2020, arXiv 2010.05646). S samples give S // hop frames: frame
f is centred at sample (f + 1/2) * hop, and the edges are mirrored.

A mel file holds one spectrogram (M, F): a `.pt` with ``{"mel": …, "config": …}``, or a `.npy` with
its configuration beside it, `name.json` for `name.npy`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from trainer import json_files
from trainer.texts import first_line

FLOOR = 1e-5  # of a band's magnitude, before the logarithm


class LogMel(nn.Module):
    """Waveforms to log-mel spectrograms, computed in fp32 whatever autocast says.

    Args:
        sample_rate: Hz.
        bands: M, the number of mel bands.
        n_fft: samples of a window, and of its FFT.
        hop: samples between two frames; ``n_fft - hop`` must be even.
        f_min, f_max: the range of the bands in Hz; f_max None is half of the sample rate.

    Raises ValueError for a hop or a range that is impossible.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int,
        bands: int = 80,
        n_fft: int = 1024,
        hop: int = 256,
        f_min: float = 0.0,
        f_max: float | None = None,
    ) -> None:
        super().__init__()
        f_max = sample_rate / 2 if f_max is None else float(f_max)
        if not 0 < hop <= n_fft or (n_fft - hop) % 2:
            raise ValueError(f"hop is {hop}; allowed: 1 to n_fft={n_fft}, and n_fft - hop even")
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                f"f_min={f_min:g} and f_max={f_max:g} Hz; allowed: 0 <= f_min < f_max <= "
                f"{sample_rate / 2:g}, half of the sample rate"
            )
        self.sample_rate, self.bands, self.n_fft, self.hop = sample_rate, bands, n_fft, hop
        self.f_min, self.f_max = float(f_min), f_max
        self.edge = (n_fft - hop) // 2  # samples that the first frame sees before the signal
        filters = melscale_fbanks(
            n_fft // 2 + 1, self.f_min, f_max, bands, sample_rate, norm="slaney", mel_scale="slaney"
        )
        # Recomputed, not saved: they follow from the arguments.
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)  # (M, n_fft/2+1)

    @property
    def config(self) -> dict[str, float]:
        """All that decides what a number of the spectrogram means."""
        names = ("sample_rate", "bands", "n_fft", "hop", "f_min", "f_max")
        return {name: getattr(self, name) for name in names}

    def forward(self, wav: Tensor) -> Tensor:
        """Return the log-mels of signals.

        Args:
            wav: samples (…, S).

        Returns:
            Log-mels (…, M, S // hop), float32.

        Raises:
            ValueError: there are fewer samples than the mirrored edges need.
        """
        if wav.shape[-1] <= self.edge:
            raise ValueError(
                f"a signal of {wav.shape[-1]} samples is too short for a window of {self.n_fft}; "
                f"allowed: {self.edge + 1} or more"
            )
        flat = wav.reshape(1, -1, wav.shape[-1])  # Mirroring wants (1, N, S).
        padded = nn.functional.pad(flat, (self.edge, self.edge), mode="reflect")
        return self.of_padded(padded).reshape(*wav.shape[:-1], self.bands, -1)

    def stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the log-mels of a signal that comes in blocks.

        Args:
            blocks: samples (…, S_i), of any lengths.

        Yields:
            Log-mels (…, M, F_i), which joined are those of the whole signal.

        Raises:
            ValueError: there are fewer samples than the mirrored edges need.
        """
        held: Tensor | None = None
        begun = False
        for block in blocks:
            held = block if held is None else torch.cat([held, block], -1)
            if not begun and held.shape[-1] > self.edge:
                held = torch.cat([held[..., 1 : self.edge + 1].flip(-1), held], -1)
                begun = True
            frames = (held.shape[-1] - self.n_fft) // self.hop + 1
            if begun and frames > 0:
                yield self.of_padded(held[..., : (frames - 1) * self.hop + self.n_fft])
                held = held[..., frames * self.hop :]
        if held is None:
            return
        if not begun:
            self(held)  # Raises, since the signal is too short.
        mirrored = held[..., held.shape[-1] - self.edge - 1 : -1].flip(-1)
        held = torch.cat([held, mirrored], -1)
        if held.shape[-1] >= self.n_fft:
            yield self.of_padded(held)

    def of_padded(self, wav: Tensor) -> Tensor:
        """(…, S + n_fft - hop), with what is before and after it, to (…, M, S // hop)."""
        with torch.autocast(wav.device.type, enabled=False):
            flat = wav.float().reshape(-1, wav.shape[-1])
            spectrum = torch.view_as_real(
                torch.stft(
                    flat, self.n_fft, self.hop, window=self.window, center=False,
                    return_complex=True,
                )
            )  # fmt: skip
            # The small number keeps the gradient of the root finite where there is silence.
            magnitude = spectrum.square().sum(-1).add(1e-9).sqrt()  # (N, n_fft/2+1, F)
            mel = (self.filters @ magnitude).clamp(min=FLOOR).log()
        return mel.reshape(*wav.shape[:-1], *mel.shape[1:])

    def check(self, path: str | Path, config: Mapping[str, Any]) -> None:
        """Raise ValueError for mels that were made otherwise, naming the first such parameter."""
        for name, own in self.config.items():
            if name not in config:
                raise ValueError(f"{path}: its configuration does not say its {name}")
            if config[name] != own:
                raise ValueError(
                    f"{path}: its mel was made with {name}={config[name]!r}; expected: {own!r}"
                )


def write_mel(path: str | Path, mel: Tensor, config: Mapping[str, Any]) -> None:
    """Write a mel file.

    Args:
        path: a `.pt`, or a `.npy`, whose configuration is written into a `.json` beside it.
        mel: log-mels (M, F).
        config: how the mel was made, as `LogMel.config`.

    Raises:
        ValueError: the path has another suffix.
    """
    path = Path(path)
    if path.suffix == ".pt":
        torch.save({"mel": mel.detach().cpu().contiguous(), "config": dict(config)}, path)
    elif path.suffix == ".npy":
        import numpy as np

        np.save(path, mel.detach().cpu().float().numpy(), allow_pickle=False)
        path.with_suffix(".json").write_text(json.dumps(dict(config), indent=1) + "\n", "utf-8")
    else:
        raise ValueError(f"{path}: a mel is written as .pt or .npy, not as {path.suffix!r}")


def read_mel(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Read a mel file; nothing in it is run.

    Args:
        path: a `.pt`, or a `.npy` with its configuration in a `.json` beside it.

    Returns:
        Log-mels (M, F), which are left on the disk until they are used, and how they were made.

    Raises:
        ValueError: the file cannot be used; it names the path and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: it does not exist")
    suffix = path.suffix.lower()
    if suffix not in (".pt", ".npy"):
        raise ValueError(f"{path}: a mel file ends in .pt or .npy")
    mel, config = (_read_pt if suffix == ".pt" else _read_npy)(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its configuration is a {type(config).__name__}, not a mapping")
    check_mel(path, mel)
    if "bands" in config and config["bands"] != mel.shape[0]:
        raise ValueError(
            f"{path}: its configuration says bands={config['bands']!r}, its mel has {mel.shape[0]}"
        )
    return mel, config


def check_mel(name: str | Path, mel: Any, fewest: int = 1) -> None:
    """Raise ValueError, with the name, for what is no mel (M, F) of so many frames at least."""
    if not isinstance(mel, Tensor) or mel.dim() != 2 or not mel.is_floating_point():
        found = f"{tuple(mel.shape)} of {mel.dtype}" if isinstance(mel, Tensor) else type(mel)
        raise ValueError(f"{name}: a mel is a matrix (bands, frames) of floats, not {found}")
    if mel.shape[1] < fewest:
        raise ValueError(f"{name}: its mel has no frames")


def _read_pt(path: Path) -> tuple[Any, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to.
        raise ValueError(
            f"{path}: it cannot be read as a .pt of plain tensors ({first_line(error)})"
        ) from error
    if not isinstance(saved, dict) or not {"mel", "config"} <= saved.keys():
        raise ValueError(f'{path}: a mel file holds {{"mel": …, "config": …}}; this one does not')
    return saved["mel"], saved["config"]


def _read_npy(path: Path) -> tuple[Any, Any]:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: it cannot be read as a .npy of plain numbers ({error})"
        ) from None
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise ValueError(f"{path}: how it was made is unknown; expected beside it: {beside.name}")
    config = json_files.read(beside)
    if array.dtype.kind == "f":  # torch has numbers of the machine's own byte order alone.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)), config
    return array, config
