"""Enhancement with a trained SEGAN.

    model = trainer.load("results/segan/demo/1234")
    model.enhance("noisy.wav").save("enhanced.wav")

Neither the discriminator nor the training is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recipes.common.enhancing import EnhancementModel
from recipes.segan.model import enhance


class SEGAN(EnhancementModel):
    """Speech enhancement by the generator of a SEGAN.

    Reads from the YAML ``sample_rate``, ``chunks``, ``pre_emphasis``, ``level`` and ``best``.
    """

    @property
    def best_checkpoint(self) -> Mapping[str, str | None]:
        """The metric that chooses the checkpoint to use."""
        return {"max_key": self.hparams.best}

    def network(self, chunks: Tensor) -> Tensor:
        """Return noisy chunks (N, T) enhanced, with the z that is always the same."""
        own, generator = self.hparams, self.modules.generator
        with torch.inference_mode(), self.autocast():
            return enhance(generator, chunks.to(self.device), own.pre_emphasis, own.level)
