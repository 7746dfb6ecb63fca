"""Model cards: the README.md of an export, written from the run that the model comes from.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from ruamel.yaml.nodes import ScalarNode

from trainer import json_files
from trainer.config.building import resolve
from trainer.config.reading import items, object_name, tag
from trainer.config.run_folder import TRAINING_ONLY
from trainer.tree import number
from trainer.untrusted import confined, printable, read_text

if TYPE_CHECKING:
    from trainer.brain import Brain
    from trainer.inference.loading import Origin
    from trainer.inference.model import Model

HYPERPARAMS_HEADER = "# The hyperparameters of an exported model, for trainer.load."
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


def write_card(
    folder: Path,
    model: Model | Brain,
    origin: Origin | None,
    described: Mapping[str, Any],
    code: str,
    seeds: Sequence[str | Path],
) -> None:
    """Write README.md and the samples that it shows.

    Args:
        folder: the export.
        model: the model.
        origin: what it was loaded from, or None.
        described: content of export.json.
        code: example of how to use a network; empty for weights.
        seeds: folders of runs that differ in their seeds alone.

    Raises:
        ValueError: a folder of ``seeds`` is no run, or differs in more than its seed.
    """
    run = None if origin is None else origin.run.folder
    package = _package(model, origin)
    name = package.__name__.rpartition(".")[2] if package is not None else type(model).__name__
    title = _title(package, model)
    results = _results(run, seeds)
    answers = _tasks(model)
    units = _units(model, origin)
    parts = [
        _front_matter(name, title, answers, described["format"], origin, results, units),
        f"# {escaped(title)}",
        _about(model, origin, described),
        _section("How to use it", _use(answers, described, code)),
        _section("Data", _data(origin)),
        _section("Results", _metrics(results, units)),
        _section("Training", _training(run)),
        _section("Samples", _samples(run, folder)),
        _section("Known limits", str(getattr(package, "LIMITS", "")).strip() or "None are stated."),
        _section(
            "Licence",
            "To be filled in by the author, here and as `license:` above: that of the data and of "
            "a pretrained model may bind these weights.",
        ),
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- texts

# Characters with a meaning in Markdown, and those that begin a link or a list without a mark.
SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$]|(?<=\w):(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)])")


def escaped(text: object, most: int = MAX_TEXT) -> str:
    """Return a text on one line, with what is special in Markdown or HTML escaped.

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


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


# ---------------------------------------------------------------------------------- the beginning


def _package(model: Model | Brain, origin: Origin | None) -> Any:
    """Return the package of the recipe, or None."""
    found = [] if origin is None else origin.run.recipes()
    own = type(model).__module__.rpartition(".")[0]
    name = own if own in found else found[0] if len(found) == 1 else ""
    return sys.modules.get(name)


def _title(package: Any, model: Model | Brain) -> str:
    line = str(getattr(package, "__doc__", None) or type(model).__name__).strip().partition("\n")[0]
    return line.rstrip(".")


def _tasks(model: Model | Brain) -> list[str]:
    tasks: Callable[[], list[str]] = getattr(type(model), "tasks", list)
    return tasks()


def _front_matter(
    name: str,
    title: str,
    answers: Sequence[str],
    to: str,
    origin: Origin | None,
    results: Mapping[str, Any],
    units: Mapping[str, str],
) -> str:
    """Return the metadata that the hub reads, in YAML."""
    task = next((USES[each][0] for each in answers if each in USES), None)
    told: dict[str, Any] = {"library_name": "cortex-speech"}
    told["tags"] = ["speech", printable(name), to]
    if task is not None:
        told["pipeline_tag"] = task
    metrics = [
        {
            "type": printable(key),
            "name": printable(_with_unit(key, units)),
            "value": float(f"{value:.6g}"),
        }
        for key, value in results["metrics"].items()
        if key != "loss"
    ]
    corpora = _corpora(origin)
    if metrics and task is not None:
        data = printable(corpora[0][1]) if corpora else "unknown"
        dataset = {"type": data, "name": data, "split": results["stage"]}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
        told["model-index"] = [{"name": printable(title), "results": [result]}]
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n# license: to be filled in by the author\n{text}---"


def _about(model: Model | Brain, origin: Origin | None, described: Mapping[str, Any]) -> str:
    count = sum(each.numel() for each in model.modules.parameters())
    text = f"`{type(model).__name__}`, {count:,} parameters"
    if origin is not None:
        run = escaped(os.path.basename(os.path.abspath(origin.run.folder)))
        chosen = (
            f", of the checkpoint with the best {escaped(origin.max_key or origin.min_key)}"
            if origin.max_key or origin.min_key
            else ""
        )
        text += f", from the run {run}{chosen}"
    return f"{text}. {described.get('about', '')}".strip()


