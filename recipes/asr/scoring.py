"""Word and character error rates, over all processes, and what the errors look like."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from trainer import distributed
from trainer.samples import Aligned, Audio, Cell

try:
    import jiwer
except ImportError as error:
    raise ImportError("error rates need jiwer: pip install 'cortex-speech[recipes]'") from error


class Transcribed(NamedTuple):
    """An utterance with what was said and what was recognised."""

    id: str
    said: str
    heard: str


class Scores:
    """The errors of a set of utterances: what was substituted, deleted and inserted.

    Rates are of the whole set (all errors over all words), not means over utterances. The sounds of
    the ``shown`` worst utterances, and of as many chosen at random, are kept to hear.
    """

    def __init__(self, shown: int = 5) -> None:
        self.shown = shown
        self.utterances: list[Transcribed] = []
        self.rate = 16000
        # What orders them comes first: errors in per cent, and a random number.
        self._worst: list[tuple[float, Transcribed, Tensor | None]] = []
        self._chosen: list[tuple[float, Transcribed, Tensor | None]] = []

    def add(
        self,
        ids: Sequence[str],
        said: Sequence[str],
        heard: Sequence[str],
        signals: tuple[Tensor, Tensor] | None = None,
        rate: int = 16000,
    ) -> None:
        """Take in a batch, perhaps with its sounds (B, T) and their lengths (B,) on the host."""
        added, self.rate = [*map(Transcribed, ids, said, heard)], rate
        self.utterances += added
        sounds = [None] * len(added) if signals is None else zip(*signals, strict=True)
        for each, sound in zip(added, sounds, strict=True):
            wave = None if sound is None else sound[0][: int(sound[1])].clone()
            self._worst.append((-_per_cent(_words(each)), each, wave))
            self._chosen.append((zlib.crc32(each.id.encode()), each, wave))
        for kept in (self._worst, self._chosen):
            kept.sort(key=lambda each: each[:2])
            del kept[self.shown :]

    def samples(self) -> list[dict[str, Cell]]:
        """Rows for `Brain.show`: of this process, the worst first, then those chosen at random."""
        rows: dict[str, dict[str, Cell]] = {}
        for _, each, wave in (*self._worst, *self._chosen):
            rows[each.id] = {
                "id": each.id,
                "WER": round(_per_cent(_words(each)), 1),
                "said and heard": Aligned(each.said, each.heard),
            }
            if wave is not None:
                rows[each.id]["sound"] = Audio(wave, self.rate)
        return list(rows.values())

    def gather(self) -> Scores:
        """The utterances of all processes, in the order of their ids. A collective."""
        every = Scores()
        for part in distributed.all_gather_json(self.utterances):
            every.utterances += (Transcribed(*each) for each in part)
        every.utterances.sort()
        return every

    def rates(self) -> dict[str, float]:
        """Word and character error rate in per cent: ``{"wer": 3.21, "cer": 1.1}``.

        Raises ValueError where nothing was said, since there is nothing to divide by.
        """
        said, heard = [u.said for u in self.utterances], [u.heard for u in self.utterances]
        if not any(said):
            raise ValueError(f"no error rate: {len(said)} utterances, none with a transcript")
        return {
            "wer": _per_cent(jiwer.process_words(said, heard)),
            "cer": _per_cent(jiwer.process_characters(said, heard)),
        }

    def write(self, path: Path, worst: int = 20, chosen: int = 20) -> None:
        """Write rates, the worst utterances and some chosen at random, each aligned, as text."""
        rates = self.rates()
        bad_first = sorted(self.utterances, key=lambda u: -_per_cent(_words(u)))
        wrong = [u for u in bad_first if u.said != u.heard]
        sample = random.Random(len(self.utterances)).sample(
            self.utterances, min(chosen, len(self.utterances))
        )
        parts = [
            f"{len(self.utterances)} utterances, {len(wrong)} with errors; "
            f"WER {rates['wer']:.2f} %, CER {rates['cer']:.2f} %",
            f"The {len(wrong[:worst])} worst utterances",
            *map(_aligned, wrong[:worst]),
            f"{len(sample)} utterances chosen at random",
            *map(_aligned, sorted(sample)),
        ]
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _words(utterance: Transcribed) -> jiwer.WordOutput:
    return jiwer.process_words(utterance.said, utterance.heard)


def _per_cent(counts: jiwer.WordOutput | jiwer.CharacterOutput) -> float:
    errors = counts.substitutions + counts.deletions + counts.insertions
    said = counts.hits + counts.substitutions + counts.deletions
    return 100.0 * errors / max(said, 1)  # 1: an utterance without words, heard as some


def _aligned(utterance: Transcribed) -> str:
    """Reference over hypothesis, with S, D and I below what was substituted, deleted, inserted."""
    counts = _words(utterance)
    shown = jiwer.visualize_alignment(counts, show_measures=False, skip_correct=False)
    return f"{utterance.id}: {_per_cent(counts):.0f} %\n" + "\n".join(
        line.rstrip() for line in shown.splitlines() if line[:4] in ("REF:", "HYP:", "    ")
    )
