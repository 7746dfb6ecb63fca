"""Pairs come out as they were asked for, and say which file is at fault when they cannot."""

import random
import re
from pathlib import Path

import pytest
import torch

from recipes.common.pairs import Mixed, Pairs, Recorded, mix
from tests.recipes.common.speakers import RATE, cut, noise, voice, write
from trainer.data import BadItem, in_epoch, make_loader


def hiss(cut: object, samples: int, sample_rate: int, rng: random.Random) -> torch.Tensor:
    return noise(samples, rng.getrandbits(32))


@pytest.fixture
def mixed(tmp_path: Path) -> list[Mixed]:
    files = [write(tmp_path / f"{n}.wav", voice(1.0 + 0.1 * n, n)) for n in range(6)]
    return [Mixed(cut(file), hiss, (0.0, 10.0)) for file in files]


def epoch(dataset: Pairs, number: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """All items of an epoch, clean and noisy of each in one tensor."""
    loader = make_loader(dataset, train=True, seed=seed, batch_size=1)
    loader.set_epoch(number)
    sides = {b.id[0]: torch.stack([b.clean.data[0], b.noisy.data[0]]) for b in loader}
    return dict(sorted(sides.items()))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_the_ratio_is_that_of_the_powers(snr: float) -> None:
    clean, noisy = mix(voice(), noise(24000) * 17, snr, RATE)
    ratio = clean.square().mean() / (noisy - clean).square().mean()
    assert 10 * ratio.log10().item() == pytest.approx(snr, abs=0.01)


def test_what_would_leave_full_scale_is_turned_down_on_both_sides() -> None:
    loud = voice() * 8
    clean, noisy = mix(loud, noise(len(loud)), 0.0, RATE)
    assert noisy.abs().max() == pytest.approx(0.99)
    torch.testing.assert_close(clean / clean.abs().max(), loud / loud.abs().max())
    quiet, _ = mix(voice() / 8, noise(24000), 0.0, RATE)
    assert torch.equal(quiet, voice() / 8)


def test_training_draws_anew_in_every_epoch_and_by_the_seed(mixed: list[Mixed]) -> None:
    dataset = Pairs(mixed, RATE, segment=8000)
    first, again = epoch(dataset), epoch(dataset)
    assert len(first) == 6
    for other in (epoch(dataset, 2), epoch(dataset, seed=1)):
        for id, pair in first.items():
            assert torch.equal(pair, again[id])
            assert not torch.equal(pair, other[id])


def test_what_is_fixed_depends_on_the_clip_alone(mixed: list[Mixed]) -> None:
    dataset = Pairs(mixed, RATE, fixed=True)
    first = epoch(dataset)
    other = epoch(Pairs(mixed[::-1], RATE, fixed=True), 7, seed=3)
    assert all(torch.equal(pair, other[id]) for id, pair in first.items())
    with in_epoch(5, seed=1):
        assert torch.equal(dataset[2]["noisy"], first[dataset[2]["id"]][1])


def test_a_segment_is_the_same_place_of_both_sides(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.wav", voice(2.0))
    noisy = write(tmp_path / "noisy.wav", -voice(2.0))
    dataset = Pairs([Recorded(cut(clean), cut(noisy))], RATE, segment=5000)
    starts = set()
    for number in range(5):
        with in_epoch(number):
            item = dataset[0]
        assert item["clean"].shape == item["noisy"].shape == (5000,)
        torch.testing.assert_close(item["clean"], -item["noisy"], atol=1e-4, rtol=0)
        starts.add(float(item["clean"][0]))
    assert len(starts) > 1
    assert dataset.durations == [5000 / RATE]


def test_a_clip_may_be_in_an_epoch_several_times(mixed: list[Mixed]) -> None:
    dataset = Pairs(mixed[:2], RATE, segment=8000, times=3)
    assert len(dataset) == len(dataset.durations) == 6
    found = epoch(dataset)
    assert list(found) == ["0", "0#1", "0#2", "1", "1#1", "1#2"]
    assert not torch.equal(found["0"], found["0#1"])
    assert dataset.name_of(5) == "5 (1#2)"
    assert [item["id"] for item in dataset] == ["0", "1", "0#1", "1#1", "0#2", "1#2"]
    with pytest.raises(IndexError, match="there is no pair 6; allowed: 0 to 5"):
        dataset[6]


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    tones = {rate: 0.5 * torch.sin(torch.arange(rate) * 2000 / rate) for rate in (48000, RATE)}
    sides = [write(tmp_path / f"{n}.wav", tones[48000], 48000) for n in range(2)]
    item = Pairs([Recorded(*map(cut, sides))], RATE)[0]
    assert item["clean"].shape == (RATE,)
    torch.testing.assert_close(item["clean"][99:-99], tones[RATE][99:-99], atol=1e-3, rtol=0)


def test_clips_shorter_than_a_segment_are_left_out(
    mixed: list[Mixed], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert len(Pairs(mixed, RATE, segment=round(1.25 * RATE))) == 3
    assert "3 of 6 clips are shorter than a segment of 1.250 s: left out" in caplog.text
    wrong = "no clip is as long as a segment of 5.000 s: the longest of 6 clips lasts 1.500 s"
    with pytest.raises(ValueError, match=re.escape(wrong)):
        Pairs(mixed, RATE, segment=5 * RATE)
    with pytest.raises(ValueError, match="there are no clips at all"):
        Pairs([], RATE)


def test_silence_is_no_target(tmp_path: Path, mixed: list[Mixed]) -> None:
    silent, loud = write(tmp_path / "s.wav", torch.zeros(16000)), write(tmp_path / "l.wav", voice())
    for source in (Mixed(cut(silent), hiss, (0, 0)), Recorded(cut(silent), cut(silent))):
        with pytest.raises(BadItem, match=re.escape(f"{silent}: it is silent: there is nothing")):
            Pairs([source], RATE)[0]
    # In an epoch it is skipped, and named; too many end the run.
    dataset = Pairs([*mixed, Mixed(cut(silent), hiss, (0, 0))], RATE, fixed=True)
    loader = make_loader(dataset, train=False, batch_size=7, max_bad=0.2)
    assert len(next(iter(loader)).id) == 6
    dataset = Pairs([Mixed(cut(silent), hiss, (0, 0)), Recorded(cut(loud), cut(loud))], RATE)
    with pytest.raises(ValueError, match=r"1 of 2 files are bad, more than the 5.0%"):
        next(iter(make_loader(dataset, train=False, batch_size=2)))


def test_a_pair_of_different_lengths_is_named(tmp_path: Path) -> None:
    clean, noisy = write(tmp_path / "c.wav", voice(1.0)), write(tmp_path / "n.wav", voice(1.1))
    wrong = f"{noisy}: it gives 17600 samples, its clean partner {clean} 16000: a pair must be"
    with pytest.raises(BadItem, match=re.escape(wrong)):
        Pairs([Recorded(cut(clean), cut(noisy))], RATE)[0]


def test_an_item_is_named_in_messages(mixed: list[Mixed]) -> None:
    assert Pairs(mixed, RATE).name_of(3) == "3 (3)"
