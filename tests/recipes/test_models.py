"""Models that `trainer.load` gives: what every recipe's has in common."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import trainer
from tests.recipes.run_folder_attacks import tree
from tests.recipes.small_runs import CASES, make_run
from trainer.inference.results import Sound, Transcript

SOUND = [name for name, case in CASES.items() if case.given == "sound"]
RATE = 11025  # of the sounds that are given, and of no model
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run_of(name: str) -> Path:
        pytest.importorskip(CASES[name].needs)
        if name not in made:
            made[name] = make_run(name, folder / name)
        return made[name]

    return run_of


def noise(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Samples (T,), as 16 bits hold them."""
    drawn = np.random.default_rng(seed).normal(0.0, 0.1, count).clip(-0.9, 0.9)
    return np.round(drawn * 32768).astype(np.float32) / 32768


def numbers(result: Any) -> list[Tensor | str | None]:
    """Return all that a result is made of, without the texts of paths."""
    if dataclasses.is_dataclass(result):
        return numbers([getattr(result, each.name) for each in dataclasses.fields(result)])
    if isinstance(result, Mapping):
        return numbers(list(result.items()))
    if isinstance(result, list | tuple):
        return [part for each in result for part in numbers(each)]
    if isinstance(result, bool | int | float):
        return [torch.tensor(float(result))]
    assert isinstance(result, Tensor | str | None)
    return [result]


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    left, right = numbers(found), numbers(expected)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Tensor):
            assert isinstance(other, Tensor)
            assert not one.is_cuda
            assert one.grad_fn is None
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        else:
            assert one == other


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_may_be_given_in_any_form(
    name: str, run: Callable[[str], Path], tmp_path: Path
) -> None:
    model, sound = trainer.load(run(name), "cpu"), noise(6000)
    answer = getattr(model, CASES[name].method)
    path = tmp_path / "a.wav"
    soundfile.write(path, sound, RATE, subtype="PCM_16")
    expected = answer(str(path))
    integers = (sound * 32768).astype(np.int16)
    forms = [
        (path, None),
        (sound, RATE),
        (sound.astype(np.float64)[None], RATE),
        (torch.from_numpy(sound), RATE),
        (torch.from_numpy(sound).requires_grad_(), RATE),
        (integers, RATE),
        (torch.from_numpy(integers), RATE),
        (Sound(torch.from_numpy(sound)[None], RATE), None),
        (np.repeat(sound, 2)[::2], RATE),
    ]
    for form, rate in forms:
        assert_same(answer(form, rate=rate), expected, 1e-5)


@pytest.mark.parametrize("name", SOUND)
def test_a_list_gives_what_each_of_its_sounds_gives_alone(
    name: str, run: Callable[[str], Path], tmp_path: Path
) -> None:
    model = trainer.load(run(name), "cpu")
    answer = getattr(model, CASES[name].method)
    sounds = [noise(count, seed) for seed, count in enumerate((9000, 4000, 7001))]
    soundfile.write(tmp_path / "b.wav", sounds[1], RATE, subtype="FLOAT")
    alone = [answer(sound, rate=RATE) for sound in sounds]
    together = answer([sounds[0], tmp_path / "b.wav", torch.from_numpy(sounds[2])], rate=RATE)
    assert isinstance(together, list)
    assert_same(together, alone, 1e-4)
    assert_same(answer(tuple(sounds), rate=RATE), alone, 1e-4)
    assert answer([]) == []


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_left_changed(name: str, run: Callable[[str], Path]) -> None:
    folder = run(name)
    before, state = tree(folder), torch.get_rng_state()
    model = trainer.load(folder, "cpu")
    kept = {key: value.clone() for key, value in model.modules.state_dict().items()}
    sound = noise(6000)
    given = sound.copy()
    first, second = (getattr(model, CASES[name].method)(sound, rate=RATE) for _ in range(2))
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(sound, given)
    assert all(torch.equal(kept[key], value) for key, value in model.modules.state_dict().items())
    assert not model.modules.training
    assert tree(folder) == before


@pytest.mark.parametrize("name", SOUND)
def test_what_cannot_be_used_is_named_in_a_sentence(
    name: str, run: Callable[[str], Path], tmp_path: Path
) -> None:
    answer = getattr(trainer.load(run(name), "cpu"), CASES[name].method)
    (tmp_path / "text.wav").write_text("no sound at all")
    good, broken = noise(6000), noise(6000)
    broken[7] = np.nan
    for given, rate, message in [
        (good, None, "the sound has samples without a rate: give rate=… in Hz"),
        ([good, broken], RATE, "sound 2: 1 of its samples are not finite"),
        ([tmp_path / "text.wav"], None, "text.wav: it is not an audio file"),
        ([good, "missing.wav"], RATE, "missing.wav: it does not exist"),
        (np.zeros(0), RATE, r"the sound has the shape \(0,\); allowed"),
        (np.zeros((2, 3, 4)), RATE, r"the sound has the shape \(2, 3, 4\); allowed"),
        (np.zeros((6000, 2)), RATE, "the sound has 6000 channels of 2 samples; .*transpose"),
        (np.zeros((2, 0)), RATE, r"the sound has the shape \(2, 0\); allowed"),
        (torch.zeros(9, device="meta"), RATE, "the sound is a tensor that is without content"),
        (torch.zeros(9).to_sparse(), RATE, "nested, quantized or sparse; allowed: a dense one"),
        ([good, np.ma.masked_greater(good, 0.1)], RATE, "sound 2 has masked values; allowed"),
        (np.array(["1", "2"]), RATE, "the sound has values of <U1; allowed: real numbers"),
        (good * np.float32(1e38), RATE, "the sound: .* not finite"),
        ("", None, "the sound is an empty path; allowed: the path of a sound file"),
        ("~nobody-has-this-name/a.wav", None, "^~nobody-has-this-name/a.wav: it does not exist"),
        ("a\nb.wav", None, "^a\ufffdb.wav: it does not exist"),
        (np.zeros(6000, complex), RATE, "the sound has values of torch.complex128; allowed: real"),
        (good, 0, "rate is 0; allowed: a whole number"),
        (good, 8000.5, "rate is 8000.5; allowed: a whole number"),
    ]:
        with pytest.raises(ValueError, match=message) as told:
            answer(given, rate=rate)
        assert str(told.value).count("\n") == 0
    with pytest.raises(TypeError, match="sound 2 is a int; allowed: a path, a tensor"):
        answer([good, 3], rate=RATE)


