"""Hyperparameters of two starts: what differs in force, and what a run may do with it."""

import random
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis

from tests.trainer.test_yaml_properties import FOLDER, GOOD_YAMLS
from trainer.cli import configure
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration
from trainer.config.reading import represent
from trainer.config.registry import Registry

TEXT = """\
seed: 1
lr: 0.1
epochs: 4
steps: 100
patience: 3
batch_size: 8
valid_batch_size: 8
evaluation: {batch_size: 4, noise: 0.5}
num_workers: 0
data_folder: /data
noise_folder: null
width: 16
mode: min
quality: high
beam: 5
rounds: 2
resumable_keys: [rounds]
neutral_keys: [beam]
optimizer_step_limit: !ref <steps>
counter: !new:trainer.EpochCounter {limit: !ref <epochs>}
early_stopping: !new:trainer.schedules.EarlyStopping {patience: !ref <patience>, mode: !ref <mode>}
opt: !name:torch.optim.SGD {lr: !ref <lr>, momentum: 0.9}
schedule: !name:trainer.schedules.WarmupDecay {warmup_steps: 10, total_steps: !ref <steps>}
second: !name:trainer.schedules.WarmupDecay {warmup_steps: 10, total_steps: !ref <steps> - 20}
table: !ref <data_folder>/a.csv
decoder: !name:torch.nn.Linear {in_features: !ref <beam>}
items: !ref <rounds> * 32
same: !ref <opt>
saver: !new:trainer.Checkpointer {folder: !ref <output_folder>/checkpoints, keep: 2}
output_folder: results/x
"""


def settings(folder: Path, text: str, overrides: dict[str, Any] | None = None) -> Settings:
    """Return the settings of a YAML with overrides."""
    path = folder / "x.yaml"
    path.write_text(textwrap.dedent(text))
    configuration = Configuration(path)
    configuration.override(overrides or {})
    return Settings(configuration.root, configuration.registry)


def kinds(folder: Path, text: str, overrides: dict[str, Any]) -> dict[str, str]:
    """Return the kind of each change that the overrides make."""
    changes = settings(folder, text, overrides).changes(settings(folder, text))
    return {each.key: each.kind for each in changes}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"lr": 0.2}, {"lr": "training"}),
        ({"opt": {"momentum": 0.5}}, {"opt.momentum": "training"}),
        ({"opt": {"nesterov": True}}, {"opt.nesterov": "training"}),
        ({"batch_size": 4}, {"batch_size": "training"}),
        ({"precision": "bf16"}, {"precision": "training"}),
        ({"mode": "max"}, {"mode": "training"}),
        ({"quality": None}, {"quality": "training"}),
        ({"noise_folder": "/noise"}, {"noise_folder": "training"}),
        ({"evaluation": {"noise": 0.1}}, {"evaluation.noise": "training"}),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": "training"}),
        ({"epochs": 6}, {"epochs": "extending"}),
        ({"epochs": 2}, {"epochs": "extending"}),
        ({"counter": {"limit": 7}}, {"counter.limit": "extending"}),
        ({"patience": 9}, {"patience": "extending"}),
        ({"steps": 200}, {"steps": "extending", "second.total_steps": "extending"}),
        ({"optimizer_step_limit": 7}, {"optimizer_step_limit": "extending"}),
        ({"nonfinite_patience": 7}, {"nonfinite_patience": "extending"}),
        ({"rounds": 3}, {"rounds": "extending", "items": "extending"}),
        ({"beam": 9}, {"beam": "neutral"}),
        ({"num_workers": 2, "device": "cpu"}, {"num_workers": "neutral", "device": "neutral"}),
        ({"valid_batch_size": 2}, {"valid_batch_size": "neutral"}),
        ({"evaluation": {"batch_size": 2}}, {"evaluation.batch_size": "neutral"}),
        ({"data_folder": "/moved"}, {"data_folder": "neutral", "table": "neutral"}),
        ({"saver": {"keep": 5}}, {"saver.keep": "neutral"}),
        ({"log_interval": 5, "average_checkpoints": 3},
         {"log_interval": "neutral", "average_checkpoints": "neutral"}),
        ({"precision": "fp32", "test_only": True}, {}),
        ({"lr": 0.10, "epochs": 4.0, "opt": {"lr": 0.1}}, {}),
    ],
)  # fmt: skip
def test_a_change_is_of_one_kind(
    tmp_path: Path, overrides: dict[str, Any], expected: dict[str, str]
) -> None:
    found = kinds(tmp_path, TEXT, overrides)
    found = {k: v for k, v in found.items() if k not in ("saver.folder", "test_only")}
    assert found == expected


