"""Datasets and batches of lhotse's cuts: waveforms with their texts, batched by total duration.

    cuts = filter_by_duration(cuts, longest=20.0)
    train = Speech(cuts, sample_rate=16000, speeds=(0.9, 1.0, 1.1))
    batches = DurationBatches(train.durations, max_duration=100.0, seed=seed)
    brain.fit(epochs, train, valid, train_loader_kwargs={"batch_sampler": batches})

lhotse reads manifests, and mixes, appends, resamples and speeds up cuts. Its samplers work as well
(``sampler=DynamicBucketingSampler(…), batch_size=None`` and a dataset whose index is a `CutSet`),
but `DurationBatches` never exceeds the limit, repeats no cut when ranks share the last ones, knows
its length, and takes 1 s for 281,000 utterances where lhotse's takes 30 s.
"""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.common.audio import Expected, read_channels
from recipes.common.cuts import count_files
from recipes.common.resampling import resample as to_rate
from trainer import distributed
from trainer.data import BadItem, item_seed
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
    """Audio backend that compares files with their manifests; lhotse's own does not."""

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


def filter_by_duration(
    cuts: Iterable[Cut], shortest: float = 0.0, longest: float = float("inf")
) -> CutSet:
    """Select cuts by duration, and log how many are left out.

    Args:
        cuts: cuts to select from.
        shortest: minimum duration, in seconds.
        longest: maximum duration, in seconds.

    Raises:
        ValueError: no cut is left.
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


def load(cut: Cut, sample_rate: int, resample: bool = False) -> Tensor:
    """Load the samples of a cut.

    Args:
        cut: a cut, or several that lhotse mixes to one; of several channels the mean is taken.
        sample_rate: expected sample rate, in Hz.
        resample: convert other sample rates.

    Returns:
        Samples (T,), float32.

    Raises:
        BadItem: a file cannot be used, or the cut has another sample rate and ``resample`` is
            False.
    """
    _reader.expected = _files(cut)
    name = next(iter(_reader.expected), cut.id)
    if cut.sampling_rate != sample_rate and not resample:
        raise BadItem(name, f"it is sampled at {cut.sampling_rate} Hz, not at {sample_rate} Hz")
    try:
        samples = torch.from_numpy(cut.load_audio())  # (C, T)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # lhotse hides the cause behind errors of its own.
            if isinstance(cause, BadItem):
                raise cause from None
            cause = cause.__context__
        raise
    signal = samples[0] if len(samples) == 1 else samples.mean(0)
    if cut.sampling_rate == sample_rate:
        return signal
    # Not by lhotse, whose filter may need gigabytes.
    count = cut.resample(sample_rate).num_samples
    return to_rate(signal, cut.sampling_rate, sample_rate)[:count]


def _files(cut: Cut) -> dict[str, Expected]:
    """Return the properties of a cut's audio files by its manifest, by path.

    Raises:
        BadItem: a source is neither a file nor memory.
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
    """Return the text of a cut's supervisions, joined by spaces, under "text"."""
    return {"text": " ".join(each.text for each in cut.supervisions if each.text)}


