"""LibriMix and WSJ0-mix in their own layouts, made small."""

from pathlib import Path
from typing import Any

import pytest
import soundfile

from recipes.separation.folders import librimix, wsj0mix
from recipes.separation.recorded import Recorded, read_mixture
from tests.recipes.separation.conftest import RATE, buzz, mixture_folder, write
from trainer.data import BadItem

LIBRI = {"train": "train-100", "valid": "dev", "test": "test"}
WSJ = {"train": "tr", "valid": "cv", "test": "tt"}


def librimix_like(root: Path, speakers: int = 2) -> Path:
    base = root / f"Libri{speakers}Mix" / "wav8k" / "min"
    for name in LIBRI.values():
        mixture_folder(base / name, "mix_clean", speakers)
    return base


def wsj_like(root: Path, speakers: int = 2, kind: str = "mix") -> Path:
    base = root / f"{speakers}speakers" / "wav8k" / "min"
    for name in WSJ.values():
        mixture_folder(base / name, kind, speakers)
    return base


def write_table(path: Path, names: list[str], rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")


def whole(corpus: Any, speakers: int, count: int = 4) -> None:
    """Everything that was found can be read, and belongs together."""
    assert {split: len(mixtures) for split, mixtures in corpus.items()} == dict.fromkeys(
        LIBRI, count
    )
    for mixtures in corpus.values():
        for each in mixtures:
            _, sources, _ = read_mixture(each, RATE)
            assert sources.shape[1] == speakers


@pytest.mark.parametrize("speakers", [2, 3])
def test_folders_of_librimix(tmp_path: Path, speakers: int) -> None:
    librimix_like(tmp_path, speakers)
    for root in (tmp_path, tmp_path / f"Libri{speakers}Mix"):
        whole(librimix(str(root), LIBRI, speakers), speakers)


def test_tables_of_librimix_are_read_wherever_the_files_were_made(tmp_path: Path) -> None:
    base = librimix_like(tmp_path)
    made = "/storage/of/another/machine/Libri2Mix/wav8k/min"
    for name in LIBRI.values():
        rows = [
            [
                f"m{n}",
                *(f"{made}/{name}/{kind}/m{n}.wav" for kind in ("mix_clean", "s1", "s2")),
                "1",
            ]
            for n in range(3)  # one less than there are files
        ]
        names = ["mixture_ID", "mixture_path", "source_1_path", "source_2_path", "length"]
        write_table(base / "metadata" / f"mixture_{name}_mix_clean.csv", names, rows)
    corpus = librimix(str(tmp_path), LIBRI)
    whole(corpus, 2, count=3)
    assert corpus["test"][0].sources[1] == base / "test" / "s2" / "m0.wav"


def test_the_noisy_mixtures_of_librimix_come_with_their_noise(tmp_path: Path) -> None:
    base = tmp_path / "wav8k" / "min"
    for name in LIBRI.values():
        mixture_folder(base / name, "mix_both")
    corpus = librimix(str(tmp_path), LIBRI, noisy=True)
    whole(corpus, 2)
    assert corpus["train"][1].noise == base / "train-100" / "noise" / "m1.wav"
    with pytest.raises(
        ValueError, match="train-100 has no folder mix_clean; expected: mix_clean, s1"
    ):
        librimix(str(tmp_path), LIBRI)


@pytest.mark.parametrize("speakers", [2, 3])
def test_folders_of_wsj0mix(tmp_path: Path, speakers: int) -> None:
    wsj_like(tmp_path, speakers)
    for root in (tmp_path, tmp_path / f"{speakers}speakers"):
        whole(wsj0mix(str(root), WSJ, speakers), speakers)


def test_the_folders_of_wham_are_read_as_well(tmp_path: Path) -> None:
    wsj_like(tmp_path, kind="mix_both")
    whole(wsj0mix(str(tmp_path), WSJ, noisy=True), 2)
    for name in WSJ.values():
        mixture_folder(tmp_path / "2speakers" / "wav8k" / "min" / name, "mix_clean")
    corpus = wsj0mix(str(tmp_path), WSJ)
    whole(corpus, 2)
    assert {each.mixture.parent.name for each in corpus["test"]} == {"mix_clean"}
    assert {each.noise for each in corpus["test"]} == {None}


def test_tables_for_wsj0mix(tmp_path: Path) -> None:
    base = wsj_like(tmp_path)
    names = ["ID", "duration", "mix_wav", "mix_wav_format", "mix_wav_opts", "s1_wav", "s2_wav"]
    rows = [
        [f"{n}", "0.6", f"{base}/tr/mix/m{n}.wav", "wav", "",
         f"2speakers/wav8k/min/tr/s1/m{n}.wav", f"{base}/tr/s2/m{n}.wav"]
        for n in range(4)
    ]  # fmt: skip
    write_table(tmp_path / "wsj_tr.csv", names, rows)
    corpus = wsj0mix(str(tmp_path), {**WSJ, "train": "wsj_tr.csv"})
    whole(corpus, 2)
    assert len(Recorded(corpus["train"], RATE)[0]["mixture"]) == round(0.6 * RATE)


def test_a_table_with_other_columns_is_told(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", ["ID", "wav"], [["m0", "m0.wav"]])
    with pytest.raises(
        ValueError,
        match="a.csv has the columns ID, wav; expected: mixture_ID, mixture_path, source_1",
    ):
        wsj0mix(str(tmp_path), {"train": "a.csv"})
    with pytest.raises(ValueError, match="b.csv is not there; expected was a table of mixtures"):
        wsj0mix(str(tmp_path), {"train": "b.csv"})


def test_a_table_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.wav", buzz(100, 0.5, 1))
    inner = tmp_path / "data"
    inner.mkdir()
    rows = [["m0", "../secret.wav", str(tmp_path / "secret.wav"), "/../../secret.wav"]]
    write_table(inner / "a.csv", ["ID", "mix_wav", "s1_wav", "s2_wav"], rows)
    with pytest.raises(ValueError, match="2 of 2 files are bad.*\n.*secret.wav: it does not exist"):
        wsj0mix(str(inner), {"train": "a.csv"})
    with pytest.raises(ValueError, match="contains '..'; it must stay inside the data folder"):
        wsj0mix(str(inner), {"train": "../a.csv"})


def test_another_layout_is_told(tmp_path: Path) -> None:
    told = "expected was Libri2Mix with wav8k/min in it; in it is nothing"
    with pytest.raises(ValueError, match=f"has another layout: {told}"):
        librimix(str(tmp_path), LIBRI)
    with pytest.raises(
        ValueError, match="nowhere is not there; expected was a folder of 2speakers"
    ):
        wsj0mix(str(tmp_path / "nowhere"), WSJ)
    (wsj_like(tmp_path) / "tr" / "s2").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="tr has no folder s2; expected: mix, s1, s2"):
        wsj0mix(str(tmp_path), WSJ)
    for path in (tmp_path / "2speakers/wav8k/min/cv/mix").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"cv/mix has no \*.wav"):
        wsj0mix(str(tmp_path), {"valid": "cv"})


