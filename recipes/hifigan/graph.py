"""The vocoder for other programs: from log-mel spectrograms to waveforms."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from recipes.common.mel import FLOOR
from trainer.inference.graphs import Graph, Port


def graph(modules: nn.ModuleDict, hparams: SimpleNamespace) -> Graph:
    """Return the generator of a run."""
    generator, mel = modules["generator"], hparams.mel

    def example(batch: int, length: int) -> tuple[Tensor]:
        drawn = torch.Generator().manual_seed(length)
        return (torch.randn(batch, mel.bands, length, generator=drawn) - 5,)

    return Graph(
        module=generator,
        inputs=[Port("mel", ("batch", mel.bands, "frames"), "log-mel spectrograms")],
        outputs=[
            Port("wave", ("batch", "samples"),
                 f"sound at {mel.sample_rate} Hz, -1 to 1, {mel.hop} samples to a frame")
        ],
        example=example,
        lengths=(20, 33),
        about="Log-mel spectrograms to sound.",
        settings={
            "sample_rate": mel.sample_rate,
            "mel": {
                **mel.config,
                "spectrum": "magnitude of an STFT under a Hann window, frame f centred at sample "
                "(f + 1/2) * hop, edges mirrored",
                "filters": "triangles of Slaney's mel scale, of equal area",
                "scale": f"natural logarithm of at least {FLOOR:g}",
            },
        },
    )  # fmt: skip
