"""Phases and passes: what an epoch is made of, on any number of processes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.metricgan.history import History, Record
from recipes.metricgan.phases import METRIC, Draw, Drawn, Passes, Phase, Phases
from trainer.data import BadItem, in_epoch, item_generator, make_loader

WARM = Phase("warm_up", 2, passes=["spectral"], batch_size=4)


def past(count: int, share: float = 0.5, most: int | None = None) -> History:
    history = History(100, share)
    for number in range(count):
        history.append(Record(f"u{number}", number, 1, torch.zeros(3, dtype=torch.int16), 0.5))
    history.close()
    history.most = history.most if most is None else most
    return history


def epoch(
    phase: Phase, size: int = 20, history: History | None = None, number: int = 1, **ranks: int
) -> list[list[Draw]]:
    history = History() if history is None else history
    passes = Passes(Phases([phase]), size, history, seed=3, **ranks)
    passes.set_epoch(number)
    found = list(passes)
    assert len(passes) == len(found)
    return found


def indices(batches: list[list[Draw]], what: str, nth: int = 0) -> list[list[int]]:
    """The items of each batch of the nth pass of a kind."""
    runs: list[list[list[int]]] = [[]]
    for batch in batches:
        if batch[0].what == what:
            runs[-1].append([draw.index for draw in batch if draw.weight])
            if batch[0].closes:
                runs.append([])
    return runs[nth]


def test_epochs_belong_to_phases_in_their_order() -> None:
    phases = Phases([Phase("a", 2), Phase("b", 1), Phase("c", 3)])
    assert phases.epochs == 6
    assert [phases.of(n).name for n in range(1, 9)] == ["a", "a", "b", "c", "c", "c", "c", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs of the phase 'x' is 0; allowed: 1, 2 …"),
        ({"batch_size": "4"}, "batch_size of the phase 'x' is '4'; allowed: 1, 2 …"),
        ({"passes": []}, "the phase 'x' has no passes"),
        ({"passes": ["d"]}, "the phase 'x' has a pass 'd'; allowed: spectral, enhance, current,"),
        (
            {"passes": ["current", "enhance"]},
            "the phase 'x' trains the discriminator before anything is enhanced; put the pass",
        ),
    ],
)
def test_a_phase_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**{"name": "x", "epochs": 1, **arguments})


def test_names_of_phases_differ() -> None:
    with pytest.raises(ValueError, match="phases need a name of its own each, and there must be"):
        Phases([Phase("a", 1), Phase("a", 1)])


def test_somebody_trains_the_generator() -> None:
    judge = Phase("judge", 1, passes=["enhance", "current"])
    assert not judge.enhances
    assert WARM.enhances
    with pytest.raises(ValueError, match="no phase trains the generator: judge; one needs the"):
        Phases([judge])


def test_an_epoch_goes_through_its_passes_in_order() -> None:
    found = epoch(Phase("metric", 1, items=6, batch_size=4), history=past(6))
    kinds = [batch[0].what for batch in found]
    assert (
        kinds
        == ["enhance"] * 2 + ["current"] * 2 + ["history"] + ["current"] * 2 + ["generator"] * 2
    )
    assert all(len({draw.what for draw in batch}) == 1 for batch in found)
    assert [batch[0].closes for batch in found] == [False, True] * 2 + [True] + [False, True] * 2


def test_all_passes_of_an_epoch_see_the_same_utterances() -> None:
    phase = Phase("metric", 3, items=7, batch_size=3)
    drawn = []
    for number in (1, 2, 3):
        found = epoch(phase, number=number)
        first = indices(found, "enhance")
        assert first == indices(found, "current") == indices(found, "current", 1)
        assert first == indices(found, "generator")
        assert len({index for batch in first for index in batch}) == 7
        assert {draw.epoch for batch in found for draw in batch} == {number}
        drawn.append(first)
    assert drawn[0] != drawn[1] != drawn[2]
    assert epoch(phase, number=2) == epoch(phase, number=2)


def test_without_a_number_all_utterances_are_drawn() -> None:
    found = indices(epoch(WARM, size=10), "spectral")
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert sorted(index for batch in found for index in batch) == list(range(10))


@settings(deadline=None, max_examples=80)
@given(
    items=st.integers(1, 13), size=st.integers(1, 5), world=st.integers(2, 4),
    records=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)  # fmt: skip
def test_processes_share_what_one_sees(
    items: int, size: int, world: int, records: list[int]
) -> None:
    """Each has equally many batches of each pass; together they are those of one with more."""
    phase = Phase("metric", 1, items=items, batch_size=size)
    most = max(len(past(count).draw(0)) for count in records[:world])
    ranks = [
        epoch(phase, 13, past(records[r], most=most), rank=r, num_replicas=world)
        for r in range(world)
    ]
    kinds = [[(batch[0].what, batch[0].closes) for batch in rank] for rank in ranks]
    assert all(each == kinds[0] for each in kinds)
    assert all(batch for rank in ranks for batch in rank)
    large = Phase("metric", 1, items=items, batch_size=size * world)
    one = epoch(large, 13)
    for what in ("enhance", "current", "generator"):
        parts = [indices(rank, what) for rank in ranks]
        joined = [sum(batches, []) for batches in zip(*parts, strict=True)]
        assert joined == indices(one, what)
        together = size * world
        assert all(len(batch) <= size for part in parts for batch in part)
        assert all(len(batch) == together for batch in joined[:-1])
    for rank, count in zip(ranks, records, strict=False):
        drawn = [d.record for batch in rank for d in batch if d.what == "history" and d.weight]
        assert len(drawn) == len(set(drawn)) == len(past(count).draw(0))


# --------------------------------------------------------------------------------------- the pairs


class Dice:
    """Pairs whose noise is drawn, as those of the corpora; number 3 cannot be read."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            raise BadItem("three.wav", "it is empty (0 bytes)")
        clean = torch.full((20 + index,), float(index))
        noise = torch.rand(20 + index, generator=item_generator(index))
        return {"id": f"u{index}", "noisy": clean + noise, "clean": clean}

    def name_of(self, index: int) -> str:
        return f"u{index}"


