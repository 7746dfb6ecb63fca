"""Exports: networks compared to torch, model cards, and what cannot be exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import trainer
from tests.recipes.run_folder_attacks import tree
from trainer import Checkpointer
from trainer.cli.commands import main
from trainer.inference import Graph, Model, Port
from trainer.inference.cards import escaped
from trainer.inference.graphs import plain_network
from trainer.options import RunOptions

HEADER = "# The resolved hyperparameters of a run; this file runs alone."


class Net(nn.Module):
    """Layers that are other in training, and weights that are made of others."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(1, 4, 3, padding=1))
        self.last = spectral_norm(nn.Conv1d(4, 1, 3, padding=1))
        self.drop, self.wrong = nn.Dropout(0.5), wrong

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(self.first(x[:, None]).relu()))[:, 0]
        return found


def graph(module: nn.Module, **given: Any) -> Graph:
    return Graph(
        module,
        [Port("x", ("batch", "samples"), "sound at 8000 Hz")],
        [Port("y", ("batch", "samples"), "another sound")],
        lambda batch, length: (torch.randn(batch, length),),
        (20, 31),
        "Sound to sound.",
        **given,
    )


class Sounds(Model):
    """Model of a program, with a network for others."""

    def enhance(self, samples: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.modules.net(samples[None])
        return found[0]

    def graph(self, modules: nn.ModuleDict) -> Graph:
        return graph(modules.net, settings={"sample_rate": 8000})


def make_run(folder: Path, seed: int = 1, wer: float = 3.0, more: str = "") -> Path:
    """The folder of a run with a checkpoint, records and samples."""
    torch.manual_seed(seed)
    checkpointer = Checkpointer(folder / "checkpoints")

    class Saved:
        def state_dict(self) -> dict[str, Any]:
            return {"modules": nn.ModuleDict({"net": Net()}).state_dict()}

        def load_state_dict(self, state: Any) -> None: ...

    checkpointer.add_recoverable("brain", Saved())
    checkpointer.save_checkpoint(meta={"wer": wer})
    (folder / "hyperparams.yaml").write_text(
        f"{HEADER}\nseed: {seed}\noutput_folder: {folder}\nprecision: fp32\nmax_grad_norm: 5.0\n"
        f"data_folder: /home/somebody/corpus\nlexicon: !ref <output_folder>/lexicon.txt\n"
        f"modules: {{net: !new:{__name__}.Net {{}}}}\n{more}"
    )
    (folder / "lexicon.txt").write_text("turn left")
    records = [
        {"kind": "stage", "stage": "train", "epoch": 1, "step": 9, "loss": 1.0, "examples": 50},
        {"kind": "stage", "stage": "test", "step": 9, "wer": wer, "examples": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    (folder / "scores_test.csv").write_text(
        f"id,wer\na,{wer - 1}\nb,{wer}\nc,{wer + 1}\nmean,{wer}\n"
    )
    return folder


def load(folder: Path) -> Sounds:
    return trainer.load(folder, "cpu", model=Sounds, allow=[__name__])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


# ---------------------------------------------------------------------------------------- networks

FORMATS = ["torch", "onnx"]


def needs(to: str) -> None:
    for each in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        pytest.importorskip(each)


def test_a_network_is_written_as_it_is_used_and_stays_as_it_is(tmp_path: Path) -> None:
    net = Net()
    before, names = net.training, list(net.state_dict())
    plain = plain_network(net)
    x = torch.randn(2, 30)
    torch.testing.assert_close(plain(x), net.eval()(x))
    assert set(plain.state_dict()) == {
        f"{a}.{b}" for a in ("first", "last") for b in ("weight", "bias")
    }
    assert list(net.train().state_dict()) == names
    assert before
    net(x).sum().backward()  # Its weights are still made of those that train.
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_computes_what_torch_computes_of_any_batch_and_length(
    to: str, run: Path, tmp_path: Path
) -> None:
    needs(to)
    model = load(run)
    folder = trainer.export(model, tmp_path / "out", to)
    x = torch.randn(4, 57)
    expected = model.modules.net(x).detach()
    if to == "torch":
        found = torch.export.load(folder / "model.pt2").module()(x)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        (array,) = session.run(["y"], {"x": x.numpy()})
        found = torch.from_numpy(array)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    described = json.loads((folder / "export.json").read_text())
    assert described["settings"] == {"sample_rate": 8000}
    assert [each["name"] for each in described["inputs"]] == ["x"]
    assert described["checked"]["largest_difference"] <= 1e-4


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: graph(nn.Identity(), reference=lambda x: x + 0.01), "output differs by 0.01 from"),
        (
            lambda: graph(nn.Identity(), reference=lambda x: x[:, 1:]),
            r"returns shape \[1, 20\], and torch",
        ),
        (lambda: graph(nn.Identity(), reference=lambda x: x * torch.nan), "differs by nan from"),
        (lambda: graph(Undecided()), "cannot be exported to"),
    ],
)
def test_a_network_that_differs_or_cannot_be_exported_leaves_nothing(
    made: Any, message: str, run: Path, tmp_path: Path
) -> None:
    class Other(Sounds):
        def graph(self, modules: nn.ModuleDict) -> Graph:
            found: Graph = made()
            return found

    model = trainer.load(run, "cpu", model=Other, allow=[__name__])
    with pytest.raises(ValueError, match=message) as caught:
        trainer.export(model, tmp_path / "out", "torch")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'cortex-speech\[export\]'"):
        trainer.export(load(run), tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'cortex-speech\[export\]'"):
        trainer.export(load(run), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- folders


def test_an_export_of_a_program_has_the_yaml_and_the_files_that_it_names(
    run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    before = tree(run)
    model = load(run)
    folder = trainer.export(model, tmp_path / "out")
    assert tree(run) == before
    text = (folder / "hyperparams.yaml").read_text()
    assert "somebody" not in text  # A path of the machine.
    assert "max_grad_norm" not in text
    assert (folder / "lexicon.txt").read_text() == "turn left"
    again = load(folder)
    assert again.hparams.lexicon == str(folder / "lexicon.txt")
    x = torch.randn(50)
    assert torch.equal(again.enhance(x), model.enhance(x))
    with pytest.raises(ValueError, match="is an export: there is no checkpoint to choose"):
        trainer.load(folder, "cpu", model=Sounds, allow=[__name__], min_key="wer")


def test_an_export_from_elsewhere_is_data_as_a_run_folder_is(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    folder = trainer.export(load(run), tmp_path / "out")
    yaml_, weights = folder / "hyperparams.yaml", folder / "model.safetensors"
    good, sound = yaml_.read_text(), weights.read_bytes()
    for line, message in (
        ("x: !apply:os.system ['true']", "not allowed"),
        ("x: !new:builtins.open {file: a}", "not allowed"),
        ("x: !new:recipes.asr.text.Pieces {file: /etc/passwd, size: 3}", "lies outside of"),
    ):
        yaml_.write_text(f"{good}{line}\n")
        with pytest.raises(ValueError, match=message):
            load(folder)
    yaml_.write_text(f"{good}recipe: os\n".replace("recipe: os\nrecipe", "recipe"))
    load(folder)  # Only installed recipes count.
    yaml_.write_text(good)
    from safetensors import torch as safe

    tensors = safe.load(sound)
    name = next(iter(tensors))
    for other in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        weights.write_bytes(safe.save({**tensors, name: tensors[name].to(other)}))
        with pytest.raises(ValueError, match=f"saved parameter '{name}' is {other}, this Brain's"):
            load(folder)
    for bad in (b"", b"\xff" * 64, sound[:-8], b"PK\x03\x04" + sound):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match="is no file of safetensors"):
            load(folder)
    weights.unlink()
    (tmp_path / "elsewhere").write_bytes(sound)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lies outside of"):
        load(folder)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match="has no weights: neither checkpoints/ nor, as an export"):
        load(folder)


def test_null_where_a_model_needs_an_object_is_told_with_its_key(tmp_path: Path) -> None:
    class Stretched(Sounds):
        def prepare(self) -> None:
            self.hparams.stretch.check()

    run = make_run(tmp_path / "run", more="stretch: null\n")
    with pytest.raises(ValueError, match="cannot be used: .*NoneType.*has null for stretch"):
        trainer.load(run, "cpu", model=Stretched, allow=[__name__])


# -------------------------------------------------------------------------------------- model cards


def test_the_card_has_the_test_its_spread_the_data_and_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", wer=3.0)
    others = [make_run(tmp_path / f"seed{n}", n, wer=3.0 + n) for n in (2, 3)]
    (run / "command.txt").write_text(
        "2026-01-01 10:00:00 /usr/bin/python /home/somebody/recipes/x/train.py "
        "/home/somebody/hparams/x/demo.yaml --output_folder /tmp/x --lr 0.1\n"
        "# from optimizer step 3 on: lr 0.2\n"
    )
    (run / "environment.json").write_text(json.dumps({
        "python": "3.11", "git": {"revision": "abc123", "dirty": True},
        "packages": {"torch": "2.9", "left-pad": "1"},
    }))  # fmt: skip
    folder = trainer.export(load(run), tmp_path / "out", "torch", seeds=[run, *others])
    told, text = front_matter(folder)
    assert told["library_name"] == "cortex-speech"
    assert told["pipeline_tag"] == "audio-to-audio"
    (result,) = told["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "wer", "name": "wer", "value": 3.0}]
    assert result["dataset"]["split"] == "test"
    assert "| wer | 3 | 1 over 3 items | 4.667 ± 1.528 over 3 seeds |" in text
    assert "test 3" in text
    assert "python recipes/x/train.py hparams/x/demo.yaml" in text
    assert "Other than in the YAML: `lr 0.1`." in text
    assert "from optimizer step 3 on" in text
    assert "abc123 with changes that were not committed" in text
    assert "torch | 2.9" in text.replace("\\", "")
    assert "left-pad" not in text
    assert "somebody" not in text
    assert "license" in (folder / "README.md").read_text().split("---")[1]


def test_the_card_gives_the_unit_of_a_metric(tmp_path: Path) -> None:
    class InPerCent(Sounds):
        units = {"wer": "%"}

    run = make_run(tmp_path / "run", wer=3.0)
    model = trainer.load(run, "cpu", model=InPerCent, allow=[__name__])
    told, text = front_matter(trainer.export(model, tmp_path / "out", "torch"))
    (metric,) = told["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "wer", "name": "wer (%)", "value": 3.0}
    assert "| wer (%) | 3 | 1 over 3 items |" in text


def test_an_export_to_a_place_that_cannot_be_made_names_that_place(tmp_path: Path) -> None:
    model = load(make_run(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", tmp_path / ("x" * 250)):
        with pytest.raises(OSError, match=f"^{re.escape(str(target))} cannot be written: "):
            trainer.export(model, target, "torch")
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]


def test_a_short_last_pass_and_what_is_not_known_are_not_in_the_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "scores_test.csv").unlink()
    passes = [
        {"kind": "stage", "stage": "train", "epoch": epoch, "step": 9 * epoch, "examples": count}
        for epoch, count in ((1, 50), (2, 20))
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in passes)
    _, text = front_matter(trainer.export(load(run), tmp_path / "out", "torch"))
    assert "train 50" in text
    assert "| metric | this run |" in text
    assert "| – |" not in text


def test_the_hub_reads_the_metadata(run: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = trainer.export(load(run), tmp_path / "out", "torch")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "cortex-speech"
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "audio-to-audio", "wer", 3.0,
    )  # fmt: skip


HOSTILE = "<script>alert(1)</script> [a](javascript:b) `c` | d *e* ```\n# f\x1b[2J --- https://x.y"


def test_hostile_texts_of_a_run_are_shown_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", more=f"corpus: !name:x.y {{name: {json.dumps(HOSTILE)}}}\n")
    (run / "command.txt").write_text(f"2026-01-01 10:00:00 python {HOSTILE}\n")
    (run / "environment.json").write_text(
        json.dumps({"git": {"revision": HOSTILE}, "packages": {"torch": HOSTILE}})
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "stage", "stage": "test", HOSTILE: 1.0}) + "\n{cut")
    (run / "secret.flac").write_bytes(b"fLaC secret")
    place = run / "samples" / "test"
    place.mkdir(parents=True)
    (place / "a.flac").write_bytes(b"fLaC sound")
    (place / "b.flac").write_bytes(b"<html>")
    (place / "c.flac").symlink_to(run / "secret.flac")
    names = ("a.flac", "b.flac", "c.flac", "../../secret.flac", "\0", None)
    sounds = [{"kind": "audio", "file": name} for name in names]
    rows = [{"id": {"kind": "text", "text": HOSTILE}, HOSTILE: sound} for sound in sounds]
    (place / "samples.json").write_text(
        json.dumps({"title": HOSTILE, "note": HOSTILE, "rows": rows})
    )
    model = trainer.load(run, "cpu", model=Sounds, allow=[__name__], overrides={"corpus": None})
    folder = trainer.export(model, tmp_path / "out", "torch")
    told, text = front_matter(folder)
    assert told["library_name"] == "cortex-speech"
    assert "\x1b" not in text
    outside = [part for n, part in enumerate(text.split("````")) if n % 2 == 0]
    for part in outside:
        assert "<script" not in part
        assert "[a](" not in part
        assert "\n# f" not in part
        assert "https://" not in part
    assert [each.name for each in (folder / "samples").iterdir()] == ["a.flac"]
    rows_ = [line for line in text.splitlines() if line.startswith("| ") and "sound" not in line]
    assert len(rows_) > 3


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a_b*c", r"a\_b\*c"), ("<b>&", "&lt;b&gt;&amp;"), ("a\n\nb", "a b"), ("3.11", r"3\.11"),
     ("- x", r"\- x"), ("a|b", r"a\|b"), ("x\u202ey", "x\ufffdy"), ("www.x.y", r"www\.x.y")],
)  # fmt: skip
def test_texts_are_escaped(given: str, shown: str) -> None:
    assert escaped(given) == shown


