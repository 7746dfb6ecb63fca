"""Models that enhance: streams, batches, latency, and what is built of a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

import trainer
from recipes.common.enhancing import EnhancementModel
from recipes.common.streaming import Chunks
from recipes.metricgan.discriminator import Discriminator as MetricDiscriminator
from recipes.segan.model import Discriminator
from tests.recipes.common.speakers import noise
from tests.recipes.small_runs import CASES, HPARAMS, Case, make_run
from trainer.data import BadItem
from trainer.inference.results import Sound
from trainer.options import RunOptions

OWN = 8000  # Hz
CHUNKS = Chunks(1000, 250, 3)


class Edgy(EnhancementModel):
    """Network whose result depends on a sample's place in its chunk, and not on other chunks."""

    def __init__(self, chunks: Chunks = CHUNKS) -> None:
        own = {"sample_rate": OWN, "chunks": chunks}
        super().__init__({"generator": nn.Linear(1, 1)}, own, RunOptions(device="cpu"))
        self.calls: list[int] = []

    def network(self, chunks: Tensor) -> Tensor:
        self.calls.append(len(chunks))
        with torch.inference_mode():
            return chunks * torch.linspace(0.5, 1.5, chunks.shape[1])


def stereo(samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.stack([noise(samples, seed), noise(samples, seed + 100)])


@pytest.mark.parametrize("rate", [OWN, 44100])
@pytest.mark.parametrize("size", [1, 160, 999, 100_000])
def test_a_stream_is_the_whole_however_it_is_cut(rate: int, size: int) -> None:
    model, samples = Edgy(), 2003 if size == 1 else 12345
    sound = stereo(samples)
    whole = model.enhance(sound, rate).samples
    assert whole.shape == sound.shape
    pieces = [each for piece in sound.split(size, dim=1) for each in (piece[:, :0], piece)]
    found = list(model.enhance_stream(pieces, rate))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-6)
    assert not any(each.is_inference() or each.requires_grad for each in found)
    held = [each.untyped_storage().nbytes() / each.nbytes for each in found]
    assert max(held) == 1.0  # no views of larger ones


def test_chunks_may_be_of_any_kind_and_some_of_them_empty() -> None:
    model, sound = Edgy(), (0.1 * noise(5000)).numpy()
    whole = model.enhance(sound, OWN).samples[0]
    cuts = [0, 0, 1, 400, 400, 2500, 5000]
    pieces = [sound[a:b] for a, b in itertools.pairwise(cuts)]

    def given(kind: Callable[[Any], Any]) -> Tensor:
        return torch.cat(list(model.enhance_stream(map(kind, pieces), OWN)))

    for kind in (
        np.array, torch.tensor, np.float64, np.copy, lambda x: x.astype(">f4"),
        lambda x: np.frombuffer(x.tobytes(), np.float32), lambda x: x[::-1].copy()[::-1],
    ):  # fmt: skip
        assert torch.equal(given(kind), whole)
    assert (given(lambda x: np.round(x * 32768).astype(np.int16)) - whole).abs().max() < 1e-4
    assert list(model.enhance_stream([], OWN)) == []
    assert list(model.enhance_stream([sound[:0]], OWN)) == []


def test_a_buffer_that_is_used_again_is_read_in_time() -> None:
    """Libraries of sound cards give the same memory each time."""
    model, sound = Edgy(), 0.1 * noise(5000)
    for buffer in (torch.empty(100), np.empty(100, np.float32)):

        def microphone(buffer: Any = buffer) -> Iterator[Any]:
            for part in sound.split(100):
                buffer[:] = part if isinstance(buffer, Tensor) else part.numpy()
                yield buffer

        found = torch.cat(list(model.enhance_stream(microphone(), OWN)))
        assert torch.equal(found, model.enhance(sound, OWN).samples[0])


