"""The enhancer for other programs: from noisy chunks to enhanced ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from recipes.segan.model import deemphasise, emphasise, gains
from trainer.inference.graphs import Graph, Port


class ChunkEnhancer(nn.Module):
    """A generator with what comes before and after it: level, and emphasis of high frequencies.

    The emphasis is undone by a convolution, since the recursive filter that the recipe has can be
    no part of an exported network. It is as long as the filter rings above 1e-9.
    """

    ringing: Tensor

    def __init__(self, generator: nn.Module, coefficient: float, level: float | None) -> None:
        super().__init__()
        self.generator, self.coefficient, self.level = generator, coefficient, level
        taps = math.ceil(math.log(1e-9) / math.log(coefficient)) if coefficient > 0 else 1
        powers = coefficient ** torch.arange(taps - 1, -1, -1, dtype=torch.float64)
        self.register_buffer("ringing", powers.float()[None, None])

    def emphasised(self, noisy: Tensor) -> Tensor:
        """Enhance chunks (B, T), and leave the emphasis."""
        emphasised = emphasise(noisy, self.coefficient)
        gain = gains(emphasised, self.level)
        found: Tensor = self.generator(emphasised * gain) / gain
        return found

    def forward(self, noisy: Tensor) -> Tensor:
        """(B, T) to (B, T)."""
        found = self.emphasised(noisy)
        padded = nn.functional.pad(found[:, None], (self.ringing.shape[-1] - 1, 0))
        return nn.functional.conv1d(padded, self.ringing)[:, 0]


def graph(modules: nn.ModuleDict, hparams: SimpleNamespace) -> Graph:
    """Return the generator of a run, for chunks of plain sound."""
    generator, rate = modules["generator"], hparams.sample_rate
    samples = generator.samples

    def example(batch: int, length: int) -> tuple[Tensor]:
        drawn = torch.Generator().manual_seed(length)
        return (0.1 * torch.randn(batch, length, generator=drawn),)

    enhancer = ChunkEnhancer(generator, hparams.pre_emphasis, hparams.level)
    return Graph(
        module=enhancer,
        inputs=[Port("noisy", ("batch", samples), f"chunks of sound at {rate} Hz, -1 to 1")],
        outputs=[Port("enhanced", ("batch", samples), "the same chunks, enhanced")],
        example=example,
        lengths=(samples, samples),
        about="Chunks of noisy speech to enhanced ones. A longer sound is cut into chunks that "
        "overlap, and they are faded into each other.",
        settings={"sample_rate": rate, "chunk": samples, "overlap": hparams.chunks.overlap},
        reference=lambda x: deemphasise(enhancer.emphasised(x), hparams.pre_emphasis),
    )
