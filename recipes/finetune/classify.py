"""Labels and embeddings of sounds by a trained classifier.

    model = trainer.load("results/finetune/classify/1234")
    found = model.classify("x.wav")  # found.label, found.probability, found.probabilities

Neither the training nor its data are imported; they are in `recipes.finetune.train_classifier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, overload

import torch
from torch import Tensor

from recipes.common.hearing import Given, One, Several, given_sounds
from recipes.finetune.embedder import Embedder
from trainer import json_files
from trainer.inference.results import Classification


class Labels:
    """The classes of a run: those of the recordings to train, in the order of their names.

    Args:
        file: of the run folder, which `prepare_labels` writes, and from which a trained model has
            them.

    Attributes:
        names: labels by number; empty before they are known.

    Raises:
        ValueError: the file is there, and holds no labels.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.names: list[str] = []
        if self.file.is_file():
            try:
                names = json_files.parse(self.file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{self.file} cannot be read: {error}") from None
            texts = isinstance(names, list) and all(isinstance(each, str) for each in names)
            if not texts or len(names) < 2 or len(set(names)) < len(names):
                raise ValueError(f"{self.file} is no list of two or more different labels")
            self.names = names

    def __len__(self) -> int:
        return len(self.names)


class SoundClassifier(Embedder):
    """Classifier of sounds, or embeddings that tell speakers apart, of a run of this recipe.

    Reads from the YAML ``labels``, ``verify``, ``best`` and ``seconds_tested``; modules
    ``encoder``, ``embed`` and ``head``.
    """

    uses: ClassVar[Sequence[str]] = ("encoder", "embed", "head")
    units: ClassVar[Mapping[str, str]] = {
        "accuracy": "%", "macro_f1": "%", "eer": "%", "eer_snorm": "%",
    }  # fmt: skip

    @property
    def best_checkpoint(self) -> dict[str, str]:  # type: ignore[override]
        """The metric that chooses the checkpoint to use."""
        return {"min_key" if self.hparams.verify else "max_key": self.hparams.best}

    @overload
    def classify(self, sounds: One, rate: int | None = None) -> Classification: ...

    @overload
    def classify(self, sounds: Several, rate: int | None = None) -> list[Classification]: ...

    def classify(
        self, sounds: Given, rate: int | None = None
    ) -> Classification | list[Classification]:
        """Return the label of a sound, or of each sound of a list, and the probability of each.

        A sound that is longer than ``seconds_tested`` of the run is classified in equal pieces, of
        which the mean counts. Of several channels the mean is heard.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Raises:
            BadItem: a file cannot be used, or a sound is too short for the model.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        names = self.hparams.labels.names
        found = []
        for pieces in self.piece_vectors(sources):
            with torch.inference_mode(), self.autocast():
                logits = self.modules.head(pieces.to(self.device))
            found.append(Classification.ranked(names, logits.float().softmax(1).mean(0)))
        return found if several else found[0]

    def vectors(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        embedded: Tensor = self.modules.embed(*self.modules.encoder(wavs, lengths))
        return embedded

    def input_limits(self) -> tuple[int, int, float]:
        encoder = self.modules.encoder
        return encoder.rate, encoder.shortest, self.hparams.seconds_tested
