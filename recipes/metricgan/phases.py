"""The phases of a training as data: which passes an epoch is made of, and their batches.

    phases:
      - !new:recipes.metricgan.phases.Phase {name: warm_up, epochs: 4, passes: [spectral]}
      - !new:recipes.metricgan.phases.Phase {name: metric, epochs: 9, items: 100}

One `fit` goes through the epochs of all phases. Each of its batches says which pass it belongs to,
so that a run which is stopped anywhere goes on there, as any other run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipes.metricgan.history import History
from trainer.data import BadItem, in_epoch, report_bad
from trainer.seed import derive

# What a batch may be for: the generator by its spectral loss; enhancing (no step; scores are asked
# for); the discriminator on this epoch's signals; on those of past epochs; the generator against
# the discriminator.
PASSES = ("spectral", "enhance", "current", "history", "generator")
METRIC = ("enhance", "current", "history", "current", "generator")  # MetricGAN+, section 2.2


@dataclass(frozen=True)
class Phase:
    """A number of epochs that are made alike.

    Args:
        name: for the log, and for metrics: ``pesq_warm_up`` is the PESQ of the phase ``warm_up``.
        epochs: how many.
        items: utterances that are drawn for an epoch, over all processes; null: all there are.
        batch_size: utterances of a batch, on one process.
        passes: what is done with them, one after the other.
    """

    name: str
    epochs: int
    items: int | None = None
    batch_size: int = 1
    passes: Sequence[str] = METRIC

    def __post_init__(self) -> None:
        for name in ("epochs", "items", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} of the phase {self.name!r} is {value!r}; allowed: 1, 2 …")
        for each in self.passes:
            if each not in PASSES:
                raise ValueError(
                    f"the phase {self.name!r} has a pass {each!r}; allowed: {', '.join(PASSES)}"
                )
        if not self.passes:
            raise ValueError(f"the phase {self.name!r} has no passes")
        before = (
            self.passes[: self.passes.index("current")] if "current" in self.passes else ["enhance"]
        )
        if "enhance" not in before:
            raise ValueError(
                f"the phase {self.name!r} trains the discriminator before anything is enhanced; "
                "put the pass 'enhance' before 'current'"
            )

    @property
    def enhances(self) -> bool:
        """True if the generator learns in this phase."""
        return bool({"spectral", "generator"} & set(self.passes))


class Phases:
    """The phases of a run, one after the other."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.all = tuple(phases)
        names = [phase.name for phase in self.all]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"phases need a name of its own each, and there must be one: {names}")
        if not any(phase.enhances for phase in self.all):
            raise ValueError(
                f"no phase trains the generator: {', '.join(names)}; one needs the pass 'spectral' "
                "or 'generator'"
            )

    @property
    def epochs(self) -> int:
        """Return the epochs of all phases together."""
        return sum(phase.epochs for phase in self.all)

    def bests(self, target: str) -> dict[str, str]:
        """Return the metric that chooses the checkpoint of each phase of the generator.

        The last phase is judged by the target in each of its epochs, others by their state when the
        next one begins.
        """
        return {phase.name: f"{target}_{phase.name}" for phase in self.all if phase.enhances}

    def of(self, epoch: int) -> Phase:
        """The phase of an epoch, counted from 1; behind the last epoch it is the last phase."""
        for phase in self.all:
            if epoch <= phase.epochs:
                return phase
            epoch -= phase.epochs
        return self.all[-1]

    def outcome(self, epoch: int) -> str | None:
        """The phase of the generator whose outcome there is after an epoch, if any.

        Of the last such phase that is each of its epochs. Of those before, whose outcome is what
        the next one begins with, it is the last epoch before that: a judge's, if one comes between.
        """
        begun = [e for e in range(1, epoch + 1) if self.of(e).enhances]
        if not begun:
            return None
        name = self.of(begun[-1]).name
        last = [phase.name for phase in self.all if phase.enhances][-1]
        following = self.of(epoch + 1)
        ends = following.enhances and following.name != name
        return name if ends or name == self.of(epoch).name == last else None


