"""Any file and any command line is understood, or refused by a sentence of the trainer's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from trainer.cli import configure, main
from trainer.cli.session import is_user_error
from trainer.config.hyperparameters import Configuration, Text, load_hparams
from trainer.options import RunOptions

EXAMPLES = 150
FAST = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FOLDER = Path(tempfile.mkdtemp(prefix="yaml-"))
# The short ones: a long YAML takes a tenth of a second to read.
HPARAMS = sorted(Path(__file__).parents[2].glob("hparams/*/*.yaml"), key=lambda p: p.stat().st_size)


def words(text: str) -> list[str]:
    return text.split()


KEYS = words("a b c d seed precision output_folder modules max_grad_norm é")
ODD_KEYS = [*KEYS, *words("<< base 1 c.d ' &x ? allow !x")]
# Values that may be valid, and values that are wrong in some way.
PLAUSIBLE = words(r"""
    1 -1 0 3 8 007 0x1F 1_000 1e3 1e999 -1e999 .inf .nan 1.5 1e-400 null ~ true false off a 'a' "a"
    'it''s' "\u00e9" (1,2) (1,) () '(1)' 12:30:45 2001-01-01 2001-01-01T00:00:00Z !!str 😀 é 1e 0x
    -. .. ... = inf 1:2 bf16 -.5 +1 {} []
    """)
PLAUSIBLE += [str(10**30), str(10**400), "1" * 4000, "-" + "9" * 400, "a b", "x" * 70, "!!float 1"]
ODD = words(r"""
    "\x00" "\ud800" "\z" (1 ( &x *x *y 2001-99-99 !!binary !!set !!timestamp !!omap !!bool !!int:x
    ! !!ref !ref !copy !PLACEHOLDER @ ` % | > - ? : # , [[]] [1,2 ]x --- << <a> !!int !!python/x:y
    """)
ODD += ["", " ", "\t", "a: b", "1" * 5000, "2001-01-01 99:99:99", "2001-02-30", "!!float x"]
ODD += ["!!bool x", "!!timestamp x", "!!null x", "!!int ''", "!!binary '?'", "\u2028", "\ufeff"]
NAMES = words("""
    torch.nn.Linear torch.nn.ReLU torch.nn.Dropout torch.zeros torch.optim.Adam torch.float32 dict
    torch.nn.functional.relu len max str tuple int list set abs round slice collections.Counter bool
    trainer.EpochCounter trainer.schedules.WarmupDecay math.sqrt torch.utils.data.Subset
    torch.nn.Embedding.from_pretrained trainer.clipping.ZClip torch.nn.ModuleDict torch.device
    """)
ODD_NAMES = [*NAMES, *words("os.system zip torch torch.nn . a.b torch.nn.linear é.x"), "", "x y"]
REFERENCES = words("""
    <a> <b> <c> <a[b]> <a.b> <a[0]> <a[0][b]> <a.weight> <b.weight.shape> <a>.<b> <seed> x/<b> <a>+1
    <a>**<a> <a>//0 <a>%0 1/<a> (<a>,2) -<a> <a>*2 <c.in_features> <d.betas>
    <a]> <a[> <> <<a>> <a.b.c> <a.parameters> <a.__class__> <a..b> <a
    """)
ARGUMENTS = words("""
    - = --= --=1 --a --a= --a=b --no-a --no-flag --flag --flag=1 --net.in_features --net --net.
    --.net --net..x --c.d --c.d.e --no-c.f --seed --seed=-1 -1 -x 1 true null é 😀 --é --é=1
    --precision --precision=bf16 --lr --data --allow --allow=torch --allow=é --allow=, --base=x.yaml
    --<<=1 --a=!ref --a=<a> [1 {a: --max_grad_norm --max_grad_norm={a:1} --help-me --no- --no--
    --output_folder= --output_folder=/dev/null/x --debug --device=gpu --device --threads=0 --replay
    """)
ARGUMENTS += ["--", "", "\x00", "--\x00", "--a=\x00", "--a=\ud800", "--output_folder=a\x00b"]


def values(scalars: list[str], names: list[str]) -> st.SearchStrategy[str]:
    """Return texts of YAML values: scalars, lists, mappings, references and objects."""

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pairs = st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
        maps = pairs.map(lambda each: f"{{{', '.join(f'{k}: {v}' for k, v in each.items())}}}")
        lists = st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
        tags = st.sampled_from(words("new new name apply applyref module include"))
        named = st.sampled_from(names)
        return maps | lists | st.builds("!{}:{} {}".format, tags, named, maps | lists | st.just(""))

    to = st.builds("!{} {}".format, st.sampled_from(["ref", "copy"]), st.sampled_from(REFERENCES))
    return st.recursive(st.sampled_from(scalars) | to, extend, max_leaves=6)


def lines(pairs: dict[str, str]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in pairs.items())


VALUES = values([*PLAUSIBLE, *ODD], ODD_NAMES)
GOOD_YAMLS = st.dictionaries(st.sampled_from(KEYS), values(PLAUSIBLE, NAMES), max_size=6).map(lines)
ANY_KEY = st.sampled_from(ODD_KEYS)
LINES = st.one_of(
    st.builds("{}: {}".format, ANY_KEY, VALUES),
    st.builds("{}: {}  # {}".format, ANY_KEY, VALUES, st.text(max_size=5)),
    st.builds("{}:\n  {}: {}".format, ANY_KEY, ANY_KEY, VALUES),
    st.builds("{}: &x\n  {}: {}\ne:\n  <<: *x".format, ANY_KEY, ANY_KEY, VALUES),
    st.builds("{}:\n- {}\n- {}".format, ANY_KEY, VALUES, VALUES),
    st.builds("{}: |\n  {}".format, ANY_KEY, VALUES),
    st.sampled_from(["", "---", "...", "%YAML 1.1", "%TAG ! x:", "\t", "# x", "- a", "? a", ": b"]),
)
YAMLS = st.lists(LINES, max_size=5).map("\n".join)
DEMO = """
a: 1
flag: true
net: !new:torch.nn.Linear {in_features: 1, out_features: 2}
c: {d: x, f: false}
none: null
"""
OVERRIDES = st.builds("--{}={}".format, st.sampled_from(words("a c.d net.bias flag none")), VALUES)
OPTIONS = st.builds("--{}={}".format, st.sampled_from(RunOptions.names()), VALUES)
COMMANDS = st.sampled_from(ARGUMENTS) | st.text(max_size=6) | OPTIONS | OVERRIDES


@contextmanager
def sentences() -> Iterator[None]:
    """Context manager that lets errors pass that the trainer raises for its users."""
    try:
        yield
    except ValueError as error:
        event("refused")
        if not is_user_error(error):
            raise


def check(content: str | bytes, build: bool = True) -> None:
    """Read and build a file, and compare it with its dump."""
    path, dumped = FOLDER / "x.yaml", FOLDER / "y.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    with sentences():
        configuration = Configuration(path)
        configuration.options()
        dumped.write_text(configuration.dump(), encoding="utf-8")
        again = [key[:2] for key in Configuration(dumped).described()]
        assert again == [key[:2] for key in configuration.described()]
        if build:
            configuration.build()
        event("read")


@FAST
@given(GOOD_YAMLS)
def test_a_plausible_yaml_is_built_or_refused(text: str) -> None:
    check(text)


@FAST
@given(YAMLS)
def test_an_odd_yaml_is_built_or_refused(text: str) -> None:
    check(text)


@FAST
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text_and_any_bytes_are_read_or_refused(content: str | bytes) -> None:
    check(content)


@FAST
@given(st.data())
def test_a_damaged_yaml_of_a_recipe_is_read_or_refused(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(HPARAMS[:5])).read_text(encoding="utf-8")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from([0, 0, 1, 1, 2, 10, 100]))
        signs = [*":{}[]&*!|>'\"%@`,?-\n\t # <>"]
        new = data.draw(st.sampled_from([*PLAUSIBLE, *ODD, *REFERENCES, *signs]))
        text = text[:start] + new + text[end:]
    check(text, build=False)


@FAST
@given(st.dictionaries(st.sampled_from(words("a net net.bias c seed x")), VALUES, max_size=3))
def test_an_override_is_built_or_refused(changes: dict[str, str]) -> None:
    path = FOLDER / "z.yaml"
    path.write_text(DEMO)
    with sentences():
        load_hparams(path, {key: Text(value) for key, value in changes.items()})
        event("read")


@FAST
@given(st.lists(COMMANDS, max_size=4))
def test_a_command_line_is_understood_or_refused(arguments: list[str]) -> None:
    path = FOLDER / "demo.yaml"
    path.write_text(DEMO)
    with sentences():
        configuration, options = configure([str(path), *arguments])
        configuration.build()
        assert isinstance(options, RunOptions)
        event("read")


@FAST
@given(arguments=st.lists(COMMANDS, max_size=2))
def test_a_program_runs_or_ends_with_code_2(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(DEMO)
    capsys.readouterr()
    code = 0
    try:
        main(lambda run: event("ran"), ["demo.yaml", *arguments])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    said = capsys.readouterr().err
    assert code in (0, 2)
    assert ("error: " in said) is (code == 2)
    assert "Traceback" not in said
