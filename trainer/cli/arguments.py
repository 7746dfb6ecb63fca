"""The command line: `train.py FILE [--key value | --key=value | --flag | --no-flag]…`.

Names are those of the run options and of the YAML's keys, in full; nested keys are dotted. Values
are YAML. Nothing here changes anything: the result says what is to be changed.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.config.hyperparameters import Configuration, Key, Text
from trainer.options import METADATA, RunOptions, nearest

USAGE = "usage: {} FILE [--key value | --key=value | --flag | --no-flag]…"
HELP = ("-h", "--help")


def file_of(argv: Sequence[str]) -> str:
    """The YAML that the command line names: its first argument."""
    if not argv or argv[0].startswith("-"):
        given = f", not {argv[0]!r}" if argv else ""
        raise ValueError(f"the first argument must be the YAML file{given}; --help says more")
    return argv[0]


def parse(argv: Sequence[str], configuration: Configuration) -> list[tuple[str, Any]]:
    """What the arguments after the file set, in their order: ("model.width", Text("256")).

    Raises ValueError for an unknown name (with the nearest known one), a missing value and
    anything that is neither.
    """
    known = {key.name.partition(".")[0] for key in configuration.described()} | {
        *RunOptions.names()
    }
    changes: list[tuple[str, Any]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or not name:
            raise ValueError(
                f"what does {argument!r} belong to? Values follow their key, as in --key value, "
                "and need quotes if they hold spaces"
            )
        head = name.partition(".")[0]
        if head not in known and head.startswith("no-") and head[3:] in known and not equals:
            if not configuration.is_flag(name[3:]):
                raise ValueError(f"--{name}: {name[3:]} is not a key that is true or false")
            changes.append((name[3:], False))
        elif head not in known:
            raise ValueError(f"there is no key or run option {head!r}{nearest(head, known)}")
        elif equals:
            changes.append((name, Text(value)))
        elif configuration.is_flag(name) and (not rest or rest[0].lower() not in ("true", "false")):
            changes.append((name, True))
        elif not rest or rest[0].startswith("--"):
            raise ValueError(
                f"--{name} needs a value; one that begins with -- is given as --{name}=…"
            )
        else:
            changes.append((name, Text(rest.pop(0))))
    return changes


def nested(name: str, value: Any) -> dict[str, Any]:
    """ "a.b", 1 as {"a": {"b": 1}}: the form of overrides."""
    head, _, rest = name.partition(".")
    return {head: nested(rest, value) if rest else value}


def help_text(program: str, file: str | None, keys: Iterable[Key] = ()) -> str:
    """Usage, the run options, and the YAML's own keys with their defaults and comments."""
    rows = list(keys)
    mine = {key.name for key in rows}
    lines = [USAGE.format(program), "", "Run options (default < YAML < command line):"]
    for name, default in vars(RunOptions()).items():
        if name not in mine:
            lines += _row(name, _shown(default), _about(name))
    if file is not None:
        lines += ["", f"Keys of {file}:"]
        for key in rows:
            lines += _row(key.name, key.default, key.comment or _about(key.name))
    else:
        lines += ["", f"{program} FILE --help lists the keys of a YAML too."]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "null" if default is None else str(default)


def _about(name: str) -> str:
    """The line of help of a run option, with its choices; nothing for other names."""
    if name not in METADATA:
        return ""
    choices = METADATA[name]["choices"]
    return f"{METADATA[name]['help']}{': ' if choices else ''}{', '.join(choices)}"


def _row(name: str, default: str, about: str) -> list[str]:
    """One entry of the help, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    left = f"  --{name} {default}".rstrip()
    if not about:
        return [left]
    column = 40
    lines = textwrap.wrap(about, max(width - column, 30))
    head = [left] if len(left) > column - 2 else [left.ljust(column) + lines.pop(0)]
    return head + [" " * column + line for line in lines]
