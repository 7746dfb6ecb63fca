"""Bad files: counted as files, over all ranks, and judged where all ranks are at the same point."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from trainer import Brain, Stage, distributed
from trainer.callbacks import Callback
from trainer.data import BadItem, make_loader, report_bad
from trainer.data.items import MIN_ITEMS, BadItemPolicy

from ..processes import TwoRanks


class Takes(Dataset):
    """Items of one file each, some of them bad."""

    def __init__(self, size: int, bad: Sequence[int] = ()) -> None:
        self.size, self.bad = size, frozenset(bad)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise BadItem(f"{index:04d}.wav", "it is empty")
        return {"id": f"{index}", "x": torch.full((3,), 1 + index / 7)}


class Strings(Dataset):
    """Items of several files each: item i has the files i, i + 1, … around a circle."""

    def __init__(self, files: int, each: int, bad: Sequence[int], told: bool = True) -> None:
        self.files, self.each, self.bad = files, each, frozenset(bad)
        if told:
            self.count_files = self._count

    def _count(self, indices: Sequence[int]) -> int:
        return len({name for index in indices for name in self._files(index)})

    def _files(self, index: int) -> list[int]:
        return [(index + k) % self.files for k in range(self.each)]

    def __len__(self) -> int:
        return self.files

    def __getitem__(self, index: int) -> torch.Tensor:
        for name in self._files(index):
            if name in self.bad:
                raise BadItem(f"{name}.wav", "it is cut")
        return torch.ones(2)


class Small(Brain):
    """Learns nothing of note, and tells where it was."""

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        return self.modules.net(batch["x"].data)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Any:
        return predictions.square().mean()


def small(**options: Any) -> Small:
    torch.manual_seed(0)
    return Small(
        {"net": nn.Linear(3, 1)},
        lambda params: torch.optim.SGD(params, lr=0.01),
        run_opts={"device": "cpu", "progressbar": False, **options},
    )


def spread(size: int, share: float, seed: int = 0) -> list[int]:
    """Bad items of a data set, at random places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator).tolist()[: round(share * size)]


# Ranks decide as one


