"""Mixtures that are drawn or read: what they are, and who may not be in them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet
from torch import Tensor

from recipes.separation.mixing import LEVEL, Drawn, Mixing
from recipes.separation.speech import Coloured
from tests.recipes.separation.conftest import GENDERS, RATE, buzz, cut_of, write
from trainer.data import BadItem, in_epoch, make_loader


def mixing(**more: Any) -> Mixing:
    given = {"sample_rate": RATE, "seconds": 0.5, "speeds": [0.95, 1.0, 1.05]}
    return Mixing(**(given | more))


def speakers_of(name: str) -> list[str]:
    """From an item's id, 00003_ann-0_bob-2."""
    return [part.partition("-")[0] for part in name.split("_")[1:]]


def epoch_of(dataset: Drawn, epoch: int, **options: Any) -> dict[str, Tensor]:
    """Return what a loader gives in an epoch: mixtures by id."""
    loader = make_loader(dataset, train=True, seed=5, batch_size=2, **options)
    loader.set_epoch(epoch)
    skipped = options.get("skipped", 0)
    loader.skip(skipped)
    return {
        name: torch.cat([mixture[None], sources.T])
        for batch in loader
        for name, mixture, sources in zip(
            batch.id, batch.mixture.data, batch.sources.data, strict=True
        )
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("people", [2, 3])
def test_a_mixture_is_the_sum_of_different_people(voices: CutSet, people: int) -> None:
    dataset = Drawn(voices, mixing(speakers=people), 12, train=True)
    seen = set()
    for number in range(12):
        item = dataset[number]
        assert item["mixture"].shape == (4000,)
        assert item["sources"].shape == (4000, people)
        torch.testing.assert_close(item["sources"].sum(1), item["mixture"])
        names = speakers_of(item["id"])
        assert len(set(names)) == people
        seen |= set(names)
    assert seen == set(GENDERS)


def test_unlike_pairs_are_a_woman_and_a_man(voices: CutSet) -> None:
    dataset = Drawn(voices, mixing(pairs="unlike"), 20)
    pairs = [speakers_of(dataset[number]["id"]) for number in range(20)]
    assert all({GENDERS[a], GENDERS[b]} == {"female", "male"} for a, b in pairs)
    assert {GENDERS[a] for a, _ in pairs} == {"female", "male"}  # either may come first


def test_gains_are_within_their_range(voices: CutSet) -> None:
    dataset = Drawn(voices, mixing(gains=[-4.0, 1.0]), 30)
    found = []
    for number in range(30):
        levels = dataset[number]["sources"].square().mean(0).sqrt()
        found += (20 * (levels / LEVEL).log10()).tolist()
    assert min(found) > -4.01
    assert max(found) < 1.01
    assert max(found) - min(found) > 3.5


def test_every_epoch_has_new_mixtures_and_the_same_in_every_run(voices: CutSet) -> None:
    dataset = Drawn(voices, mixing(), 6, train=True)
    first, again, second = (epoch_of(dataset, epoch) for epoch in (1, 1, 2))
    assert len(first) == 6
    assert same(first, again)
    assert not set(first) & set(second)


def test_mixtures_do_not_depend_on_workers_ranks_or_where_a_run_resumed(voices: CutSet) -> None:
    """They come from (seed, epoch, index), by whomever they are loaded."""
    dataset = Drawn(voices, mixing(), 8, train=True)
    alone = epoch_of(dataset, 3)
    assert len(alone) == 8
    assert same(alone, epoch_of(dataset, 3, num_workers=2))
    ranks = [epoch_of(dataset, 3, rank=rank, world_size=2) for rank in range(2)]
    assert [len(each) for each in ranks] == [4, 4]
    assert same(alone, ranks[0] | ranks[1])
    loader = make_loader(dataset, train=True, seed=5, batch_size=2)
    loader.set_epoch(3)
    loader.skip(2)
    rest = {
        name: mixture for b in loader for name, mixture in zip(b.id, b.mixture.data, strict=True)
    }
    assert len(rest) == 4
    assert all(torch.equal(rest[name], alone[name][0]) for name in rest)


def test_mixtures_to_test_are_the_same_every_time(voices: CutSet) -> None:
    dataset = Drawn(voices, mixing(), 4)
    first = [dataset[number] for number in range(4)]
    with in_epoch(9, seed=9):
        for item, number in zip(first, range(4), strict=True):
            assert torch.equal(dataset[number]["mixture"], item["mixture"])
    assert len({item["id"] for item in first}) == 4


def test_speeds_change_the_pitch_in_training_alone(tmp_path: Path) -> None:
    time = np.arange(2 * RATE) / RATE
    cuts = CutSet.from_cuts(
        cut_of(write(tmp_path / f"{name}-0.wav", 0.2 * np.sin(2 * np.pi * 1000 * time)), name, None)
        for name in ("ann", "bob")
    )

    def pitches(train: bool) -> set[int]:
        dataset, found = Drawn(cuts, mixing(seconds=1.0), 8, train), set()
        for number in range(8):
            for source in dataset[number]["sources"].T:
                found.add(int(torch.fft.rfft(source).abs().argmax()))  # a bin is 1 Hz
        return found

    assert pitches(train=False) == {1000}
    assert pitches(train=True) == {950, 1000, 1050}


def test_noise_lies_so_much_below_the_louder_speaker(voices: CutSet) -> None:
    dataset = Drawn(voices, mixing(noise_snr=[-6.0, 3.0]), 10, noise=Coloured(1.0))
    found = []
    for number in range(10):
        item = dataset[number]
        noise = item["mixture"] - item["sources"].sum(1)
        loudest = item["sources"].square().mean(0).max()
        found.append(10 * float((loudest / noise.square().mean()).log10()))
    assert -6.01 < min(found) < max(found) < 3.01
    assert max(found) - min(found) > 4


def test_a_loud_mixture_is_turned_down_with_its_sources(voices: CutSet) -> None:
    item = Drawn(voices, mixing(gains=[40.0, 40.0]), 1)[0]
    assert float(item["mixture"].abs().max()) < 0.96
    torch.testing.assert_close(item["sources"].sum(1), item["mixture"])


def test_recordings_of_another_rate_are_resampled_where_asked_for(tmp_path: Path) -> None:
    cuts = CutSet.from_cuts(
        cut_of(write(tmp_path / f"{name}-0.wav", buzz(200, 1.0, 1, 16000), 16000), name, None)
        for name in ("ann", "bob")
    )
    assert Drawn(cuts, mixing(resample=True), 1)[0]["mixture"].shape == (4000,)
    with pytest.raises(BadItem, match="it is sampled at 16000 Hz, not at 8000 Hz"):
        Drawn(cuts, mixing(), 1)[0]


def test_a_silent_recording_is_named(tmp_path: Path) -> None:
    cuts = CutSet.from_cuts(
        cut_of(write(tmp_path / f"{name}-0.wav", np.zeros(RATE, np.float32)), name, None)
        for name in ("ann", "bob")
    )
    with pytest.raises(BadItem, match=r"(ann|bob)-0.wav: it is silent: nothing in it is louder"):
        Drawn(cuts, mixing(), 1)[0]


def test_a_pause_in_a_recording_is_passed_over(tmp_path: Path) -> None:
    sound = buzz(200, 4.0, 1)
    sound[: 2 * RATE] = 0
    cuts = CutSet.from_cuts(
        cut_of(write(tmp_path / f"{name}-0.wav", sound), name, None) for name in ("ann", "bob")
    )
    dataset = Drawn(cuts, mixing(), 20)
    for number in range(20):
        assert dataset[number]["sources"].square().mean(0).min() > 0


def test_too_few_people_are_told(voices: CutSet) -> None:
    with pytest.raises(
        ValueError, match="mixtures of 5 speakers need as many; .* at least 0.5 s by 4: ann, bob"
    ):
        Drawn(voices, mixing(speakers=5), 1)
    with pytest.raises(ValueError, match="at least 9 s by 0: nobody"):
        Drawn(voices, mixing(seconds=9.0), 1)


def test_people_must_be_named_and_for_unlike_pairs_their_gender_known(voices: CutSet) -> None:
    women = [cut for cut in voices if cut.supervisions[0].gender == "female"]
    with pytest.raises(ValueError, match="pairs: unlike needs female and male .* by female ones"):
        Drawn(women, mixing(pairs="unlike"), 1)
    nameless = [cut.drop_supervisions() for cut in voices]
    with pytest.raises(ValueError, match="nobody is named as the speaker of ann-0"):
        Drawn(nameless, mixing(), 1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"speakers": 1}, "speakers is 1; allowed: 2 or more"),
        ({"pairs": "alike"}, "pairs is 'alike'; allowed: any, unlike"),
        ({"pairs": "unlike", "speakers": 3}, "pairs: unlike is for 2 speakers, not for 3"),
        ({"seconds": 0.0}, "seconds is 0; allowed: above 0"),
        ({"speeds": [1.0, 0.0]}, r"speeds is \[1.0, 0.0\]; allowed: factors above 0, such as"),
        ({"speeds": []}, r"speeds is \[\]; allowed: factors above 0"),
        ({"gains": [3.0, -3.0]}, r"gains is \[3, -3\]; allowed: \[lowest, highest\] in dB"),
    ],
)
def test_what_cannot_be_mixed_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        mixing(**given)


def test_drawing_in_training_leaves_the_generators_of_the_run_alone(voices: CutSet) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    epoch_of(Drawn(voices, mixing(), 4, train=True), 1)
    assert random.random() == expected
