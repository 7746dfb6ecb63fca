"""Run options: one precedence, aliases of former names, and a sentence for every wrong value."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import options as run_options
from trainer.options import (
    ALIASES,
    METADATA,
    TRANSIENT_OPTIONS,
    RunOptions,
    allowed,
    current_name,
    nearest,
)


def test_precedence_is_default_then_hparams_then_run_opts() -> None:
    hparams = {"seed": 7, "precision": "bf16", "width": 128, "compile": True}
    options = RunOptions.build(hparams, {"precision": "fp16"})
    assert (options.clip, options.seed, options.precision) == ("norm", 7, "fp16")
    assert options.compile is True


def test_a_run_opts_that_is_complete_wins_over_hparams() -> None:
    options = RunOptions(seed=3)
    assert RunOptions.build({"seed": 7}, options) is options


def test_every_option_has_help_and_an_allowed_default() -> None:
    names = RunOptions.names()
    assert len(names) == len(METADATA) > 30
    for name in names:
        assert METADATA[name].help
        assert allowed(name)
    assert RunOptions.build({}) == RunOptions()


def test_values_take_the_type_of_their_option() -> None:
    options = RunOptions.build(
        {"max_grad_norm": {"generator": 1, "discriminator": None}},
        {"device": torch.device("cpu"), "output_folder": Path("a/b"), "max_bad_item": 0},
    )
    assert options.max_grad_norm == {"generator": 1.0, "discriminator": None}
    assert (options.device, options.output_folder) == ("cpu", "a/b")
    assert isinstance(options.max_bad_item, float)
    assert RunOptions(max_grad_norm="inf").max_grad_norm == math.inf  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("precision", "fp8", "precision must be one of fp32, fp16, bf16, not 'fp8'"),
        ("eval_precision", 16, "eval_precision must be one of fp32, fp16, bf16 or null, not 16"),
        ("seed", True, "seed must be a whole number of at least 0, not True"),
        ("seed", -1, "seed must be a whole number of at least 0, not -1"),
        ("compile", 1, "compile must be true or false, not 1"),
        ("compile_modules", "encoder", "compile_modules must be a list of texts or null, not"),
        ("max_bad_item", 1.5, "max_bad_item must be a number from 0 to 1, not 1.5"),
        ("max_bad_item", math.nan, "max_bad_item must be a number from 0 to 1, not nan"),
        (
            "optimizer_step_limit",
            "3",
            "optimizer_step_limit must be a whole number of at least 1 or null, not '3'",
        ),
        (
            "max_grad_norm",
            {"g": "big"},
            "max_grad_norm must be a number, a mapping of names to numbers or null, not {'g': ",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: Any, sentence: str) -> None:
    for build in (lambda: RunOptions.build({}, {name: value}), lambda: RunOptions(**{name: value})):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            build()


def test_an_unknown_run_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="^'precison' is not a run option; did you mean 'prec"):
        RunOptions.build({}, {"precison": "fp16"})
    with pytest.raises(ValueError, match="^'zzzzz' is not a run option$"):
        RunOptions.build({}, {"zzzzz": 1})
    assert nearest("zzzzz", ["seed"]) == ""


def test_former_names_set_the_same_options_and_are_noted_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_options._note.cache_clear()
    assert len(ALIASES) >= 2
    with caplog.at_level(logging.WARNING, "trainer"):
        for _ in range(2):
            options = RunOptions.build({"on_bad_audio": "raise"}, {"max_bad_audio": 0.5})
    assert (options.on_bad_item, options.max_bad_item) == ("raise", 0.5)
    assert (options.on_bad_audio, options.max_bad_audio) == ("raise", 0.5)  # type: ignore[attr-defined]
    notes = [each.getMessage() for each in caplog.records]
    assert sorted(notes) == [
        "the option max_bad_audio is now called max_bad_item",
        "the option on_bad_audio is now called on_bad_item",
    ]
    assert current_name("seed") == "seed"
    with pytest.raises(AttributeError, match="no attribute 'on_bad_sound'"):
        _ = options.on_bad_sound  # type: ignore[attr-defined]


def test_every_option_is_in_a_section_and_those_of_one_command_are_transient() -> None:
    assert METADATA[RunOptions.names()[0]].section
    assert len([each for each in METADATA.values() if each.section]) >= 6
    assert len(TRANSIENT_OPTIONS) == 12
    assert set(TRANSIENT_OPTIONS) >= {"overwrite", "test_only", "debug", "replay"}
    assert not set(TRANSIENT_OPTIONS) & {"seed", "precision", "output_folder"}
