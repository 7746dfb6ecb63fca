"""Speaker verification: trial lists, scores of pairs of recordings, EER and minDCF.

A trial asks whether two recordings are of one speaker. A list of trials is a text file in the
format of VoxCeleb, ``1 path path`` for a pair of one speaker and ``0 path path`` for a pair of two,
or a table with the columns ``label``, ``enrol`` and ``test``, in which paths may hold blanks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.common.tables import TableError, read_lines, read_rows
from trainer.seed import derive

LABELS = {"1": True, "0": False, "target": True, "nontarget": False}
COLUMNS = ("label", "enrol", "test")
EXPECTED = f"lines '1 path path' or '0 path path', or a table with {', '.join(COLUMNS)}"
MOST_PAIRED, MOST_OF_A_SPEAKER = 2000, 50  # recordings
AT_ONCE = 4096  # rows of embeddings: lists have a million trials
SHOWN = 80  # characters of a line or name that an error shows


class Trial(NamedTuple):
    """A pair of recordings."""

    target: bool  # of one speaker
    enrol: str
    test: str


class Verification(NamedTuple):
    """Error measures of a list of trials.

    Attributes:
        eer: equal error rate, between 0 and 1.
        min_dcf: least normalised detection cost by the prior probability of a target.
        threshold: the score from which on pairs are accepted at the equal error rate.
    """

    eer: float
    min_dcf: dict[float, float]
    threshold: float


# ------------------------------------------------------------------------------------------- lists


def read_trials(path: str | Path) -> list[Trial]:
    """Read a list of trials.

    Raises:
        TableError: the file cannot be read, a line is no trial, or a pair is there with both
            labels.
        ValueError: all trials have one label.
    """
    path = Path(path).expanduser()
    first = read_lines(path, EXPECTED)[0]
    table = any(gap in first.text for gap in ",;\t") and "enrol" in first.text
    rows = list(_table(path) if table else _columns(path))
    labels: dict[frozenset[str], tuple[bool, int]] = {}
    for line, trial in rows:
        pair = frozenset((trial.enrol, trial.test))
        label, other = labels.setdefault(pair, (trial.target, line))
        if label != trial.target:
            raise TableError(path, f"has the pair of line {other} with the other label", line)
    trials = [trial for _, trial in rows]
    check_both([trial.target for trial in trials], str(path))
    return trials


def _table(path: Path) -> Iterator[tuple[int, Trial]]:
    for row in read_rows(path, EXPECTED, COLUMNS):
        yield row.line, _trial(path, row.line, *(row.cells[name] for name in COLUMNS))


def _columns(path: Path) -> Iterator[tuple[int, Trial]]:
    for line, text in read_lines(path, EXPECTED):
        cells = text.split()
        if len(cells) != 3:
            raise TableError(
                path,
                f"has {len(cells)} parts, {text[:SHOWN]!r}; expected were {EXPECTED}, which names "
                "with blanks need",
                line,
            )
        yield line, _trial(path, line, *cells)


def _trial(path: Path, line: int, label: str, enrol: str, test: str) -> Trial:
    if label.lower() not in LABELS:
        raise TableError(
            path, f"has the label {label[:SHOWN]!r}; allowed: {', '.join(LABELS)}", line
        )
    if not (enrol and test):
        raise TableError(path, "names no recording", line)
    return Trial(LABELS[label.lower()], enrol, test)


def check_both(targets: Sequence[bool], what: str) -> None:
    """Raise ValueError unless there are trials of one speaker and trials of two."""
    count = sum(targets)
    if count in (0, len(targets)):
        kind = "one speaker" if count else "two speakers"
        raise ValueError(
            f"{what} has {len(targets)} trials, all of {kind}: error rates need trials of one "
            "speaker and of two"
        )


def make_trials(
    speakers: Mapping[str, str], most: int = 10_000, what: str = "the set"
) -> list[Trial]:
    """Pair recordings: every pair, or so many drawn at random, the same in every run.

    Of very many recordings, at most 2,000 are paired, of a speaker at most 50.

    Args:
        speakers: speaker of each recording, by its name.
        most: largest number of pairs of one speaker, and of pairs of two.
        what: the recordings, for an error.

    Raises:
        ValueError: no two recordings are of one speaker, or all are.
    """
    rng = random.Random(derive(0, "trials"))
    groups: dict[str, list[str]] = {}
    for name in sorted(speakers):
        groups.setdefault(speakers[name], []).append(name)
    chosen: list[str] = []
    for group in rng.sample(sorted(groups), len(groups)):
        if len(chosen) < MOST_PAIRED:
            chosen += rng.sample(groups[group], min(MOST_OF_A_SPEAKER, len(groups[group])))
    pairs: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for one, two in combinations(sorted(chosen), 2):
        pairs[speakers[one] == speakers[two]].append((one, two))
    trials = [
        Trial(target, *pair)
        for target, every in pairs.items()
        for pair in sorted(rng.sample(every, min(most, len(every))))
    ]
    if len(groups) < 2:
        raise ValueError(
            f"{what} has recordings of {len(groups)} speaker, and pairs need two: give train, "
            "valid and test two each that no other has; to tell apart speakers that are known, "
            "use hparams/finetune/classify.yaml"
        )
    check_both([trial.target for trial in trials], f"{what}, with {len(groups)} speakers,")
    return trials


def check_names(
    trials: Sequence[Trial], known: Mapping[str, object], what: str, where: str = "there"
) -> None:
    """Raise ValueError, with their number and the first, for trials of unknown recordings.

    Args:
        trials: the list.
        known: the recordings there are, by the names that trials have.
        what: the list, for the error.
        where: where they must be, for the error.
    """
    absent = [
        (number, name)
        for number, trial in enumerate(trials, 1)
        for name in (trial.enrol, trial.test)
        if name not in known
    ]
    if absent:
        names = dict.fromkeys(name for _, name in absent)
        number, first = absent[0]
        raise ValueError(
            f"{what} names {len(names)} recordings that are not {where}, in "
            f"{len({number for number, _ in absent})} of {len(trials)} trials; the first is "
            f"{first[:SHOWN]!r} of trial {number}"
        )


# ------------------------------------------------------------------------------------------ scores


def cosine_scores(
    trials: Sequence[Trial],
    embeddings: Mapping[str, Tensor],
    cohort: Tensor | None = None,
    top: int = 300,
) -> list[float]:
    """Score trials by the cosine between the embeddings (D,) of their recordings.

    Args:
        trials: the list.
        embeddings: embedding of each recording, by its name.
        cohort: embeddings (C, D) of other speakers, such as those of the training: scores are then
            normalised by adaptive symmetric normalisation (Matejka et al. 2017, "Analysis of Score
            Normalization in Multilingual Speaker Recognition", AS-norm1): each side's mean and
            deviation are those of its ``top`` largest scores against the cohort.
        top: number of these.

    Raises:
        ValueError: an embedding is not finite or of length 0, or the cohort has fewer than two.
    """
    order = {name: number for number, name in enumerate(embeddings)}
    table = _directions(torch.stack([each.double() for each in embeddings.values()]), list(order))
    left = torch.tensor([order[trial.enrol] for trial in trials])
    right = torch.tensor([order[trial.test] for trial in trials])
    parts = zip(left.split(AT_ONCE), right.split(AT_ONCE), strict=True)
    scores = torch.cat([(table[one] * table[two]).sum(1) for one, two in parts])
    if cohort is not None:
        if min(len(cohort), top) < 2:
            raise ValueError(
                f"the cohort has {len(cohort)} speakers, of which the nearest {top} are taken: "
                "score normalisation needs two"
            )
        others = _directions(cohort.double(), [f"{n} of the cohort" for n in range(len(cohort))])
        statistics = [
            torch.stack(torch.std_mean((part @ others.T).topk(min(top, len(others))).values, dim=1))
            for part in table.split(AT_ONCE)
        ]
        deviation, mean = torch.cat(statistics, dim=1)
        deviation = deviation.clamp(min=1e-6)
        scores = (
            (scores - mean[left]) / deviation[left] + (scores - mean[right]) / deviation[right]
        ) / 2
    return scores.tolist()


def _directions(embeddings: Tensor, names: Sequence[str]) -> Tensor:
    lengths = embeddings.norm(dim=1, keepdim=True)
    bad = ~(lengths.isfinite() & (lengths > 0)).squeeze(1)
    if bad.any():
        first = names[int(bad.nonzero()[0])]
        raise ValueError(
            f"{int(bad.sum())} of {len(names)} embeddings are not finite or are zero; the first is "
            f"that of {first}"
        )
    return embeddings / lengths


# ---------------------------------------------------------------------------------------- measures


def verification(
    scores: Sequence[float],
    targets: Sequence[bool],
    priors: Sequence[float] = (0.01, 0.05),
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> Verification:
    """Measure how well scores tell pairs of one speaker from pairs of two.

    A pair is accepted from a threshold on. The thresholds are all scores and one above them, so
    equal scores are accepted or refused together. The equal error rate is where the polygon through
    these operating points, misses against false alarms, meets the diagonal: between two points both
    rates are interpolated linearly (not on the convex hull). The detection cost is that of the
    evaluations of NIST (such as the 2016 Speaker Recognition Evaluation Plan), divided by the cost
    of the better of accepting all and refusing all:

        (c_miss p_miss p + c_fa p_fa (1 - p)) / min(c_miss p, c_fa (1 - p))

    with the prior p of a target, at the threshold where it is least.

    Args:
        scores: score of each trial, larger for one speaker.
        targets: whether each is of one speaker.
        priors: prior probabilities of a target.
        c_miss: cost of refusing a pair of one speaker.
        c_fa: cost of accepting a pair of two.

    Raises:
        ValueError: a score is not finite, all trials have one label, or a prior or cost is out of
            range.
    """
    if not (0 < c_miss < float("inf") and 0 < c_fa < float("inf")):
        raise ValueError(f"costs are {c_miss} and {c_fa}; allowed: numbers above 0")
    if bad := [p for p in priors if not 0 < p < 1]:
        raise ValueError(f"the prior of a target is {bad[0]}; allowed: between 0 and 1")
    check_both(targets, "the list")
    values, labels = torch.tensor(scores, dtype=torch.float64), torch.tensor(targets)
    if wrong := int((~values.isfinite()).sum()):
        raise ValueError(f"{wrong} of {len(values)} scores are not finite")
    thresholds, place = values.unique(return_inverse=True)  # rising
    counts = torch.zeros(2, len(thresholds) + 1, dtype=torch.long)
    counts[0, 1:] = place[labels].bincount(minlength=len(thresholds))
    counts[1, 1:] = place[~labels].bincount(minlength=len(thresholds))
    below = counts.cumsum(1)  # what each threshold, and one above all, refuses
    totals = below[:, -1].double()
    p_miss, p_fa = below[0] / totals[0], (below[1, -1] - below[1]) / totals[1]
    gap = p_miss - p_fa  # from -1 to 1, rising
    after = int((gap >= 0).nonzero()[0])
    share = (-gap[after - 1] / (gap[after] - gap[after - 1])).item()
    eer = torch.lerp(p_miss[after - 1], p_miss[after], share).item()
    min_dcf = {}
    for p in priors:
        costs = c_miss * p * p_miss + c_fa * (1 - p) * p_fa
        min_dcf[p] = costs.min().item() / min(c_miss * p, c_fa * (1 - p))
    return Verification(eer, min_dcf, thresholds[min(after, len(thresholds) - 1)].item())
