"""The history: bounded, appended to at one cost, drawn without repetition, saved to the bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.metricgan.history import History, Record, quantised, waveform


def record(number: int, score: float = 0.5) -> Record:
    numbers = torch.Generator().manual_seed(number)
    wave = torch.randint(-100, 100, (10 + number % 3,), generator=numbers).to(torch.int16)
    return Record(f"utt{number}", number, 1 + number // 4, wave, number % 2, score)


def filled(capacity: int, count: int, share: float = 0.2) -> History:
    history = History(capacity, share)
    for number in range(count):
        history.append(record(number))
    return history


def ids(history: History) -> list[str]:
    return sorted((history[i].id for i in range(len(history))), key=lambda id: int(id[3:]))


@settings(deadline=None, max_examples=60)
@given(capacity=st.integers(1, 8), count=st.integers(0, 30))
def test_it_keeps_the_newest(capacity: int, count: int) -> None:
    history = filled(capacity, count)
    assert ids(history) == [f"utt{n}" for n in range(max(0, count - capacity), count)]


def test_appending_to_a_full_history_changes_one_place() -> None:
    history = filled(100, 130)
    before = [history[i] for i in range(100)]
    history.append(record(999))
    after = [history[i] for i in range(100)]
    assert [i for i in range(100) if before[i] is not after[i]] == [30]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_draw_is_a_share_without_repetitions(count: int, share: float, seed: int) -> None:
    history = filled(50, count, share)
    drawn = history.draw(seed)
    assert len(drawn) == math.ceil(count * share)
    assert len({place for place, _ in drawn}) == len(drawn)
    assert all(history[place] is record for place, record in drawn)
    assert [place for place, _ in drawn] == [place for place, _ in history.draw(seed)]


def test_an_epoch_becomes_past_when_it_is_closed() -> None:
    history = filled(10, 3)
    for number, score in ((3, 0.7), (4, math.nan), (5, 0.1)):
        history.current[number, number % 2] = record(number, score)
    assert len(history.draw(0)) == 1
    history.close()
    assert ids(history) == ["utt0", "utt1", "utt2", "utt3", "utt5"]  # not what has no score
    assert history.current == {}
    assert history.most == len(history.draw(0)) == 1


@pytest.mark.parametrize(("capacity", "count"), [(5, 0), (5, 3), (5, 5), (5, 13)])
def test_it_goes_on_as_it_was_saved(capacity: int, count: int) -> None:
    history, other = filled(capacity, count), History(capacity)
    history.current[77, 1] = record(77, math.nan)
    history.most = 4
    other.load_state_dict(history.state_dict())
    for number in range(count, count + 4):
        assert [(p, r.id, r.score) for p, r in history.draw(number)] == [
            (p, r.id, r.score) for p, r in other.draw(number)
        ]
        history.append(record(number))
        other.append(record(number))
    first, second = history.state_dict(), other.state_dict()
    assert first["past"]["ids"] == second["past"]["ids"]
    for part in ("past", "current"):
        for name in ("places", "waves"):
            assert torch.equal(first[part][name], second[part][name])
    assert math.isnan(other.current[77, 1].score)
    assert other.most == 4


@pytest.mark.parametrize("capacity", [3, 5, 9])
def test_another_capacity_keeps_the_newest(capacity: int) -> None:
    history, other = filled(5, 13), History(capacity)
    other.load_state_dict(history.state_dict())
    assert ids(other) == [f"utt{n}" for n in range(13 - min(capacity, 5), 13)]
    for number in range(13, 25):
        other.append(record(number))
    assert ids(other) == [f"utt{n}" for n in range(max(8, 25 - capacity), 25)][-capacity:]


def test_signals_are_kept_to_16_bits() -> None:
    wave = torch.tensor([0.0, 0.5, -1.0, 1.7, -3.0, 1e-4])
    kept = Record("a", 0, 1, quantised(wave))
    assert kept.wave.dtype == torch.int16
    torch.testing.assert_close(waveform(kept), wave.clamp(-1, 1), rtol=0, atol=0.5 / 32767)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity of the history is 0; allowed: 1, 2 …"),
        ({"share": 1.2}, "share of the history is 1.2; allowed: a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        History(**arguments)