def test_a_mixture_whose_files_do_not_fit_is_left_out_or_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = wsj_like(tmp_path)
    write(base / "tr" / "s1" / "m1.wav", buzz(100, 0.5, 1))
    soundfile.write(base / "tr" / "s2" / "m2.wav", buzz(100, 0.7, 1), 16000)
    found = wsj0mix(str(tmp_path), WSJ, max_bad=0.5)
    assert [each.id for each in found["train"]] == ["m0", "m3"]
    assert "s1/m1.wav: it has 4000 samples, its mixture" in caplog.text
    assert "s2/m2.wav: it is sampled at 16000 Hz, not at 8000 Hz" in caplog.text
    with pytest.raises(ValueError, match="2 of 12 files are bad"):
        wsj0mix(str(tmp_path), WSJ)
    with pytest.raises(BadItem, match=r"m1.wav: it has 4000 samples"):
        wsj0mix(str(tmp_path), WSJ, on_bad="raise")


def test_another_number_of_speakers_is_told(tmp_path: Path) -> None:
    base = wsj_like(tmp_path)
    rows = [["m0", *(f"{base}/tr/{kind}/m0.wav" for kind in ("mix", "s1", "s2"))]]
    write_table(tmp_path / "a.csv", ["ID", "mix_wav", "s1_wav", "s2_wav"], rows)
    with pytest.raises(ValueError, match="the mixture m0 has 2 sources; speakers is 3"):
        wsj0mix(str(tmp_path), {"train": "a.csv"}, speakers=3)
