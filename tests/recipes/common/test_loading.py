"""lhotse's cuts as batches: whole epochs, equal ranks, named bad files, exact augmentation."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from torch.utils.data import Dataset

from recipes.common.loading import DurationBatches, Speech, filter_by_duration, load
from tests.processes import TwoRanks
from tests.recipes.common.test_audio import WAYS
from trainer import Brain, Stage, distributed
from trainer.data import BadItem, DistributedBatchSampler, make_loader

RATE = 16000


def utterance(folder: Path, name: str, samples: int = 1600, rate: int = RATE) -> Any:
    """A cut as a manifest describes it, and its file: noise whose text is its name."""
    path = folder / f"{name}.wav"
    noise = np.random.default_rng(samples).normal(0, 0.1, samples)
    soundfile.write(path, noise, rate)
    seconds = samples / rate
    recording = Recording(name, [AudioSource("file", [0], str(path))], rate, samples, seconds)
    said = SupervisionSegment(name, name, 0.0, seconds, text=f"say {name}")
    return MonoCut(name, 0.0, seconds, 0, supervisions=[said], recording=recording)


def path_of(cut: Any) -> Path:
    return Path(cut.recording.sources[0].source)


# Loading a cut


def test_a_cut_is_read_as_the_file_that_it_names(tmp_path: Path) -> None:
    cut = utterance(tmp_path, "one", 3200)
    whole = torch.from_numpy(soundfile.read(path_of(cut), dtype="float32")[0])
    assert torch.equal(load(cut, RATE), whole)
    part = cut.truncate(offset=0.05, duration=0.1)
    assert torch.equal(load(part, RATE), whole[800:2400])
    twice = load(cut.append(part), RATE)
    torch.testing.assert_close(twice, torch.cat([whole, whole[800:2400]]))


def test_rates_and_speeds_are_changed_on_the_fly(tmp_path: Path) -> None:
    cut = utterance(tmp_path, "one", 3200)
    assert load(cut.perturb_speed(1.25), RATE).shape == (2560,)
    assert load(cut, 8000, resample=True).shape == (1600,)
    assert load(cut.perturb_speed(0.8).resample(8000), 8000).shape == (2000,)
    with pytest.raises(BadItem, match=r"one.wav: it is sampled at 16000 Hz, not at 8000 Hz"):
        load(cut, 8000)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changed", [False, True])
def test_a_bad_file_behind_a_cut_is_named(way: str, changed: bool, tmp_path: Path) -> None:
    cut = utterance(tmp_path, "one")
    WAYS[way][0](path_of(cut))
    cut = cut.append(utterance(tmp_path, "two")).perturb_speed(0.9) if changed else cut
    with pytest.raises(BadItem, match=f"one.wav: ({WAYS[way][1]}|it holds 8000 sam)") as caught:
        load(cut, RATE)
    assert caught.value.path == str(tmp_path / "one.wav")


def test_a_file_shorter_than_its_manifest_is_not_filled_up(tmp_path: Path) -> None:
    cut = utterance(tmp_path, "one", 3200)
    utterance(tmp_path, "one", 3000)
    with pytest.raises(BadItem, match="it holds 3000 samples, its manifest says 3200"):
        load(cut, RATE)


def test_an_utterance_is_a_named_item(tmp_path: Path) -> None:
    speech = Speech([utterance(tmp_path, "one")], RATE)
    item = speech[0]
    assert (item["id"], item["text"], item["sig"].shape) == ("one", "say one", (1600,))
    assert speech.name_of(0) == "0 (one)"
    assert speech.durations == [0.1]
    assert Speech(speech.cuts, RATE, labels=lambda cut: {"n": 1})[0]["n"] == 1


def test_the_speed_of_an_utterance_comes_from_the_epoch_and_not_from_the_worker(
    tmp_path: Path,
) -> None:
    cuts = [utterance(tmp_path, f"{index}", 1000) for index in range(12)]

    def lengths(epoch: int, workers: int, skip: int = 0) -> list[dict[str, int]]:
        speech = Speech(cuts, RATE, speeds=(0.8, 1.0, 1.25))
        loader = make_loader(speech, train=True, batch_size=4, num_workers=workers)
        loader.set_epoch(epoch)
        loader.skip(skip)
        return [dict(zip(b.id, b.sig.lengths.tolist(), strict=True)) for b in loader]

    first = lengths(1, 0)
    assert lengths(1, 2) == first
    assert lengths(1, 2, skip=1) == first[1:]
    assert lengths(2, 0) != first
    assert {length for batch in first for length in batch.values()} == {800, 1000, 1250}


# Which cuts


def test_cuts_outside_the_limits_are_dropped_and_counted(tmp_path: Path, caplog: Any) -> None:
    cuts = [utterance(tmp_path, f"{index}", 1600 * index) for index in (1, 2, 3, 4)]
    with caplog.at_level(logging.INFO):
        assert [cut.id for cut in filter_by_duration(cuts, 0.2, 0.3)] == ["2", "3"]
    assert caplog.messages == ["2 of 4 cuts do not last 0.2 to 0.3 s"]
    sentence = "no audio lasts 1 to 20 s: the 4 cuts last 0.10 to 0.40 s, half of them up to 0.25 s"
    with pytest.raises(ValueError, match=sentence):
        filter_by_duration(cuts, 1, 20)
    with pytest.raises(ValueError, match="no audio lasts 0 to inf s: there are no cuts at all"):
        filter_by_duration([])


def test_one_file_in_a_hundred_is_bad(tmp_path: Path, caplog: Any) -> None:
    """1,000 files, 10 of them bad in 8 ways."""
    cuts = [utterance(tmp_path, f"{index:03d}", 1600) for index in range(1000)]
    ways = ["empty", "cut header", "cut data", "text", "not finite", "rate", "channels", "missing"]
    for number in range(10):
        WAYS[ways[number % 8]][0](path_of(cuts[37 + 91 * number]))
    bad = {str(path_of(cuts[37 + 91 * number])) for number in range(10)}
    logged: list[str] = []
    for world in (1, 2):
        caplog.clear()
        counts, seen = set(), []
        for rank in range(world):
            batches = DurationBatches([cut.duration for cut in cuts], 0.8, processes=world)
            loader = make_loader(
                Speech(cuts, RATE), train=True, batch_sampler=batches, rank=rank, world_size=world
            )
            got = [batch.id for batch in loader]
            counts.add(len(got))
            seen += sum(got, [])
        assert len(counts) == 1
        assert sorted(seen) == sorted(c.id for c in cuts if str(path_of(c)) not in bad)
        logged = sorted(caplog.messages)
        assert len(logged) == 10
        assert {message.split()[1].rstrip(":") for message in logged} == bad
        assert all(len(message.split(": ")[1]) > 10 for message in logged)
    for cut in cuts[:50]:
        path_of(cut).unlink(missing_ok=True)
    loader = make_loader(Speech(cuts, RATE), train=True, batch_size=8)
    with pytest.raises(ValueError, match=r"51 of 1000 files are bad, more than the 5.0%"):
        list(loader)


class Listener(Brain):
    """Learns a number, and remembers what it heard."""

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        self.heard: list[str] = []

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        self.heard += batch.id
        return self.modules.net(batch.sig.data[:, :8])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return predictions.square().mean()


def hear(folder: str) -> dict[str, Any]:
    """Train on the files of a folder; return what was heard, logged and raised."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("trainer.data")
    log.addHandler(handler)
    cuts = [
        MonoCut(
            path.stem, 0.0, 0.1, 0,
            recording=Recording(path.stem, [AudioSource("file", [0], str(path))], RATE, 1600, 0.1),
        )
        for path in (Path(folder, f"{number:03d}.wav") for number in range(1000))
    ]  # fmt: skip
    torch.manual_seed(distributed.rank())
    brain = Listener(
        {"net": torch.nn.Linear(8, 1)},
        lambda params: torch.optim.SGD(params, lr=0.01),
        run_opts={"device": "cpu", "progressbar": False},
    )
    error = None
    try:
        kwargs = {"batch_size": 8}
        brain.fit(
            range(1, 2), Speech(cuts, RATE, labels=lambda cut: {}), train_loader_kwargs=kwargs
        )
    except ValueError as raised:
        error = str(raised)
    log.removeHandler(handler)
    return {
        "heard": sorted(brain.heard), "logged": logged, "error": error,
        "batches": brain.progress.step, "steps": brain.progress.optimizer_step,
    }  # fmt: skip


