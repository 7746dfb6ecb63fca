"""Models that enhance speech, and the command line of their ``infer.py``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

import trainer
from recipes.common.audio import BLOCK, check_made
from recipes.common.command import arguments, told
from recipes.common.hearing import (
    Given,
    One,
    Samples,
    Several,
    Source,
    as_rate,
    as_samples,
    given_sounds,
)
from recipes.common.resampling import delay, resample
from recipes.common.streaming import (
    Chunks,
    converted,
    enhance_files,
    enhance_signals,
    enhanced_blocks,
    targets,
)
from trainer.inference.model import Model
from trainer.inference.results import Sound
from trainer.options import RunOptions

# A chunk of a stream with more channels than this, and than samples, is taken as transposed.
MOST_CHANNELS = 32


class EnhancementModel(Model):
    """Speech enhancement in overlapping chunks, by the generator of a run.

    Recipes subclass it with `network`. Reads from the YAML ``sample_rate`` and ``chunks``.

    Attributes:
        sample_rate: rate of the network, in Hz.
        chunks: lengths of the chunks and of their overlap.
    """

    uses: ClassVar[Sequence[str]] = ("generator",)

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        self.sample_rate = as_rate(self.hparams.sample_rate)
        self.chunks: Chunks = self.hparams.chunks
        if not isinstance(self.chunks, Chunks):
            raise ValueError(
                f"chunks is {self.chunks!r}; allowed: !new:recipes.common.streaming.Chunks with "
                "length and overlap"
            )
        self.chunks.check()

    @abstractmethod
    def network(self, chunks: Tensor) -> Tensor:
        """Return chunks (N, T) at ``sample_rate`` enhanced, (N, T)."""

    @property
    def latency(self) -> float:
        """Latency of `enhance_stream` at ``sample_rate``, in seconds: the length of a chunk."""
        return self.latency_at(self.sample_rate)

    def latency_at(self, rate: int) -> float:
        """Return the latency of `enhance_stream` at a rate, in seconds.

        A sample is enhanced once so many seconds of the sound that follows it have come in, or its
        end. The time that the network takes is not counted. Resampling adds up to four periods in
        which both rates have whole numbers of samples, such as 40 ms for 44,100 and 16,000 Hz.

        Args:
            rate: rate of the stream, in Hz.
        """
        own = self.sample_rate
        return self.chunks.length / own + delay(rate, own) + delay(own, rate)

    @overload
    def enhance(self, sounds: One, rate: int | None = None) -> Sound: ...

    @overload
    def enhance(self, sounds: Several, rate: int | None = None) -> list[Sound]: ...

    def enhance(self, sounds: Given, rate: int | None = None) -> Sound | list[Sound]:
        """Enhance a sound, or each sound of a list.

        Sounds of any rate, length and number of channels, each of which is enhanced by itself.

        Args:
            sounds: a path, a `Sound`, or samples (T,) or (C, T) as a tensor or an array of NumPy;
                or a list of these. Short ones are enhanced in batches.
            rate: rate of the samples, in Hz; files and `Sound` objects have their own.

        Returns:
            The sound (C, T), of the same rate, length and channels; a list of these for a list.

        Raises:
            BadItem: a file cannot be used, or the network makes no finite numbers of a sound.
            ValueError: samples cannot be used, or have no rate.
        """
        sources, several = given_sounds(sounds, rate)
        found = [sound for group in self._groups(sources) for sound in self._enhanced(group)]
        return found if several else found[0]

    def _groups(self, sources: Sequence[Source]) -> Iterator[list[Source]]:
        """Yield the sounds in order, together as long as they make one batch of chunks."""
        seconds = (self.chunks.length - self.chunks.overlap) / self.sample_rate
        headers = [source.header for source in sources]  # Read before the work.
        group: list[Source] = []
        rows = 0
        for source, header in zip(sources, headers, strict=True):
            own = header.channels * (1 + int(header.duration / seconds))
            if group and rows + own > self.chunks.at_once:
                yield group
                group, rows = [], 0
            group.append(source)
            rows += own
        if group:
            yield group

    def _enhanced(self, sources: Sequence[Source]) -> list[Sound]:
        own = self.sample_rate
        if len(sources) == 1:  # Block by block: only the result takes memory by its length.
            (source,) = sources
            blocks = converted(source.blocks(), source.header.sample_rate, self._convert, own)
            signals = [torch.cat(list(blocks), dim=1)]
        else:
            heard = [each.read(own, "all") for each in sources]
            made = enhance_signals(heard, self.network, self.chunks)
            signals = [
                resample(signal, own, each.header.sample_rate)[:, : each.header.samples]
                for signal, each in zip(made, sources, strict=True)
            ]
        for source, signal in zip(sources, signals, strict=True):
            check_made(source.name, signal)
        rates = (source.header.sample_rate for source in sources)
        return [Sound(*each) for each in zip(signals, rates, strict=True)]

    def _convert(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Blocks (C, ·) at ``sample_rate`` to enhanced ones."""
        return enhanced_blocks(blocks, self.network, self.chunks)

    def enhance_stream(self, chunks: Iterable[Samples], rate: int) -> Iterator[Tensor]:
        """Enhance a sound that comes in chunks, such as from a microphone.

        A chunk is taken when the next enhanced one is asked for. The result is that of the sound
        as a whole; the memory does not depend on its length.

        Args:
            chunks: samples (T,) or (C, T), of any lengths, as tensors or arrays of NumPy.
            rate: rate of the samples, in Hz.

        Yields:
            Enhanced samples in chunks of other lengths, (T,) or (C, T) as the first one is; all
            together as many as come in, each within `latency` seconds, see `latency_at`.

        Raises:
            ValueError: samples cannot be used, or the number of channels changes.
        """
        return self._stream(chunks, as_rate(rate))

    def _stream(self, chunks: Iterable[Samples], rate: int) -> Iterator[Tensor]:
        flat = False
        number = 0

        def blocks() -> Iterator[Tensor]:
            nonlocal flat, number
            channels = 0
            for number, chunk in enumerate(chunks, 1):
                samples = as_samples(chunk, name := f"chunk {number}")
                if number == 1:
                    channels, flat = len(samples), chunk.ndim == 1
                if len(samples) > max(MOST_CHANNELS, samples.shape[1]):
                    raise ValueError(
                        f"{name} has {len(samples)} channels of {samples.shape[1]} samples; "
                        "allowed: (C, T), channels first"
                    )
                if len(samples) != channels:
                    raise ValueError(
                        f"{name} has {len(samples)} channels, those before it {channels}; "
                        "allowed: the same number in each"
                    )
                yield from samples.clone().split(BLOCK, dim=1)  # The caller may use it again.

        for made in converted(blocks(), rate, self._convert, self.sample_rate):
            check_made(f"the stream up to chunk {number}", made)
            if made.shape[1]:
                # A view would hold the memory of its whole batch.
                yield made[0].clone() if flat else made.clone()


def main(argv: Sequence[str] | None, about: str, kind: type[EnhancementModel]) -> int:
    """Enhance the files that a command line names, ``RUN FILE... -o FOLDER``.

    Args:
        argv: arguments; None for those of the process.
        about: text whose first line says what the command is for.
        kind: class of the model.

    Returns:
        The exit code.
    """
    task = kind.__module__.split(".")[-2]
    parser = arguments(about, task, output="folder for the results")
    given = parser.parse_args(argv)

    def run() -> int:
        targets(given.files, given.output)  # Refuses what cannot be written, before the work.
        model = trainer.load(given.run, given.device, model=kind)
        network, rate = model.network, model.sample_rate
        return enhance_files(given.files, given.output, network, rate, model.chunks)

    return told(run)
