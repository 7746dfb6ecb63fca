"""The separator for other programs: from mixtures to sources."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchaudio.models import ConvTasNet

from trainer.inference.graphs import Graph, Port


class TasNet(nn.Module):
    """The computation of torchaudio's ConvTasNet, by one rule for all lengths.

    torchaudio asks whether a length needs padding, which no exported network can.
    """

    def __init__(self, net: ConvTasNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, mixture: Tensor) -> Tensor:
        """(B, T) to (B, S, T)."""
        net, samples = self.net, mixture.shape[1]
        rest = -(samples - net.enc_kernel_size % 2) % net.enc_stride
        padded = nn.functional.pad(mixture, (0, rest))
        frames = net.encoder(padded[:, None])  # (B, D, F)
        masked = net.mask_generator(frames) * frames[:, None]  # (B, S, D, F)
        tracks = net.decoder(masked.flatten(0, 1)).unflatten(0, (-1, net.num_sources))
        # A slice would ask whether it leaves all as it is.
        return tracks[:, :, 0].index_select(2, torch.arange(samples, device=mixture.device))


class Separator(nn.Module):
    """Any separator of mixtures (B, 1, T), for mixtures (B, T)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, mixture: Tensor) -> Tensor:
        """(B, T) to (B, S, T)."""
        found: Tensor = self.net(mixture[:, None])
        return found


def graph(modules: nn.ModuleDict, hparams: SimpleNamespace) -> Graph:
    """Return the network of a run."""
    net, rate = modules["separator"], hparams.sample_rate

    def example(batch: int, length: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(length)
        return (0.1 * torch.randn(batch, length, generator=generator),)

    whole = Separator(net)
    return Graph(
        module=TasNet(net) if isinstance(net, ConvTasNet) else whole,
        inputs=[Port("mixture", ("batch", "samples"), f"sound at {rate} Hz, -1 to 1")],
        outputs=[
            Port("sources", ("batch", net.num_sources, "samples"),
                 "a track for each speaker, of any loudness")
        ],
        example=example,
        lengths=(rate // 2, round(0.7 * rate) + 3),
        about="A mixture of people who talk at once to a track for each of them.",
        settings={"sample_rate": rate, "sources": net.num_sources},
        reference=whole,
    )  # fmt: skip
