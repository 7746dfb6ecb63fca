"""Code blocks of the documentation, run as a reader would run them.

A page runs from top to bottom in a process of its own that has imported torch and has run nothing,
in an empty folder. HTML comments above a block say how, where it is not plain from the block:

| comment | meaning |
|---|---|
| `<!-- file: NAME -->` | the block is the file NAME, which a later block uses |
| `<!-- program: NAME -->` | the block is the file NAME and is run by `python NAME` |
| `<!-- alone -->` | Python in a namespace of its own, not that of the blocks before it |
| `<!-- needs: PACKAGE -->` | not run where PACKAGE is missing |
| `<!-- fails: TEXT -->` | the block ends in an error that says TEXT |
| `<!-- long -->` | run by the marker `long` alone |
| `<!-- not run: REASON -->` | a reason of `REASONS` |

Blocks of Python share one namespace. YAML is built by the configuration reader. A shell command is
run where what it names is there: programs and YAMLs of the page, runs in its folder; else its
arguments are checked against the parser of its program. A block without a language is what the
block before it prints, line by line in that order, whatever its figures; `…` stands for anything,
a line of `…` for any lines. One that begins with `$ ` is a command and what it prints.

Anywhere on a page, `<!-- run folder: results/TASK/NAME/SEED -->` puts a small run of recipes/TASK
there (`RUNS`), and `<!-- recording: FILE -->` a second of sound, for the blocks that name it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import ROOT, leave, start

REASONS = {
    "a diagram",
    "a form to fill in",
    "needs a scheduler",
    "needs the network",
    "output of a command that takes minutes",
    "output on a large model",
}
DIRECTIVES = {"file", "program", "alone", "needs", "fails", "long", "not run"}
GIVEN = {"run folder", "recording"}  # Comments about the page.
LANGUAGES = {"python", "yaml", "sh", "toml", "diff", ""}
FENCED = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- ([a-z ]+?)(?:: (.*?))? -->")


@dataclass(frozen=True)
class Block:
    """Code block of a page, with the comments above it."""

    page: str
    line: int
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_output(self) -> bool:
        return not self.language and not self.text.startswith("$ ")


def pages() -> list[Path]:
    """Return the pages whose blocks are run."""
    folders = [ROOT.glob(each) for each in ("*.md", "docs/**/*.md", "recipes/*/README.md")]
    return sorted(page for folder in folders for page in folder)


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    text = page.read_text()
    name, found = os.path.relpath(page, ROOT), []
    for match in FENCED.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        directives: dict[str, str] = {}
        for above in reversed(text[: match.start()].rstrip("\n").split("\n")):
            comment = COMMENT.fullmatch(above)
            if comment is None:
                break
            directives[comment[1]] = comment[2] or ""
        directives = {name: each for name, each in directives.items() if name not in GIVEN}
        found.append(Block(name, line, match[1].strip(), match[2], directives))
    return found


# ----------------------------------------------------------------- shell commands without a program


class Unchecked(Exception):
    """A command that can be neither run nor checked."""


def commands(text: str) -> list[str]:
    """Return the commands of a shell block, without comments and line ends that continue."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    split = [re.split(r" && |; ", re.sub(r"(^|\s)# .*", "", line)) for line in lines]
    return [each.strip() for line in split for each in line if each.strip()]


def words(command: str) -> list[str]:
    """Return a command as words: no comment, no variable before it, no redirection, one pipe."""
    given = shlex.split(command.partition(" | ")[0], comments=True)
    while given and re.fullmatch(r"[A-Z_]+=\S*", given[0]):
        given.pop(0)
    return given


def check(given: list[str]) -> None:
    """Check a command against the files and the arguments that its program has."""
    program, rest = given[0], given[1:]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        arguments = options.training_script_args
        module = ["-m"] if options.module else []
        check(["python", *module, options.training_script, *arguments])
    elif program == "python" and rest[0] == "-m":
        _check_module(rest[1], rest[2:])
    elif program == "python":
        _check_program(ROOT / rest[0], rest[1:])
    elif program == "cortex":
        _check_module("trainer", rest)
    elif program == "pip":
        _check_install(rest)
    elif program not in ("mkdocs", "pre-commit", "cd", "git"):
        raise Unchecked(f"{shlex.join(given)!r} can be neither run nor checked")


def _check_module(module: str, rest: list[str]) -> None:
    if module == "trainer":
        _check_command(rest)
    elif module.startswith("tests."):
        path = ROOT.joinpath(*module.split("."))
        _check_options(path.with_suffix(".py"), rest)
    elif module != "pytest":
        raise Unchecked(f"python -m {module} can be neither run nor checked")


