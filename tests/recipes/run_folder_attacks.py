"""Attacks by the files of a run folder, and what they do, in a process with an audit hook.

    python -m tests.recipes.run_folder_attacks FOLDER

makes a run of the recogniser in FOLDER, and prints a line of JSON for each attack: its kind and
variant, the message with which it was refused (null: the folder could be used), and what happened
that must not: events, and changed files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import trainer
from recipes.asr.train import Recogniser
from trainer.checkpoint.storage import MANIFEST, encode_manifest
from trainer.cli.replay import replay
from trainer.config.hyperparameters import Configuration
from trainer.data.batch import collate

HPARAMS = Path(__file__).parents[2] / "hparams" / "asr" / "demo.yaml"
TINY = {
    "width": 16, "bands": 32, "log_interval": 1, "nonfinite_patience": 9, "progressbar": False,
    "model": {"front": {"channels": 4}, "encoder": {"num_layers": 1, "num_heads": 2}},
    "precision": "fp32", "device": "cpu", "max_grad_norm": 1.0, "schedule": {"warmup_steps": 1},
}  # fmt: skip
STEP = "2"  # that was skipped
ENTRY = {"size": 1, "sha256": ""}  # of a file in a manifest

# ---------------------------------------------------------------------------------------- the run


def batches() -> list[Any]:
    """Batches of noise, the second of which is not finite."""
    torch.manual_seed(0)
    found = [
        collate([
            {"id": f"{n}-{k}", "text": "ab", "tokens": torch.tensor([3, 4]), "sig": sound}
            for k, sound in enumerate(torch.randn(2, 9000))
        ])
        for n in range(3)
    ]  # fmt: skip
    found[1].sig.data[0, 5] = torch.nan
    return found


def make_run(folder: Path) -> None:
    """Train for three steps, as `recipes/asr/train.py` would."""
    configuration = Configuration(HPARAMS)
    configuration.override({**TINY, "output_folder": str(folder)})
    hparams = configuration.build()
    brain = Recogniser(
        hparams["modules"], hparams["opt_class"], hparams, checkpointer=hparams["checkpointer"]
    )
    brain.fit([1], batches(), batches()[:1])
    dumped = configuration.dump()
    (folder / "hyperparams.yaml").write_text(f"# resolved\n{dumped}")
    record = "2026-01-01 10:00:00 python recipes/asr/train.py hparams/asr/demo.yaml\n"
    (folder / "command.txt").write_text(record)
    (folder / "environment.json").write_text("{}")


# ----------------------------------------------------------------------------------- the witnesses

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile",
    "pty.", "socket.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown",
    "os.link", "os.symlink", "os.truncate", "os.utime", "os.kill", "os.putenv", "os.chdir",
    "shutil.", "tempfile.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.",
    "ctypes.dlopen",
)  # fmt: skip


class Witness:
    """Notes what a process does while it is watched."""

    def __init__(self, outside: Path) -> None:
        self.outside, self.watching = str(outside), False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path, flags = os.fsdecode(args[0]), args[2]
            if isinstance(flags, int) and flags & WRITING and path != os.devnull:
                self.seen.append(f"open for writing {path}")
            elif os.path.realpath(path).startswith(self.outside):
                self.seen.append(f"read {path}")
        elif event.startswith(EVENTS):
            self.seen.append(f"{event} {args!r}"[:200])


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder: kind, mode, size, times, and contents of small files."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files, "."]:
            path = os.path.join(place, name)
            info = os.lstat(path)
            data: Any = os.readlink(path) if stat.S_ISLNK(info.st_mode) else None
            if stat.S_ISREG(info.st_mode):
                data = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[path] = (info.st_mode, info.st_size, info.st_mtime_ns, data)
    return found


# ------------------------------------------------------------------------------------- the attacks

Attack = Callable[[Path, Path], None]  # changes a run folder; the second path is outside of it
ATTACKS: dict[str, tuple[Callable[[Path], Any], list[Attack]]] = {}


def load(run: Path) -> None:
    trainer.load(run, "cpu").transcribe(torch.randn(9000), 16000)


def play(run: Path, step: str = STEP) -> None:
    replay([str(run), step])


def attack(kind: str, action: Callable[[Path], Any], attacks: list[Attack]) -> None:
    assert len(attacks) >= 4, kind
    ATTACKS[kind] = action, attacks


def yaml(*lines: str, drop: str = "") -> Attack:
    """Add lines to the YAML; OUT stands for the path outside, and RUN for the run folder."""

    def change(run: Path, out: Path) -> None:
        path = run / "hyperparams.yaml"
        text = path.read_text()
        kept = [line for line in text.splitlines() if not (drop and line.startswith(drop))]
        text = "\n".join([*kept, *lines]) + "\n"
        path.write_text(text.replace("OUT", str(out)).replace("RUN", str(run)))

    return change


def replaced(old: str, new: str) -> Attack:
    """Replace a text in the YAML, which must be there."""

    def change(run: Path, out: Path) -> None:
        path = run / "hyperparams.yaml"
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new.replace("OUT", str(out))))

    return change


def linked(name: str) -> Attack:
    """Move something of the run folder outside, and leave a link to it."""

    def change(run: Path, out: Path) -> None:
        place = out / f"moved-{name.replace('/', '-')}"
        shutil.move(run / name, place)
        (run / name).symlink_to(place)

    return change


def piped(name: str) -> Attack:
    """Replace a file of the run folder by a pipe, which would block for ever."""

    def change(run: Path, out: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def text(name: str, content: str) -> Attack:
    def change(run: Path, out: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content.replace("OUT", str(out)).replace("RUN", str(run)))

    return change


def checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").iterdir())


def manifest(change: Callable[[dict[str, Any], Path], None]) -> Attack:
    """Change the manifest of the checkpoint, and hash it anew."""

    def attack(run: Path, out: Path) -> None:
        path = checkpoint(run) / MANIFEST
        content = json.loads(path.read_text())
        change(content, out)
        path.write_bytes(encode_manifest(content))

    return attack


def weights(data: Callable[[Path], bytes], name: str = "brain.modules.pt") -> Attack:
    """Exchange a file of the checkpoint, and hash it anew."""

    def attack(run: Path, out: Path) -> None:
        content = data(out)
        (checkpoint(run) / name).write_bytes(content)
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest(lambda fields, _: fields["files"].update({name: entry}))(run, out)

    return attack


class Payload:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickled(value: Any) -> bytes:
    return pickle.dumps(value)


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def batch(change: Callable[[dict[str, Any], Path], Any]) -> Attack:
    """Change what is kept of the skipped step."""

    def attack(run: Path, out: Path) -> None:
        path = run / "nonfinite" / STEP / "batch.pt"
        kept = torch.load(path, weights_only=True)
        kept = change(kept, out) or kept
        path.write_bytes(kept if isinstance(kept, bytes) else saved(kept))

    return attack


def part(value: Any) -> Attack:
    """Put a part into the kept batch."""

    def change(kept: dict[str, Any], out: Path) -> None:
        made = value(out) if callable(value) else value
        kept["batch"]["fields"]["extra"] = made

    return batch(change)


def whole(value: Any) -> Attack:
    return batch(lambda kept, out: kept.update(batch=value))


def field(name: str, value: Any) -> Attack:
    return batch(lambda kept, out: kept.update({name: value}))


def deep(kept: dict[str, Any], out: Path) -> bytes:
    """Nest 100,000 lists in place of the batch, which Python's pickler could not write."""
    mark = "to be replaced"
    written = b"X\x0e\x00\x00\x00" + mark.encode()
    lists = b"]" * 10**5 + b"a" * (10**5 - 1)  # empty lists, each put into the one before
    new = io.BytesIO()
    kept["batch"]["fields"]["extra"] = mark
    with zipfile.ZipFile(io.BytesIO(saved(kept))) as before, zipfile.ZipFile(new, "w") as after:
        for each in before.namelist():
            content = before.read(each)
            if each.endswith("data.pkl"):
                assert content.count(written) == 1
                content = content.replace(written, lists)
            after.writestr(each, content)
    return new.getvalue()