@pytest.mark.parametrize(
    ("rule", "key", "expected"),
    [
        ("!ref <epochs> * 50", "epochs", "extending"),
        ("!ref <epochs> / 2", "epochs", "extending"),
        ("!ref 1 / <epochs>", "epochs", "training"),  # a rate, and no total
        ("!ref 96 // <epochs>", "epochs", "training"),  # falls where the run grows
        ("!ref name-<epochs>", "epochs", "training"),
        ("!ref <num_workers> * 8", "num_workers", "training"),
        ("!ref <num_workers>", "num_workers", "neutral"),
        ("!ref <beam> * 2", "beam", "training"),
    ],
)
def test_what_is_computed_from_a_key_is_judged_by_what_it_is(
    tmp_path: Path, rule: str, key: str, expected: str
) -> None:
    found = kinds(tmp_path, f"{TEXT}computed: {rule}\n", {key: 8})
    assert found.pop("computed", "neutral") == expected
    assert found == {key: "extending" if key == "epochs" else "neutral"}


def test_a_limit_that_is_computed_from_two_keys_makes_neither_extending(tmp_path: Path) -> None:
    text = "batch_size: 4\nitems: 8\nseed: 1\ncounter: !new:trainer.EpochCounter\n  limit: "
    both = f"{text}!ref <items> // <batch_size>\n"
    assert kinds(tmp_path, both, {"batch_size": 2}) == {"batch_size": "training"}
    one = f"{text}!ref <items> * 2\n"
    assert kinds(tmp_path, one, {"items": 9}) == {
        "items": "extending",
        "counter.limit": "extending",
    }


def test_the_way_of_writing_is_no_change(tmp_path: Path) -> None:
    before = "lr: 0.1\nopt: !name:torch.optim.SGD {lr: !ref <lr>, momentum: 0}\nlist: [1, 2]\n"
    after = "list:\n- 1\n- 2.0\nopt: !name:torch.optim.SGD {momentum: 0.0, lr: 1e-1}\n"
    after += "lr: 0.1\nprecision: fp32\nmax_grad_norm: 5\n"
    assert settings(tmp_path, after).changes(settings(tmp_path, before)) == []
    assert settings(tmp_path, before).changes(settings(tmp_path, after)) == []


def test_a_change_shows_both_values(tmp_path: Path) -> None:
    before = "a: 1\nb: {c: !new:x.Y {d: 2}, e: [1, 2]}\ngone: true\nday: 2001-02-03\n"
    after = "a: true\nb: {c: !new:x.Z {d: 3}, e: [1, 3]}\nnew: !ref <a>\nday: 2001-02-04\n"
    found = settings(tmp_path, after).changes(settings(tmp_path, before))
    assert list(map(str, found)) == [
        "a: 1 -> true",
        "b.c: !new:x.Y -> !new:x.Z",
        "b.c.d: 2 -> 3",
        "b.e.1: 2 -> 3",
        "day: 2001-02-03 -> 2001-02-04",
        "gone: true -> absent",
        "new: absent -> true",
    ]
    assert {each.kind for each in found} == {"training"}


def test_a_text_is_told_from_a_number(tmp_path: Path) -> None:
    before, after = "a: 1\nb: '1e-3'\nc: 'true'\n", "a: '1'\nb: 1e-3\nc: true\n"
    found = settings(tmp_path, after).changes(settings(tmp_path, before))
    assert list(map(str, found)) == ["a: 1 -> '1'", "b: '1e-3' -> 0.001", "c: 'true' -> true"]