def _check_command(rest: list[str]) -> None:
    from trainer.cli.commands import COMMANDS
    from trainer.cli.recipe import recipes
    from trainer.cli.sweep import parse_values

    if not rest:
        return
    name, *arguments = rest
    assert name in COMMANDS, f"there is no command cortex {name}"
    if name in ("run", "sweep") and arguments and "--help" not in arguments:
        recipe, *more = arguments
        if recipe.endswith(".yaml"):
            return
        assert recipe in recipes(), f"there is no recipe {recipe}"
        end = next((n for n, each in enumerate(more) if each.startswith("--")), len(more))
        _configure(recipes()[recipe].file, more[end:])
        for key, choices in parse_values(more[:end]) if name == "sweep" else ():
            for choice in choices:
                _configure(recipes()[recipe].file, [f"--{key}={choice}", *more[end:]])


def _check_program(path: Path, rest: list[str]) -> None:
    assert path.is_file(), f"there is no {path.relative_to(ROOT)}"
    if path.name == "train.py" and "--help" not in rest:
        found = re.fullmatch(r"results/(\w+)/(\w+)/[^/]+/hyperparams.yaml", rest[0])
        _configure(Path("hparams", found[1], f"{found[2]}.yaml") if found else rest[0], rest[1:])
    else:
        _check_options(path, rest)


def _check_options(path: Path, rest: list[str]) -> None:
    """Look for the options of a command in the source of its program and of what that shares."""
    shared = ROOT.glob("recipes/common/*.py") if "recipes" in path.parts else ()
    text = "".join(each.read_text() for each in (path, *shared))
    for option in (each.partition("=")[0] for each in rest if re.match(r"--?[a-z]", each)):
        assert f'"{option}"' in text or option == "--help", f"{path.name} has no {option}"


def _configure(yaml: str | Path, given: list[str]) -> None:
    from trainer.cli import arguments

    with contextlib.chdir(ROOT):
        arguments.configure([str(yaml), *given])


def _check_install(rest: list[str]) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|cortex-speech)\[(.*?)\]", " ".join(rest)):
        unknown = {*extras.split(",")} - {*project["optional-dependencies"]}
        assert not unknown, f"there is no extra {unknown}"


# ------------------------------------------------------------------------------------ a page's run


class Failed(Exception):
    """A block that does not do what its page says."""


