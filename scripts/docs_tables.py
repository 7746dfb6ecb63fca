"""Tables of the documentation that are generated from the code, as a hook of mkdocs.

A line `<!-- table: run options -->` of a page becomes the run options, `<!-- table: keys FILE -->`
the keys of a YAML with their defaults and comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.config.hyperparameters import describe, summary
from trainer.config.reading import represent
from trainer.options import HINTS, METADATA, RunOptions, allowed

ROOT = Path(__file__).parents[1]
KINDS = {"extending": "extends the run", "neutral": "is free", "training": "is refused"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page; called by mkdocs."""
    return re.sub(r"^<!-- table: (.+?) -->$", lambda found: table(found[1]), markdown, flags=re.M)


def table(name: str) -> str:
    """Return the table of a name in Markdown."""
    if name == "run options":
        return run_options()
    return keys(ROOT / name.removeprefix("keys "))


def run_options() -> str:
    """Return all run options, section by section."""
    lines: list[str] = []
    for name, default in vars(RunOptions()).items():
        option = METADATA[name]
        if option.section:
            head = ("option", "default", "values", "meaning", "a change")
            lines += ["", f"## {option.section}", "", *_head(head)]
        kind = "is of one command" if option.transient else KINDS[option.kind]
        values = allowed(name).removeprefix("must be ").removeprefix("one of ")
        shown = f"`{summary(represent(default))}`"
        lines.append(_row([f"`{name}`", shown, values, _text(option.help), kind]))
    return "\n".join(lines)


def keys(yaml: Path) -> str:
    """Return the keys of a YAML, nested ones dotted, with their defaults and comments."""
    rows = [
        [f"`{key.name}`", f"`{key.default}`" if key.default else "", _about(key.name, key.comment)]
        for key in describe(yaml)
    ]
    return "\n".join([*_head(("key", "value", "comment")), *map(_row, rows)])


def _about(name: str, comment: str) -> str:
    return _text(comment or (METADATA[name].help if name in HINTS else ""))


def _text(text: str) -> str:
    """Escape what Markdown would take for HTML or emphasis."""
    return re.sub(r"[<*_]", lambda found: f"&#{ord(found[0])};", text)


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(each.replace("|", "\\|").replace("\n", " ") for each in cells) + " |"
