"""Model cards: the README.md of an export, written from the model's run.

Texts of a run may come from elsewhere: all are escaped, and files are taken from within the run.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from ruamel.yaml.nodes import ScalarNode

from trainer import json_files
from trainer.config.building import resolve
from trainer.config.reading import items, object_name, paths, tag
from trainer.config.run_folder import TRAINING_ONLY
from trainer.texts import number, spread
from trainer.untrusted import confined, printable, read_text

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.inference.loading import Origin
    from trainer.inference.model import Model

# Methods of models: the hub's name of the task, and an example of a call.
USES = {
    "transcribe": ("automatic-speech-recognition", 'print(model.transcribe("x.wav").text)'),
    "enhance": ("audio-to-audio", 'model.enhance("x.wav").save("enhanced.wav")'),
    "separate": (
        "audio-to-audio",
        'for number, track in enumerate(model.separate("x.wav")):\n'
        '    track.save(f"speaker{number}.wav")',
    ),
    "vocode": ("text-to-speech", 'model.vocode("x.wav").save("resynthesised.wav")'),
    "synthesise": ("text-to-speech", 'model.synthesise("Turn left.").save("speech.wav")'),
    "classify": ("audio-classification", 'print(model.classify("x.wav").label)'),
    "embed": (
        "audio-classification",
        'print(model.embed("a.wav").similarity(model.embed("b.wav")))',
    ),
}
PACKAGES = (
    "cortex-speech", "torch", "torchaudio", "lhotse", "transformers", "peft", "numpy", "soundfile",
)  # fmt: skip
MAX_SAMPLES = 4  # rows of the table
MAX_BYTES = 5 << 20  # of all sound files
MAX_TEXT = 200  # characters of a cell
MAX_COMMANDS = 5
NOT_KNOWN = "Not known: the model was not loaded from a run folder."


@dataclass
class _Metric:
    """Value of a metric in the run, and texts of its spread over items and over seeds."""

    name: str
    shown: str  # with its unit
    value: float
    over_items: str
    over_seeds: str


def write_card(
    folder: Path,
    model: Model | Brain,
    origin: Origin | None,
    described: Mapping[str, Any],
    code: str,
    seeds: Sequence[str | Path],
) -> None:
    """Write README.md and the samples that it shows into an export.

    Args:
        folder: the export.
        model: the model.
        origin: source that it was loaded from, or None.
        described: content of export.json.
        code: example of how to use a network; empty for weights.
        seeds: folders of runs that differ only in their seeds.

    Raises:
        ValueError: a folder in ``seeds`` is no run, or differs in more than its seed.
    """
    if origin is None and seeds:
        raise ValueError("seeds are for a model that trainer.load made from a run folder")
    package = _package(model, origin)
    kind = type(model).__name__
    title = str(getattr(package, "__doc__", None) or kind).strip().partition("\n")[0].rstrip(".")
    name = package.__name__.rpartition(".")[2] if package else kind
    tags = [printable(name), described["format"]]
    tasks: list[str] = getattr(type(model), "tasks", list)()
    stage, corpora, data, training = "", [], NOT_KNOWN, NOT_KNOWN
    metrics: list[_Metric] = []
    samples = "The run has no sounds to show."
    if origin is not None:
        run = origin.run.folder
        stage, metrics = _metrics(run, seeds, _units(model, origin))
        corpora = _corpora(origin)
        data, training = _data(corpora, run), _training(run)
        samples = _samples(run, folder) or samples
    sections = {
        "How to use it": _use_of_network(described, code) if code else _use_of_model(tasks),
        "Data": data,
        "Results": _results(stage, metrics),
        "Training": training,
        "Samples": samples,
        "Known limits": str(getattr(package, "LIMITS", "")).strip() or "None are stated.",
        "Licence": "To be filled in by the author, here and as `license:` above: that of the data "
        "and of a pretrained model may bind these weights.",
    }
    parts = [
        _front_matter(title, tags, tasks, corpora[0][1] if corpora else "unknown", stage, metrics),
        f"# {escaped(title)}",
        _about(model, origin, described),
        *(f"## {name}\n\n{text}" for name, text in sections.items()),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- texts

# Characters with a meaning in Markdown, and beginnings of bare links and lists.
SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$]|(?<=\w):(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)])")


def escaped(text: object, most: int = MAX_TEXT) -> str:
    """Return a text on one line, with special characters of Markdown and HTML escaped.

    Args:
        text: anything; its ``str()`` is used.
        most: maximum number of characters before escaping.
    """
    line = " ".join(printable(" ".join(str(text).split())).split())
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", line)


def _fenced(text: str, language: str = "") -> str:
    """Return a fenced block of code, with a fence longer than any in the text."""
    lines = [printable(line) for line in text.splitlines()]
    longest = max([2, *(len(run) for line in lines for run in re.findall("`+", line))])
    fence = "`" * (longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------- the beginning


def _package(model: Model | Brain, origin: Origin | None) -> Any:
    """Return the package of the recipe, or None."""
    found = [] if origin is None else origin.run.recipes()
    own = type(model).__module__.rpartition(".")[0]
    return sys.modules.get(own if own in found else found[0] if len(found) == 1 else "")


def _front_matter(
    title: str,
    tags: Sequence[str],
    tasks: Sequence[str],
    corpus: str,
    stage: str,
    metrics: Sequence[_Metric],
) -> str:
    """Return the metadata that the hub reads, in YAML."""
    told: dict[str, Any] = {"library_name": "cortex-speech", "tags": ["speech", *tags]}
    measured = [
        {
            "type": printable(each.name),
            "name": printable(each.shown),
            "value": float(f"{each.value:.6g}"),
        }
        for each in metrics
        if each.name != "loss"
    ]
    task = next((USES[each][0] for each in tasks if each in USES), None)
    if task is not None:
        told["pipeline_tag"] = task
    if task is not None and measured:
        dataset = {"type": printable(corpus), "name": printable(corpus), "split": stage}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": measured}
        told["model-index"] = [{"name": printable(title), "results": [result]}]
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n# license: to be filled in by the author\n{text}---"


def _about(model: Model | Brain, origin: Origin | None, described: Mapping[str, Any]) -> str:
    count = sum(each.numel() for each in model.modules.parameters())
    text = f"`{type(model).__name__}`, {count:,} parameters"
    if origin is not None:
        text += f", from the run {escaped(os.path.basename(os.path.abspath(origin.run.folder)))}"
        if key := origin.max_key or origin.min_key:
            text += f", of the checkpoint with the best {escaped(key)}"
    return f"{text}. {described.get('about', '')}".strip()


def _use_of_network(described: Mapping[str, Any], code: str) -> str:
    ports = [
        [f"`{each['name']}`", kind, ", ".join(map(str, each["axes"])), escaped(each["meaning"])]
        for kind in ("input", "output")
        for each in described[f"{kind}s"]
    ]
    checked = described["checked"]
    return "\n\n".join([
        _fenced(code, "python"),
        _table(("name", "", "axes", "meaning"), ports),
        f"What else a program needs to know, such as sample rate and mels, is in `settings` of "
        f"`export.json`. The file was compared to torch on inputs of batch sizes and lengths "
        f"{', '.join(str(tuple(each)) for each in checked['batch_sizes_and_lengths'])}: the "
        f"largest difference was {checked['largest_difference']:.1e}.",
    ])  # fmt: skip


def _use_of_model(tasks: Sequence[str]) -> str:
    first = 'import trainer\n\nmodel = trainer.load(".")  # the path of this folder'
    return "\n\n".join([
        _fenced("pip install 'cortex-speech[recipes,hf]'", "sh"),
        _fenced("\n".join([first, *(USES[each][1] for each in tasks if each in USES)]), "python"),
        "From the hub, `huggingface_hub.snapshot_download(\"NAME\")` gives the path.",
    ])  # fmt: skip


# ----------------------------------------------------------------------------- facts of the run


def _corpora(origin: Origin) -> list[tuple[str, str, str]]:
    """Return the training data: key, name and plain arguments of each object."""
    configuration = origin.run.configuration
    root = configuration.root
    with suppress(ValueError):  # The YAML may refer to a missing file.
        root = resolve(root, configuration.registry)
    found = []
    for key, node in items(root):
        name = object_name(node)
        if name not in TRAINING_ONLY and configuration.registry.is_for_training_only(name):
            given = [f"{at}: {_short(e)}" for at, e in paths(node) if isinstance(e, ScalarNode)]
            found.append((key, name, "; ".join(given)))
    return found


def _short(node: ScalarNode) -> str:
    """Return a value as text; for an absolute path, its last part."""
    text = "null" if tag(node).endswith(":null") else str(node.value)
    return os.path.basename(text.rstrip(os.sep)) if os.path.isabs(text) else text


def _data(corpora: Sequence[tuple[str, str, str]], run: Path) -> str:
    rows = [(escaped(name), escaped(key), escaped(given, 400)) for key, name, given in corpora]
    parts = [_table(("made by", "key of the YAML", "arguments"), rows)] if rows else []
    if counts := _examples(run):
        told = ", ".join(f"{escaped(stage)} {count:,}" for stage, count in counts.items())
        parts.append(f"Items of a pass through each stage: {told}.")
    return "\n\n".join(parts) or "The YAML of the run names no data."


def _examples(run: Path) -> dict[str, int]:
    """Return the number of items of each stage: the largest of its passes, which may be short."""
    from trainer.report.history import read_history

    counts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for record in read_history(confined(run, run / "metrics.jsonl")).stages:
            count = record.get("examples")
            if isinstance(count, (int, float)) and 0 < count < 1e15:
                stage = str(record["stage"])
                counts[stage] = max(int(count), counts.get(stage, 0))
    return counts


def _metrics(
    run: Path, seeds: Sequence[str | Path], units: Mapping[str, str]
) -> tuple[str, list[_Metric]]:
    """Return the stage, "test" or "valid", and its metrics.

    Raises:
        ValueError: a folder in ``seeds`` is no run, or differs in more than its seed.
    """
    from trainer.cli import runs

    facts = runs.read_run(run)
    others = [runs.read_run(each).metrics for each in _siblings(run, seeds)]
    measured = {name: value for name, value in facts.metrics.items() if math.isfinite(value)}
    over_items = _over_items(run, facts.stage, measured)
    found = []
    for name, value in measured.items():
        each = [v for v in (value, *(o.get(name, math.nan) for o in others)) if math.isfinite(v)]
        over_seeds = f"{spread(each)} over {len(each)} seeds" if len(each) > 1 else "–"
        shown = f"{name} ({units[name]})" if name in units else name
        found.append(_Metric(name, shown, value, over_items.get(name, "–"), over_seeds))
    return facts.stage, found


def _siblings(run: Path, seeds: Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs that differ from a run only in their seeds."""
    from trainer.cli import runs

    folders, problems = runs.run_folders([str(each) for each in seeds])
    if problems:
        raise ValueError(problems[0])
    own = runs.settings(run) if folders else {}
    for each in folders:
        other = runs.settings(each)
        for key in {**own, **other}:
            if key != "seed" and own.get(key) != other.get(key):
                raise ValueError(
                    f"{each} differs from {run} in {key}, and not only in its seed: "
                    "name runs of the same hyperparameters"
                )
    return [each for each in folders if each.resolve() != run.resolve()]


