"""From frames to tokens, against cases worked out by hand."""

import importlib.util
import sys

import pytest
import torch

from recipes.asr.decoding import greedy, known_words, make_decoder

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