def test_a_run_without_records_has_a_card_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "scores_test.csv"):
        (run / name).unlink()
    told, text = front_matter(trainer.export(load(run), tmp_path / "out", "torch"))
    assert "model-index" not in told
    assert "The run has no record of a test or a validation." in text
    made = Sounds({"net": Net()}, {}, RunOptions(device="cpu"))
    _, text = front_matter(trainer.export(made, tmp_path / "own", "torch"))
    assert "Not known: the model was not loaded from a run folder." in text


# ---------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_exported_is_a_sentence_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = load(run), make_run(tmp_path / "other", 2, more="lr: 3\n")
    target = tmp_path / "taken"
    target.mkdir()
    (target / "a").write_text("a")
    for folder, given, message in (
        (target, {}, "not an empty folder: name a new one"),
        (tmp_path / "out", {"to": "onyx"}, "no export to 'onyx'; did you mean 'onnx'"),
        (
            tmp_path / "out",
            {"to": "torch", "seeds": [other]},
            "differs from .* in lr, and not only in",
        ),
        (tmp_path / "out", {"to": "torch", "seeds": [target]}, "is no run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.export(model, folder, **given)
    for arguments, message in (
        ([], "usage: cortex export RUN"),
        ([str(run), "a", "b"], "usage: cortex export RUN"),
        ([str(run), "--tp", "onnx"], "usage: cortex export RUN"),
        ([str(tmp_path / "none")], "is no run folder"),
        ([str(target)], "is no run folder"),
        ([str(run)], "is a run of no installed recipe"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "taken"]
    assert [each.name for each in target.iterdir()] == ["a"]


def test_a_run_that_is_going_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    program = [sys.executable, "-c", f"{lock}; print(flush=True); input()", str(run / ".lock")]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        assert main(["export", str(run)]) == 2
        assert "is still going on: export it when it has ended" in capsys.readouterr().err
    finally:
        child.communicate(b"\n")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]
