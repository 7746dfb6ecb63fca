"""Run options by the names of other toolkits: the same, mapped, ignored with a line, or refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.small import Regressor, batches, make
from trainer import options as run_options
from trainer.cli.arguments import configure, parse_arguments
from trainer.config.changes import Settings
from trainer.config.hyperparameters import Configuration, load_hparams
from trainer.options import RunOptions
from trainer.other_options import DEFAULTS, IGNORED, NAMES, REFUSED, RENAMED, SIMILAR

SAME = [
    "test_only",
    "debug",
    "debug_batches",
    "debug_epochs",
    "device",
    "compile",
    "compile_mode",
    "precision",
    "eval_precision",
    "max_grad_norm",
    "skip_nonfinite_grads",
    "nonfinite_patience",
    "grad_accumulation_factor",
    "optimizer_step_limit",
    "profile_training",
    "profile_warmup",
    "profile_steps",
]
# A value of each other option, and what it means here.
MAPPED: list[tuple[str, Any, str, Any]] = [
    ("auto_mix_prec", True, "precision", "fp16"),
    ("auto_mix_prec", 1, "precision", "fp16"),
    ("auto_mix_prec", False, "precision", "fp32"),
    ("bfloat16_mix_prec", True, "precision", "bf16"),
    ("ckpt_interval_minutes", 15, "checkpoint_every_minutes", 15.0),
    ("ckpt_interval_minutes", 0, "checkpoint_every_minutes", None),
    ("ckpt_interval_steps", 100, "checkpoint_every_steps", 100),
    ("ckpt_interval_steps", -1, "checkpoint_every_steps", None),
    ("compile_module_keys", ["net"], "compile_modules", ["net"]),
    ("noprogressbar", True, "progressbar", False),
    ("noprogressbar", False, "progressbar", True),
]
VALUES: dict[str, Any] = {
    "data_parallel_count": 2, "distributed_backend": "gloo", "jit_module_keys": ["net"],
    "local_rank": 1, "log_config": "log.yaml", "tqdm_barcolor": {"train": "RED"},
}  # fmt: skip

Write = Callable[[str], str]


@pytest.fixture(autouse=True)
def warn_again() -> None:
    """Forget which warnings were given."""
    run_options._note.cache_clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a YAML and returns its path."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> str:
        Path("demo.yaml").write_text(text)
        return "demo.yaml"

    return _write


def spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def ways(write: Write, name: str, value: Any) -> list[Callable[[], RunOptions]]:
    """Return the ways to give an option: in Python, in hyperparameters, in a YAML, as a flag."""
    text = spelled(value)
    return [
        lambda: RunOptions.build({}, {name: value}),
        lambda: RunOptions.build({name: value}),
        lambda: configure([write(f"a: 1\n{name}: {text}\n")])[1],
        lambda: configure([write("a: 1\n"), f"--{name}={text}"])[1],
        lambda: configure([write(f"{name}: null\n"), f"--{name}={text}"])[1],
        lambda: RunOptions.build({}, parse_arguments([write("a: 1\n"), f"--{name}={text}"])[1]),
        lambda: RunOptions.build(load_hparams(write(f"{name}: {text}\n"))),
    ]


def test_every_option_of_the_other_toolkit_has_a_meaning() -> None:
    assert set(SAME) <= set(RunOptions.names())
    assert len({*SAME, *DEFAULTS} - {"local_rank"}) == 37
    assert not set(RunOptions.names()) & {*NAMES, *SIMILAR}
    for option in (*(each[0] for each in RENAMED.values()), *SIMILAR.values()):
        assert option in RunOptions.names()


@pytest.mark.parametrize(("name", "value", "option", "meaning"), MAPPED)
def test_an_option_that_is_mapped_counts_however_it_is_given(
    write: Write, name: str, value: Any, option: str, meaning: Any
) -> None:
    made = ways(write, name, value)
    if name == "noprogressbar":  # The command line says how it is written here.
        made = [each for number, each in enumerate(made) if number not in (3, 5)]
    assert [getattr(each(), option) for each in made] == [meaning] * len(made)


@pytest.mark.parametrize("name", IGNORED)
def test_an_option_that_is_ignored_says_why(
    write: Write, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = VALUES.get(name, True)
    for each in ways(write, name, value):
        caplog.clear()
        run_options._note.cache_clear()
        each()
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"the option {name} is ignored: {IGNORED[name][1]}"]


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_change_the_run_is_refused(write: Write, name: str) -> None:
    for each in ways(write, name, True):
        with pytest.raises(ValueError, match=f"there is no option {name} here: "):
            each()


def test_defaults_of_the_other_toolkit_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert RunOptions.build({}, DEFAULTS) == RunOptions()
    assert not caplog.records


def test_an_option_under_its_own_name_wins_and_says_so(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("auto_mix_prec: true\nckpt_interval_minutes: 15\n")
    _, options = configure([path, "--precision=bf16", "--ckpt_interval_minutes=30"])
    assert (options.precision, options.checkpoint_every_minutes) == ("bf16", 30.0)
    assert "auto_mix_prec has no effect: precision is given too" in caplog.messages
    assert configure([path, "--no-auto_mix_prec"])[1].precision == "fp32"


def test_a_wrong_value_is_named_with_its_place(write: Write) -> None:
    with pytest.raises(
        ValueError, match=r"demo\.yaml, line 2: checkpoint_every_minutes must be a n"
    ):
        configure([write("a: 1\nckpt_interval_minutes: often\n")])


def test_options_that_know_which_were_given_count_by_these() -> None:
    class Options(SimpleNamespace):
        def __getitem__(self, name: str) -> Any:
            return getattr(self, name)

    given = Options(precision="bf16", debug=True, seed=3, overridden_args={"precision"})
    assert RunOptions.build({"seed": 7}, given) == RunOptions(precision="bf16", seed=7)
    brain = Regressor({"net": torch.nn.Linear(1, 1)}, run_opts=given)
    assert brain.options.precision == "bf16"


def test_options_that_were_not_given_can_be_read_from_parsed_arguments(write: Write) -> None:
    _, run_opts, _ = parse_arguments([write("a: 1\n"), "--precision=bf16"])
    assert run_opts == {"precision": "bf16"}
    assert torch.device(run_opts["device"]).type in ("cpu", "cuda")
    assert run_opts["debug"] is False
    assert run_opts["distributed_backend"] in ("gloo", "nccl")  # By the device.
    assert run_opts["ckpt_interval_minutes"] == 0
    with pytest.raises(KeyError):
        _ = run_opts["colour"]


def test_a_start_compares_what_an_option_means(write: Write) -> None:
    def settings(text: str) -> Settings:
        configuration = Configuration(write(f"lr: 1\n{text}"))
        return Settings(configuration.root, configuration.registry)

    half = settings("auto_mix_prec: true\njit: false\nckpt_interval_minutes: 5\n")
    assert not settings("precision: fp16\ncheckpoint_every_minutes: 5\njit: true\n").changes(half)
    changes = settings("ckpt_interval_minutes: 6\nauto_mix_prec: false\n").changes(half)
    assert {str(each): each.kind for each in changes} == {
        "precision: fp16 -> fp32": "training",
        "checkpoint_every_minutes: 5 -> 6": "neutral",
    }
    assert (
        half.suffix({"auto_mix_prec": False, "ckpt_interval_minutes": 0}) == "-auto_mix_prec=true"
    )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "--noprogressbar",
            "there is no key or run option 'noprogressbar'; did you mean --no-progr",
        ),
        ("--no_progressbar", "did you mean --no-progressbar?"),
        ("--nocompile", "did you mean --no-compile?"),
        ("--no_shuffle=true", "did you mean --no-shuffle?"),
        ("--lr=1", "did you mean 'adam.lr'?"),
        ("--learning_rate=1", "did you mean 'adam.lr'?"),
        ("--epochs=1", "did you mean 'number_of_epochs'?"),
        ("--optimizer.lr=1", "did you mean 'adam.lr'?"),
        ("--adan.lr=1", "did you mean 'adam'?"),
        ("--max_epochs=1", "did you mean 'number_of_epochs'?"),
        ("--limits=1", "did you mean 'counter.limit'?"),
        ("--counters=1", "did you mean 'counter.limit'?"),
        ("--batch_size=1", "did you mean 'train.batch_size' or 'valid.batch_size'?"),
        ("--bs=1", "did you mean 'train.batch_size' or 'valid.batch_size'?"),
        ("--gradient_clip_val=1", "the option is 'max_grad_norm'"),
        ("--fp16", "the option is 'precision'"),
        (
            "--number_of_epochs=",
            "--number_of_epochs needs a value; null is written null, and an empty text in quotes",
        ),
        ("--adam.lr=", "--adam.lr needs a value"),
        ("--precision=", "--precision needs a value"),
        ("--none=None", "none: null is written null"),
        ("--text=None", "text: null is written null, and the text None in quotes"),
        ("--output_folder=None", "output_folder: null is written null"),
    ],
)
def test_a_slip_on_the_command_line_names_what_is_meant(
    write: Write, argument: str, said: str
) -> None:
    path = write(
        "number_of_epochs: 3\nadam: {lr: 1}\nshuffle: true\ntrain: {batch_size: 2}\nnone: null\n"
        "text: a\nvalid: {batch_size: 2}\ncounter: !new:trainer.EpochCounter {limit: 3}\n"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        configure([path, argument])


def test_an_empty_argument_is_no_value_and_an_empty_text_is_quoted(write: Write) -> None:
    path = write("text: a\nnone: 1\n")
    with pytest.raises(ValueError, match="--text needs a value; null is written null"):
        configure([path, "--text", ""])
    for typed, value in (("''", ""), ('""', ""), ('"None"', "None"), ("null", None)):
        assert configure([path, f"--text={typed}"])[0].build()["text"] == value
    assert configure([path, "--none=null"])[0].build()["none"] is None


def test_a_typed_tilde_is_the_home_folder(write: Write) -> None:
    path = write("data_folder: a\n")
    home = str(Path.home())
    for typed, value in (("~", home), ("~/b", f"{home}/b"), ("a~", "a~")):
        arguments = [path, f"--data_folder={typed}", f"--output_folder={typed}"]
        configuration, options = configure(arguments)
        assert (configuration.build()["data_folder"], options.output_folder) == (value, value)


def test_hyphens_of_a_launcher_are_taken(write: Write) -> None:
    path = write("adam: {lr: 1}\nwidth: 3\n")
    configure([path, "--local-rank=0"])
    assert configure([path, "--ckpt-interval-minutes=4"])[1].checkpoint_every_minutes == 4
    with pytest.raises(ValueError, match=r"'learning-rate'; did you mean 'adam\.lr'"):
        configure([path, "--learning-rate=3"])


def test_overrides_are_a_mapping_of_numbers_of_any_kind(write: Write) -> None:
    path = write("whole: 1\npart: 0.5\nmodel: {width: 3}\n")
    found = load_hparams(path, {"whole": np.int64(3), "part": np.float32(0.25)})
    assert (found["whole"], found["part"]) == (3, 0.25)
    assert {type(found[each]) for each in ("whole", "part")} == {int, float}
    with pytest.raises(ValueError, match="overrides must be a mapping, such as .*, not 'whole: 3'"):
        load_hparams(path, "whole: 3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must be a mapping, as its default \{…\} is"):
        load_hparams(path, {"model": 3})


@pytest.mark.parametrize("value", ["None", 3, {"patience": 3}, True])
def test_early_stopping_that_cannot_stop_is_refused_before_training(value: Any) -> None:
    with pytest.raises(
        ValueError, match="early_stopping is .*; allowed: null, or an object such as"
    ):
        make(hparams={"early_stopping": value}).fit(range(1), batches(1))


def test_names_of_other_toolkits_among_hyperparameters_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Regressor({"net": torch.nn.Linear(1, 1)}, hparams={"gradient_clip_val": 1.0, "width": 3})
    assert caplog.messages == [
        "'gradient_clip_val' is not a run option and has no effect by itself; the option is "
        "'max_grad_norm'"
    ]
    assert caplog.records[0].levelno == logging.WARNING
