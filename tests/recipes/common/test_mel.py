"""Log-mel spectrograms, whole and in pieces, and the files that hold them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio

from recipes.common.mel import FLOOR, LogMel, read_mel, write_mel

RATE = 16000


def front(**changes: Any) -> LogMel:
    return LogMel(**{"sample_rate": RATE, "bands": 20, "n_fft": 256, "hop": 64, **changes})


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("f_min", "f_max"), [(0.0, None), (100.0, 6000.0)])
def test_it_is_what_torchaudio_makes_of_the_mirrored_signal(
    f_min: float, f_max: float | None
) -> None:
    mel, wav = front(f_min=f_min, f_max=f_max), noise(2, 3001)
    theirs = torchaudio.transforms.MelSpectrogram(
        RATE, 256, hop_length=64, f_min=f_min, f_max=f_max, n_mels=20, power=1.0, center=False,
        norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    expected = theirs(torch.nn.functional.pad(wav, (96, 96), mode="reflect")).clamp(1e-5).log()
    torch.testing.assert_close(mel(wav), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [97, 128, 191, 192, 1000])
def test_frames_are_samples_over_the_hop(samples: int) -> None:
    assert front()(noise(samples)).shape == (20, samples // 64)
    assert front()(noise(3, 2, samples)).shape == (3, 2, 20, samples // 64)


def test_a_click_is_in_the_frame_around_it() -> None:
    wav = torch.zeros(64 * 20)
    wav[64 * 7 + 32] = 1.0
    assert int(front()(wav).sum(0).argmax()) == 7


@pytest.mark.parametrize("samples", [97, 256, 1000, 3001])
@pytest.mark.parametrize("size", [1, 50, 97, 640, 5000])
def test_a_signal_in_blocks_gives_the_frames_of_the_whole(samples: int, size: int) -> None:
    mel, wav = front(), noise(2, samples)
    pieces = list(mel.stream(wav.split(size, -1)))
    torch.testing.assert_close(torch.cat(pieces, -1), mel(wav), rtol=0, atol=1e-5)
    assert list(mel.stream([])) == []


def test_silence_is_the_floor_and_has_a_finite_gradient() -> None:
    wav = torch.zeros(1000, requires_grad=True)
    mel = front(n_fft=256)(wav)
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(FLOOR)))
    mel.sum().backward()
    assert torch.isfinite(wav.grad).all()


def test_it_computes_in_fp32_under_autocast() -> None:
    mel, wav = front(), noise(1000)
    with torch.autocast("cpu", torch.bfloat16):
        found = mel(wav)
    assert found.dtype is torch.float32
    assert torch.equal(found, mel(wav))


def test_nothing_of_it_is_saved() -> None:
    assert front().state_dict() == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hop": 0}, "hop is 0; allowed: 1 to n_fft=256"),
        ({"hop": 63}, "hop is 63; allowed: 1 to n_fft=256, and n_fft - hop even"),
        ({"f_max": 9000.0}, "f_min=0 and f_max=9000 Hz; allowed: 0 <= f_min < f_max <= 8000"),
        ({"f_min": 5000.0, "f_max": 4000.0}, "f_min=5000 and f_max=4000 Hz"),
    ],
)
def test_an_impossible_front_end_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        front(**changes)


def test_a_signal_that_is_too_short_is_refused() -> None:
    sentence = "a signal of 96 samples is too short for a window of 256; allowed: 97 or more"
    with pytest.raises(ValueError, match=sentence):
        front()(noise(96))
    with pytest.raises(ValueError, match=sentence):
        list(front().stream(noise(2, 96).split(10, -1)))


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_a_file_gives_back_the_mel_and_how_it_was_made(tmp_path: Path, suffix: str) -> None:
    mel = front()
    values, path = mel(noise(1000)), tmp_path / f"one{suffix}"
    write_mel(path, values, mel.config)
    found, config = read_mel(path)
    assert torch.equal(found, values)
    assert config == mel.config
    mel.check(path, config)


@pytest.mark.parametrize(
    ("name", "other"),
    [("sample_rate", 22050), ("hop", 128), ("n_fft", 512), ("bands", 21), ("f_max", 7000.0)],
)
def test_a_mel_of_another_configuration_names_the_parameter(name: str, other: float) -> None:
    mel = front()
    with pytest.raises(ValueError, match=rf"x.pt: its mel was made with {name}={other}; expected"):
        mel.check("x.pt", {**mel.config, name: other})
    config = mel.config
    del config[name]
    with pytest.raises(ValueError, match=f"x.pt: its configuration does not say its {name}"):
        mel.check("x.pt", config)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no mels, and what is said of them."""
    config, good = front().config, torch.zeros(20, 3)
    paths = {name: folder / f"{name}.pt" for name in ("bare", "shape", "whole", "empty", "bands")}
    torch.save(good, paths["bare"])
    torch.save({"mel": torch.zeros(1, 20, 3), "config": config}, paths["shape"])
    torch.save({"mel": good.long(), "config": config}, paths["whole"])
    torch.save({"mel": torch.zeros(20, 0), "config": config}, paths["empty"])
    torch.save({"mel": torch.zeros(19, 3), "config": config}, paths["bands"])
    for name in ("alone", "list", "broken", "object"):
        paths[name] = folder / f"{name}.npy"
        np.save(paths[name], good.numpy())
    paths["list"].with_suffix(".json").write_text("[1]")
    paths["broken"].with_suffix(".json").write_text("{")
    np.save(paths["object"], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    paths["object"].with_suffix(".json").write_text(json.dumps(config))
    paths["text"] = folder / "text.pt"
    paths["text"].write_text("no tensor")
    paths["missing"], paths["kind"] = folder / "missing.pt", folder / "kind.wav"
    paths["kind"].write_text("")
    told = {
        "bare": 'a mel file holds {"mel": …, "config": …}; this one does not',
        "shape": "a mel is a matrix (bands, frames) of floats, not (1, 20, 3) of torch.float32",
        "whole": "a mel is a matrix (bands, frames) of floats, not (20, 3) of torch.int64",
        "empty": "its mel has no frames",
        "bands": "its configuration says bands=20, its mel has 19",
        "alone": "how it was made is unknown; expected beside it: alone.json",
        "list": "its configuration is a list, not a mapping",
        "broken": "it is not JSON",
        "object": "it cannot be read as a .npy of plain numbers",
        "text": "it cannot be read as a .pt of plain tensors",
        "missing": "it does not exist",
        "kind": "a mel file ends in .pt or .npy",
    }
    assert told.keys() == paths.keys()
    return {name: (paths[name], told[name]) for name in told}


def test_files_that_are_no_mels_are_told(tmp_path: Path) -> None:
    for path, told in bad_files(tmp_path).values():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            read_mel(path)
        assert told in str(caught.value)
        assert str(path.with_suffix("")) in str(caught.value)


def test_only_two_kinds_of_file_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a mel is written as .pt or .npy, not as '.wav'"):
        write_mel(tmp_path / "a.wav", torch.zeros(2, 2), {})


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_numbers_of_any_byte_order_and_size_are_read(tmp_path: Path, order: str, size: int) -> None:
    mel = np.arange(12, dtype=f"{order}f{size}").reshape(3, 4)
    np.save(tmp_path / "a.npy", mel)
    (tmp_path / "a.npy").rename(tmp_path / "a.NPY")
    (tmp_path / "a.json").write_text("{}")
    assert read_mel(tmp_path / "a.NPY")[0].tolist() == mel.tolist()
