"""Corpora for enhancement: clips of speech, clean and with noise, in train, valid and test.

Each is a function that a YAML names with its arguments,

    corpus: !name:recipes.common.noisy_speech.embedded {train: 800, valid: 12, test: 40}

and that returns ``{"train": sources, "valid": sources, "test": sources}`` for
`recipes.common.pairs.Pairs`. Nothing that is heard in one split is heard in another: no voice (but
for corpora that are split by chapter), no sentence, no recording of noise.
"""

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

from recipes.common.audio import Header, check_recordings, good_ones, read_header
from recipes.common.loading import load
from recipes.common.noise import babble, coloured_noise
from recipes.common.pairs import Corpus, Mixed, Noise, Recorded, Source, check_heard, path_of
from recipes.common.speech import embedded_speech, to_cuts
from trainer.data import BadItem
from trainer.seed import derive

try:
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource
except ImportError as error:
    raise ImportError("speech data need lhotse: pip install 'cortex-speech[recipes]'") from error

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3")

# ------------------------------------------------------------------------ embedded sentences


def embedded(
    train: int,
    valid: int,
    test: int,
    snr: Sequence[float] = (0.0, 10.0),
    babble_share: float = 0.5,
    sample_rate: int = 16000,
) -> Corpus:
    """So many synthesised sentences each, with babble of other voices or coloured noise behind.

    Args:
        snr: lowest and highest signal-to-noise ratio, in dB.
        babble_share: how often the noise is babble rather than coloured, from 0 to 1.
    """
    low, high = _range("snr", snr)
    corpus: dict[str, Sequence[Source]] = {}
    for split, count in zip(SPLITS, (train, valid, test), strict=True):
        cuts = list(to_cuts(embedded_speech(split, count, "prose", sample_rate)))
        noise = MadeNoise(cuts, babble_share)
        corpus[split] = [Mixed(cut, noise, (low, high)) for cut in cuts]
    return corpus


class MadeNoise:
    """Babble of the voices of some cuts, never that of the speaker, or coloured noise.

    Each time are drawn which of the two it is, then 2 to 5 talkers with two utterances each, or the
    colour: power that falls as ``1 / f ** exponent``, with an exponent from 0 (white) to 2 (brown).
    With fewer than three voices there is coloured noise alone.
    """

    TALKERS = (2, 5)
    SAID = 2  # utterances of a talker

    def __init__(self, cuts: Sequence[MonoCut], babble_share: float = 0.5) -> None:
        if not 0.0 <= babble_share <= 1.0:
            raise ValueError(f"babble_share must be a number from 0 to 1, not {babble_share!r}")
        self.babble_share = babble_share
        self.voices: dict[str, list[MonoCut]] = {}
        for cut in cuts:
            self.voices.setdefault(_speaker(cut), []).append(cut)

    def __call__(self, cut: MonoCut, samples: int, sample_rate: int, rng: random.Random) -> Tensor:
        others = [voice for voice in self.voices if voice != _speaker(cut)]
        fewest, most = self.TALKERS
        # Drawn in any case, so that one more voice does not change the other draws.
        crowd, seed = rng.random() < self.babble_share, rng.getrandbits(62)
        if not crowd or len(others) < fewest:
            # Powers of two: each other length costs the plan of a Fourier transform of its own.
            size = 1 << (samples - 1).bit_length()
            return coloured_noise(seed, size, rng.uniform(0.0, 2.0))[:samples]
        talkers = rng.sample(others, min(len(others), rng.randint(fewest, most)))
        said = [
            rng.sample(self.voices[each], min(self.SAID, len(self.voices[each])))
            for each in talkers
        ]
        recordings = [[load(each, sample_rate, resample=True) for each in one] for one in said]
        return babble(seed, samples, recordings)


def _speaker(cut: MonoCut) -> str:
    return str(cut.supervisions[0].speaker) if cut.supervisions else str(cut.id)


# -------------------------------------------------------------------------- VoiceBank-DEMAND

VOICEBANK = {
    "train": ("clean_trainset_28spk_wav", "noisy_trainset_28spk_wav"),
    "test": ("clean_testset_wav", "noisy_testset_wav"),
}


