"""HyperPyYAML's language: random files give what HyperPyYAML gives, and each form its value."""

from __future__ import annotations

import datetime
import functools
import io
import random
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from trainer.config.hyperparameters import Configuration, Text, describe, load_hparams

Write = Callable[[str], Path]

# ---------------------------------------------------------------- random files


class Writer:
    """Writes a random file; aliases and references lead to what is written before them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.anchors: list[str] = []
        self.mappings: list[str] = []  # those of mappings
        self.numbers: list[str] = []  # references such as <k1[a]>
        self.places: list[str] = []

    def file(self) -> str:
        lines = []
        for number in range(self.random.randint(3, 9)):
            place = f"k{number}"
            lines += self.entry(place, place, 0)
            self.places.append(f"<{place}>")
        return "\n".join(lines) + "\n"

    def entry(self, key: str, place: str, depth: int) -> list[str]:
        """Return the lines of a key with a value, indented by two spaces for each level."""
        indent = "  " * depth
        kind = self.random.choice(["block", "flow", "flow", "flow", "object"])
        if kind == "flow" or depth > 2:
            return [f"{indent}{key}: {self.flow(place)}"]
        merged = self.random.sample(
            self.mappings, min(len(self.mappings), self.random.randint(0, 2))
        )
        aliases = ", ".join(f"*{each} " for each in merged)
        merge = f"<<: {aliases if len(merged) == 1 else f'[{aliases}]'}"
        if kind == "object":
            tag = self.random.choice(["!new:collections.Counter", "!name:dict"])
            inner = [merge] * bool(merged) + [f"{name}: {self.flow(depth=1)}" for name in "ab"]
            return [f"{indent}{key}: {self.maybe_anchor()}{tag} {{{', '.join(inner)}}}"]
        anchor, lines = self.random.random() < 0.5, [f"{indent}  {merge}"] * bool(merged)
        names = self.random.sample("abcd", self.random.randint(1, 3))
        for name in names:
            lines += self.entry(name, f"{place}[{name}]", depth + 1)
        self.places += [f"<{place}[{name}]>" for name in names]
        head = f"{indent}{key}: {self.anchor() if anchor else ''}".rstrip()
        if anchor:  # It is known once it is complete: nothing may contain itself.
            self.mappings.append(self.anchors[-1])
        return [head, *lines]

    def anchor(self) -> str:
        self.anchors.append(f"n{len(self.anchors)}")
        return f"&{self.anchors[-1]} "

    def flow(self, place: str = "", depth: int = 0) -> str:
        """Return a value on one line."""
        choice = self.random.choice
        kinds = (
            ["scalar"] * 3 + ["alias"] * 4 + ["reference"] * 2 + ["list", "mapping", "copy", "sum"]
        )
        kind = choice(kinds if depth < 2 else kinds[:7])
        if kind == "alias" and self.anchors:
            return f"*{choice(self.anchors)} "
        if kind in ("reference", "copy") and self.places:
            tag = "!ref" if kind == "reference" else "!copy"
            return f"{self.maybe_anchor()}{tag} '{choice(self.places)}'"
        if kind == "sum" and self.numbers and place:
            text = choice(["{} * 2", "{} + {}", "results/{}", "{}/x", "{} // 3 - {} % 5"])
            return "!ref " + re.sub("{}", lambda _: choice(self.numbers), text)
        if kind == "list":
            items = [self.flow(depth=depth + 1) for _ in range(self.random.randint(0, 3))]
            return self.maybe_anchor() + f"[{', '.join(items)}]"
        if kind == "mapping":
            names = self.random.sample("abcd", self.random.randint(0, 3))
            inner = ", ".join(f"{name}: {self.flow(depth=depth + 1)}" for name in names)
            return f"{{{inner}}}"
        scalar = choice([
            *("16", "-3", "0.5", "1e-3", "007", "true", "null", "word", "'quoted'", "2020-02-03"),
            *("a-b", "x/y", "''", "1_000", "'12'", "no", "~"),
            *(["(3, 4)", "(1)"] if place and not depth else []),
        ])  # fmt: skip
        if scalar in ("16", "007") and place and not depth:
            self.numbers.append(f"<{place}>")
        return (self.maybe_anchor() if scalar not in ("null", "~") else "") + scalar

    def maybe_anchor(self) -> str:
        return self.anchor() if self.random.random() < 0.5 else ""


def plain(value: Any) -> Any:
    """Return a value with partials as tuples, so that equal ones compare equal."""
    if isinstance(value, functools.partial):
        return ("partial", value.func, plain(value.args), plain(value.keywords))
    if isinstance(value, dict):
        return (type(value), {key: plain(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value), [plain(each) for each in value])
    return (type(value), value)


def objects(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of keys that hold the same object."""
    built = [key for key, value in values.items() if isinstance(value, Counter)]
    return [(a, b) for a in built for b in built if a < b and values[a] is values[b]]


