"""The scores to learn from: normalised, asked for once, waited for no longer than needed."""

import importlib.util
import math
from collections.abc import Collection
from typing import Any

import pytest
import torch

from recipes.common.judges import Judges
from recipes.metricgan.targets import Targets
from tests.recipes.common.speakers import RATE, noise, voice

needs_measures = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pesq", "pystoi"))), reason="needs the extra enhance"
)


class Slow:
    """Judges whose scores come when they are waited for; what is called "bad" has none."""

    measures = ("pesq", "stoi")

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.finished: list[str] = []

    def submit(self, name: str, clean: Any, heard: Any, measures: list[str]) -> None:
        self.waiting.append(name)

    def collect(self, until: Collection[str] = ()) -> dict[str, dict[str, float]]:
        found = {}
        while set(until) & set(self.waiting):
            name = self.waiting.pop(0)
            self.finished.append(name)
            if name != "bad":
                found[name] = {"pesq": 2.0, "stoi": 0.75}
        return found

    def forget(self) -> None:
        self.waiting = []


@pytest.mark.parametrize(("metric", "score"), [("pesq", 0.5), ("stoi", 0.75)])
def test_scores_are_normalised_and_waited_for_in_their_order(metric: str, score: float) -> None:
    judges: Any = Slow()
    targets, signal = Targets(judges, metric), torch.zeros(3)
    for name in ("a", "b", "bad", "c", "a"):
        targets.ask(name, signal, signal)
    assert judges.waiting == ["a", "b", "bad", "c"]
    assert targets.get(["b", "a"]) == [score, score]
    assert judges.waiting == ["bad", "c"]  # nobody waits for these yet
    found = targets.get(["bad", "a"])
    assert math.isnan(found[0])
    assert found[1] == score
    assert math.isnan(targets.get(["bad"])[0])
    assert judges.finished == ["a", "b", "bad"]  # and "bad" is not tried again
    targets.start()
    assert judges.waiting == []
    targets.ask("a", signal, signal)
    assert judges.waiting == ["a"]


def test_what_cannot_be_a_target_is_refused() -> None:
    judges: Any = Slow()
    with pytest.raises(ValueError, match="target is 'wer'; allowed: pesq, stoi"):
        Targets(judges, "wer")
    judges.measures = ("stoi",)
    with pytest.raises(ValueError, match="target is 'pesq', but the judges measure"):
        Targets(judges, "pesq")


@needs_measures
def test_silence_is_skipped_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    clean = voice(1.0)
    targets = Targets(Judges(("pesq", "stoi"), RATE, workers=0), "pesq")
    targets.ask("good", clean, clean + 0.01 * noise(len(clean), 1))
    targets.ask("silent", clean, torch.zeros_like(clean))
    good, silent = targets.get(["good", "silent"])
    assert 0.3 < good < 1.0
    assert math.isnan(silent)
    assert caplog.text.count("silent could not be measured: PESQ") == 1
