"""YAML to objects: allowed names, refused ones, and a sentence for every mistake."""

import contextlib
import importlib
import inspect
import re
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trainer.clipping
import trainer.schedules
from trainer.clipping import Clip
from trainer.config.building import arithmetic
from trainer.config.hyperparameters import Configuration, Text, describe, load_hparams
from trainer.config.registry import Registry, listed_names
from trainer.schedules import MetricSchedule, StepSchedule

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a dedented YAML and returns its path."""

    def _write(text: str, name: str = "demo.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return _write


RECIPE = """\
    # python train.py demo.yaml

    # Of everything random.
    seed: 1234
    lr: 1e-3  # peak
    width: 8
    model: !new:torch.nn.Linear  # the network
      in_features: !ref <width>  # channels
      out_features: 2
    opt_class: !name:torch.optim.Adam
      lr: !ref <lr>
    modules: {net: !ref <model>}
    folder: !ref results/<seed>
    double: !ref <width> * 2
    shape: (3, 4)
    note: "(laughs)"
    sizes: [1, 2]
    shuffle: true
    loader: {}
    limit: null
"""


def test_objects_references_and_values_are_built(write: Write) -> None:
    hparams = load_hparams(write(RECIPE))
    assert isinstance(hparams["model"], torch.nn.Linear)
    assert hparams["modules"]["net"] is hparams["model"]
    assert hparams["opt_class"].func is torch.optim.Adam
    assert hparams["opt_class"].keywords == {"lr": 1e-3}
    assert (hparams["folder"], hparams["double"]) == ("results/1234", 16)
    assert hparams["shape"] == (3, 4)
    assert hparams["note"] == "(laughs)"


def test_references_chain_point_forward_and_reach_into_objects(write: Write) -> None:
    hparams = load_hparams(
        write("""\
            first: !ref <second>
            second: !ref <third[a][1]>
            third: {a: [1, !ref <width>]}
            width: 8
            dotted: !ref <third.a[0]>
            layer: !new:torch.nn.Linear [3, !ref <width>]
            weight: !ref <layer.weight>
            counter: !new:collections.Counter
            same: !ref <counter>
            other: !copy <counter>
            sizes: !applyref:sorted
              _args: [[3, 1, !ref <width>]]
              _kwargs: {reverse: true}
            """)
    )
    assert (hparams["first"], hparams["second"], hparams["dotted"]) == (8, 8, 1)
    assert hparams["weight"] is hparams["layer"].weight
    assert hparams["same"] is hparams["counter"]
    assert hparams["other"] is not hparams["counter"]
    assert hparams["sizes"] == [8, 3, 1]


def test_sums_are_bounded() -> None:
    assert arithmetic("2 * (3 + 4) // 2 - -1") == 8
    assert arithmetic("10 ** -2") == 0.01
    assert arithmetic("'x' * 3 + 'y'") == "xxxy"
    for bomb in ("9 ** 9 ** 9", "(2 ** 60) ** 60 * 2 ** 60", "1 / 0", "'x' * 10 ** 9"):
        with pytest.raises(ArithmeticError):
            arithmetic(bomb)
    for other in ("__import__('os')", "b'x' * 1000", "a / b", "1 if 1 else 2"):
        with pytest.raises(TypeError):
            arithmetic(other)


def test_merge_keys_take_lists_and_mappings_and_survive_the_dump(write: Write) -> None:
    path = write("""\
        train: &t {batch_size: 8, shape: [3, 4]}
        valid: {<<: *t, batch_size: 1}
        both: {<<: [*t, {shape: none, low: {a: 1}}], volume: 2}
        """)
    hparams = load_hparams(path)
    assert hparams["valid"] == {"batch_size": 1, "shape": [3, 4]}
    assert hparams["both"] == {"batch_size": 8, "shape": [3, 4], "low": {"a": 1}, "volume": 2}
    assert load_hparams(write(Configuration(path).dump(), "dumped.yaml")) == hparams


# ---------------------------------------------------------------- variants and includes


def test_a_variant_says_only_what_differs(write: Write, tmp_path: Path) -> None:
    write(RECIPE, "asr/demo.yaml")
    variant = write(
        """\
        base: ../asr/demo.yaml
        width: 16  # wider
        model: {bias: false}
        opt_class: !name:torch.optim.SGD {lr: 0.1}
        """,
        "variants/wide.yaml",
    )
    hparams = load_hparams(variant)
    assert hparams["model"].weight.shape == (2, 16)
    assert hparams["model"].bias is None
    assert hparams["opt_class"].func is torch.optim.SGD
    assert hparams["folder"] == "results/1234"
    assert "base" not in hparams
    comments = {key.name: key.comment for key in describe(variant)}
    assert comments["width"] == "wider"
    assert comments["lr"] == "peak"
    with pytest.raises(ValueError, match=r"demo\.yaml, line 5"):
        load_hparams(variant, {"lr": "fast"})


def test_an_included_file_keeps_its_own_references(write: Write) -> None:
    write("width: 4\nlayer: !new:torch.nn.Linear [!ref <width>, 1]\n", "encoder.yaml")
    main = write(
        """\
        width: 99
        encoder: !include:encoder.yaml
        wide: !include:encoder.yaml
          width: !ref <width>
        used: !ref <encoder[layer]>
        """
    )
    hparams = load_hparams(main)
    assert hparams["encoder"]["layer"].in_features == 4
    assert hparams["wide"]["layer"].in_features == 99
    assert hparams["used"] is hparams["encoder"]["layer"]
    assert load_hparams(main, {"encoder": {"width": 7}})["encoder"]["layer"].in_features == 7


@pytest.mark.parametrize("keyword", ["base: {}", "x: !include:{}"])
def test_files_that_name_each_other_in_a_circle_are_refused(write: Write, keyword: str) -> None:
    write(keyword.format("b.yaml"), "a.yaml")
    write(keyword.format("a.yaml"), "b.yaml")
    with pytest.raises(ValueError, match=r"name each other in a circle: .*a\.yaml -> .*b\.yaml"):
        load_hparams(write(keyword.format("a.yaml")))


def test_a_base_that_is_missing_is_named_with_the_line(write: Write) -> None:
    with pytest.raises(ValueError, match=r"demo\.yaml, line 2: gone\.yaml cannot be read: No such"):
        load_hparams(write("a: 1\nbase: gone.yaml\n"))


# ---------------------------------------------------------------- overrides


def test_overrides_reach_below_objects_and_add_arguments_and_run_options(write: Write) -> None:
    hparams = load_hparams(
        write(RECIPE),
        {"model": {"out_features": 5, "bias": False}, "precision": "bf16", "loader": {"a": 1}},
    )
    assert hparams["model"].out_features == 5
    assert hparams["model"].bias is None
    assert (hparams["precision"], hparams["loader"]) == ("bf16", {"a": 1})
    dotted = load_hparams(write(RECIPE), {"model.out_features": 5, "model.bias": False})
    assert dotted["model"].weight.shape == hparams["model"].weight.shape
    assert dotted["model"].bias is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"lrr": 1}, "there is no key or run option 'lrr'; did you mean 'lr'?"),
        ({"precison": 1}, "no key or run option 'precison'; did you mean 'precision'?"),
        ({"model": {"biass": 1}}, "torch.nn.Linear has no argument 'biass'; did you mean 'bias'?"),
        ({"modules": {"nett": 1}}, "there is no key 'modules.nett' below modules"),
        ({"width": "many"}, "width must be a number, as its default 8 is ({}, line 6), not 'many'"),
        (
            {"width": {"a": 1}},
            "width must be a number, as its default 8 is ({}, line 6), not a map",
        ),
        ({"shuffle": 1}, "shuffle must be true or false, as its default true is"),
        ({"sizes": 3}, "sizes must be a list, as its default [1, 2] is"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, not 'fp8'"),
        (
            {"modules": {"net": {"bias": 1}}},
            "modules.net is !ref <model> ({}, line 12): change tha",
        ),
        ({"lr": object()}, "is a object; a YAML value must be a number, a text"),
    ],
)
def test_a_wrong_override_gets_a_sentence(
    write: Write, overrides: dict[str, Any], sentence: str
) -> None:
    path = write(RECIPE)
    with pytest.raises(ValueError, match=re.escape(sentence.replace("{}", str(path)))):
        load_hparams(path, overrides)


def test_typed_values_take_the_type_of_their_key(write: Write) -> None:
    configuration = Configuration(write("name: demo\nlr: 1\nlimit: null\nok: 'a'\nmax: 3\n"))
    typed = {"name": "007", "lr": "1e-4", "limit": "[1, {a: b}]", "ok": "null", "max": "inf"}
    configuration.override({key: Text(value) for key, value in typed.items()})
    assert configuration.build() == {
        "name": "007",
        "lr": 1e-4,
        "limit": [1, {"a": "b"}],
        "ok": None,
        "max": float("inf"),
    }


def test_the_dump_is_a_yaml_of_its_own(write: Write, tmp_path: Path) -> None:
    write(RECIPE, "base.yaml")
    write("size: 3\ntwice: !ref <size> * 2\n", "part.yaml")
    path = write("base: base.yaml\nwidth: 16\npart: !include:part.yaml\n")
    configuration = Configuration(path)
    configuration.override({"model": {"bias": False}, "seed": 7, "part": {"size": 5}})
    alone = write(configuration.dump(), "alone/hyperparams.yaml")
    first, second = configuration.build(), load_hparams(alone)
    assert list(first) == list(second)
    assert second["part"] == {"size": 5, "twice": 10}
    assert second["model"].bias is None
    assert second["folder"] == "results/7"
    assert second["note"] == "(laughs)"


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20).filter(
    lambda text: not re.fullmatch(r"\(.*\)", text)  # those are tuples
)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,9}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=VALUES)
def test_any_plain_value_comes_back_as_it_was(write: Write, value: Any) -> None:
    configuration = Configuration(write("x: null\n"))
    configuration.override({"x": value})
    assert configuration.build() == {"x": value}
    assert load_hparams(write(configuration.dump(), "dumped.yaml")) == {"x": value}


# ---------------------------------------------------------------- help


def test_keys_are_described_without_building_anything(write: Write) -> None:
    keys = {key.name: key for key in describe(write(RECIPE))}
    assert len(keys) == 18
    assert keys["seed"][1:] == ("1234", "Of everything random.")
    assert keys["lr"][1:] == ("1e-3", "peak")
    assert keys["model"][1:] == ("!new:torch.nn.Linear", "the network")
    assert keys["model.in_features"][1:] == ("!ref <width>", "channels")
    assert keys["sizes"].default == "[1, 2]"
    nowhere = describe(write("x: !new:not.there.AtAll {a: 1}\ny: !PLACEHOLDER  # a folder\n"))
    assert nowhere[0].default == "!new:not.there.AtAll"
    assert nowhere[2] == ("y", "!PLACEHOLDER", "a folder")


def test_a_key_without_a_value_may_end_the_file(write: Write) -> None:
    for text in ("epochs: 3\nnotes:\n", "epochs: 3\nnotes:", "epochs: 3\nnotes:  # none\n\n"):
        path = write(text)
        assert load_hparams(path) == {"epochs": 3, "notes": None}
        assert [key.name for key in describe(path)] == ["epochs", "notes"]
    assert describe(path)[1].comment == "none"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "{}, line 3: not valid YAML: "),
        ("a: b: c\n", "{}, line 1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\na: 2\n", "{}, line 2: the key 'a' is defined twice"),
        ("- 1\n", "{}, line 1: the file must be a mapping of keys to values"),
        ("a: 1\n--- \nb: 2\n", "{}, line 2: a second document begins; there must be one"),
        ("1: a\n", "{}, line 1: the key '1' must be text; quote it"),
        ("a: \x07\n", "{}: not valid YAML: "),
        ("a: !!python/name:os.system\n", "{}, line 1: the tag !!python/name:os.system is not"),
        ("a: !neww:x\n", "{}, line 1: the tag !neww:x is not allowed; allowed are !ref, !copy"),
        ("a: !new:torch.nn.Linear 3\n", "{}, line 1: the arguments of !new:torch.nn.Linear must"),
        (
            "data_folder: !PLACEHOLDER\nx:\n  y: !PLACEHOLDER\n",
            "no value for data_folder ({}, line 1), x.y ({}, line 3), which the YAML leaves open "
            "(!PLACEHOLDER); "
            "give them as --data_folder … --x.y …",
        ),
        ("a: !ref <bb>\nbbb: 1\n", "line 1: the reference <bb> leads nowhere: there is no 'bb'"),
        ("a: !ref <b>\nb: !ref <a>\n", "line 1: the reference is circular: {}, line 1 -> {}"),
        ("a: {b: !ref <a>}\n", "line 1: the reference is circular"),
        ("a: !ref <b>x\nb: !new:dict\n", "line 1: <b> is an object (!new:dict), which cannot be"),
        ("a: !ref <b>/0\nb: 1\n", "line 1: 1/0 cannot be evaluated: division by zero"),
        (
            "x:\n  y: !new:torch.nn.Liner\n",
            "x.y ({}, line 2): torch.nn.Liner does not exist: torch.nn has no 'Liner'; did you "
            "mean 'Linear'?",
        ),
        ("x: !new:torch.optimm.Adam\n", "torch has no 'optimm'; did you mean 'optim'?"),
        ("x: !new:recipes.asr.modle.X\n", "recipes.asr has no 'modle'; did you mean 'model'?"),
        (
            "x: !new:recipies.asr.X\n",
            "X does not exist: no module is called 'recipies'; did you mean 'recipes'?",
        ),
        ("x: !apply:np.zeros [2]\n", "np.zeros does not exist: no module is called 'np'"),
        ("x: !new:Net\n", "Net does not exist: no module is called 'Net'"),
        ("x: !name:str.join\n", "str.join is not allowed; "),
        (
            "x: !new:torch.nn.Linear {in_features: 1, out_feature: 2}\n",
            "x ({}, line 1): torch.nn.Linear: missing a required argument: 'out_features'",
        ),
        (
            "x: !new:torch.nn.Linear {in_features: 1, out_features: 2, biass: 2}\n",
            "torch.nn.Linear: got an unexpected keyword argument 'biass'; did you mean 'bias'?; "
            "its arguments are: in_features, out_features, bias=True, device=None, dtype=None",
        ),
        ("x: !name:torch.optim.Adam {beta: 1}\n", "keyword argument 'beta'; did you mean 'betas'?"),
        (
            "x: !new:torch.nn.Dropout [2]\n",
            "x ({}, line 1): torch.nn.Dropout could not be built: dr",
        ),
        ("x: !new:torch.nn.Linear [a, b]\n", "x ({}, line 1): torch.nn.Linear could not be built"),
        ("x: !new:torch.nn.Linear [-1, 2]\n", "could not be built: RuntimeError: Trying to create"),
        (
            "x: !name:torch.optim.lr_scheduler.LambdaLR {lr_lambda: 'lambda n: 0.9'}\n",
            "x ({}, line 1): torch.optim.lr_scheduler.LambdaLR: lr_lambda must be a function, not "
            "'lambda n: 0.9'; a function of a module beside train.py is given by !name:module.func",
        ),
        (
            "x: !new:list [!new:torch.utils.data.DataLoader [[1, 2]]]\n",
            "x ({}, line 1): list takes no DataLoader, whose worker processes it could start",
        ),
        ("x: !!int a\n", "{}, line 1: 'a' is no int; quote it if it is text"),
        ("x: 2001-99-99\n", "{}, line 1: '2001-99-99' is no timestamp; quote it if it is text"),
        ("x: !new:torch.relu [1]\n", "torch.relu is a function, which !apply:torch.relu calls"),
        ("x: !apply:torch.device [cpu]\n", "torch.device is a class, which !new:torch.device bui"),
        (
            "a: !new:torch.nn.ReLU\nb: !ref <a.inplce>\n",
            "has no attribute 'inplce'; did you mean 'inp",
        ),
        ("x: !applyref:torch.zeros [2]\n", "tensor([0., 0.]) is a Tensor; a YAML value must be"),
        ("x: !applyref:math.factorial [9999]\n", "{}, line 1: the number is too large: it has 11"),
        (
            "o: !name:torch.optim.Adam {betas: (0.9, 0.98)}\n",
            "argument '0.98)' (a tuple within {…} or […] is written as a list: [0.9, 0.98]); its",
        ),
        (
            "m: !new:torch.nn.LSTM [2, 3]\nx: !ref <m.hidden_size> * 2\n",
            "line 2: <m.hidden_size> is read from an object, which cannot be part",
        ),
        (
            "base: [demo.yaml]\n",
            "line 1: base must be the path of one YAML file, ending in .yaml; a",
        ),
        ("x: !ref [<a>]\n", "line 1: !ref takes a text; quote what begins with [ or {"),
        ("x: (1, [2)\n", "x ({}, line 1): (1, [2) is no tuple; quote it if it is text"),
    ],
)
def test_a_mistake_gets_a_sentence_that_says_where(write: Write, text: str, sentence: str) -> None:
    path = write(text)
    with pytest.raises(ValueError, match=re.escape(sentence.replace("{}", str(path)))):
        load_hparams(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_hparams(tmp_path / "none.yaml")


def test_a_module_that_fails_to_import_says_why(write: Write, tmp_path: Path) -> None:
    (tmp_path / "brokenmodule.py").write_text("import a_package_that_is_not_there\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(
            ValueError, match="brokenmodule, whose import failed: ModuleNotFoundErr"
        ):
            load_hparams(write("x: !new:brokenmodule.X\n"), allow=["brokenmodule"])
    finally:
        sys.path.remove(str(tmp_path))


def test_a_failed_load_leaves_yaml_libraries_as_they_were(write: Write) -> None:
    before = yaml.constructor.BaseConstructor.construct_object.__defaults__
    with pytest.raises(ValueError, match="could not be built"):
        load_hparams(write("shape: (1, 2)\nx: !new:torch.nn.Dropout [2]\n"))
    assert yaml.constructor.BaseConstructor.construct_object.__defaults__ == before
    assert describe(write("shape: (1, 2)\n"))[0].default == "(1, 2)"


# ---------------------------------------------------------------- the guard


CANARY = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").write_text("imported")
def fire(*args, **kwargs):
    pathlib.Path(__file__).with_suffix(".ran").write_text("called")
class Fire:
    def __init__(self, *args, **kwargs):
        fire()
"""