def test_a_pair_follows_from_its_epoch_and_number() -> None:
    pairs = Drawn(Dice())

    def noisy(what: str, epoch: int, seed: int = 7) -> torch.Tensor:
        with in_epoch(9, seed):  # The history asks for pairs of earlier epochs.
            return pairs[Draw(what, 2, epoch)]["noisy"]

    first = noisy("enhance", 5)
    assert torch.equal(first, noisy("generator", 5))
    assert not torch.equal(first, noisy("enhance", 6))
    assert not torch.equal(first, noisy("enhance", 5, seed=8))
    assert pairs.name_of(Draw("enhance", 2, 5)) == "u2 of the pass 'enhance'"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_loaded_as_planned_and_bad_pairs_weigh_nothing(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    phases = Phases([Phase("metric", 1, batch_size=2)])
    passes = Passes(phases, 5, past(4), seed=3)
    loader = make_loader(
        Drawn(Dice()), train=True, batch_sampler=passes, num_workers=workers, max_bad=1.0
    )
    loader.set_epoch(1)
    found, planned = list(loader), list(passes)
    assert len(found) == len(planned) == 3 * 4 + 1
    for batch, plan in zip(found, planned, strict=True):
        assert batch.what == [draw.what for draw in plan]
        assert batch.index.tolist() == [draw.index for draw in plan]
        assert batch.weight.tolist() == [float(draw.index != 3) for draw in plan]
        assert bool(batch.closes[0]) == plan[0].closes
    assert "skipped three.wav: it is empty (0 bytes)" in caplog.text


def test_the_published_passes() -> None:
    assert METRIC == ("enhance", "current", "history", "current", "generator")


def test_a_phase_is_told_by_what_the_next_one_begins_with() -> None:
    """So that what a phase adds is its own, and none of what an average or a judge does before."""
    phases = Phases(
        [
            Phase("warm_up", 2, passes=["spectral"]),
            Phase("judge", 2, passes=["enhance", "current"]),
            Phase("metric", 2),
            Phase("rest", 1, passes=["enhance"]),
        ]
    )
    found = [phases.outcome(epoch) for epoch in range(1, 8)]
    assert found == [None, None, None, "warm_up", "metric", "metric", None]
    found = [Phases(phases.all[1:]).outcome(epoch) for epoch in range(1, 6)]
    assert found == [None, None, "metric", "metric", None]