def nested(depth: int) -> dict[str, Any]:
    kept: dict[str, Any] = {"kind": "plain", "value": 1}
    for _ in range(depth):
        kept = {"kind": "row", "class": "builtins:list", "parts": [kept]}
    return kept


def obj(name: str, kind: str = "object", /, **parts: Any) -> dict[str, Any]:
    values = {key: {"kind": "plain", "value": value} for key, value in parts.items()}
    return {
        "kind": kind,
        "class": name,
        "parts": values if kind == "object" else [*values.values()],
    }


CANARY = """
import pathlib
pathlib.Path("OUT/ran").write_text("ran")
class Fire:
    def __init__(self, *args, **kwargs):
        pathlib.Path("OUT/ran").write_text("ran")
def fire(*args, **kwargs):
    pathlib.Path("OUT/ran").write_text("ran")
"""

attack("apply", load, [
    yaml("x: !apply:os.system ['touch OUT/ran']"),
    yaml("x: !apply:open [OUT/ran, w]"),
    yaml("x: !apply:torch.nn.Linear [2, 2]"),
    yaml("x: !apply:subprocess.run [[touch, OUT/ran]]"),
    yaml("x: !apply:range [1000000000000]"),
    yaml("x: !apply:torch.nn.functional.relu [!ref <model>]"),
    yaml("x: !apply:builtins.len [[1]]"),
    yaml("x: !new:recipes.common.sentences.vocabulary {style: prose}"),
])  # fmt: skip
attack("applyref", load, [
    yaml("x: !applyref:os.system ['touch OUT/ran']"),
    yaml("x: !applyref:len [abc]"),
    yaml("x: !applyref:recipes.common.sentences.vocabulary [prose]"),
    yaml("corpus: {x: !applyref:open [OUT/ran, w]}", drop="corpus"),
])  # fmt: skip
attack("other packages", load, [
    yaml("x: !new:torchmetrics.MeanMetric"),
    yaml("x: !new:torchmetrics.multimodal.CLIPScore"),
    yaml("x: !new:lhotse.features.fbank.TorchaudioFbank"),
    yaml("x: !new:torchvision.datasets.MNIST {root: OUT, download: true}"),
    yaml("x: !new:torchaudio.datasets.YESNO {root: OUT, download: true}"),
    yaml("x: !new:torch.utils.data.DataLoader {dataset: [1]}"),
    yaml("x: !new:torch.utils.tensorboard.SummaryWriter {log_dir: OUT/ran}"),
    yaml("x: !new:trainer.loggers.TensorBoardLogger {folder: OUT/ran}"),
    yaml("x: !new:trainer.cli.folder.RunFolder {path: OUT}"),
    yaml("x: !new:recipes.common.judges.Judges {measures: [stoi], sample_rate: 8000, workers: 2}"),
    yaml("x: !new:dict {a: 1}"),
    yaml("x: !new:torch.nn.DataParallel {module: !ref <model>}"),
])  # fmt: skip
attack("modules beside it", load, [
    yaml("x: !new:canary.Fire"),
    yaml("x: !name:canary.fire"),
    yaml("x: !new:within.Fire"),
    yaml("x: !module:canary {}"),
    yaml("x: !new:recipes.asr.canary.Fire"),
    yaml("x: !new:trainer.canary.Fire"),
])  # fmt: skip
attack("attributes", load, [
    yaml("x: !ref <model.forward>"),
    yaml("x: !ref <codec.tokens>"),
    yaml("x: !ref <model.encoder.conformer_layers>"),
    yaml("x: !ref <model.__class__>"),
    yaml("x: !ref <checkpointer.folder>"),
])  # fmt: skip
attack("other YAML files", load, [
    yaml("base: OUT/secret.yaml"),
    yaml("base: ../../outside/secret.yaml"),
    yaml("x: !include:OUT/secret.yaml"),
    yaml("x: !include:OUT/pipe"),
    yaml("base: OUT/pipe.yaml"),
])  # fmt: skip
attack("python tags", load, [
    yaml("x: !!python/object/apply:os.system ['touch OUT/ran']"),
    yaml("x: !!python/name:os.system"),
    yaml("x: !!python/module:canary"),
    yaml("x: !!python/object/new:canary.Fire []"),
])  # fmt: skip
attack("checkpointer", load, [
    replaced("<output_folder>/checkpoints", "OUT/checkpoints"),
    replaced("<output_folder>/checkpoints", "<output_folder>/../../outside"),
    replaced("<output_folder>/checkpoints", "/"),
    yaml("y: !new:trainer.Checkpointer {folder: OUT}"),
    text("checkpoints/.saving-999999999@x-a/half.pt", "x"),
])  # fmt: skip
attack("output folder", load, [
    yaml("output_folder: OUT/new", drop="output_folder"),
    yaml("output_folder: ../outside", drop="output_folder"),
    yaml("output_folder: !new:canary.Fire", drop="output_folder"),
    yaml("output_folder: OUT/pipe", drop="output_folder"),
])  # fmt: skip