ATTACKS = [
    # Names of other packages, directly and through what an allowed module has imported.
    "x: !apply:os.system ['touch {ran}']",
    "x: !apply:logging.os.system ['touch {ran}']",
    'x: !apply:builtins.eval [\'open("{ran}", "w")\']',
    'x: !apply:eval [\'open("{ran}", "w")\']',
    'x: !apply:exec [\'open("{ran}", "w")\']',
    "x: !apply:open ['{ran}', w]",
    "x: !new:functools.partial [!name:os.system , 'touch {ran}']",
    "x: !name:functools.partial [!name:subprocess.run , 'touch {ran}']",
    "x: !apply:pickle.loads ['cos']",
    "x: !apply:importlib.import_module [canary]",
    "x: !module:canary",
    "x: !new:canary.Fire",
    "x: !name:canary.fire",
    "x: !apply:canary.fire",
    "x: !apply:torch.os.system ['touch {ran}']",
    "x: !apply:torch.sys.modules.get [os]",
    "x: !apply:torch.nn.modules.module.torch.os.system ['touch {ran}']",
    "x: !apply:torch.nn.functional.importlib.import_module [canary]",
    "x: !apply:torch.utils.data.dataloader.os.system ['touch {ran}']",
    "x: !apply:recipes.common.synthesiser.subprocess.run [[touch, '{ran}']]",
    "x: !apply:trainer.distributed.os.system ['touch {ran}']",
    "x: !new:torch.nn.modules.container.OrderedDict.fromkeys [[1]]",
    "x: !apply:operator.attrgetter ['system']",
    "x: !apply:torch.nn.modules.container.operator.attrgetter ['system']",
    "x: !apply:codecs.encode ['a', rot13]",
    "x: !apply:pydoc.locate [canary.fire]",
    # What allowed packages hold that runs code or commands, or reads pickles.
    "x: !apply:torch.load ['{pickle}']",
    "x: !apply:torch.serialization.load ['{pickle}', weights_only, false]",
    "x: !apply:torch.hub.load ['{folder}', fire]",
    "x: !apply:torch.utils.collect_env.run ['touch {ran}']",
    "x: !apply:torch.utils.cpp_extension.load_inline [a, b]",
    'x: !new:torch.utils.benchmark.Timer [\'open("{ran}", "w")\']',
    "x: !new:torch.package.PackageImporter ['{pickle}']",
    "x: !apply:torch.ops.load_library ['{pickle}']",
    "x: !apply:torch.jit.load ['{pickle}']",
    "x: !apply:torch.from_file ['{ran}', true, 10]",
    "x: !apply:torch.multiprocessing.spawn [1]",
    "x: !new:torch.utils.data.datapipes.iter.FileOpener [['{pickle}']]",
    "x: !apply:lhotse.serialization.open_best ['pipe:touch {ran}']",
    "x: !apply:lhotse.load_manifest ['pipe:touch {ran}']",
    "x: !apply:recipes.common.synthesiser.load ['{folder}']",
    "x: !apply:trainer.load_hparams {{path: '{payload}', allow: [os]}}",
    "x: !apply:trainer.main [!name:canary.fire ]",
    "x: !apply:trainer.checkpoint.files.write ['{ran}']",
    "x: !new:trainer.cli.folder.RunFolder ['{folder}']",
    "x: !apply:trainer.config.hyperparameters.load_hparams {{path: '{payload}', allow: [os]}}",
    # Dunders, private names, spelling.
    "x: !apply:torch.nn.Linear.__init__.__globals__.get [os]",
    "x: !apply:torch.nn.Module.__subclasses__",
    "x: !apply:torch._utils._rebuild_tensor [1]",
    "x: !apply:os%2Esystem ['touch {ran}']",
    "x: !apply:оs.system ['touch {ran}']",  # the first letter is Cyrillic
    "x: !apply:tоrch.os.system ['touch {ran}']",
    "x: !apply:ｏｓ.system ['touch {ran}']",  # full-width letters, which Python would normalise
    "x: !apply:torch..os.system ['touch {ran}']",
    # References that read attributes.
    "m: !module:torch.nn\nx: !ref <m.modules.module.torch.os.system>",
    "m: !new:torch.nn.Linear [1, 1]\nx: !ref <m.__init__.__globals__>",
    "m: !new:torch.nn.Linear [1, 1]\nx: !ref <m.forward.__func__.__globals__>",
    "m: !module:canary\nx: !ref <m.fire>",
    "x: !apply:getattr [!module:os , system]",
    "x: !attribute [!module:os , system]",
    # Tags of Python's own, also where HyperPyYAML reads with an unsafe loader, and hidden ones.
    "x: !!python/object/apply:os.system ['touch {ran}']",
    "x: !!python/object/new:canary.Fire {{}}",
    "x: !!python/name:canary.fire ''",
    "x: !!python/module:canary ''",
    "x: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {ran}']",
    "%TAG !p! tag:yaml.org,2002:python/\n---\nx: !p!object/apply:os.system ['touch {ran}']",
    "x: (!!python/object/apply:os.system ['touch {ran}'])",
    "x: !tuple '(!!python/object/apply:os.system [touch {ran}])'",
    "x: (!new:canary.Fire )",
    "? !apply:os.system ['touch {ran}']\n: 1",
    "x: {{? !new:canary.Fire : 1}}",
    "x: &a !new:canary.Fire\ny: *a",
    "__x: !new:canary.Fire",
    # During the resolving of references, before anything is built.
    "x: !applyref:os.system ['touch {ran}']",
    "x: !applyref:canary.fire",
    "x: !applyref:canary.fire {{_args: [], _kwargs: {{}}}}\ny: !ref <x>",
    # From another file.
    "x: !include:{payload}",
    "base: {payload}",
    "x: !include:/etc/passwd",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_outside_the_allow_list_is_imported_or_called(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = tmp_path / "canary.ran"
    pickle = tmp_path / "payload.pt"
    pickle.write_bytes(b"cos\nsystem\n(Vtouch " + str(ran).encode() + b"\ntR.")
    payload = write(f"y: !apply:os.system ['touch {ran}']\n", "payload.yaml")
    places = {"ran": ran, "pickle": pickle, "payload": payload, "folder": tmp_path}
    with pytest.raises(ValueError, match=r"demo\.yaml|payload\.yaml|/etc/passwd"):
        load_hparams(write(attack.format(**places) + "\n"))
    assert not ran.exists()
    assert "canary" not in sys.modules


def test_a_file_that_is_called_as_a_builtin_is_not_taken_for_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "len.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_hparams(write("n: !apply:len [[a, b]]\n"))["n"] == 2
    assert not (tmp_path / "len.ran").exists()


def test_attacks_through_overrides_are_refused_too(write: Write, tmp_path: Path) -> None:
    path = write("x: null\ny: (1, 2)\nmodel: !new:torch.nn.ReLU\n")
    ran = tmp_path / "ran"
    for key, text in {
        "x": f"!apply:os.system ['touch {ran}']",
        "y": f"(!!python/object/apply:os.system ['touch {ran}'])",
        "model": f"!!python/object/apply:os.system ['touch {ran}']",
    }.items():
        with pytest.raises(ValueError, match="not allowed"):
            load_hparams(path, {key: Text(text)})
    assert not ran.exists()


def test_the_number_of_attacks() -> None:
    assert len(ATTACKS) == len(set(ATTACKS)) > 60


def test_a_package_of_ones_own_is_allowed_by_name(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ownpackage").mkdir()
    (tmp_path / "ownpackage" / "__init__.py").write_text(
        "import os\nfrom os import getcwd\n\nclass Net:\n"
        "    width = 3\n    cwd = staticmethod(getcwd)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write("net: !new:ownpackage.Net\nwidth: !ref <net.width>\n")
    with pytest.raises(ValueError, match=r"ownpackage\.Net is not allowed; .* allow=\['package'\]"):
        load_hparams(path)
    assert load_hparams(path, allow=["ownpackage"])["width"] == 3
    for attack in ("!apply:ownpackage.getcwd", "!apply:ownpackage.os.getcwd"):
        with pytest.raises(ValueError, match="is not allowed"):
            load_hparams(write(f"x: {attack}\n"), allow=["ownpackage"])
    with pytest.raises(ValueError, match="is not allowed"):
        load_hparams(write("net: !new:ownpackage.Net\nx: !ref <net.cwd>\n"), allow=["ownpackage"])


OWN = """\
import enum
import os
import pathlib
import threading
from functools import partial
from os import getcwd

import torch

class Colour(enum.Enum):
    RED = 1

class Net(torch.nn.Module):
    width = 3
    path = pathlib.Path("a/b")
    table = {"a": [1, (2.5, None)]}
    colour = Colour.RED
    functions = {"cwd": getcwd}
    lock = threading.Lock()
    maker = partial(getcwd)
    module = os

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.frames = (each for each in ())

    @property
    def size(self):
        return self.width * 2

    @property
    def broken(self):
        raise KeyError("x")

    @classmethod
    def make(cls):
        return cls()
"""


def test_references_read_values_and_networks_of_objects_and_nothing_else(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ownnet.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = """\
        net: !apply:ownnet.Net.make
        weights: [!ref <net.layer.weight>]
        opt: !new:torch.optim.SGD [!ref <weights>, 0.5]
        groups: !ref <opt.param_groups>
        layer: !ref <net.layer>
        inputs: !ref <net.layer.in_features>
        shape: !ref <net.layer.weight.shape>
        kind: !ref <net.layer.weight.dtype>
        size: !ref <net.size>
        path: !ref <net.path>
        name: !ref <net.path.name>
        table: !ref <net.table>
        colour: !ref <net.colour>
        """
    hparams = load_hparams(write(text), allow=["ownnet"])
    assert hparams["groups"][0]["lr"] == 0.5
    assert hparams["layer"] is hparams["net"].layer
    assert (hparams["inputs"], hparams["size"], hparams["name"]) == (2, 6, "b")
    assert hparams["shape"] == (2, 2)
    assert hparams["kind"] is torch.float32
    assert hparams["table"] == {"a": [1, (2.5, None)]}
    refused = {
        "forward": "it is a method, and a reference reads numbers, texts, tensors, networks, "
        "paths, and lists or mappings of these; a function is given by !name:module.function, "
        "and a method is taken from its object in train.py",
        "layer.weight.requires_grad_": "it is a builtin_function_or_method",
        "frames": "it is a generator",
        "frames.gi_frame": "it is a generator",
        "functions": "it is a dict",
        "lock": "it is a lock",
        "maker": "it is a partial",
        "module": "it is a module",
        "make": "it is a method",
        "broken": "reading 'broken' of a Net failed: KeyError: 'x'",
    }
    for name, why in refused.items():
        broken = write(f"net: !new:ownnet.Net\nx: !ref <net.{name}>\n")
        with pytest.raises(
            ValueError, match=rf"x \({re.escape(str(broken))}, line 2\): .*"
        ) as raised:
            load_hparams(broken, allow=["ownnet"])
        assert why in str(raised.value)
    # The class is a network, but its property is code of a package that is not allowed.
    mixed = write("net: !apply:ownnet.Net.make\nx: !ref <net.size>\n")
    with pytest.raises(ValueError, match="'size' of a Net is not allowed: a reference reads"):
        load_hparams(mixed, allow=["ownnet.Net.make"])


def test_a_package_of_ones_own_gives_functions_and_what_makes_objects_and_no_other_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ownmethods.py").write_text(
        "import functools, os, torch\n"
        "class Net(torch.nn.Linear):\n"
        "    @classmethod\n    def make(cls): return cls(1, 1)\n"
        "    @staticmethod\n    def wide(): return Net(9, 9)\n"
        "    @functools.cache\n    def cached(self): open('written', 'w')\n"
        "    def save(self): open('written', 'w')\n"
        "    later = functools.partialmethod(save)\n"
        "    class Inner(torch.nn.Module): pass\n"
        "net, table = Net(1, 1), {'a': 1}\n"
        "net.hidden = os.system\n"
        "clamp = functools.partial(torch.nn.functional.hardtanh, min_val=0.0)\n"
        "twice = functools.partial(clamp, max_val=2.0)\n"
        "run = functools.partial(os.system)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry(["ownmethods"])
    for name in ("Net.make", "Net.wide", "Net.Inner", "net", "table", "clamp", "twice"):
        registry.locate(f"ownmethods.{name}")
    refused = """
        Net.save Net.cached Net.later Net.forward Net.to Net.register_forward_hook
        net.save net.cached net.later net.forward net.make net.hidden table.get table.clear run
        """
    for name in refused.split():
        full = f"ownmethods.{name}"
        with pytest.raises(ValueError, match=f"{full} is not allowed.* --allow {full} "):
            registry.locate(full)
        assert callable(Registry([full]).locate(full))


def test_kinds_of_names() -> None:
    registry = Registry()
    good = """
        torch.nn.Embedding.from_pretrained torch.nn.utils.weight_norm torch.nn.init.zeros_
        torch.utils.data.TensorDataset torch.utils.data.BatchSampler torch.distributions.Normal
        torch.optim.swa_utils.AveragedModel torch.optim.lr_scheduler.ReduceLROnPlateau torch.tensor
        torchaudio.transforms.Resample torchaudio.models.wav2vec2_base torchaudio.functional.gain
        torch.linalg.norm torch.special.expit torch.stft torch.signal.windows.hann torch.arange
        lhotse.dataset.sampling.SimpleCutSampler lhotse.dataset.signal_transforms.SpecAugment
        """
    assert len([registry.locate(name) for name in good.split()]) == 19
    bad = """
        torch.nn.Embedding.forward torch.optim.swa_utils.update_bn torch.set_num_threads torch.nn
        torch.nn.modules.module.register_module_forward_hook torch.default_generator torch.from_file
        torch.distributions.kl.register_kl lhotse.dataset.sampling.StatelessSampler torch.seed
        torchaudio.models.wav2vec2.utils.import_fairseq_model torch.nn.cpp.ModuleWrapper
        """
    for name in bad.split():
        with pytest.raises(
            ValueError, match=rf"{re.escape(name)} is not allowed.* --allow {name} "
        ):
            registry.locate(name)


def test_methods_are_no_names_but_two() -> None:
    registry = Registry()
    allowed, count = set(), 0
    for place in ("torch", "torch.nn", "torch.optim", "torch.utils.data", "trainer", "builtins"):
        for each, kind in vars(importlib.import_module(place)).items():
            public = inspect.isclass(kind) and not each.startswith("_")
            for method in dir(kind) if public else ():
                if method.startswith("_"):
                    continue
                count += 1
                with contextlib.suppress(ValueError):
                    registry.locate(f"{place}.{each}.{method}")
                    allowed.add(f"{place}.{each}.{method}")
    assert count > 5_000
    assert allowed == {
        "torch.nn.Embedding.from_pretrained",
        "torch.nn.EmbeddingBag.from_pretrained",
    }


def test_the_trainer_lists_its_clippers_and_schedules() -> None:
    names = listed_names("trainer", "YAML_NAMES")
    assert len([Registry().locate(name) for name in names]) == len(names) >= 20
    abstract = (Clip, StepSchedule, MetricSchedule)
    found = {
        f"{module.__name__}.{name}"
        for module in (trainer.clipping, trainer.schedules)
        for name, each in vars(module).items()
        if inspect.isclass(each) and issubclass(each, abstract) and each not in abstract
    }
    assert len(found) >= 15
    assert found <= {*names}


def test_a_run_folder_builds_only_what_recipes_list_for_run_folders(write: Write) -> None:
    text = """\
        network: !new:recipes.segan.model.VirtualBatchNorm {channels: 2}
        corpus: !apply:recipes.asr.data.embedded {train: 1, valid: 1, test: 1}
        also: {by_reference: !ref <corpus>}
        width: 8
        """
    found = load_hparams(write(text), run_folder=True)
    assert set(found) == {"network", "width"}
    for name in ("recipes.asr.data.embedded", "recipes.asr.train.train", "os.getcwd"):
        with pytest.raises(ValueError, match=f"{name} is not allowed"):
            load_hparams(write(f"x: !applyref:{name}\n"), run_folder=True)
    place = "listed in YAML_NAMES of recipes/asr/__init__.py"
    with pytest.raises(ValueError, match=place):
        load_hparams(write("x: !new:recipes.asr.scoring.Scores\n"))
    with pytest.raises(ValueError, match=place.replace("YAML", "RUN")):
        load_hparams(write("x: !new:recipes.asr.scoring.Scores\n"), run_folder=True)
    # A package that lists its names is not opened by allowing it.
    with pytest.raises(ValueError, match=place):
        load_hparams(write("x: !new:recipes.asr.scoring.Scores\n"), allow=["recipes.asr"])
    assert "x" in load_hparams(
        write("x: !new:recipes.asr.scoring.Scores\n"), allow=["recipes.asr.scoring.Scores"]
    )


def test_a_run_folder_hides_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentencepiece.py").write_text("open('ran', 'w')")
    (tmp_path / "hyperparams.yaml").write_text("x: !new:recipes.asr.text.Pieces [none, 9]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    with contextlib.suppress(ValueError):  # It may not be installed.
        load_hparams("hyperparams.yaml", run_folder=True)
    assert not (tmp_path / "ran").exists()


def test_allowing_all_of_torch_does_not_allow_its_loaders() -> None:
    registry = Registry(["torch"])
    assert registry.locate("torch.manual_seed") is torch.manual_seed
    for name in ("torch.load", "torch.hub.load", "torch.utils.collect_env.run", "torch.os.system"):
        with pytest.raises(ValueError, match="is not allowed"):
            registry.locate(name)


def test_what_recipes_use_is_allowed() -> None:
    registry = Registry()
    names = """
        torch.nn.Linear torch.nn.functional.relu torch.nn.functional.conv1d torch.optim.AdamW
        torch.optim.lr_scheduler.LambdaLR torch.utils.data.DataLoader torch.hann_window
        torch.float32 torch.device torch.Generator torch.fft.rfft torch.zeros dict range sorted
        collections.Counter math.pi trainer.schedules.Noam trainer.EpochCounter
    """
    assert len([registry.locate(name) for name in names.split()]) == 19
    with pytest.raises(ValueError, match="allow must hold names"):
        Registry(["../x"])


# ---------------------------------------------------------------- bombs

BOMBS = {
    "aliases": "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "recursive alias": "a: &a [*a]\n",
    "a million keys": "".join(f"k{i}: 1\n" for i in range(10**6)),
    "a million items in one line": "a: [" + "1," * 10**6 + "]\n",
    "as many keys as the file may hold": "".join(f"k{i}: 1\n" for i in range(10_000)),
    "ten thousand levels": "a: " + "[" * 10**4 + "]" * 10**4 + "\n",
    "ten thousand levels of mappings": "a: " + "{a: " * 10**4 + "}" * 10**4 + "\n",
    "ten thousand levels of dashes": "a:\n  " + "- " * 10**4 + "\n",
    "texts in texts": "a0: xxxxxxxxxx\n"
    + "".join(f"a{i}: !ref {f'<a{i - 1}>' * 10}\n" for i in range(1, 20)),
    "copies of copies": "a0: [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"a{i}: [{','.join([f'!copy <a{i - 1}>'] * 10)}]\n" for i in range(1, 12)),
    "references to references": "a0: [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"a{i}: [{','.join([f'!ref <a{i - 1}>'] * 10)}]\n" for i in range(1, 12)),
    "a long chain": "".join(f"a{i}: !ref <a{i + 1}>\n" for i in range(4000)) + "a4000: 1\n",
    "a sum": "a: 99\nb: !ref <a>**<a>**<a>\n",
    "a text times a number": "a: 999999999\nb: !ref '(x) * <a>'\nc: !ref \"<b><b>\"\nd: [1, 2\n",
    "merges of merges": "m0: &m0 {a: 1}\n"
    + "".join(f"m{i}: &m{i} {{<<: *m{i - 1}, k{i}: 1}}\n" for i in range(1, 800)),
    "one huge text": "a: " + "x" * 10**7 + "\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_a_second(write: Write, name: str) -> None:
    path, taken = write(BOMBS[name]), []
    for _ in range(2):  # The first reading may pay for what other tests left to collect.
        started = time.process_time()
        with pytest.raises(ValueError, match=r"demo\.yaml"):
            load_hparams(path)
        taken.append(time.process_time() - started)
        if taken[-1] < 1:
            break
    assert min(taken) < 1


def test_includes_cannot_multiply(write: Write) -> None:
    for depth in range(6):
        lines = [f"k{i}: !include:level{depth + 1}.yaml" for i in range(10)]
        write("\n".join(lines) + "\n", f"level{depth}.yaml")
    write("a: 1\n", "level6.yaml")
    with pytest.raises(ValueError, match="more than 50 YAML files are read for one run"):
        load_hparams(write("x: !include:level0.yaml\n"))


@pytest.mark.parametrize(
    "name", ["aliases", "a million keys", "ten thousand levels", "texts in texts", "a long chain"]
)
def test_a_bomb_takes_little_memory(write: Write, name: str) -> None:
    path = write(BOMBS[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"demo\.yaml"):
        load_hparams(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