def hear_twice(folder: str) -> list[dict[str, Any]]:
    """Train, and train again when 60 files are gone."""
    first = hear(folder)
    distributed.barrier()
    if distributed.is_main():
        for number in range(60):
            Path(folder, f"{number:03d}.wav").unlink(missing_ok=True)
    distributed.barrier()
    return [first, hear(folder)]


def test_two_processes_skip_and_stop_together(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """1,000 files, 10 of them bad in 8 ways; then 60 more."""
    paths = [tmp_path / f"{index:03d}.wav" for index in range(1000)]
    for index, path in enumerate(paths):
        soundfile.write(path, np.random.default_rng(index).normal(0, 0.1, 1600), RATE)
    ways = ["empty", "cut header", "cut data", "text", "not finite", "rate", "channels", "missing"]
    bad = [paths[37 + 91 * number] for number in range(10)]
    for number, path in enumerate(bad):
        WAYS[ways[number % 8]][0](path)
    (one, stopped), (other, stopped_too) = two_ranks(hear_twice, tmp_path)
    assert one["error"] is other["error"] is None
    assert one["batches"] == other["batches"] == 63
    assert sorted(one["heard"] + other["heard"]) == sorted(p.stem for p in set(paths) - set(bad))
    logged = one["logged"] + other["logged"]
    assert len(set(logged)) == len(logged) == 10
    assert {message.split()[1].rstrip(":") for message in logged} == set(map(str, bad))
    assert stopped["error"] == stopped_too["error"]
    assert stopped["steps"] == stopped_too["steps"] in (50, 63)
    told, *listed = stopped["error"].splitlines()
    assert told.endswith("of 1000 files are bad, more than the 5.0% that may be skipped:")
    assert int(told.split()[0]) == len(listed) > 50


# Batches by seconds


@settings(max_examples=50, deadline=None)
@given(
    durations=st.lists(st.floats(0.05, 20), min_size=1, max_size=80),
    limit=st.sampled_from([20, 25.5, 60, 200]),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
    most=st.sampled_from([None, 1, 5]),
)
def test_ranks_get_every_item_once_in_equally_many_batches_within_the_limit(
    durations: list[float], limit: float, world: int, epoch: int, most: int | None
) -> None:
    def rows(shuffle: bool) -> list[list[list[int]]]:
        batches = DurationBatches(
            durations, limit, seed=7, shuffle=shuffle, processes=world, max_items=most
        )
        every = []
        for rank in range(world):
            dealt = DistributedBatchSampler(
                batches, None, True, train=shuffle, seed=7, rank=rank, world_size=world
            )
            dealt.set_epoch(epoch)
            every.append([list(index.indices) for index in dealt])
        return every

    if len(durations) >= world:
        trained = rows(shuffle=True)
        assert len({len(row) for row in trained}) == 1
        seen = Counter(i for row in trained for batch in row for i in batch)
        assert set(seen.values()) == {1}
        assert len(durations) - len(seen) < world
        for batch in sum(trained, []):
            assert len(batch) * max(durations[i] for i in batch) <= limit
            assert len(batch) <= (most or math.inf)
        for together in zip(*trained, strict=True):
            sizes = [len(batch) for batch in together]
            assert max(sizes) - min(sizes) <= 1
    evaluated = Counter(i for row in rows(shuffle=False) for batch in row for i in batch)
    assert evaluated == Counter(range(len(durations)))


def test_epochs_differ_in_order_and_in_neighbours_and_can_be_repeated(caplog: Any) -> None:
    durations = np.random.default_rng(0).gamma(6, 2, 3000).clip(1, 20).tolist()
    batches = DurationBatches(durations, 200, seed=3)
    with caplog.at_level(logging.INFO):
        epochs = []
        for epoch in (1, 2, 1):
            batches.set_epoch(epoch)
            epochs.append(list(batches))
            assert len(batches) == len(epochs[-1])
    assert epochs[0] == epochs[2]
    neighbours = [{frozenset(batch) for batch in epoch} for epoch in epochs[:2]]
    assert not neighbours[0] & neighbours[1]
    assert 0 < batches.padding() < 0.05
    (message,) = caplog.messages
    assert message.startswith("3000 items, 9.")
    assert f"padding {100 * batches.padding():.1f} %" in message or "padding 4" in message


def test_items_in_batches_of_their_own_have_no_padding() -> None:
    for seed in range(50):
        durations = np.random.default_rng(seed).uniform(0.2, 0.9, 9).tolist()
        assert 0 <= DurationBatches(durations, 1, max_padding=0.0, seed=seed).padding() < 1e-9


def test_an_item_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an item lasts 12.00 s, longer than max_duration=10 s"):
        DurationBatches([3.0, 12.0], 10)
    for duration in (math.nan, -1.0, 0.0, math.inf):
        with pytest.raises(ValueError, match=r"item 1 lasts .* s; allowed: a number above 0"):
            DurationBatches([3.0, duration], 10)


def test_an_epoch_of_seconds_goes_on_from_any_batch_with_any_number_of_workers(
    tmp_path: Path,
) -> None:
    cuts = [utterance(tmp_path, f"{index}", 800 + 50 * index) for index in range(20)]
    speech = Speech(cuts, RATE)

    def run(workers: int, start: int = 0) -> list[Any]:
        loader = make_loader(
            speech,
            train=True,
            num_workers=workers,
            batch_sampler=DurationBatches(speech.durations, 0.3, seed=1),
        )
        loader.set_epoch(2)
        loader.skip(start)
        return [(batch.id, batch.sig.data.tolist()) for batch in loader]

    whole = run(0)
    assert len(whole) > 5
    assert run(2) == whole
    for start in range(len(whole) + 1):
        assert run(0, start) == whole[start:]


# lhotse's own samplers


class Batches(Dataset):
    """A dataset in lhotse's manner: its index is a CutSet."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, cuts: Any) -> list[str]:
        return [cut.id for cut in cuts]


@pytest.mark.filterwarnings("ignore:You are using Dynamic")
@pytest.mark.parametrize("kind", [SimpleCutSampler, DynamicBucketingSampler])
def test_lhotses_samplers_reshuffle_resume_and_give_ranks_equally_many_batches(
    kind: type, tmp_path: Path
) -> None:
    cuts = CutSet.from_cuts(
        utterance(tmp_path, f"{index}", 800 + 50 * index) for index in range(31)
    )

    def run(
        epoch: int = 0, start: int = 0, workers: int = 0, rank: int = 0, world: int = 1
    ) -> list[list[str]]:
        extra = {} if kind is SimpleCutSampler else {"num_buckets": 3}
        sampler = kind(
            cuts, max_duration=0.4, shuffle=True, seed=5, rank=rank, world_size=world, **extra
        )
        loader = make_loader(
            Batches(),
            train=True,
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            rank=rank,
            world_size=world,
        )
        loader.set_epoch(epoch)
        loader.skip(start)
        return list(loader)

    whole = run(1)
    assert sorted(map(int, sum(whole, []))) == list(range(31))
    assert run(2) != whole
    for start in range(len(whole) + 1):
        assert run(1, start) == whole[start:]
    assert run(1, 2, workers=2) == whole[2:]
    ranks = [run(1, rank=rank, world=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(map(int, sum(ranks[0] + ranks[1], []))) == list(range(31))


def test_a_manifest_that_names_a_command_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    source = AudioSource("command", [0], f"touch {canary}")
    recording = Recording("evil", [source], 16000, 16000, 1.0)
    cut = MonoCut("evil", 0.0, 1.0, 0, recording=recording)
    with pytest.raises(BadItem, match="type 'command'; allowed: file, memory"):
        load(cut, 16000)
    assert not canary.exists()
