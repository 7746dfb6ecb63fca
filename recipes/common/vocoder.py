"""A neural vocoder: from log-mel spectrograms to waveforms by HiFi-GAN's generator.

    vocoder = load_vocoder("results/hifigan/demo/1234")
    wave = vocoder(mel)                      # (M, F) to (F * hop,)
    for piece in vocoder.stream(mels): ...   # of any length, in constant memory

The network is that of Kong et al. 2020 (arXiv 2010.05646). It is here, and its training in
`recipes.hifigan`, since synthesis from text needs it too.

Shapes: B signals, M mel bands, F frames, S = F * hop samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from recipes.common.mel import LogMel
from trainer.devices import pick_device
from trainer.inference.loading import OF_THE_MODEL, open_run, put_weights

SLOPE = 0.1  # of the leaky ReLUs
CHUNK = 256  # frames that are turned into sound at once


def conv(ins: int, outs: int, kernel: int, dilation: int = 1) -> nn.Module:
    """A weight-normalised convolution over time that keeps the length."""
    pad = (kernel - 1) // 2 * dilation
    return weight_norm(nn.Conv2d(ins, outs, (1, kernel), padding=(0, pad), dilation=(1, dilation)))


class Residual(nn.Module):
    """A residual block: dilated convolutions, each added to what it came from.

    With ``depth`` 2 each is followed by another one without dilation (the first kind of the paper,
    of V1 and V2), with 1 it is alone (the second, of V3).
    """

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], depth: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.ModuleList(
                conv(channels, channels, kernel, dilation if n == 0 else 1) for n in range(depth)
            )
            for dilation in dilations
        )
        spans = (sum(dilation if n == 0 else 1 for n in range(depth)) for dilation in dilations)
        self.reach = (kernel - 1) // 2 * sum(spans)  # samples that are seen on each side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 1, T) to the same shape."""
        for step in self.steps:
            y = x
            for layer in step:
                y = layer(leaky_relu(y, SLOPE))
            x = x + y
        return x


