"""The scores of a set of enhanced clips: means, a table by clip, and the best and worst to hear.

    board = Scoreboard(judges, run_folder)
    board.start("test", extremes=3)
    board.add(batch.id, *batch.clean, batch.noisy.data, enhanced)  # as often as there are batches
    metrics = board.finish()  # {"pesq": 2.31, "pesq_noisy": 1.97, "stoi": …, "stoi_noisy": …, …}

`finish` writes ``scores_test.csv`` with a line a clip, and ``audio_test`` with the noisy, enhanced
and clean sound of the clips that scored best and worst by the first measure; `Scoreboard.samples`
are these for `Brain.show`.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import soundfile
from torch import Tensor

from recipes.common.judges import Judges, Scores
from trainer import distributed
from trainer.samples import Audio, Cell

logger = logging.getLogger(__name__)

SHOWN = ("pesq", "stoi", "si_snr")  # what `finish` returns; the others are logged and in the table
NOISY = " (noisy)"  # behind the id of a clip as it was before


class Row(NamedTuple):
    """One clip: its id, what it scores enhanced, what it scored noisy."""

    id: str
    enhanced: Scores
    noisy: Scores


class Sounds(NamedTuple):
    """One clip to hear, (T,) each."""

    noisy: Tensor
    enhanced: Tensor
    clean: Tensor


class Scoreboard:
    """Scores of clips, over all processes, as `Judges` give them while the network goes on.

    Args:
        judges: processes that measure; `finish` waits for them, and they may be shared.
        folder: where table and sounds go, usually that of the run.

    Attributes:
        means: of every measure, by what `finish` found last.
        rows: of every clip of all processes, likewise.
        samples: the clips of this process that are kept to hear, the worst first.

    What clips score noisy is measured once for each id, for as long as the board lives.
    """

    def __init__(self, judges: Judges, folder: str | Path) -> None:
        self.judges, self.folder = judges, Path(folder)
        self.means: dict[str, float] = {}
        self.rows: Sequence[Row] = ()
        self.samples: list[dict[str, Cell]] = []
        self._before: dict[str, Scores] = {}  # noisy
        self.start("valid")

    def start(self, name: str, measures: Sequence[str] | None = None, extremes: int = 0) -> None:
        """Begin a set of clips.

        Args:
            name: of the set, for its files.
            measures: computed for each clip; all that the judges know by default.
            extremes: number of the best and of the worst clips that are kept to hear.
        """
        self.name, self.extremes = name, extremes
        self.measures = tuple(measures or self.judges.measures)
        self.judges.forget()
        self._ids: list[str] = []
        self._scores: dict[str, Scores] = {}
        self._sounds: dict[str, Sounds] = {}

    def add(
        self, ids: Sequence[str], clean: Tensor, lengths: Tensor, noisy: Tensor, enhanced: Tensor
    ) -> None:
        """Have the clips of a batch measured.

        Args:
            ids: names of the clips.
            clean: padded signals (B, T) of the clean speech.
            lengths: number of samples of each (B,).
            noisy: padded signals (B, T) of the noisy speech.
            enhanced: padded signals (B, T) of the enhanced speech.
        """
        signals = (each.detach().float().cpu() for each in (noisy, enhanced, clean))
        for id, length, *sides in zip(ids, lengths.tolist(), *signals, strict=True):
            sounds = Sounds(*(side[:length].clone() for side in sides))
            self._ids.append(id)
            self.judges.submit(id, sounds.clean, sounds.enhanced, self.measures)
            if not set(self.measures) <= set(self._before.get(id, ())):
                self.judges.submit(id + NOISY, sounds.clean, sounds.noisy, self.measures)
            if self.extremes:
                self._sounds[id] = sounds
            self._take(self.judges.collect(wait=False))

    def finish(self) -> dict[str, float]:
        """Wait for the judges, write table and sounds, and return the means. A collective.

        Returns:
            The means over all processes of ``SHOWN``, and by ``NAME_noisy`` of the noisy clips. A
            mean is over the clips that could be measured both noisy and enhanced.

        Raises:
            ValueError: a measure could be computed for no clip.
        """
        self._take(self.judges.collect())
        mine = [(id, self._scores.get(id, {}), self._before.get(id, {})) for id in self._ids]
        rows = [Row(*each) for part in distributed.all_gather_json(mine) for each in part]
        rows.sort(key=lambda row: row.id)
        self.rows, self.means = rows, self._means(rows)
        means = self.means
        if distributed.is_main():
            self._write(rows, means)
        if self.name != "valid":  # Its best and worst clips are others at each epoch.
            self._save_sounds(rows)
        self.samples = [self._sample(id) for id in self._ranked(self._sounds.keys() & self._scores)]
        self._scores, self._sounds = {}, {}
        logger.info("%s: %s", self.name, ", ".join(f"{n} {m:.3f}" for n, m in means.items()))
        return {name: mean for name, mean in means.items() if name.split("_noisy")[0] in SHOWN}

    @property
    def sounds(self) -> Path:
        """Folder of the best and the worst clips."""
        return self.folder / f"audio_{self.name}"

    def _take(self, found: dict[str, Scores]) -> None:
        for id, scores in found.items():
            if id.endswith(NOISY):
                known = self._before.setdefault(id.removesuffix(NOISY), {})
                known.update(scores)
            else:
                self._scores[id] = scores
        # Only what may still be among the extremes is kept: a test set need not fit in memory.
        order = self._ranked(self._sounds.keys() & self._scores.keys())
        for id in order[self.extremes : max(self.extremes, len(order) - self.extremes)]:
            del self._sounds[id]

    def _ranked(self, ids: Any) -> list[str]:
        first = self.measures[0]
        return sorted(
            (id for id in ids if first in self._scores[id]),
            key=lambda id: (self._scores[id][first], id),
        )

    def _means(self, rows: Sequence[Row]) -> dict[str, float]:
        means = {}
        for name in self.measures:
            both = [row for row in rows if name in row.enhanced and name in row.noisy]
            if not both:
                reasons = "; ".join(f"{id}: {why}" for id, why in self.judges.failed.items())
                raise ValueError(
                    f"{name} of {self.name}: none of {len(rows)} clips could be measured "
                    f"({reasons or 'no reasons on this process'})"
                )
            if len(both) < len(rows):
                lost = len(rows) - len(both)
                logger.warning(
                    "%s of %s: %d of %d clips could not be measured, the mean is over the others",
                    name, self.name, lost, len(rows),
                )  # fmt: skip
            means[name] = fmean(row.enhanced[name] for row in both)
            means[f"{name}_noisy"] = fmean(row.noisy[name] for row in both)
        return means

    def _write(self, rows: Sequence[Row], means: dict[str, float]) -> None:
        """The table: a line for each clip, empty where it could not be measured, then the means."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"scores_{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["id", *means])
            for row in rows:
                cells = [_cell(side.get(n)) for n in self.measures for side in row[1:]]
                table.writerow([row.id, *cells])
            table.writerow(["mean", *map(_cell, means.values())])

    def _save_sounds(self, rows: Sequence[Row]) -> None:
        """Write the extremes of all processes, each by the process that has it."""
        first = self.measures[0]
        order = sorted((row.enhanced[first], row.id) for row in rows if first in row.enhanced)
        worst = [id for _, id in order[: self.extremes]]
        best = [id for _, id in order[::-1][: self.extremes]]
        folder = self.sounds
        for label, ids in (("best", best), ("worst", worst)):
            for place, id in enumerate(ids, 1):
                if id not in self._sounds:
                    continue  # another process has it
                folder.mkdir(parents=True, exist_ok=True)
                name = re.sub(r"[^\w.-]", "_", id)[:80]
                for kind, signal in self._sounds[id]._asdict().items():
                    path = folder / f"{label}_{place}_{name}_{kind}.wav"
                    soundfile.write(path, signal.clamp(-1, 1).numpy(), self.judges.sample_rate)

    def _sample(self, id: str) -> dict[str, Cell]:
        """A clip with what it scores enhanced and noisy, for `Brain.show`."""
        row: dict[str, Cell] = {"id": id}
        for name in (each for each in self.measures if each in SHOWN):
            row[name] = self._scores[id].get(name)
            row[f"{name} noisy"] = self._before.get(id, {}).get(name)
        sounds = self._sounds[id]._asdict().items()
        rate = self.judges.sample_rate
        return row | {name: Audio(sound, rate, spectrogram=True) for name, sound in sounds}


def _cell(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"