def _over_items(run: Path, stage: str, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the standard deviation over items of metrics, from tables with a row for each item.

    Such a table is a CSV file in the run folder; the mean of its column is the metric.
    """
    found: dict[str, str] = {}
    for path in sorted(run.glob(f"*_{stage}.csv")) if stage else ():
        with suppress(OSError, ValueError, csv.Error):
            rows = list(csv.DictReader(read_text(run, path.name, 4 << 20).splitlines()))
            for name, mean in metrics.items():  # The last row may be the mean.
                values = [float(r[name]) for r in rows if r.get(name) and r.get("id") != "mean"]
                if len(values) > 1 and math.isclose(
                    statistics.fmean(values), mean, rel_tol=0.01, abs_tol=0.001
                ):
                    deviation = number(statistics.stdev(values))
                    found[name] = f"{deviation} over {len(values)} items"
    return found


def _units(model: Model | Brain, origin: Origin) -> Mapping[str, str]:
    """Return units of metrics by name, from the model; for a Brain, from its recipe's model."""
    kind: type = type(model)
    if not hasattr(kind, "units"):
        with suppress(ValueError, ImportError):  # The recipe may have no model.
            kind = origin.run.model_class()
    units: Mapping[str, str] = getattr(kind, "units", {})
    return units


def _results(stage: str, metrics: Sequence[_Metric]) -> str:
    if not metrics:
        return "The run has no record of a test or a validation."
    columns = {
        "metric": [escaped(each.shown) for each in metrics],
        "this run": [number(each.value) for each in metrics],
        "standard deviation": [each.over_items for each in metrics],
        "mean ± standard deviation": [each.over_seeds for each in metrics],
    }
    known = {head: cells for head, cells in columns.items() if {*cells} != {"–"}}
    of = "test" if stage == "test" else "validation: the run was not tested"
    return f"Of the {of}.\n\n{_table([*known], zip(*known.values(), strict=True))}"


def _training(run: Path) -> str:
    from trainer.report.history import commands_of

    text = ""
    with suppress(OSError, ValueError):
        text = read_text(run, "command.txt")
    starts, changes = commands_of(text.splitlines())
    commands = [_shortened(words) for _, words in starts[-MAX_COMMANDS:]]
    parts = ["The run has no record of its command."]
    if commands:
        options = ", ".join(f"`{each}`" for each in _options(commands[-1]))
        parts = [
            "The commands of the run:",
            _fenced("\n".join(map(shlex.join, commands)), "sh"),
            f"Other than in the YAML: {options}."
            if options
            else "All values are those of the YAML.",
        ]
    parts += [f"- {escaped(each)}" for each in changes[-MAX_COMMANDS:]]
    return "\n\n".join(filter(None, [*parts, _environment(run)]))


def _shortened(command: list[str]) -> list[str]:
    """Return the words of a command with absolute paths cut to their last parts."""
    words = list(command)
    for place, word in enumerate(words):
        if os.path.isabs(word):
            below = re.search(r"(recipes|hparams)/.*", word) if place else None
            words[place] = below[0] if below else os.path.basename(word.rstrip("/"))
    return words


def _options(command: Sequence[str]) -> list[str]:
    """Return the options of a command, except those for its output and its progress bar."""
    given: list[list[str]] = []
    for word in command:
        if word.startswith("--"):
            given.append([word[2:]])
        elif given:
            given[-1].append(word)
    left_out = ("output_folder", "no-progressbar", "progressbar", "overwrite")
    return [
        printable(" ".join(words)).replace("`", "'")
        for words in given
        if words[0].partition("=")[0] not in left_out
    ]


def _environment(run: Path) -> str:
    """Return the recorded revision and versions."""
    found = json_files.read_mapping(run, run / "environment.json")
    git, packages, gpus = found.get("git"), found.get("packages"), found.get("gpus")
    rows = []
    if isinstance(git, dict) and git.get("revision"):
        changed = " with changes that were not committed" if git.get("dirty") else ""
        rows.append(["revision of the recipe", f"{escaped(git['revision'])}{changed}"])
    rows += [[key, escaped(found[key])] for key in ("python", "cuda") if found.get(key)]
    if isinstance(gpus, list) and gpus:
        rows.append(["GPUs", escaped(", ".join(map(str, gpus)))])
    if isinstance(packages, dict):
        rows += [[each, escaped(packages[each])] for each in PACKAGES if each in packages]
    return _table(("", ""), rows) if rows else ""


# ------------------------------------------------------------------------------------------ samples


def _samples(run: Path, folder: Path) -> str:
    """Copy some sounds of the run, first those of the test; return their table, if any."""
    from trainer.report.samples import read_tables

    for table in read_tables(run):
        names = list(dict.fromkeys(name for row in table.rows for name in row))
        rows = [
            [_cell(row.get(name, {}), table.folder, folder / "samples") for name in names]
            for row in table.rows[:MAX_SAMPLES]
        ]
        heard = [row for row in rows if any(cell.startswith("<audio") for cell in row)]
        if heard:
            note = escaped(f"Of the {table.title}. {table.facts}", 400)
            return f"{note}\n\n{_table([escaped(each) for each in names], heard)}"
    return ""


def _cell(cell: Mapping[str, Any], source: Path, target: Path) -> str:
    """Return a cell of the table; copy the file of a sound."""
    kind = cell.get("kind")
    if kind == "number" and isinstance(cell.get("value"), (int, float)):
        return number(cell["value"])
    if kind == "text":
        return escaped(cell.get("text", ""))
    if kind == "aligned" and isinstance(cell.get("pairs"), list):
        pairs = [each for each in cell["pairs"] if isinstance(each, list) and len(each) == 2]
        said, heard = (" ".join(str(p[n]) for p in pairs if p[n] is not None) for n in (0, 1))
        return f"{escaped(said)}<br>{escaped(heard)}"
    name = re.sub(r"[^\w.-]", "_", os.path.basename(str(cell.get("file"))))
    if kind == "audio" and _copy_sound(source, cell.get("file"), target / name):
        player = f'<audio controls src="samples/{name}"></audio>'
        return f"{player} [{escaped(name)}](samples/{name})"
    return ""


def _copy_sound(source: Path, name: object, target: Path) -> bool:
    """Copy a sound in a folder; return False for another file, or if no room is left."""
    from trainer.report.samples import read_file

    left = MAX_BYTES - sum(each.stat().st_size for each in target.parent.glob("*"))
    kind, content = read_file(source, name, left)
    if not kind.startswith("audio/") or len(content) > left:
        return False
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    return True
