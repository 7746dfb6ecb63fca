"""From frames of log probabilities to tokens and words: the best path, or a beam search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import extractOne
from torch import Tensor

from recipes.asr.text import Codec

BLANK = 0

Decoder = Callable[[Tensor, Tensor], list[list[int]]]


def make_decoder(name: str, tokens: Sequence[str], beam_size: int = 50) -> Decoder:
    """The decoder of this name, "greedy" or "beam"; ``tokens`` are the vocabulary, blank first.

    It takes log probabilities (B, T, V) and frames (B,) and returns token numbers by utterance.
    """
    if name == "greedy":
        return greedy
    if name == "beam":
        return beam(tokens, beam_size)
    raise ValueError(f"decoder is {name!r}; allowed: greedy, beam")


def greedy(log_probs: Tensor, frames: Tensor) -> list[list[int]]:
    """The likeliest token of each frame, with repetitions joined and blanks removed."""
    best = log_probs.argmax(-1).cpu()
    paths = [torch.unique_consecutive(path[:n]) for path, n in zip(best, frames.cpu(), strict=True)]
    return [path[path != BLANK].tolist() for path in paths]


def known_words(text: str, lexicon: Collection[str] | None) -> str:
    """Return the text with each word that ``lexicon`` lacks replaced by the nearest that it has.

    Nearest by the number of edits, as a share of the longer word's letters. For a closed
    vocabulary: what a network spells wrong, "hirteen", can only be one of the words that are said.
    With an empty lexicon, or None, words are left as they are.
    """
    if not lexicon:
        return text
    ordered = sorted(lexicon)  # of several that are equally near, the first

    def nearest(word: str) -> str:
        return str(extractOne(word, ordered, scorer=Levenshtein.normalized_similarity)[0])

    return " ".join(word if word in lexicon else nearest(word) for word in text.split())


def beam(tokens: Sequence[str], size: int) -> Decoder:
    """The likeliest token sequence, summed over its paths, among the ``size`` best prefixes.

    torchaudio's decoder, without lexicon and language model; it runs on the CPU.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "decoder: beam needs flashlight-text: pip install flashlight-text (or set "
            "decoder: greedy, which needs nothing)"
        ) from error
    search = ctc_decoder(
        lexicon=None,
        tokens=list(tokens),
        beam_size=size,
        blank_token=tokens[BLANK],
        sil_token=tokens[BLANK],  # added at both ends of what is found, and removed below
        log_add=True,
    )

    def decode(log_probs: Tensor, frames: Tensor) -> list[list[int]]:
        best = search(log_probs.float().cpu().contiguous(), frames.cpu())
        return [[t for t in found[0].tokens.tolist() if t != BLANK] for found in best]

    return decode


# ------------------------------------------------------------------------------------ word times


class Token(NamedTuple):
    """A token in the frames of an utterance.

    Attributes:
        start: its first frame.
        end: the frame behind its last one.
        score: mean of its probability over these frames.
    """

    start: int
    end: int
    score: float


def align(numbers: Sequence[int], log_probs: Tensor) -> list[Token]:
    """Return the frames of tokens on their likeliest path.

    Args:
        numbers: tokens that were decoded, without blanks.
        log_probs: log probabilities (T, V) of the frames that they were decoded from.
    """
    if not numbers:
        return []
    from torchaudio.functional import forced_align, merge_tokens

    path, scores = forced_align(log_probs[None], torch.tensor([numbers]), blank=BLANK)
    spans = merge_tokens(path[0], scores[0].exp(), blank=BLANK)
    return [Token(span.start, span.end, float(span.score)) for span in spans]


def token_words(codec: Codec, numbers: Sequence[int]) -> list[list[int]]:
    """Return for each word of a text the places of its tokens: those that make it longer."""
    groups: list[list[int]] = []
    before = ""
    for place in range(len(numbers)):
        text = codec.decode(numbers[: place + 1])
        if text != before:
            while len(groups) < len(text.split()):
                groups.append([])
            groups[-1].append(place)
        before = text
    return groups
