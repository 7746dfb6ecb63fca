"""Data to fine-tune on: what fits a pretrained model.

The corpora are those of the recogniser, `recipes.asr.data`: tables of one's own, LibriSpeech and
folders of its layout, connected digits, and the embedded speech.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.asr.data import Corpus
from recipes.common.loading import Speech, filter_by_duration, transcript
from recipes.finetune.model import PretrainedEncoder
from recipes.finetune.whisper import Whisper

NEAR = 0.05  # largest share of padding where the front end of a model normalises over time


def check_rate(sample_rate: int, model_rate: int) -> None:
    """Raise ValueError if audio would not be at the rate that a model takes."""
    if sample_rate != model_rate:
        raise ValueError(
            f"sample_rate is {sample_rate}, and the pretrained model takes {model_rate} Hz: set "
            f"sample_rate to {model_rate}, to which resample: true converts other recordings"
        )


def check_durations(
    dataset: Speech, split: str, shortest: int, longest: float = float("inf")
) -> None:
    """Raise ValueError for utterances that a model cannot take.

    Args:
        dataset: the utterances.
        split: what to call them.
        shortest: fewest samples, at the rate of the dataset.
        longest: most samples.
    """
    rate = dataset.sample_rate
    speed = max(dataset.speeds)
    bad = [
        cut
        for cut in dataset.cuts
        if not shortest <= int(round(cut.duration * rate) / speed) <= longest
    ]
    if bad:
        most = "" if longest == float("inf") else f" and {longest / rate:g} s at most"
        raise ValueError(
            f"{len(bad)} of {len(dataset)} utterances of {split} do not fit the pretrained model, "
            f"which takes {1000 * shortest / rate:g} ms at least{most}: the first is {bad[0].id} "
            f"of {bad[0].duration:.3f} s; leave them out or cut them"
        )


def padding_limit(given: float | None, encoder: PretrainedEncoder) -> float:
    """Return the largest share of padding in a batch: as given, or as the model needs it."""
    if given is not None:
        return given
    return NEAR if encoder.reads_padding else 1.0


# ---------------------------------------------------------------------------------------- Whisper


class LogMelSpeech(Speech):
    """Utterances ``{"id": str, "features": (M, F), …}`` with the features of a Whisper."""

    def __init__(self, *args: Any, features: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.features = features

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "features": self.features(item.pop("sig"))}


def whisper_datasets(
    corpus: Corpus,
    model: Whisper,
    lengths: Sequence[float],
    speeds: Sequence[float] = (1.0,),
    resample: bool = False,
) -> dict[str, LogMelSpeech]:
    """Return the datasets of train, valid and test; their items are id, features, text and tokens.

    To train are left out what does not last ``lengths`` seconds, and texts of more tokens than the
    model has room for. Valid and test must fit.

    Raises:
        ValueError: an utterance does not fit, or none is left to train on.
    """
    shortest, longest = lengths
    longest = min(longest, model.samples / model.rate / max(1.0, 1 / min(speeds)))
    cuts = {**corpus, "train": filter_by_duration(corpus["train"], shortest, longest)}
    room = model.config.max_target_positions - len(model.prompt)

    def labels(cut: Any) -> dict[str, Any]:
        text = transcript(cut)["text"]
        return {"text": text, "tokens": torch.tensor(model.encode(text))}

    long = {
        split: [cut.id for cut in each if len(labels(cut)["tokens"]) > room]
        for split, each in cuts.items()
    }
    for split in ("valid", "test"):
        if long[split]:
            raise ValueError(
                f"{len(long[split])} texts of {split} have more than the {room} tokens that the "
                f"model has room for: the first is that of {long[split][0]}"
            )
    cuts["train"] = cuts["train"].filter(lambda cut: cut.id not in long["train"]).to_eager()
    if not len(cuts["train"]):
        raise ValueError(f"no text to train on has {room} tokens or fewer")
    found = {
        split: LogMelSpeech(
            each,
            model.rate,
            labels,
            speeds if split == "train" else (1.0,),
            resample,
            features=model.features,
        )
        for split, each in cuts.items()
    }
    for split, each in found.items():
        check_durations(each, split, 1, model.samples)
    return found
