"""The command line: `train.py FILE [--key value | --key=value | --flag | --no-flag]…`.

A key is the full name of a run option, of a key of the YAML (nested ones are dotted), or one of
`BRAIN_KEYS`. A value is YAML; an empty text is given in quotes. `--allow name` is no key: it lets
the YAML build names of a package.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import ScalarNode

from trainer import distributed
from trainer.config.changes import ABSENT, Settings
from trainer.config.hyperparameters import Configuration, Key, Text, option_node, summary
from trainer.config.reading import NULL, compose, find, get, items, plain, represent, tag
from trainer.config.registry import NAME_IN_FULL
from trainer.devices import pick_device
from trainer.options import (
    ALIASES,
    BRAIN_KEYS,
    METADATA,
    TRANSIENT_OPTIONS,
    RunOptions,
    current_name,
    nearest,
    nearest_key,
    translate,
)
from trainer.other_options import DEFAULTS, FLAGS, NAMES
from trainer.run_files import HYPERPARAMS

logger = logging.getLogger("trainer")

USAGE = "usage: {} {} [--key value | --key=value | --flag | --no-flag]…"
HELP = ("-h", "--help")
ALLOW = "--allow"
ALLOW_HELP = (
    "package or single object that the YAML may name in addition, such as mypackage or "
    "os.path.join; several names are separated by commas, or given by repeating the option"
)
EXIT_CODES = (
    "Exit codes: 0 done; 1 an error of the program; 2 an error that you can correct, in one "
    "sentence; 130 after Ctrl-C, 143 after SIGTERM and 75 after any other request to stop, with a "
    "checkpoint."
)
EXAMPLES = (
    "{} FILE --device cuda --precision bf16 --seed 7",
    "{} FILE --max_grad_norm=1 --no-progressbar --output_folder results/clip-1",
    "torchrun --standalone --nproc_per_node=2 {} FILE",
)


def _split(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return the first argument, which is the YAML, and split the others as `split_allowed`."""
    if not argv or argv[0].startswith("-"):
        given = f", not {argv[0]!r}" if argv else ""
        raise ValueError(
            f"the first argument must be the YAML file{given}; --help lists the others"
        )
    return argv[0], *split_allowed(argv[1:])


def configure(
    argv: Sequence[str], allow: Sequence[str] = (), *, apart: bool = False
) -> tuple[Configuration, RunOptions]:
    """Read the YAML and apply the other arguments: default < YAML < command line.

    `seed` and `output_folder` are added to a YAML that lacks them. The default folder is
    results/<task>/<name>/<seed>. Changes of the training on the command line are appended to it, as
    in results/kws/demo/1234-lr=0.1, even if the YAML names that folder itself; with ``apart``, to
    any folder that the YAML names. ``allow`` is as for `load_hparams`.

    Returns:
        The YAML with the overrides, not built yet, and the run options.
    """
    path, allowed, others = _split(argv)
    if allowed and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # The program of a recipe lies elsewhere.
    configuration = Configuration(path, [*allow, *allowed])
    configuration.registry.downloads = True  # A run may download while it builds objects.
    transient: dict[str, Any] = {}
    overridden: dict[str, Any] = {}  # Former values by name.
    for name, value in parse(others, configuration):
        old = find(configuration.root, name)
        if name in TRANSIENT_OPTIONS and old is None:
            transient[name] = plain(option_node(name, value))
        else:
            overridden.setdefault(name, ABSENT if _is_null(old) else old.value)
            configuration.override({name: value})
    root, file = configuration.root, Path(path).resolve()
    if get(root, "seed") is None:
        configuration.override({"seed": RunOptions().seed})
    default = ScalarNode("!ref", f"results/{file.parent.name}/{file.stem}/<seed>")
    folder = get(root, "output_folder")
    if _is_null(folder):
        configuration.override({"output_folder": default})
        folder = default
    is_default = (tag(folder), folder.value) == (tag(default), default.value)
    options = RunOptions.build(configuration.options(), transient)
    named = "output_folder" in overridden or not (is_default or apart)
    if not named and not options.change_hparams:
        end = Settings(root, configuration.registry).suffix(overridden)
        configuration.override(
            {"output_folder": ScalarNode(tag(folder), folder.value.rstrip("/") + end)}
        )
        options = RunOptions.build(configuration.options(), transient)
    record = Path(str(options.output_folder), HYPERPARAMS)
    if is_default and options.change_hparams and not (options.debug or record.exists()):
        raise ValueError(
            f"change_hparams resumes a run, and there is none in {options.output_folder}: "
            "name its folder by --output_folder"
        )
    return configuration, options