class PageRun:
    """Runs the blocks of one page, in the current folder, one after another."""

    def __init__(self, long: bool) -> None:
        self.long = long
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.written: set[str] = set()
        self.output = ""
        self.done: list[str] = []  # What was done with each block.

    def prepare(self, block: Block, given: Sequence[Sequence[str]]) -> None:
        """Make the runs and recordings that a block names."""
        skipped = "not run" in block.directives or "long" in block.directives and not self.long
        for kind, name in () if skipped else given:
            if name not in block.text or Path(name).exists():
                continue
            if kind == "recording":
                _record(Path(name), 440.0)
            elif self._in_fork(lambda name=name: RUNS["/".join(name.split("/")[1:3])](Path(name))):
                raise Failed(f"{name} cannot be made")

    def run(self, block: Block) -> None:
        given = block.directives
        if "not run" in given:
            self.done.append("not run")
            return
        if "long" in given and not self.long:
            self.done.append("long")
            return
        if block.is_output:
            self._compare(block.text, self.output)
            self.done.append("output")
            return
        name = given.get("file") or given.get("program")
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(block.text)
            self.written.add(name)
        if "file" in given:
            self.done.append("file")
        elif "fails" in given:
            self._fails(block, given["fails"])
        else:
            self._do(block)

    def _do(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        elif block.language == "yaml":
            self._yaml(block)
        elif block.language == "toml":
            import tomllib

            tomllib.loads(block.text)
            self.done.append("checked")
        elif block.language == "diff":
            self._diff(block.text)
        else:
            self._shell(block)

    def _fails(self, block: Block, sentence: str) -> None:
        try:
            self._do(block)
        except (Exception, SystemExit) as error:
            if sentence not in f"{error}{self.output}":
                raise Failed(f"it does not say {sentence!r} but {error}{self.output}") from error
            self.done.append("fails")
        else:
            raise Failed(f"it ends without the error {sentence!r}")

    def _python(self, block: Block) -> None:
        given = block.directives
        if "program" in given:
            self._command(["python", given["program"]])
        elif "alone" in given:
            self._in_fork(lambda: self._execute(block, {"__name__": "__main__"}))
        else:
            with self._printed():
                self._execute(block, self.names)
        self.done.append("run")

    def _execute(self, block: Block, names: dict[str, Any]) -> None:
        path = Path(f".blocks/{Path(block.page).stem}-{block.line}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)  # For tracebacks, and `inspect`.
        exec(compile(block.text, str(path.absolute()), "exec"), names)

    def _yaml(self, block: Block) -> None:
        from trainer.cli.arguments import configure

        path = Path(f".blocks/{Path(block.page).stem}-{block.line}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)
        own = [Path(each).stem for each in self.written if each.endswith(".py")]
        configuration, _ = configure([str(path)], own)
        configuration.build()
        self.done.append("run")

    def _diff(self, text: str) -> None:
        """Compile the parts of a change, and import what its new lines import."""
        import textwrap

        for sign, lines in itertools.groupby(text.splitlines(), lambda line: line[:1]):
            source = textwrap.dedent("\n".join(line[1:] for line in lines))
            if not source.endswith(":"):
                compile(source, "diff", "exec")
            if sign == "+" and "import" in source:
                exec(source, {})
        self.done.append("checked")

    def _shell(self, block: Block) -> None:
        kinds = set()
        if block.language:
            for command in commands(block.text):
                kinds.add(self._line(command))
        else:
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                kinds.add(self._line(command))
                if "run" in kinds:
                    self._compare(shown, self.output)
            if kinds != {"run"}:
                raise Failed("what it prints is not compared: the command is not run")
        self.done.append("run" if "run" in kinds else "checked")

    def _line(self, command: str) -> str:
        given = words(command)
        if self._is_here(given):
            self._command(given)
            return "run"
        try:
            check(given)
        except AssertionError as error:
            raise Failed(str(error)) from error
        return "checked"

    def _is_here(self, given: list[str]) -> bool:
        """Return True for a command whose programs, YAMLs and runs are in the current folder."""
        if given[0] == "torchrun":
            return self.long and any(each in self.written for each in given)
        if given[0] == "python" and given[1] in self.written:
            return True
        if given[:3] == ["python", "-m", "trainer"]:
            given = ["cortex", *given[3:]]
        if given[0] != "cortex":
            return given[0] in ("ls", "cat", "head", "tail", "rm", "cp", "mkdir")
        named = [each for each in given[2:] if not each.startswith("-")]
        if given[1:2] in (["run"], ["sweep"]):
            trial = self.long and "--debug" in given  # A few batches of what the page has made.
            return trial or given[2:3] == [] or given[2] in self.written or "--help" in given
        return "--help" in given or any([*Path().glob(each)] for each in named[:1])

    def _command(self, given: list[str]) -> None:
        given = [
            each
            for word in given
            for each in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        if given[0] == "torchrun":
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
            given = [sys.executable, "-m", "torch.distributed.run", *given[1:]]
            done = subprocess.run(given, capture_output=True, text=True, env=environment)
            self.output, code = done.stderr + done.stdout, done.returncode
        elif given[0] not in ("python", "cortex"):
            done = subprocess.run(given, capture_output=True, text=True)
            self.output, code = done.stderr + done.stdout, done.returncode
        else:
            code = self._in_fork(lambda: _start(given))
        if code:
            raise Failed(f"{shlex.join(given)} ends with exit code {code}:\n{self.output}")

    @contextlib.contextmanager
    def _printed(self) -> Iterator[None]:
        """Keep what is printed, on both streams, in `self.output`."""
        with tempfile.TemporaryFile("w+") as file:
            before = sys.stdout, sys.stderr
            kept = os.dup(1), os.dup(2)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                sys.stdout, sys.stderr = before
                for number, copy in zip((1, 2), kept, strict=True):
                    os.dup2(copy, number)
                    os.close(copy)
                file.seek(0)
                self.output = file.read()

    def _in_fork(self, work: Any) -> int:
        """Call in a child process; return its exit code."""
        with self._printed():
            sys.stdout.flush()
            child = os.fork()
            if not child:
                leave(work)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _compare(self, shown: str, printed: str) -> None:
        """Look for lines among those that were printed, in their order."""
        printed = printed.replace(sys.executable, "python")
        rest = [re.sub(r"\x1b\[[0-9;]*m", "", each).rstrip() for each in printed.splitlines()]
        for line in shown.splitlines():
            if line.strip() in ("", "…"):
                continue
            pattern = _pattern(line)
            place = next((n for n, each in enumerate(rest) if pattern.fullmatch(each)), None)
            if place is None:
                raise Failed(f"nothing prints, or not in this order, {line!r}:\n{printed}")
            rest = rest[place + 1 :]


def _pattern(line: str) -> re.Pattern[str]:
    """Return what a shown line looks like, with any figures."""
    parts = re.split(r"(\d[\d.,]*(?:e[-+]?\d+)?|…|\s+)", line.strip())
    kinds = {"…": ".*"}
    found = [
        r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?" if each[:1].isdigit() else
        r"\s+" if each[:1].isspace() else kinds.get(each, re.escape(each))
        for each in parts if each
    ]  # fmt: skip
    return re.compile(r"\s*" + "".join(found))


def _start(given: Sequence[str]) -> None:
    """Be the program of a command."""
    if given[0] == "cortex" or given[1:3] == ["-m", "trainer"]:
        from trainer.cli.commands import main

        arguments = given[1:] if given[0] == "cortex" else given[3:]
        sys.argv = ["cortex", *arguments]
        sys.exit(main(arguments))
    start(given[1:])


def _record(path: Path, pitch: float, rate: int = 16000, seed: int = 1) -> None:
    import numpy as np
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.02, rate)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch / rate * np.arange(rate)) + noise, rate)


def _recogniser(folder: Path) -> None:
    from tests.recipes.run_folder_attacks import make_run
    from trainer.run_files import HEADER

    folder.parent.mkdir(parents=True)
    make_run(folder)
    file = folder / "hyperparams.yaml"
    file.write_text(f"{HEADER}\n{file.read_text()}")


def _classifier(folder: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("transformers") is None:  # train.py imports it for all tasks.
        from tests.recipes.small_runs import make_run

        folder.parent.mkdir(parents=True)
        make_run("classify", folder)
        return
    with tempfile.TemporaryDirectory() as data:
        for label, take in itertools.product(range(4), range(8)):
            _record(Path(data, f"t{label}", f"{take}.wav"), 300.0 + 450 * label, 8000, take)
        small = "{sample_rate: 8000, bands: 16, size: 12}"
        settings = [
            "--data_folder", data, "--output_folder", str(folder.absolute()),
            "--encoder", f"!new:recipes.finetune.tdnn.TDNN {small}", "--source=null",
            "--param_groups=null", "--max_grad_norm=5.0", "--corpus.valid=0.25",
            "--corpus.test=0.25", "--steps=2", "--schedule.warmup_steps=1", "--seconds=0.3",
            "--batch_seconds=3", "--num_workers=0", "--threads=1",
        ]  # fmt: skip
        recipe = [
            str(ROOT / "recipes/finetune/train.py"),
            str(ROOT / "hparams/finetune/classify.yaml"),
        ]
        _start(["python", *recipe, *settings])


def _untrained(folder: Path) -> None:
    from tests.recipes.small_runs import make_run

    folder.parent.mkdir(parents=True)
    make_run(folder.parts[1], folder)


RUNS = {
    "asr/demo": _recogniser, "finetune/classify": _classifier, "hifigan/demo": _untrained,
    "metricgan/demo": _untrained, "segan/demo": _untrained, "separation/demo": _untrained,
    "tacotron2/demo": _untrained, "tacotron2/ljspeech": _untrained,
}  # fmt: skip


def run_page(name: str, folder: str, long: bool) -> dict[str, Any]:
    """Run the blocks of a page in a folder.

    Returns:
        "done": what was done with each block; "failed" and "error": the place of the block that
        does not do what the page says, and why.
    """
    import importlib.util

    os.environ.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    os.chdir(folder)
    sys.path[:0] = [folder]
    page = PageRun(long)
    given = re.findall(r"<!-- (run folder|recording): (.*?) -->", (ROOT / name).read_text())
    for block in blocks(ROOT / name):
        needed = block.directives.get("needs", "").replace(",", " ").split()
        missing = [each for each in needed if importlib.util.find_spec(each) is None]
        if missing:
            page.done.append(f"needs {missing[0]}")
            continue
        began = time.monotonic()
        try:
            page.prepare(block, given)
            page.run(block)
        except (Exception, SystemExit) as error:
            said = error if isinstance(error, Failed) else traceback.format_exc()
            return {"done": page.done, "failed": block.place, "error": f"{said}\n{page.output}"}
        seconds = time.monotonic() - began
        page.done[-1] += f" {seconds:.1f} s" if seconds > 1 else ""
    return {"done": page.done}
