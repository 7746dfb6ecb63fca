"""Sounds from log-mel spectrograms by a trained vocoder.

    model = trainer.load("results/hifigan/demo/1234")
    model.vocode("mel.npy").save("out.wav")
    sound = model.vocode(mel)                      # (M, F), in natural logarithm
    sound = model.vocode("speech.flac")            # resynthesis: the sound of its own mels
    for piece in model.vocode_stream(mels): ...    # of any length, in constant memory

Shapes: B signals, M mel bands, F frames, S = F * hop samples, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from recipes.common.audio import check_made
from recipes.common.hearing import Given, One, Samples, Several, Source, as_tensor, given_sounds
from recipes.common.mel import LogMel, check_mel, read_mel
from recipes.common.streaming import converted
from recipes.common.vocoder import check_front_end
from trainer.inference.model import Model
from trainer.inference.results import Sound, Speech

MELS = (".npy", ".pt")  # suffixes of mel files
CHUNK = 256  # frames that are turned into sound at once
AT_ONCE = 8  # mels of a batch that are turned into sound at once


class _Mel(NamedTuple):
    """A spectrogram that was given, in pieces (…, M, ·), and what messages call it."""

    name: str
    pieces: Iterator[Tensor]


class Vocoder(Model):
    """Vocoder of a run of this recipe: the generator, with the front end whose mels it takes.

    Reads from the YAML ``best``.
    """

    uses = ("generator", "mel")

    @property
    def best_checkpoint(self) -> dict[str, str | None]:
        """The metric that chooses the checkpoint to use; None: the newest."""
        return {"min_key": self.hparams.best}

    def prepare(self) -> None:
        """Check that the front end makes the mels that the generator takes."""
        check_front_end(self.modules.generator, self.modules.mel)

    @property
    def mel(self) -> LogMel:
        """Front end: sounds to the mels that the vocoder takes."""
        front: LogMel = self.modules.mel
        return front

    @property
    def sample_rate(self) -> int:
        """Rate of what the vocoder makes of mels, in Hz."""
        return self.mel.sample_rate

    @overload
    def vocode(self, given: One, rate: int | None = None) -> Sound: ...

    @overload
    def vocode(self, given: Several, rate: int | None = None) -> list[Sound]: ...

    def vocode(self, given: Given, rate: int | None = None) -> Sound | list[Sound]:
        """Return the sound of a mel, or of the mels of a sound, of any length.

        The memory beside the result does not depend on the length.

        Args:
            given: a mel: log-mels (M, F) as a tensor or an array of NumPy, a file of them (.npy or
                .pt) with its configuration, or the `Speech` of a synthesiser; or a sound: a path, a
                `Sound`, or samples (T,) or (C, T) with their ``rate``; or a list of these. A batch
                of mels (B, M, F) counts as a list, and is computed as one.
            rate: rate of samples, in Hz; mels, files and `Sound` objects have their own.

        Returns:
            A sound of one channel and at the rate of the run for a mel; for a sound one of the same
            rate, length and number of channels. A list of these for a list.

        Raises:
            BadItem: a sound file cannot be used.
            ValueError: a mel is no matrix of finite numbers, or is made otherwise than those of the
                run; samples cannot be used.
        """
        several = isinstance(given, list | tuple)
        each = given if several else [given]
        if rate is None and isinstance(given, Tensor | np.ndarray) and given.ndim == 3:
            parts = self._checked("the batch", given).split(AT_ONCE)
            waves = [self._wave(_Mel("the batch", _pieces("the batch", part))) for part in parts]
            return [Sound(wave[None], self.sample_rate) for part in waves for wave in part]
        mels = [_is_mel(one, rate) for one in each]
        rest = [one for one, is_mel in zip(each, mels, strict=True) if not is_mel]
        bands = self.mel.bands
        if any(getattr(one, "ndim", 0) == 2 and len(one) == bands for one in rest):
            raise ValueError(
                f"samples have {bands} channels, as a mel has bands: give a mel without a rate"
            )
        sources = given_sounds(rest if several else rest[0], rate)[0] if rest else []
        found = iter(sources)
        work = [
            self._mel(one, f" {n}" if several else "") if is_mel else next(found)
            for n, (one, is_mel) in enumerate(zip(each, mels, strict=True), 1)
        ]
        for source in sources:
            _ = source.header  # A file that is missing is told of before the work.
        sounds = [self._sound(one) for one in work]
        return sounds if several else sounds[0]

    def vocode_stream(self, mels: Iterable[Samples]) -> Iterator[Tensor]:
        """Turn a mel that comes in pieces into a sound in pieces, joined that of the whole.

        A piece of sound is given once all frames that it depends on are there; the memory does not
        depend on the length.

        Args:
            mels: pieces (M, F_i), of any lengths, as tensors or arrays of NumPy; or (B, M, F_i).
                There may be pieces without frames.

        Yields:
            Samples (S_i,) within -1 and 1, on the CPU; or (B, S_i).

        Raises:
            ValueError: a piece is no mel of finite numbers, or has another shape than the first.
        """
        return self._stream(self._parts(mels))

    def _parts(self, mels: Iterable[Samples]) -> Iterator[Tensor]:
        """Check pieces of one mel, and cut those that are long."""
        shape: torch.Size | None = None
        for number, given in enumerate(mels, 1):
            mel = self._checked(name := f"piece {number}", given, fewest=0)
            shape = shape or mel.shape[:-1]
            if mel.shape[:-1] != shape:
                raise ValueError(
                    f"{name}: it has the shape {tuple(mel.shape)}; expected: as that of the first, "
                    f"({', '.join(map(str, shape))}, frames)"
                )
            yield from _pieces(name, mel)

    def _stream(self, mels: Iterable[Tensor]) -> Iterator[Tensor]:
        """Turn pieces (…, M, F_i) into samples (…, S_i), which autograd may use."""
        context, hop = self.modules.generator.context, self.mel.hop
        held: Tensor | None = None
        before = 0  # frames at the start of `held` that were turned into sound already
        for piece in mels:
            held = piece if held is None else torch.cat([held, piece], -1)
            while held.shape[-1] >= before + CHUNK + context:
                wave = self._generate(held[..., : before + CHUNK + context])
                yield wave[..., before * hop : (before + CHUNK) * hop].clone()
                done = before + CHUNK
                before = min(done, context)
                held = held[..., done - before :]
        if held is not None and held.shape[-1] > before:
            yield self._generate(held)[..., before * hop :].clone()

    def resynthesise_stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Turn a sound that comes in blocks into the sound of its mels, of as many samples.

        Args:
            blocks: samples (C, T_i) at the rate of the run.

        Yields:
            Samples (C, T_i), on the CPU.
        """
        given = done = 0

        def completed() -> Iterator[Tensor]:
            nonlocal given
            channels = 1
            for block in blocks:
                given, channels = given + block.shape[1], len(block)
                yield block.to(self.device)
            # Silence completes the last frame, and what is too short for a window.
            hop, least = self.mel.hop, max(given, self.mel.edge + 1)
            if given:
                yield torch.zeros(channels, -(-least // hop) * hop - given, device=self.device)

        for wave in self._stream(self.mel.stream(completed())):
            yield wave[:, : given - done]
            done += wave.shape[1]

    def read_mel(self, path: str | Path) -> Iterator[Tensor]:
        """Read a mel file.

        Args:
            path: the file, .npy or .pt, with its configuration.

        Returns:
            Its spectrogram in pieces (M, F_i).

        Raises:
            ValueError: the file cannot be used, or its mel is made otherwise than those of the run;
                within the iteration: it has values that are not finite.
        """
        mel, config = read_mel(path)
        self.mel.check(path, config)
        return _pieces(str(path), mel)

    @torch.inference_mode()
    def _generate(self, mel: Tensor) -> Tensor:
        """(…, M, F) to (…, F * hop), within -1 and 1, on the CPU."""
        flat = mel.reshape(-1, *mel.shape[-2:]).to(self.device, torch.float32)
        with self.autocast():
            wave: Tensor = self.modules.generator(flat)
        return wave.float().cpu().reshape(*mel.shape[:-2], -1)

    def _mel(self, given: Any, number: str) -> _Mel:
        """Return a mel that was given, checked as far as it can be before it is read."""
        if isinstance(given, str | os.PathLike):
            path = Path(os.path.expanduser(given))
            return _Mel(str(path), self.read_mel(path))
        name = f"the mel{number}"
        if isinstance(given, Speech):
            name = f"the speech{number}"
            self.mel.check(name, given.mel_config)
            given = given.mel
        mel = self._checked(name, given)
        check_mel(name, mel)  # No batch within a list.
        return _Mel(name, _pieces(name, mel))

    def _checked(self, name: str, given: Any, fewest: int = 1) -> Tensor:
        """Return a mel (M, F) or mels (B, M, F) as a tensor. Raises ValueError."""
        mel = as_tensor(given, name)
        if mel.ndim < 2:
            raise ValueError(
                f"{name}: it has the shape {tuple(mel.shape)}; allowed: log-mels "
                f"({self.mel.bands}, frames), or samples with their rate, as in rate=16000"
            )
        check_mel(name, mel[0] if mel.ndim == 3 and len(mel) else mel, fewest)
        if mel.shape[-2] != self.mel.bands:
            raise ValueError(
                f"{name}: it has the shape {tuple(mel.shape)}; expected: {self.mel.bands} bands "
                "before the frames (of samples, give the rate)"
            )
        return mel

    def _sound(self, given: Source | _Mel) -> Sound:
        if isinstance(given, _Mel):
            return Sound(self._wave(given)[None], self.sample_rate)
        rate = given.header.sample_rate
        made = converted(given.blocks(), rate, self.resynthesise_stream, self.sample_rate)
        samples = torch.cat(list(made), 1)
        check_made(given.name, samples)
        return Sound(samples, rate)

    def _wave(self, mel: _Mel) -> Tensor:
        """(…, M, F) to (…, F * hop)."""
        wave = torch.cat(list(self._stream(mel.pieces)), -1)
        check_made(mel.name, wave)
        return wave


def _is_mel(given: Any, rate: int | None) -> bool:
    """Return True for what is a mel, and no sound."""
    if isinstance(given, str | os.PathLike):
        return Path(given).suffix.lower() in MELS
    return isinstance(given, Speech) or (rate is None and isinstance(given, Tensor | np.ndarray))


def _pieces(name: str, mel: Tensor) -> Iterator[Tensor]:
    """Yield mels (…, M, F) in pieces. Raises ValueError for values that are not finite."""
    for piece in mel.split(CHUNK, dim=-1):
        if not torch.isfinite(piece).all():
            raise ValueError(f"{name}: its mel has values that are not finite numbers")
        yield piece.float()