def _is_null(node: Any) -> bool:
    """Return True for the node of a key that does not exist (None) or is null."""
    return node is None or tag(node) == NULL


def split_allowed(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names in `--allow name[,name]…`, and the other arguments."""
    names: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        option, _, value = argument.partition("=")
        if option != ALLOW:
            others.append(argument)
            continue
        if argument == ALLOW and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        given = [each.strip() for each in value.split(",")]
        if not all(NAME_IN_FULL.fullmatch(each) for each in given):
            raise ValueError(
                f"{ALLOW} needs names of packages or of single objects, such as "
                f"{ALLOW} mypackage,os.path.join, not {value!r}"
            )
        names += given
    return names, others


def parse(argv: Sequence[str], configuration: Configuration) -> list[tuple[str, Any]]:
    """Return names and values in the arguments, such as ("model.width", Text("256"))."""
    dotted = [key.name for key in configuration.described()]
    keys = {name.partition(".")[0] for name in dotted}
    known = {*keys, *RunOptions.names(), *BRAIN_KEYS, *ALIASES}
    spellings = {name.replace("_", "-"): name for name in NAMES}  # as --local-rank of launchers
    found: list[tuple[str, Any]] = []

    def add(name: str, value: Any) -> None:
        if name in NAMES - known:  # of another toolkit
            typed = plain(compose(value, f"--{name}")) if isinstance(value, Text) else value
            found.extend(translate(name, typed).items())
        else:
            found.append((current_name(name), value))

    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or not name:
            raise ValueError(
                f"unexpected argument {argument!r}: a value follows its key, as in --key value, "
                "and needs quotes if it holds spaces"
            )
        name = spellings.get(name, name)
        head = name.partition(".")[0]
        is_flag = configuration.is_flag(name) or head in FLAGS - known
        if head not in known and head.startswith("no-") and head[3:] in known and not equals:
            if not configuration.is_flag(name[3:]):
                raise ValueError(f"--{name}: {name[3:]} is not a key that is true or false")
            add(name[3:], False)
        elif head not in known and configuration.is_flag(positive := re.sub("^no[_-]?", "", head)):
            raise ValueError(
                f"there is no key or run option {head!r}; did you mean --no-{positive}?"
            )
        elif head not in known | NAMES:
            parents = {each.partition(".")[0] for each in dotted if "." in each}
            hint = nearest(head, parents) if head != name else ""
            hint = hint or nearest_key(name.rpartition(".")[2], known - ALIASES.keys(), dotted)
            raise ValueError(f"there is no key or run option {head!r}{hint}")
        elif is_flag and not equals and (not rest or rest[0].lower() not in ("true", "false")):
            add(name, True)
        elif not equals and (not rest or rest[0].startswith("--")):
            raise ValueError(
                f"--{name} needs a value; one that begins with -- is given as --{name}=…"
            )
        elif text := value if equals else rest.pop(0):
            add(name, Text(text))
        else:
            raise ValueError(
                f"--{name} needs a value; null is written null, and an empty text in quotes: '\"\"'"
            )
    return found


def parse_arguments(
    arg_list: Sequence[str] | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Parse a command line into run options and overrides, as SpeechBrain's function does.

    Args:
        arg_list: the YAML file and further arguments; None for those of the process.

    Returns:
        The path of the YAML, the run options, and the overrides of its keys, both with typed
        values. A run option that is also a key of the YAML is in both.

    Raises:
        ValueError: an argument or the YAML is wrong.
    """
    path, allowed, others = _split(sys.argv[1:] if arg_list is None else arg_list)
    if allowed:
        raise ValueError(
            f"{ALLOW} is an option of programs that end in trainer.main(train); here, give "
            f"load_hparams(path, overrides, allow={allowed})"
        )
    configuration = Configuration(path)
    keys = [key for key, _ in items(configuration.root)]
    run_opts: dict[str, Any] = _RunOpts()
    overrides: dict[str, Any] = {}
    for name, value in parse(others, configuration):
        if name in RunOptions.names():
            run_opts[name] = plain(option_node(name, value))
            if name in keys:
                overrides[name] = run_opts[name]
            continue
        configuration.override({name: value})
        below = overrides
        *parents, last = name.split(".")
        for key in parents:
            below = below.setdefault(key, {})
        below[last] = plain(find(configuration.root, name))
    if run_opts.get("overwrite"):
        logger.warning(
            "--overwrite has no effect with create_experiment_directory: delete the folder, or end "
            "the program in trainer.main(train)"
        )
    return path, run_opts, overrides


class _RunOpts(dict[str, Any]):
    """Mapping of the given run options; others read as their defaults."""

    def __missing__(self, name: str) -> Any:
        if name == "device":
            return str(pick_device("auto"))
        if name == "distributed_backend":
            return "nccl" if self["device"].startswith("cuda") else "gloo"
        if name == "distributed_launch":
            return distributed.launched()
        return DEFAULTS[name] if name in DEFAULTS else vars(RunOptions())[name]


def help_text(
    program: str, file: str | None, keys: Iterable[Key] = (), *, by_name: bool = False
) -> str:
    """Return the usage, the run options by section, the keys of a YAML, and examples.

    Args:
        program: the program as users call it, such as "train.py".
        file: the YAML as users name it; None without one.
        keys: the keys of the YAML.
        by_name: the program is `cortex run`, and `file` a recipe's name or a YAML.
    """
    rows = list(keys)
    mine = {key.name for key in rows}
    usage = USAGE.format(program, file if by_name else "FILE")
    lines = [usage, *textwrap.wrap(EXIT_CODES, 100), "", *_row(ALLOW[2:], "NAME", ALLOW_HELP)]
    lines += ["", "Run options (default < YAML < command line)"]
    section = ""
    for name, default in vars(RunOptions()).items():
        section = METADATA[name].section or section
        if name not in mine:
            lines += ["", f"{section}:"] if section else []
            section = ""
            lines += _row(name, summary(represent(default)), _about(name))
    if file is None:
        lines += ["", f"{program} FILE --help lists the keys of a YAML too."]
    else:
        lines += ["", f"Keys of {file}:"]
        for key in rows:
            lines += _row(key.name, key.default, key.comment or _about(key.name))
        others = [name for name in BRAIN_KEYS if name not in mine]
        lines += textwrap.wrap(f"Keys that it may have in addition: {', '.join(others)}", 100)
    lines += ["", "Examples:"]
    for each in EXAMPLES:
        called = "-m trainer run" if by_name and each.startswith("torchrun") else program
        lines.append(f"  {each.format(called).replace('FILE', file or 'FILE')}")
    return "\n".join(lines)


def _about(name: str) -> str:
    """Return the help of a run option with its choices, or an empty text for other names."""
    if name not in METADATA:
        return ""
    text, choices = METADATA[name].help, METADATA[name].choices
    return f"{text} {{{','.join(choices)}}}" if choices else text


def _row(name: str, default: str, about: str) -> list[str]:
    """Format one entry of the help, wrapped to the terminal."""
    width, column = min(shutil.get_terminal_size().columns, 120), 40
    lines = textwrap.wrap(
        about, max(width - column, 30), break_on_hyphens=False, break_long_words=False
    )
    left = f"  --{name} {default}".rstrip()
    first = lines.pop(0) if lines and len(left) <= column - 2 else ""
    return [f"{left.ljust(column)}{first}".rstrip(), *(" " * column + line for line in lines)]
