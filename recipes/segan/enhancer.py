"""Enhancement with a trained SEGAN.

    model = trainer.load("results/segan/demo/1234")
    model.enhance("noisy.wav").save("enhanced.wav")

Neither the discriminator nor the training is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recipes.common.enhancing import EnhancementModel
from recipes.segan.model import enhance
from trainer.options import RunOptions

if TYPE_CHECKING:
    from trainer.inference.graphs import Graph


class SEGAN(EnhancementModel):
    """Speech enhancement by the generator of a SEGAN.

    Reads from the YAML ``sample_rate``, ``chunks``, ``pre_emphasis``, ``level`` and ``best``.

    Raises:
        ValueError: the chunks are not as long as those that the generator takes.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        own = self.modules.generator.samples
        if self.chunks.length != own:
            raise ValueError(
                f"chunks.length is {self.chunks.length}; allowed: {own}, what the generator takes"
            )

    @property
    def best_checkpoint(self) -> Mapping[str, str | None]:
        """The metric that chooses the checkpoint to use."""
        return {"max_key": self.hparams.best}

    def network(self, chunks: Tensor) -> Tensor:
        """Return noisy chunks (N, T) enhanced, (N, T). The latent z is always the same."""
        own, generator = self.hparams, self.modules.generator
        with torch.inference_mode(), self.autocast():
            return enhance(generator, chunks.to(self.device), own.pre_emphasis, own.level)

    def graph(self, modules: nn.ModuleDict) -> Graph:
        """Return the network that `trainer.export` writes for other programs."""
        from recipes.segan.graph import graph

        return graph(modules, self.hparams)
