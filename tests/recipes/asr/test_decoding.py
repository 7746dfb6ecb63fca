"""From frames to tokens, against cases worked out by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from recipes.asr.decoding import align, greedy, known_words, make_decoder, token_words
from recipes.asr.text import Characters, Pieces

TOKENS = ["<blank>", "a", "b", " "]


def frames_of(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).clamp(min=1e-9).log().unsqueeze(0)


def path_of(text: str) -> torch.Tensor:
    """Log probabilities of which this is the best path; "-" is the blank."""
    best = torch.tensor(["-ab ".index(letter) for letter in text])
    return torch.nn.functional.one_hot(best, 4).float().mul(3).log_softmax(-1)


def test_repetitions_are_joined_and_blanks_removed() -> None:
    log_probs = torch.stack([path_of("aa-abb- a-"), path_of("----------"), path_of("babababab-")])
    frames = torch.tensor([10, 10, 4])  # what follows is padding
    assert greedy(log_probs, frames) == [[1, 1, 2, 3, 1], [], [2, 1, 2, 1]]


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder is 'beem'; allowed: greedy, beam"):
        make_decoder("beem", TOKENS)


def test_without_flashlight_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchaudio.models.decoder", raising=False)
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", None)
    with pytest.raises(ImportError, match="needs flashlight-text: pip install flashlight-text"):
        make_decoder("beam", TOKENS)


@pytest.mark.skipif(
    importlib.util.find_spec("flashlight") is None, reason="flashlight-text is not installed"
)
class TestBeam:
    def test_the_sum_over_paths_wins_over_the_best_path(self) -> None:
        # The best path is two blanks, 0.36; "a" has three paths, 0.24 + 0.24 + 0.16 in all.
        log_probs = frames_of((0.6, 0.4, 0.0, 0.0), (0.6, 0.4, 0.0, 0.0))
        assert greedy(log_probs, torch.tensor([2])) == [[]]
        assert make_decoder("beam", TOKENS, 10)(log_probs, torch.tensor([2])) == [[1]]

    def test_repetitions_spaces_and_padding(self) -> None:
        log_probs = torch.stack([path_of("aa-abb- a-"), path_of("babababab-")])
        found = make_decoder("beam", TOKENS, 10)(log_probs, torch.tensor([10, 4]))
        assert found == [[1, 1, 2, 3, 1], [2, 1, 2, 1]]


def test_misspelt_words_become_the_nearest_known_ones() -> None:
    lexicon = frozenset({"number", "thirteen", "thirty", "eighth", "the"})
    assert known_words("munmber hirteen the ighth", lexicon) == "number thirteen the eighth"
    assert known_words("", lexicon) == ""
    assert known_words("hirteen", []) == known_words("hirteen", None) == "hirteen"


def test_tokens_are_in_the_frames_of_the_likeliest_path() -> None:
    log_probs = path_of("aa-abb- a-")
    score = float(log_probs.max().exp())
    found = align([1, 1, 2, 3, 1], log_probs)
    assert [(each.start, each.end) for each in found] == [(0, 2), (3, 4), (4, 6), (7, 8), (8, 9)]
    assert all(each.score == pytest.approx(score) for each in found)
    # Tokens of another decoder are where they are likeliest, too.
    (only,) = align([2], path_of("--bb----aa"))
    assert (only.start, only.end) == (2, 4)
    assert align([], log_probs) == []


def test_the_greedy_path_is_its_own_alignment() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        log_probs = (3 * torch.randn(30, 5)).log_softmax(-1)
        (tokens,) = greedy(log_probs[None], torch.tensor([30]))
        path = log_probs.argmax(-1).tolist()
        runs = [
            n for n in range(30) if path[n] != 0 and (n == 0 or path[n - 1] != path[n])
        ]  # first frames of tokens
        found = align(tokens, log_probs)
        assert [each.start for each in found] == runs
        for number, each in zip(tokens, found, strict=True):
            assert path[each.start : each.end] == [number] * (each.end - each.start)


def test_words_have_the_places_of_their_tokens(tmp_path: Path) -> None:
    codec = Characters()
    numbers = codec.encode("  it's one  two ")
    assert token_words(codec, numbers) == [[2, 3, 4, 5], [7, 8, 9], [12, 13, 14]]
    assert token_words(codec, codec.encode("   ")) == token_words(codec, []) == []
    texts = [f"{a} {b} hundred" for a in ("one", "two", "six") for b in ("ten", "five", "four")]
    pieces = Pieces(tmp_path / "pieces", 28)
    pieces.fit(texts)
    for text in texts:
        numbers = pieces.encode(text)
        groups = token_words(pieces, numbers)
        words = [pieces.decode([numbers[place] for place in group]) for group in groups]
        assert words == text.split()
