"""Error rates, and the text file that shows the errors."""

from pathlib import Path

import pytest
import torch

from recipes.asr import scoring
from recipes.asr.scoring import Scores


@pytest.fixture
def scores() -> Scores:
    found = Scores()
    found.add(["b", "a"], ["one two three four", "five six"], ["one too three", "five six"])
    found.add(["c"], ["seven"], ["seven eight nine"])
    return found


def test_rates_are_of_all_errors_over_all_words(scores: Scores) -> None:
    # A substitution, a deletion and two insertions in seven words; by letters: "w" replaced, five
    # deleted with " four", eleven inserted with " eight nine", in 18 + 8 + 5.
    assert scores.rates() == pytest.approx({"wer": 100 * 4 / 7, "cer": 100 * 17 / 31})


def test_words_heard_in_silence_are_errors() -> None:
    scores = Scores()
    scores.add(["a", "b"], ["", "one"], ["noise", "one"])
    assert scores.rates()["wer"] == 100.0


def test_the_sounds_of_the_worst_and_of_some_at_random_are_kept() -> None:
    scores = Scores(shown=2)
    for n in range(0, 40, 2):
        ids, said = [f"{n:02}", f"{n + 1:02}"], ["one two"] * 2
        heard = ["one" if n in (10, 20) else "one two", "one two"]
        sounds = torch.full((2, 30), n / 100), torch.tensor([30, 20])
        scores.add(ids, said, heard, sounds, 8000)
    rows = scores.samples()
    assert [row["id"] for row in rows[:2]] == ["10", "20"]
    assert [row["WER"] for row in rows[:2]] == [50.0, 50.0]
    assert 3 <= len(rows) <= 4
    for row in rows:
        number = int(row["id"])
        assert row["sound"].rate == 8000
        assert row["sound"].signal().tolist() == pytest.approx(
            [number // 2 * 2 / 100] * (20 if number % 2 else 30)
        )
    silent = Scores()
    silent.add(["a"], ["one"], ["two"])
    assert list(silent.samples()[0]) == ["id", "WER", "said and heard"]


def test_no_rates_without_words() -> None:
    scores = Scores()
    scores.add(["a"], [""], ["noise"])
    with pytest.raises(ValueError, match="no error rate: 1 utterances, none with a transcript"):
        scores.rates()


def test_the_utterances_of_all_ranks_count_once(
    scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_ranks(mine: list[scoring.Transcribed]) -> list[list[list[str]]]:
        return [[list(each) for each in mine], [["0", "one", "one"]]]  # as JSON gives them back

    monkeypatch.setattr(scoring.distributed, "all_gather_json", two_ranks)
    every = scores.gather()
    assert [utterance.id for utterance in every.utterances] == ["0", "a", "b", "c"]
    assert every.rates()["wer"] == pytest.approx(100 * 4 / 8)
    assert len(scores.utterances) == 3


def test_errors_are_shown_aligned_the_worst_first(scores: Scores, tmp_path: Path) -> None:
    scores.write(tmp_path / "wer_test.txt", worst=1, chosen=2)
    text = (tmp_path / "wer_test.txt").read_text()
    assert text.startswith("3 utterances, 2 with errors; WER 57.14 %, CER 54.84 %\n")
    worst = "\n".join(
        [
            "The 1 worst utterances",
            "",
            "c: 200 %",
            "REF: seven ***** ****",
            "HYP: seven eight nine",
            "               I    I",
            "",
            "2 utterances chosen at random",
        ]
    )
    assert worst in text
    assert text.count("REF: ") == 3