class Generator(nn.Module):
    """HiFi-GAN's generator: log-mel spectrograms to waveforms.

    Transposed convolutions, each with a mean of residual blocks after it (section 2.2 of the
    paper).

    Signals are held as images of height 1 with the channels last in memory: on CPUs this is several
    times as fast as `Conv1d`, elsewhere it is no slower.

    Args:
        bands: M of the spectrograms.
        channels: C before the first up-sampling; each one halves it.
        rates: the factor of each up-sampling; their product is the hop.
        rate_kernels: the kernel of each, at least its rate and larger by an even number.
        kernels: of the residual blocks that are averaged, odd.
        dilations: of each of these blocks.
        depth: convolutions to a residual step, 2 or 1.
    """

    def __init__(
        self,
        bands: int = 80,
        channels: int = 512,
        rates: Sequence[int] = (8, 8, 2, 2),
        rate_kernels: Sequence[int] = (16, 16, 4, 4),
        kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        depth: int = 2,
    ) -> None:
        super().__init__()
        _check(channels, rates, rate_kernels, kernels, dilations)
        self.bands, self.hop = bands, math.prod(rates)
        self.rates, self.rate_kernels = list(rates), list(rate_kernels)
        self.first = conv(bands, channels, 7)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(rates, rate_kernels, strict=True):
            up = nn.ConvTranspose2d(
                channels,
                channels // 2,
                (1, kernel),
                stride=(1, rate),
                padding=(0, (kernel - rate) // 2),
            )
            channels //= 2
            self.ups.append(weight_norm(up))
            self.blocks.append(
                nn.ModuleList(
                    Residual(channels, k, d, depth) for k, d in zip(kernels, dilations, strict=True)
                )
            )
        self.last = conv(channels, 1, 7)

    @property
    def context(self) -> int:
        """Frames on each side of a frame that its samples depend on, at most."""
        samples = 3  # of the last convolution
        stages = list(zip(self.rates, self.rate_kernels, self.blocks, strict=True))
        for rate, kernel, blocks in reversed(stages):
            samples += max(block.reach for block in blocks)
            pad = (kernel - rate) // 2
            before, after = (samples + kernel - 1 - pad) // rate, (samples - 1 + pad) // rate + 1
            samples = max(before, after)
        return samples + 3

    def forward(self, mel: Tensor) -> Tensor:
        """(B, M, F) to (B, F * hop), within -1 and 1."""
        x = mel.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # (B, M, 1, F)
        x = self.first(x)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(leaky_relu(x, SLOPE))
            outs = [block(x) for block in blocks]
            x = sum(outs[1:], outs[0]) / len(outs)
        return torch.tanh(self.last(leaky_relu(x))).flatten(1)

    def without_weight_norm(self) -> Generator:
        """This very network with plain weights, for inference; it computes the same."""
        for module in self.modules():
            if is_parametrized(module, "weight"):
                remove_parametrizations(module, "weight", leave_parametrized=True)
        return self


def _check(
    channels: int,
    rates: Sequence[int],
    rate_kernels: Sequence[int],
    kernels: Sequence[int],
    dilations: Sequence[Sequence[int]],
) -> None:
    """Raise ValueError for sizes that do not fit each other."""
    if len(rates) != len(rate_kernels):
        raise ValueError(
            f"rates {list(rates)} and rate_kernels {list(rate_kernels)} differ in length"
        )
    for rate, kernel in zip(rates, rate_kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise ValueError(
                f"rate_kernels has {kernel} for the rate {rate}; allowed: {rate}, {rate + 2}, "
                f"{rate + 4} …"
            )
    if channels % 2 ** len(rates):
        raise ValueError(
            f"channels is {channels}, which cannot be halved {len(rates)} times; "
            f"allowed: multiples of {2 ** len(rates)}"
        )
    if not kernels or len(kernels) != len(dilations):
        raise ValueError(
            f"kernels {list(kernels)} and dilations {[list(each) for each in dilations]} must be "
            "equally many, at least one"
        )
    if even := [kernel for kernel in kernels if kernel % 2 == 0]:
        raise ValueError(f"kernels has {even[0]}; allowed: odd numbers")


def check_front_end(generator: Generator, mel: LogMel) -> None:
    """Raise ValueError for a front end whose mels are not those that a generator takes."""
    for name in ("bands", "hop"):
        ours, theirs = getattr(generator, name), getattr(mel, name)
        if ours != theirs:
            raise ValueError(f"the generator has {name}={ours}, the mel front end {theirs}")


class Vocoder:
    """A trained generator with the front end whose mels it takes; it does not train.

    Raises ValueError where the two do not fit.
    """

    def __init__(self, generator: Generator, mel: LogMel) -> None:
        check_front_end(generator, mel)
        self.generator, self.mel = generator.eval().without_weight_norm(), mel
        self.sample_rate = mel.sample_rate

    @property
    def device(self) -> torch.device:
        """Device of the network; mels are brought there."""
        return self.generator.first.weight.device

    @torch.inference_mode()
    def __call__(self, mel: Tensor) -> Tensor:
        """(…, M, F) to (…, F * hop), within -1 and 1, on the CPU."""
        flat = mel.reshape(-1, *mel.shape[-2:]).to(self.device, torch.float32)
        return self.generator(flat).float().cpu().reshape(*mel.shape[:-2], -1)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """A spectrogram in pieces (…, M, F_i) to its waveform in pieces, joined the same as whole.

        ``CHUNK`` frames are turned into sound at once, seen with all that their samples depend on.
        """
        context, hop = self.generator.context, self.mel.hop
        held: Tensor | None = None
        before = 0  # frames at the start of `held` that were turned into sound already
        for piece in pieces:
            held = piece if held is None else torch.cat([held, piece], -1)
            while held.shape[-1] >= before + CHUNK + context:
                wave = self(held[..., : before + CHUNK + context])
                yield wave[..., before * hop : (before + CHUNK) * hop]
                done = before + CHUNK
                before = min(done, context)
                held = held[..., done - before :]
        if held is not None and held.shape[-1] > before:
            yield self(held)[..., before * hop :]

    def resynthesise(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """A signal in blocks (C, ·) from its mels: as many samples, in constant memory."""
        given = done = 0

        def completed() -> Iterator[Tensor]:
            nonlocal given
            channels = 1
            for block in blocks:
                given, channels = given + block.shape[1], len(block)
                yield block
            # Silence completes the last frame, and what is too short for a window.
            hop, least = self.mel.hop, max(given, self.mel.edge + 1)
            if given:
                yield torch.zeros(channels, -(-least // hop) * hop - given)

        for wave in self.stream(self.mel.stream(completed())):
            yield wave[:, : given - done]
            done += wave.shape[1]


def load_vocoder(run: str | Path, device: str = "cpu") -> Vocoder:
    """The vocoder of a run's folder, wherever that lies now, with the weights that its test took.

    ``device`` is where its network works: auto, cpu, cuda, cuda:1 …; mels and waves are on the CPU.
    Raises ValueError for a folder that is no vocoder's, or that has no sound checkpoint.
    """
    with open_run(run) as opened:
        keys = {key.name for key in opened.configuration.described()}
        if missing := {"generator", "discriminator", "mel", "best"} - keys:
            others = [each for each in opened.recipes() if each != "recipes.hifigan"]
            known = f"; it is a run of {others[0]}, not of recipes.hifigan" if others else ""
            raise ValueError(
                f"{run} is no run of a vocoder: its hyperparams.yaml has no {min(missing)}{known}"
            )
        # A discriminator may be many times larger than the generator, and only trains it.
        opened.configuration.override({"discriminator": None})
        options, checkpoints = opened.options(*OF_THE_MODEL), opened.checkpointer
        with opened.limited():
            hparams = opened.build()
            generator, best = hparams["generator"], hparams["best"]
            put_weights(generator, checkpoints, options, min_key=best, prefix="generator.")
            vocoder = Vocoder(generator, hparams["mel"])
    generator.to(pick_device(device))
    return vocoder
