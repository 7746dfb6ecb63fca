"""What a YAML says about its keys in comments: `--help` shows it beside their defaults.

A comment belongs to the key on whose line it stands; without one, the comment lines directly above
the key do, as far as they are indented like it. Lines that only draw a rule are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

COMMENT = re.compile(r"\s*#+\s*(.*?)\s*$")


def comments(
    root: Node, lines: list[str], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path of each key below `root` that has a comment, and the comment."""
    if not isinstance(root, MappingNode):
        return
    for key, value in root.value:
        path = (*at, str(key.value))
        comment = _behind(key, value, lines) or _above(key, lines)
        if comment:
            yield path, comment
        # An alias stands elsewhere: its comments are given there.
        if value.start_mark.index > key.start_mark.index:
            yield from comments(value, lines, path)


def _behind(key: Node, value: Node, lines: list[str]) -> str:
    """The comment at the end of the key's line, or of the last line of its value."""
    block = isinstance(value, ScalarNode) and value.style in ("|", ">")
    flow = isinstance(value, ScalarNode) or getattr(value, "flow_style", False)
    if flow and not block and value.end_mark.index > key.end_mark.index:
        rest = lines[value.end_mark.line][value.end_mark.column :]
    else:  # What is left of the line is ": !new:x", an alias, or "|".
        rest = lines[key.end_mark.line][key.end_mark.column :]
        rest = re.sub(r"^:[^#]*?(?=\s#|$)", "", rest)
    match = COMMENT.match(rest)
    return match[1] if match else ""


def _above(key: Node, lines: list[str]) -> str:
    """The comment lines directly above a key, unless they open the file: those are about it."""
    found: list[str] = []
    indent = key.start_mark.column
    for number in range(key.start_mark.line - 1, -1, -1):
        line = lines[number]
        if not re.match(rf" {{{indent}}}#", line):
            break
        if number == 0:
            return ""
        text = line.strip("# \t")
        if re.search(r"\w", text):
            found.append(text)
    return " ".join(reversed(found))