def pieces(path: str, before: Attack | None = None) -> Attack:
    """A tokenizer that reads a file."""

    def change(run: Path, out: Path) -> None:
        if before is not None:
            before(run, out)
        name = path.replace("OUT", str(out)).replace("RUN", str(run))
        line = f"codec: !new:recipes.asr.text.Pieces {{file: '{name}', size: 29}}"
        yaml(line, drop="codec:")(run, out)

    return change


attack("tokenizer", load, [
    pieces("OUT/secret.yaml"),
    pieces("/etc/passwd"),
    pieces("/dev/zero"),
    pieces("RUN/pipe", piped("pipe")),
    pieces("RUN/link", lambda run, out: (run / "link").symlink_to(out / "secret.yaml")),
    pieces("RUN/../../outside/secret.yaml"),
    pieces("RUN/tokens", text("tokens", "no tokens at all")),
    yaml("c: !name:recipes.asr.text.Pieces [OUT/secret.yaml, 29]"),
    yaml("c: !new:recipes.finetune.classify.Labels {file: OUT/secret.yaml}"),
    yaml("c: !new:recipes.finetune.classify.Labels [/etc/passwd]"),
])  # fmt: skip
attack("sizes", load, [
    yaml("width: 1000000", drop="width:"),
    yaml("x: !new:torch.nn.Linear {in_features: 1000000, out_features: 1000000}"),
    yaml("x: !new:torch.nn.Embedding {num_embeddings: 100000000, embedding_dim: 64}"),
    yaml("bands: -1", drop="bands:"),
    yaml("width: 'sixteen'", drop="width:"),
    yaml("sample_rate: .inf", drop="sample_rate:"),
])  # fmt: skip
attack("modules of other names", load, [
    replaced("modules:\n  model: !ref <model>", "modules:\n  net: !ref <model>"),
    replaced("modules:", "modules:\n  other: !ref <output_folder>"),
    replaced("modules:", "modules:\n  other: !ref <codec>"),
    replaced("modules:", "modules:\n  other: !new:canary.Fire"),
    replaced("modules:", "modules:\n  ../../outside: !ref <seed>"),
    replaced("modules:", "modules:\n  '!new:canary.Fire': {}"),
    replaced("modules:", "modules:\n  other: !ref <x>\nx: !new:canary.Fire\ny:"),
    yaml("modules: !ref <model>", drop="  model: !ref <model>"),
    pieces("../outside/secret.yaml", replaced("modules:", "modules:\n  x: !ref <output_folder>")),
])  # fmt: skip
attack("bombs", load, [
    yaml("a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
         *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))),
    yaml("x: " + "[" * 10**4 + "]" * 10**4),
    yaml(*(f"k{n}: 1" for n in range(10_000))),
    yaml("x: " + "y" * 10**6),
    yaml("x: !ref <x>"),
    yaml("a: 99", "b: !ref <a>**<a>**<a>"),
])  # fmt: skip
attack("run options", load, [
    yaml("compile: true"),
    yaml("tensorboard: true", "profile_training: true"),
    yaml("replay: OUT/secret.yaml", "find_lr: true"),
    yaml("overwrite: true", "debug: true"),
    yaml("callbacks: [!new:trainer.schedules.EarlyStopping {metric: wer}]"),
    yaml("threads: 100000000", "average_checkpoints: 1000000000", drop="threads:"),
    yaml("clip: !new:canary.Fire"),
    yaml("device: 'cuda:99'", drop="device:"),
])  # fmt: skip
attack("manifest", load, [
    manifest(lambda fields, out: fields["files"].update({f"{out}/x.pt": ENTRY})),
    manifest(lambda fields, out: fields["files"].update({"../x.pt": ENTRY})),
    manifest(lambda fields, out: fields.update(meta={"wer": "no number"}, number="x")),
    manifest(lambda fields, out: fields.update(format=10**30)),
    manifest(lambda fields, out: fields["files"].clear()),
    lambda run, out: (checkpoint(run) / MANIFEST).write_text("!!python/name:os.system"),
])  # fmt: skip
attack("weights", load, [
    weights(lambda out: pickled(Payload(os.system, f"touch {out}/ran"))),
    weights(lambda out: saved(Payload(os.system, f"touch {out}/ran"))),
    weights(lambda out: saved({"model": Payload(exec, f"open('{out}/ran', 'w')")})),
    weights(lambda out: saved(torch.nn.Linear(2, 2))),
    weights(lambda out: saved([1, 2, {3: 4}])),
    weights(lambda out: saved({"model.classify.bias": torch.zeros(1).expand(10**12)})),
    weights(lambda out: saved(1).replace(b"K\x01", b"cos\n\x1b[2Jx\n")),
    weights(lambda out: b"PK\x03\x04 no zip"),
    weights(lambda out: b""),
])  # fmt: skip
attack("links in the folder", load, [
    linked("hyperparams.yaml"),
    linked("checkpoints"),
    lambda run, out: linked(f"checkpoints/{checkpoint(run).name}")(run, out),
    lambda run, out: linked(f"checkpoints/{checkpoint(run).name}/brain.modules.pt")(run, out),
    lambda run, out: piped(f"checkpoints/{checkpoint(run).name}/{MANIFEST}")(run, out),
    piped("hyperparams.yaml"),
])  # fmt: skip
attack("links of kept steps", play, [
    linked("nonfinite"),
    linked(f"nonfinite/{STEP}"),
    linked(f"nonfinite/{STEP}/batch.pt"),
    piped(f"nonfinite/{STEP}/batch.pt"),
])  # fmt: skip
attack("step names", lambda run: [  # The first that is not refused ends it.
    play(run, (run / "step").read_text())
], [
    text("step", f"../../outside/kept/{STEP}"),
    text("step", "OUT/kept"),
    text("step", f"../nonfinite/{STEP}"),
    text("step", "2/../2"),
    text("step", "2\x1b[2J"),
    text("step", "."),
])  # fmt: skip
attack("recorded commands", play, [
    text("command.txt", "2026-01-01 10:00:00 python OUT/train.py x.yaml\n"),
    text("command.txt", "2026-01-01 10:00:00 python train.py x.yaml\n"),
    text("command.txt", "2026-01-01 10:00:00 python RUN/train.py x.yaml\n"),
    text("command.txt", "2026-01-01 10:00:00 python \x1b]0;x\x07train.py ';touch OUT/ran'\n"),
    text("command.txt", "2026-01-01 10:00:00 python 'unclosed\n"),
    piped("command.txt"),
    linked("command.txt"),
    text("command.txt", "x" * 10**7),
])  # fmt: skip
attack("kept pickles", play, [
    batch(lambda kept, out: pickled(Payload(os.system, f"touch {out}/ran"))),
    batch(lambda kept, out: saved(Payload(os.system, f"touch {out}/ran"))),
    batch(lambda kept, out: saved({**kept, "batch": Payload(eval, f"open('{out}/ran', 'w')")})),
    batch(lambda kept, out: b"no zip"),
    batch(deep),
])  # fmt: skip
attack("kept classes", play, [
    part(lambda out: obj("tests.recipes.run_folder_canary:Eraser", name=f"{out}/precious")),
    part(lambda out: obj("tests.recipes.run_folder_canary:Record", name=f"{out}/precious")),
    part(obj("subprocess:Popen", args="x")),
    part(obj("pathlib:Path", parts="x")),
    part(obj("torch.nn.modules.linear:Linear", weight=1)),
    part(obj("recipes.asr.train:Recogniser", modules=1)),
    part(obj("recipes.asr.text:Pieces", file="x")),
    part(lambda out: obj("recipes.asr.scoring:Scores", folder=f"{out}/precious")),
    part(obj("trainer.checkpoint.checkpointer:Checkpointer", folder="/")),
    part(obj("tempfile:_TemporaryFileCloser", name="x")),
    part(obj("trainer:load_hparams", x=1)),
    part(obj("trainer.Brain:x", x=1)),
    part(obj("collections:UserDict", "row", a=1)),
    part(obj("tests.recipes.run_folder_canary:Closing", "row", a=1)),
    part(obj("tests.recipes.run_folder_canary:Finalised", "row", a=1)),
    part(lambda out: obj("tests.recipes.run_folder_canary:Writing", "row", a=f"{out}/precious")),
    part(obj("tests.recipes.run_folder_canary:Pair", "row", a=1, b=2, c=3)),
])  # fmt: skip
attack("kept arrays", play, [
    part({"kind": "array", "dtype": "O", "value": [1]}),
    part({"kind": "array", "dtype": "object", "value": [[1]]}),
    part({"kind": "array", "dtype": "float32", "value": ["x"]}),
    part({"kind": "array", "dtype": "(1000000,1000000)f8", "value": [1]}),
    part({"kind": "array", "dtype": 5, "value": [1]}),
    part({"kind": "array", "dtype": "U999999", "value": ["a"] * 10**5}),
])  # fmt: skip
attack("kept parts", play, [
    whole(nested(13)),
    whole(nested(60)),
    whole({"kind": "tensor", "value": [1]}),
    whole({"kind": "plain", "value": torch.zeros(1)}),
    whole({"kind": "batch", "fields": {1: 2}, "size": 3}),
    whole({"kind": "batch", "fields": {}, "size": -1}),
    whole({"kind": "mapping", "class": "", "parts": [[nested(1)], [nested(1)]]}),
    whole({"kind": "tensor", "value": torch.zeros(1).expand(10**12)}),
    whole({"kind": "x"}),
    whole({}),
    part({"kind": "lost", "value": 3}),
])  # fmt: skip
attack("kept fields", play, [
    field("generators", {"torch": torch.zeros(3)}),
    field("generators", {"torch": "x", "python": 3}),
    field("step", -1),
    field("epoch", 10**30),
    field("optimizer", "other"),
    field("what", None),
    field("batch", 3),
    field("format", "x"),
])  # fmt: skip