@pytest.mark.parametrize("rate", [OWN, 16000, 11025, 8009])
@pytest.mark.parametrize("chunks", [CHUNKS, Chunks(400, 200, 1)])
def test_no_sample_waits_longer_than_the_latency(rate: int, chunks: Chunks) -> None:
    model, given, done, waited = Edgy(chunks), 0, 0, []
    latency = model.latency_at(rate)
    total = round((2 * latency + 0.5) * rate)

    def source() -> Iterator[Tensor]:
        nonlocal given
        for part in (0.1 * noise(total)).split(rate // 400):
            waited.append(given - done)  # Asked for the next: nothing more comes of those given.
            given += len(part)
            yield part

    for made in model.enhance_stream(source(), rate):
        done += len(made)
    assert done == total
    assert max(waited) / rate <= latency
    assert max(waited) / rate > 0.7 * latency - 0.02
    assert model.latency == model.latency_at(OWN) == chunks.length / OWN
    assert model.latency <= model.latency_at(16000) < model.latency + 0.005


def test_a_stream_without_an_end_is_enhanced_in_a_bounded_memory() -> None:
    model, drawn = Edgy(), 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        for number in itertools.count():
            drawn += 800
            yield 0.1 * noise(800, number)

    found, done = model.enhance_stream(endless(), OWN), 0
    for made in itertools.islice(found, 300):
        done += len(made)
        assert drawn - done <= CHUNKS.length + 800
    assert done > 200_000
    assert max(model.calls) <= CHUNKS.at_once
    hour = torch.zeros(1).expand(2_000_000)  # In one chunk, and still by few at once.
    assert len(next(model.enhance_stream([hour], OWN))) <= CHUNKS.length


def test_what_a_stream_cannot_use_is_named() -> None:
    model = Edgy()
    good, broken = np.zeros(100, np.float32), np.full(5, np.nan, np.float32)
    for chunks, message in (
        ([good, broken], "chunk 2: 5 of its samples are not finite"),
        (
            [good, np.zeros((2, 100))],
            "chunk 2 has 2 channels, those before it 1; allowed: the s",
        ),
        ([np.zeros((160, 2))], "chunk 1 has 160 channels of 2 samples; allowed: .C, T., channels"),
        ([np.zeros((1, 2, 3))], r"chunk 1 has the shape \(1, 2, 3\); allowed: samples"),
        ([good, good.astype(complex)], "chunk 2 has values of torch.complex128; allowed: real"),
    ):
        with pytest.raises(ValueError, match=message):
            list(model.enhance_stream(chunks, OWN))
    with pytest.raises(TypeError, match="chunk 1 is a str; allowed: a tensor or array of numbers"):
        list(model.enhance_stream("a.wav", OWN))  # type: ignore[arg-type]
    for rate in (0, None, 8000.5, "8000", True):
        with pytest.raises(ValueError, match="rate is .*; allowed: a whole number of samples a se"):
            model.enhance_stream([good], rate)  # type: ignore[arg-type]
    assert len(list(model.enhance_stream([good], np.float64(OWN)))) == 1
    model.network = lambda chunks: chunks / (chunks < 1)  # type: ignore[method-assign]
    with pytest.raises(BadItem, match="stream up to chunk 2: the network makes numbers of it that"):
        list(model.enhance_stream([good, good + 1], OWN))
    with pytest.raises(BadItem, match="sound 2: the network makes numbers of it that are not fin"):
        model.enhance([good, good + 1], OWN)


def test_short_sounds_share_a_batch_and_long_ones_do_not(tmp_path: Path) -> None:
    model = Edgy(CHUNKS._replace(at_once=8))
    sounds = [stereo(samples, samples) for samples in (900, 2, 250, 20_000, 1000, 1400)]
    alone = [model.enhance(each, OWN).samples for each in sounds]
    model.calls.clear()
    together = model.enhance(sounds, OWN)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other.samples)
    assert model.calls[0] == 6
    assert model.calls[-1] == 6  # two of stereo and three of stereo
    assert max(model.calls) <= 2 * 8
    soundfile.write(tmp_path / "a.wav", sounds[3].mT.numpy(), 44100, subtype="FLOAT")
    first, second = model.enhance([tmp_path / "a.wav", Sound(sounds[0], 16000)])
    assert (first.rate, second.rate) == (44100, 16000)
    assert torch.equal(first.samples, model.enhance(sounds[3], 44100).samples)
    assert second.samples.shape == sounds[0].shape
    second.samples.mul_(2)  # An ordinary tensor.


YAMLS = sorted(
    str(path.relative_to(HPARAMS))
    for task in ("metricgan", "segan", "separation")
    for path in (HPARAMS / task).glob("*.yaml")
)


@pytest.mark.parametrize("yaml", YAMLS)
def test_of_the_run_of_any_yaml_only_what_answers_is_built(
    yaml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(YAMLS) == 12
    task = yaml.partition("/")[0]
    case = CASES[task]
    given = dict(case.overrides)
    text = "".join((HPARAMS / task / f"{name}.yaml").read_text() for name in bases(yaml))
    given |= {key: "x" for key in ("data_folder", "noise_folder") if f"{key}: !PLACE" in text}
    if yaml == "separation/sepformer.yaml":
        given["separator"] = {
            "features": 8, "layers": 1, "heads": 2, "feedforward": 8, "chunk": 20
        }  # fmt: skip
    run = make_run(Case(yaml, case.method, overrides=given, metrics=case.metrics), tmp_path / "run")

    def built(*_: object, **__: object) -> None:
        raise AssertionError("it was built")

    for kind in (Discriminator, MetricDiscriminator):
        monkeypatch.setattr(kind, "__init__", built)
    model: Any = trainer.load(run, "cpu")
    assert list(model.modules) == ["separator" if task == "separation" else "generator"]
    sound = stereo(3000)
    made = getattr(model, case.method)(sound, model.sample_rate)
    for each in made if isinstance(made, list) else [made]:
        assert each.rate == model.sample_rate
        assert each.samples.shape == sound.shape
        assert each.samples.isfinite().all()


def test_chunks_that_cannot_be_are_refused_when_a_model_is_loaded(tmp_path: Path) -> None:
    run = make_run("segan", tmp_path / "run")
    for given, message in (
        (
            {"chunks": {"length": 2048}},
            "chunks.length is 2048; allowed: 1024, what the generator",
        ),
        (
            {"chunks": {"overlap": 600}},
            "chunks of 1024 samples cannot overlap by 600: allowed is",
        ),
        ({"chunks": None}, "chunks is None; allowed: !new:recipes.common.streaming.Chunks"),
        ({"chunks": {"overlap": 9.5}}, "overlap=9.5, .* is not of whole numbers"),
        ({"sample_rate": 8000.5}, "rate is 8000.5; allowed: a whole number of samples a second"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.load(run, "cpu", overrides=given)
    assert trainer.load(run, "cpu", overrides={"chunks": {"overlap": 0}}).latency == 1024 / 16000


def bases(yaml: str) -> list[str]:
    """Return the names of a YAML and of those that it is based on."""
    path = HPARAMS / yaml
    lines = path.read_text().splitlines()
    base = [line.split()[1] for line in lines if line.startswith("base: ")]
    above = bases(f"{path.parent.name}/{base[0]}") if base else []
    return [path.stem, *above]
