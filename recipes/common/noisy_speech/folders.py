"""VoiceBank-DEMAND, and whatever lies in pairs of folders as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.common.audio import Expected, Header, good_ones
from recipes.common.cuts import sounds
from recipes.common.noisy_speech.clips import existing, filled, named_cut
from recipes.common.pairs import Corpus, Recorded
from trainer.data import BadItem

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

    Two folders make a split: files of the same path in both are one clip, clean and noisy. The
    files may have any rate (those of the corpus: 48 kHz); both of a pair have the same one.

    Args:
        data_folder: has the folders of the splits in it.
        folders: of ``train`` and ``test``, [clean, noisy] each, within ``data_folder``; by default
            those of the official split with 28 speakers.
        valid: what is taken from ``train`` to validate: clips whose names, or folders, begin so,
            by default all of the two speakers who are usually taken.
        on_bad: handling of unusable files and of files without a partner, as in the run options.
        max_bad: largest share of such files, as in the run options.

    Raises ValueError for a folder that is missing or has another layout, and for a split without
    clips.
    """
    found = {}
    for split, names in {**VOICEBANK, **(folders or {})}.items():
        if split not in VOICEBANK or len(names) != 2:
            raise ValueError(
                f"folders has {split}: {list(names)}; allowed: train and test, [clean, noisy] each"
            )
        clean, noisy = (existing(Path(data_folder).expanduser() / name) for name in names)
        found[split] = _paired(clean, noisy, on_bad, max_bad)
    parts: dict[bool, list[Recorded]] = {True: [], False: []}
    for each in found["train"]:
        parts[any(name.startswith(tuple(valid)) for name in each.id.split("/"))].append(each)
    splits = {"train": parts[False], "valid": parts[True], "test": found["test"]}
    return filled(splits, data_folder)


def _paired(clean: Path, noisy: Path, on_bad: str, max_bad: float) -> list[Recorded]:
    """The clips that are in both folders, in the order of their names."""
    sides = [sounds(folder) for folder in (clean, noisy)]
    if not sides[0] or not sides[1]:
        empty = noisy if sides[0] else clean
        raise ValueError(f"{empty} has another layout: expected were sound files, such as .wav")
    names = sorted(set(sides[0]) | set(sides[1]))

    files = {
        name: [(str(side[name]), Expected()) for side in sides if name in side] for name in names
    }

    def check(name: str, headers: Sequence[Header]) -> None:
        for own, other, folder in ((0, 1, noisy), (1, 0, clean)):
            if name not in sides[other]:
                raise BadItem(sides[own][name], f"it has no partner of the same name in {folder}")
        _check_alike([side[name] for side in sides], headers)

    good = good_ones(files, on_bad, max_bad, check)
    found = []
    for name, headers in good.items():
        pairs = zip(sides, headers, strict=True)
        found.append(Recorded(*(named_cut(side[name], header, name) for side, header in pairs)))
    return found


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