def _use(answers: Sequence[str], described: Mapping[str, Any], code: str) -> str:
    if code:
        ports = [
            [f"`{each['name']}`", kind, ", ".join(map(str, each["axes"])), escaped(each["meaning"])]
            for kind, found in (("input", "inputs"), ("output", "outputs"))
            for each in described[found]
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
    first = 'import trainer\n\nmodel = trainer.load(".")  # the path of this folder'
    lines = [first, *(USES[each][1] for each in answers if each in USES)]
    return "\n\n".join([
        _fenced("pip install 'cortex-speech[recipes,hf]'", "sh"),
        _fenced("\n".join(lines), "python"),
        "From the hub, `huggingface_hub.snapshot_download(\"NAME\")` gives the path.",
    ])  # fmt: skip


# ----------------------------------------------------------------------------- facts of the run


def _corpora(origin: Origin | None) -> list[tuple[str, str, str]]:
    """Return the data of a training: key, name and plain arguments of each object it builds."""
    if origin is None:
        return []
    configuration = origin.run.configuration
    try:
        root = resolve(configuration.root, configuration.registry)
    except ValueError:  # Of a YAML that refers to what is gone.
        root = configuration.root
    found = []
    for key, node in items(root):
        name = object_name(node)
        if not name or name in TRAINING_ONLY:
            continue
        if configuration.registry.is_for_training_only(name):
            given = [f"{k}: {_short(v)}" for k, v in items(node) if isinstance(v, ScalarNode)]
            given += [
                f"{k}.{inner}: {_short(v)}"
                if isinstance(v, ScalarNode)
                else f"{k}.{inner}: "
                + ", ".join(_short(each) for _, each in items(v) if isinstance(each, ScalarNode))
                for k, above in items(node)
                if not isinstance(above, ScalarNode) and not object_name(above)
                for inner, v in items(above)
            ]
            found.append((key, name, "; ".join(given)))
    return found


def _short(node: ScalarNode) -> str:
    """Return a value as text; of an absolute path, the last part."""
    text = "null" if tag(node).endswith(":null") else str(node.value)
    return os.path.basename(text.rstrip(os.sep)) if os.path.isabs(text) else text


def _data(origin: Origin | None) -> str:
    if origin is None:
        return NOT_KNOWN
    found = [[escaped(name), escaped(key), escaped(given, 400)]
             for key, name, given in _corpora(origin)]  # fmt: skip
    table = _table(("made by", "key of the YAML", "arguments"), found) if found else ""
    counts = _examples(origin.run.folder)
    told = ", ".join(f"{escaped(stage)} {count:,}" for stage, count in counts.items())
    note = f"Items of a pass through each stage: {told}." if told else ""
    return "\n\n".join(filter(None, [table, note])) or "The YAML of the run names no data."


def _examples(run: Path) -> dict[str, int]:
    """Return the number of items of each stage: the most of any pass, since one may be short."""
    from trainer.report.history import read_history

    counts: dict[str, int] = {}
    with suppress(OSError, ValueError):
        if os.path.lexists(run / "metrics.jsonl"):
            history = read_history(confined(run, run / "metrics.jsonl"))
            for record in history.stages:
                count = record.get("examples")
                if isinstance(count, (int, float)) and 0 < count < 1e15:
                    stage = str(record["stage"])
                    counts[stage] = max(int(count), counts.get(stage, 0))
    return counts


def _results(run: Path | None, seeds: Sequence[str | Path]) -> dict[str, Any]:
    """Return stage, metrics, their spread over items, and their mean and spread over seeds.

    Returns:
        ``stage``, "test" or "valid"; ``metrics`` by name; ``items``, by name standard deviation and
        number of items; ``seeds``, by name mean, standard deviation and number of runs.

    Raises:
        ValueError: a run of ``seeds`` is none, or differs in more than its seed.
    """
    if run is None:
        if seeds:
            raise ValueError("seeds are for a model that trainer.load made from a run folder")
        return {"stage": "", "metrics": {}, "items": {}, "seeds": {}}
    from trainer.cli import runs

    facts = runs.read_run(run)
    metrics = {k: v for k, v in facts.metrics.items() if math.isfinite(v)}
    others = [runs.read_run(each) for each in _siblings(run, seeds)]
    over: dict[str, tuple[float, float, int]] = {}
    for name in metrics if others else ():
        values = [each.metrics.get(name, math.nan) for each in (facts, *others)]
        known = [each for each in values if math.isfinite(each)]
        if len(known) > 1:
            over[name] = statistics.fmean(known), statistics.stdev(known), len(known)
    spread = _over_items(run, facts.stage, metrics)
    return {"stage": facts.stage, "metrics": metrics, "items": spread, "seeds": over}


def _siblings(run: Path, seeds: Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs that differ from a run in their seeds alone."""
    from trainer.cli import runs

    folders, problems = runs.run_folders([str(each) for each in seeds])
    if problems:
        raise ValueError(problems[0])
    own = runs.settings(run) if folders else {}
    for each in folders:
        other = runs.settings(each)
        keys = [k for k in {**own, **other} if k != "seed" and own.get(k) != other.get(k)]
        if keys:
            raise ValueError(
                f"{each} differs from {run} in {keys[0]}, and not in its seed alone: "
                "name runs of the same hyperparameters"
            )
    return [each for each in folders if each.resolve() != run.resolve()]


def _over_items(
    run: Path, stage: str, metrics: Mapping[str, float]
) -> dict[str, tuple[float, int]]:
    """Return standard deviation and number of items of the metrics that a table has by item.

    Such a table is a CSV file in the run folder; its column has the metric as its mean.
    """
    found: dict[str, tuple[float, int]] = {}
    for path in sorted(run.glob(f"*_{stage}.csv")) if stage else ():
        with suppress(OSError, ValueError, csv.Error):
            rows = list(csv.DictReader(read_text(run, path.name, 4 << 20).splitlines()))
            for name, mean in metrics.items():  # The last row may be the mean.
                values = [float(r[name]) for r in rows if r.get(name) and r.get("id") != "mean"]
                near = len(values) > 1 and math.isclose(
                    statistics.fmean(values), mean, rel_tol=0.01, abs_tol=0.001
                )
                if near:
                    found[name] = statistics.stdev(values), len(values)
    return found


def _units(model: Model | Brain, origin: Origin | None) -> Mapping[str, str]:
    """Return units of metrics by name: those of the model, for a Brain of its recipe's model."""
    kind: type = type(model)
    if not hasattr(kind, "units") and origin is not None:
        with suppress(ValueError, ImportError):  # It is of no recipe that has a model.
            kind = origin.run.model_class()
    units: Mapping[str, str] = getattr(kind, "units", {})
    return units


def _with_unit(metric: str, units: Mapping[str, str]) -> str:
    """Return the name of a metric with its unit, such as "wer (%)"."""
    return f"{metric} ({units[metric]})" if metric in units else metric


def _metrics(results: Mapping[str, Any], units: Mapping[str, str]) -> str:
    if not results["metrics"]:
        return "The run has no record of a test or a validation."
    rows = []
    for name, value in results["metrics"].items():
        items_, seeds = results["items"].get(name), results["seeds"].get(name)
        over_items = f"{number(items_[0])} over {items_[1]} items" if items_ else "–"
        over = f"{number(seeds[0])} ± {number(seeds[1])} over {seeds[2]} seeds" if seeds else "–"
        rows.append([escaped(_with_unit(name, units)), number(value), over_items, over])
    stage = "test" if results["stage"] == "test" else "validation: the run was not tested"
    heads = ("metric", "this run", "standard deviation", "mean ± standard deviation")
    known = [i for i in range(len(heads)) if i < 2 or any(row[i] != "–" for row in rows)]
    shown = _table([heads[i] for i in known], [[row[i] for i in known] for row in rows])
    return f"Of the {stage}.\n\n{shown}"


def _training(run: Path | None) -> str:
    if run is None:
        return NOT_KNOWN
    text = ""
    with suppress(OSError, ValueError):
        text = read_text(run, "command.txt")
    lines = [line for line in text.splitlines() if line.strip()]
    commands = [_command(line) for line in lines if not line.startswith("#")]
    changes = [line[1:].strip() for line in lines if line.startswith("#")]
    parts = []
    if commands:
        parts += ["The commands of the run:", _fenced("\n".join(commands[-MAX_COMMANDS:]), "sh")]
    options = _options(commands[-1]) if commands else []
    parts.append(
        f"Other than in the YAML: {', '.join(f'`{each}`' for each in options)}."
        if options
        else "All values are those of the YAML."
        if commands
        else "The run has no record of its command."
    )
    parts += [f"- {escaped(each)}" for each in changes[-MAX_COMMANDS:]]
    parts.append(_environment(run))
    return "\n\n".join(filter(None, parts))


def _command(line: str) -> str:
    """Return a recorded command without its time, and of absolute paths only the last parts."""
    words = line.split(" ")[2:] if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) else [line]
    try:
        given = shlex.split(" ".join(words))
    except ValueError:  # Cut within quotes.
        given = words
    if given and os.path.isabs(given[0]):
        given[0] = os.path.basename(given[0])
    for place, word in enumerate(given):
        if os.path.isabs(word):
            below = re.search(r"(recipes|hparams)/.*", word)
            given[place] = below[0] if below else os.path.basename(word.rstrip("/"))
    return shlex.join(given)


def _options(command: str) -> list[str]:
    """Return the options of a command, except those for its output and its progress bar."""
    given, found = shlex.split(command), []
    place = 0
    while place < len(given):
        word, place = given[place], place + 1
        if word.startswith("--"):
            values = []
            while place < len(given) and not given[place].startswith("--"):
                values.append(given[place])
                place += 1
            name = word[2:].partition("=")[0]
            if name not in ("output_folder", "no-progressbar", "progressbar", "overwrite"):
                found.append(printable(" ".join([word[2:], *values])).replace("`", "'"))
    return found


def _environment(run: Path) -> str:
    """Return revision and versions as the run has recorded them."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = json_files.read(confined(run, run / "environment.json"))
    found = found if isinstance(found, dict) else {}
    git, packages = found.get("git"), found.get("packages")
    rows = []
    if isinstance(git, dict) and git.get("revision"):
        changed = " with changes that were not committed" if git.get("dirty") else ""
        rows.append(["revision of the recipe", f"{escaped(git['revision'])}{changed}"])
    rows += [[escaped(key), escaped(found[key])] for key in ("python", "cuda") if found.get(key)]
    gpus = found.get("gpus")
    if isinstance(gpus, list) and gpus:
        rows.append(["GPUs", escaped(", ".join(map(str, gpus)))])
    if isinstance(packages, dict):
        rows += [[each, escaped(packages[each])] for each in PACKAGES if each in packages]
    return _table(("", ""), rows) if rows else ""


# ------------------------------------------------------------------------------------------ samples


def _samples(run: Path | None, folder: Path) -> str:
    """Copy some sounds of the run, those of the test first; return their table."""
    from trainer.report.samples import read_tables

    left = MAX_BYTES
    for table in [] if run is None else read_tables(run):
        names = [name for row in table.rows for name, cell in row.items()]
        names = list(dict.fromkeys(names))
        rows = []
        for row in table.rows[:MAX_SAMPLES]:
            cells, sounds = [], False
            for name in names:
                text, cost = _cell(row.get(name, {}), table.folder, folder, left)
                left -= cost
                sounds |= cost > 0
                cells.append(text)
            if sounds:
                rows.append(cells)
        if rows:
            note = escaped(f"Of the {table.title}. {table.facts}", 400)
            return f"{note}\n\n{_table([escaped(each) for each in names], rows)}"
    return "The run has no sounds to show."


def _cell(cell: Any, source: Path, folder: Path, left: int) -> tuple[str, int]:
    """Return a cell of the table, and the bytes that were copied for it."""
    kind = cell.get("kind") if isinstance(cell, dict) else None
    if kind == "number" and isinstance(cell.get("value"), (int, float)):
        return number(cell["value"]), 0
    if kind == "text":
        return escaped(cell.get("text", "")), 0
    if kind == "aligned" and isinstance(cell.get("pairs"), list):
        pairs = [each for each in cell["pairs"] if isinstance(each, list) and len(each) == 2]
        said, heard = (" ".join(str(p[n]) for p in pairs if p[n] is not None) for n in (0, 1))
        return f"{escaped(said)}<br>{escaped(heard)}", 0
    if kind == "audio":
        content = _sound(source, str(cell.get("file")), left)
        if content is not None:
            name = re.sub(r"[^\w.-]", "_", os.path.basename(str(cell["file"])))
            (folder / "samples").mkdir(exist_ok=True)
            (folder / "samples" / name).write_bytes(content)
            player = f'<audio controls src="samples/{name}"></audio>'
            return f"{player} [{escaped(name)}](samples/{name})", len(content)
    return "", 0


def _sound(source: Path, name: str, left: int) -> bytes | None:
    from trainer.report.samples import MARKS

    path = source / name
    mark = MARKS.get(path.suffix)
    if path.suffix == ".png" or mark is None:
        return None
    try:
        with confined(source, path).open("rb") as file:
            content = file.read(left + 1)
    except (OSError, ValueError):
        return None
    return content if content.startswith(mark) and len(content) <= left else None
