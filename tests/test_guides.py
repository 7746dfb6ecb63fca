"""Promises of the guides that running their blocks does not show."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORMAT = re.compile(r"%[-.\d]*[sdrgf]")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_the_keyword_spotter_has_fewer_than_80_lines_and_the_gan_fewer_than_60() -> None:
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page("own-task.md"), re.DOTALL)
    assert [name for name, _ in files] == ["spotter.py", "train.py", "spotter.yaml"]
    assert sum(text.count("\n") for _, text in files) < 80
    (gan,) = re.findall(r"<!-- program: \S+ -->\n```python\n(.*?)```", page("gans.md"), re.DOTALL)
    assert gan.count("\n") < 60


def sentences() -> Iterator[str]:
    """Yield the texts of the source, with "…" for what is filled in."""
    for folder in ("trainer", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield FORMAT.sub("…", node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (getattr(each, "value", None) for each in node.values)
                    yield "".join(each if isinstance(each, str) else "…" for each in parts)


def test_the_errors_of_the_troubleshooting_page_are_those_of_the_software() -> None:
    quoted = re.findall(r"^\| `(.+?)` \|", page("troubleshooting.md"), re.MULTILINE)
    assert len(quoted) == len(set(quoted)) > 30
    source = list(sentences())
    for each in quoted:
        pattern = re.compile(".*".join(map(re.escape, each.split("…"))), re.DOTALL)
        assert any(map(pattern.fullmatch, source)), f"nothing says {each!r}"
