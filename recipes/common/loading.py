"""lhotse's cuts as batches: waveforms with their texts, joined by total seconds.

    train = Speech(keep(cuts, longest=20.0), sample_rate=16000, speeds=(0.9, 1.0, 1.1))
    batches = DurationBatches(train.durations, max_duration=100.0, seed=seed)
    brain.fit(epochs, train, valid, train_loader_kwargs={"batch_sampler": batches})

lhotse gives the manifests, the mixing and appending of cuts, their resampling and their change of
speed. Its samplers work as well (``sampler=DynamicBucketingSampler(…), batch_size=None`` and a
dataset whose index is a ``CutSet``), but `DurationBatches` is the better one to train with: it
never exceeds the limit, repeats no cut when ranks share the last ones, knows its length, and takes
a second where theirs takes half a minute (281,000 utterances).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import Expected, good_ones, read_channels, read_header
from trainer import distributed
from trainer.data import BadItem
from trainer.seed import derive

try:
    import lhotse
    from lhotse import CutSet, Recording
    from lhotse.audio.backend import LibsndfileBackend
    from lhotse.cut import Cut
except ImportError as error:
    raise ImportError("speech data need lhotse: pip install 'cortex-speech[recipes]'") from error

logger = logging.getLogger(__name__)


class _Reader(LibsndfileBackend):
    """Reads files for lhotse, which neither compares rates nor says clearly what is wrong."""

    expected: dict[str, Expected] = {}

    def read_audio(
        self,
        path_or_fd: Any,
        offset: float = 0.0,
        duration: float | None = None,
        force_opus_sampling_rate: int | None = None,
    ) -> tuple[np.ndarray[Any, Any], int]:
        if not isinstance(path_or_fd, str | Path):  # A file in memory.
            return super().read_audio(path_or_fd, offset, duration, force_opus_sampling_rate)
        expected = self.expected.get(str(path_or_fd))
        data, rate = read_channels(path_or_fd, offset, duration, expected)
        return data.numpy(), rate


_reader = _Reader()
lhotse.set_current_audio_backend(_reader)
# By default lhotse fills up to half a second that a file lacks with a mirror image of the rest.
# (Its function to set this would configure the whole process's logging on the way.)
os.environ.setdefault("LHOTSE_AUDIO_DURATION_MISMATCH_TOLERANCE", "0.01")


def keep(cuts: Iterable[Cut], shortest: float = 0.0, longest: float = float("inf")) -> CutSet:
    """The cuts that last from ``shortest`` to ``longest`` seconds; says how many were dropped.

    Raises ValueError when none is left.
    """
    every = list(cuts)
    good = [cut for cut in every if shortest <= cut.duration <= longest]
    limits = f"{shortest:g} to {longest:g} s"
    if not good:
        found = "there are no cuts at all"
        if lasting := sorted(cut.duration for cut in every):
            found = f"the {len(every)} cuts last {lasting[0]:.2f} to {lasting[-1]:.2f} s"
            found += f", half of them up to {median(lasting):.2f} s"
        raise ValueError(f"no audio lasts {limits}: {found}")
    if len(good) < len(every):
        logger.info("%d of %d cuts do not last %s", len(every) - len(good), len(every), limits)
    return CutSet.from_cuts(good)


def without_bad(cuts: Iterable[Cut], *, on_bad: str = "skip", max_bad: float = 0.05) -> CutSet:
    """The cuts whose audio files are what their manifests say, by their headers.

    Each bad file is logged with its reason. Raises BadItem at the first with ``on_bad="raise"``,
    and a ValueError with the whole list when more than the share ``max_bad`` is bad.
    """
    every = list(cuts)
    files = {cut.id: list(_files(cut).items()) for cut in every}
    wanted = chain.from_iterable(files.values())
    good = good_ones(wanted, lambda file: read_header(*file), on_bad, max_bad)
    return CutSet.from_cuts(cut for cut in every if all(file in good for file in files[cut.id]))


def load(cut: Cut, sample_rate: int, resample: bool = False) -> Tensor:
    """A cut's samples (T,), mixed to one channel if it is made of several cuts.

    Raises BadItem for a file that cannot be used, and for another rate than ``sample_rate`` (Hz)
    unless ``resample``.
    """
    _reader.expected = _files(cut)
    name = next(iter(_reader.expected), cut.id)
    if cut.sampling_rate != sample_rate:
        if not resample:
            raise BadItem(name, f"it is sampled at {cut.sampling_rate} Hz, not at {sample_rate} Hz")
        cut = cut.resample(sample_rate)
    try:
        samples = torch.from_numpy(cut.load_audio())  # (1, T)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # lhotse hides the cause behind errors of its own.
            if isinstance(cause, BadItem):
                raise cause from None
            cause = cause.__context__
        raise
    if len(samples) != 1:
        raise BadItem(name, f"it has {len(samples)} channels, expected: 1")
    return samples[0]


def _files(cut: Cut) -> dict[str, Expected]:
    """The audio files of a cut, each with what its manifest says of it.

    Raises BadItem for a source that is no file.
    """
    parts = [track.cut for track in cut.tracks] if hasattr(cut, "tracks") else [cut]
    found = {}
    for part in parts:
        recording: Recording | None = getattr(part, "recording", None)
        for source in recording.sources if recording is not None else ():
            if source.type == "file":
                found[str(source.source)] = _original(recording, len(source.channels))
            elif source.type != "memory":
                # lhotse would run a "command" in a shell: a manifest must not be a program.
                raise BadItem(
                    cut.id, f"its source is of type {source.type!r}; allowed: file, memory"
                )
    return found


def _original(recording: Recording, channels: int) -> Expected:
    """Return the properties of a recording as it is in its file."""
    for transform in recording.transforms or []:
        known = transform if isinstance(transform, dict) else transform.to_dict()
        if known["name"] == "Resample":
            return Expected(known["kwargs"]["source_sampling_rate"], channels)
    samples = None if recording.transforms else recording.num_samples
    return Expected(recording.sampling_rate, channels, samples)


def transcript(cut: Cut) -> dict[str, Any]:
    """The text of a cut's supervisions."""
    return {"text": " ".join(said.text for said in cut.supervisions if said.text)}