def voicebank(
    data_folder: str,
    folders: Mapping[str, Sequence[str]] | None = None,
    valid: Sequence[str] = ("p226", "p287"),
    on_bad: str = "skip",
    max_bad: float = 0.05,
) -> Corpus:
    """VoiceBank-DEMAND (Valentini-Botinhao, 2016), or pairs of folders in its layout.

    Two folders make a split: files of the same name in both are one clip, clean and noisy. The
    files may have any rate (those of the corpus: 48 kHz); both of a pair have the same one.

    Args:
        folders: of ``train`` and ``test``, [clean, noisy] each, within ``data_folder``; by default
            those of the official split with 28 speakers.
        valid: what is taken from ``train`` to validate: clips whose names begin so, by default
            all of the two speakers who are usually taken.
        on_bad, max_bad: what happens to unusable files and to files without a partner, as in the
            run options.

    Raises ValueError for a folder that is missing or has another layout, and for a split without
    clips.
    """
    found = {}
    for split, names in {**VOICEBANK, **(folders or {})}.items():
        if split not in VOICEBANK or len(names) != 2:
            raise ValueError(
                f"folders has {split}: {list(names)}; allowed: train and test, [clean, noisy] each"
            )
        clean, noisy = (_existing(Path(data_folder).expanduser() / name) for name in names)
        found[split] = _paired(clean, noisy, on_bad, max_bad)
    held_out = [each for each in found["train"] if each.id.startswith(tuple(valid))]
    rest = [each for each in found["train"] if not each.id.startswith(tuple(valid))]
    return _filled({"train": rest, "valid": held_out, "test": found["test"]}, data_folder)


def _paired(clean: Path, noisy: Path, on_bad: str, max_bad: float) -> list[Recorded]:
    """The clips that are in both folders, in the order of their names."""
    sides = [{path.stem: path for path in _sounds(folder)} for folder in (clean, noisy)]
    if not sides[0] or not sides[1]:
        empty = noisy if sides[0] else clean
        raise ValueError(f"{empty} has another layout: expected were sound files, such as .wav")
    names = sorted(set(sides[0]) | set(sides[1]))

    def probe(name: str) -> tuple[MonoCut, MonoCut]:
        for own, other, folder in ((0, 1, noisy), (1, 0, clean)):
            if name not in sides[other]:
                raise BadItem(sides[own][name], f"it has no partner of the same name in {folder}")
        cuts = [side[name] for side in sides]
        headers = [read_header(path) for path in cuts]
        _check_alike(cuts, headers)
        first, second = (_cut(*each, name) for each in zip(cuts, headers, strict=True))
        return first, second

    return [Recorded(*pair) for pair in good_ones(names, probe, on_bad, max_bad).values()]


def _check_alike(paths: Sequence[Path], headers: Sequence[Header]) -> None:
    """Raise BadItem where clean and noisy are not of one rate, length and number of channels."""
    clean, noisy = headers
    for what, one, other in (
        ("Hz", clean.sample_rate, noisy.sample_rate),
        ("channels", clean.channels, noisy.channels),
        ("samples", clean.samples, noisy.samples),
    ):
        if one != other:
            raise BadItem(
                paths[1], f"it has {other} {what}, its clean partner {paths[0]} has {one}"
            )
    if clean.channels != 1:
        raise BadItem(paths[1], f"it has {clean.channels} channels, expected: 1")