def verdicts(share: float, seed: int, world: int = 4, every: int = 5) -> list[tuple[int, str]]:
    """Train an epoch on simulated ranks; return the batch at which each stops, and its sentence."""
    size = 400
    data = Takes(size, spread(size, share, seed))
    loaders = [
        make_loader(data, train=True, seed=seed, rank=rank, world_size=world, batch_size=4)
        for rank in range(world)
    ]
    rounds = enumerate(zip(*loaders, strict=True), 1)
    stopped: list[tuple[int, str]] = []

    def judge(number: int, at_end: bool) -> None:
        reports = [loader.report_bad() for loader in loaders]
        for loader in loaders:
            try:
                loader.policy.judge(reports, at_end=at_end)
            except ValueError as error:
                stopped.append((number, str(error)))

    for number, _ in rounds:
        if number % every == 0 and not stopped:
            judge(number, at_end=False)
    if not stopped:
        judge(size // 4 // world, at_end=True)
    return stopped


def test_four_percent_of_five_never_stop_a_rank_and_six_stop_all_alike() -> None:
    for seed in range(40):
        assert verdicts(0.04, seed) == []
        stopped = verdicts(0.06, seed)
        assert len(stopped) == 4
        assert len(set(stopped)) == 1
        assert stopped[0][0] % 5 == 0
        listed = stopped[0][1].splitlines()
        assert listed[0].endswith("of 400 items are bad, more than the 5.0% that may be skipped:")
        assert 21 <= int(listed[0].split()[0]) == len(listed) - 1


@settings(max_examples=300, deadline=None)
@given(
    found=st.lists(st.lists(st.integers(0, 30), max_size=20), min_size=1, max_size=4),
    total=st.integers(1, 60),
    allowed=st.sampled_from([0.0, 0.05, 0.1, 0.29, 0.5, 1.0]),
)
def test_the_verdict_is_about_the_different_files_of_all_ranks(
    found: list[list[int]], total: int, allowed: float
) -> None:
    policies = [BadItemPolicy("skip", allowed) for _ in found]
    for policy, files in zip(policies, found, strict=True):
        policy.handle([(f"{name}", "it is bad") for name in files], len(files))
    reports = [policy.report(total) for policy in policies]
    different = {name for files in found for name in files}
    for policy in policies:
        if 100 * len(different) > round(100 * allowed) * max(total, len(different)):
            with (
                pytest.raises(ValueError, match=rf"^{len(different)} of {total} items are bad")
                if (total >= len(different))
                else pytest.raises(ValueError, match="items are bad")
            ):
                policy.judge(reports)
        else:
            policy.judge(reports)
        assert policy.all_skipped.keys() == {f"{name}" for name in different}


def train_on_bad(share: float) -> dict[str, Any]:
    """Train and validate with bad files, most of them on one rank."""
    size = 400
    bad = spread(size, share)
    brain = small(log_interval=10)
    found: dict[str, Any] = {"error": None}
    try:
        brain.fit(range(1, 3), Takes(size, bad), train_loader_kwargs={"batch_size": 4})
    except ValueError as error:
        found["error"] = str(error)
    return {**found, "step": brain.progress.optimizer_step}


def test_two_processes_stop_at_the_same_step_with_the_same_sentence(two_ranks: TwoRanks) -> None:
    first, second = two_ranks(train_on_bad, 0.06)
    assert first == second
    assert first["step"] in (20, 30, 40, 50)  # Of 50; at 10 there were 80 items.
    assert "of 400 items are bad, more than the 5.0%" in first["error"]
    for found in two_ranks(train_on_bad, 0.04):
        assert found == {"error": None, "step": 100}


def evaluate_bad(items: int, bad: list[int]) -> dict[str, Any]:
    brain = small()
    kwargs = {"batch_size": 2}
    try:
        brain.evaluate(Takes(items, bad), test_loader_kwargs=kwargs)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def test_an_evaluation_is_judged_at_its_end_on_both(two_ranks: TwoRanks) -> None:
    # 21 items: eleven batches, six of them on rank 0. Both bad files are on rank 0.
    for found in two_ranks(evaluate_bad, 21, [0, 20]):
        assert found["error"].startswith("2 of 21 items are bad, more than the 5.0%")
    for found in two_ranks(evaluate_bad, 21, [20]):
        assert found["error"] is None


# Where the run is judged


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_judged_at_a_logging_interval_after_a_hundred_items(workers: int) -> None:
    brain = small(log_interval=3)
    kwargs = {"batch_size": 4, "shuffle": False, "num_workers": workers}
    with pytest.raises(ValueError, match="50 of 400 items are bad"):
        brain.fit(range(1, 2), Takes(400, range(1, 100, 2)), train_loader_kwargs=kwargs)
    assert brain.progress.optimizer_step == 27  # The first interval after 100 items, 4 a step.
    assert brain.progress.optimizer_step * 4 >= MIN_ITEMS


def test_a_short_stage_is_judged_at_its_end_and_counts_begin_anew() -> None:
    brain = small(log_interval=1)
    kwargs = {"batch_size": 4}
    with pytest.raises(ValueError, match="3 of 40 items are bad"):
        brain.fit(range(1, 2), Takes(40, [1, 2, 3]), train_loader_kwargs=kwargs)
    assert brain.progress.optimizer_step == 10
    brain = small()
    brain.fit(range(1, 5), Takes(40, [1, 2]), Takes(20, [4]), train_loader_kwargs=kwargs)
    with pytest.raises(ValueError, match="2 of 20 items are bad"):
        brain.fit(range(5, 7), Takes(40, [1, 2]), Takes(20, [4, 5]))


def test_the_stage_line_has_the_number_of_bad_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports: list[Any] = []

    brain = small()
    brain.callbacks.append(_Keeping(reports))
    with caplog.at_level(logging.INFO, "trainer"):
        brain.fit(range(1, 2), Takes(40, [1, 2]), Takes(20, [4]))
    assert [(each.stage, each.bad_files) for each in reports] == [("train", 2), ("valid", 1)]
    lines = [message for message in caplog.messages if message.startswith("epoch 1 ")]
    assert ["bad_files 2" in lines[0], "bad_files 1" in lines[1]] == [True, True]


class _Keeping(Callback):
    def __init__(self, reports: list[Any]) -> None:
        self.reports = reports

    def on_stage_end(self, brain: Any, report: Any) -> None:
        self.reports.append(report)


def test_a_resumed_epoch_counts_the_files_that_it_has_seen_since() -> None:
    loader = make_loader(Takes(40, range(3)), train=False, batch_size=4, world_size=2, rank=0)
    loader.skip(2)
    list(loader)
    assert loader.bad == {}
    assert loader.policy.loaded == 12


# What is counted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_of_many_items_counts_once(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    options = {"train": False, "batch_size": 2, "num_workers": workers, "max_bad": 0.05}
    loader = make_loader(Strings(40, each=6, bad=[7, 20]), **options)
    assert sum(len(batch) for batch in loader) == 40 - 2 * 6
    assert loader.bad == {"7.wav": "it is cut", "20.wav": "it is cut"}
    assert len(caplog.messages) == 2
    with pytest.raises(ValueError, match="3 of 40 files are bad"):
        list(make_loader(Strings(40, each=6, bad=[7, 8, 20]), **options))


def test_files_are_those_of_the_items_that_are_asked_for() -> None:
    data = Strings(100, each=2, bad=[3])
    with pytest.raises(ValueError, match="1 of 11 files are bad"):
        list(make_loader(Subset(data, range(10)), train=False))
    list(make_loader(Subset(data, range(30)), train=False, max_bad=0.04))
    few = Subset(Strings(100, each=1, bad=[3], told=False), [*range(10), 4, 5])
    with pytest.raises(ValueError, match="1 of 10 items are bad"):
        list(make_loader(few, train=False, sampler=[*range(10), 1, 2, 3, 3]))


class Batches(Takes):
    """Whole batches, asked for by a list of their items."""

    def __getitem__(self, index: Any) -> Any:
        found = []
        for each in index:
            try:
                found.append(super().__getitem__(each)["x"])
            except BadItem as bad:
                report_bad(bad.path, bad.reason)
        return torch.stack(found)


def test_an_index_that_is_a_batch_is_not_taken_for_an_item() -> None:
    sampler = [list(range(start, start + 10)) for start in range(0, 100, 10)]

    def read(bad: list[int], data: Any = Batches) -> None:
        list(make_loader(data(100, bad), train=False, sampler=sampler, batch_size=None))

    read([3, 50, 51])
    read([3, 50, 51], lambda size, bad: Subset(Batches(size, bad), range(size)))
    with pytest.raises(ValueError, match="6 of 100 items are bad"):
        read([3, 50, 51, 52, 53, 54])


class Shards(IterableDataset):
    """A stream that leaves bad files out, each process those of its own."""

    def __init__(self, size: int, bad: Sequence[int]) -> None:
        self.size, self.bad = size, bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        world = distributed.world_size()
        for index in range(first + step * distributed.rank(), self.size, step * world):
            if index in self.bad:
                report_bad(f"{index}.wav", "it is cut")
            else:
                yield {"x": torch.ones(3)}


WORKERS = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.mark.parametrize("options", WORKERS)
@pytest.mark.parametrize("made", [False, True])
def test_streams_and_loaders_of_ones_own_are_judged_too(
    options: dict[str, Any], made: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kwargs = {"batch_size": 4, **options}

    def fit(bad: list[int]) -> Small:
        brain = small(log_interval=5)
        data = Shards(120, bad)
        given = (data, kwargs) if made else (DataLoader(data, **kwargs), None)
        brain.fit(range(1, 4), given[0], train_loader_kwargs=given[1])
        return brain

    fit([3, 40, 41])
    assert sorted(caplog.messages) == [f"skipped {i}.wav: it is cut" for i in (3, 40, 41)]
    with pytest.raises(ValueError, match=r"8 of 120 items are bad, more than the 5.0%"):
        fit([3, 40, 41, 42, 60, 61, 62, 63])


@pytest.mark.parametrize("workers", [0, 2])
def test_options_hold_for_a_dataloader_of_ones_own(workers: int) -> None:
    def fit(**options: Any) -> None:
        loader = DataLoader(Takes(40, [1, 2, 3]), batch_size=4, num_workers=workers)
        small(**options).fit(range(1, 2), loader)

    fit(max_bad_item=0.1)
    with pytest.raises(ValueError, match="3 of 40 items are bad"):
        fit()
    with pytest.raises(BadItem, match="0001.wav: it is empty"):
        fit(on_bad_item="raise")


def test_plain_iterables_may_report_too() -> None:
    class Own:
        def __iter__(self) -> Iterator[Any]:
            yield {"x": torch.ones(6, 3)}
            report_bad("a.wav", "it is cut")
            yield {"x": torch.ones(6, 3)}
            report_bad("b.wav", "it is cut")

    with pytest.raises(ValueError, match="2 of 14 items are bad"):
        small().fit(range(1, 2), Own())
    small(max_bad_item=0.2).fit(range(1, 2), Own())