class Speech(Dataset[dict[str, Any]]):
    """Utterances as ``{"id", "sig", …}``: a cut's id, its samples (T,), and what ``labels`` says.

    With ``speeds`` each is changed in speed (and pitch) by one of these factors, drawn anew in
    every epoch from (seed, epoch, item); leave room in the limit of a batch for the slower ones.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        sample_rate: int,
        labels: Callable[[Cut], Mapping[str, Any]] = transcript,
        speeds: Sequence[float] = (1.0,),
        resample: bool = False,
    ) -> None:
        self.cuts = list(cuts)
        self.sample_rate, self.labels = sample_rate, labels
        self.speeds, self.resample = tuple(speeds), resample

    @property
    def durations(self) -> list[float]:
        """Seconds of each utterance, at its own speed."""
        return [cut.duration for cut in self.cuts]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cut = self.cuts[index]
        speed = random.choice(self.speeds)
        heard = cut if speed == 1.0 else cut.perturb_speed(speed)
        signal = load(heard, self.sample_rate, self.resample)
        return {"id": cut.id, "sig": signal, **self.labels(cut)}

    def name_of(self, index: int) -> str:
        """An utterance in an error message."""
        return f"{index} ({self.cuts[index].id})"


class DurationBatches:
    """Batches of indices, of up to ``max_duration`` seconds each with their padding.

    What is padded together lasts about equally long, and for several processes so do the batches
    that they train on at the same time (`trainer.data.Plan` deals them). With ``shuffle`` each
    epoch joins other neighbours and has another order, by (seed, epoch); without it batches go from
    short to long. The share of padding is logged once.

    Raises ValueError for a duration above ``max_duration``.
    """

    JITTER = 0.05  # Neighbours in one batch are alike within such a factor, and padding is small.

    def __init__(
        self,
        durations: Sequence[float],
        max_duration: float,
        *,
        seed: int = 0,
        shuffle: bool = True,
        max_items: int | None = None,
        processes: int | None = None,
    ) -> None:
        longest = max(durations, default=0.0)
        if longest > max_duration:
            raise ValueError(
                f"an item lasts {longest:.2f} s, longer than max_duration={max_duration:g} s of a "
                "whole batch: leave it out (`keep`) or raise the limit"
            )
        self.durations, self.max_duration, self.seed = list(durations), max_duration, seed
        self.shuffle, self.max_items = shuffle, max_items or len(self.durations)
        # In evaluation batches are dealt one by one.
        self.processes = (processes or distributed.world_size()) if shuffle else 1
        self.epoch = 0
        self._known: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Later iterations give this epoch's batches."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def padding(self) -> float:
        """The share of the current epoch's batches that is padding."""
        used = sum(self.durations)
        held = sum(len(each) * max(map(self.durations.__getitem__, each)) for each in self)
        return 1 - used / held if held else 0.0

    def _batches(self) -> list[list[int]]:
        if self._known is None or self._known[0] != self.epoch:
            first = self._known is None
            rounds = list(self._rounds(random.Random(derive(self.seed, "batches", self.epoch))))
            ranks = range(self.processes)
            # The batches of a round are dealt like cards, so that they last about equally long.
            dealt = [each[rank :: self.processes] for each in rounds for rank in ranks]
            self._known = self.epoch, [batch for batch in dealt if batch]
            if first:
                logger.info(
                    "%d items, %.2f h, in %d batches of up to %g s; padding %.1f %%",
                    len(self.durations),
                    sum(self.durations) / 3600,
                    len(self._known[1]),
                    self.max_duration,
                    100 * self.padding(),
                )
        return self._known[1]

    def _rounds(self, rng: random.Random) -> Iterator[list[int]]:
        """Yield the batches that all processes train on at the same time: one for each of them."""
        jitter = self.JITTER if self.shuffle else 0.0
        lengths = [length * (1 + rng.uniform(-jitter, jitter)) for length in self.durations]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rounds: list[list[int]] = [[]]
        longest = 0.0
        for index in order:
            longest = max(longest, self.durations[index])
            each = len(rounds[-1]) // self.processes + 1  # items of the largest batch with this one
            if each > self.max_items or each * longest > self.max_duration:
                rounds.append([])
                longest = self.durations[index]
            rounds[-1].append(index)
        *whole, last = rounds
        if self.shuffle:
            if len(last) >= self.processes:
                whole, last = [*whole, last], []
            rng.shuffle(whole)
        yield from whole
        yield last  # Perhaps too few to give each process one, hence at the end.