def test_one_changed_leaf_of_any_tree_is_found_and_no_other() -> None:
    draw = random.Random(5)

    def tree(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.3:
            return draw.choice([0, 1, 2.5, True, "x", "1", None, "", -1e30])
        if draw.random() < 0.4:
            return [tree(depth - 1) for _ in range(draw.randrange(1, 4))]
        return {f"k{n}": tree(depth - 1) for n in range(draw.randrange(1, 4))}

    def put(value: Any, path: list[str], new: Any) -> Any:
        if not path:
            return new
        if isinstance(value, list):
            return [put(v, path[1:], new) if str(i) == path[0] else v for i, v in enumerate(value)]
        return {k: put(v, path[1:], new) if k == path[0] else v for k, v in value.items()}

    tried = 0
    for _ in range(60):
        value = {f"own{n}": tree(3) for n in range(4)}
        before = of(value)
        assert of(value).changes(before) == []
        leaves = [key for key in before.values if key.startswith("own")]
        key = draw.choice(leaves)
        other = of(put(value, key.split("."), "another"))
        assert [(each.key, each.new) for each in other.changes(before)] == [(key, "another")]
        tried += 1
    assert tried == 60


@settings_of_hypothesis(max_examples=60, deadline=None)
@example("clips: [!new:trainer.clipping.NormClip {max_norm: 1}, !name:torch.nn.ReLU]")
@example("a: &x 1\nb: [*x, {c: *x}]\nd: !ref <a>")
@example("a: ['007', '(1, 2)', (1, 2), 'null', '!ref <a>', '', !!str ]")
@given(GOOD_YAMLS)
def test_the_record_of_a_yaml_has_the_same_values(text: str) -> None:
    """A hyperparams.yaml that is read again is the same run."""
    path = FOLDER / "first.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        configuration = Configuration(path)
        before = Settings(configuration.root, configuration.registry)
    except ValueError:
        return  # No run begins.
    path.write_text(configuration.dump(), encoding="utf-8")
    again = Configuration(path)
    after = Settings(again.root, again.registry)
    assert after.changes(before) == []
    assert after.values.keys() == before.values.keys()


def of(value: Any) -> Settings:
    """Return the settings of plain values."""
    return Settings(represent(value), Registry())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ("resumable_keys: [epcohs]", "resumable_keys names 'epcohs', which is no key.*'epochs'"),
        ("neutral_keys: [a.b]", r"neutral_keys names 'a\.b', which is no key"),
        ("resumable_keys: 3", "resumable_keys must be a list of keys"),
        ("neutral_keys: [1]", "neutral_keys must be a list of keys"),
        ("resumable_keys: {epochs: 1}", "resumable_keys must be a list of keys"),
    ],
)
def test_a_wrong_list_of_keys_is_a_sentence(tmp_path: Path, lists: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(tmp_path, f"epochs: 3\n{lists}\n")


@pytest.mark.parametrize(
    ("overrides", "suffix"),
    [
        ({"lr": "1e-3"}, "-lr=0.001"),
        ({"width": "64", "lr": "0.2"}, "-lr=0.2-width=64"),
        ({"opt.momentum": "0.5"}, "-opt.momentum=0.5"),
        ({"epochs": "9", "num_workers": "2", "seed": "3", "data_folder": "/x", "beam": "2"}, ""),
        ({"quality": "../a b"}, "-quality=..%2Fa%20b"),
        ({"quality": "a=b-c"}, "-quality=a%3Db-c"),
        ({"quality": "é\n"}, "-quality=%C3%A9%0A"),
        ({"noise_folder": "/n"}, "-noise_folder=%2Fn"),
        ({"precision": "bf16"}, "-precision=bf16"),
    ],
)
def test_the_suffix_names_changed_training_keys(
    tmp_path: Path, overrides: dict[str, str], suffix: str
) -> None:
    assert suffix_of(tmp_path, overrides) == suffix


def test_a_long_suffix_becomes_a_hash_that_differs(tmp_path: Path) -> None:
    found = {suffix_of(tmp_path, {"quality": "x" * (80 + n)}) for n in range(5)}
    assert len(found) == 5
    assert all(len(each) < 20 and each.startswith("-") for each in found)
    assert suffix_of(tmp_path, {"quality": "x" * 71}) == f"-quality={'x' * 71}"


def suffix_of(folder: Path, overrides: dict[str, str]) -> str:
    """Return the end of the default folder's name for a command line."""
    path = folder / "x.yaml"
    path.write_text(TEXT.replace("output_folder: results/x\n", ""))
    given = [f"--{key}={value}" for key, value in overrides.items()]
    name = str(configure([str(path), *given])[1].output_folder)
    seed = overrides.get("seed", "1")
    start = f"results/{folder.name}/x/{seed}"
    assert name.startswith(start)
    return name.removeprefix(start)
