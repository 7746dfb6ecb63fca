"""Corpora of the vocoder as lhotse's cuts of train, valid and test, and datasets made of them.

Each corpus is a function that a YAML names with its arguments:

    corpus: !name:recipes.hifigan.data.folder {data_folder: !ref <data_folder>, …}

and that returns ``{"train": cuts, "valid": cuts, "test": cuts}``. A vocoder learns from sound
alone: no texts are needed.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import check_recordings
from recipes.common.cuts import SOUNDS, CutSet, MonoCut, count_files, cut_of, path_of, sounds
from recipes.common.loading import filter_by_duration, load
from recipes.common.paths import existing
from recipes.common.speech import embedded_speech, to_cuts
from trainer.data import BadItem, item_seed
from trainer.seed import derive

logger = logging.getLogger(__name__)

Corpus = Mapping[str, CutSet]
SPLITS = ("train", "valid", "test")
SILENT = 1e-4  # the highest sample of what nobody can hear: -80 dB of full scale


def embedded(train: int, valid: int, test: int, sample_rate: int = 16000) -> Corpus:
    """So many synthesised sentences of prose each; train, valid and test share no voice."""
    counts = zip(SPLITS, (train, valid, test), strict=True)
    return {
        split: to_cuts(embedded_speech(split, count, "prose", sample_rate))
        for split, count in counts
    }


def folder(
    data_folder: str,
    valid: int,
    test: int,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Corpus:
    """Any folder of sound files, subfolders too: LJSpeech's ``wavs``, or one's own recordings.

    Which files are held out depends on their names alone: a larger corpus holds out others, the
    same one always the same. A file that links give several names is taken once.

    Args:
        data_folder: has the files of one channel, as .wav, .flac, .ogg, .mp3, .aiff and others.
        valid: number of files held out to validate.
        test: number of files held out to test.
        on_bad: handling of unusable files, as in the run options.
        max_bad: largest share of unusable files, as in the run options.

    Raises ValueError for a folder that is missing or has too few files, and for a recording in two
    formats.
    """
    top = existing(data_folder, "a folder of sound files")
    names = _once(sounds(top))
    headers = check_recordings(names, on_bad=on_bad, max_bad=max_bad)
    if len(headers) < valid + test + 1:
        raise ValueError(
            f"{top} has {len(headers)} usable sound files ({', '.join(SOUNDS)}); needed are "
            f"{valid} for valid, {test} for test and at least 1 to train on"
        )
    drawn = sorted(headers, key=lambda path: derive(0, "held out", names[path]))
    shares = drawn[valid + test :], drawn[:valid], drawn[valid : valid + test]
    return {
        split: CutSet.from_cuts(cut_of(path, headers[path], names[path]) for path in sorted(share))
        for split, share in zip(SPLITS, shares, strict=True)
    }


def _once(found: Mapping[str, Path]) -> dict[Path, str]:
    """The ids of files by path, each file once, by its own name rather than that of a link."""
    names: dict[object, tuple[Path, str]] = {}
    for id, path in sorted(found.items(), key=lambda item: (item[1].is_symlink(), item[1])):
        try:
            status = os.stat(path)
            names.setdefault((status.st_dev, status.st_ino), (path, id))
        except OSError:  # A broken link, which is a bad file.
            names[path] = path, id
    return dict(names.values())


class Clips(Dataset[dict[str, Any]]):
    """Sounds as ``{"id", "wav"}``: an id, and samples (S,) at ``sample_rate``.

    With ``segment`` a part of so many samples, ``times`` of each in an epoch, drawn anew in every
    epoch; else the whole, of at least ``shortest`` samples. A file of another rate is bad, or
    resampled with ``resample``; one in which nothing can be heard is bad.
    """

    def __init__(
        self,
        cuts: Iterable[MonoCut],
        sample_rate: int,
        segment: int | None = None,
        times: int = 1,
        shortest: int = 1,
        resample: bool = False,
    ) -> None:
        self.cuts, self.sample_rate = list(cuts), sample_rate
        self.segment, self.times = segment, times
        self.shortest, self.resample = shortest, resample

    def __len__(self) -> int:
        return len(self.cuts) * self.times

    def __getitem__(self, index: int) -> dict[str, Any]:
        cut = self.cuts[index % len(self.cuts)]
        if self.segment is None:
            wav = load(cut, self.sample_rate, self.resample)
            if len(wav) < self.shortest:
                raise BadItem(
                    path_of(cut),
                    f"it holds {len(wav)} samples; a mel takes {self.shortest} or more",
                )
            _check_heard(cut, wav)
            return {"id": cut.id, "wav": wav}
        # A little more than a segment, for seconds that are rounded, and cut to it.
        lasting = min(cut.duration, self.segment / self.sample_rate + 0.01)
        start = random.Random(item_seed(index)).uniform(0.0, cut.duration - lasting)
        wav = load(cut.truncate(offset=start, duration=lasting), self.sample_rate, self.resample)
        if len(wav) < self.segment:
            raise BadItem(
                path_of(cut), f"it gives {len(wav)} of a segment's {self.segment} samples"
            )
        if _silent(wav):  # A pause, or is there nothing in all of it?
            _check_heard(cut, load(cut, self.sample_rate, self.resample))
        return {"id": cut.id, "wav": wav[: self.segment]}

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these clips."""
        return count_files(self.cuts[number] for number in {i % len(self.cuts) for i in indices})

    def name_of(self, index: int) -> str:
        """A clip in an error message."""
        return f"{index} ({self.cuts[index % len(self.cuts)].id})"


def _silent(wav: Tensor) -> bool:
    return float(wav.abs().max()) < SILENT


def _check_heard(cut: MonoCut, wav: Tensor) -> None:
    """Raise BadItem for a clip of which a vocoder can learn nothing, and no judge hear anything."""
    if _silent(wav):
        raise BadItem(path_of(cut), "it is silent: nothing in it is louder than -80 dB")


def datasets(
    corpus: Corpus,
    sample_rate: int,
    segment: int,
    times: int = 1,
    shortest: int = 1,
    resample: bool = False,
) -> dict[str, Clips]:
    """Segments to train on, ``times`` of each clip in an epoch; whole clips to valid and test.

    To train, clips that are shorter than a segment are left out. Raises ValueError when none is
    left, and when all of them have another rate and are not to be resampled.
    """
    try:
        training = filter_by_duration(corpus["train"], shortest=(segment + 1) / sample_rate)
    except ValueError as error:
        raise ValueError(
            f"no clip to train on has the {segment} samples of a segment: {error}"
        ) from None
    others = [cut for cut in training if cut.sampling_rate != sample_rate]
    if len(others) == len(training) and not resample:
        raise ValueError(
            f"all {len(others)} clips to train on have another rate; {others[0].id} is sampled at "
            f"{others[0].sampling_rate} Hz, not at {sample_rate} Hz; --resample makes them so"
        )
    whole = {"shortest": shortest, "resample": resample}
    return {
        "train": Clips(training, sample_rate, segment, times, resample=resample),
        "valid": Clips(corpus["valid"], sample_rate, **whole),
        "test": Clips(corpus["test"], sample_rate, **whole),
    }
