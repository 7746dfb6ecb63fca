"""Speech from texts by a trained synthesiser.

    model = trainer.load("results/tacotron2/demo/1234")
    model.synthesise("Turn left.").save("out.wav")
    speech = model.synthesise("Turn left.", vocoder="results/hifigan/demo/1234")
    print(speech.finished, speech.alignment.shape)

Neither the training nor its data are imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import torch
from torch import nn

from recipes.common.audio import check_made
from recipes.common.mel import LogMel
from recipes.tacotron2.sound import Sounding, make_sound
from recipes.tacotron2.text import readable
from trainer.evaluation import rng_kept_alone
from trainer.inference.model import Model
from trainer.inference.results import Speech
from trainer.options import RunOptions
from trainer.seed import derive
from trainer.untrusted import confined

AT_ONCE = 16  # texts that are synthesised together

Vocoder: TypeAlias = "Sounding | Model | str | os.PathLike[str]"


class Text(NamedTuple):
    """A text to say.

    Attributes:
        name: what messages call it.
        spelled: with its numbers, units and abbreviations as words.
        tokens: numbers of its symbols.
    """

    name: str
    spelled: str
    tokens: list[int]


class Speaker(Model):
    """Synthesiser of a run of this recipe.

    Reads from the YAML ``front``, ``mel``, ``longest``, ``longest_text`` and ``vocoder``.
    """

    best_checkpoint: ClassVar[Mapping[str, str | None]] = {"min_key": "mel_l1"}

    def __init__(
        self, modules: Mapping[str, nn.Module], hparams: Mapping[str, Any], options: RunOptions
    ) -> None:
        super().__init__(modules, hparams, options)
        self._seed = options.seed
        self._limit = frame_limit(self.hparams.longest, self.hparams.mel)

    def prepare(self) -> None:
        """Check that front end and mels fit the network."""
        own, model = self.hparams, self.modules.model
        known = model.net.embedding.num_embeddings
        if len(own.front) > known or own.mel.bands != model.bands:
            raise ValueError(
                f"front has {len(own.front)} symbols and mel {own.mel.bands} bands; the network "
                f"takes up to {known} symbols and makes {model.bands} bands"
            )

    @overload
    def synthesise(
        self, text: str, vocoder: Vocoder | None = None, *, name: str = ...
    ) -> Speech: ...

    @overload
    def synthesise(
        self, text: list[str] | tuple[str, ...], vocoder: Vocoder | None = None, *, name: str = ...
    ) -> list[Speech]: ...

    def synthesise(
        self,
        text: str | list[str] | tuple[str, ...],
        vocoder: Vocoder | None = None,
        *,
        name: str = "the text",
    ) -> Speech | list[Speech]:
        """Say a text, or each text of a list: the same text is the same sound each time.

        Numbers, units and abbreviations are spelled out. A list is synthesised in batches, unless
        the dropout of the pre-net is at work (see `Tacotron`). Mels of a batch are those of each
        text alone but for rounding, from which Griffin and Lim's algorithm may find other phases.

        Args:
            text: a text of up to ``longest_text`` symbols, or several.
            vocoder: a run folder of recipes.hifigan, or the model that `trainer.load` makes of it,
                so that it is loaded once; or another function from log-mels (M, F) to samples (S,).
                None for the vocoder of the run, which is Griffin and Lim's algorithm if the run
                names none.
            name: what messages call the text.

        Returns:
            The speech, with its mel, its alignment, and whether it was finished within ``longest``
            seconds; a list of these for a list.

        Raises:
            ValueError: a text is empty, too long, or has what cannot be read; or the vocoder takes
                other mels.
            TypeError: something else was given.
        """
        several = isinstance(text, list | tuple)
        texts = [
            self._read(each, f"{name} {number}" if several else name)
            for number, each in enumerate(text if several else [text], 1)
        ]
        sound = self.sound(vocoder)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number].tokens))
        size = AT_ONCE if self.modules.model.rest else 1
        found: dict[int, Speech] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            spoken = self._spoken([texts[number] for number in batch], sound)
            found.update(zip(batch, spoken, strict=True))
        speech = [found[number] for number in range(len(texts))]
        return speech if several else speech[0]

    def sound(self, vocoder: Vocoder | None = None) -> Sounding:
        """Return what turns the mels of this model into samples.

        Args:
            vocoder: as `synthesise` takes it.

        Raises:
            ValueError: the vocoder takes other mels; or that of the run is outside of its folder.
        """
        if vocoder is None:
            return self._own_sound
        return make_sound(self.hparams.mel, vocoder, str(self.device))

    @cached_property
    def _own_sound(self) -> Sounding:
        """Vocoder that the run names, which may come from elsewhere: one in its folder."""
        named = self.hparams.vocoder
        try:
            inside = named is None or self.folder is None  # Nothing that came with a folder.
            own = named if inside else confined(self.folder, str(named))
        except ValueError as error:
            raise ValueError(
                f"the vocoder of the run, {error}: name it, as by vocoder=… or --vocoder"
            ) from None
        return make_sound(self.hparams.mel, own, str(self.device))

    def _read(self, text: str, name: str) -> Text:
        """Return the symbols of a text. Raises ValueError where it cannot be read."""
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}; allowed: a str, or a list of them")
        own = self.hparams
        spelled = readable(name, text, own.front)
        (tokens,) = own.front.encode([spelled])
        if len(tokens) > own.longest_text:
            raise ValueError(
                f"{name} has {len(tokens)} symbols; the model has learned to align up to "
                f"{own.longest_text}: divide it into sentences"
            )
        return Text(name, spelled, tokens)

    def _spoken(self, texts: list[Text], sound: Sounding) -> Iterator[Speech]:
        """Synthesise a batch."""
        own, model = self.hparams, self.modules.model
        tokens = [torch.tensor(each.tokens) for each in texts]
        symbols = torch.tensor([len(each) for each in tokens], device=self.device)
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.device)
        # One thread at a time, too, since the network holds the padding of its batch.
        with rng_kept_alone(), torch.inference_mode(), self.autocast():
            # Where the dropout of the pre-net does not rest, a text is still read alike each time.
            torch.manual_seed(derive(self._seed, "say", *texts[0].tokens))
            spoken = model.synthesise(padded, symbols, self._limit)
        # Cloned, since autograd could not use tensors of inference mode.
        mels, counts, attention, stopped = (each.cpu().clone() for each in spoken)
        for n, each in enumerate(texts):
            frames = int(counts[n])
            mel = mels[n, :frames].T.contiguous()
            check_made(each.name, mel)
            steps = attention[n, : frames // model.reduction, : len(each.tokens)]
            yield Speech(
                samples=sound(mel)[None].clone(),
                rate=own.mel.sample_rate,
                text=each.spelled,
                mel=mel,
                mel_config=own.mel.config,
                alignment=steps.repeat_interleave(model.reduction, 0),
                symbols=tuple(own.front.symbols[token] for token in each.tokens),
                finished=bool(stopped[n]),
            )


def frame_limit(longest: float, mel: LogMel) -> int:
    """Return the number of frames in so many seconds: synthesis ends there at the latest."""
    return round(longest * mel.sample_rate / mel.hop)