def test_threads_that_load_and_speak_leave_the_random_state(run: Callable[[str], Path]) -> None:
    names = ("asr", "tacotron2", "segan")
    models = [trainer.load(run(name), "cpu") for name in names]
    expected = models[1].synthesise("one")
    state = torch.get_rng_state()

    def work(number: int) -> None:
        if number % 3 == 1:
            assert_same(models[1].synthesise("one"), expected)
            return
        again = trainer.load(run(names[number % 3]), "cpu").modules.state_dict()
        for name, value in models[number % 3].modules.state_dict().items():
            assert not isinstance(value, Tensor) or torch.equal(value, again[name])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(9)))
    assert torch.equal(torch.get_rng_state(), state)


PROBE = """
import json, sys
import numpy, trainer
found = {}
for name, folder, method, given, absent in json.loads(sys.argv[1]):
    model = trainer.load(folder, "cpu")
    sound = numpy.random.default_rng(0).normal(0, 0.1, 9000)
    if given == "text":
        getattr(model, method)("one")
    elif given == "mel":
        getattr(model, method)(numpy.zeros((80, 20), "float32"))
    else:
        getattr(model, method)(sound, rate=8000)
    found[name] = [each for each in absent if each in sys.modules]
print(json.dumps(found))
"""
TRAINING = (
    "lhotse", "trainer.brain", "trainer.data.feed", "trainer.data.loader", "trainer.optim.step",
)  # fmt: skip


def test_a_model_imports_neither_the_training_nor_lhotse(run: Callable[[str], Path]) -> None:
    asked = [
        (name, str(run(name)), case.method, case.given, [*TRAINING, *case.not_imported])
        for name, case in CASES.items()
        if importlib.util.find_spec(case.needs)
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(asked)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found == {name: [] for name, *_ in asked}
    assert "asr" in found


# ------------------------------------------------------------------------------------ word times


def test_words_are_where_they_were_recognised(run: Callable[[str], Path]) -> None:
    """The network's outputs are put in by hand, in pieces and in a batch."""
    model = trainer.load(run("asr"), "cpu")
    frame, rate = 0.04, 16000
    letters = "-" + model.hparams.codec.tokens[1] + "'abcdefghijklmnopqrstuvwxyz"
    network = model.modules.model
    assert network.frame_times() == (0.0, frame)

    def outputs(wavs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """A letter while there is sound: its height tells which."""
        frames = network.frames(lengths)
        middles = (torch.arange(int(frames.max())) * frame * rate).long()
        heights = torch.nn.functional.pad(wavs, (0, 1))[:, middles.clamp(max=wavs.shape[1])]
        best = (heights * 100).round().long()
        scores = torch.nn.functional.one_hot(best, len(letters)).float()
        return (scores * 6).log_softmax(-1), frames

    model.modules.model.forward = outputs
    said = [("one", 0.4, 0.8), ("two", 1.2, 1.8), ("too", 19.6, 20.4), ("three", 31.0, 33.0)]
    sound = torch.zeros(round(34 * rate))
    for number, (word, start, end) in enumerate(said):
        edges = torch.linspace(start, end, len(word) + 1).tolist()
        for letter, first, last in zip(word, edges, edges[1:], strict=False):
            # Twice the same letter with a blank between.
            gap = frame * 1.5
            sound[round(first * rate) : round((last - gap) * rate)] = letters.index(letter) / 100
        if number:
            before = said[number - 1][2]
            sound[round((before + 0.1) * rate) : round((before + 0.2) * rate)] = 0.01
    expected = [(word, start, end - 1.5 * frame) for word, start, end in said]
    for transcript in (model.transcribe(sound, rate), *model.transcribe([sound, sound], rate)):
        assert str(transcript) == "one two too three"
        assert [word.text for word in transcript.words] == [word for word, _, _ in said]
        for word, (_, start, end) in zip(transcript.words, expected, strict=True):
            assert word.start == pytest.approx(start, abs=0.75 * frame)
            assert word.end == pytest.approx(end, abs=0.75 * frame)
            assert word.score == pytest.approx(np.exp(6) / (np.exp(6) + len(letters) - 1))
    assert model.transcribe(torch.zeros(9000), rate) == Transcript("")