ESCAPE = "\\e[2J\\e]0;x\\a"  # as YAML writes it: clears the screen, and sets its title
attack("terminals", load, [
    yaml(f'x: !ref "<{ESCAPE}>"'),
    yaml(f'"{ESCAPE}": !new:canary.Fire'),
    yaml(f'output_folder: "{ESCAPE}"', f'seed: "{ESCAPE}"', drop="output_folder"),
    yaml(f'x: !new:torch.nn.Linear {{in_features: "{ESCAPE}", out_features: 1}}'),
])  # fmt: skip
attack("terminals of kept batches", play, [
    batch(lambda kept, out: kept["batch"]["fields"]["id"]["parts"][0].update(value="\x1b[2J")),
    batch(lambda kept, out: kept["batch"]["fields"].update({"\x1b[2J": nested(0)})),
    part({"kind": "lost", "value": "\x1b[2J"}),
    part(obj("\x1b[2J:x")),
    part({"kind": "\x1b[2J"}),
])  # fmt: skip


def in_the_way(entry: str) -> Attack:
    """Put a module into the run folder that a tokenizer imports, and the folder on the path."""

    def change(run: Path, out: Path) -> None:
        pieces("RUN/none", text("sentencepiece.py", CANARY))(run, out)
        (out / "link").unlink(missing_ok=True)
        (out / "link").symlink_to(run)
        os.chdir(run)
        sys.path.insert(0, entry.replace("RUN", str(run)).replace("OUT", str(out)))
        sys.modules.pop("sentencepiece", None)

    return change


