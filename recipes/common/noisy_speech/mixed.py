"""Any speech in LibriSpeech's layout with any folder of noises behind it."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.common.audio import check_recordings
from recipes.common.cuts import MonoCut, cut_of, path_of, sounds
from recipes.common.librispeech import utterance_id
from recipes.common.loading import load
from recipes.common.noisy_speech.clips import (
    SPLITS,
    existing,
    filled,
    named_cut,
    snr_range,
)
from recipes.common.pairs import Corpus, Mixed, Noise, Source, check_heard
from trainer.seed import derive

logger = logging.getLogger(__name__)

LIBRISPEECH = {"train": ["train-clean-100"], "valid": ["dev-clean"], "test": ["test-clean"]}
SIDE = re.compile(r"[-_ ](?:L|R|left|right|ch\d+|channel\d+)$", re.IGNORECASE)


def speech_and_noise(
    data_folder: str,
    noise_folder: str,
    splits: Mapping[str, Sequence[str]] | None = None,
    noise_shares: Mapping[str, float] | None = None,
    snr: Sequence[float] = (0.0, 10.0),
    longest: float = float("inf"),
    most: Mapping[str, int] | None = None,
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Corpus:
    """Speech in LibriSpeech's layout with the recordings of a folder of noises behind it.

    Args:
        data_folder: with ``part/speaker/chapter/speaker-chapter-number.flac`` in it.
        noise_folder: sound files, also in subfolders. ``city_L`` and ``city_R`` are two sides of
            one recording, and always in one split.
        splits: what each split is made of: parts (``train-clean-100``), speakers (``19``) or
            chapters (``19-198``); by default the official parts.
        noise_shares: how many of the recordings of noise each split gets; by default 0.6, 0.2, 0.2.
            Which ones is drawn, the same in every run.
        snr: lowest and highest signal-to-noise ratio, in dB.
        longest: seconds; what is longer to train is cut into equal pieces that are not.
        most: how many clips of a split are taken at most, evenly from all: ``{test: 50}``.
        on_bad: handling of unusable files, as in the run options.
        max_bad: largest share of unusable files, as in the run options.

    Raises ValueError for a folder that is missing or has another layout, for a split without clips
    or without noise, and for clips that two splits would share.
    """
    low, high = snr_range("snr", snr)
    root = existing(Path(data_folder).expanduser())
    clips = _librispeech(root)
    noises = _split_noises(noise_folder, noise_shares, on_bad, max_bad)
    chosen = _split_clips(clips, splits or LIBRISPEECH, root)
    corpus: dict[str, Sequence[Source]] = {}
    for split, paths in chosen.items():
        paths = _evenly(paths, (most or {}).get(split, len(paths)))
        good = check_recordings(paths, None, on_bad=on_bad, max_bad=max_bad)
        cuts = [
            cut_of(path, header, clips[path].id, speaker=clips[path].speaker)
            for path, header in good.items()
        ]
        if split == "train":
            cuts = [piece for cut in cuts for piece in _pieces(cut, longest)]
        corpus[split] = [Mixed(cut, noises[split], (low, high)) for cut in cuts]
    return filled(corpus, data_folder)


class RecordedNoise:
    """A piece of one of several recordings, from a place drawn at random; short ones go round."""

    def __init__(self, cuts: Sequence[MonoCut]) -> None:
        self.cuts = list(cuts)

    def __call__(self, cut: MonoCut, samples: int, sample_rate: int, rng: random.Random) -> Tensor:
        drawn = rng.choice(self.cuts)
        # Read no more than is needed; half a second more gives room for rounding and resampling.
        wanted = samples / sample_rate + 0.5
        start = 0.0
        if drawn.duration > wanted:
            start = rng.uniform(0.0, drawn.duration - wanted)
            piece = drawn.truncate(offset=start, duration=wanted)
        else:
            piece = drawn
        noise = load(piece, sample_rate, resample=True)
        check_heard(path_of(drawn), noise)
        first = rng.randrange(len(noise)) if len(noise) < samples else 0
        return noise[(first + torch.arange(samples)) % len(noise)]


class _Clip(NamedTuple):
    part: str
    speaker: str
    chapter: str
    id: str

    def belongs_to(self, name: str) -> bool:
        return name in (self.part, self.speaker, f"{self.speaker}-{self.chapter}")


def _librispeech(root: Path) -> dict[Path, _Clip]:
    split = {path: id.split("/") for id, path in sounds(root).items()}
    clips = {
        path: _Clip(*parts[:3], utterance_id("/".join(parts)))
        for path, parts in split.items()
        if len(parts) == 4
    }
    if not clips:
        raise ValueError(
            f"data_folder {root} has another layout: expected were, as in LibriSpeech, sound files "
            "in folders part/speaker/chapter, such as train-clean-100/19/198/19-198-0000.flac"
        )
    return clips


def _split_clips(
    clips: Mapping[Path, _Clip], splits: Mapping[str, Sequence[str]], root: Path
) -> dict[str, list[Path]]:
    if set(splits) != set(SPLITS):
        raise ValueError(f"splits must be given for {', '.join(SPLITS)}; got {dict(splits)}")
    owner: dict[Path, str] = {}
    for split in SPLITS:
        names = [str(name) for name in splits[split]]
        for name in names:
            if not any(clip.belongs_to(name) for clip in clips.values()):
                known = sorted({each for clip in clips.values() for each in clip[:2]})
                raise ValueError(
                    f"{split} is made of {', '.join(names)}; {root} has no part, speaker or chapter"
                    f" {name}, but for instance {', '.join(known[:10])}"
                )
        for path, clip in clips.items():
            its = any(clip.belongs_to(name) for name in names)
            if its and owner.setdefault(path, split) != split:
                raise ValueError(
                    f"{owner[path]} and {split} share {path.name}; splits must not overlap"
                )
    return {split: [path for path, its in owner.items() if its == split] for split in SPLITS}


def _split_noises(
    noise_folder: str, shares: Mapping[str, float] | None, on_bad: str, max_bad: float
) -> dict[str, Noise]:
    """Noise for each split; all sides of a recording are in the same one."""
    folder = Path(noise_folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"noise_folder {folder} is not there; expected was a folder of noises")
    shares = shares or {"train": 0.6, "valid": 0.2, "test": 0.2}
    if set(shares) != set(SPLITS) or any(not 0 < share < 1 for share in shares.values()):
        raise ValueError(f"noise_shares must be a share of each of {SPLITS}; got {dict(shares)}")
    names = {path: id for id, path in sounds(folder).items()}
    good = check_recordings(names, None, None, on_bad=on_bad, max_bad=max_bad)
    takes: dict[str, list[MonoCut]] = {}  # by recording
    for path, header in good.items():
        takes.setdefault(recording_of(names[path]), []).append(named_cut(path, header, names[path]))
    if len(takes) < len(SPLITS):
        raise ValueError(
            f"noise_folder {folder} has {len(takes)} recordings ({', '.join(sorted(takes))}), too "
            "few: train, valid and test need one each at least"
        )
    order = sorted(takes, key=lambda name: derive(0, "noise", name))
    held = {split: max(1, round(len(order) * shares[split])) for split in ("test", "valid")}
    if sum(held.values()) >= len(order):
        held = dict.fromkeys(held, 1)
    dealt = {"test": order[: held["test"]], "train": order[sum(held.values()) :]}
    dealt["valid"] = order[held["test"] : sum(held.values())]
    for split in SPLITS:
        logger.info("noise of %s: %s", split, ", ".join(sorted(dealt[split])))
    return {
        split: RecordedNoise([cut for name in its for cut in takes[name]])
        for split, its in dealt.items()
    }


def recording_of(name: str) -> str:
    """The recording that a file is a side of.

    >>> recording_of("street/city_L"), recording_of("wind-ch2"), recording_of("train")
    ('street/city', 'wind', 'train')
    """
    return SIDE.sub("", name)


def _pieces(cut: MonoCut, longest: float) -> list[MonoCut]:
    """A cut in as few equal pieces as last ``longest`` seconds at most."""
    number = max(1, math.ceil(cut.duration / longest))
    if number == 1:
        return [cut]
    bounds = [part * cut.num_samples // number / cut.sampling_rate for part in range(number + 1)]
    return [
        cut.truncate(offset=start, duration=end - start).with_id(f"{cut.id}-{part}")
        for part, (start, end) in enumerate(pairwise(bounds))
    ]


def _evenly(paths: list[Path], most: int) -> list[Path]:
    """At most so many of them, from the first to the last at equal distances."""
    if most < 1:
        raise ValueError(f"most must be whole numbers of at least 1, not {most}")
    taken = min(most, len(paths))
    return [paths[number * len(paths) // taken] for number in range(taken)]
