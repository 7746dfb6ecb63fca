"""Trial lists, and error rates against a search over all thresholds."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.finetune.trials import (
    Trial,
    check_names,
    cosine_scores,
    make_trials,
    read_trials,
    verification,
)

SCORES = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 7.5]), st.booleans()), min_size=2
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


def operating_points(pairs: Sequence[tuple[float, bool]]) -> list[tuple[float, float]]:
    """Misses and false alarms of every threshold, each counted on its own."""
    points = []
    for threshold in [*sorted({score for score, _ in pairs}), math.inf]:
        missed = [score < threshold for score, target in pairs if target]
        accepted = [score >= threshold for score, target in pairs if not target]
        points.append((sum(missed) / len(missed), sum(accepted) / len(accepted)))
    return points


# -------------------------------------------------------------------------------------- measures


@given(SCORES, st.floats(0.001, 0.999), st.floats(0.1, 10), st.floats(0.1, 10))
@settings(deadline=None)
def test_measures_are_those_of_a_search_over_all_thresholds(
    pairs: list[tuple[float, bool]], prior: float, c_miss: float, c_fa: float
) -> None:
    scores, targets = zip(*pairs, strict=True)
    found = verification(scores, targets, (prior,), c_miss, c_fa)
    points = operating_points(pairs)
    costs = [c_miss * prior * miss + c_fa * (1 - prior) * false for miss, false in points]
    assert found.min_dcf[prior] == pytest.approx(
        min(costs) / min(c_miss * prior, c_fa * (1 - prior)), abs=1e-12
    )
    # The equal error rate is on the polygon through the points, where both rates are equal.
    on_it = []
    for (miss, false), (miss_after, false_after) in itertools.pairwise(points):
        before, after = miss - false, miss_after - false_after
        if before <= 0 <= after:
            share = before / (before - after)
            on_it.append(miss + share * (miss_after - miss))
            assert on_it[-1] == pytest.approx(false + share * (false_after - false))
    assert on_it
    assert on_it == pytest.approx([found.eer] * len(on_it), abs=1e-12)


@pytest.mark.parametrize(
    ("targets", "others", "eer", "dcf"),
    [
        ([3.0, 2.0], [1.0, 0.0], 0.0, 0.0),  # perfect
        ([0.0, 1.0], [2.0, 3.0], 1.0, 1.0),  # inverted
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5, 1.0),  # all equal
        ([4.0, 3.0, 1.0, 0.5], [2.0, 0.0, -1.0, -2.0], 0.25, 0.5),  # 1 of 4 each; half missed
        ([3.0, 1.0], [2.0, 0.0], 0.5, 0.5),
        ([2.0, 1.0], [1.0, 0.0], 0.25, 0.5),  # a tie: half of it, by interpolation
    ],
)
def test_rates_of_scores_made_by_hand(
    targets: list[float], others: list[float], eer: float, dcf: float
) -> None:
    labels = [True] * len(targets) + [False] * len(others)
    found = verification([*targets, *others], labels, (0.01, 0.05))
    assert found.eer == pytest.approx(eer)
    assert found.min_dcf == {0.01: pytest.approx(dcf), 0.05: pytest.approx(dcf)}


def test_random_scores_have_about_half_and_a_rising_map_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(1)
    scores = torch.randn(20_000, generator=rng)
    targets = (torch.rand(20_000, generator=rng) < 0.3).tolist()
    found = verification(scores.tolist(), targets)
    assert found.eer == pytest.approx(0.5, abs=0.02)
    assert 0.98 < found.min_dcf[0.01] <= 1.0
    mapped = verification((scores.double() * 3 - 5).tolist(), targets)
    assert (mapped.eer, mapped.min_dcf) == (found.eer, found.min_dcf)
    assert mapped.threshold == pytest.approx(3 * found.threshold - 5)


def test_the_threshold_accepts_as_many_as_the_rate_says() -> None:
    scores, targets = [5.0, 4.0, 2.0, 1.0, 3.0, 0.0, -1.0, -2.0], [True] * 4 + [False] * 4
    found = verification(scores, targets)
    assert found.eer == 0.25
    accepted = [score >= found.threshold for score in scores]
    assert sum(accepted[:4]) in (2, 3)
    assert sum(accepted[4:]) in (0, 1)


@pytest.mark.parametrize(
    ("scores", "targets", "priors", "message"),
    [
        ([1.0, 2.0], [True, True], (0.01,), "has 2 trials, all of one speaker"),
        ([1.0], [False], (0.01,), "all of two speakers"),
        ([], [], (0.01,), "has 0 trials"),
        ([1.0, math.nan], [True, False], (0.01,), "1 of 2 scores are not finite"),
        ([1.0, 0.0], [True, False], (0.0,), r"prior of a target is 0.0; allowed: between"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    scores: list[float], targets: list[bool], priors: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verification(scores, targets, priors)


# ------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize(
    "text",
    [
        "1 a/x.wav a/y.wav\n0 a/x.wav b/z.wav\n",
        "1  a/x.wav\ta/y.wav\r\n\r\n0 a/x.wav b/z.wav",
        "label,enrol,test\n1,a/x.wav,a/y.wav\n0,a/x.wav,b/z.wav\n",
        "enrol;test;label;note\na/x.wav;a/y.wav;target;\na/x.wav;b/z.wav;nontarget;far\n",
    ],
)
def test_lists_in_the_format_of_voxceleb_and_tables_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trials.txt"
    path.write_text(text)
    assert read_trials(path) == [
        Trial(True, "a/x.wav", "a/y.wav"),
        Trial(False, "a/x.wav", "b/z.wav"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected was lines '1 path path'"),
        ("1 a b\n0 a\n", r"line 2 of .* has 2 parts, '0 a'"),
        ("1 a b\n0 my file b\n", "line 2 of .* has 4 parts.*names with blanks"),
        ("1 a b\n2 a c\n", "line 2 of .* has the label '2'; allowed: 1, 0, target, nontarget"),
        ("1 a b\n0 b a\n", "line 2 of .* has the pair of line 1 with the other label"),
        ("1 a b\n1 a c\n", "has 2 trials, all of one speaker"),
        ("label,enrol\n1,a\n", "has no column test"),
        ("label,enrol,test\n1,a,b\n0,a,\n", "line 3 of .* names no recording"),
    ],
)
def test_a_list_that_does_not_fit_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trials.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trials(path)
    with pytest.raises(ValueError, match="is not there"):
        read_trials(tmp_path / "none.txt")


def test_absent_recordings_are_counted_and_the_first_is_named() -> None:
    trials = [Trial(True, "a", "b"), Trial(False, "a", "c"), Trial(False, "d", "c")]
    check_names(trials, {"a": 1, "b": 1, "c": 1, "d": 1}, "the list")
    with pytest.raises(ValueError, match="the list names 2 recordings that are not there, in 2 of"
                       " 3 trials; the first is 'c' of trial 2"):  # fmt: skip
        check_names(trials, {"a": 1, "b": 1}, "the list")


def test_made_pairs_are_all_there_are_or_so_many_always_the_same() -> None:
    speakers = {f"{who}/{n}": who for who in "abcd" for n in range(5)}
    every = make_trials(speakers)
    assert len(every) == len(set(every)) == 20 * 19 // 2
    assert sum(trial.target for trial in every) == 4 * 10
    assert all((speakers[t.enrol] == speakers[t.test]) == t.target for t in every)
    few = make_trials(dict(reversed(speakers.items())), 30)
    assert few == make_trials(speakers, 30)
    assert [sum(t.target for t in few), len(few)] == [30, 60]
    many = {f"{who}/{n}": str(who) for who in range(30) for n in range(1000)}
    assert len(make_trials(many)) == 20_000
    with pytest.raises(ValueError, match="the set has recordings of 1 speaker, and pairs need two"):
        make_trials({"a": "x", "b": "x"})
    with pytest.raises(ValueError, match="all of two speakers"):
        make_trials({"a": "x", "b": "y"})


# ----------------------------------------------------------------------------------------- scores


def test_scores_are_cosines() -> None:
    embeddings = {
        "a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 3.0]), "c": torch.tensor([1.0, 1.0])
    }  # fmt: skip
    trials = [Trial(True, "a", "c"), Trial(False, "a", "b"), Trial(True, "c", "c")]
    assert cosine_scores(trials, embeddings) == pytest.approx([math.sqrt(0.5), 0.0, 1.0])


def test_normalised_scores_are_those_of_the_formula() -> None:
    rng = torch.Generator().manual_seed(3)
    cohort = torch.randn(12, 6, generator=rng)
    embeddings = {name: torch.randn(6, generator=rng) for name in "abc"}
    trials = [Trial(True, *pair) for pair in itertools.permutations("abc", 2)]

    def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(one @ two / (one @ one).sqrt() / (two @ two).sqrt())

    def against(name: str) -> tuple[float, float]:
        nearest = sorted((cosine(embeddings[name], other) for other in cohort), reverse=True)[:5]
        mean = sum(nearest) / 5
        return mean, math.sqrt(sum((each - mean) ** 2 for each in nearest) / 4)

    expected = []
    for _, one, two in trials:
        score = cosine(embeddings[one], embeddings[two])
        parts = [(score - mean) / deviation for mean, deviation in (against(one), against(two))]
        expected.append(sum(parts) / 2)
    found = cosine_scores(trials, embeddings, cohort, top=5)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] == pytest.approx(found[2])  # a b, and b a


def test_long_lists_are_scored_as_short_ones() -> None:
    rng = torch.Generator().manual_seed(5)
    table = torch.randn(5000, 3, generator=rng)
    embeddings = {f"{n}": row for n, row in enumerate(table)}
    trials = [Trial(True, f"{n}", f"{(7 * n) % 5000}") for n in range(5000)]
    cohort = torch.randn(9, 3, generator=rng)
    few = [0, 4095, 4096, 4999]
    for other in (None, cohort):
        found = cosine_scores(trials, embeddings, other, top=4)
        alone = [cosine_scores([trials[n]], embeddings, other, top=4)[0] for n in few]
        assert [found[n] for n in few] == pytest.approx(alone)


def test_an_embedding_or_cohort_that_cannot_be_used_is_a_sentence() -> None:
    trials = [Trial(True, "a", "b")]
    good = {"a": torch.ones(2), "b": torch.ones(2)}
    for bad in (torch.zeros(2), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="1 of 2 embeddings are not finite or are zero.*of b"):
            cosine_scores(trials, good | {"b": bad})
    with pytest.raises(ValueError, match="the cohort has 1 speakers"):
        cosine_scores(trials, good, torch.ones(1, 2))