def load_on_path(run: Path) -> None:
    try:
        load(run)
    finally:
        del sys.path[0]


attack("modules in the run folder", load_on_path, [
    in_the_way(""),
    in_the_way("."),
    in_the_way("RUN"),
    in_the_way("OUT/link"),
    in_the_way("RUN/../../outside/link"),
])  # fmt: skip
attack("other files", load, [
    piped("environment.json"),
    text("metrics.jsonl", "!!python/object/apply:os.system ['touch OUT/ran']\n" * 1000),
    linked("environment.json"),
    text("train.log", "\x1b[2J"),
    text("pyproject.toml", '[project.entry-points."cortex.recipes"]\nx = "canary"\n'),
])  # fmt: skip


# What is noticed, to know that it would be.
CONTROLS = [
    text("code", "open('OUT/ran', 'w')"),
    text("code", "(run / 'new').mkdir()"),
    text("code", "import os; os.utime(run / 'hyperparams.yaml')"),
    text("code", "import subprocess; subprocess.run(['true'])"),
    text("code", "import os; os.system('true')"),
    text("code", "import socket; socket.socket()"),
    text("code", "import sys; sys.path.insert(0, str(run)); import within"),
    text("code", "open('OUT/secret.yaml')"),
]

# ------------------------------------------------------------------------------------ the process


