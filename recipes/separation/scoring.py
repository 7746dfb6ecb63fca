"""Separation measured on a set of mixtures: what was gained over the mixtures themselves, in dB."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from recipes.separation.objectives import best_order, pairwise_si_snr
from trainer import distributed
from trainer.samples import Audio, Cell

try:
    import fast_bss_eval
    import soundfile
except ImportError as error:
    raise ImportError(
        "separation is scored with fast_bss_eval: pip install 'cortex-speech[recipes]'"
    ) from error


@dataclass(frozen=True, order=True)
class Separated:
    """Scores of one mixture in dB, the mean over its sources.

    ``si_snr`` is scale-invariant; ``sdr`` is that of BSS Eval 3, which forgives a filter of 512
    taps (Vincent et al. 2006; computed by fast_bss_eval). Both minus those of the mixture, taken
    as the estimate of each source, are the improvements ``si_snri`` and ``sdri``.
    """

    id: str
    seconds: float
    sources: int
    si_snr: float
    si_snri: float
    sdr: float | None = None
    sdri: float | None = None


@dataclass
class _Heard:
    """A mixture with its signals, to be listened to."""

    row: Separated
    signals: dict[str, Tensor]  # (T,) by file name


class Scores:
    """The scores of a set of mixtures, and the signals of its ``shown`` worst and best.

    Without ``sdr`` only the SI-SNR is computed, which costs next to nothing.
    """

    def __init__(self, sample_rate: int, sdr: bool = True, shown: int = 3) -> None:
        self.sample_rate, self.sdr, self.shown = sample_rate, sdr, shown
        self.rows: list[Separated] = []
        self._heard: list[_Heard] = []

    def add(
        self,
        ids: Sequence[str],
        mixtures: Tensor,
        sources: Tensor,
        estimates: Tensor,
        lengths: Tensor,
    ) -> None:
        """Take in a batch: mixtures (B, T), sources and estimates (B, S, T), samples (B,)."""
        # Off the device: filters of 512 taps are solved best in float64.
        signals = [each.detach().cpu().double() for each in (mixtures, sources, estimates)]
        for name, length, mixture, truth, found in zip(
            ids, lengths.tolist(), *signals, strict=True
        ):
            self._add(name, mixture[:length], truth[:, :length], found[:, :length])

    def _add(self, name: str, mixture: Tensor, sources: Tensor, estimates: Tensor) -> None:
        score, order = best_order(pairwise_si_snr(estimates[None], sources[None]))
        estimates = estimates[order[0]]
        people, samples = sources.shape
        untouched = mixture.expand_as(sources)
        before = pairwise_si_snr(untouched[None], sources[None])[0].diagonal().mean()
        measured = [score.item(), (score - before).item()]
        if self.sdr:
            sdr, sdr_before = (_sdr(sources, each) for each in (estimates, untouched))
            measured += [sdr, sdr - sdr_before]
        row = Separated(name, samples / self.sample_rate, people, *measured)
        self.rows.append(row)
        self._show(row, mixture, sources, estimates)

    def _show(self, row: Separated, mixture: Tensor, sources: Tensor, estimates: Tensor) -> None:
        """Keep the signals if they are among the worst or the best so far."""
        signals = {"mixture": mixture}
        for number, (source, track) in enumerate(zip(sources, estimates, strict=True), 1):
            scale = (source @ track) / (track @ track).clamp(min=1e-12)  # A track has no loudness.
            signals |= {f"source{number}": source, f"estimate{number}": scale * track}
        self._heard.append(_Heard(row, signals))
        self._heard.sort(key=lambda each: _by_gain(each.row))
        if len(self._heard) > 2 * self.shown:
            del self._heard[self.shown]

    def gather(self) -> Scores:
        """The scores of all processes, in the order of ids; signals stay where they are.

        A collective.
        """
        every = Scores(self.sample_rate, self.sdr, self.shown)
        own = [asdict(row) for row in self.rows]
        every.rows = sorted(
            Separated(**row) for part in distributed.all_gather_json(own) for row in part
        )
        every._heard = self._heard
        return every

    def means(self) -> dict[str, float]:
        """The mean improvements over all mixtures: ``{"si_snri": 8.1, "sdri": 8.6}``."""
        names = ("si_snri", "sdri") if self.sdr else ("si_snri",)
        columns = {name: [getattr(row, name) for row in self.rows] for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items()}

    def write_table(self, path: Path) -> None:
        """A csv with a line per mixture."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(Separated)])
            for row in self.rows:
                cells = asdict(row).values()
                writer.writerow([f"{v:.3f}" if isinstance(v, float) else v for v in cells])

    def samples(self) -> list[dict[str, Cell]]:
        """Rows for `Brain.show`: the worst and the best mixtures of this process."""
        rows = []
        for row, signals in ((each.row, each.signals) for each in self._heard):
            peak = max(1.0, *(float(each.abs().max()) for each in signals.values()))
            scores = {
                n: getattr(row, n) for n in ("si_snri", "sdri") if getattr(row, n) is not None
            }
            sounds = {
                name: Audio(each / peak, self.sample_rate, spectrogram=True)
                for name, each in signals.items()
            }
            rows.append({"id": row.id, **scores, **sounds})
        return rows

    def write_audio(self, folder: Path) -> None:
        """The worst and the best mixtures as 32-bit WAV, a folder each: ``worst1``, ``best1`` ….

        With several processes each writes those that it separated.
        """
        ranked = sorted(self.rows, key=_by_gain)
        own = {heard.row: heard.signals for heard in self._heard}
        for kind, rows in (("worst", ranked), ("best", ranked[::-1])):
            for number, row in enumerate(rows[: self.shown], 1):
                place = folder / f"{kind}{number}"
                for name, signal in own.get(row, {}).items():
                    place.mkdir(parents=True, exist_ok=True)
                    data = signal.float().numpy()
                    soundfile.write(place / f"{name}.wav", data, self.sample_rate, subtype="FLOAT")


def _by_gain(row: Separated) -> tuple[float, str]:
    return row.si_snri, row.id


def _sdr(sources: Tensor, estimates: Tensor) -> float:
    """The mean SDR over sources (S, T), estimates being in their order."""
    found = fast_bss_eval.sdr_loss(estimates, sources, filter_length=512, clamp_db=100)
    return -float(torch.as_tensor(found).mean())