# ---------------------------------------------------------------------- any speech, any noise

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
        on_bad, max_bad: what happens to unusable files, as in the run options.

    Raises ValueError for a folder that is missing or has another layout, for a split without clips
    or without noise, and for clips that two splits would share.
    """
    low, high = _range("snr", snr)
    root = _existing(Path(data_folder).expanduser())
    clips = _librispeech(root)
    noises = _split_noises(noise_folder, noise_shares, on_bad, max_bad)
    chosen = _split_clips(clips, splits or LIBRISPEECH, root)
    corpus: dict[str, Sequence[Source]] = {}
    for split, paths in chosen.items():
        paths = _evenly(paths, (most or {}).get(split, len(paths)))
        good = check_recordings(paths, None, on_bad=on_bad, max_bad=max_bad)
        cuts = [_cut(path, header, path.stem) for path, header in good.items()]
        if split == "train":
            cuts = [piece for cut in cuts for piece in _pieces(cut, longest)]
        corpus[split] = [Mixed(cut, noises[split], (low, high)) for cut in cuts]
    return _filled(corpus, data_folder)


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
    path: Path

    def belongs_to(self, name: str) -> bool:
        return name in (self.part, self.speaker, f"{self.speaker}-{self.chapter}")


def _librispeech(root: Path) -> list[_Clip]:
    clips = [
        _Clip(*path.relative_to(root).parts[:3], path)
        for path in sorted(root.glob("*/*/*/*"))
        if path.suffix.lower() in SOUNDS
    ]
    if not clips:
        raise ValueError(
            f"data_folder {root} has another layout: expected were, as in LibriSpeech, sound files "
            "in folders part/speaker/chapter, such as train-clean-100/19/198/19-198-0000.flac"
        )
    return clips


def _split_clips(
    clips: Sequence[_Clip], splits: Mapping[str, Sequence[str]], root: Path
) -> dict[str, list[Path]]:
    if set(splits) != set(SPLITS):
        raise ValueError(f"splits must be given for {', '.join(SPLITS)}; got {dict(splits)}")
    owner: dict[Path, str] = {}
    for split in SPLITS:
        names = [str(name) for name in splits[split]]
        for name in names:
            if not any(clip.belongs_to(name) for clip in clips):
                known = sorted({clip.part for clip in clips} | {clip.speaker for clip in clips})
                raise ValueError(
                    f"{split} is made of {', '.join(names)}; {root} has no part, speaker or chapter"
                    f" {name}, but for instance {', '.join(known[:10])}"
                )
        for clip in clips:
            its = any(clip.belongs_to(name) for name in names)
            if its and owner.setdefault(clip.path, split) != split:
                raise ValueError(
                    f"{owner[clip.path]} and {split} share {clip.path.name}; splits must not "
                    "overlap"
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
    good = check_recordings(_sounds(folder), None, None, on_bad=on_bad, max_bad=max_bad)
    takes: dict[str, list[MonoCut]] = {}  # by recording
    for path, header in good.items():
        name = path.relative_to(folder).with_suffix("").as_posix()
        takes.setdefault(recording_of(name), []).append(_cut(path, header, name))
    if len(takes) < len(SPLITS):
        raise ValueError(
            f"noise_folder {folder} has {len(takes)} recordings ({', '.join(sorted(takes))}), too "
            "few: train, valid and test need one each at least"
        )
    order = sorted(takes, key=lambda name: derive(0, "noise", name))
    held = {split: max(1, round(len(order) * shares[split])) for split in ("test", "valid")}
    if sum(held.values()) >= len(order):
        held = dict.fromkeys(held, 1)
    names = {"test": order[: held["test"]], "train": order[sum(held.values()) :]}
    names["valid"] = order[held["test"] : sum(held.values())]
    for split in SPLITS:
        logger.info("noise of %s: %s", split, ", ".join(sorted(names[split])))
    return {
        split: RecordedNoise([cut for name in its for cut in takes[name]])
        for split, its in names.items()
    }


def recording_of(name: str) -> str:
    """The recording that a file is a side of.

    >>> recording_of("street/city_L"), recording_of("wind-ch2"), recording_of("train")
    ('street/city', 'wind', 'train')
    """
    return SIDE.sub("", name)


# ------------------------------------------------------------------------------- what serves all


def _sounds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)


def _cut(path: Path, header: Header, name: str) -> MonoCut:
    """The first channel of a file."""
    duration = header.duration
    source = AudioSource(type="file", channels=list(range(header.channels)), source=str(path))
    recording = Recording(name, [source], header.sample_rate, header.samples, duration)
    speaker = SupervisionSegment(name, name, 0.0, duration, speaker=re.split("[-_]", name)[0])
    return MonoCut(name, 0.0, duration, 0, supervisions=[speaker], recording=recording)


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


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    above = folder
    while not above.is_dir():
        above = above.parent
    there = ", ".join(sorted(each.name for each in above.iterdir())[:8]) or "nothing"
    raise ValueError(f"the folder {folder} is not there; {above} has {there}")


def _range(name: str, given: Sequence[float]) -> tuple[float, float]:
    if len(given) != 2 or not given[0] <= given[1]:
        raise ValueError(f"{name} must be [lowest, highest] in dB, not {list(given)}")
    return float(given[0]), float(given[1])


def _filled(corpus: Mapping[str, Sequence[Source]], folder: str) -> Corpus:
    for split in SPLITS:
        if not corpus[split]:
            raise ValueError(f"{split} has no clips in {folder}")
    return corpus
