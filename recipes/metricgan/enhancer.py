"""Enhancement with a trained MetricGAN+.

    model = trainer.load("results/metricgan/demo/1234")
    model.enhance("noisy.wav").save("enhanced.wav")

Neither the discriminator nor the training is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.enhancing import EnhancementModel
from recipes.metricgan.model import Spectrum, enhance
from recipes.metricgan.phases import Phases
from trainer.options import RunOptions


class MetricGAN(EnhancementModel):
    """Speech enhancement by the masks of a MetricGAN+.

    Reads from the YAML ``sample_rate``, ``chunks``, ``spectrum``, ``phases`` and ``target``.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        self._spectrum: Spectrum = self.hparams.spectrum.to(self.device)

    @property
    def best_checkpoint(self) -> Mapping[str, str | None]:
        """The metric that chooses the checkpoint to use: that of the last phase."""
        bests = Phases(self.hparams.phases).bests(self.hparams.target)
        return {"max_key": list(bests.values())[-1]}

    def network(self, chunks: Tensor) -> Tensor:
        """Return noisy chunks (N, T) enhanced, (N, T). Zeros at the end are taken as padding."""
        chunks = chunks.to(self.device)
        places = torch.arange(1, chunks.shape[1] + 1, device=self.device)
        lengths = ((chunks != 0) * places).amax(1).clamp(min=1)
        with torch.inference_mode(), self.autocast():
            return enhance(self._spectrum, self.modules.generator, chunks, lengths)