def attempts(folder: Path) -> Iterator[dict[str, Any]]:
    """Make each attack in a copy of the run, and yield what came of it."""
    run, outside, here = folder / "made", folder / "outside", folder / "here"
    for each in (outside, here):
        each.mkdir()
    make_run(run)
    (outside / "secret.yaml").write_text("secret: 1\n")
    (outside / "precious").write_text("precious")
    os.mkfifo(outside / "pipe")
    os.mkfifo(outside / "pipe.yaml")
    stale = outside / "checkpoints" / ".saving-999999999@x-a"
    stale.mkdir(parents=True)
    (stale / "half.pt").write_text("x")
    shutil.copytree(run / "nonfinite", outside / "kept")
    (outside / "train.py").write_text(CANARY.replace("OUT", str(outside)))
    for name in ("canary.py", "train.py"):
        (here / name).write_text(CANARY.replace("OUT", str(outside)))
    # A module of the program with classes that a file must not have made.
    import tests.recipes.run_folder_canary  # noqa: F401

    os.chdir(here)
    load(run)  # Everything is imported.
    play(run)
    witness = Witness(outside)
    ATTACKS["control"] = lambda run: exec((run / "code").read_text(), {"run": run}), CONTROLS
    for kind, (action, attacks) in ATTACKS.items():
        for number, change in enumerate(attacks):
            copy = folder / "copies" / f"{kind.replace(' ', '-')}-{number}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copytree(run, copy)
            (copy / "within.py").write_text(CANARY.replace("OUT", str(outside)))
            shutil.copyfile(outside / "train.py", copy / "train.py")
            change(copy, outside)
            before, known, refused = tree(folder), set(sys.modules), None
            witness.seen, witness.watching = [], True
            try:
                action(copy)
            except ValueError as error:
                refused = str(error)
            finally:
                witness.watching = False
                os.chdir(here)
            changed = {*before.items()} ^ {*tree(folder).items()}
            new = [name for name in set(sys.modules) - known if from_below(name, folder)]
            yield {
                "kind": kind, "variant": number, "refused": refused,
                "violations": [*witness.seen, *map(str, changed), *new],
            }  # fmt: skip
            linked_away = [each for each in outside.iterdir() if each.name.startswith("moved-")]
            for each in linked_away:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            shutil.rmtree(copy)


def from_below(name: str, folder: Path) -> bool:
    """Return True for an imported module that lies below a folder."""
    return str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # of broken checkpoints, which are named
    torch.set_num_threads(1)
    for found in attempts(folder):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