class Draw(NamedTuple):
    """One item of a batch."""

    what: str  # one of PASSES
    index: int  # in the training set
    epoch: int  # whose noise it is heard with
    weight: float = 1.0  # 0: it stands in, since this process has no item left
    record: int = -1  # where in the history it is
    closes: bool = False  # whether its batch is the last of its pass


class Passes:
    """The batches of each epoch, as lists of `Draw`: the ``batch_sampler`` of the training.

    An epoch's utterances are drawn from (seed, epoch) and the same in all of its passes. Of every
    ``num_replicas`` batches each process has one; of what is left, an equal share. So the processes
    see together what one sees with batches so many times as large. All have equally many batches of
    each pass, since a process without an item gets one that weighs nothing.
    """

    def __init__(
        self,
        phases: Phases,
        size: int,
        history: History,
        seed: int,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.phases, self.size, self.history, self.seed = phases, size, history, seed
        self.rank, self.num_replicas = rank, num_replicas
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Later iterations give this epoch."""
        self.epoch = max(epoch, 1)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[list[Draw]]:
        phase = self.phases.of(self.epoch)
        generator = torch.Generator().manual_seed(derive(self.seed, "utterances", self.epoch))
        drawn = torch.randperm(self.size, generator=generator).tolist()[: phase.items]
        for number, what in enumerate(phase.passes):
            if what == "history":
                batches = self._past(phase.batch_size, number)
            else:
                batches = self._present(what, drawn, phase.batch_size)
            for place, batch in enumerate(batches, 1):
                yield [draw._replace(closes=place == len(batches)) for draw in batch]

    def _present(self, what: str, drawn: list[int], size: int) -> list[list[Draw]]:
        """This process's part of the epoch's utterances."""
        together, batches = size * self.num_replicas, []
        for start in range(0, len(drawn), together):
            turn = drawn[start : start + together]
            first, last = (len(turn) * r // self.num_replicas for r in (self.rank, self.rank + 1))
            batch = [Draw(what, index, self.epoch) for index in turn[first:last]]
            batches.append(batch or [Draw(what, turn[0], self.epoch, weight=0.0)])
        return batches

    def _past(self, size: int, number: int) -> list[list[Draw]]:
        """This process's own history; each process has as many batches as the one with the most."""
        seed = derive(self.seed, "history", self.epoch, number, self.rank)
        draws = [
            Draw("history", each.index, each.epoch, record=place)
            for place, each in self.history.draw(seed)
        ]
        count = math.ceil(self.history.most / size)
        stand_in = [Draw("history", 0, self.epoch, weight=0.0)]
        return [draws[i * size : (i + 1) * size] or stand_in for i in range(count)]


class Drawn(Dataset[dict[str, Any]]):
    """A dataset of pairs, asked by `Draw`.

    A pair's noise follows from (seed, epoch, item): it is the same in all passes of an epoch, and
    again when the history asks for the pair of a past one. A pair that cannot be read weighs
    nothing, so that each pass keeps its batches on every process.
    """

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        weight = draw.weight
        try:
            with in_epoch(draw.epoch):
                pair: Mapping[str, Any] = self.pairs[draw.index]
        except BadItem as bad:
            report_bad(bad.path, bad.reason)
            silence = torch.zeros(1)
            pair, weight = {"id": str(bad.path), "noisy": silence, "clean": silence}, 0.0
        return {
            "id": pair["id"], "noisy": pair["noisy"], "clean": pair["clean"], "weight": weight,
            "what": draw.what, "index": draw.index, "epoch": draw.epoch, "record": draw.record,
            "closes": draw.closes,
        }  # fmt: skip

    def count_files(self, draws: Iterable[Draw]) -> int:
        """Return the number of different files of these draws."""
        indices = {draw.index for draw in draws}
        count = getattr(self.pairs, "count_files", len)
        return int(count(indices))

    def name_of(self, draw: Draw) -> str:
        """An item in an error message."""
        return f"{self.pairs.name_of(draw.index)} of the pass {draw.what!r}"


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of values (B,) by their weights (B,); 0 where all of these are 0."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-8)
