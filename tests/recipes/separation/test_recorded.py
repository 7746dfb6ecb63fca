"""Mixtures that are read from files: what they are, and what is said of those that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from recipes.separation.folders import read_folders
from recipes.separation.recorded import Mixture, Recorded, read_mixture
from tests.recipes.separation.conftest import RATE, mixture_folder
from trainer.data import BadItem, in_epoch, make_loader


@pytest.fixture
def files(tmp_path: Path) -> list[Mixture]:
    """Four mixtures of two people, with noise."""
    return read_folders(mixture_folder(tmp_path / "tr", "mix_both"), "mix_both", 2, noisy=True)


def test_mixtures_are_read_with_their_sources_and_noise(files: list[Mixture]) -> None:
    dataset = Recorded(files, RATE)
    assert len(dataset) == 4
    for number in range(4):
        item = dataset[number]
        samples = round((0.6 + 0.05 * number) * RATE)
        assert item["mixture"].shape == (samples,)
        assert item["sources"].shape == (samples, 2)
        rest = item["mixture"] - item["sources"].sum(1)
        assert 0.005 < rest.square().mean().sqrt() < 0.02  # the noise
    assert dataset.name_of(2) == "2 (m2)"


def test_to_train_a_part_is_taken_and_mixed_at_other_speeds(files: list[Mixture]) -> None:
    dataset = Recorded(files, RATE, seconds=0.4, speeds=(0.95, 1.05))
    found = []
    for seed in range(6):
        with in_epoch(1, seed):
            item = dataset[1]
        assert item["sources"].shape == (3200, 2)
        found.append(item["mixture"])
        noise = item["mixture"] - item["sources"].sum(1)
        assert 0.005 < noise.square().mean().sqrt() < 0.02
    assert not any(torch.equal(found[0], other) for other in found[1:])
    plain = Recorded(files, RATE, seconds=9.0)[1]  # shorter ones are taken whole, and as they are
    torch.testing.assert_close(
        plain["mixture"], Recorded(files, RATE)[1]["mixture"], atol=1e-4, rtol=0
    )


def test_parts_to_train_are_such_that_all_sources_are_heard(tmp_path: Path) -> None:
    root = mixture_folder(tmp_path / "tr", "mix", count=1)
    signals = [soundfile.read(root / name / "m0.wav", dtype="float32")[0] for name in ("s1", "s2")]
    signals[1] = np.concatenate([np.zeros(2 * RATE, np.float32), signals[1]])
    signals[0] = np.resize(signals[0], len(signals[1]))
    for name, signal in zip(("s1", "s2", "mix"), [*signals, sum(signals)], strict=True):
        changed(root / name / "m0.wav", signal)
    dataset = Recorded(read_folders(root, "mix", 2, noisy=False), RATE, seconds=1.0)
    heard = 0
    for seed in range(20):
        with in_epoch(1, seed):
            heard += bool(dataset[0]["sources"].square().mean(0).min() > 1e-8)
    assert heard >= 18  # of the starts two thirds have silence, and eight are tried


def test_parts_that_cannot_be_are_refused(files: list[Mixture]) -> None:
    with pytest.raises(ValueError, match="seconds is -1; allowed: above 0"):
        Recorded(files, RATE, seconds=-1.0)
    with pytest.raises(ValueError, match=r"speeds is \[0.0\]; allowed: factors above 0"):
        Recorded(files, RATE, seconds=1.0, speeds=[0.0])


def test_parts_to_train_do_not_depend_on_workers(files: list[Mixture]) -> None:
    def epoch(**options: Any) -> list[Tensor]:
        dataset = Recorded(files, RATE, seconds=0.4, speeds=(0.95, 1.05))
        loader = make_loader(dataset, train=True, seed=1, batch_size=2, **options)
        loader.set_epoch(1)
        return [batch.mixture.data for batch in loader]

    for one, other in zip(epoch(), epoch(num_workers=2), strict=True):
        assert torch.equal(one, other)


def changed(path: Path, samples: np.ndarray | None = None, rate: int = RATE) -> None:
    """Write another sound in place of a file's, by default its own at another rate."""
    own, _ = soundfile.read(path, dtype="float32")
    soundfile.write(path, own if samples is None else samples, rate)


def test_a_source_of_another_rate_is_named(files: list[Mixture]) -> None:
    changed(files[1].sources[0], rate=16000)
    with pytest.raises(BadItem, match=r"s1/m1.wav: it is sampled at 16000 Hz, not at 8000 Hz"):
        read_mixture(files[1], RATE)


def test_a_source_of_another_length_is_named(files: list[Mixture]) -> None:
    changed(files[1].sources[1], np.ones(4000, np.float32))
    with pytest.raises(
        BadItem, match=r"s2/m1.wav: it has 4000 samples, its mixture \S+mix_both/m1.wav has 5200"
    ):
        read_mixture(files[1], RATE)


def test_a_silent_source_is_named(files: list[Mixture]) -> None:
    changed(files[3].sources[1], np.zeros(6000, np.float32))
    with pytest.raises(BadItem, match=r"s2/m3.wav: it is silent, and a mixture's sources must"):
        read_mixture(files[3], RATE)


def test_a_mixture_that_is_not_the_sum_of_its_sources_is_named(files: list[Mixture]) -> None:
    own, _ = soundfile.read(files[2].mixture, dtype="float32")
    changed(files[2].mixture, 0.9 * own)
    with pytest.raises(
        BadItem,
        match=r"mix_both/m2.wav: it is not the sum of \S+s1/m2.wav, \S+s2/m2.wav, "
        r"\S+noise/m2.wav: 11.1% of its level is left",
    ):
        read_mixture(files[2], RATE)
    with pytest.raises(BadItem, match="it is not the sum of"):  # the noise belongs to it, too
        read_mixture(files[1]._replace(noise=None), RATE)
    changed(files[2].mixture, 0 * own)
    with pytest.raises(BadItem, match="it is not the sum of"):
        read_mixture(files[2], RATE)


def test_a_bad_mixture_is_skipped_and_counted_or_ends_the_run(files: list[Mixture]) -> None:
    changed(files[2].sources[0], np.zeros(round(0.7 * RATE), np.float32))
    dataset = Recorded(files, RATE)
    loader = make_loader(dataset, train=False, batch_size=1, max_bad=0.3)
    assert [batch.id for batch in loader] == [["m0"], ["m1"], ["m3"]]
    assert [Path(path).name for path in loader.bad] == ["m2.wav"]
    with pytest.raises(ValueError, match=r"1 of 16 files are bad, more than the 5.0%"):
        list(make_loader(dataset, train=False, batch_size=1))
    with pytest.raises(BadItem, match="it is silent"):
        list(make_loader(dataset, train=False, batch_size=1, on_bad="raise"))
