"""The command `cortex`, also `python -m trainer`: run recipes and manage their runs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from trainer import report, signals
from trainer.cli import runs, session, upkeep
from trainer.cli.arguments import HELP
from trainer.cli.recipe import find_recipe, list_recipes, run_recipe
from trainer.cli.replay import replay
from trainer.cli.sweep import parse_values, sweep, trials
from trainer.inference.exporting import FORMATS, export
from trainer.inference.initialise import is_export
from trainer.inference.loading import load
from trainer.options import nearest
from trainer.run_files import is_run
from trainer.untrusted import printable

NO_RUN = 2  # Exit code for a folder that could not be used, or a wrong argument.
WEIGHTS = ("init_from", "source")  # Options of `export` that name weights missing in checkpoints.


@dataclass(frozen=True)
class Command:
    """Command of `cortex`, and its help."""

    summary: str
    usage: str  # notation of the arguments, such as "RUN…"
    examples: tuple[str, ...]  # arguments of calls
    work: Callable[[list[str]], int]  # takes the arguments, and returns the exit code
    more: str = ""  # further lines of help


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process's arguments.

    Returns:
        The exit code: 0 on success; 2 for an error that the user can correct, with one sentence on
        stderr; 130 after Ctrl-C; otherwise the code of the command itself.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # The reader, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {session.message(error)}", file=sys.stderr)
        return NO_RUN
    except KeyboardInterrupt:
        return 130


def _dispatch(given: list[str]) -> int:
    """Print help, or do the work of a command."""
    if not given or given[0] in (*HELP, "help"):
        width = max(map(len, COMMANDS))
        print("usage: cortex COMMAND …   (also python -m trainer COMMAND …)\n")
        for name, each in COMMANDS.items():
            print(f"  {name.ljust(width)}  {each.summary}")
        print("\ncortex COMMAND --help shows its arguments and examples.")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return NO_RUN
    command = COMMANDS[name]
    # After the name of a recipe, --help asks for the help of that recipe.
    if any(each in HELP for each in (rest[:1] if name == "run" else rest)):
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        more = f"{command.more}\n\n" if command.more else ""
        print(f"usage: cortex {name} {command.usage}\n\n{summary}\n\n{more}Examples:")
        for example in command.examples:
            print(f"  cortex {name} {example}".rstrip())
        return 0
    return command.work(rest)


class _Parser(argparse.ArgumentParser):
    """Parser that raises errors as ValueError."""

    def __init__(self, name: str) -> None:
        super().__init__(prog=name, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}; usage: cortex {self.prog} {COMMANDS[self.prog].usage}")


def _folder(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _say(lines: Sequence[str]) -> int:
    """Write lines about problems to stderr; return the exit code."""
    for line in lines:
        print(line, file=sys.stderr)
    return NO_RUN if lines else 0


# -------------------------------------------------------------------------------------- commands


def _run(argv: list[str]) -> int:
    if not argv:
        print("\n".join(list_recipes()) or "no recipe is installed")
        return 0
    name, *rest = argv
    if name.startswith("-"):
        raise ValueError(f"the name of a recipe comes first, as in task/name, not {name}")
    return run_recipe(name, rest)


def _ls(argv: list[str]) -> int:
    parser = _Parser("ls")
    default = "results" if Path("results").is_dir() else "."
    parser.add_argument("runs", nargs="*", type=_folder, default=[Path(default)])
    parser.add_argument("--sort")
    given = parser.parse_args(argv)
    found = [runs.read_run(each) for each in dict.fromkeys(runs.find_runs(given.runs))]
    if given.sort is not None:
        if not any(given.sort in each.metrics for each in found):
            known = sorted({name for each in found for name in each.metrics})
            raise ValueError(
                f"no run has the metric {given.sort!r}{nearest(given.sort, known)}: the last "
                f"metrics are {', '.join(known) or 'none'}"
            )
        found.sort(key=lambda each: each.metrics.get(given.sort, float("inf")))
    if not found:
        _say([f"there are no runs in {', '.join(map(str, given.runs))}"])
        return 0
    print("\n".join(runs.list_lines(found)))
    return 0


def _compare(argv: list[str]) -> int:
    parser = _Parser("compare")
    parser.add_argument("runs", nargs="+")
    folders, problems = runs.run_folders(parser.parse_args(argv).runs)
    if folders:
        print("\n".join(runs.compare_lines([runs.read_run(each) for each in folders])))
    return _say(problems)


def _report(argv: list[str]) -> int:
    parser = _Parser("report")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--output", "-o", type=Path)
    given = parser.parse_args(argv)
    folders, problems = runs.run_folders(given.runs)
    if len(folders) == 1 and given.output is None:
        print(report.write_html(folders[0]))
    elif folders:
        page = given.output or Path("compare.html")
        report.compare(folders, page)
        print(page)
    return _say(problems)


def _average(argv: list[str]) -> int:
    parser = _Parser("average")
    parser.add_argument("run")
    parser.add_argument("--number", "-n", type=int)
    parser.add_argument("--min", metavar="METRIC")
    parser.add_argument("--max", metavar="METRIC")
    parser.add_argument("--output", "-o", type=Path)
    given = parser.parse_args(argv)
    folders, problems = runs.run_folders([given.run])
    if problems:
        raise ValueError(problems[0])
    if given.number is not None and given.number < 1:
        raise ValueError(f"--number is {given.number}; it must be 1 or more")
    (run,) = folders
    output = given.output or runs.beside(run, "average")
    with warnings.catch_warnings(record=True) as caught:  # Broken checkpoints warn.
        warnings.simplefilter("always")
        try:
            chosen = upkeep.average(run, output, given.number, given.min, given.max)
        finally:
            _say([f"warning: {each.message}" for each in caught])
    print(f"{output}: the mean of {', '.join(each.name for each in chosen)}")
    return 0


def _clean(argv: list[str]) -> int:
    parser = _Parser("clean")
    parser.add_argument("runs", nargs="+", type=_folder)
    parser.add_argument("--yes", "-y", action="store_true")
    given = parser.parse_args(argv)
    found = []
    for run in dict.fromkeys(runs.find_runs(given.runs)):
        if runs.is_locked(run):
            _say([f"{printable(str(run))} is going on: nothing of it is deleted"])
            continue
        items, notes = upkeep.removable(run)
        found += items
        _say(notes)
    if not found:
        print("there is nothing to delete")
        return 0
    rows = [(runs.size(each.bytes).rjust(8), str(each.path), each.why) for each in found]
    print("\n".join(runs.table(rows)))
    total = runs.size(sum(each.bytes for each in found))
    try:
        question = f"Delete these {len(found)} folders, {total}? [y/N] "
        agreed = given.yes or input(question).strip().lower() in ("y", "yes")
    except EOFError:
        agreed = False
        print()
    if not agreed:
        print("nothing was deleted")
        return 0
    freed, problems = upkeep.remove(found)
    print(f"deleted {runs.size(freed)}")
    return _say(problems)


def _sweep(argv: list[str]) -> int:
    end = next((n for n, each in enumerate(argv) if each.startswith("--")), len(argv))
    (name, *values), more = argv[:end] or [""], argv[end:]
    parser = _Parser("sweep")
    parser.add_argument("--page", type=Path)
    given, more = parser.parse_known_args(more)
    if not name or not values:
        raise ValueError("a sweep needs a recipe and values, as in: task/name 'lr=1e-3,3e-4'")
    recipe = find_recipe(name)
    planned = trials(recipe, values, more)
    try:
        codes = sweep(recipe, planned)
    except signals.Interrupted as stop:
        _say([f"stopped ({stop.signal}): the same command continues the sweep"])
        return signals.exit_code(stop.number)
    for folder, code in codes.items():
        print(f"{folder}: {'finished' if not code else f'exit code {code}'}")
    folders = [each for each in codes if is_run(each)]
    if folders:
        keys = "-".join(quote(key) for key, _ in parse_values(values))
        above = Path(os.path.commonpath([each.absolute().parent for each in folders]))
        page = given.page or above / f"sweep-{keys}.html"
        try:
            report.compare(folders, page)
            print(page)
        except (ValueError, OSError) as error:  # The runs themselves are complete.
            _say([f"the runs are not compared: {session.message(error)}"])
    return 1 if any(codes.values()) else 0


def _export(argv: list[str]) -> int:
    parser = _Parser("export")
    parser.add_argument("run", type=_folder)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--to", default=FORMATS[0])
    parser.add_argument("--seeds", nargs="+", default=[])
    for name in ("max_key", "min_key", *WEIGHTS):
        parser.add_argument(f"--{name}")
    given = parser.parse_args(argv)
    run = given.run
    # Inside the run by default, so that a pattern such as NAME/* matches only runs.
    inside = run / "export" / given.to
    out = given.out or (runs.beside(run, given.to) if is_export(run) else inside)
    if runs.is_locked(run):
        raise ValueError(
            f"the run in {printable(str(run))} is still going on: export it when it has ended; "
            "Ctrl+C ends it, and saves"
        )
    overrides = {name: value for name in WEIGHTS if (value := getattr(given, name)) is not None}
    model = load(run, "cpu", overrides=overrides, max_key=given.max_key, min_key=given.min_key)
    _say([f"written to {export(model, out, given.to, seeds=given.seeds)}"])
    return 0


COMMANDS = {
    "run": Command(
        "train with a recipe or a YAML of yours; without a name, list the recipes",
        "[TASK/NAME | FILE] [--key value]…",
        ("", "TASK/NAME", "TASK/NAME --seed 7 --precision bf16", "TASK/NAME --help", "mine.yaml"),
        _run,
        "A YAML of yours is run by the train.py beside it. TASK/NAME --help lists run options and\n"
        "keys. torchrun --nproc_per_node=2 -m trainer run TASK/NAME starts two processes.",
    ),
    "sweep": Command(
        "train all combinations of values, each in its default folder, and compare them",
        "TASK/NAME|FILE KEY=VALUE[,VALUE]… [--page FILE] [--key value]…",
        (
            "TASK/NAME 'opt_class.lr=1e-3,3e-4' 'width=128,256'",
            "TASK/NAME seed=1,2,3 --precision bf16",
            "TASK/NAME 'betas=[0.9,0.98],[0.8,0.9]'",
        ),
        _sweep,
        "  --page FILE    page that compares the runs (default: sweep-KEYS.html beside them)\n"
        "  --key value    argument of every run\n\n"
        "The same command continues a sweep. If a run fails, the others are still trained, and\n"
        "the exit code is 1.",
    ),
    "ls": Command(
        "list the runs in folders: state, optimizer steps, last metrics, time since a change",
        "[FOLDER…] [--sort METRIC]",
        ("", "results", "results --sort wer"),
        _ls,
        "  FOLDER           folder to search (default: results, or the current folder)\n"
        "  --sort METRIC    smallest value first",
    ),
    "compare": Command(
        "compare runs: last metrics, hyperparameters that differ, mean and spread over seeds",
        "RUN…",
        ("results/TASK/NAME/*",),
        _compare,
    ),
    "report": Command(
        "write the report of a run, or a page that compares several",
        "RUN… [-o FILE]",
        ("results/TASK/NAME/1234", "results/TASK/NAME/* -o compare.html"),
        _report,
        "  -o, --output FILE    page that compares the runs (default: compare.html)",
    ),
    "average": Command(
        "average the weights of a run's checkpoints into a new run folder",
        "RUN [-n NUMBER] [--min METRIC | --max METRIC] [-o FOLDER]",
        ("results/TASK/NAME/1234", "results/TASK/NAME/1234 -n 5 --min wer -o averaged"),
        _average,
        "  -n, --number NUMBER    number of checkpoints (default: all)\n"
        "  --min, --max METRIC    take the best by a metric, not the newest\n"
        "  -o, --output FOLDER    new run folder (default: RUN-average)\n\n"
        "The new folder is for trainer.load and infer.py; training cannot resume from it.",
    ),
    "export": Command(
        "write the model of a run's best checkpoint to a folder to share",
        "RUN [OUT] [--to FORMAT] [--min_key METRIC | --max_key METRIC] [--seeds RUN…]",
        (
            "results/TASK/NAME/1234",
            "results/TASK/NAME/1234 exported --to onnx",
            "results/TASK/NAME/1234 exported --min_key wer --seeds results/TASK/NAME/*",
        ),
        _export,
        "  OUT                              new folder (default: RUN/export/FORMAT)\n"
        "  --to {safetensors,onnx,torch}    onnx and torch write networks for other programs\n"
        "  --min_key, --max_key METRIC      metric to choose the checkpoint by\n"
        "  --seeds RUN…                     runs of other seeds, whose spread the card shows\n"
        "  --init_from, --source SOURCE     frozen weights that the checkpoints left out\n\n"
        "The folder holds the weights, all that is needed to load them, and a model card.",
    ),
    "replay": Command(
        "rerun the batch of a skipped step",
        "RUN STEP [--script train.py] [--key value]…",
        ("results/TASK/NAME/1234 317", "runs/x 317 --script train.py --precision fp32"),
        replay,
        "  --script FILE    program of a run that no installed recipe started\n"
        "  --key value      option of the run to change",
    ),
    "clean": Command(
        "delete checkpoints that are neither the best nor the newest, and remains of killed saves",
        "RUN… [--yes]",
        ("results", "results/TASK/NAME/1234 --yes"),
        _clean,
        "  RUN          run folder, or folder with runs\n"
        "  -y, --yes    delete without asking\n\n"
        "Lists the folders with their sizes and asks first. Runs that are going on, and files\n"
        "that no save has written, are left alone.",
    ),
}