class Speech(Dataset[dict[str, Any]]):
    """Dataset of utterances ``{"id": str, "sig": (T,), …}``.

    Args:
        cuts: the utterances.
        sample_rate: sample rate of "sig", in Hz.
        labels: returns further fields of a cut's item.
        speeds: factors of speed (and pitch), one of which is drawn for each utterance from (seed,
            epoch, item). Slower utterances are longer than `durations` says: leave room for them in
            the limit of a batch.
        resample: convert files of other sample rates, which are bad items otherwise.
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
        """Duration of each utterance at its original speed, in seconds."""
        return [cut.duration for cut in self.cuts]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cut = self.cuts[index]
        speed = random.Random(item_seed(cut.id)).choice(self.speeds)
        perturbed = cut if speed == 1.0 else cut.perturb_speed(speed)
        signal = load(perturbed, self.sample_rate, self.resample)
        return {"id": cut.id, "sig": signal, **self.labels(cut)}

    def count_files(self, indices: Iterable[int]) -> int:
        """Return the number of different files of these utterances."""
        return count_files(self.cuts[index] for index in indices)

    def name_of(self, index: int) -> str:
        """Return the name of an utterance for error messages."""
        return f"{index} ({self.cuts[index].id})"


class DurationBatches:
    """Batch sampler of items of similar duration, limited by their total duration.

    The batches that several processes train on at the same time last about equally long, too
    (`trainer.data.DistributedBatchSampler` deals them). The share of padding is logged once.

    Args:
        durations: duration of each item, in seconds.
        max_duration: maximum duration of a batch with its padding, in seconds.
        seed: random seed of the run.
        shuffle: mix items of similar duration, and order the batches at random, by (seed, epoch).
            Without it batches go from short to long.
        max_items: maximum number of items in a batch; None for no limit.
        max_padding: largest share of padding behind an item in its batch, from 0 to 1.
        processes: number of processes; None for those of the run. 1 without ``shuffle``.

    Raises:
        ValueError: an item lasts longer than ``max_duration``, or no time at all.
    """

    JITTER = 0.05  # Durations are sorted after a relative change of up to this: padding is small.

    def __init__(
        self,
        durations: Sequence[float],
        max_duration: float,
        *,
        seed: int = 0,
        shuffle: bool = True,
        max_items: int | None = None,
        max_padding: float = 1.0,
        processes: int | None = None,
    ) -> None:
        if not 0 <= max_padding <= 1:
            raise ValueError(f"max_padding is {max_padding}; allowed: a share from 0 to 1")
        for index, duration in enumerate(durations):
            if not 0 < duration < math.inf:  # False for NaN, too.
                raise ValueError(f"item {index} lasts {duration} s; allowed: a number above 0")
        longest = max(durations, default=0.0)
        if longest > max_duration:
            raise ValueError(
                f"an item lasts {longest:.2f} s, longer than max_duration={max_duration:g} s of a "
                "whole batch: leave it out (`filter_by_duration`) or raise the limit"
            )
        self.durations, self.max_duration, self.seed = list(durations), max_duration, seed
        self.shuffle, self.max_items = shuffle, max_items or len(self.durations)
        self.max_padding = max_padding
        # In evaluation batches are dealt one by one.
        self.processes = (processes or distributed.world_size()) if shuffle else 1
        self.epoch = 0
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Use the batches of this epoch in later iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def padding(self) -> float:
        """Return the share of padding in the current epoch's batches, between 0 and 1."""
        used = sum(self.durations)
        held = sum(len(each) * max(map(self.durations.__getitem__, each)) for each in self)
        # Sums in two orders may differ in their last bits, which would print as "-0.0 %".
        return max(0.0, 1 - used / held) if held else 0.0

    def _batches(self) -> list[list[int]]:
        if self._cached is None or self._cached[0] != self.epoch:
            first = self._cached is None
            rounds = list(self._rounds(random.Random(derive(self.seed, "batches", self.epoch))))
            ranks = range(self.processes)
            # The batches of a round are dealt like cards, so that they last about equally long.
            dealt = [each[rank :: self.processes] for each in rounds for rank in ranks]
            self._cached = self.epoch, [batch for batch in dealt if batch]
            if first:
                logger.info(
                    "%d items, %.2f h, in %d batches of up to %g s; padding %.1f %%",
                    len(self.durations),
                    sum(self.durations) / 3600,
                    len(self._cached[1]),
                    self.max_duration,
                    100 * self.padding(),
                )
        return self._cached[1]

    def _rounds(self, rng: random.Random) -> Iterator[list[int]]:
        """Yield the batches that all processes train on at the same time: one for each of them."""
        jitter = min(self.JITTER, self.max_padding / 4) if self.shuffle else 0.0
        lengths = [length * (1 + rng.uniform(-jitter, jitter)) for length in self.durations]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        rounds: list[list[int]] = [[]]
        longest, shortest = 0.0, math.inf
        for index in order:
            longest = max(longest, self.durations[index])
            shortest = min(shortest, self.durations[index])
            # Items of the largest batch with this one.
            each = len(rounds[-1]) // self.processes + 1
            full = each > self.max_items or each * longest > self.max_duration
            if full or shortest < (1 - self.max_padding) * longest:
                rounds.append([])
                longest = shortest = self.durations[index]
            rounds[-1].append(index)
        *whole, last = rounds
        if self.shuffle:
            if len(last) >= self.processes:
                whole, last = [*whole, last], []
            rng.shuffle(whole)
        yield from whole
        yield last  # At the end, since it may hold fewer items than there are processes.


def loader_options(
    dataset: Speech, split: str, hparams: Mapping[str, Any], max_padding: float = 1.0
) -> dict[str, Any]:
    """Return the options of a loader whose batches last ``batch_seconds`` with their padding.

    Args:
        dataset: the utterances.
        split: "train" is shuffled; in the others an utterance may be longer than a batch.
        hparams: ``batch_seconds``, ``seed`` and ``num_workers``.
        max_padding: largest share of padding behind an utterance.
    """
    training = split == "train"
    most = hparams["batch_seconds"]
    batches = DurationBatches(
        dataset.durations,
        most if training else max(most, *dataset.durations),
        seed=hparams["seed"],
        shuffle=training,
        max_padding=max_padding,
    )
    return {"batch_sampler": batches, "num_workers": hparams["num_workers"]}