def test_random_files_give_what_hyperpyyaml_gives(tmp_path: Path) -> None:
    path, dumped, compared, used = tmp_path / "x.yaml", tmp_path / "y.yaml", 0, Counter[str]()
    for seed in range(320):
        text = Writer(seed).file()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = load_hyperpyyaml(io.StringIO(text))
        except Exception:
            continue  # such as a sum of texts
        path.write_text(text)
        configuration = Configuration(path)
        found = configuration.build()
        assert plain(found) == plain(wanted), f"seed {seed}:\n{text}"
        assert list(found) == list(wanted)
        assert objects(found) == objects(wanted), f"seed {seed}:\n{text}"
        if seed % 3 == 0:
            dumped.write_text(configuration.dump())
            assert plain(load_hparams(dumped)) == plain(wanted), f"seed {seed}, written:\n{text}"
        compared += 1
        used.update(
            each
            for each in ("*n", "&n", "!ref", "!copy", "!new", "!name", "<<", "(")
            if each in text
        )
    assert compared >= 300
    assert min(used.values()) >= 30
    assert len(used) == 8


# ---------------------------------------------------------------- single forms


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a dedented YAML and returns its path."""

    def _write(text: str) -> Path:
        path = tmp_path / "demo.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return _write


def same(path: Path) -> dict[str, Any]:
    """Return the values of a file, which HyperPyYAML reads alike."""
    found = load_hparams(path)
    with path.open() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It defines some anchors twice.
        assert plain(found) == plain(load_hyperpyyaml(file))
    return found


def test_aliases_of_scalars_keep_their_values(write: Write) -> None:
    found = same(
        write("""\
            batch: &n 16
            text: &t a b
            loader: {batch_size: *n , name: *t }
            valid: !ref <loader>
            sizes: [*n , *n , !copy <batch>]
            twice: !ref <loader[batch_size]> * 2
            """)
    )
    assert found["valid"] == {"batch_size": 16, "name": "a b"}
    assert (found["sizes"], found["twice"]) == ([16, 16, 16], 32)


def test_an_anchor_that_is_defined_again_counts_from_there(write: Write) -> None:
    found = load_hparams(write("a: &x 1\nb: *x\nc: &x [2]\nd: *x\n"))
    assert found == {"a": 1, "b": 1, "c": [2], "d": [2]}


ALIASED = """\
    d: &d {bs: 8, inner: &i {low: 1, high: 2}, net: !new:torch.nn.Linear [1, 1]}
    train: *d
    valid: *d
    test: {<<: *d, bs: 1}
    n: &n 3
    m: *n
    list: [*n , *i ]
    """


@pytest.mark.parametrize("key", ["d", "train", "valid"])
def test_an_override_of_one_alias_leaves_the_others(write: Write, key: str, tmp_path: Path) -> None:
    configuration = Configuration(write(ALIASED))
    configuration.override({key: {"bs": 16, "inner": {"low": 5}}})
    for found in (configuration.build(), load_hparams(write(configuration.dump()))):
        for each in ("d", "train", "valid"):
            want = (16, {"low": 5, "high": 2}) if each == key else (8, {"low": 1, "high": 2})
            assert (found[each]["bs"], found[each]["inner"]) == want
            assert found[each]["net"] is found["d"]["net"]
        assert (found["test"]["bs"], found["test"]["inner"]) == (1, {"low": 1, "high": 2})
        assert found["list"] == [3, {"low": 1, "high": 2}]


def test_an_override_of_a_scalar_leaves_its_aliases_and_says_so(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_hparams(write(ALIASED), {"m": 4, "test": {"inner": {"high": 9}}})
    assert (found["n"], found["m"], found["list"][0]) == (3, 4, 3)
    assert (found["test"]["inner"]["high"], found["d"]["inner"]["high"]) == (9, 2)
    assert not caplog.records
    found = load_hparams(write(ALIASED), {"n": 4})
    assert (found["n"], found["m"], found["list"][0]) == (4, 3, 3)
    inner = {"d": {"inner": {"low": 5}}}
    assert load_hparams(write(ALIASED), inner)["list"][1] == {"low": 1, "high": 2}
    d = "d alone is changed: its aliases (train, valid) keep the YAML's value; !ref <d> follows"
    said = "n alone is changed: its aliases (m, list.0) keep the YAML's value; !ref <n> follows"
    assert caplog.messages == [said, d]


def test_an_object_with_an_alias_stays_one_object(write: Write) -> None:
    text = "net: &a !new:torch.nn.Linear {in_features: 1, out_features: 2}\nmodules: {net: *a }\n"
    found = load_hparams(write(text), {"net": {"in_features": 5}})
    assert found["modules"]["net"] is found["net"]
    assert found["net"].in_features == 5
    with pytest.raises(
        ValueError, match=r"modules\.net is net \(.*line 1\), of which it is an alia"
    ):
        load_hparams(write(text), {"modules": {"net": {"in_features": 5}}})


def test_merged_keys_come_first_and_give_way(write: Write) -> None:
    found = same(
        write("""\
            a: &a {x: 1, shape: [3, 4], deep: {low: 0.9}}
            b: &b {y: 2, x: 5}
            one: {<<: *a , x: 7, z: 3}
            two:
              z: 3
              <<: [*b , *a ]
            nested: &c {<<: *a , y: !ref '<a[x]> + 1'}
            three: !new:collections.Counter {<<: *c , y: 9}
            quoted: {"<<": 4}
            """)
    )
    assert found["one"] == {"x": 7, "shape": [3, 4], "deep": {"low": 0.9}, "z": 3}
    assert list(found["one"]) == ["x", "shape", "deep", "z"]
    assert (found["two"]["x"], found["two"]["y"]) == (5, 2)
    assert found["three"]["y"] == 9
    assert found["quoted"] == {"<<": 4}


@pytest.mark.parametrize(
    "end", ["notes:", "notes:\n", "notes: \n\n", "notes:   # none", "notes: ~"]
)
def test_the_last_key_may_be_empty(write: Write, end: str, tmp_path: Path) -> None:
    path = write(f"epochs: 3\n{end}")
    assert load_hparams(path) == {"epochs": 3, "notes": None}
    assert [key.name for key in describe(path)] == ["epochs", "notes"]
    (tmp_path / "variant.yaml").write_text("base: demo.yaml\nepochs: 4\nsub:\n  deep:\n")
    found = load_hparams(tmp_path / "variant.yaml")
    assert found == {"epochs": 4, "notes": None, "sub": {"deep": None}}


class Table(torch.nn.Embedding):
    """An embedding of a user, with a class method of its own."""

    @classmethod
    def of_size(cls, rows: int, columns: int = 2) -> Table:
        """Make a table of a size."""
        return cls(rows, columns)

    @staticmethod
    def sizes(rows: int) -> list[int]:
        """Return numbers."""
        return [rows]


def test_class_methods_are_called(write: Write) -> None:
    found = load_hparams(
        write("""\
            weights: !apply:torch.ones [3, 2]
            table: !apply:torch.nn.Embedding.from_pretrained [!ref <weights>]
            frozen: !apply:torch.nn.Embedding.from_pretrained
              embeddings: !ref <weights>
              freeze: false
            later: !name:torch.nn.EmbeddingBag.from_pretrained {mode: sum}
            own: !apply:tests.trainer.test_yaml_language.Table.of_size [4]
            static: !apply:tests.trainer.test_yaml_language.Table.sizes {rows: 3}
            heir: !apply:tests.trainer.test_yaml_language.Table.from_pretrained [!ref <weights>]
            """),
        allow=["tests.trainer.test_yaml_language"],
    )
    assert found["table"].weight.requires_grad is False
    assert found["frozen"].weight.requires_grad is True
    assert found["later"](torch.ones(2, 2)).mode == "sum"
    assert isinstance(found["own"], Table)
    assert isinstance(found["heir"], Table)
    assert found["static"] == [3]


@pytest.mark.parametrize(
    ("default", "typed", "value"),
    [
        ("(3, 4)", "(5, 6, 7)", (5, 6, 7)),
        ("(3, 4)", "[5, 6]", [5, 6]),
        ("(3, 4)", "(a, 'b c', 1.5, null)", ("a", "b c", 1.5, None)),
        ("[3, 4]", "(5, 6)", (5, 6)),
        ("null", "(0.9, 0.98)", (0.9, 0.98)),
        ("(1)", "()", ()),
        ("((1, 2), (3, 4))", "((5, 6), (7,))", ((5, 6), (7,))),
        ("!ref <other>", "(5, 6)", (5, 6)),
        ("'(laughs)'", "(sighs)", "(sighs)"),
    ],
)
def test_tuples_are_read_from_the_command_line(
    write: Write, default: str, typed: str, value: Any, tmp_path: Path
) -> None:
    configuration = Configuration(write(f"x: {default}\nother: 1\n"))
    configuration.build()
    configuration.override({"x": Text(typed)})
    assert configuration.build()["x"] == value
    assert load_hparams(write(configuration.dump()))["x"] == value


def test_tuples_of_python_are_tuples(write: Write) -> None:
    assert load_hparams(write("x: '(laughs)'\n"), {"x": "(sighs)"}) == {"x": "(sighs)"}
    for value in (
        (1, "a, b", None, True),
        (),
        (1,),
        ("it's", 'a "b"', "c\nd"),
        ((1, 2), (3,)),
        ([1], 2),
    ):
        configuration = Configuration(write("x: (3, 4)\n"))
        configuration.override({"x": value})
        assert configuration.build()["x"] == value
    with pytest.raises(ValueError, match="x must be a tuple, as its default"):
        load_hparams(write("x: (3, 4)\n"), {"x": Text("5")})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, encoding: str) -> None:
    for name, text in (("a.yaml", "é: ü\n"), ("b.yaml", "base: a.yaml\nx: !include:a.yaml\n")):
        (tmp_path / name).write_text(text, encoding=encoding)
    assert load_hparams(tmp_path / "b.yaml") == {"é": "ü", "x": {"é": "ü"}}


def test_texts_that_look_like_sums_stay_texts(write: Write) -> None:
    found = same(
        write("""\
            phone: 555-1234
            day: 2024-10-15
            sum: !ref 1+2
            zeros: 1/0
            again: !ref <phone>
            same: [!ref <sum>, !ref <zeros>, !copy <phone>]
            path: !ref results/<phone>
            text: !ref <sum> apples
            number: !ref '12'
            """)
    )
    assert (found["phone"], found["sum"], found["again"]) == ("555-1234", "1+2", "555-1234")
    assert found["day"] == datetime.date(2024, 10, 15)
    assert found["same"] == ["1+2", "1/0", "555-1234"]
    assert (found["path"], found["text"]) == ("results/555-1234", "1+2 apples")
    assert found["number"] == "12"


def test_dates_and_texts_that_look_like_sums_are_not_calculated_with(write: Write) -> None:
    found = load_hparams(
        write("""\
            seed: 7
            day: 2024-10-15
            text: 10-15
            half: '1/0'
            number: '5'
            folder: !ref <day>/<seed>
            other: !ref <seed>-<text>
            more: !ref <half>/<seed>
            sum: !ref <number> + <seed>
            nested: !ref <folder> - 1
            """)
    )
    assert (found["folder"], found["other"], found["more"]) == ("2024-10-15/7", "7-10-15", "1/0/7")
    assert (found["sum"], found["nested"]) == (12, "2024-10-15/7 - 1")


class Speaker:
    """A class whose parameters take texts."""

    def __init__(
        self,
        name: str,
        born: str | None = None,
        tags: list[str] | None = None,
        folder: str | Path = "",
        number: int = 0,
        either: str | int = 0,
        anything: Any = None,
    ) -> None:
        self.values = (name, born, tags, folder, number, either, anything)


def test_numbers_and_dates_are_texts_for_parameters_that_take_texts(write: Write) -> None:
    path = write("""\
        id: 007
        born: 2001-02-03
        tags: [001, 1.10, a]
        speaker: !new:tests.trainer.test_yaml_language.Speaker
          name: !ref <id>
          born: !ref <born>
          tags: !ref <tags>
          folder: 0042
          number: 0042
          either: 007
          anything: !ref <born>
        listed: !new:tests.trainer.test_yaml_language.Speaker [1_000, 1e3]
        later: !name:tests.trainer.test_yaml_language.Speaker {name: 0x1F}
        """)
    found = load_hparams(path, allow=["tests.trainer.test_yaml_language"])
    day = datetime.date(2001, 2, 3)
    assert (found["id"], found["born"], found["tags"]) == (7, day, [1, 1.1, "a"])
    texts = ("007", "2001-02-03", ["001", "1.10", "a"], "0042", 42, 7, day)
    assert found["speaker"].values == texts
    assert found["listed"].values[:2] == ("1_000", "1e3")
    assert found["later"]().values[0] == "0x1F"


def test_a_run_option_that_is_a_text_takes_numbers_and_dates(write: Write) -> None:
    path = write("output_folder: 2024-01-05\nseed: 7\n")
    assert Configuration(path).options()["output_folder"] == "2024-01-05"
    assert load_hparams(path)["output_folder"] == "2024-01-05"
    assert load_hparams(write(Configuration(path).dump()))["output_folder"] == "2024-01-05"


def test_references_within_a_text_are_filled_in_where_it_is_referred_to(write: Write) -> None:
    found = same(
        write("""\
            template: run-<seed>/<name>
            name: <kind>_net
            kind: conv
            seed: 7
            whole: !ref <template>
            part: !ref results/<template>/logs
            twice: !ref <formula>
            formula: <seed> * 2
            number: !ref <pointer>
            pointer: <seed>
            """)
    )
    assert found["template"] == "run-<seed>/<name>"
    assert found["whole"] == "run-7/conv_net"
    assert found["part"] == "results/run-7/conv_net/logs"
    assert (found["twice"], found["number"]) == (14, 7)
    tokens = write("bos: <bos>\nunk: <unk>\nall: [!ref <bos>, !ref <unk>, <pad>]\nw: !ref <unk>x\n")
    assert load_hparams(tokens)["all"] == ["<bos>", "<unk>", "<pad>"]
    with pytest.raises(ValueError, match="the reference is circular"):
        load_hparams(write("a: x<b>\nb: y<a>\nc: !ref <a>\n"))


def test_expressions_may_hold_texts_in_quotes(write: Write) -> None:
    found = same(
        write("""\
            a: conv
            n: 3
            joined: !ref '"<a>" + "_net"'
            repeated: !ref "'<a>' * <n>"
            formatted: !ref "'fold%02d' % <n>"
            text: !ref "'<n>'"
            unquoted: !ref <a> + 'x'
            """)
    )
    assert (found["joined"], found["repeated"]) == ("conv_net", "convconvconv")
    assert (found["formatted"], found["text"]) == ("fold03", "3")
    assert found["unquoted"] == "conv + 'x'"
    for bomb in ("'x' * 99999999999", "99999999999 * 'x'", "'%99999d' % 1", "'%-9999s' % 'a'"):
        with pytest.raises(ValueError, match="the text is too long"):
            load_hparams(write(f"n: 1\nx: !ref \"{bomb} + '<n>'\"\n"))


@pytest.mark.parametrize(
    "value",
    [
        "16",
        "encoder",
        "[1, 2]",
        "{lr: 1}",
        "!ref <x>",
        "!new:torch.nn.ReLU",
        "null",
        "a.b",
        "/data/x",
        "~/data",
    ],
)
def test_base_may_be_a_key_of_ones_own(write: Write, value: str) -> None:
    path = write(f"base: {value}\nx: 3\ny: !ref <base>\n")
    found = load_hparams(path)
    assert found["y"] is found["base"] or found["y"] == found["base"]
    changed = Configuration(path)
    changed.override({"x": 4})
    assert set(load_hparams(write(changed.dump()))) == {"base", "x", "y"}


# ---------------------------------------------------------------- the command line and home


def test_home_is_home_everywhere(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "common.yaml").write_text("shared: 1\n")
    path = write("""\
        base: ~/common.yaml
        output_folder: ~/runs/<seed>
        seed: 7
        data_folder: "~/data"
        table: !ref <data_folder>/a.csv
        deep: [{path: ~/x}]
        here: !ref ~/<seed>
        root: "~"
        below: !ref <root>/<seed>
        ratio: ~5
        approximate: a ~/b
        none: ~
        part: !include:~/common.yaml
        """)
    found = load_hparams(path)
    assert found["output_folder"] == f"{home}/runs/<seed>"
    assert (found["data_folder"], found["table"]) == (f"{home}/data", f"{home}/data/a.csv")
    assert (found["deep"], found["here"]) == ([{"path": f"{home}/x"}], f"{home}/7")
    assert (found["ratio"], found["approximate"], found["none"]) == ("~5", "a ~/b", None)
    assert (found["shared"], found["part"]) == (1, {"shared": 1})
    assert (found["root"], found["below"]) == ("~", f"{home}/7")
    assert Configuration(path).options()["output_folder"] == f"{home}/runs/<seed>"
    assert "~/data" in Configuration(path).dump()
    typed = {"data_folder": Text("~/b"), "output_folder": Text("~/c")}
    changed = load_hparams(path, typed)
    assert (changed["table"], changed["output_folder"]) == (f"{home}/b/a.csv", f"{home}/c")


@pytest.mark.parametrize("base", [-7, -0.5, -1e-3, 3, 2.5])
@pytest.mark.parametrize("power", [2, 3, -1])
def test_a_power_of_a_reference_is_one_of_its_value(write: Write, base: float, power: int) -> None:
    path = write(f"""
        base: {base}
        inner: {{power: {power}}}
        value: !ref <base> ** <inner[power]>
        close: !ref <base>**<inner[power]>
        sum: !ref 1 - <base> ** {power} + 2 * <base> ** 2
        minus: !ref -<base> ** {power}
        text: !ref x<base> ** 2
        """)
    found = load_hparams(path)
    assert found["value"] == found["close"] == base**power
    assert found["sum"] == 1 - base**power + 2 * base**2
    assert found["minus"] == -(base**power)
    assert found["text"] == f"x{base} ** 2"
