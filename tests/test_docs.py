"""Every code block of the documentation, as a reader would run it; `tests/pages.py` says how."""

import importlib.util
import pkgutil
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.pages import DIRECTIVES, LANGUAGES, REASONS, ROOT, Block, blocks, pages, run_page
from tests.processes import Forks
from trainer.config.hyperparameters import describe
from trainer.config.reading import compose, represent
from trainer.options import RunOptions

BLOCKS = {str(page.relative_to(ROOT)): blocks(page) for page in pages()}
MOST_NOT_RUN = 18
ALL = [block for page in BLOCKS.values() for block in page]


def check(found: dict[str, Any], page: str) -> None:
    """Fail with what a block of a page did not do; skip where it lacks a package."""
    if "failed" in found:
        pytest.fail(f"{found['failed']}: {found['error']}", pytrace=False)
    assert len(found["done"]) == len(BLOCKS[page])
    missing = sorted({each for each in found["done"] if each.startswith("needs ")})
    if missing:
        pytest.skip(f"the rest passed; {', '.join(missing)}")


@pytest.mark.parametrize("page", [name for name, found in BLOCKS.items() if found])
def test_the_blocks_of_a_page_run(page: str, forks: Forks, tmp_path: Path) -> None:
    found = forks(run_page, page, tmp_path, False, seconds=600)
    print(page, found.get("done"))
    check(found, page)


@pytest.mark.long
@pytest.mark.parametrize("page", sorted({b.page for b in ALL if "long" in b.directives}))
def test_the_long_blocks_of_a_page_run(page: str, forks: Forks, tmp_path: Path) -> None:
    check(forks(run_page, page, tmp_path, True, seconds=1200), page)


def test_every_block_is_found_and_says_how_it_is_run() -> None:
    fences = sum(page.read_text().count("```") for page in pages())
    assert fences == 2 * len(ALL) > 120
    for block in ALL:
        assert block.language in LANGUAGES, block.place
        assert {*block.directives} <= DIRECTIVES, block.place


def test_few_blocks_are_not_run_and_each_has_a_reason() -> None:
    reasons = Counter(block.directives["not run"] for block in ALL if "not run" in block.directives)
    assert sum(reasons.values()) <= MOST_NOT_RUN, reasons
    assert {*reasons} == REASONS
    assert not [
        block.place for block in ALL if _is_program(block) and "not run" in block.directives
    ]


def _is_program(block: Block) -> bool:
    return block.language in ("python", "yaml")


def test_what_a_page_writes_is_used_by_a_later_block() -> None:
    for found in BLOCKS.values():
        for number, block in enumerate(found):
            name = block.directives.get("file")
            if name is not None:
                stem = re.escape(Path(name).stem)
                later = "\n".join(each.text for each in found[number + 1 :])
                assert re.search(rf"\b{stem}\b", later), f"{block.place}: {name} is not used"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
        ("```python\nprint('a 1')\n```\n\n```\nb 1\n```", "nothing prints, or not in this order"),
        ("```python\nprint('a 1')\n```\n\n```\na 27.5\n```", None),
        ("```yaml\nclip: !new:trainer.clipping.NormClip {limits: 1}\n```", "limits"),
        ("```yaml\nprecision: fp8\n```", "precision must be one of"),
        ("```sh\ncortex run asr/demo --widht 3\n```", "did you mean 'width'"),
        ("```sh\npython recipes/asr/infer.py RUN --decodr beam\n```", "has no --decodr"),
        ("```sh\ncortex lst\n```", "there is no command"),
        ("```sh\nmake all\n```", "can be neither run nor checked"),
        ("<!-- fails: by zero -->\n```python\n1 / 1\n```", "ends without the error"),
        ("<!-- program: a.py -->\n```python\nraise SystemExit(3)\n```", "exit code 3"),
    ],
)
def test_a_block_that_is_wrong_is_found(
    text: str, error: str | None, forks: Forks, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    (tmp_path / "run").mkdir()
    found = forks(run_page, str(page), tmp_path / "run", False)
    assert ("failed" in found) == (error is not None)
    assert error is None or error in found["error"]


# -------------------------------------------------------------------- the tables and the reference


def scripted(name: str) -> Any:
    """Return a module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_options_has_every_option_with_its_default() -> None:
    page = (ROOT / "docs/reference/options.md").read_text()
    filled = scripted("docs_tables").on_page_markdown(page)
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \| .+ \| .+ \|$", filled, re.MULTILINE))
    assert [*rows] == RunOptions.names()
    for name, default in vars(RunOptions()).items():
        assert compose(rows[name], name).value == represent(default).value


def test_the_tables_of_keys_have_every_key_of_their_yamls() -> None:
    page = (ROOT / "docs/reference/recipes.md").read_text()
    files = re.findall(r"<!-- table: keys (.*?) -->", page)
    assert len(files) == 10
    for file in files:
        rows = re.findall(r"^\| `(.*?)` \|", scripted("docs_tables").table(f"keys {file}"), re.M)
        assert rows == [key.name for key in describe(ROOT / file)]


def test_the_reference_has_what_the_package_exports() -> None:
    named = set()
    for page in ROOT.glob("docs/reference/*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            named.add(id(pkgutil.resolve_name(name)))
    aliases = {"RunOptions", "create_experiment_directory", "ddp_init_group", "dump_hyperpyyaml"}
    aliases |= {"load_hyperpyyaml", "parse_arguments"}  # Names of SpeechBrain's, and a table.
    missing = {name for name in trainer.__all__ if id(getattr(trainer, name)) not in named}
    assert missing - aliases <= {"Callback"}  # In its module.


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert listed == pages


# --------------------------------------------------------------------------------------- the links


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as the site makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", h) for h in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_links_lead_to_pages_and_to_their_headings() -> None:
    links = [
        (page, *link.partition("#")[::2])
        for page in pages()
        for link in re.findall(
            r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        )
        if "://" not in link
    ]
    assert len(links) > 150
    for page, file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), f"{page}: {file}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {file}#{anchor}"
